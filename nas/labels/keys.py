"""The keys of a store's images: sorted, on disk, found without reading them all."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.io import write_atomic

Rows = NDArray[np.int64]


class StoredKeys:
    """Keys of 128 bits in two planes of words, `hi` and `lo` uint64 [n], sorted like their hex.

    Planes, because a search in one word's plane reads the map alone and copies nothing.
    """

    def __init__(self, planes: NDArray[np.uint64]) -> None:
        self.hi, self.lo = planes

    def __len__(self) -> int:
        return len(self.hi)

    def raw(self, rows: slice | Rows) -> NDArray[np.uint8]:
        """Give keys as bytes, uint8 [m, 16]."""
        return joined(self.hi[rows], self.lo[rows])

    def rows(self, raw: NDArray[np.uint8]) -> Rows:
        """Find the rows of keys uint8 [m, 16]: int64 [m], -1 for a key that is not here."""
        hi, lo = words(raw)
        found = np.full(len(hi), -1, dtype=np.int64)
        if not len(self.hi):
            return found
        at = np.searchsorted(self.hi, hi)
        open_ = np.arange(len(hi))
        while len(open_):  # once, but for keys that share their first half
            here = at[open_]
            inside = here < len(self.hi)
            open_, here = open_[inside], here[inside]
            same = self.hi[here] == hi[open_]
            open_, here = open_[same], here[same]
            hit = self.lo[here] == lo[open_]
            found[open_[hit]] = here[hit]
            open_ = open_[~hit]
            at[open_] += 1
        return found

    def __contains__(self, key: str) -> bool:
        return bool(self.rows(raw_keys((key,)))[0] >= 0)


def raw_keys(keys: Any) -> NDArray[np.uint8]:
    """Turn hex keys (or a table that has them as `raw`) into bytes: uint8 [n, 16]."""
    raw = getattr(keys, "raw", None)
    if raw is not None:
        return np.asarray(raw)
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, 16)


def hex_keys(raw: NDArray[np.uint8]) -> list[str]:
    """Turn uint8 [n, 16] into hex keys."""
    return [bytes(row).hex() for row in raw]


def words(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Split keys uint8 [n, 16] into two words that sort as the hex does: uint64 [n] each."""
    pairs = np.ascontiguousarray(raw).view(">u8").astype(np.uint64)
    return pairs[:, 0], pairs[:, 1]


def joined(hi: NDArray[np.uint64], lo: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Join what `words` split: uint8 [n, 16]."""
    return np.stack([hi, lo], axis=1).astype(">u8").view(np.uint8).reshape(-1, 16)


def sorted_planes(raw: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Sort keys uint8 [n, 16] into planes uint64 [2, n]."""
    hi, lo = words(raw)
    order = np.lexsort((lo, hi))
    return np.stack([hi[order], lo[order]])


def find_rows(among: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> Rows:
    """Find keys uint8 [m, 16] among others [n, 16] in any order: rows int64 [m], -1 for none."""
    hi, lo = words(among)
    order = np.lexsort((lo, hi)).astype(np.int64)
    at = StoredKeys(np.stack([hi[order], lo[order]])).rows(wanted)
    return np.where(at >= 0, order[at], -1) if len(order) else at


def keys_digest(planes: NDArray[np.uint64]) -> str:
    """Hash a set of keys, given as sorted planes: 32 hex characters."""
    return hashlib.blake2b(planes.astype("<u8").tobytes(), digest_size=16).hexdigest()


def write_keys(path: Path, planes: NDArray[np.uint64]) -> None:
    """Write sorted planes, atomically: 16 bytes a key."""
    write_atomic(path, np.ascontiguousarray(planes).astype("<u8").tobytes())


def map_keys(path: Path, count: int) -> NDArray[np.uint64]:
    """Map planes uint64 [2, count]. Raises OSError, or ValueError for a file of another length."""
    size = path.stat().st_size
    if size != 16 * count:
        raise ValueError(f"{path.name} has {size} bytes instead of {16 * count}")
    if not count:
        return np.zeros((2, 0), dtype=np.uint64)
    return np.memmap(path, dtype="<u8", mode="r", shape=(2, count))
