"""Intervals of timings: over visits (fresh processes), and of quantiles; standard library only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Verdict = Literal["pass", "fail", "undecided"]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
"""The reported latencies, by name."""

MIN_BLOCKS = 6
"""Fewest blocks of which the extremes enclose the median with 95 %: 1 - 2 * 0.5**6 = 0.969."""

MIN_VISITS = 4
"""Fewest visits (fresh processes) of which an interval is taken; one process tells nothing of the next."""

COVERAGE = 0.95
"""Least probability with which an interval encloses the true value, over all its looks."""


@dataclass(frozen=True)
class Interval:
    """The middle of a sample (or another quantile) with its interval.

    `coverage` is the probability with which the interval encloses it, given independent values.
    """

    median: float
    lo: float
    hi: float
    coverage: float


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


def quantile_interval(values: Sequence[float], q: float = 0.5, coverage: float = COVERAGE) -> Interval:
    """Enclose a quantile of the values' distribution by two of the order statistics.

    The i-th and j-th smallest of n independent values enclose the q-quantile with probability P(i <= Binomial(n, q) <
    j), whatever the distribution; the narrowest with at most half the missing probability on either side is taken, or
    the extremes where none reaches `coverage` (the result's own `coverage` is then less). Source: David and Nagaraja,
    Order Statistics, 7.1.
    """
    assert values, "no values"
    ordered, n = sorted(values), len(values)
    below = _tails(n, q)
    allowed = (1.0 - coverage) / 2.0 + 1e-12
    # i, j count from 1; i = 0 or j = n + 1 would mean "no bound", which the extremes stand for.
    i = max((k + 1 for k in range(n) if below[k] <= allowed), default=0)
    j = min((k + 1 for k in range(n + 1) if 1.0 - below[k] <= allowed), default=n + 1)
    missed_low = below[i - 1] if i >= 1 else below[0]
    missed_high = 1.0 - below[j - 1] if j <= n else 1.0 - below[n - 1]
    i, j = max(i, 1), min(j, n)
    return Interval(quantile(values, q), ordered[i - 1], ordered[j - 1], max(0.0, 1.0 - missed_low - missed_high))


def median_interval(values: Sequence[float], coverage: float = COVERAGE) -> Interval:
    """Enclose the median of the values' distribution; see `quantile_interval`."""
    return quantile_interval(values, 0.5, coverage)


def visit_interval(values: Sequence[float], coverage: float = COVERAGE) -> Interval:
    """Enclose the value that further visits would find, from one positive value of each visit, in time order.

    Student's t interval of the mean logarithm, widened where neighbouring visits resemble each other: their lag-1
    autocorrelation, raised by 2/n + 0.2 as few visits show too little of it, is taken as that of a first-order
    autoregressive series. `python -m benchmarks.timing coverage` simulates its coverage. At least `MIN_VISITS` values.
    """
    n = len(values)
    assert n >= MIN_VISITS, f"{n} visits"
    logs = [math.log(value) for value in values]
    middle = math.fsum(logs) / n
    rest = [value - middle for value in logs]
    power = math.fsum(r * r for r in rest)
    half = 0.0
    if power > 0.0:
        lag = math.fsum(a * b for a, b in itertools.pairwise(rest)) / power
        half = t_quantile(0.5 + coverage / 2.0, n - 1) * math.sqrt(
            power / (n - 1) / n * _inflation(lag + 2 / n + 0.2, n)
        )
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), coverage)


def _inflation(correlation: float, n: int) -> float:
    """Return by how much the squared error of a mean, estimated from the spread, is too small (1 at least)."""
    r = min(max(correlation, 0.0), 0.97)
    of_mean = 1.0 + 2.0 * math.fsum((1.0 - k / n) * r**k for k in range(1, n))
    return max(1.0, of_mean * (1.0 - 1.0 / n) / (1.0 - of_mean / n))


@lru_cache(maxsize=256)
def t_quantile(p: float, df: int) -> float:
    """Return the p-quantile (p in (0.5, 1)) of Student's t distribution with an integer number of degrees of freedom.

    By bisection of the distribution function's closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    lo, hi = 0.0, 1e6
    for _ in range(200):
        middle = (lo + hi) / 2.0
        lo, hi = (lo, middle) if 0.5 + _t_mass(middle, df) / 2.0 > p else (middle, hi)
    return hi


def _t_mass(t: float, df: int) -> float:
    """Return the probability that |T| stays below t."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = 1.0 if df % 2 == 0 else cosine
    total = term if df > 1 else 0.0
    for k in range(2 if df % 2 else 1, df - 1, 2):
        term *= cosine**2 * k / (k + 1)
        total += term
    return sine * total if df % 2 == 0 else 2.0 / math.pi * (angle + sine * total)


def planned_looks(visits: int, max_visits: int) -> list[int]:
    """List the counts of visits at which a measurement looks for a decision: doubling up to the maximum."""
    looks = [visits]
    while looks[-1] < max_visits:
        looks.append(min(2 * looks[-1], max_visits))
    return looks


def verdict(lo: float, hi: float, at_least: float) -> Verdict:
    """Compare an interval with a bound: pass when all of it meets the bound, fail when none."""
    if lo >= at_least:
        return "pass"
    return "fail" if hi < at_least else "undecided"
