"""Learning rates as a pure function of the step."""

from __future__ import annotations

import math


def lr_at(step: int, *, total_steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of 0-based `step`: linear warm-up to `lr`, then a cosine down to `min_lr`.

    Warm-up step s has lr * (s + 1) / (warmup_steps + 1), so no step is wasted at zero and the first
    step after it has `lr` itself. Steps at or beyond `total_steps` have `min_lr`.
    """
    assert 0 <= warmup_steps <= total_steps
    assert step >= 0
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if step >= total_steps:
        return min_lr
    position = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * position))


def cosine_at(
    t: int, *, total: int, warmup: float, lr: float, min_lr: float, first: float
) -> float:
    """Learning rate at time `t` (steps or epochs): a line from `first` to `lr`, then a cosine.

    The cosine runs from 0 to `total`, the warm-up's time included, as in the recipes of TinyViT
    and DeiT (timm's CosineLRScheduler without `warmup_prefix`). At or beyond `total`: `min_lr`.
    """
    assert 0 <= warmup <= total
    assert t >= 0
    if t < warmup:
        return first + t * (lr - first) / warmup
    if t >= total:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * t / total))
