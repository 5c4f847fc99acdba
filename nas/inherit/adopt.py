"""Weights that a user brings for the seed: in which context they were made, what carries over."""

from __future__ import annotations

from pathlib import Path

from nas.export.load import load_checkpoint
from nas.export.weights import save_weights
from nas.inherit.slice import checkpoint_context
from space import Context
from space.family import Arch, Family


def adopt(family: Family, arch: Arch, ctx: Context, source: str, out: Path) -> tuple[Context, str]:
    """Read a checkpoint or timm tag for `arch`, and keep it as `out` (safetensors).

    Returns the context it was built in and a note in words. Raises `InputError` in one line when
    the weights are of no context of this arch.
    """
    state = load_checkpoint(source, name="--seed-weights")
    made_in = checkpoint_context(family, arch, ctx, state, name="--seed-weights")
    save_weights(out, state)
    changes = []
    if made_in.num_classes != ctx.num_classes:
        changes.append(f"a new head ({made_in.num_classes} -> {ctx.num_classes} classes)")
    if made_in.img_size != ctx.img_size:
        changes.append(f"windows of {made_in.img_size} px carried over to {ctx.img_size} px")
    return made_in, f"weights of {source}" + (f", {' and '.join(changes)}" if changes else "")
