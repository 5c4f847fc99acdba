"""What a student learns from its teacher and from true labels, by soft, hard or token.

Stored labels and a teacher in memory say the same here; the proxy and the trainer use one loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.train.losses import label_entropy, retemper, sparse_soft_cross_entropy
from space.errors import refuse

DISTILL = ("none", "sparse", "soft", "hard", "token")
TOKEN_LOSSES = ("hard", "soft")
REDUCTIONS = ("batchmean", "numel")
FUSIONS = ("logits", "softmax")

Heads = tuple[Tensor, Tensor]
"""The logits of the class head and of the distillation head, each [B, C]."""


@dataclass(frozen=True, eq=False)
class Taught:
    """What a teacher says of B images: dense `logits` [B, C], or stored labels.

    Those are `index` int64 [B, K], `prob` [B, K] and `tail` [B], spread evenly over the others.
    """

    logits: Tensor | None = None
    index: Tensor | None = None
    prob: Tensor | None = None
    tail: Tensor | None = None

    def __post_init__(self) -> None:
        stored = [part is not None for part in (self.index, self.prob, self.tail)]
        assert any(stored) == all(stored), "a stored label has three parts"
        assert any(stored) != (self.logits is not None), "logits or stored labels"

    def to(self, device: torch.device | str) -> Taught:
        """Move to a device."""
        parts = (self.logits, self.index, self.prob, self.tail)
        return Taught(*(None if p is None else p.to(device, non_blocking=True) for p in parts))

    def best(self) -> Tensor:
        """Give the class that the teacher holds likeliest, int64 [B]."""
        if self.logits is not None:
            return self.logits.argmax(1)
        index, prob, _ = self._stored()
        return index.gather(1, prob.argmax(1, keepdim=True))[:, 0]

    def cross_entropy(self, student: Tensor) -> Tensor:
        """Give the cross-entropy in nats of float32 logits [B, C] with this, float32 [B]."""
        if self.logits is None:
            return sparse_soft_cross_entropy(student, *self._stored())
        target = self.logits.detach().float().softmax(1)
        return functional.cross_entropy(student, target, reduction="none")

    def divergence(self, student: Tensor, temperature: float) -> Tensor:
        """Give T^2 KL(teacher || student), both softened by T, of float32 logits: float32 [B]."""
        scaled = student / temperature
        if self.logits is None:
            index, prob, tail = self._stored()
            prob, tail = retemper(prob, tail, student.shape[1], temperature)
            apart = sparse_soft_cross_entropy(scaled, index, prob, tail)
            return (apart - label_entropy(prob, tail, student.shape[1])) * temperature**2
        theirs = (self.logits.detach().float() / temperature).log_softmax(1)
        ours = scaled.log_softmax(1)
        apart = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
        return apart * temperature**2

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.index is not None
        assert self.prob is not None
        assert self.tail is not None
        return self.index, self.prob, self.tail


@dataclass(frozen=True)
class DistillLoss:
    """A loss of each image, from its true label and its teacher's. Raises InputError.

    `kind` "none": the true labels alone; "sparse": the teacher's labels alone (TinyViT); "soft",
    "hard" and "token" weigh the teacher's part by `alpha` and the true labels by the rest: the KL
    at a `temperature`, the teacher's class, or either (`token_loss`) on a head of its own (DeiT,
    arXiv 2012.12877). `reduction` "numel" divides the KL by the number of classes as well, as
    DeiT's code does and its paper does not. `label_smoothing` is of true labels given as classes,
    never of the teacher's class.
    """

    kind: str = "sparse"
    alpha: float = 0.5
    temperature: float = 1.0
    reduction: str = "batchmean"
    token_loss: str = "hard"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("--distill", self.kind, DISTILL),
            ("--kl-reduction", self.reduction, REDUCTIONS),
            ("--token-loss", self.token_loss, TOKEN_LOSSES),
        ):
            if value not in choices:
                raise refuse(name, value, f"one of {', '.join(choices)}")
        if not 0 <= self.alpha <= 1:
            raise refuse("--distill-alpha", self.alpha, "a share from 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise refuse("--temperature", self.temperature, "a number > 0")
        if not 0 <= self.label_smoothing < 1:
            raise refuse("--label-smoothing", self.label_smoothing, "a share from 0 to below 1")

    @property
    def needs_truth(self) -> bool:
        """Tell whether true labels play a part."""
        return self.kind != "sparse"

    def on(self, model: nn.Module) -> DistillLoss:
        """Give the loss that a net can learn by: this one, if need be on its one head.

        "token" is "hard" or "soft", as its head would learn, for a net without a token.
        """
        if self.kind != "token" or has_token(model):
            return self
        return replace(self, kind=self.token_loss)

    def __call__(self, outputs: Tensor | Heads, target: Tensor, taught: Taught | None) -> Tensor:
        """Give the loss of each image in nats, float32 [B], also under autocast.

        `outputs` are logits [B, C] or both heads'; "token" needs both, the others take their mean.
        `target`: int64 [B], -1 where it is unknown, or shares float [B, C] (mixed labels). An image
        of unknown class counts by the teacher's part alone.
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
                return self._true(own, target)
            assert taught is not None, f"{self.kind} distillation takes a teacher"
            if self.kind == "sparse":
                return taught.cross_entropy(own)
            told = self._told(other, taught)
            if target.ndim == 1:
                share = torch.where(target >= 0, self.alpha, 1.0)
                # Its loss is 0 below a share of 0, whatever class stands in for the unknown.
                target = target.clamp(min=0)
                return (1 - share) * self._true(own, target) + share * told
            return (1 - self.alpha) * self._true(own, target) + self.alpha * told

    def _true(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare with true labels: smoothed where they are classes, as given where shares."""
        if target.ndim == 2:
            return functional.cross_entropy(logits, target.float(), reduction="none")
        return functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=self.label_smoothing
        )

    def _told(self, logits: Tensor, taught: Taught) -> Tensor:
        """Compare with the teacher: by its class, or by its distribution."""
        if self.kind == "hard" or (self.kind == "token" and self.token_loss == "hard"):
            return functional.cross_entropy(logits, taught.best(), reduction="none")
        apart = taught.divergence(logits, self.temperature)
        return apart / logits.shape[1] if self.reduction == "numel" else apart


def has_token(model: nn.Module) -> bool:
    """Tell whether a net has a distillation token, as timm's distilled nets do."""
    return hasattr(model, "set_distilled_training")


def set_token_training(model: nn.Module, on: bool) -> None:
    """Have a net give both heads in training mode, or the mean of them as in evaluation.

    Of a net without a distillation token, the first is refused, and the second is so already.
    """
    switch = getattr(model, "set_distilled_training", None)
    if switch is not None:
        switch(on)
    elif on:
        raise refuse(
            "--distill",
            "token for a net without a distillation token",
            "one that has it",
            "hard distils the same without one",
        )


def fuse(outputs: Heads, how: str) -> Tensor:
    """Make one prediction of two heads: logits [B, C].

    `how` "logits" is the mean of the heads (the code of DeiT, and timm in evaluation), "softmax"
    the logarithm, float32, of the mean of both softmaxes (the paper's late fusion).
    """
    if how not in FUSIONS:
        raise refuse("--fusion", how, f"one of {', '.join(FUSIONS)}")
    one, other = outputs
    if how == "logits":
        return (one + other) / 2
    logs = one.float().log_softmax(1), other.float().log_softmax(1)
    return torch.logaddexp(*logs) - math.log(2)


def both_heads(model: nn.Module, inputs: Tensor) -> Heads:
    """Give the class head's and the distillation head's logits [B, C] as in evaluation.

    Gradients flow as the caller has it. Leaves the model as it was; one without a distillation
    token is refused.
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
