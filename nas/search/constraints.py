"""The bounds of a contraction, and how they tighten from the seed to the target."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nas.config import NO_SLOWER_SLACK, RunConfig
from space.neighbours import Band


@dataclass(frozen=True)
class StepBounds:
    """What a candidate of one step must meet.

    `band` is inclusive, in parameters as built. `ratio` is the least throughput relative to the
    seed, `images_per_s` the least throughput; `None` where the run has no such constraint.
    `follows_parent` says that `ratio` comes from the parent's own measurement (2 % slack).
    """

    step: int
    band: Band
    ratio: float | None
    images_per_s: float | None
    follows_parent: bool


def band_at(seed_params: int, config: RunConfig, step: int) -> Band:
    """Return the parameter band of a step: geometric from the seed's size to the target.

    The last step's band is the target's own, `target * (1 -+ tolerance)`.
    """
    share = step / config.steps
    centre = seed_params * (config.target_params / seed_params) ** share
    if step == config.steps:
        centre = float(config.target_params)
    tolerance = config.params_tolerance
    # A hair of slack, so that float rounding never excludes the bound the user asked for.
    lo = math.ceil(centre * (1 - tolerance) - 1e-6)
    return Band(lo=max(1, lo), hi=math.floor(centre * (1 + tolerance) + 1e-6))


def bounds_at(
    step: int,
    config: RunConfig,
    *,
    seed_params: int,
    seed_images_per_s: float,
    parent_ratio: float,
) -> StepBounds:
    """Return the bounds of a step. All constraints hold together and tighten geometrically."""
    share = step / config.steps
    ratio: float | None = None
    images_per_s: float | None = None
    if config.min_speedup is not None:
        ratio = config.min_speedup**share
    if config.min_throughput is not None:
        start = min(seed_images_per_s, config.min_throughput)
        images_per_s = start * (config.min_throughput / start) ** share
    follows = ratio is None and images_per_s is None
    if follows:
        ratio = parent_ratio * (1 - NO_SLOWER_SLACK)
    return StepBounds(step, band_at(seed_params, config, step), ratio, images_per_s, follows)
