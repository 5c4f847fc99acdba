"""The files of one data set: decoded once to uint8, or decoded anew whenever they are read.

`<cache>/data/<id>/` holds, for each side of the cut (train, holdout, test), rows in the order of their keys:

    train.npy         pixels, uint8 [n, S, S, 3] (not there without a pixel cache)
    train.keys.npy    keys, uint8 [n, 16]
    train.labels.npy  classes, int64 [n], -1 without ground truth
    train.names.npy, train.ends.npy   the images' names for users: UTF-8 bytes, int64 [n]

and `meta.json`: the rest, and the checksums of all files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from nas.core.data_config import GREY_BITS
from nas.core.io import digest_of, file_sha256, read_object, write_json
from nas.data.dataset import Dataset, KeyTable, NameTable, Split
from nas.data.decode import read_image
from nas.data.split import Rows
from space.errors import refuse

FORMAT = 3
"""Version of the folder's layout and of the cuts; another one is another folder."""
SIDES = ("train", "holdout", "test")
_TABLES = ("keys", "labels", "names", "ends")
_ROWS = 256
_META = {
    **dict.fromkeys(("format", "img_size", "store_size"), int),
    **dict.fromkeys(("name", "fingerprint", "interpolation"), str),
    **dict.fromkeys(("classes", "broken", "mean", "std", "notes"), list),
    **{"hflip": bool, "files": dict},
}
"""Types of the values of `meta.json` that are never null."""


def file_of(side: str, table: str) -> str:
    """Return the file name of one table of one side."""
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
    """Write `meta.json`; the fingerprint is of `meta` and the images' keys and classes."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.glob("*.npy"))
    }
    content = {name: about["sha256"] for name, about in files.items() if name.endswith((".keys.npy", ".labels.npy"))}
    fingerprint = digest_of({**meta, "content": content})
    write_json(folder / "meta.json", {**meta, **extra, "fingerprint": fingerprint, "files": files})


def _preparation(meta: Mapping[str, Any]) -> str:
    """Hash what decides the pixels of an image of given content."""
    names = ("format", "decoding", "img_size", "store_size", "interpolation", "mean", "std")
    return digest_of({name: meta[name] for name in names})


def read_folder(folder: Path, verify: bool = False) -> Dataset:
    """Open the folder of a data set; see `nas.data.cache.open_dataset`."""
    try:
        meta = read_object(folder / "meta.json", "a data set of this cache", _META)
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
        if meta.get("grey_bits") not in (None, *range(8, 33)):
            raise ValueError(f"grey_bits {meta['grey_bits']}, want 8 to 32")
        splits: dict[str, Any] = {s: _open_side(folder, s, meta, verify) for s in SIDES}
        preparation = _preparation(meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refuse(f"data cache {folder}", error, "the files as they were written", "delete the folder") from error
    read = {f.name: meta[f.name] for f in fields(Dataset) if f.name in meta}
    read = {name: tuple(v) if isinstance(v, list) else v for name, v in read.items()}
    return Dataset(folder=folder, preparation=preparation, **read, **splits)


def _open_side(folder: Path, side: str, meta: Mapping[str, Any], verify: bool) -> Split:
    keys, labels, text, ends = (_checked(folder, file_of(side, table), meta, verify=True) for table in _TABLES)
    names, table = NameTable(text, ends), KeyTable(keys)
    stored, n = meta["store_size"], len(keys)
    if not len(labels) == len(ends) == n:
        raise ValueError(f"{side} has {n} keys, {len(labels)} labels and {len(ends)} names")
    pixels: Any
    if meta["root"] is not None:
        bits = meta.get("grey_bits") or GREY_BITS
        pixels = DecodedFiles(folder, side, Path(meta["root"]), meta["img_size"], stored, bits)
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


class DecodedFiles:
    """Images of a folder as one array, uint8 [n, S, S, 3], decoded on access to the same bits as cached ones.

    The tables of `side` in the cache folder `at` hold names, relative to `root`, and content keys: a file that is gone,
    damaged or replaced is refused by name. A pickled copy maps the tables again.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, at: Path, side: str, root: Path, img_size: int, store_size: int, grey_bits: int = GREY_BITS
    ) -> None:
        self._given = (at, side, root, img_size, store_size, grey_bits)
        keys, text, ends = (
            np.load(at / file_of(side, table), mmap_mode="r", allow_pickle=False) for table in ("keys", "names", "ends")
        )
        self._names, self._keys = NameTable(text, ends), KeyTable(keys)
        self.shape = (len(keys), store_size, store_size, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedFiles, self._given

    def __getitem__(self, at: Any) -> NDArray[np.uint8]:
        if isinstance(at, (int, np.integer)):
            return self._read(int(at))
        rows = np.arange(len(self))[at]
        if rows.ndim != 1:
            raise IndexError("images are taken by an integer, a slice, integers or a mask")
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for place, row in enumerate(rows.tolist()):
            out[place] = self._read(row)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("images that are decoded on access are always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, row: int) -> NDArray[np.uint8]:
        _, _, root, img_size, store_size, grey_bits = self._given
        name = self._names[row]
        # Links inside a user's folder may lead anywhere; a name in the cache's table may not.
        if os.path.isabs(name) or ".." in name.split("/"):
            raise refuse("--data", name, f"a name inside {root}", "prepare the data anew")
        want, remedy = "the image that was there", "restore it, or prepare the data anew"
        try:
            key, pixels = read_image(root / name, img_size, store_size, grey_bits)
        except Exception as error:  # a damaged file raises almost anything in Pillow
            got = f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
            raise refuse("--data", got, want, remedy) from error
        if key != self._keys[row]:
            raise refuse("--data", f"{name} with another content", want, remedy)
        return pixels
