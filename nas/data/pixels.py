"""The cache of data sets: from a source that was looked at to a folder of plain files.

`nas.data.layout` tells what is in the folder, `nas.data.cache` which folders stay.
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
from numpy.typing import NDArray

from nas.core.io import get_or_make
from nas.core.progress import Tick
from nas.data.cache import claim, hold, make_room
from nas.data.dataset import MEAN, STD, Dataset
from nas.data.decode import shown_name
from nas.data.key_tables import KeyTable, NameTable
from nas.data.layout import (
    FORMAT,
    SIDES,
    file_of,
    open_dataset,
    write_meta,
    write_pixels,
    write_table,
)
from nas.data.sealed_files import digest_of, read_sealed
from nas.data.split import cut, unique_rows
from space.errors import refuse

_LEFT_OUT = "broken images left out"


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
        self.reasons: list[str] = []

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

    def lose(self, name: str, why: str) -> None:
        """Count an image that could not be read, with the reason in a few words."""
        self.broken.append(name)
        self.reasons.append(why)

    def told(self, most: int) -> str:
        """Name the first broken images and why they are."""
        pairs = list(zip(self.broken, self.reasons, strict=True))[:most]
        return ", ".join(f"{shown_name(name)} ({why})" for name, why in pairs)

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


def _build(source: Source, folder: Path, random_seed: int, max_broken: float, tick: Tick) -> None:
    """Decode, cut and write into `folder`, which is fresh and ours."""
    pool_path = folder / "pool.raw" if source.root is None else None
    pool = Pool(pool_path, source.store_size)
    source.fill(pool, tick)
    total = len(pool.keys) + len(pool.broken)
    _check_broken(len(pool.broken), total, max_broken, pool.told(3))
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
        notes.append(f"{len(pool.broken)} {_LEFT_OUT}, e.g. {pool.told(1)}")
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
            write_table(folder / file_of(side, name), table)
        if pixels is not None:
            write_pixels(folder / file_of(side, "pixels"), pixels, kept[rows])
    del pixels
    if pool_path is not None:
        pool_path.unlink()
    extra = {
        "root": None if source.root is None else os.fspath(source.root),
        "broken": [name.encode("utf-8", "backslashreplace").decode() for name in pool.broken],
        "notes": notes,
    }
    write_meta(folder, meta, extra)


def _check_broken(broken: int, total: int, most: float, told: str) -> None:
    """Refuse a larger share of broken images than is tolerated."""
    if broken > most * total:
        raise refuse(
            "--data",
            f"{broken} broken images of {total}, e.g. {told}",
            f"at most {most:.2%} broken",
            "repair or remove them, or raise --max-broken",
        )


def cached(
    source: Source, random_seed: int, max_broken: float, cache_dir: Path, tick: Tick
) -> Dataset:
    """Open a source's folder in the cache, decoding it first if it is not there.

    Safe against kills (built aside, then renamed) and against a second process (it waits).
    Raises InputError.
    """
    folder = folder_of(source, random_seed, cache_dir)

    def make(draft: Path) -> None:
        one = source.count * source.store_size**2 * 3 if source.root is None else 0
        # Decoded in the source's order first, then put in the order of the cut.
        make_room(cache_dir, one, 2 * one, source.name)
        _build(source, draft, random_seed, max_broken, tick)
        claim(folder)

    if get_or_make(folder, make, found=hold):
        return open_dataset(folder)
    tick(float(source.count))
    dataset = open_dataset(folder)
    # What was tolerated when it was decoded may not be now.
    told = next((n.partition("e.g. ")[2] for n in dataset.notes if _LEFT_OUT in n), "")
    _check_broken(len(dataset.broken), source.count, max_broken, told)
    return dataset


def relabelled(
    dataset: Dataset,
    cache_dir: Path,
    labels_by_side: Mapping[str, NDArray[np.int64]],
    classes: Sequence[str],
    by: str,
) -> Dataset:
    """Give a data set other classes, side -> int64 [n] in 0 .. len(classes) - 1, told `by` a
    teacher.

    Made once and found again; it shares the files of the first by hard links, where the file
    system has them. Raises InputError.
    """
    told = hashlib.blake2b(digest_size=16)
    for side in SIDES:
        labels = np.asarray(labels_by_side[side])
        assert labels.shape == (len(getattr(dataset, side)),), (side, labels.shape)
        assert labels.min() >= 0, side
        assert labels.max() < len(classes), side
        told.update(labels.astype("<i8").tobytes())
    # The folder's name, as two sets of one content may know their files by other names, or not
    # keep their pixels.
    identity = [FORMAT, dataset.folder.name, dataset.fingerprint, by, list(classes)]
    digest = digest_of([*identity, told.hexdigest()])
    name = f"{dataset.folder.name.rsplit('-', 1)[0]}-{digest}"
    folder = Path(cache_dir) / "data" / name

    def make(draft: Path) -> None:
        meta = read_sealed(dataset.folder / "meta.json")
        shared = [p for p in dataset.folder.glob("*.npy") if not p.name.endswith(".labels.npy")]
        for path in shared:
            _linked(path, draft / path.name)
        for side in SIDES:
            table = np.asarray(labels_by_side[side], dtype=np.int64)
            write_table(draft / file_of(side, "labels"), table)
        extra = {key: meta.pop(key) for key in ("root", "broken", "notes")}
        for key in ("fingerprint", "files"):
            del meta[key]
        write_meta(draft, {**meta, "classes": list(classes), "labelled_by": by}, extra)
        claim(folder)

    get_or_make(folder, make, found=hold)
    return open_dataset(folder)


def _linked(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, to)
