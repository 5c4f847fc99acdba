"""AdamW with its parameter groups, and learning rates as pure functions of the step.

Only `make_optimizer` needs torch: the process that drives a search chooses rates without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nas.train.recipe import Recipe

SCRATCH_LR = 1e-3
"""From fresh weights, for nets of at most `SCRATCH_PARAMS` parameters."""
SCRATCH_PARAMS = 5_400_000
INHERIT_LR = 5e-4
"""From a parent's sliced weights."""


def peak_lr(init: str, params: int) -> float:
    """Return the peak rate for "scratch" or "inherit" (the batch is the default's).

    From scratch it falls with the root of the parameters, which is about the width: wider layers bear less of it
    (Yang et al. 2022, Tensor Programs V, scale Adam's with 1 / width).
    """
    return INHERIT_LR if init == "inherit" else SCRATCH_LR * min(1.0, math.sqrt(SCRATCH_PARAMS / params))


def lr_at(step: int, *, total_steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Return the rate of 0-based `step`: linear warm-up to `lr`, then a cosine down to `min_lr`.

    Warm-up step s has lr * (s + 1) / (warmup_steps + 1), so no step is wasted at zero and the first step after it has
    `lr` itself. Steps at or beyond `total_steps` have `min_lr`.
    """
    assert 0 <= warmup_steps <= total_steps
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if step >= total_steps:
        return min_lr
    position = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * position))


def rate_at(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return a recipe's rate at a 0-based step: a line from the first rate to the peak, then a cosine.

    The cosine runs from 0 to the end, the warm-up's time included, as in the recipes of TinyViT and DeiT (timm's
    CosineLRScheduler without `warmup_prefix`).
    """
    peak, least, first = recipe.rates()
    if recipe.schedule == "epoch":
        t, total, warmup = step // steps_per_epoch, recipe.epochs, recipe.warmup_epochs
    else:
        t, total = step, recipe.epochs * steps_per_epoch
        warmup = int(recipe.warmup_epochs * steps_per_epoch)
    if t < warmup:
        return first + t * (peak - first) / warmup
    if t >= total:
        return least
    return least + 0.5 * (peak - least) * (1.0 + math.cos(math.pi * t / total))


def layer_lr_scales(model: nn.Module, blocks: Sequence[str], decay: float) -> dict[str, float]:
    """Return each parameter's share of the learning rate under layer decay, by its name.

    `blocks` are the names of the model's L blocks in order. Block i has decay^(L - 1 - i); what stands between two
    blocks (timm keeps downsampling there) goes with the one before it, what stands before the first with the first,
    what stands behind the last has 1. Source: `set_layer_lr_decay` of the TinyViT repository.
    """
    order = {name: at for at, name in enumerate(blocks)}
    scales, at = {}, 0
    for name, _ in model.named_parameters():
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
        at = next((order[prefix] for prefix in prefixes if prefix in order), at)
        scales[name] = decay ** max(len(blocks) - 1 - at, 0)
    return scales


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    scales: dict[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Build AdamW through timm: no decay on 1-D parameters, biases and what the model excludes.

    TinyViT excludes its `attention_biases`, as the authors' recipe does. With `scales`, each group has a `lr_scale` of
    its parameters' names. Fused: a third of the time of the plain form on a CPU, where it is 5 to 10 % of a 21M
    model's step.
    """
    from timm import optim

    factory: Any = optim  # its functions are not exported for type checkers
    make = factory.create_optimizer_v2
    options = {"opt": "adamw", "lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "fused": True}
    optimizer: torch.optim.Optimizer = make(model, **options)
    if scales is None:
        return optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            groups.setdefault((group["weight_decay"], scales[names[id(parameter)]]), []).append(parameter)
    by_scale = [{"params": groups[key], "weight_decay": key[0], "lr_scale": key[1]} for key in sorted(groups)]
    optimizer = make(by_scale, **options)
    return optimizer
