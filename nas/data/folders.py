"""Image folders: `train/CLASS/*.jpg` with `val/`, or one tree `CLASS/*.jpg` to be cut."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.io import digest_of
from nas.core.progress import Tick
from nas.data.dataset import DataSpec
from nas.data.decode import chosen_img_size, header_size, read_image, store_size_of, why_broken
from nas.data.sources import DataSource, ImagePool
from nas.data.split import TEST_IMAGES, choose, proxy_limit
from space.errors import refuse

VERSION = 2
"""Of the decoding and the choice of images: another one is another data set."""
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"))
TEST_NAMES = ("val", "valid", "validation", "test", "eval")
_LOOKED_AT = 101
_CHUNK = 64
_LAYOUT = "train/CLASS/IMAGE with val/CLASS/IMAGE, or CLASS/IMAGE, or images without classes"


@dataclass(frozen=True)
class _File:
    path: Path
    name: str  # relative to the root, with forward slashes
    label: int
    role: str


def folder(spec: DataSpec) -> DataSource:
    """List an image folder and choose which images are used. Raises InputError."""
    root = _existing(spec.data)
    tree, test = _layout(root)
    loose = _loose(tree)
    # Images that lie about beside class folders are no part of a labelled set.
    classes = () if loose and not _class_folders(tree) else _classes(tree, spec.data)
    notes = []
    role = "any" if test is None else "train"
    if classes:
        files = list(_files(root, tree, classes, role))
    else:
        files = _unlabelled(root, loose, role)
        notes.append("no class folders: images without ground truth, labelled by the teacher")
        if len(files) < 3:
            raise refuse("--data", f"{spec.data}, {len(files)} images", "at least 3", _LAYOUT)
    used, note = _proxy(files, max(1, len(classes)), spec.images_for(len(classes)), test is not None)
    notes += note
    if test is not None:
        tested = _test_side(root, test, classes)
        kept = _chosen(tested, max(TEST_IMAGES, len(classes)), "test", 1)
        if len(kept) < len(tested):
            notes.append(f"{len(kept):,} of {len(tested):,} test images used")
        used += kept
    beside = {root, tree, test or tree} - (set() if classes else {tree, test})
    if ignored := sum(len(_loose(place)) for place in beside):
        noun, verb = ("image", "is") if ignored == 1 else ("images", "are")
        where = "class folders" if classes else "folders named"
        notes.append(f"{ignored:,} loose {noun} outside the {where} {verb} ignored")
    img_size = spec.img_size
    if img_size is None:
        with _quiet():
            sizes = [header_size(file.path) for file in _chosen(used, _LOOKED_AT, "", 1)]
        img_size, line = chosen_img_size(size for size in sizes if size is not None)
        notes.append(line)
    return _source(spec, root, classes, used, img_size, notes)


def _layout(root: Path) -> tuple[Path, Path | None]:
    """Find the folder to train on, and the one to test on unless that is cut from the same."""
    train, test = root / "train", next((root / n for n in TEST_NAMES if _is_dir(root / n)), None)
    if not _is_dir(train):
        return root, None
    if test is not None:
        return train, test
    if _class_folders(train):
        return train, None
    # Images right in train/ are a set without classes, unless "train" is a class among others.
    alone = _class_folders(root) == ["train"]
    return (train if alone and _loose(train) else root), None


def _unlabelled(root: Path, files: Sequence[Path], role: str) -> list[_File]:
    return [_File(path, path.relative_to(root).as_posix(), 0, role) for path in files]


def _source(
    spec: DataSpec, root: Path, classes: tuple[str, ...], used: Sequence[_File], img_size: int, notes: Sequence[str]
) -> DataSource:
    store_size = store_size_of(img_size)

    def fill(pool: ImagePool, tick: Tick) -> None:
        for file, found in _decoded(used, img_size, store_size):
            if isinstance(found, str):
                pool.lose(file.name, found)
            else:
                pool.add(found[0], file.label, file.role, found[1], file.name)
            tick(1.0)

    return DataSource(
        name=spec.data,
        classes=classes,
        img_size=img_size,
        store_size=store_size,
        hflip=True,
        identity={"folder": VERSION, "root": os.fspath(root), "files": _listing(used)},
        decoding=f"file {VERSION}",
        count=len(used),
        fill=fill,
        notes=tuple(notes),
        root=None if spec.pixel_cache else root,
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
            raise refuse("--data", name, "a folder, not a file", remedy)
        os.listdir(path)
    except OSError as error:
        raise refuse("--data", f"{name} ({error.strerror})", "a folder that can be read") from error
    except RuntimeError as error:  # no such user after "~"
        raise refuse("--data", f"{name} ({error})", "an existing folder", remedy) from error
    return path.resolve()


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _unreadable(path, error) from error


def _class_folders(tree: Path) -> list[str]:
    """List the class folders of a tree, sorted by name; links that lead back up are left out."""
    above = {tree.resolve(), *tree.resolve().parents}
    found = [n for n in _listed(tree, folders=True) if (tree / n).resolve() not in above]
    for name in found:  # it becomes a class, which tables and models name
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            got = f"{tree} with a folder {os.fsencode(name)!r}"
            raise refuse("--data", got, "names in UTF-8", "rename it") from None
    return found


def _loose(tree: Path) -> list[Path]:
    """List the images that lie directly in a folder, sorted by name."""
    names = _listed(tree, folders=False)
    return [tree / n for n in names if os.path.splitext(n)[1].lower() in EXTENSIONS]


def _listed(tree: Path, folders: bool) -> list[str]:
    """List the folders or files of a folder by name, hidden ones left out."""
    try:
        with os.scandir(tree) as entries:
            seen = [e for e in entries if not e.name.startswith(".")]
            return sorted(e.name for e in seen if (e.is_dir() if folders else e.is_file()))
    except OSError as error:
        raise _unreadable(tree, error) from error


def _unreadable(path: Path, error: OSError) -> Exception:
    return refuse("--data", f"{path} ({error.strerror})", "a folder that can be read")


def _classes(tree: Path, shown: str) -> tuple[str, ...]:
    names = _class_folders(tree)
    if not names:
        raise refuse("--data", f"{shown}, which has no class folders", _LAYOUT)
    if len(names) == 1:
        got = f"{shown}, which has one class only ({names[0]})"
        raise refuse("--data", got, "at least two classes", _LAYOUT)
    return tuple(names)


def _files(root: Path, tree: Path, classes: Sequence[str], role: str) -> Iterator[_File]:
    """Walk the class folders in a fixed order. Raises InputError for an empty class."""

    def failed(error: OSError) -> None:
        raise _unreadable(Path(error.filename or tree), error) from error

    for label, name in enumerate(classes):
        found = False
        # Links to folders inside a class are not followed: they may lead back up.
        for at, inner, files in os.walk(tree / name, onerror=failed, followlinks=False):
            inner.sort()
            for file in sorted(files):
                if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith("."):
                    path = Path(at) / file
                    relative = path.relative_to(root).as_posix()
                    found = True
                    yield _File(path, relative, label, role)
        if not found:
            kinds = " ".join(sorted(EXTENSIONS))
            raise refuse("--data", f"no image in {tree / name}", f"images ({kinds})", _LAYOUT)


def _test_side(root: Path, test: Path, classes: tuple[str, ...]) -> list[_File]:
    if not classes:
        found = _loose(test)
        if _class_folders(test):
            got = f"{root}: class folders in {test.name}/ but none in train/"
            raise refuse("--data", got, "both with classes or both without", _LAYOUT)
        if not found:
            raise refuse("--data", f"no image in {test}", "images, as in train/", _LAYOUT)
        return _unlabelled(root, found, "test")
    names = _class_folders(test)
    odd = sorted(set(names) ^ set(classes))
    if odd:
        where = ["train" if name in classes else test.name for name in odd[:3]]
        shown = ", ".join(f"{n!r} only in {w}/" for n, w in zip(odd, where, strict=False))
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        want = f"the same classes in train/ and {test.name}/"
        raise refuse("--data", f"{root}: {shown}{more}", want)
    return list(_files(root, test, classes, "test"))


def _chosen(files: Sequence[_File], count: int, salt: str, at_least: int) -> list[_File]:
    labels = np.array([file.label for file in files], dtype=np.int64)
    rows = choose([file.name for file in files], labels, count, salt, at_least)
    return [files[row] for row in rows]


def _proxy(files: list[_File], classes: int, asked: int | None, split: bool) -> tuple[list[_File], list[str]]:
    limit = proxy_limit(classes, asked, split)
    used = _chosen(files, limit, "proxy", 2 if split else 3)
    if len(used) == len(files):
        return used, []
    what = "training images" if split else "images"
    return used, [f"{len(used):,} of {len(files):,} {what} used (--max-images)"]


def _listing(files: Sequence[_File]) -> str:
    """Hash names, sizes and times of the images, without reading them."""
    rows: list[Any] = []
    for file in files:
        try:
            about = file.path.stat()
            rows.append([file.name, file.label, file.role, about.st_size, about.st_mtime_ns])
        except OSError:  # a dangling link; named as broken when it is decoded
            rows.append([file.name, file.label, file.role])
    return digest_of(rows)


def _decoded(
    files: Sequence[_File], img_size: int, store_size: int
) -> Iterator[tuple[_File, tuple[str, NDArray[np.uint8]] | str]]:
    """Decode in threads (Pillow lets the interpreter go), in order; of a broken file the reason."""

    def one(file: _File) -> tuple[str, NDArray[np.uint8]] | str:
        try:
            return read_image(file.path, img_size, store_size)
        except Exception as error:  # a damaged file raises almost anything in Pillow
            return why_broken(error)

    with _quiet(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            yield from zip(chunk, threads.map(one, chunk), strict=True)
