"""The pixel cache: a data set decoded once to uint8, one folder of plain files.

`<cache>/data/<id>/` holds `train.npy`, `holdout.npy`, `test.npy` (uint8 [n, S, S, 3], rows in the
order of their keys) and `meta.json` (everything else, with a checksum of itself).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from nas.data.cuts import Rows, cut, unique_rows
from nas.data.files import digest_of, file_sha256, read_sealed, write_sealed
from nas.data.values import MEAN, STD, Dataset, Split
from nas.jobs import Tick
from space.errors import refuse

FORMAT = 1
"""Version of the folder's layout and of the cuts; another one is another folder."""
SIDES = ("train", "holdout", "test")


class Pool:
    """Decoded images in the order in which a source gives them: pixels on disk, the rest here."""

    def __init__(self, path: Path, store_size: int) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `Pool.pixels`
        self._path = path
        self.store_size = store_size
        self.keys: list[str] = []
        self.labels: list[int] = []
        self.roles: list[str] = []
        self.broken: list[str] = []

    def add(self, key: str, label: int, role: str, pixels: NDArray[np.uint8]) -> None:
        """Append one image, uint8 [S, S, 3]."""
        assert pixels.shape == (self.store_size, self.store_size, 3), pixels.shape
        assert pixels.dtype == np.uint8, pixels.dtype
        self._file.write(np.ascontiguousarray(pixels).data)
        self.keys.append(key)
        self.labels.append(label)
        self.roles.append(role)

    def pixels(self) -> NDArray[np.uint8]:
        """Map all that was added: uint8 [n, S, S, 3]. Ends the adding."""
        self._file.close()
        shape = (len(self.keys), self.store_size, self.store_size, 3)
        return np.memmap(self._path, dtype=np.uint8, mode="r", shape=shape)


@dataclass(frozen=True)
class Source:
    """A data set that has been looked at but not decoded.

    `identity` is plain JSON that is cheap to find out and changes when the content does;
    `fill` decodes into a pool, ticking once an image; `seeded` says that the cut is still drawn.
    """

    name: str
    classes: tuple[str, ...]
    img_size: int
    store_size: int
    hflip: bool
    identity: Mapping[str, Any]
    count: int
    fill: Callable[[Pool, Tick], None]
    notes: tuple[str, ...] = ()
    seeded: bool = True


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
    }
    return cache_dir / "data" / f"{_slug(source.name)}-{digest_of(identity)}"


def _note_copies(dropped: int) -> str:
    noun = "image is a copy" if dropped == 1 else "images are copies"
    return f"{dropped} {noun} of others by content and left out, so that no cut is straddled"


def _write_side(folder: Path, side: str, pool: NDArray[np.uint8], rows: Rows) -> dict[str, Any]:
    """Write one side's pixels and describe the file."""
    path = folder / f"{side}.npy"
    out = open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(rows), *pool.shape[1:]))
    for start in range(0, len(rows), 256):
        out[start : start + 256] = pool[rows[start : start + 256]]
    out.flush()
    del out
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _build(source: Source, folder: Path, random_seed: int, max_broken: float, tick: Tick) -> None:
    """Decode, cut and write into `folder`, which is fresh and ours."""
    pool_path = folder / "pool.raw"
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
        "sides": {
            side: {"keys": [keys[r] for r in rows], "labels": labels[rows].tolist()}
            for side, rows in sides.items()
        },
    }
    meta["fingerprint"] = digest_of(meta)
    meta["files"] = {side: _write_side(folder, side, pixels, kept[sides[side]]) for side in SIDES}
    meta["broken"] = [name.encode("utf-8", "backslashreplace").decode() for name in pool.broken]
    meta["notes"] = notes
    del pixels
    pool_path.unlink()
    write_sealed(folder / "meta.json", meta)


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
                    _build_aside(source, folder, random_seed, max_broken, tick)
                    return open_dataset(folder)
        except OSError as error:
            raise refuse(
                "--cache-dir", f"{cache_dir} ({error})", "a folder with room to write"
            ) from error
    tick(float(source.count))
    return open_dataset(folder)


def _build_aside(
    source: Source, folder: Path, random_seed: int, max_broken: float, tick: Tick
) -> None:
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a kill: the lock is ours
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    aside.mkdir()
    try:
        _build(source, aside, random_seed, max_broken, tick)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _damaged(folder: Path, why: object) -> Exception:
    return refuse(
        f"data cache {folder}", why, "the files as they were written", "delete the folder"
    )


def open_dataset(folder: Path, verify: bool = False) -> Dataset:
    """Open a cached data set; pixels stay on disk until they are used.

    Checks the description, and every pixel file's size and header; with `verify` every byte.
    Raises InputError for what is missing or damaged.
    """
    folder = Path(folder)
    try:
        meta = read_sealed(folder / "meta.json")
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
        splits = {side: _open_side(folder, side, meta, verify) for side in SIDES}
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
        **splits,
    )


def _open_side(folder: Path, side: str, meta: Mapping[str, Any], verify: bool) -> Split:
    path = folder / f"{side}.npy"
    size, want = path.stat().st_size, meta["files"][side]
    if size != want["bytes"]:
        raise ValueError(f"{side}.npy has {size} bytes instead of {want['bytes']}")
    if verify and file_sha256(path) != want["sha256"]:
        raise ValueError(f"{side}.npy does not fit its checksum")
    table = meta["sides"][side]
    pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    stored = meta["store_size"]
    if pixels.dtype != np.uint8 or pixels.shape != (len(table["keys"]), stored, stored, 3):
        raise ValueError(f"{side}.npy holds {pixels.dtype} {pixels.shape}")
    labels = np.array(table["labels"], dtype=np.int64)
    return Split(keys=tuple(table["keys"]), labels=labels, pixels=pixels)
