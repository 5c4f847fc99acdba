"""Statistics of rankings: rank agreement, noise ceiling, regret, and which archs may be best.

Losses throughout: lower is better. `truth` [s, n] holds one value per random seed and arch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from space.errors import refuse

Floats = npt.NDArray[np.float64]

COVERAGE = 0.95
"""Probability with which the intervals here enclose what they estimate."""
RESAMPLES = 2000
DRAWS = 20_000
"""Random draws behind a critical value: the second decimal of a quantile near 3 is sure."""


LEAST_RANKED = 8
"""Archs from which on a tau has an interval."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `n` archs; without an interval where they are too few to tell."""

    value: float
    lo: float | None
    hi: float | None
    n: int

    def text(self, form: str = ".2f") -> str:
        """Return `0.83 [0.61, 0.94]`, or `1.00 (3 archs: too few to tell)`."""
        if self.lo is None or self.hi is None:
            return f"{self.value:{form}} ({self.n} archs: too few to tell)"
        return f"{self.value:{form}} [{self.lo:{form}}, {self.hi:{form}}]"


@dataclass(frozen=True)
class Ceiling:
    """The tau that the noise of the truth permits; see `noise_ceiling`."""

    pairwise: Estimate
    perfect: Estimate


@dataclass(frozen=True)
class Regret:
    """The cost of trusting the scores, in units of the truth; see `regret`."""

    value: float
    lo: float
    hi: float
    seed_sd: float
    within_one_sd: bool


def kendall(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return Kendall's tau-b of two series [n]; NaN where one of them is constant."""
    from scipy.stats import kendalltau  # takes the better part of a second to import

    return float(kendalltau(np.asarray(a), np.asarray(b)).statistic)


def kendall_interval(
    scores: npt.ArrayLike, truth: npt.ArrayLike, *, resamples: int = RESAMPLES, random_seed: int
) -> Estimate:
    """Return tau-b of scores [n] with the mean of the truth [s, n] over its random seeds.

    What is estimated is the tau that archs of this kind would show, given a truth of s random seeds each. Interval:
    percentile bootstrap. An arch is drawn together with all its random seeds, so the noise of the truth is in the
    spread already; drawing random seeds once more within the arch would count it twice, and lower every tau besides
    (Davison and Hinkley, Bootstrap Methods, 1997, 3.8: of nested data, resample the outer level only). An arch that is
    drawn c times does not tie with itself: only pairs of distinct archs count, c_i c_j times each. Archs that all agree
    agree in every resample too: there the interval ends where that of Bonett and Wright (Psychometrika 65, 2000) does
    for one pair of archs that disagrees. Fewer than 8 archs have no interval. Raises InputError.
    """
    given, true = _scores_and_truth(scores, truth)
    taus = resampled(given, true.mean(axis=0), resamples, random_seed)
    return _percentiles(kendall(given, true.mean(axis=0)), taus, len(given))


def resampled(a: npt.ArrayLike, b: npt.ArrayLike, resamples: int, random_seed: int) -> Floats:
    """Return tau-b of two series [n] on bootstrapped archs [resamples]; NaN where all tie.

    Only pairs of distinct archs count, as in `kendall_interval`. Equal random seeds draw the same archs, so differences
    of two such results are paired.
    """
    left, right = (_signs(np.asarray(x, dtype=np.float64)) for x in (a, b))
    return _resampled(left * right, np.abs(left), np.abs(right), resamples, random_seed)


def noise_ceiling(truth: npt.ArrayLike, *, resamples: int = RESAMPLES, random_seed: int = 0) -> Ceiling:
    """Return what tau the truth's own noise permits, from truth [s, n], s >= 2.

    `pairwise`: truth against truth, the mean tau over pairs of single random seeds; what a proxy reaches that is as
    good as one more training. Interval as in `kendall_interval`.

    `perfect`: what the noise-free truth would reach against the mean of the s random seeds; the tau to hold a proxy's
    against. Archs and noise are taken for normal. With the mean squares of a two-way analysis of variance (what a
    random seed adds to all archs alike changes no order), the mean over s has the reliability R = 1 - MS_noise /
    MS_archs, the correlation of the noise-free truth with it is sqrt(R), and tau = 2/pi asin(sqrt(R)) (Kruskal, JASA
    53, 1958). The interval follows from F (Shrout and Fleiss, Psychological Bulletin 86, 1979, ICC(3,k)). An
    expectation: over few archs the tau of a perfect proxy itself scatters about it. Raises InputError.
    """
    true = _truth(truth, at_least=2)
    s, n = true.shape
    signs = [_signs(row) for row in true]
    pairs = list(itertools.combinations(range(s), 2))
    taus = [kendall(true[i], true[j]) for i, j in pairs]
    drawn = [
        _resampled(signs[i] * signs[j], np.abs(signs[i]), np.abs(signs[j]), resamples, random_seed) for i, j in pairs
    ]
    pairwise = _percentiles(float(np.mean(taus)), np.mean(drawn, axis=0), n)
    noise, between = _mean_squares(true)
    ratio = between / noise if noise > 0 else math.inf
    tail = (1 - COVERAGE) / 2
    dof = (n - 1, (s - 1) * (n - 1))
    from scipy import special  # takes a third of a second to import

    low, high = (ratio / float(special.fdtri(*dof, q)) for q in (1 - tail, tail))
    return Ceiling(pairwise, Estimate(_tau_of(ratio), _tau_of(low), _tau_of(high), n))


def regret(scores: npt.ArrayLike, truth: npt.ArrayLike, *, random_seed: int = 0) -> Regret:
    """Return how much worse the arch of the lowest score [n] is than the best, by truth [s, n].

    The lowest of noisy means is lower than what that arch is worth (the winner's curse), so the best is chosen on all
    random seeds but one and compared with the pick on that one, for each of them in turn; `value` is the mean of these
    s differences, held inside the interval. Some of the choices are not the best arch: `value` errs a little low.

    Interval: regret is max(0, max over rivals of pick - rival); all these differences are enclosed at once (Dunnett's
    two-sided bands), hence their maximum (Hsu, Annals of Statistics 9, 1981). Covers with at least 95 %, more where
    several archs are near the best. `seed_sd` is the standard deviation of one arch's truth over random seeds, pooled
    over archs; `within_one_sd` tells whether `value` is no larger. Archs are taken for given, s >= 2. Raises
    InputError.
    """
    given, true = _scores_and_truth(scores, truth, at_least=2)
    s, n = true.shape
    means, pick = true.mean(axis=0), int(np.argmin(given))
    held_out = []
    for k in range(s):
        chosen = int(np.argmin(np.delete(true, k, axis=0).mean(axis=0)))
        held_out.append(true[k, pick] - true[k, chosen])
    seed_sd = math.sqrt(_mean_squares(true)[0])
    reach = _dunnett(n - 1, (s - 1) * (n - 1), random_seed) * seed_sd * math.sqrt(2 / s)
    furthest = float(means[pick] - np.delete(means, pick).min())
    lo, hi = max(0.0, furthest - reach), max(0.0, furthest + reach)
    value = float(min(hi, max(lo, np.mean(held_out))))
    return Regret(value, lo, hi, seed_sd, value <= seed_sd)


def tied_with_best(losses: Mapping[str, npt.ArrayLike]) -> tuple[str, ...]:
    """Return the archs that cannot be told apart from the best, by mean loss, best first.

    `losses`: per arch [s, images] (or [images]), the same images in the same order for all. The best arch is among them
    with 95 %: an arch is left out when a one-sided test against the best-looking one says that it is worse at the
    level 5 % / (n - 1), so that the true best would have to lose to one of its n - 1 rivals by chance
    (Bonferroni). The variance of a difference is that over images, paired and averaged over random seeds, and that of
    the random seeds, pooled over all archs (two or three say too little of one pair); what both contain is counted
    once. Degrees of freedom: Satterthwaite. With one random seed only the images speak. An arch with losses that are
    not finite is left out. Raises InputError.
    """
    table = {key: _per_image(key, value) for key, value in losses.items()}
    if len({values.shape for values in table.values()}) > 1:
        shapes = ", ".join(sorted({str(v.shape) for v in table.values()}))
        raise refuse("losses", shapes, "the same random seeds and images for every arch")
    order = _by_mean(table)
    if len(order) < 2:
        return tuple(order)
    s, images = table[order[0]].shape
    if images < 2:
        return tuple(order)
    seed_means = np.array([table[key].mean(axis=1) for key in order]).T  # [s, n]
    seed_variance = 2 * _mean_squares(seed_means)[0] / s if s > 1 else 0.0
    seed_dof = (s - 1) * (len(order) - 1)
    kept = [order[0]]
    for key in order[1:]:
        difference = table[key] - table[order[0]]
        over_images = difference.mean(axis=0)
        image_variance = float(over_images.var(ddof=1)) / images
        shared = _mean_squares(difference)[0] / (s * images) if s > 1 else 0.0
        own = max(0.0, seed_variance - shared)
        mean = float(over_images.mean())
        p = _p_above(mean, image_variance, images - 1, own, seed_dof)
        if p > (1 - COVERAGE) / (len(order) - 1):
            kept.append(key)
    return tuple(kept)


def describe_tied(kept: Sequence[str], losses: Mapping[str, npt.ArrayLike]) -> str:
    """Return the result of `tied_with_best` among these losses in one sentence."""
    table = {key: _per_image(key, value) for key, value in losses.items()}
    n, (s, images) = len(table), next(iter(table.values())).shape
    by = f"by {s} random seed{'s' if s > 1 else ''} x {images:,} images"
    if len(kept) == 1:
        return f"the first of {n} is better than the others, {by}"
    if len(kept) == n:
        return f"the {n} cannot be told apart {by}"
    if list(kept) == _by_mean(table)[: len(kept)]:
        return f"the first {len(kept)} of {n} cannot be told apart {by}"
    return f"{len(kept)} of {n} cannot be told apart from the best {by}"


def _p_above(mean: float, images: float, images_dof: int, seeds: float, seeds_dof: int) -> float:
    """One-sided p of a mean whose variance is the sum of two estimated ones."""
    variance = images + seeds
    if variance == 0:
        return 0.0 if mean > 0 else 1.0
    spread = images**2 / images_dof + (seeds**2 / seeds_dof if seeds > 0 else 0.0)
    from scipy import special  # takes a third of a second to import

    return float(special.stdtr(variance**2 / spread, -mean / math.sqrt(variance)))


def _mean_squares(table: Floats) -> tuple[float, float]:
    """Mean squares of [s, n], s >= 2: of what neither rows nor columns explain, of columns."""
    s, n = table.shape
    columns, rows = table.mean(axis=0), table.mean(axis=1)
    rest = table - columns[None, :] - rows[:, None] + table.mean()
    residual = float((rest**2).sum()) / ((s - 1) * (n - 1))
    return residual, s * float(columns.var(ddof=1))


def _tau_of(ratio: float) -> float:
    """Return the tau of noise-free values with values of F ratio MS_between / MS_noise."""
    return 2 / math.pi * math.asin(math.sqrt(max(0.0, 1 - 1 / ratio))) if ratio > 0 else 0.0


def _dunnett(rivals: int, dof: int, random_seed: int) -> float:
    """Return the two-sided critical value of `rivals` comparisons with one, by simulation."""
    rng = np.random.default_rng(random_seed)
    own = rng.standard_normal(DRAWS)
    largest = np.zeros(DRAWS)
    for _ in range(rivals):
        np.maximum(largest, np.abs(rng.standard_normal(DRAWS) - own), out=largest)
    scale = np.sqrt(rng.chisquare(dof, DRAWS) / dof)
    return float(np.quantile(largest / math.sqrt(2) / scale, COVERAGE))


def _signs(values: Floats) -> Floats:
    """Order of all pairs, [n, n] of -1, 0, 1; by comparison, as infinities have an order."""
    above = values[:, None] > values[None, :]
    return above.astype(np.float64) - above.T


def _resampled(product: Floats, a: Floats, b: Floats, resamples: int, random_seed: int) -> Floats:
    """Tau-b of bootstrapped archs, from the signs of pairs; NaN where all drawn ones tie."""
    n = len(product)
    rng = np.random.default_rng(random_seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)

    def total(pairs: Floats) -> Floats:
        return np.asarray(((drawn @ pairs) * drawn).sum(axis=1), dtype=np.float64)

    with np.errstate(invalid="ignore"):
        return np.asarray(total(product) / np.sqrt(total(a) * total(b)), dtype=np.float64)


def _percentiles(value: float, drawn: Floats, n: int) -> Estimate:
    if n < LEAST_RANKED:
        return Estimate(value, None, None, n)
    if abs(value) > 1 - 1e-9:
        nearly = math.atanh(1 - 4 / (n * (n - 1)))
        least = math.tanh(nearly - 1.96 * math.sqrt(0.437 / (n - 4)))
        return Estimate(value, *((least, value) if value > 0 else (value, -least)), n)
    kept = drawn[np.isfinite(drawn)]
    if not len(kept):
        return Estimate(value, -1.0, 1.0, n)
    tail = 50 * (1 - COVERAGE)
    lo, hi = (float(v) for v in np.percentile(kept, [tail, 100 - tail]))
    return Estimate(value, min(lo, value), max(hi, value), n)


def _truth(truth: npt.ArrayLike, at_least: int = 1) -> Floats:
    found = np.atleast_2d(np.asarray(truth, dtype=np.float64))
    if found.ndim != 2 or not np.isfinite(found).all():
        raise refuse("truth", f"shape {found.shape}", "finite numbers, [random seeds, archs]")
    if len(found) < at_least:
        raise refuse("truth", f"{len(found)} random seed", f"at least {at_least}", "train more")
    if found.shape[1] < 3:
        raise refuse("truth", f"{found.shape[1]} archs", "at least 3")
    return found


def _scores_and_truth(scores: npt.ArrayLike, truth: npt.ArrayLike, at_least: int = 1) -> tuple[Floats, Floats]:
    true, given = _truth(truth, at_least), np.asarray(scores, dtype=np.float64)
    if given.shape != true.shape[1:] or np.isnan(given).any():
        raise refuse("scores", f"shape {given.shape}", f"{true.shape[1]} numbers, one per arch")
    return given, true


def _per_image(key: str, values: Any) -> Floats:
    found = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if found.ndim != 2 or not found.size:
        raise refuse(f"losses of {key}", f"shape {found.shape}", "[random seeds, images]")
    return found


def _by_mean(table: Mapping[str, Floats]) -> list[str]:
    means = {key: float(values.mean()) for key, values in table.items()}
    return sorted((k for k in means if math.isfinite(means[k])), key=lambda k: (means[k], k))
