"""How labels become fixed records: the plain and the packed codec, behind one interface."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nas.labels.packed_codec import PackedCodec, check_labels
from nas.labels.soft_labels import index_type
from space.errors import refuse

CODECS = ("plain", "packed")


class Codec(Protocol):
    """Turns labels of K out of C classes into records of `record_bytes` each, and back.

    `encode` takes index int [n, K] (distinct classes), prob float32 [n, K] and tail float32 [n],
    the mass >= 0 of the other C - K classes, and gives uint8 [n, record_bytes]. `decode` gives
    them back ready for the loss: index int64 [n, K], prob float32 [n, K], tail float32 [n], all
    contiguous and the caller's own. Any rows of a table may be decoded, in any order.
    """

    @property
    def name(self) -> str:
        """Name among CODECS."""

    @property
    def record_bytes(self) -> int:
        """Bytes of every record."""

    def encode(
        self, index: NDArray[Any], prob: NDArray[np.float32], tail: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """Turn labels into records."""

    def decode(
        self, records: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Turn records into labels."""


class PlainCodec:
    """Exact records, in the order given: prob float32 [K], tail float32, index in the narrowest
    type that holds every class [K]; little-endian, without padding."""

    name = "plain"

    def __init__(self, topk: int, num_classes: int) -> None:
        self.topk, self.num_classes = topk, num_classes
        self._index = np.dtype(index_type(num_classes)).newbyteorder("<")
        self._reals = 4 * topk + 4
        self.record_bytes = self._reals + topk * self._index.itemsize

    def encode(
        self, index: NDArray[Any], prob: NDArray[np.float32], tail: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """Write int [n, K], float32 [n, K] and [n] as uint8 [n, record_bytes], exactly.

        Raises InputError for what `check_labels` refuses.
        """
        assert index.shape == prob.shape == (len(tail), self.topk), (index.shape, prob.shape)
        check_labels(index, prob, tail, self.num_classes)
        reals = np.column_stack([prob, tail]).astype("<f4")
        fields = (reals, np.ascontiguousarray(index, dtype=self._index))
        return np.hstack([field.view(np.uint8) for field in fields])

    def decode(
        self, records: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Read uint8 [n, record_bytes] as index int64 [n, K], prob float32 [n, K], tail [n]."""
        assert records.ndim == 2, records.shape
        assert records.shape[1] == self.record_bytes, records.shape
        # Rows may start anywhere in memory: the views are copied before anybody computes.
        reals = records[:, : self._reals].view("<f4")
        index = records[:, self._reals :].view(self._index).astype(np.int64)
        return index, reals[:, :-1].astype(np.float32), reals[:, -1].astype(np.float32)


def make_codec(name: str, topk: int, num_classes: int) -> Codec:
    """Make a codec for the K = `topk` best of `num_classes` classes. Raises InputError."""
    if name not in CODECS:
        raise refuse("label codec", name, " or ".join(CODECS))
    if not 1 <= topk < num_classes:
        raise refuse("top-K", topk, f"1 to {num_classes - 1} (classes - 1)")
    return (PlainCodec if name == "plain" else PackedCodec)(topk, num_classes)
