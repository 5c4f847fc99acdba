"""Soft labels in memory: what a store gives for some rows, and what a teacher's logits say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from space.errors import refuse


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of n images: index int64 [n, K], prob float32 [n, K] and tail float32 [n] >= 0, what
    is left for the other classes."""

    index: NDArray[np.int64]
    prob: NDArray[np.float32]
    tail: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.tail)

    def __getitem__(self, rows: Any) -> Labels:
        return Labels(self.index[rows], self.prob[rows], self.tail[rows])

    def best(self, topk: int) -> Labels:
        """Keep the `topk` best classes; the others' share goes to the tail."""
        kept = self.index.shape[1]
        if topk >= kept:
            return self
        order = np.argsort(-self.prob, axis=1, kind="stable")
        prob = np.take_along_axis(self.prob, order, axis=1)
        rest = self.tail + prob[:, topk:].sum(1, dtype=np.float64).astype(np.float32)
        index = np.take_along_axis(self.index, order[:, :topk], axis=1)
        return Labels(index, np.ascontiguousarray(prob[:, :topk]), rest)


def index_type(num_classes: int) -> type[np.integer[Any]]:
    """Choose the narrowest type that holds every class."""
    if num_classes <= 1 << 8:
        return np.uint8
    return np.uint16 if num_classes <= 1 << 16 else np.int32


def top_labels(logits: torch.Tensor, topk: int) -> Labels:
    """Turn logits [B, C] of any floating type into labels, best class first.

    The softmax and its tail are taken in float64, so that rounding to float32 is the only error
    and the parts sum to 1. Raises InputError for a teacher that gives no finite number.
    """
    q = torch.softmax(logits.detach().double().cpu(), dim=1)
    if not bool(torch.isfinite(q).all()):
        raise refuse("teacher", "outputs that are not finite", "finite logits")
    prob, index = q.topk(topk, dim=1)
    tail = q.scatter(1, index, 0.0).sum(1)
    return Labels(index.numpy(), prob.float().numpy(), tail.float().numpy())
