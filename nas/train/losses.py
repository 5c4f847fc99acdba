"""Losses of a student: against stored soft labels, a teacher's logits, and true labels.

Stored labels and a teacher in memory give the same loss; proxies and full trainings share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from space.errors import refuse

Heads = tuple[Tensor, Tensor]
"""The logits of the class head and of the distillation head, each [B, C]."""


def sparse_soft_cross_entropy(logits: Tensor, index: Tensor, prob: Tensor, tail: Tensor) -> Tensor:
    """Return the cross-entropy of logits with a top-K label, its tail spread over other classes.

    logits [B, C], index int64 [B, K], prob [B, K], tail [B] -> loss in nats, float32 [B] (also under autocast). Equals
    the dense soft cross-entropy, gradients too; K < C. Method: TinyViT (Wu et al., ECCV 2022), with the sum over the
    tail taken as a whole: -(sum_k p_k log q_k + tail / (C - K) * (sum_c log q_c - sum_k log q_k)).
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
    """Return the entropy of stored labels in nats, float32 [B]: the least cross-entropy."""
    others = num_classes - prob.shape[1]
    prob, tail = prob.float(), tail.float()
    spread = torch.xlogy(tail, tail / others)  # 0 log 0 is 0
    return -(torch.xlogy(prob, prob).sum(1) + spread)


def retemper(prob: Tensor, tail: Tensor, num_classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Soften stored labels by T: prob [B, K] and tail [B] of p^(1/T), normalised, float32.

    Exact for the kept classes relative to each other and for a tail that is spread evenly.
    """
    prob, tail = prob.float(), tail.float()
    if temperature == 1:
        return prob, tail
    others = num_classes - prob.shape[1]
    logs = torch.cat([prob, (tail / others)[:, None]], dim=1).log() / temperature
    # The largest is finite, so an impossible class stays impossible without a NaN.
    mass = (logs - logs.max(dim=1, keepdim=True).values).exp()
    mass = torch.cat([mass[:, :-1], mass[:, -1:] * others], dim=1)
    mass = mass / mass.sum(1, keepdim=True)
    return mass[:, :-1], mass[:, -1]


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """What a teacher gives for B images: dense `logits` [B, C], or stored labels.

    Stored labels are `index` int64 [B, K], `prob` [B, K] and `tail` [B], spread evenly over the other classes.
    """

    logits: Tensor | None = None
    index: Tensor | None = None
    prob: Tensor | None = None
    tail: Tensor | None = None

    def __post_init__(self) -> None:
        stored = [part is not None for part in (self.index, self.prob, self.tail)]
        assert any(stored) == all(stored), "a stored label has three parts"
        assert any(stored) != (self.logits is not None), "logits or stored labels"

    def to(self, device: torch.device | str) -> TeacherTargets:
        """Move to a device."""
        parts = (self.logits, self.index, self.prob, self.tail)
        return TeacherTargets(*(None if p is None else p.to(device, non_blocking=True) for p in parts))

    def best(self) -> Tensor:
        """Return the teacher's likeliest class, int64 [B]."""
        if self.logits is not None:
            return self.logits.argmax(1)
        index, prob, _ = self._stored()
        return index.gather(1, prob.argmax(1, keepdim=True))[:, 0]

    def cross_entropy(self, student: Tensor) -> Tensor:
        """Return the cross-entropy in nats of float32 logits [B, C], float32 [B]."""
        if self.logits is None:
            return sparse_soft_cross_entropy(student, *self._stored())
        target = self.logits.detach().float().softmax(1)
        return functional.cross_entropy(student, target, reduction="none")

    def divergence(self, student: Tensor, temperature: float) -> Tensor:
        """Return T^2 KL(teacher || student), both softened by T, of float32 logits: float32 [B]."""
        scaled = student / temperature
        if self.logits is None:
            index, prob, tail = self._stored()
            prob, tail = retemper(prob, tail, student.shape[1], temperature)
            loss = sparse_soft_cross_entropy(scaled, index, prob, tail)
            return (loss - label_entropy(prob, tail, student.shape[1])) * temperature**2
        target = (self.logits.detach().float() / temperature).log_softmax(1)
        found = scaled.log_softmax(1)
        loss = functional.kl_div(found, target, reduction="none", log_target=True).sum(1)
        return loss * temperature**2

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.index is not None
        assert self.prob is not None
        assert self.tail is not None
        return self.index, self.prob, self.tail


@dataclass(frozen=True)
class DistillLoss:
    """A loss of each image, from its true label and its teacher's.

    `kind` "none": the true labels alone; "sparse": the teacher's labels (TinyViT), with true labels for the share
    `hard_weight`; "soft", "hard" and "token" weigh the teacher's part by `alpha` and the true labels by the rest: the
    KL at a `temperature`, the teacher's class, or either (`token_loss`) on a head of its own (DeiT, arXiv 2012.12877).
    `reduction` "numel" divides the KL by the number of classes as well, as DeiT's code does and its paper does not.
    `label_smoothing` is of true labels given as classes, never of the teacher's class.
    """

    kind: str = "sparse"
    alpha: float = 0.5
    temperature: float = 1.0
    reduction: str = "batchmean"
    token_loss: str = "hard"
    label_smoothing: float = 0.0
    hard_weight: float = 0.0

    @property
    def needs_truth(self) -> bool:
        """Whether true labels play a part."""
        return self.kind != "sparse" or self.hard_weight > 0

    def on(self, model: nn.Module) -> DistillLoss:
        """Return the loss that a net can learn by: for one without a token, "token" becomes "hard" or "soft"."""
        if self.kind != "token" or has_token(model):
            return self
        return replace(self, kind=self.token_loss)

    def __call__(self, outputs: Tensor | Heads, target: Tensor, teacher: TeacherTargets | None) -> Tensor:
        """Return the loss of each image in nats, float32 [B], also under autocast.

        `outputs` are logits [B, C] or both heads'; "token" needs both, the others take their mean. `target`: int64
        [B], -1 where it is unknown, or shares float [B, C] (mixed labels). An image of unknown class counts by the
        teacher's part alone.
        """
        heads = (outputs,) if isinstance(outputs, Tensor) else outputs
        with torch.autocast(heads[0].device.type, enabled=False):
            own, *others = (head.float() for head in heads)
            other = others[0] if others else own
            if self.kind == "token":
                assert others, "the token's loss takes two heads"
            elif others:
                own = other = fuse((own, other), "logits")
            if self.kind == "none":
                if target.ndim == 1 and target.device.type == "cpu":  # a GPU would be waited for
                    assert bool((target >= 0).all()), "without a teacher all need their class"
                return self._from_truth(own, target)
            assert teacher is not None, f"{self.kind} distillation takes a teacher"
            if self.kind == "sparse":
                alpha, loss = 1 - self.hard_weight, teacher.cross_entropy(own)
                if self.hard_weight == 0:
                    return loss
            else:
                alpha, loss = self.alpha, self._from_teacher(other, teacher)
            if target.ndim == 1:
                share = torch.where(target >= 0, alpha, 1.0)
                # Its loss is 0 below a share of 0, whatever class stands in for the unknown.
                target = target.clamp(min=0)
                return (1 - share) * self._from_truth(own, target) + share * loss
            return (1 - alpha) * self._from_truth(own, target) + alpha * loss

    def _from_truth(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare with true labels: smoothed where they are classes, as given where shares."""
        if target.ndim == 2:
            return functional.cross_entropy(logits, target.float(), reduction="none")
        return functional.cross_entropy(logits, target, reduction="none", label_smoothing=self.label_smoothing)

    def _from_teacher(self, logits: Tensor, teacher: TeacherTargets) -> Tensor:
        """Compare with the teacher: by its class, or by its distribution."""
        if self.kind == "hard" or (self.kind == "token" and self.token_loss == "hard"):
            return functional.cross_entropy(logits, teacher.best(), reduction="none")
        loss = teacher.divergence(logits, self.temperature)
        return loss / logits.shape[1] if self.reduction == "numel" else loss


def has_token(model: nn.Module) -> bool:
    """Return whether a net has a distillation token, as timm's distilled nets do."""
    return hasattr(model, "set_distilled_training")


def set_token_training(model: nn.Module, on: bool) -> None:
    """Make a net give both heads in training mode, or their mean as in evaluation.

    A net without a distillation token cannot do the first (InputError) and does the second.
    """
    switch = getattr(model, "set_distilled_training", None)
    if switch is not None:
        switch(on)
    elif on:
        got = "token for a net without a distillation token"
        raise refuse("--distill", got, "one that has it", "hard distils the same without one")


def fuse(outputs: Heads, how: str) -> Tensor:
    """Return one prediction from two heads: logits [B, C].

    `how` "logits" is the mean of the heads (the code of DeiT, and timm in evaluation), "softmax" the logarithm,
    float32, of the mean of both softmaxes (the paper's late fusion).
    """
    one, other = outputs
    if how == "logits":
        return (one + other) / 2
    logs = one.float().log_softmax(1), other.float().log_softmax(1)
    return torch.logaddexp(*logs) - math.log(2)


def both_heads(model: nn.Module, inputs: Tensor) -> Heads:
    """Return the class head's and the distillation head's logits [B, C] as in evaluation.

    Gradients follow the caller's mode. Leaves the model as it was. Raises InputError for one without a token.
    """
    modes = {module: module.training for module in model.modules()}
    set_before = bool(getattr(model, "distilled_training", False))
    set_token_training(model, True)
    try:
        for module in modes:
            module.training = False
        model.training = True  # timm's nets ask this of themselves only; what drops are their parts
        found = model(inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
        set_token_training(model, set_before)
    assert isinstance(found, tuple), "a net in token training gives both heads"
    return found
