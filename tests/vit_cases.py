"""Random ViTs and contexts for the tests of `space.vit`: on the grid and far off it."""

from __future__ import annotations

import random
from typing import Any

from space_cases import on_meta

from space import Context, get_family
from space.family import Arch
from space.vit import VitArch

FAMILY = get_family("vit")
SMALL: dict[str, Any] = {
    "embed_dim": 64,
    "depth": 3,
    "head_dim": 16,
    "mlp_ratio": 3.0,
    "patch_size": 16,
    "dist_token": False,
}
CTX = Context(48, 5)


def small(**changes: object) -> Arch:
    return FAMILY.arch({**SMALL, **changes})


def random_arch(rng: random.Random, most: int = 256) -> VitArch:
    """Draw any legal arch: odd head dims and patches, broken ratios."""
    head_dim = rng.choice([1, 3, 8, 16, 20, 32, 48, 64])
    arch = FAMILY.arch(
        {
            "embed_dim": head_dim * rng.randint(1, max(1, most // head_dim)),
            "depth": rng.randint(1, 4),
            "head_dim": head_dim,
            "mlp_ratio": rng.choice([rng.randint(1, 6), rng.uniform(1.0, 6.0)]),
            "patch_size": rng.choice([4, 5, 7, 8, 14, 16, 32]),
            "dist_token": rng.random() < 0.5,
        }
    )
    assert isinstance(arch, VitArch)
    return arch


def random_context(rng: random.Random, arch: VitArch) -> Context:
    """Draw a context that the patches fill."""
    patch = arch.patch_size
    side = patch * rng.randint(-(-16 // patch), max(-(-16 // patch), 96 // patch))
    return Context(side, rng.choice([1, 2, 10, rng.randint(1, 1000)]), rng.choice([1, 3, 4]))


def meta_build(arch: Arch, ctx: Context) -> Any:
    """Build an arch without memory for its weights."""
    with on_meta():
        return FAMILY.build(arch, ctx).eval()
