"""Paired comparison of two archs over test images and random seeds: difference, bounds, verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from space.errors import refuse

ONE_SIDED, TWO_SIDED = 0.95, 0.975
"""Quantiles of the one-sided 95 % bound and of the two-sided 95 % interval."""
POWER = 0.8
"""Probability with which a difference of `detectable` would have excluded 0."""
MARGIN = 0.015
"""Difference in top-1 that "not worse" allows for."""


@dataclass(frozen=True)
class Paired:
    """Difference of two archs in a mean over images: `value`, its two-sided 95 % interval, and
    `lower`, its one-sided 95 % bound.

    `image_se` and `seed_se` are the parts of the standard error that images and random seeds bring;
    `detectable` is the smallest true difference that would have excluded 0 with 80 % power.
    """

    value: float
    lo: float
    hi: float
    lower: float
    image_se: float
    seed_se: float
    detectable: float
    seeds: int
    images: int


def paired_interval(a: npt.ArrayLike, b: npt.ArrayLike) -> Paired:
    """Compare two archs by [random seeds, images] of correctness or loss, paired in both.

    Images and random seeds are crossed random effects. The image part V_I is the variance of the
    per-image differences averaged over seeds, by the images; the seed part V_S that of the seeds'
    mean differences, by the seeds, less what single images explain of it (both parts contain
    that). With three seeds V_S has two degrees of freedom, so each part gets its own t quantile:
    half width = sqrt(t_I^2 V_I + t_S^2 V_S) (Howe, JASA 69, 1974). Coverage by simulation with
    3 seeds: 94.4-96.6 % for every mix of the parts, where Satterthwaite's degrees of freedom fall
    to 90.5 %. With one random seed only the images speak. Raises InputError.
    """
    left, right = (np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in (a, b))
    if left.shape != right.shape or left.ndim != 2 or left.shape[1] < 2:
        got = f"shapes {left.shape} and {right.shape}"
        raise refuse("paired", got, "[random seeds, images] of one shape, 2 images or more")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise refuse("paired", "values that are not finite", "finite numbers")
    difference = left - right
    seeds, images = difference.shape
    value = float(difference.mean())
    by_image, by_seed = difference.mean(axis=0), difference.mean(axis=1)
    image_part = float(by_image.var(ddof=1)) / images
    seed_part = 0.0
    if seeds > 1:
        rest = difference - by_image[None, :] - by_seed[:, None] + value
        residual = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
        seed_part = max(0.0, float(by_seed.var(ddof=1)) / seeds - residual / (seeds * images))

    def half(quantile: float) -> float:
        of_images = float(special.stdtrit(images - 1, quantile))
        of_seeds = float(special.stdtrit(seeds - 1, quantile)) if seeds > 1 else 0.0
        return math.sqrt(of_images**2 * image_part + of_seeds**2 * seed_part)

    interval = half(TWO_SIDED)
    seen = interval + float(special.ndtri(POWER)) * math.sqrt(image_part + seed_part)
    return Paired(
        value,
        value - interval,
        value + interval,
        value - half(ONE_SIDED),
        math.sqrt(image_part),
        math.sqrt(seed_part),
        seen,
        seeds,
        images,
    )


def verdict(found: Paired, *, tie: bool = False, margin: float = MARGIN) -> str:
    """Say what a difference (higher is better) shows; `tie`: the two are one and the same arch.

    "better" and "worse" only when the two-sided interval excludes 0.
    """
    if tie:
        return "tie: the same arch"
    if found.lo > 0:
        return "better"
    if found.hi < 0:
        inside = " (by less than the margin)" if found.lower > -margin else ""
        return f"worse{inside}"
    points = f"{100 * margin:g} points"
    if found.lower > -margin:
        return f"not worse by {points}"
    return f"undecided: may be worse by {points}"
