"""The folder of one data set: decoded once to uint8, a handful of plain files.

`<cache>/data/<id>/` holds, for each side of the cut (train, holdout, test), rows in the order of
their keys:

    train.npy         pixels, uint8 [n, S, S, 3] (not there without a pixel cache)
    train.keys.npy    keys, uint8 [n, 16]
    train.labels.npy  classes, int64 [n], -1 without ground truth
    train.names.npy, train.ends.npy   what users know the images by: UTF-8 bytes, int64 [n]

and `meta.json`: the rest, the checksums of all files, and one of itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from nas.data.cache import hold
from nas.data.dataset import Dataset, Split
from nas.data.decoded import DecodedFiles
from nas.data.key_tables import KeyTable, NameTable
from nas.data.sealed_files import digest_of, file_sha256, read_sealed, write_sealed
from nas.data.split import Rows
from space.errors import refuse

FORMAT = 2
"""Version of the folder's layout and of the cuts; another one is another folder."""
SIDES = ("train", "holdout", "test")
_TABLES = ("keys", "labels", "names", "ends")
_ROWS = 256


def file_of(side: str, table: str) -> str:
    """Name the file of one table of one side."""
    return f"{side}.npy" if table == "pixels" else f"{side}.{table}.npy"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_pixels(path: Path, pool: NDArray[np.uint8], rows: Rows) -> None:
    """Write rows of a pool, uint8 [n, S, S, 3], as numpy does. Raises OSError on a full disk."""
    # Written, not mapped: a page of a map for which the disk has no room ends the process.
    with open(path, "wb") as file:
        shape = (len(rows), *pool.shape[1:])
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, len(rows), _ROWS):
            file.write(pool[rows[start : start + _ROWS]].data)
        _sync(file)


def write_table(path: Path, table: NDArray[Any]) -> None:
    """Write one small table. Raises OSError."""
    with open(path, "wb") as file:
        np.save(file, table, allow_pickle=False)
        _sync(file)


def write_meta(folder: Path, meta: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Seal a folder: `meta` and the images' keys and classes are its fingerprint."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.glob("*.npy"))
    }
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


def open_dataset(folder: Path, verify: bool = False) -> Dataset:
    """Open a cached data set; what grows with it stays on disk until it is used.

    Checks the description, every table's bytes, and every pixel file's size and header; with
    `verify` its bytes too. It counts as in use until this process ends. Raises InputError for what
    is missing or damaged.
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
        raise refuse(
            f"data cache {folder}", error, "the files as they were written", "delete the folder"
        ) from error
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
        _checked(folder, file_of(side, table), meta, verify=True) for table in _TABLES
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
        pixels = _checked(folder, file_of(side, "pixels"), meta, verify=verify)
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
