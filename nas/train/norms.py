"""Batch-norm statistics estimated anew, where a training was too short for its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas.data import Split
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.timm_engine import eval_batch
from nas.export.weights import drop_stale_caches, place
from nas.labels.reader import batch_sizes

LEFT = 0.01
"""Statistics are estimated anew where those of earlier epochs have a larger share in the running averages."""
IMAGES, BATCH = 2048, 64
"""Training images that an estimate sees at most, and how many at a time."""
RULE = f"anew below {LEFT:g}: {IMAGES}, {BATCH}"
"""Names the rule in keys of caches."""


def tracked_norms(model: nn.Module) -> list[_BatchNorm]:
    """List the batch norms that keep running statistics."""
    return [each for each in model.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]


def lags(model: nn.Module, updates: int, first: float = 0.0) -> bool:
    """Tell whether running statistics are those of earlier weights, after the `updates` of an epoch.

    In n updates with momentum m, what was before keeps a share of (1 - m)^n; above 1 % (fewer than 44 steps an epoch
    at the usual 0.1) they lag. `first` is the share that the first statistics have for another reason.
    """
    rates = [1 - norm.momentum for norm in tracked_norms(model) if norm.momentum is not None]
    return bool(rates) and max(max(rates) ** updates, first) > LEFT


def estimate(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor], device: str) -> None:
    """Estimate the statistics of norms anew: averages over batches float32 [B, C, S, S], cumulative.

    Without gradients, everything else in eval mode; the mode is left as it was. Moves the model to `device` as
    training does.
    """
    place(model, device)
    was_training, momenta = model.training, [norm.momentum for norm in norms]
    model.train().eval()  # drops what eval mode may have cached of older weights
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    seen = 0
    try:
        with torch.no_grad():
            for inputs in batches:
                model(inputs.to(device, memory_format=torch.channels_last))
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)
        drop_stale_caches(model)
    assert seen, "statistics of no batches"


def settle(model: nn.Module, split: Split, spec: AugmentSpec, *, updates: int, device: str, first: float = 0.0) -> bool:
    """Estimate all batch norms anew where they lag (`lags`); returns whether they did.

    On the first training images by key, a random sample, as evaluation sees them: no augmentation plays a part, and
    the same weights give the same statistics.
    """
    if not lags(model, updates, first) or len(split) < 2:
        return False
    estimate(model, tracked_norms(model), _first_inputs(split, spec), device)
    return True


@contextmanager
def settled(
    model: nn.Module, split: Split, spec: AugmentSpec, *, updates: int, device: str, first: float = 0.0
) -> Iterator[None]:
    """Lend a model sound statistics (`settle`) for an evaluation; training goes on with its own."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    changed = settle(model, split, spec, updates=updates, device=device, first=first)
    try:
        yield
    finally:
        if changed:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in kept:
                        buffer.copy_(kept[name])


def _first_inputs(split: Split, spec: AugmentSpec) -> Iterator[Tensor]:
    ends = np.cumsum(batch_sizes(min(len(split), IMAGES), BATCH)).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        yield eval_batch(split.pixels[start:end], spec)
