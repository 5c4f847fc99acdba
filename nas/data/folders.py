"""Image folders: splits with CLASS/*.jpg, one tree to be cut, flat folders; classes by folder or from a CSV file."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.data_config import GREY_BITS
from nas.core.io import digest_of
from nas.core.progress import Tick
from nas.data.annotations import Annotations, open_annotations, read_annotations
from nas.data.dataset import DataSpec
from nas.data.decode import chosen_img_size, deep_grey, header_size, read_picture, store_size_of, why_broken
from nas.data.roles import classes_in, find_parts, opened, parts_by_hand
from nas.data.sources import DataSource, ImagePool
from nas.data.split import TEST_IMAGES, choose, proxy_limit
from nas.data.tree import Tree, counted, joined, walk
from space.errors import refuse

VERSION = 4
"""Of the decoding and the choice of images: another one is another data set."""
_LOOKED_AT = 101
_CHUNK = 64
_LAYOUT = "train/CLASS/IMAGE with val/CLASS/IMAGE, or CLASS/IMAGE, or images without classes"
_CSV = "--annotations FILE.csv gives them classes"


@dataclass(frozen=True, slots=True)
class _File:
    name: str  # relative to the root, with forward slashes
    label: int
    role: str


@dataclass
class _SideImages:
    """The images of one role, by class or without; `shown` names its folders for users."""

    role: str
    shown: str
    classes: dict[str, list[str]] = field(default_factory=dict)
    flat: list[str] = field(default_factory=list)

    def paths(self) -> list[str]:
        return [path for paths in self.classes.values() for path in paths] or self.flat


def folder(spec: DataSpec) -> DataSource:
    """List an image folder and choose which images are used. Raises InputError."""
    root = _existing(spec.data)
    if spec.annotations is not None:
        open_annotations(spec.annotations, root)  # refused before a large folder is listed
    tree = walk(root)
    notes = tree.left_out()
    annotated = None
    if spec.annotations is not None:
        annotated = read_annotations(spec.annotations, tree, spec.max_corrupt)
        notes += annotated.notes
    sides = _sides(spec, tree, annotated)
    unused = Counter(os.path.dirname(path) for path in tree.images(""))
    unused -= Counter(os.path.dirname(path) for side in sides for path in side.paths())
    if spec.test_only:
        sides = _only_test(sides)
    elif not any(side.role == "train" for side in sides):
        shown = ", ".join(f"{side.shown} ({side.role})" for side in sides)
        raise refuse("--data", f"{spec.data}: {shown}", "a folder to train on", "--splits 'train=FOLDER,test=FOLDER'")
    if any(side.classes for side in sides if side.role == "train" or spec.test_only):
        sides = _with_truth(sides, notes)
        classes = _class_names(spec, tree, sides, notes)
    else:
        classes = ()
        _check_unlabelled(spec, tree, sides)
        notes.append(f"no class folders: images without ground truth, labelled by the teacher ({_CSV})")
    sides = _named_sides(sides, notes)
    if unused and annotated is None:
        shown = ", ".join(f"{n:,} in {at or '.'}/" for at, n in unused.most_common(4))
        notes.append(f"{counted(unused.total(), 'loose image')} outside the class folders left out: {shown}")
    used = _used(spec, sides, classes, notes)
    if not classes and len(used) < 3:
        raise refuse("--data", f"{spec.data}, {len(used)} images", "at least 3", _LAYOUT)
    img_size = spec.img_size
    if img_size is None:
        with _quiet():
            sizes = [header_size(root / file.name) for file in _chosen(used, _LOOKED_AT, "", 1)]
        img_size, line = chosen_img_size(size for size in sizes if size is not None)
        notes.append(line)
    given = frozenset(side.role for side in sides if side.role in ("holdout", "test"))
    return _source(spec, root, classes, used, img_size, notes, given)


def _sides(spec: DataSpec, tree: Tree, annotated: Annotations | None) -> list[_SideImages]:
    """Collect the images of each role, with the classes of their folders or of the annotations."""
    sides: dict[str, _SideImages] = {}
    if annotated is not None and annotated.with_splits:
        for path, (label, role) in annotated.rows.items():
            side = sides.setdefault(str(role), _SideImages(str(role), f"rows of {role}"))
            side.classes.setdefault(label, []).append(path)
        return [*sides.values()]
    parts = parts_by_hand(tree, spec.splits) if spec.splits is not None else find_parts(tree, ask=annotated is None)
    rows = {} if annotated is None else annotated.rows
    known: frozenset[str] = frozenset()
    for part in sorted(parts, key=lambda part: part.role != "train"):
        shown = part.shown if part.label is None else f"CLASS/{os.path.basename(part.folder)}/"
        side = sides.setdefault(part.role, _SideImages(part.role, shown))
        if shown not in side.shown.split(" and "):
            side.shown += f" and {shown}"
        others = frozenset(other.folder for other in parts) - {part.folder}
        inside = tuple(f"{other}/" for other in others if f"{other}/".startswith(f"{part.folder}/") or not part.folder)
        named = [path for path in tree.images(part.folder) if path in rows and not path.startswith(inside)]
        for path in named:
            side.classes.setdefault(rows[path][0], []).append(path)
        if not named:
            for label, paths in classes_in(tree, part, spec.classes, others, known).items():
                side.classes.setdefault(label, []).extend(paths)
            at = opened(tree, part.folder, known)
            side.flat += [joined(at, name) for name in tree.files.get(at, ()) if part.label is None]
        if part.role == "train":
            known = known.union(side.classes)
    return [*sides.values()]


def _only_test(sides: Sequence[_SideImages]) -> list[_SideImages]:
    """Take what is a test set: the given one, else the second split, else all images."""
    by_role = {side.role: side for side in sides}
    for role in ("test", "holdout", "train"):
        if role in by_role and (by_role[role].classes or role == "train"):
            return [replace(by_role[role], role="test")]
    return [replace(sides[0], role="test")]


def _with_truth(sides: Sequence[_SideImages], notes: list[str]) -> list[_SideImages]:
    """Leave out the folders without classes beside folders with classes."""
    for side in sides:
        if not side.classes:
            many = counted(len(side.flat), "image")
            notes.append(f"{side.shown}: {many} in no class folders, without ground truth, left out ({_CSV})")
    return [side for side in sides if side.classes]


def _check_unlabelled(spec: DataSpec, tree: Tree, sides: Sequence[_SideImages]) -> None:
    """Refuse images without classes where classes are needed, or where there are no images."""
    if not tree.counts[""]:
        left_out = "; ".join(tree.left_out())
        raise refuse("--data", f"{spec.data}, which has no class folders and no images", _LAYOUT, left_out)
    for side in sides:
        if side.classes:
            got = f"{spec.data}: class folders in {side.shown} but none in train/"
            raise refuse("--data", got, "both with classes or both without", f"{_LAYOUT}; {_CSV}")
    if spec.test_only:
        got = f"{spec.data}, {counted(len(sides[0].flat), 'image')} in no class folders"
        raise refuse("--data", got, "images with classes to evaluate on", _CSV)


def _class_names(spec: DataSpec, tree: Tree, sides: Sequence[_SideImages], notes: list[str]) -> tuple[str, ...]:
    """Return the classes to train on, in order; of a given test set or holdout they may be some. Raises InputError."""
    first = sides[0]
    for label in first.classes:
        try:
            label.encode("utf-8")
        except UnicodeEncodeError:
            got = f"{tree.root} with a folder {os.fsencode(label)!r}"
            raise refuse("--data", got, "names in UTF-8", "rename it") from None
    if empty := [label for label, paths in first.classes.items() if not paths]:
        many = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        got = f"no image in {tree.root / first.shown / ', '.join(empty[:3])}{many}"
        left_out = "; ".join(["remove what is no class, or fill it", *tree.left_out()])
        raise refuse("--data", got, "images of each class", left_out)
    classes = tuple(sorted(first.classes))
    if len(classes) == 1 and not spec.test_only:
        got = f"{spec.data}, which has one class only ({classes[0]})"
        raise refuse("--data", got, "at least two classes", _LAYOUT)
    folded = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if folded[name.casefold()] > 1]:
        notes.append(f"classes that differ in upper and lower case alone are kept apart: {', '.join(alike[:4])}")
    for side in sides[1:]:
        odd = sorted(name for name, paths in side.classes.items() if paths and name not in classes)
        missing = [name for name in classes if not side.classes.get(name)]
        if odd:
            shown = [f"{name!r} only in {first.shown}" for name in missing[:3]]
            shown += [f"{name!r} only in {side.shown}" for name in odd[:3]]
            got = f"{spec.data}: {', '.join(shown)}; {len(missing)} and {len(odd)} in all"
            raise refuse("--data", got, f"the same classes in {first.shown} and {side.shown}", "rename or remove them")
        if missing:
            more = ", ..." if len(missing) > 3 else ""
            notes.append(f"{side.shown} has no images of {len(missing)} of the classes: {', '.join(missing[:3])}{more}")
    return classes


def _named_sides(sides: Sequence[_SideImages], notes: list[str]) -> list[_SideImages]:
    """Give the sides the roles of `nas.data.split.ROLES`, and name each with its role and count."""
    roles = {side.role for side in sides}
    final = {role: role for role in roles}
    purpose = {"train": "for training", "holdout": "the holdout", "test": "the test set"}
    if roles == {"train"}:
        final["train"] = "any"
        purpose["train"] = "cut into train, holdout and test"
    elif len(roles) == 2:
        final = {role: "train" if role == "train" else "test" for role in roles}
        purpose["train"], purpose["holdout"] = "for training, and the holdout is cut from it", purpose["test"]
    elif len(roles) == 3:
        final["train"] = "fit"
    for side in sides:
        groups = f" in {len(side.classes):,} class{'es' * (len(side.classes) > 1)}" if side.classes else ""
        notes.append(f"{side.shown}: {purpose[side.role]}, {counted(len(side.paths()), 'image')}{groups}")
    return [replace(side, role=final[side.role]) for side in sides]


def _used(spec: DataSpec, sides: Sequence[_SideImages], classes: Sequence[str], notes: list[str]) -> list[_File]:
    """Choose which images are read, stratified by role and class."""
    number = {name: at for at, name in enumerate(classes)}
    tested: list[_File] = []
    others: list[_File] = []
    for side in sides:
        files = [_File(path, number.get(name, 0), side.role) for name, paths in side.classes.items() for path in paths]
        files = files or [_File(path, 0, side.role) for path in side.flat]
        (tested if side.role == "test" else others).extend(files)
    limit = spec.max_test_images
    if limit is None:
        limit = len(tested) if spec.test_only else max(TEST_IMAGES, len(classes))
    if spec.test_only and spec.max_images is not None:
        limit = min(limit, spec.max_images)
    kept = _chosen(tested, limit, "test", 1)
    if len(kept) < len(tested):
        notes.append(f"{len(kept):,} of {len(tested):,} test images used (--max-test-images)")
    if not others:
        return kept
    used, note = _proxy(others, max(1, len(classes)), spec.images_for(len(classes)), bool(tested))
    notes += note
    return used + kept


def _source(
    spec: DataSpec,
    root: Path,
    classes: tuple[str, ...],
    used: Sequence[_File],
    img_size: int,
    notes: Sequence[str],
    given: frozenset[str],
) -> DataSource:
    store_size = store_size_of(img_size)

    def fill(pool: ImagePool, tick: Tick) -> None:
        deep = _deepest(root, used)
        pool.grey_bits = deep and (spec.grey_bits or deep)
        for file, found in _decoded(root, used, img_size, store_size, pool.grey_bits or GREY_BITS):
            if isinstance(found, str):
                pool.lose(file.name, found)
            else:
                key, picture, pixels = found
                pool.add(key, file.label, file.role, pixels, file.name, picture)
            tick(1.0)

    return DataSource(
        name=spec.data,
        classes=classes,
        img_size=img_size,
        store_size=store_size,
        hflip=True,
        identity={
            **{"folder": VERSION, "root": os.fspath(root), "classes": list(classes), "files": _listing(root, used)},
            **({} if spec.grey_bits is None else {"grey_bits": spec.grey_bits}),
        },
        decoding=f"file {VERSION}",
        count=len(used),
        fill=fill,
        notes=tuple(notes),
        root=None if spec.pixel_cache else root,
        given=given,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings on odd files: broken ones are reported in one place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _existing(name: str) -> Path:
    remedy = "see --help for the data sets that need no folder"
    try:
        path = Path(name).expanduser()
        if not path.exists():
            raise refuse("--data", name, "digits, fractals or an existing folder", remedy)
        if not path.is_dir():
            packed = path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
            raise refuse("--data", name, "a folder, not a file", "unpack it" if packed else remedy)
        os.listdir(path)
    except OSError as error:
        raise refuse("--data", f"{name} ({error.strerror})", "a folder that can be read") from error
    except RuntimeError as error:  # no such user after "~"
        raise refuse("--data", f"{name} ({error})", "an existing folder", remedy) from error
    return path.resolve()


def _chosen(files: Sequence[_File], count: int, salt: str, at_least: int) -> list[_File]:
    # Of a given holdout beside train/, each is a stratum of its own.
    most = max((file.label for file in files), default=0) + 1
    labels = np.array([file.label + most * (file.role == "holdout") for file in files], dtype=np.int64)
    rows = choose([file.name for file in files], labels, count, salt, at_least)
    return [files[row] for row in rows]


def _proxy(files: list[_File], classes: int, asked: int | None, split: bool) -> tuple[list[_File], list[str]]:
    limit = proxy_limit(classes, asked, split)
    used = _chosen(files, limit, "proxy", 2 if split else 3)
    if len(used) == len(files):
        return used, []
    what = "training images" if split else "images"
    return used, [f"{len(used):,} of {len(files):,} {what} used (--max-images)"]


def _listing(root: Path, files: Sequence[_File]) -> str:
    """Hash names, sizes and times of the images, without reading them."""
    rows: list[Any] = []
    for file in files:
        try:
            about = os.stat(root / file.name)
            rows.append([file.name, file.label, file.role, about.st_size, about.st_mtime_ns])
        except OSError:  # a dangling link; named as broken when it is decoded
            rows.append([file.name, file.label, file.role])
    return digest_of(rows)


def _deepest(root: Path, files: Sequence[_File]) -> int | None:
    """Return the bits that hold all deep grey of a data set; None where there is none, as the files' headers tell."""
    with _quiet(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda file: deep_grey(root / file.name), files)
        return max((bits for bits in found if bits is not None), default=None)


def _decoded(
    root: Path, files: Sequence[_File], img_size: int, store_size: int, grey_bits: int
) -> Iterator[tuple[_File, tuple[str, str, NDArray[np.uint8]] | str]]:
    """Decode in threads (Pillow lets the interpreter go), in order; of a broken file the reason."""

    def one(file: _File) -> tuple[str, str, NDArray[np.uint8]] | str:
        try:
            return read_picture(root / file.name, img_size, store_size, grey_bits)
        except Exception as error:  # a damaged file raises almost anything in Pillow
            return why_broken(error)

    with _quiet(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            yield from zip(chunk, threads.map(one, chunk), strict=True)
