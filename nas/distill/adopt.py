"""Weights that a user brings for the seed: in which context they were made, what carries over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from nas.training.weights import first_mismatch, load_checkpoint, save_weights
from space import Context
from space.errors import refuse
from space.family import Arch, Family

RESOLUTIONS = (224, 384, 512)
CLASS_COUNTS = (1000, 21841)
"""Contexts in which published weights come, tried after the run's own."""


def adopt(family: Family, arch: Arch, ctx: Context, source: str, out: Path) -> tuple[Context, str]:
    """Read a checkpoint or timm tag for `arch`, and keep it as `out` (safetensors).

    Returns the context it was built in and a note in words. Raises `InputError` in one line when
    the weights are of no context of this arch.
    """
    state = load_checkpoint(source, name="--seed-weights")
    made_in = _context_of(family, arch, ctx, state)
    save_weights(out, state)
    changes = []
    if made_in.num_classes != ctx.num_classes:
        changes.append(f"a new head ({made_in.num_classes} -> {ctx.num_classes} classes)")
    if made_in.img_size != ctx.img_size:
        changes.append(f"windows of {made_in.img_size} px carried over to {ctx.img_size} px")
    return made_in, f"weights of {source}" + (f", {' and '.join(changes)}" if changes else "")


def _candidates(ctx: Context) -> Iterator[Context]:
    sizes = dict.fromkeys((ctx.img_size, *RESOLUTIONS))
    classes = dict.fromkeys((ctx.num_classes, *CLASS_COUNTS))
    for count, size in product(classes, sizes):
        yield replace(ctx, img_size=size, num_classes=count)


def _context_of(
    family: Family, arch: Arch, ctx: Context, state: Mapping[str, torch.Tensor]
) -> Context:
    """Find the context whose network has exactly these tensors."""
    nearest = ""
    for candidate in _candidates(ctx):
        with torch.device("meta"):
            expected = family.build(arch, candidate).state_dict()
        mismatch = first_mismatch(expected, state)
        if not mismatch:
            return candidate
        nearest = nearest or mismatch
    raise refuse(
        "--seed-weights",
        nearest,
        f"weights of {family.label(arch)} at the data's classes, 1000 or 21841",
        "name a checkpoint of the --seed arch",
    )
