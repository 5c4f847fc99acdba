"""The first weights of a full training from a checkpoint of other image sizes and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nas.export.load import load_checkpoint
from nas.export.weights import State
from nas.inherit.slice import checkpoint_context, inherit
from space import Context
from space.errors import refuse
from space.family import Arch, Family


def read_head_map(path: Path, num_classes: int) -> list[int]:
    """Read the old class that each new one starts from: a line each, -1 for none. Raises
    InputError."""
    want = f"{num_classes} lines, each the number of an old class or -1"
    try:
        rows = [int(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise refuse("--head-map", f"{path} ({error})", want) from None
    if len(rows) != num_classes:
        raise refuse("--head-map", f"{path} with {len(rows)} lines", want)
    if min(rows) < -1 or max(rows) < 0:
        raise refuse("--head-map", f"{path} with {min(rows)} to {max(rows)}", want)
    return rows


def map_head(state: State, keys: Sequence[str], rows: Sequence[int]) -> State:
    """Give a head the rows of an old one, in place of its own; -1 takes the mean of those taken.

    Source: the TinyViT repository's change from ImageNet-22k to ImageNet-1k.
    """
    index = torch.tensor(rows)
    mapped = dict(state)
    for key in keys:
        old = state[key]
        if int(index.max()) >= len(old):
            got = f"class {int(index.max())} of {len(old)}"
            raise refuse("--head-map", got, "classes that the checkpoint has")
        mean = old[index[index >= 0]].mean(0, keepdim=True)
        mapped[key] = torch.cat([old, mean])[index]  # -1 is the last row
    return mapped


def start_from(
    model: nn.Module,
    family: Family,
    arch: Arch,
    ctx: Context,
    source: str,
    *,
    resize: str,
    head_map: Path | None,
) -> str:
    """Load a checkpoint (file, folder or timm tag) into `model`, in place; returns a note.

    Position tables of another image size are resized as `resize` names (`Family.resizes`); with
    other classes the head stays fresh, or is mapped. Another arch's weights: refused.
    """
    state = load_checkpoint(source, name="--init")
    made_in = checkpoint_context(family, arch, ctx, state, name="--init")
    changes = []
    if head_map is not None:
        rows = read_head_map(head_map, ctx.num_classes)
        state = map_head(state, head_keys(family, arch, made_in), rows)
        changes.append(f"{made_in.num_classes} classes mapped to {ctx.num_classes}")
        made_in = replace(made_in, num_classes=ctx.num_classes)
    elif made_in.num_classes != ctx.num_classes:
        changes.append(f"a new head ({made_in.num_classes} -> {ctx.num_classes} classes)")
    if made_in.img_size != ctx.img_size:
        changes.append(f"positions of {made_in.img_size} px resized to {ctx.img_size} px, {resize}")
    inherit(model, state, family.resized(arch, made_in, ctx, resize))
    return f"weights of {source}" + (f", {' and '.join(changes)}" if changes else "")


def head_keys(family: Family, arch: Arch, ctx: Context) -> list[str]:
    """Name the tensors that have a row for each class."""
    return [
        key
        for key, shape in _shapes(family, arch, replace(ctx, num_classes=2)).items()
        if shape != _shapes(family, arch, replace(ctx, num_classes=3))[key]
    ]


def _shapes(family: Family, arch: Arch, ctx: Context) -> Mapping[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in family.build(arch, ctx).state_dict().items()}
