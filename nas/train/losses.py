"""Losses on stored labels, without building the dense target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from space.errors import refuse

KINDS = ("cross-entropy", "kl")


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


def label_entropy(prob: Tensor, tail: Tensor, num_classes: int) -> Tensor:
    """Entropy of stored labels in nats, float32 [B]: what the cross-entropy cannot fall below."""
    others = num_classes - prob.shape[1]
    prob, tail = prob.float(), tail.float()
    spread = torch.xlogy(tail, tail / others)  # 0 log 0 is 0
    return -(torch.xlogy(prob, prob).sum(1) + spread)


def retemper(
    prob: Tensor, tail: Tensor, num_classes: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Give stored labels the temperature T: prob [B, K] and tail [B] of p^(1/T), normalised.

    Exact for the kept classes relative to each other and for a tail that is spread evenly, as the
    loss spreads it; float32.
    """
    if not temperature > 0:
        raise refuse("temperature", temperature, "a number > 0")
    prob, tail = prob.float(), tail.float()
    if temperature == 1:
        return prob, tail
    others = num_classes - prob.shape[1]
    logs = torch.cat([prob, (tail / others)[:, None]], dim=1).log() / temperature
    # The largest is finite, so an impossible class stays impossible without a NaN.
    logs = logs - logs.max(dim=1, keepdim=True).values
    mass = logs.exp()
    mass = torch.cat([mass[:, :-1], mass[:, -1:] * others], dim=1)
    mass = mass / mass.sum(1, keepdim=True)
    return mass[:, :-1], mass[:, -1]


@dataclass(frozen=True)
class SoftLoss:
    """A loss of logits against stored labels, and against the truth where that is wanted.

    `kind` "cross-entropy", or "kl", which is 0 where the student equals its teacher (the same
    gradients); `temperature` T softens both sides, scaled by T^2 (Hinton et al., 2015);
    `hard_weight` is the share of the plain cross-entropy with the true label. Raises InputError.
    """

    kind: str = "cross-entropy"
    temperature: float = 1.0
    hard_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise refuse("--loss", self.kind, f"one of {', '.join(KINDS)}")
        if not 0 < self.temperature < float("inf"):
            raise refuse("--temperature", self.temperature, "a number > 0")
        if not 0 <= self.hard_weight <= 1:
            raise refuse("--hard-weight", self.hard_weight, "a share from 0 to 1")

    def __call__(
        self, logits: Tensor, index: Tensor, prob: Tensor, tail: Tensor, truth: Tensor | None = None
    ) -> Tensor:
        """Give the loss of each image, float32 [B]; `truth` int64 [B], -1 where it is unknown.

        An image without a true label counts by its soft label alone.
        """
        heat = self.temperature
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            prob, tail = retemper(prob, tail, logits.shape[1], heat)
            scaled = logits if heat == 1 else logits / heat
            loss = sparse_soft_cross_entropy(scaled, index, prob, tail)
            if self.kind == "kl":
                loss = loss - label_entropy(prob, tail, logits.shape[1])
            if heat != 1:
                loss = loss * heat**2
            if self.hard_weight == 0:
                return loss
            assert truth is not None, "a hard-label term needs labels"
            hard = torch.nn.functional.cross_entropy(
                logits, truth, ignore_index=-1, reduction="none"
            )
            share = torch.where(truth >= 0, self.hard_weight, 0.0)
            return (1 - share) * loss + share * hard


def dense_target(index: Tensor, prob: Tensor, tail: Tensor, num_classes: int) -> Tensor:
    """Spell a stored label out, float32 [B, C]: the oracle of the loss, and for figures."""
    each = tail.float() / (num_classes - index.shape[1])
    target = each[:, None].expand(-1, num_classes).clone()
    return target.scatter_(1, index, prob.float())
