"""Tables of keys and names that stay on disk: sequences of strings over memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class KeyTable(Sequence[str]):
    """Keys of 32 hex characters over their bytes, `raw` uint8 [n, 16], mapped or not."""

    def __init__(self, raw: NDArray[np.uint8]) -> None:
        assert raw.ndim == 2, raw.shape
        assert raw.shape[1] == 16, raw.shape
        self.raw = raw

    @staticmethod
    def of(keys: Iterable[str]) -> KeyTable:
        """Make a table of hex keys."""
        coded = [bytes.fromhex(key) for key in keys]
        assert all(len(one) == 16 for one in coded), "a key has 32 hex characters"
        return KeyTable(np.frombuffer(b"".join(coded), dtype=np.uint8).reshape(-1, 16))

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> KeyTable: ...
    def __getitem__(self, at: Any) -> str | KeyTable:
        if isinstance(at, slice):
            return KeyTable(self.raw[at])
        return bytes(self.raw[at]).hex()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.raw), 4096):
            text = np.ascontiguousarray(self.raw[start : start + 4096]).tobytes().hex()
            yield from (text[at : at + 32] for at in range(0, len(text), 32))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, KeyTable):
            return np.array_equal(self.raw, other.raw)
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


class NameTable(Sequence[str]):
    """Strings over one array of UTF-8 bytes, `text` uint8 [m], and where each `ends`, int64 [n]."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @staticmethod
    def of(names: Iterable[str]) -> NameTable:
        """Make a table of strings; what no text can hold is kept as the file system gave it."""
        coded = [name.encode("utf-8", "surrogateescape") for name in names]
        ends = np.cumsum([len(name) for name in coded], dtype=np.int64)
        return NameTable(np.frombuffer(b"".join(coded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: Any) -> str | list[str]:
        if isinstance(at, slice):
            return [self[row] for row in range(*at.indices(len(self)))]
        row = int(at) + (len(self) if at < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(at)
        start = int(self.ends[row - 1]) if row else 0
        return bytes(self.text[start : int(self.ends[row])]).decode("utf-8", "surrogateescape")
