"""Folding batch norms into the convolutions and linear layers before them, for any network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_RANKS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Linear: 2}
"""Layers that can take a norm in, and the rank at which the norm's axis is their channels."""


def fuse_batch_norms(model: nn.Module, images: Tensor) -> int:
    """Fold every batch norm that directly follows a layer into that layer, in place; return how many.

    As seen on one pass of `images` [n, c, h, w] in eval mode: a norm is folded when its input is the very tensor that a
    convolution or linear layer put out, nothing else uses that tensor, and both ran once. timm's norms keep their
    activation.
    """
    assert not model.training, "norms can be folded in eval mode only"
    pairs = _observe(model, images)
    names = {id(module): name for name, module in model.named_modules()}
    for layer, norm in pairs:
        if isinstance(layer, nn.Linear):
            fused: nn.Module = fuse_linear_bn_eval(layer, norm)
        else:
            fused = fuse_conv_bn_eval(layer, norm)
        _put(model, names[id(layer)], fused)
        _put(model, names[id(norm)], _rest(norm))
    return len(pairs)


class _Uses(TorchFunctionMode):
    """Counts how often each watched tensor goes into something that gives tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if any(isinstance(each, Tensor) for each in tree_leaves(made)):
            for each in {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}:
                if each in self.of:
                    self.of[each] += 1
        return made


def _observe(model: nn.Module, images: Tensor) -> list[tuple[Any, Any]]:
    """Return the (layer, norm) pairs that are neighbours in the data flow, with none beside."""
    made_by: dict[int, nn.Module] = {}
    alive: list[Tensor] = []  # an id is unique only while its tensor lives
    runs: dict[int, int] = {}
    found: list[tuple[nn.Module, nn.Module, Tensor]] = []
    uses = _Uses()

    def after_layer(layer: nn.Module, _: Any, output: Any) -> None:
        runs[id(layer)] = runs.get(id(layer), 0) + 1
        if isinstance(output, Tensor):
            made_by[id(output)] = layer
            uses.of[id(output)] = 0
            alive.append(output)

    def before_norm(norm: nn.Module, inputs: Any) -> None:
        runs[id(norm)] = runs.get(id(norm), 0) + 1
        layer = made_by.get(id(inputs[0])) if inputs else None
        if layer is not None:
            found.append((layer, norm, inputs[0]))

    hooks = []
    for module in model.modules():
        if _takes_a_norm(module):
            hooks.append(module.register_forward_hook(after_layer))
        elif isinstance(module, _NORMS) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        with torch.no_grad(), uses:
            results = {id(each) for each in tree_leaves(model(images))}
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (layer, norm)
        for layer, norm, between in found
        if runs[id(layer)] == runs[id(norm)] == uses.of[id(between)] == 1
        and id(between) not in results
        and _fits(layer, norm, between)
    ]


def _takes_a_norm(layer: nn.Module) -> bool:
    # A subclass may do something to its weights on the way (weight standardisation, say), and so
    # may a hook; timm's "same" padding does nothing but pad.
    plain = type(layer) in _RANKS or type(layer).__name__ == "Conv2dSame"
    return plain and not layer._forward_pre_hooks and not layer._forward_hooks


def _fits(layer: nn.Module, norm: nn.Module, between: Tensor) -> bool:
    # timm's variants may compute something else; those that we know are exact.
    known = type(norm) in _NORMS or (hasattr(norm, "act") and hasattr(norm, "drop"))
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    rank = next(rank for kind, rank in _RANKS.items() if isinstance(layer, kind))
    return known and width == norm.num_features and between.ndim == rank


def _rest(norm: nn.Module) -> nn.Module:
    if type(norm) in _NORMS:
        return nn.Identity()
    drop, act = norm.drop, norm.act
    assert isinstance(drop, nn.Module)
    assert isinstance(act, nn.Module)
    return nn.Sequential(drop, act)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
