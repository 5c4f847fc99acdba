"""Distribution-free intervals of series that may drift; standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Verdict = Literal["pass", "fail", "undecided"]

MIN_BLOCKS = 6
"""Fewest blocks of which the extremes enclose the median with 95 %: 1 - 2 * 0.5**6 = 0.969."""

COVERAGE = 0.95
"""Least probability with which an interval encloses the true value, over all its looks."""


@dataclass(frozen=True)
class Interval:
    """A quantile of a sample (the median, mostly) with a distribution-free interval.

    `coverage` is the probability with which the interval encloses it, given `count` independent values: the length of
    the series, or less where neighbours resemble each other.
    """

    median: float
    lo: float
    hi: float
    coverage: float
    count: float


def effective_count(values: Sequence[float], q: float = 0.5) -> float:
    """Return how many independent values a series in time order is worth for its quantile.

    On a machine that drifts neighbouring values are alike, and n of them tell less than n independent ones. The
    variance of the share of values below the quantile grows by 1 + 2 sum (1 - k/n) r_k, r_k the autocorrelation of
    "below or not" at distance k, summed while neighbouring pairs of terms stay positive (Geyer, "Practical Markov Chain
    Monte Carlo", 1992) and no further than n/3. Never more than n: what alternates is not taken for knowledge.
    """
    n = len(values)
    if n < 4:
        return float(n)
    middle = quantile(values, q)
    signs = [(value > middle) - (value < middle) for value in values]
    mean = sum(signs) / n
    centred = [sign - mean for sign in signs]
    power = sum(c * c for c in centred)
    if power == 0.0:  # all values equal: nothing to tell apart
        return float(n)

    def correlation(k: int) -> float:
        # Divided by the number of terms, and freed of the bias that the estimated mean brings in.
        product = sum(a * b for a, b in zip(centred, centred[k:], strict=False))
        return min(1.0, product / power * n / (n - k) + 1.0 / n)

    inflation, k, furthest = 1.0, 1, max(1, n // 3)
    while k <= furthest:
        pair = [(1.0 - j / n) * correlation(j) for j in (k, k + 1) if j <= furthest]
        if sum(pair) <= 0.0:
            break
        inflation += 2.0 * sum(pair)
        k += 2
    return n / max(1.0, inflation)


def quantile(values: Sequence[float], q: float) -> float:
    """Return the quantile by linear interpolation; that of 1/2 is the usual median."""
    assert values, "no values"
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@lru_cache(maxsize=4096)
def _tails(n: int, q: float) -> tuple[float, ...]:
    """Return P(Binomial(n, q) <= k) for k = 0 .. n; by logarithms, as thousands of values would overflow."""
    total, sums = 0.0, []
    for k in range(n + 1):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(ways + k * math.log(q) + (n - k) * math.log(1.0 - q))
        sums.append(min(1.0, total))
    return tuple(sums)


def quantile_interval(
    values: Sequence[float], q: float = 0.5, coverage: float = COVERAGE, *, drift: bool = False
) -> Interval:
    """Enclose a quantile of the values' distribution by two of the order statistics.

    The i-th and j-th smallest of n independent values enclose the q-quantile with probability P(i <= Binomial(n, q) <
    j), whatever the distribution; the narrowest with at most half the missing probability on either side is taken, or
    the extremes where none reaches `coverage` (the result's own `coverage` is then less). Source: David and Nagaraja,
    Order Statistics, 7.1.

    With `drift`, the values are a series in time and n is its `effective_count`: the same ranks, as shares of the
    sample, are taken outwards.
    """
    assert values, "no values"
    ordered, n = sorted(values), len(values)
    count = effective_count(values, q) if drift else float(n)
    used = max(1, math.floor(count))
    below = _tails(used, q)
    allowed = (1.0 - coverage) / 2.0 + 1e-12
    # i, j count from 1; i = 0 or j = used + 1 would mean "no bound", which the extremes stand for.
    i = max((k + 1 for k in range(used) if below[k] <= allowed), default=0)
    j = min((k + 1 for k in range(used + 1) if 1.0 - below[k] <= allowed), default=used + 1)
    missed_low = below[i - 1] if i >= 1 else below[0]
    missed_high = 1.0 - below[j - 1] if j <= used else 1.0 - below[used - 1]
    i, j = max(i, 1), min(j, used)
    low = max(1, math.floor(i * n / used)) if used == n else max(1, math.floor((i - 0.5) / used * n))
    high = min(n, math.ceil(j * n / used)) if used == n else min(n, math.ceil((j - 0.5) / used * n) + 1)
    reached = max(0.0, 1.0 - missed_low - missed_high)
    return Interval(quantile(values, q), ordered[low - 1], ordered[high - 1], reached, count)


def median_interval(values: Sequence[float], coverage: float = COVERAGE, *, drift: bool = False) -> Interval:
    """Enclose the median of the values' distribution; see `quantile_interval`."""
    return quantile_interval(values, 0.5, coverage, drift=drift)


def verdict(lo: float, hi: float, at_least: float) -> Verdict:
    """Compare an interval with a bound: pass when all of it meets the bound, fail when none."""
    if lo >= at_least:
        return "pass"
    return "fail" if hi < at_least else "undecided"
