"""Structured pruning of a trained network to a parameter budget by tools that are not ours."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

CLOSE = 0.01
"""The search for a ratio ends when the net is at most this share below the budget."""
GRID = 20
"""Ratios that are tried first: 1/20, 2/20, ..., 19/20."""
BISECTIONS = 8
ROUND_TO = 8


def count(model: nn.Module) -> int:
    """Count parameters."""
    return sum(p.numel() for p in model.parameters())


def prune_by_ratio(
    model: nn.Module,
    example: torch.Tensor,
    ratio: float,
    gradients: Sequence[torch.Tensor | None],
    *,
    importance: str,
    everywhere: bool,
    heads: str,
) -> nn.Module:
    """Return a pruned copy of a model, the classifier left whole; the options are those of `jobs.Variant`.

    Settings as the tool recommends for transformers: widths in multiples of 8, layers of one kind compared with each
    other when pruning globally.
    """
    import torch_pruning as tp

    model.train()  # drops what eval mode may have cached
    own = copy.deepcopy(model).eval()
    for parameter, gradient in zip(own.parameters(), gradients, strict=False):
        parameter.grad = None if gradient is None else gradient.clone()
    attention = [m for m in own.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]
    left: list[Any] = [own.get_classifier()]  # type: ignore[operator]
    options: dict[str, Any] = {}
    if heads == "kept":
        left += [m.qkv for m in attention]
    else:
        options["num_heads"] = {m.qkv: m.num_heads for m in attention}
    if heads == "pruned":
        options |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio}
    taylor = importance == "taylor"
    by = tp.importance.GroupTaylorImportance if taylor else tp.importance.GroupMagnitudeImportance
    pruner = tp.pruner.BasePruner(
        own,
        example,
        importance=by(),
        pruning_ratio=ratio,
        ignored_layers=left,
        global_pruning=everywhere,
        isomorphic=everywhere,
        round_to=ROUND_TO,
        **options,
    )
    pruner.step()
    for module in attention:
        if heads == "pruned":
            module.num_heads = pruner.num_heads[module.qkv]
    own.zero_grad(set_to_none=True)
    own.train()
    own.eval()
    with torch.no_grad():
        own(example)  # a net that does not run any more is an outcome
    return own


def prune_to_budget(prune: Callable[[float], nn.Module], budget: int) -> tuple[nn.Module, float]:
    """Find the largest pruned net of at most `budget` parameters; return it and its ratio.

    Sizes need not fall with the ratio (tools round widths, and leave alone what would vanish), and some ratios may not
    work at all: a grid is tried first, then the ratios just below the best. Raises `ValueError` when every net stays
    above the budget, and what `prune` raises when none works.
    """
    best: tuple[int, float, nn.Module] | None = None
    sizes: list[int] = []
    failure: Exception | None = None

    def fits(ratio: float) -> bool:
        nonlocal best, failure
        try:
            found = prune(ratio)
        except Exception as error:  # whatever a tool raises: this ratio does not work
            failure = error
            return False
        sizes.append(count(found))
        if sizes[-1] <= budget and (best is None or sizes[-1] > best[0]):
            best = sizes[-1], ratio, found
        return sizes[-1] <= budget

    for step in range(1, GRID):
        fits(step / GRID)
    if best is None:
        if sizes:
            raise ValueError(f"floor of {min(sizes):,} parameters above the budget of {budget:,}")
        assert failure is not None
        raise failure
    low, high = best[1] - 1 / GRID, best[1]
    for _ in range(BISECTIONS):
        if best[0] > (1 - CLOSE) * budget:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return best[2], best[1]


def fastnas(
    model: nn.Module,
    example: torch.Tensor,
    budget: int,
    batches: Iterable[torch.Tensor],
    score: Callable[[nn.Module], float],
    random_seed: int,
) -> nn.Module:
    """Prune with ModelOpt's FastNAS; `score` is of a net that was not trained on, higher is better.

    It has no random seed of its own: the global generators are set, and stay so.
    """
    import modelopt.torch.prune as mtp

    random.seed(random_seed)
    np.random.seed(random_seed % 2**32)
    torch.manual_seed(random_seed)
    model.train()
    found, _ = mtp.prune(
        model,
        mode="fastnas",
        constraints={"params": float(budget)},
        dummy_input=example,
        config={
            "data_loader": [(b, None) for b in batches],
            "collect_func": lambda batch: batch[0],
            "score_func": score,
            "checkpoint": None,
            "verbose": False,
        },
    )
    assert isinstance(found, nn.Module)
    return found.eval()


def rebuild(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Shrink a freshly built network, in place, to the shapes of a pruned state dict; load it.

    Layers only get narrower, so their shapes say everything: no pickle is needed.
    """
    for name, module in model.named_modules():
        for kind in ("weight", "bias", "running_mean", "running_var"):
            new, old = state.get(f"{name}.{kind}"), getattr(module, kind, None)
            if new is not None and old is not None and new.shape != old.shape:
                fresh = torch.empty_like(new)
                setattr(module, kind, nn.Parameter(fresh) if isinstance(old, nn.Parameter) else fresh)
        weight = state.get(f"{name}.weight")
        if weight is None:
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Conv2d):
            if module.groups == module.in_channels > 1:
                module.groups = weight.shape[0]
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = weight.shape[0]
    model.load_state_dict(dict(state), strict=True)
    return model


def loads_in_timm(call: tuple[str, Mapping[str, Any]], state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether `timm.create_model` and a strict `load_state_dict` take the weights."""
    import timm

    model = timm.create_model(call[0], **call[1])
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError:
        return False
    return True
