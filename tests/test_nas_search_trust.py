"""Trust: intervals cover as often as they say, ceilings are right, the best is rarely left out."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from nas.search.trust import (
    _dunnett,
    ceiling,
    in_words,
    indistinguishable,
    kendall,
    kendall_interval,
    regret,
)
from space.errors import InputError

Floats = npt.NDArray[np.float64]
SIMULATED = 200
SLACK = 0.045
"""Three standard errors of a share of 0.95 over 200 simulated data sets."""


def world(rng: np.random.Generator, n: int, s: int, sd: float) -> tuple[Floats, Floats]:
    """True values [n] of unit spread, and truth [s, n]; each random seed shifts all alike."""
    true = rng.normal(size=n)
    return true, true + sd * rng.normal(size=(s, n)) + 5 * rng.normal(size=(s, 1))


def normal_tau(correlation: float) -> float:
    return 2 / math.pi * math.asin(correlation)


def test_tau_is_that_of_concordant_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = int(rng.integers(3, 20))
        a, b = rng.integers(0, 6, n), rng.normal(size=n)
        if len(set(a.tolist())) == 1:
            continue
        above = below = ties = 0
        for i in range(n):
            for j in range(i):
                product = (a[i] - a[j]) * (b[i] - b[j])
                above, below, ties = above + (product > 0), below + (product < 0), ties + (
                    product == 0
                )  # fmt: skip
        naive = (above - below) / math.sqrt((above + below) * (above + below + ties))
        assert kendall(a, b) == pytest.approx(naive)
        found = kendall_interval(a, b, resamples=50, random_seed=1)
        assert found.value == kendall(a, b)
        assert -1 <= found.lo <= found.value <= found.hi <= 1


@pytest.mark.parametrize(("n", "link", "sd"), [(12, 0.6, 0.7), (24, 0.9, 0.7), (24, 0.0, 0.3)])
def test_the_interval_of_tau_covers_the_tau_of_such_archs(n: int, link: float, sd: float) -> None:
    rng = np.random.default_rng(1)
    asked = normal_tau(link / math.sqrt(1 + sd**2 / 3))
    covered = 0
    for _ in range(SIMULATED):
        true, truth = world(rng, n, 3, sd)
        scores = link * true + math.sqrt(1 - link**2) * rng.normal(size=n)
        found = kendall_interval(scores, truth, resamples=400, random_seed=0)
        covered += found.lo <= asked <= found.hi
    assert covered / SIMULATED >= 0.95 - SLACK


def test_an_arch_drawn_twice_does_not_tie_with_itself() -> None:
    order = np.arange(8.0)
    same = kendall_interval(order, order[None], random_seed=0)
    assert (same.value, same.lo, same.hi) == pytest.approx((1, 1, 1))
    back = kendall_interval(-order, order[None], random_seed=0)
    assert (back.value, back.lo, back.hi) == pytest.approx((-1, -1, -1))


def test_intervals_depend_on_the_random_seed_alone_and_on_ranks_alone() -> None:
    rng = np.random.default_rng(2)
    true, truth = world(rng, 15, 3, 0.5)
    scores = true + rng.normal(size=15)
    one = kendall_interval(scores, truth, random_seed=3)
    assert one == kendall_interval(scores, truth, random_seed=3)
    assert one == kendall_interval(np.exp(scores), truth, random_seed=3)
    assert one != kendall_interval(scores, truth, random_seed=4)
    infinite = scores.copy()
    infinite[np.argsort(scores)[:2]] = -np.inf
    assert math.isfinite(kendall_interval(infinite, truth, random_seed=3).hi)


@pytest.mark.parametrize(("s", "sd"), [(2, 0.5), (3, 1.0), (5, 0.2)])
def test_the_ceilings_are_those_of_the_world_that_was_simulated(s: int, sd: float) -> None:
    rng = np.random.default_rng(4)
    n, perfect, reached, pairwise, covered = 20, [], [], [], 0
    asked = normal_tau(1 / math.sqrt(1 + sd**2 / s))
    for _ in range(SIMULATED):
        true, truth = world(rng, n, s, sd)
        found = ceiling(truth, resamples=2)
        perfect.append(found.perfect.value)
        reached.append(kendall(true, truth.mean(axis=0)))
        pairwise.append(found.pairwise.value)
        covered += found.perfect.lo <= asked <= found.perfect.hi
        assert found.perfect.lo <= found.perfect.value <= found.perfect.hi
    assert abs(covered / SIMULATED - 0.95) <= SLACK
    # What a perfect proxy reached in fact, what is said of it, and the closed form agree.
    assert np.mean(perfect) == pytest.approx(asked, abs=0.03)
    assert np.mean(reached) == pytest.approx(asked, abs=0.03)
    assert np.mean(pairwise) == pytest.approx(normal_tau(1 / (1 + sd**2)), abs=0.03)


def test_the_pairwise_ceilings_interval_covers() -> None:
    rng = np.random.default_rng(5)
    asked, covered = normal_tau(1 / (1 + 0.6**2)), 0
    for _ in range(SIMULATED):
        found = ceiling(world(rng, 20, 3, 0.6)[1], resamples=300).pairwise
        covered += found.lo <= asked <= found.hi
    assert covered / SIMULATED >= 0.95 - SLACK


def test_pure_noise_has_no_ceiling_and_no_noise_has_the_highest() -> None:
    rng = np.random.default_rng(6)
    noise = [ceiling(rng.normal(size=(3, 20)), resamples=2).perfect.lo for _ in range(50)]
    assert np.mean(np.array(noise) == 0) > 0.9
    exact = ceiling(np.tile(rng.normal(size=12), (3, 1)), resamples=50)
    assert exact.perfect.value == exact.perfect.lo == 1.0
    assert exact.pairwise.value == pytest.approx(1)


@pytest.mark.parametrize("sd", [0.1, 0.5])
@pytest.mark.parametrize("skill", [0.0, 0.9])
def test_regret_is_enclosed_between_cross_fitted_and_plain(sd: float, skill: float) -> None:
    rng = np.random.default_rng(7)
    covered, asked, fitted, plain, spread = 0, [], [], [], []
    for _ in range(SIMULATED):
        true, truth = world(rng, 12, 3, sd)
        scores = skill * true + math.sqrt(1 - skill**2) * rng.normal(size=12)
        found = regret(scores, truth)
        assert found.pick == np.argmin(scores)
        assert found.best == np.argmin(truth.mean(axis=0))
        assert 0 <= found.lo <= found.value <= found.hi
        assert found.within_one_sd == (found.value <= found.seed_sd)
        asked.append(true[found.pick] - true.min())
        covered += found.lo <= asked[-1] <= found.hi
        fitted.append(found.value)
        plain.append(found.plain)
        spread.append(found.seed_sd**2)
    assert covered / SIMULATED >= 0.95 - SLACK
    assert math.sqrt(np.mean(spread)) == pytest.approx(sd, rel=0.05)
    noise = 4 * sd / math.sqrt(3 * SIMULATED)
    assert np.mean(fitted) - noise <= np.mean(asked) <= np.mean(plain) + noise


def test_the_curse_of_the_winner_is_in_the_plain_difference_only() -> None:
    """All archs are equally good: the plain regret is far from 0, the cross-fitted is not."""
    rng = np.random.default_rng(8)
    found = [regret(rng.normal(size=20), rng.normal(size=(3, 20))) for _ in range(SIMULATED)]
    assert np.mean([f.plain for f in found]) > 0.8
    assert np.mean([f.lo == 0.0 for f in found]) > 0.93
    assert np.mean([f.value for f in found]) < 0.5 * np.mean([f.plain for f in found])


def test_the_critical_value_is_the_t_quantile_for_one_rival_and_that_of_published_tables() -> None:
    for dof in (5, 20, 60):
        assert _dunnett(1, dof, 0) == pytest.approx(float(stats.t.ppf(0.975, dof)), rel=0.03)
    # Dunnett, Biometrics 20 (1964), two-sided 5 %: 3 rivals, 20 degrees of freedom; 9 rivals, 60.
    assert _dunnett(3, 20, 1) == pytest.approx(2.54, rel=0.02)
    assert _dunnett(9, 60, 2) == pytest.approx(2.73, rel=0.03)


def images_of(
    rng: np.random.Generator, true: Floats, s: int, images: int, seed_sd: float
) -> dict[str, Floats]:
    """Losses [s, images] per arch: hard images are hard for all, random seeds differ."""
    hard = rng.exponential(size=images)
    return {
        f"a{i:02d}": value + hard + seed_sd * rng.normal(size=(s, 1))
        + 0.5 * rng.normal(size=images) + 0.3 * rng.normal(size=(s, images))
        for i, value in enumerate(true)
    }  # fmt: skip


@pytest.mark.parametrize(("s", "seed_sd"), [(1, 0.0), (3, 0.05), (3, 0.0)])
def test_the_best_arch_is_rarely_left_out_and_clear_losers_are(s: int, seed_sd: float) -> None:
    rng = np.random.default_rng(9)
    missed, sizes = 0, []
    for _ in range(SIMULATED):
        true = np.array([0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 2.0, 3.0])
        kept = indistinguishable(images_of(rng, true, s, 200, seed_sd), 0.05)
        missed += "a00" not in kept
        assert "a07" not in kept
        sizes.append(len(kept))
    assert missed / SIMULATED <= 0.05 + SLACK
    assert 1 < np.mean(sizes) < 8


def test_equal_archs_keep_the_level_with_random_seeds_that_differ() -> None:
    """Without the spread of random seeds the images alone would name a winner almost always."""
    rng = np.random.default_rng(10)
    missed = sum(
        "a00" not in indistinguishable(images_of(rng, np.zeros(5), 3, 1000, 0.2), 0.05)
        for _ in range(SIMULATED)
    )
    assert missed / SIMULATED <= 0.05 + SLACK
    single = sum(
        "a00" not in indistinguishable(
            {k: v.mean(axis=0) for k, v in images_of(rng, np.zeros(5), 3, 1000, 0.2).items()}, 0.05
        )
        for _ in range(50)
    )  # fmt: skip
    assert single / 50 > 0.5


def test_what_is_said_of_the_best() -> None:
    rng = np.random.default_rng(11)
    losses = images_of(rng, np.array([0.0, 0.0, 5.0]), 3, 2000, 0.01)
    kept = indistinguishable(losses, 0.001)
    assert set(kept) == {"a00", "a01"}
    assert kept == indistinguishable(dict(reversed(losses.items())), 0.001)
    said = in_words(kept, losses)
    assert said == "the first 2 of 3 cannot be told apart by 3 random seeds x 2,000 images"
    assert in_words(("a00",), losses).startswith("the first of 3 is better than the others")
    assert in_words(tuple(losses), losses).startswith("the 3 cannot be told apart")
    assert in_words(("a00", "a02"), losses).startswith("2 of 3 cannot be told apart from the best")
    broken = {**losses, "a01": np.full((3, 2000), np.nan)}
    assert indistinguishable(broken, 0.001) == ("a00",)
    assert indistinguishable({"a": losses["a00"], "b": losses["a00"]}, 0.05) == ("a", "b")


def test_input_that_says_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2"):
        ceiling(np.zeros((1, 5)))
    with pytest.raises(InputError, match="at least 2"):
        regret(np.zeros(5), np.zeros((1, 5)))
    with pytest.raises(InputError, match="finite"):
        kendall_interval(np.zeros(3), np.full((2, 3), np.nan), random_seed=0)
    with pytest.raises(InputError, match="one per arch"):
        kendall_interval(np.zeros(4), np.zeros((2, 3)), random_seed=0)
    with pytest.raises(InputError, match="same random seeds and images"):
        indistinguishable({"a": np.zeros((2, 5)), "b": np.zeros((2, 6))})
    with pytest.raises(InputError, match="alpha"):
        indistinguishable({"a": np.zeros((2, 5))}, 0.0)
