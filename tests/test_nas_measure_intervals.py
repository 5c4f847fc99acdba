"""Intervals cover as stated: over distributions, quantiles, several looks, and drift."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.measure.interleave import planned_looks
from nas.measure.intervals import MIN_BLOCKS, effective_count, median_interval, quantile, quantile_interval, verdict

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


def test_sequential_looks_together_keep_their_coverage() -> None:
    """Stopping at the first look that decides is wrong in at most 5 % of trials, at the bound."""
    rng = random.Random(1)
    looks = planned_looks(6, 48)
    share = 1 - 0.05 / len(looks)
    wrong = 0
    for _ in range(2000):
        values = [rng.gauss(1, 0.2) for _ in range(48)]
        for n in looks:
            found = median_interval(values[:n], share)
            decided = verdict(found.lo, found.hi, 1.0)
            if decided != "undecided":
                wrong += 1
                break
    # Six values cannot reach the share of one of four looks: their 3.1 % is what is spent there.
    assert wrong / 2000 <= 0.031 + 0.0375


def autoregressive(rho: float, n: int, trials: int) -> np.ndarray:
    """Series whose neighbours resemble each other; the median of each value is 0."""
    rng = np.random.default_rng(11)
    noise = rng.standard_normal((trials, n))
    out = np.empty_like(noise)
    out[:, 0] = noise[:, 0]
    for t in range(1, n):
        out[:, t] = rho * out[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
    return out


@pytest.mark.parametrize("rho", [0.3, 0.6])
@pytest.mark.parametrize("n", [20, 48])
def test_drift_does_not_cost_coverage(rho: float, n: int) -> None:
    """With neighbours alike (AR(1)) at least 93 % are enclosed; without `drift`, far fewer."""
    series = autoregressive(rho, n, 2000).tolist()
    with_drift = [median_interval(s, drift=True) for s in series]
    without = [median_interval(s) for s in series]
    hits = np.mean([f.lo <= 0.0 <= f.hi for f in with_drift])
    naive = np.mean([f.lo <= 0.0 <= f.hi for f in without])
    assert hits >= 0.93
    assert naive < hits
    if rho == 0.6:
        assert naive < 0.88


def test_independent_values_are_worth_nearly_their_number() -> None:
    rng = np.random.default_rng(5)
    worth = [effective_count(row) for row in rng.standard_normal((300, 48)).tolist()]
    assert np.median(worth) > 0.7 * 48
    assert max(worth) <= 48
    alternating = [float(i % 2) for i in range(48)]
    assert effective_count(alternating) == 48, "what alternates is not taken for knowledge"
    assert effective_count([float(i) for i in range(48)]) < 6, "a trend is one long drift"


@given(VALUES, QUANTILES, st.booleans(), st.randoms(use_true_random=False))
@LAW
def test_an_interval_is_of_the_sample_and_drift_only_widens_it(
    values: list[float], q: float, drift: bool, rng: random.Random
) -> None:
    found, calm = quantile_interval(values, q, drift=drift), quantile_interval(values, q)
    assert min(values) <= found.lo <= calm.lo <= calm.hi <= found.hi <= max(values)
    assert min(values) <= found.median <= max(values)
    assert {found.lo, found.hi} <= set(values)
    assert 0.0 <= found.coverage <= 1.0
    assert 0.0 < found.count <= len(values)
    shuffled = list(values)
    rng.shuffle(shuffled)
    assert quantile_interval(shuffled, q) == calm
    middle = median_interval(values)
    assert middle.lo <= middle.median <= middle.hi


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
