"""Intervals cover as stated: over distributions, quantiles, visits, several looks, and drift."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.timing.simulate import simulate
from nas.measure.intervals import (
    MIN_BLOCKS,
    MIN_VISITS,
    median_interval,
    planned_looks,
    quantile,
    quantile_interval,
    t_quantile,
    verdict,
    visit_interval,
)

LAW = settings(derandomize=True, deadline=None, max_examples=60)
VALUES = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=60)
QUANTILES = st.sampled_from([0.5, 0.9, 0.99])


@pytest.mark.parametrize("n", [MIN_BLOCKS, 7, 12, 25, 48])
def test_interval_coverage_by_simulation(n: int) -> None:
    """The stated coverage is the true one, whatever the distribution; 6 blocks reach 95 %."""
    rng = random.Random(n)
    stated = median_interval(range(n)).coverage
    assert stated >= 0.95
    found = [median_interval([rng.lognormvariate(0, 1.5) for _ in range(n)]) for _ in range(2000)]
    assert np.mean([f.lo <= 1.0 <= f.hi for f in found]) == pytest.approx(stated, abs=0.02)


def test_fewer_blocks_state_the_coverage_that_extremes_have() -> None:
    for n in range(1, MIN_BLOCKS + 1):
        assert median_interval(range(n)).coverage == pytest.approx(1 - 2 * 0.5**n)


@pytest.mark.parametrize(("n", "q"), [*((n, q) for n in (12, 30, 60, 400) for q in (0.5, 0.9)), (2000, 0.99)])
def test_ranks_are_those_of_the_binomial(n: int, q: float) -> None:
    """Order statistics i and j enclose with P(i <= Bin(n, q) < j); scipy gives the same ranks."""
    from scipy.stats import binom

    found = quantile_interval(range(1, n + 1), q)
    i, j = int(found.lo), int(found.hi)
    tail = 0.025
    assert i == 1 or binom.cdf(i - 1, n, q) <= tail + 1e-9
    assert binom.cdf(i, n, q) > tail - 1e-9, "one further in would miss too often"
    assert j == n or binom.sf(j - 1, n, q) <= tail + 1e-9
    # A bound that no value of the sample gives is stood for by an extreme, and is not claimed.
    capped_low, capped_high = binom.cdf(0, n, q) > tail, binom.sf(n - 1, n, q) > tail
    claimed = binom.cdf(j - 1, n, q) - binom.cdf(i - 1, n, q)
    assert found.coverage == pytest.approx(claimed, abs=1e-9)
    assert capped_low or capped_high or found.coverage >= 0.95 - 1e-9


@pytest.mark.parametrize(("q", "n"), [(0.9, 60), (0.9, 200), (0.99, 700)])
def test_quantile_coverage_by_simulation(q: float, n: int) -> None:
    rng = np.random.default_rng(3)
    truth = -np.log(1.0 - q)  # of the exponential distribution
    found = [quantile_interval(row, q) for row in rng.exponential(size=(800, n)).tolist()]
    hits = np.mean([f.lo <= truth <= f.hi for f in found])
    assert found[0].coverage >= 0.95
    assert hits == pytest.approx(found[0].coverage, abs=0.02)


@given(VALUES, QUANTILES, st.randoms(use_true_random=False))
@LAW
def test_an_interval_is_of_the_sample(values: list[float], q: float, rng: random.Random) -> None:
    found = quantile_interval(values, q)
    assert min(values) <= found.lo <= found.hi <= max(values)
    assert min(values) <= found.median <= max(values)
    assert {found.lo, found.hi} <= set(values)
    assert 0.0 <= found.coverage <= 1.0
    shuffled = list(values)
    rng.shuffle(shuffled)
    assert quantile_interval(shuffled, q) == found
    middle = median_interval(values)
    assert middle.lo <= middle.median <= middle.hi


# Intervals over visits.


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 15, 30])
def test_students_quantiles_are_scipys(df: int) -> None:
    from scipy.stats import t

    for p in (0.6, 0.9, 0.975, 0.9875, 0.999):
        assert t_quantile(p, df) == pytest.approx(t.ppf(p, df), rel=1e-8)


@given(st.lists(st.floats(0.5, 2.0), min_size=MIN_VISITS, max_size=20), st.floats(0.1, 100.0))
@LAW
def test_a_visit_interval_scales_and_encloses_students(values: list[float], factor: float) -> None:
    """Units do not matter, the middle is the geometric mean, and resemblance only widens."""
    from scipy.stats import t

    found = visit_interval(values)
    scaled = visit_interval([factor * value for value in values])
    assert [scaled.lo, scaled.median, scaled.hi] == pytest.approx(
        [factor * v for v in (found.lo, found.median, found.hi)]
    )
    logs = np.log(values)
    assert found.median == pytest.approx(np.exp(logs.mean()))
    half = t.ppf(0.975, len(values) - 1) * logs.std(ddof=1) / np.sqrt(len(values))
    assert np.log(found.hi / found.median) >= half * (1 - 1e-6) - 1e-12
    assert found.lo * found.hi == pytest.approx(found.median**2)


@pytest.mark.parametrize("noise", ["blocks 0.9", "blocks two-state", "walk 0.25", "walk 1", "visits 0.0", "visits 0.5"])
@pytest.mark.parametrize(("visits", "most"), [(MIN_VISITS, MIN_VISITS), (MIN_VISITS, 8)])
def test_all_looks_together_keep_their_coverage(noise: str, visits: int, most: int) -> None:
    """From the fewest visits on: 93 % at least, whatever blocks do in visits, and where visits drift or resemble."""
    (row,) = simulate(visits, most, 1500, 1, [noise])
    assert row["coverage"] >= 0.93
    assert row["wrong"] <= 0.07, "a bound at the truth is decided by chance only"


@given(st.integers(4, 60), st.integers(0, 200))
@LAW
def test_looks_double_up_to_the_maximum(visits: int, more: int) -> None:
    looks = planned_looks(visits, visits + more)
    assert (looks[0], looks[-1]) == (visits, visits + more)
    assert all(b == min(2 * a, visits + more) for a, b in itertools.pairwise(looks))


@given(VALUES, st.floats(0.5, 0.95), st.floats(0.95, 0.9999))
@LAW
def test_more_coverage_is_never_narrower(values: list[float], less: float, more: float) -> None:
    narrow, wide = median_interval(values, less), median_interval(values, more)
    assert wide.lo <= narrow.lo
    assert wide.hi >= narrow.hi


@given(VALUES, st.floats(0.0, 1.0))
@LAW
def test_quantile_is_numpys(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9)


@given(st.floats(0.1, 10), st.floats(0, 5), st.floats(0.1, 20))
@LAW
def test_verdict_is_undecided_exactly_while_the_bound_is_inside(lo: float, width: float, bound: float) -> None:
    hi = lo + width
    found = verdict(lo, hi, bound)
    assert found == ("pass" if bound <= lo else "fail" if bound > hi else "undecided")
