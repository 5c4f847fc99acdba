"""One piece of soft labels in memory: keys, codes and what the teacher said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from space.errors import refuse


@dataclass(frozen=True, eq=False)
class Labels:
    """One piece: rows sorted by key. Shapes and types as in `nas.distill.store`."""

    keys: NDArray[np.void]
    codes: NDArray[np.uint64]
    index: NDArray[Any]
    prob: NDArray[np.float32]
    tail: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, keys: tuple[str, ...]) -> NDArray[np.int64]:
        """Find the rows of keys: int64 [n], -1 for a key that is not here."""
        wanted = packed_keys(keys)
        at = np.searchsorted(self.keys, wanted)
        at = np.minimum(at, len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, at, -1).astype(np.int64)


def packed_keys(keys: tuple[str, ...]) -> NDArray[Any]:
    """Turn hex keys into 16 fixed bytes each, comparable and sortable: S16-like [n]."""
    return comparable(raw_keys(keys))


def raw_keys(keys: tuple[str, ...]) -> NDArray[np.uint8]:
    """Turn hex keys into bytes: uint8 [n, 16]."""
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, 16)


def comparable(raw: NDArray[np.uint8]) -> NDArray[Any]:
    """Turn uint8 [n, 16] into values that compare and sort as the hex keys do: [n]."""
    # Two big-endian words sort like the hex strings; plain bytes would lose trailing zeros.
    words = np.ascontiguousarray(raw).view(">u8").astype("=u8")
    return words.view([("hi", "=u8"), ("lo", "=u8")]).reshape(-1)


def index_type(num_classes: int) -> type[np.integer[Any]]:
    """Choose the narrowest type that holds every class."""
    if num_classes <= 1 << 8:
        return np.uint8
    return np.uint16 if num_classes <= 1 << 16 else np.int32


def top_labels(
    logits: torch.Tensor, topk: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Turn logits [B, C] into index [B, K], prob [B, K] and tail [B] >= 0.

    The softmax and its tail are taken in float64, so that rounding to float32 is the only error
    and the parts sum to 1. Raises InputError for a teacher that gives no finite number.
    """
    q = torch.softmax(logits.detach().double().cpu(), dim=1)
    if not bool(torch.isfinite(q).all()):
        raise refuse("teacher", "outputs that are not finite", "finite logits")
    prob, index = q.topk(topk, dim=1)
    tail = q.scatter(1, index, 0.0).sum(1)
    return index.numpy(), prob.float().numpy(), tail.float().numpy()
