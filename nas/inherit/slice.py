"""A child's first weights, taken from its parent's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from nas.export.weights import drop_stale_caches, first_mismatch
from space import Context
from space.errors import InputError, refuse
from space.family import Arch, Family, Slice

_PUBLISHED_SIZES = (224, 384, 512, 256, 192, 160, 128, 96, 64, 48, 32)
"""Image sizes that a checkpoint may have been made for, tried in this order."""


@dataclass(frozen=True)
class Inherited:
    """How many numbers of the state dict came from the parent, and how many are the child's own."""

    copied: int
    kept: int


def inherit(
    model: nn.Module, parent_state: Mapping[str, torch.Tensor], slicing: Mapping[str, Slice]
) -> Inherited:
    """Copy a parent's weights into `model`, in place, as `slicing` says.

    Each `Slice` holds one index array per dimension of the child's tensor; -1 keeps the child's own
    value there, as does a key without a slice. A dimension with a blend is summed up in float64. A
    parent's file that does not fit is refused.
    """
    copied = 0
    state = model.state_dict()
    with torch.no_grad():
        for name, source in slicing.items():
            target = state[name]
            if source.source not in parent_state:
                raise _foreign(f"no {source.source}")
            copied += _copy(target, parent_state[source.source], source)
    drop_stale_caches(model)
    return Inherited(copied, sum(t.numel() for t in state.values()) - copied)


def _copy(target: torch.Tensor, parent: torch.Tensor, source: Slice) -> int:
    """Gather one tensor; returns how many of its numbers came from the parent."""
    assert len(source.index) == target.ndim
    if parent.ndim != target.ndim:
        raise _foreign(f"{source.source} with {parent.ndim} dimensions instead of {target.ndim}")
    value = parent.cpu()
    known = torch.ones((), dtype=torch.bool)
    for dim, rows in enumerate(source.index):
        if rows.max(initial=-1) >= parent.shape[dim]:
            raise _foreign(f"{source.source} of shape {tuple(parent.shape)}")
        index = torch.from_numpy(rows)
        if dim in source.blends:
            value = _blended(value, dim, source)
        else:
            value = value.index_select(dim, index.clamp(min=0))
        known = known & (index >= 0).view([-1 if d == dim else 1 for d in range(target.ndim)])
    known = known.expand(target.shape)
    target.copy_(torch.where(known, value.to(target.dtype), target.cpu()))
    return int(known.sum())


def _blended(value: torch.Tensor, dim: int, source: Slice) -> torch.Tensor:
    """Give a dimension as weighted sums: [.., parent, ..] -> [.., child, ..] in float64."""
    weights = torch.from_numpy(source.blends[dim])
    if value.shape[dim] != weights.shape[1]:
        raise _foreign(f"{source.source} with {value.shape[dim]} values along dimension {dim}")
    return torch.movedim(torch.movedim(value.double(), dim, -1) @ weights.T, -1, dim)


def _foreign(got: str) -> InputError:
    return refuse("parent weights", got, "the weights of the parent arch", "name its own file")


def checkpoint_context(
    family: Family,
    arch: Arch,
    ctx: Context,
    state: Mapping[str, torch.Tensor],
    *,
    name: str = "--seed-weights",
) -> Context:
    """Find the context in which `state` is a state dict of `arch`, to inherit from it.

    Its classes are read off the tensor whose shape depends on them; image sizes are tried from
    `ctx`'s own over those of published models. With equal classes the slicing keeps the head, with
    others the child's own stays. No fitting context: refused with the first mismatch.
    """
    classes = _classes_of(family, arch, ctx, state)
    tried = ""
    for size in dict.fromkeys((ctx.img_size, *_PUBLISHED_SIZES)):
        candidate = replace(ctx, img_size=size, num_classes=classes)
        if not family.fits(arch, candidate):
            continue
        mismatch = first_mismatch(_shapes(family, arch, candidate), state)
        if not mismatch:
            return candidate
        if mismatch == tried:
            break  # the same difference at two sizes is not one of size
        tried = tried or mismatch
    raise refuse(
        name, tried, f"weights of {family.label(arch)}", "name a checkpoint of the seed's own arch"
    )


def _classes_of(family: Family, arch: Arch, ctx: Context, state: Mapping[str, torch.Tensor]) -> int:
    """Read the class count off a state dict, or fall back to the context's."""
    two, three = (_shapes(family, arch, replace(ctx, num_classes=n)) for n in (2, 3))
    for key, tensor in two.items():
        pairs = zip(tensor.shape, three[key].shape, strict=True)
        for dim, (a, b) in enumerate(pairs):
            if a != b and key in state and state[key].ndim == tensor.ndim:
                return max(1, state[key].shape[dim])
    return ctx.num_classes


def _shapes(family: Family, arch: Arch, ctx: Context) -> dict[str, torch.Tensor]:
    """Give the state dict of an arch without memory for it."""
    with torch.device("meta"):
        return dict(family.build(arch, ctx).state_dict())
