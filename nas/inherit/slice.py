"""Slices a child's first weights out of its parent's, or out of a checkpoint of its own arch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nas.core.class_match import ClassMatch, match_head
from nas.export.arch_of_weights import checkpoint_context, class_dims, state_shapes
from nas.export.load import find_network
from nas.export.named_network import NamedNetwork
from nas.export.weights import State, drop_stale_caches, save_weights
from space import Context
from space.errors import InputError, refuse
from space.family import Arch, Family, Slice


@dataclass(frozen=True)
class Inherited:
    """How many numbers of the state dict came from the parent, and how many are the child's own."""

    copied: int
    kept: int


def inherit(model: nn.Module, parent_state: Mapping[str, torch.Tensor], slicing: Mapping[str, Slice]) -> Inherited:
    """Copy a parent's weights into `model`, in place, by `slicing`.

    Each `Slice` holds one index array per dimension of the child's tensor; -1 keeps the child's own value there, as
    does a key without a slice. A dimension with a blend is summed up in float64. Raises InputError for weights of
    another parent.
    """
    copied = 0
    state = model.state_dict()
    with torch.no_grad():
        for name, source in slicing.items():
            if source.source not in parent_state:
                raise _foreign(f"no {source.source}")
            copied += _copy(state[name], parent_state[source.source], source)
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
        value = _blended(value, dim, source) if dim in source.blends else value.index_select(dim, index.clamp(min=0))
        known = known & (index >= 0).view([-1 if d == dim else 1 for d in range(target.ndim)])
    known = known.expand(target.shape)
    target.copy_(torch.where(known, value.to(target.dtype), target.cpu()))
    return int(known.sum())


def _blended(value: torch.Tensor, dim: int, source: Slice) -> torch.Tensor:
    """Return weighted sums along a dimension: [.., parent, ..] -> [.., child, ..] in float64."""
    weights = torch.from_numpy(source.blends[dim])
    if value.shape[dim] != weights.shape[1]:
        raise _foreign(f"{source.source} with {value.shape[dim]} values along dimension {dim}")
    return torch.movedim(torch.movedim(value.double(), dim, -1) @ weights.T, -1, dim)


def _foreign(got: str) -> InputError:
    return refuse("parent weights", got, "the weights of the parent arch", "name its own file")


def is_whole(
    home: str, source: Slice | None, shape: tuple[int, ...], parent_shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Return whether a tensor is all of the parent's tensor `home`, each number in its place."""
    if source is None or source.source != home or source.blends:
        return False
    same = tuple(shape) == tuple(parent_shapes[home])
    return same and all(np.array_equal(rows, np.arange(len(rows))) for rows in source.index)


def _class_dims(family: Family, arch: Arch, ctx: Context) -> dict[str, int]:
    """Find the tensors that have a row for each class, and in which dimension."""
    return class_dims(lambda count: family.build(arch, replace(ctx, num_classes=count)))


def load_seed_weights(
    family: Family, arch: Arch, ctx: Context, source: str, out: Path, classes: Sequence[str]
) -> tuple[Context, tuple[int, ...], str]:
    """Load weights of `arch` by their name (`nas.export.load`) and keep them as `out` (safetensors).

    Returns their context, the row of their head for each of the data's `classes` (`head_slices`), and a note for the
    user. Raises InputError for weights of another arch.
    """
    named = find_network(source, "--seed-weights")
    state = named.weights()
    made_in = checkpoint_context(family, arch, ctx, state)
    match = match_head(named, made_in.num_classes, classes)
    save_weights(out, state)
    changes = _head_changes(match)
    if made_in.img_size != ctx.img_size:
        changes.append(f"windows of {made_in.img_size} px carried over to {ctx.img_size} px")
    return made_in, match.rows, _note(named, changes)


def load_initial_weights(
    model: nn.Module,
    family: Family,
    arch: Arch,
    ctx: Context,
    source: str,
    classes: Sequence[str],
    *,
    resize: str,
    head_map: Path | None,
) -> str:
    """Load weights by their name (`nas.export.load`) into `model`, in place; returns a note.

    Position tables of another image size are resized by the method `resize` (`Family.resizes`). Rows of the head go
    to the data's `classes` of the same names, other classes start fresh; or they are mapped by the file `head_map`.
    Raises InputError for weights of another arch.
    """
    named = find_network(source, "--init")
    state = named.weights()
    made_in = checkpoint_context(family, arch, ctx, state, name="--init")
    heads: dict[str, Slice] = {}
    if head_map is None:
        match = match_head(named, made_in.num_classes, classes)
        heads, changes = head_slices(family, arch, ctx, match.rows), _head_changes(match)
    else:
        keys = list(_class_dims(family, arch, made_in))
        state = map_head(state, keys, read_head_map(head_map, ctx.num_classes))
        changes = [f"{made_in.num_classes} classes mapped to {ctx.num_classes}"]
        made_in = replace(made_in, num_classes=ctx.num_classes)
    if made_in.img_size != ctx.img_size:
        changes.append(f"positions of {made_in.img_size} px resized to {ctx.img_size} px, {resize}")
    inherit(model, state, {**family.resized(arch, made_in, ctx, resize), **heads})
    return _note(named, changes)


def head_slices(family: Family, arch: Arch, ctx: Context, rows: Sequence[int]) -> dict[str, Slice]:
    """Slice every head of an arch for classes that have the given rows of a head of the same arch; -1 starts fresh."""
    shapes = state_shapes(family, arch, replace(ctx, num_classes=len(rows)))
    index = np.array(rows, dtype=np.int64)
    return {
        key: Slice(key, tuple(index if at == dim else np.arange(n) for at, n in enumerate(shapes[key].shape)))
        for key, dim in _class_dims(family, arch, ctx).items()
    }


def _head_changes(match: ClassMatch) -> list[str]:
    found = match.describe()
    return [found] if found else []


def _note(named: NamedNetwork, changes: Sequence[str]) -> str:
    text = f"weights of {named.name}" + (f", {' and '.join(changes)}" if changes else "")
    return "; ".join((text, *named.notes))


def read_head_map(path: Path, num_classes: int | None) -> list[int]:
    """Read the old class that each new one starts from: a line each, -1 for none. Raises InputError.

    `num_classes` None takes any number of lines.
    """
    want = f"{'' if num_classes is None else f'{num_classes} '}lines, each the number of an old class or -1"
    try:
        rows = [int(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise refuse("--head-map", f"{path} ({error})", want) from None
    if not rows or (num_classes is not None and len(rows) != num_classes):
        raise refuse("--head-map", f"{path} with {len(rows)} lines", want)
    if min(rows) < -1 or max(rows) < 0:
        raise refuse("--head-map", f"{path} with {min(rows)} to {max(rows)}", want)
    return rows


def map_head(state: State, keys: Sequence[str], rows: Sequence[int]) -> State:
    """Return a state whose head has the rows of the old one; -1 takes the mean of those taken.

    Source: the TinyViT repository's change from ImageNet-22k to ImageNet-1k.
    """
    index = torch.tensor(rows)
    mapped = dict(state)
    for key in keys:
        old = state[key]
        if max(rows) >= len(old):
            raise refuse("--head-map", f"class {max(rows)} of {len(old)}", "classes that the checkpoint has")
        mean = old[index[index >= 0]].mean(0, keepdim=True)
        mapped[key] = torch.cat([old, mean])[index]  # -1 is the last row
    return mapped
