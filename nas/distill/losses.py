"""Soft cross-entropy on stored labels, without building the dense target."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_soft_cross_entropy(logits: Tensor, index: Tensor, prob: Tensor, tail: Tensor) -> Tensor:
    """Compare logits with a top-K label whose tail is spread evenly over the other classes.

    logits [B, C], index int64 [B, K], prob [B, K], tail [B] -> loss in nats, float32 [B] (also
    under autocast). Equals the dense soft cross-entropy, gradients too; K < C.
    Method: TinyViT (Wu et al., ECCV 2022), with the sum over the tail taken as a whole:
    -(sum_k p_k log q_k + tail / (C - K) * (sum_c log q_c - sum_k log q_k)).
    """
    classes, kept = logits.shape[1], index.shape[1]
    assert kept < classes, (kept, classes)
    with torch.autocast(logits.device.type, enabled=False):
        log_q = torch.log_softmax(logits.float(), dim=1)
        log_top = log_q.gather(1, index)
        each = tail.float() / (classes - kept)
        rest = log_q.sum(1) - log_top.sum(1)
        return -((prob.float() * log_top).sum(1) + each * rest)


def dense_target(index: Tensor, prob: Tensor, tail: Tensor, num_classes: int) -> Tensor:
    """Spell a stored label out, float32 [B, C]: the oracle of the loss, and for figures."""
    each = tail.float() / (num_classes - index.shape[1])
    target = each[:, None].expand(-1, num_classes).clone()
    return target.scatter_(1, index, prob.float())
