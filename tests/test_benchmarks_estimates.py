"""Intervals of the benchmarks: their coverage by simulation, their order, their limits."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.estimates import (
    EstimateRow,
    PairedDifference,
    bootstrap,
    crossed,
    draw_intervals,
    few_discordant,
    paired_interval,
    share,
    verdict,
    write_table,
)
from space.errors import InputError

IMAGES, TRIALS = 300, 1000


def _tables(
    rng: np.random.Generator, images: float, seeds: float, rest: float, number: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two tables whose true difference is 0, from crossed random effects."""
    difference = (
        images * rng.standard_normal((1, IMAGES))
        + seeds * rng.standard_normal((number, 1))
        + rest * rng.standard_normal((number, IMAGES))
    )
    base = rng.standard_normal((number, IMAGES))
    return base + difference, base


@pytest.mark.parametrize(
    ("images", "seeds", "rest"),
    [(1, 0, 0.3), (0, 0, 1), (1, 0.05, 1), (1, 0.1, 1), (1, 0.2, 0.5), (1, 0.4, 0.5), (0.3, 1, 0.3)],
)
def test_three_seeds_cover_as_promised_whatever_the_mix(images: float, seeds: float, rest: float) -> None:
    rng = np.random.default_rng(0)
    found = [paired_interval(*_tables(rng, images, seeds, rest)) for _ in range(TRIALS)]
    one_sided = np.mean([f.lower <= 0 for f in found])
    two_sided = np.mean([f.lo <= 0 <= f.hi for f in found])
    # Binomial(1000, 0.95) has a standard error of 0.7 %.
    assert 0.928 <= one_sided <= 0.985
    assert 0.928 <= two_sided <= 0.985


def test_a_detectable_difference_is_detected_about_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    size = paired_interval(*_tables(np.random.default_rng(2), 1, 0, 0.3)).detectable
    drawn = [_tables(rng, 1, 0, 0.3) for _ in range(400)]
    assert 0.7 <= np.mean([paired_interval(a + size, b).lo > 0 for a, b in drawn]) <= 0.9


@settings(max_examples=60, derandomize=True, deadline=None)
@given(seeds=st.integers(1, 5), images=st.integers(2, 60), seed=st.integers(0, 999))
def test_the_bounds_are_in_order_and_change_sign_with_the_sides(seeds: int, images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (2, seeds, images))
    found, back = paired_interval(a, b), paired_interval(b, a)
    assert found.lo <= found.lower <= found.value <= found.hi
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (back.lo, back.hi) == (pytest.approx(-found.hi), pytest.approx(-found.lo))
    assert (found.seeds, found.images) == (seeds, images)
    order = rng.permutation(images)
    again = paired_interval(a[:, order], b[:, order])
    assert (again.lo, again.hi) == (pytest.approx(found.lo), pytest.approx(found.hi))


def test_one_seed_is_the_paired_t_interval_and_no_difference_has_no_width() -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 1, 80))
    wanted = stats.ttest_rel(a[0], b[0]).confidence_interval(0.95)
    found = paired_interval(a, b)
    assert (found.lo, found.hi) == (pytest.approx(wanted.low), pytest.approx(wanted.high))
    same = paired_interval(np.full((3, 50), 0.5), np.full((3, 50), 0.5))
    assert (same.value, same.lo, same.hi, same.lower) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((2, 5)), np.ones((3, 5))),
        (np.ones((2, 1)), np.ones((2, 1))),
        (np.full((2, 5), np.nan), np.ones((2, 5))),
    ],
)
def test_what_cannot_be_paired_is_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(InputError):
        paired_interval(a, b)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(value=st.floats(-0.2, 0.2), half=st.floats(1e-4, 0.2))
def test_better_excludes_zero_and_not_worse_excludes_the_margin(value: float, half: float) -> None:
    lower = value - 0.84 * half
    found = PairedDifference(value, value - half, value + half, lower, half / 2, 0.0, half, 3, 100)
    said = verdict(found)
    assert said.startswith("better") == (found.lo > 0)
    assert said.startswith("worse") == (found.hi < 0)
    inside = found.lo <= 0 <= found.hi
    assert said.startswith("not worse") == (inside and lower > -0.015)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seeds=st.integers(1, 5), images=st.integers(2, 60), seed=st.integers(0, 99))
def test_intervals_enclose_their_estimate_and_repeat(seeds: int, images: int, seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-1, 2, (seeds, images)).astype(float)
    mean, lo, hi = crossed(differences)
    assert mean == pytest.approx(differences.mean())
    assert crossed(differences) == (mean, lo, hi)
    assert crossed(np.zeros((seeds, images))) == (0.0, 0.0, 0.0)
    for mid, low, high in (
        (mean, lo, hi),
        bootstrap(differences.T, lambda v: float(v.mean())),
        share(seeds, images + 5),
    ):
        assert low <= mid <= high
    assert share(0, 10)[1] == 0.0
    assert share(10, 10) == (1.0, pytest.approx(0.025 ** (1 / 10)), 1.0)


def test_few_images_that_differ_leave_a_difference_in_correctness_open() -> None:
    right = np.ones((3, 1000))
    one = right.copy()
    one[0, 0] = 0
    for a, b in ((right, right), (right, one), (one, right)):
        found = paired_interval(a, b)
        assert found.lo <= -0.003 < 0 < 0.003 <= found.hi
        assert found.lower <= found.value - 0.003
    assert few_discordant(np.zeros((2, 400)), 0.0, 0.0) == pytest.approx((-0.0095, 0.0095), abs=1e-4)


def test_seeds_that_disagree_widen_the_interval() -> None:
    images = np.random.default_rng(0).integers(-1, 2, 400).astype(float)
    alike = np.stack([images] * 3)
    widths = [hi - lo for _, lo, hi in (crossed(alike), crossed(alike + np.array([[-0.2], [0.0], [0.2]])))]
    assert widths[1] > 2 * widths[0]


def test_coverage_is_near_95_percent_when_images_are_the_only_luck() -> None:
    rng = np.random.default_rng(1)
    found = [crossed(np.stack([rng.normal(0.1, 1.0, 80)] * 2)) for _ in range(200)]
    # Binomial(200, 0.95) lies within [178, 199] with 99.9 %; percentile intervals run a bit short.
    assert 174 <= sum(lo <= 0.1 <= hi for _, lo, hi in found) <= 200


def test_tables_and_figures_hold_every_row(tmp_path: Path) -> None:
    rows = [
        EstimateRow("a", 0.0123456789, 0.01, 0.03, 20, "archs", "", "=c"),
        EstimateRow("b", math.nan, math.nan, math.nan, 0, "archs", "none", "c"),
    ]
    write_table(tmp_path / "t.csv", rows, device="d")
    with (tmp_path / "t.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [*EstimateRow.__annotations__, "device"]
    assert (first["estimate"], first["command"], second["lo"]) == ("0.012346", "'=c", "")
    shown = [(row.name, (row.estimate, row.lo, row.hi)) for row in rows]
    draw_intervals(tmp_path / "t.png", shown, "x", lines={"margin": -1.0})
    draw_intervals(tmp_path / "none.png", shown[1:], "x")
    assert (tmp_path / "t.png").stat().st_size > 1000
    with pytest.raises(InputError, match="--out"):
        write_table(tmp_path / "t.csv" / "below.csv", rows)
