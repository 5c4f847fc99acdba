"""Pixels that are decoded when they are asked for, instead of being kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.data.decode import read_image
from nas.data.key_tables import KeyTable, NameTable
from space.errors import refuse


class DecodedFiles:
    """Images of a folder as one array, uint8 [n, S, S, 3], decoded on access to the same bits as
    cached ones. A file that is gone, damaged or replaced is refused by name when it is read.

    `names` are relative to `root`, `keys` what the files' contents were. Pickled by the folder `at`
    and the `side` whose tables are mapped again.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        at: Path,
        side: str,
        root: Path,
        names: Sequence[str],
        keys: Sequence[str],
        img_size: int,
        store_size: int,
    ) -> None:
        self._at, self._side, self._root = at, side, root
        self._names, self._keys = names, keys
        self._img_size, self._store_size = img_size, store_size
        self.shape = (len(names), store_size, store_size, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._at, self._side, self._root, self._img_size, self._store_size)

    def __getitem__(self, at: Any) -> NDArray[np.uint8]:
        if isinstance(at, (int, np.integer)):
            return self._read(int(at))
        rows = self._rows(at)
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for place, row in enumerate(rows):
            out[place] = self._read(row)
        return out

    def _rows(self, at: Any) -> Sequence[int]:
        """Read an index of the first axis as numpy would: a slice, integers or a mask."""
        if isinstance(at, slice):
            return range(*at.indices(len(self)))
        rows = np.asarray(at)
        if isinstance(at, tuple) or rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iub"):
            raise IndexError("images are taken by an integer, a slice, integers or a mask")
        if rows.dtype.kind == "b":
            if len(rows) != len(self):
                raise IndexError(f"a mask of {len(rows)} for {len(self)} images")
            rows = np.flatnonzero(rows)
        return [int(row) for row in rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("images that are decoded on access are always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, row: int) -> NDArray[np.uint8]:
        name = self._names[row]
        # Links inside a user's folder may lead anywhere; a name in the cache's table may not.
        if os.path.isabs(name) or ".." in name.split("/"):
            raise refuse("--data", name, f"a name inside {self._root}", "prepare the data anew")
        path = self._root / name
        try:
            key, pixels = read_image(path, self._img_size, self._store_size)
        except Exception as error:  # a damaged file raises almost anything in Pillow
            why = " ".join(str(error).split())[:80]
            raise refuse(
                "--data",
                f"{name} ({type(error).__name__}: {why})",
                "the image that was there",
                "restore it, or prepare the data anew",
            ) from error
        if key != self._keys[row]:
            raise refuse(
                "--data",
                f"{name} with another content",
                "the image that was there",
                "restore it, or prepare the data anew",
            )
        return pixels


def _reopened(at: Path, side: str, root: Path, img_size: int, store_size: int) -> DecodedFiles:
    keys, text, ends = (
        np.load(at / f"{side}.{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("keys", "names", "ends")
    )
    names, table = NameTable(text, ends), KeyTable(keys)
    return DecodedFiles(at, side, root, names, table, img_size, store_size)
