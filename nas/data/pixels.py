"""The cache of data sets: decoded once to uint8, one folder of plain files each.

`<cache>/data/<id>/` holds, for each side of the cut (train, holdout, test), rows in the order of
their keys:

    train.npy         pixels, uint8 [n, S, S, 3] (not there without a pixel cache)
    train.keys.npy    keys, uint8 [n, 16]
    train.labels.npy  classes, int64 [n], -1 without ground truth
    train.names.npy, train.ends.npy   what users know the images by: UTF-8 bytes, int64 [n]

and `meta.json`: the rest, the checksums of all files, and one of itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from nas.data.cache import hold, make_room
from nas.data.cuts import Rows, cut, unique_rows
from nas.data.decoded import DecodedFiles
from nas.data.files import digest_of, file_sha256, read_sealed, write_sealed
from nas.data.tables import KeyTable, NameTable
from nas.data.values import MEAN, STD, Dataset, Split
from nas.jobs import Tick
from space.errors import refuse

FORMAT = 2
"""Version of the folder's layout and of the cuts; another one is another folder."""
SIDES = ("train", "holdout", "test")
_TABLES = ("keys", "labels", "names", "ends")


class Pool:
    """Decoded images in the order in which a source gives them: pixels on disk (or, with `path`
    None, nowhere), the rest here."""

    def __init__(self, path: Path | None, store_size: int) -> None:
        self._file = None if path is None else open(path, "wb")  # noqa: SIM115 - see `pixels`
        self._path = path
        self.store_size = store_size
        self.keys: list[str] = []
        self.labels: list[int] = []
        self.roles: list[str] = []
        self.names: list[str] = []
        self.broken: list[str] = []

    def add(self, key: str, label: int, role: str, pixels: NDArray[np.uint8], name: str) -> None:
        """Append one image, uint8 [S, S, 3], under the name that a user knows it by."""
        assert pixels.shape == (self.store_size, self.store_size, 3), pixels.shape
        assert pixels.dtype == np.uint8, pixels.dtype
        if self._file is not None:
            self._file.write(np.ascontiguousarray(pixels).data)
        self.keys.append(key)
        self.labels.append(label)
        self.roles.append(role)
        self.names.append(name)

    def pixels(self) -> NDArray[np.uint8] | None:
        """Map all that was added: uint8 [n, S, S, 3]. Ends the adding."""
        if self._file is None or self._path is None:
            return None
        self._file.close()
        shape = (len(self.keys), self.store_size, self.store_size, 3)
        return np.memmap(self._path, dtype=np.uint8, mode="r", shape=shape)


@dataclass(frozen=True)
class Source:
    """A data set that has been looked at but not decoded.

    `identity` is plain JSON that is cheap to find out and changes when the content does;
    `decoding` names how pixels come about; `fill` decodes into a pool, ticking once an image;
    `seeded` says that the cut is still drawn; `root` is the folder of the named files if no pixels
    are to be kept. No `classes` means no ground truth.
    """

    name: str
    classes: tuple[str, ...]
    img_size: int
    store_size: int
    hflip: bool
    identity: Mapping[str, Any]
    decoding: str
    count: int
    fill: Callable[[Pool, Tick], None]
    notes: tuple[str, ...] = ()
    seeded: bool = True
    root: Path | None = None


def _slug(name: str) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
    return kept.strip("-")[-24:].strip("-") or "data"


def folder_of(source: Source, random_seed: int, cache_dir: Path) -> Path:
    """Say where a source's pixels are or would be."""
    identity = {
        "format": FORMAT,
        "name": source.name,
        "img_size": source.img_size,
        "store_size": source.store_size,
        "random_seed": random_seed if source.seeded else None,
        "source": dict(source.identity),
        "pixels": source.root is None,
    }
    return cache_dir / "data" / f"{_slug(source.name)}-{digest_of(identity)}"


def _note_copies(dropped: int) -> str:
    noun = "image is a copy" if dropped == 1 else "images are copies"
    return f"{dropped} {noun} of others by content and left out, so that no cut is straddled"


def _write_pixels(path: Path, pool: NDArray[np.uint8], rows: Rows) -> None:
    out = open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(rows), *pool.shape[1:]))
    for start in range(0, len(rows), 256):
        out[start : start + 256] = pool[rows[start : start + 256]]
    out.flush()
    del out
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_table(path: Path, table: NDArray[Any]) -> None:
    with open(path, "wb") as file:
        np.save(file, table, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _file_of(side: str, table: str) -> str:
    return f"{side}.npy" if table == "pixels" else f"{side}.{table}.npy"


def _build(source: Source, folder: Path, random_seed: int, max_broken: float, tick: Tick) -> None:
    """Decode, cut and write into `folder`, which is fresh and ours."""
    pool_path = folder / "pool.raw" if source.root is None else None
    pool = Pool(pool_path, source.store_size)
    source.fill(pool, tick)
    if len(pool.broken) > max_broken * (len(pool.keys) + len(pool.broken)):
        first = ", ".join(pool.broken[:3])
        total = len(pool.keys) + len(pool.broken)
        raise refuse(
            "--data",
            f"{len(pool.broken)} broken images of {total}, e.g. {first}",
            f"at most {max_broken:.2%} broken",
            "repair or remove them, or raise --max-broken",
        )
    pixels = pool.pixels()
    kept = unique_rows(pool.keys, pool.roles)
    keys = [pool.keys[r] for r in kept]
    labels = np.array(pool.labels, dtype=np.int64)[kept]
    roles = [pool.roles[r] for r in kept]
    sides = cut(keys, labels, roles, source.classes, random_seed)
    notes = list(source.notes)
    if len(kept) < len(pool.keys):
        notes.append(_note_copies(len(pool.keys) - len(kept)))
    if pool.broken:
        notes.append(f"{len(pool.broken)} broken images left out, e.g. {pool.broken[0]}")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "name": source.name,
        "classes": list(source.classes),
        "img_size": source.img_size,
        "store_size": source.store_size,
        "hflip": source.hflip,
        "interpolation": "bicubic",
        "mean": list(MEAN),
        "std": list(STD),
        "decoding": source.decoding,
        "labelled_by": None,
    }
    truth = labels if source.classes else np.full(len(labels), -1, dtype=np.int64)
    for side, rows in sides.items():
        names = NameTable.of(pool.names[kept[r]] for r in rows)
        tables: dict[str, NDArray[Any]] = {
            "keys": KeyTable.of(keys[r] for r in rows).raw,
            "labels": truth[rows],
            "names": names.text,
            "ends": names.ends,
        }
        for name, table in tables.items():
            _write_table(folder / _file_of(side, name), table)
        if pixels is not None:
            _write_pixels(folder / _file_of(side, "pixels"), pixels, kept[rows])
    del pixels
    if pool_path is not None:
        pool_path.unlink()
    extra = {
        "root": None if source.root is None else os.fspath(source.root),
        "broken": [name.encode("utf-8", "backslashreplace").decode() for name in pool.broken],
        "notes": notes,
    }
    _write_meta(folder, meta, extra)


def _write_meta(folder: Path, meta: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Seal a folder: `meta` and the images' keys and classes are its fingerprint."""
    files = {path.name: _described(path) for path in sorted(folder.glob("*.npy"))}
    content = {
        name: about["sha256"]
        for name, about in files.items()
        if name.endswith((".keys.npy", ".labels.npy"))
    }
    fingerprint = digest_of({**meta, "content": content})
    write_sealed(
        folder / "meta.json", {**meta, **extra, "fingerprint": fingerprint, "files": files}
    )


def _preparation(meta: Mapping[str, Any]) -> str:
    """Hash what decides the pixels of an image of given content."""
    names = ("format", "decoding", "img_size", "store_size", "interpolation", "mean", "std")
    return digest_of({name: meta[name] for name in names})


def cached(
    source: Source, random_seed: int, max_broken: float, cache_dir: Path, tick: Tick
) -> Dataset:
    """Open a source's folder in the cache, decoding it first if it is not there.

    Safe against kills (built aside, then renamed) and against a second process (it waits).
    Raises InputError.
    """
    folder = folder_of(source, random_seed, cache_dir)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_name(folder.name + ".lock"))
            with lock:
                if not folder.exists():
                    one = source.count * source.store_size**2 * 3 if source.root is None else 0
                    # Decoded in the source's order first, then put in the order of the cut.
                    make_room(cache_dir, one, 2 * one, source.name)
                    _build_aside(
                        folder, lambda aside: _build(source, aside, random_seed, max_broken, tick)
                    )
                    return open_dataset(folder)
        except OSError as error:
            raise refuse(
                "--cache-dir", f"{cache_dir} ({error})", "a folder with room to write"
            ) from error
    tick(float(source.count))
    return open_dataset(folder)


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a kill: the lock is ours
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    aside.mkdir()
    try:
        build(aside)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def relabelled(
    dataset: Dataset,
    cache_dir: Path,
    labels: Mapping[str, NDArray[np.int64]],
    classes: Sequence[str],
    by: str,
) -> Dataset:
    """Give a data set other classes, side -> int64 [n], told `by` a teacher.

    Made once and found again; it shares the files of the first by hard links, where the file
    system has them. Raises InputError.
    """
    told = hashlib.blake2b(digest_size=16)
    for side in SIDES:
        assert len(labels[side]) == len(getattr(dataset, side)), side
        told.update(np.asarray(labels[side], dtype="<i8").tobytes())
    identity = [FORMAT, dataset.fingerprint, by, list(classes), told.hexdigest()]
    name = f"{dataset.folder.name.rsplit('-', 1)[0]}-{digest_of(identity)}"
    folder = Path(cache_dir) / "data" / name

    def build(aside: Path) -> None:
        meta = read_sealed(dataset.folder / "meta.json")
        for path in dataset.folder.glob("*.npy"):
            if not path.name.endswith(".labels.npy"):
                try:
                    os.link(path, aside / path.name)
                except OSError:
                    shutil.copyfile(path, aside / path.name)
        for side in SIDES:
            table = np.asarray(labels[side], dtype=np.int64)
            _write_table(aside / _file_of(side, "labels"), table)
        extra = {key: meta.pop(key) for key in ("root", "broken", "notes")}
        for key in ("fingerprint", "files"):
            del meta[key]
        _write_meta(aside, {**meta, "classes": list(classes), "labelled_by": by}, extra)

    try:
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.exists():
                _build_aside(folder, build)
    except OSError as error:
        raise refuse(
            "--cache-dir", f"{cache_dir} ({error})", "a folder with room to write"
        ) from error
    return open_dataset(folder)


def _damaged(folder: Path, why: object) -> Exception:
    return refuse(
        f"data cache {folder}", why, "the files as they were written", "delete the folder"
    )


def open_dataset(folder: Path, verify: bool = False) -> Dataset:
    """Open a cached data set; what grows with it stays on disk until it is used.

    Checks the description, every table's bytes, and every pixel file's size and header; with
    `verify` its bytes too. Raises InputError for what is missing or damaged.
    """
    folder = Path(folder)
    hold(folder)
    try:
        meta = read_sealed(folder / "meta.json")
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
        splits = {side: _open_side(folder, side, meta, verify) for side in SIDES}
        preparation = _preparation(meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return Dataset(
        folder=folder,
        name=meta["name"],
        classes=tuple(meta["classes"]),
        img_size=meta["img_size"],
        store_size=meta["store_size"],
        fingerprint=meta["fingerprint"],
        broken=tuple(meta["broken"]),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        interpolation=meta["interpolation"],
        hflip=meta["hflip"],
        notes=tuple(meta["notes"]),
        preparation=preparation,
        labelled_by=meta["labelled_by"],
        **splits,
    )


def _open_side(folder: Path, side: str, meta: Mapping[str, Any], verify: bool) -> Split:
    keys, labels, text, ends = (
        _checked(folder, _file_of(side, table), meta, verify=True) for table in _TABLES
    )
    names, table = NameTable(text, ends), KeyTable(keys)
    stored, n = meta["store_size"], len(keys)
    if not len(labels) == len(ends) == n:
        raise ValueError(f"{side} has {n} keys, {len(labels)} labels and {len(ends)} names")
    pixels: Any
    if meta["root"] is not None:
        root = Path(meta["root"])
        pixels = DecodedFiles(folder, side, root, names, table, meta["img_size"], stored)
    else:
        pixels = _checked(folder, _file_of(side, "pixels"), meta, verify=verify)
        if pixels.dtype != np.uint8 or pixels.shape != (n, stored, stored, 3):
            raise ValueError(f"{side}.npy holds {pixels.dtype} {pixels.shape}")
    return Split(keys=table, labels=labels, pixels=pixels, names=names)


def _checked(folder: Path, name: str, meta: Mapping[str, Any], *, verify: bool) -> NDArray[Any]:
    """Map one file, its size being checked, and with `verify` its bytes."""
    path, want = folder / name, meta["files"][name]
    size = path.stat().st_size
    if size != want["bytes"]:
        raise ValueError(f"{name} has {size} bytes instead of {want['bytes']}")
    if verify and file_sha256(path) != want["sha256"]:
        raise ValueError(f"{name} does not fit its checksum")
    if not size:
        raise ValueError(f"{name} is empty")
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
