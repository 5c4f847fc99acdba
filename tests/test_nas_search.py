"""The search decides on values alone: bounds tighten, spreads are spread, ties go to the faster."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.config import NO_SLOWER_SLACK, RunConfig
from nas.search.constraints import band_at, bounds_at
from nas.search.selection import Scored, Timed, paired_error, rank, spread, unpaired_error


def config(**changes: object) -> RunConfig:
    return RunConfig(**{"seed": "21M", "target_params": 5_000_000, **changes})  # type: ignore[arg-type]


@settings(max_examples=200, derandomize=True)
@given(
    target=st.integers(10_000, 19_000_000),
    steps=st.integers(1, 12),
    tolerance=st.floats(0.0, 0.5),
)
def test_bands_shrink_to_the_targets_own_band(target: int, steps: int, tolerance: float) -> None:
    c = config(target_params=target, steps=steps, params_tolerance=tolerance)
    bands = [band_at(20_000_000, c, k) for k in range(1, steps + 1)]
    assert all(b.lo <= b.hi for b in bands if tolerance > 0.001)
    assert all(a.hi >= b.hi for a, b in pairwise(bands))
    # The last band holds exactly the integers within the tolerance.
    last = bands[-1]
    assert last.hi <= target * (1 + tolerance) + 1e-6
    assert last.hi + 1 > target * (1 + tolerance)
    assert last.lo >= target * (1 - tolerance) - 1e-6
    assert last.lo - 1 < target * (1 - tolerance)


def test_the_published_5m_is_inside_the_band_of_5m() -> None:
    band = band_at(21_198_568, config(), 4)
    assert band.lo <= 5_392_764 <= band.hi


def test_bounds_tighten_geometrically_and_hold_together() -> None:
    c = config(min_speedup=2.0, min_throughput=400.0, steps=4)
    bounds = [
        bounds_at(k, c, seed_params=20_000_000, seed_images_per_s=100.0, parent_ratio=1.0)
        for k in range(1, 5)
    ]
    ratios = [b.ratio for b in bounds]
    speeds = [b.images_per_s for b in bounds]
    assert ratios == pytest.approx([2.0 ** (k / 4) for k in range(1, 5)])
    assert speeds == pytest.approx([100 * 4.0 ** (k / 4) for k in range(1, 5)])
    assert not any(b.follows_parent for b in bounds)


def test_a_throughput_below_the_seeds_is_asked_of_every_step_alike() -> None:
    c = config(min_throughput=50.0, steps=3)
    for k in range(1, 4):
        b = bounds_at(k, c, seed_params=20_000_000, seed_images_per_s=100.0, parent_ratio=1.0)
        assert b.images_per_s == pytest.approx(50.0)


def test_without_a_throughput_constraint_a_step_may_not_be_slower_than_its_parent() -> None:
    b = bounds_at(2, config(), seed_params=20_000_000, seed_images_per_s=100.0, parent_ratio=1.3)
    assert b.follows_parent
    assert b.ratio == pytest.approx(1.3 * (1 - NO_SLOWER_SLACK))
    assert b.images_per_s is None


timed_lists = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.floats(0.5, 4.0), st.booleans()),
    min_size=1,
    max_size=15,
)


def as_timed(rows: list[tuple[int, int, float, bool]]) -> list[Timed]:
    return [Timed(f"k{i}", (a, b), r, anchor) for i, (a, b, r, anchor) in enumerate(rows)]


@settings(max_examples=200, derandomize=True)
@given(rows=timed_lists, count=st.integers(1, 8), random_seed=st.integers(0, 99))
def test_spread_chooses_distinct_keys_anchors_first_in_any_input_order(
    rows: list[tuple[int, int, float, bool]], count: int, random_seed: int
) -> None:
    timed = as_timed(rows)
    chosen = spread(timed, count, random_seed=random_seed)
    assert len(chosen) == len(set(chosen)) == min(count, len(timed))
    assert spread(timed[::-1], count, random_seed=random_seed) == chosen
    anchors = {t.key for t in timed if t.anchor}
    first = min(len(anchors), (count + 1) // 2)
    assert set(chosen[:first]) <= anchors


@settings(max_examples=100, derandomize=True)
@given(rows=timed_lists, random_seed=st.integers(0, 9))
def test_each_choice_is_as_far_as_any_other_was(
    rows: list[tuple[int, int, float, bool]], random_seed: int
) -> None:
    timed = [Timed(t.key, t.features, t.ratio, False) for t in as_timed(rows)]
    chosen = spread(timed, min(4, len(timed)), random_seed=random_seed)
    raw = {t.key: np.array([*t.features, math.log(t.ratio)]) for t in timed}
    stack = np.stack(list(raw.values()))
    extent = np.ptp(stack, axis=0)
    scaled = {k: v / np.where(extent > 0, extent, 1) for k, v in raw.items()}
    for i in range(1, len(chosen)):
        before = [scaled[k] for k in chosen[:i]]
        away = {k: min(np.linalg.norm(v - b) for b in before) for k, v in scaled.items()}
        assert away[chosen[i]] >= max(away.values()) - 1e-9


scored_lists = st.lists(
    st.tuples(st.floats(0.1, 3.0), st.floats(0.001, 0.2), st.floats(0.5, 4.0)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, derandomize=True)
@given(rows=scored_lists)
def test_ranking_puts_the_fastest_of_the_tied_first_and_the_rest_by_loss(
    rows: list[tuple[float, float, float]],
) -> None:
    scored = [Scored(f"k{i}", loss, se, ratio) for i, (loss, se, ratio) in enumerate(rows)]
    error = unpaired_error(scored)
    order = rank(scored, error)
    assert sorted(order) == sorted(s.key for s in scored)
    by_key = {s.key: s for s in scored}
    best = min(scored, key=lambda s: (s.soft_loss, -s.ratio, s.key))
    tied = {
        s.key for s in scored if s is best or s.soft_loss - best.soft_loss <= error(s.key, best.key)
    }
    assert set(order[: len(tied)]) == tied
    assert by_key[order[0]].ratio == max(by_key[k].ratio for k in tied)
    losses = [by_key[k].soft_loss for k in order[len(tied) :]]
    assert losses == sorted(losses)
    assert rank(scored[::-1], error) == order


def test_the_paired_error_is_that_of_the_mean_difference() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=500)
    losses = {"a": a, "b": a + 0.01 + 0.001 * rng.normal(size=500)}
    error = paired_error(lambda key: losses[key])
    difference = losses["a"] - losses["b"]
    assert error("a", "b") == pytest.approx(difference.std(ddof=1) / math.sqrt(500))
    # Pairing sees what two separate errors cannot.
    assert error("a", "b") < 0.01 < math.hypot(a.std() / math.sqrt(500), a.std() / math.sqrt(500))


def test_the_search_and_the_driver_import_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['timm'] = None\n"
        "import nas.search.constraints, nas.search.ledger, nas.search.selection\n"
        "import nas.contract, nas.report, nas.executor, nas.campaign, nas.finish\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
