"""The search decides on values alone: bounds tighten, spreads are spread, ties go to the faster."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.core.config import NO_SLOWER_SLACK, RunConfig
from nas.core.requirement import METRICS, Requirement, Setting
from nas.search.constraints import (
    StepBounds,
    band_at,
    bounds_at,
    primary_setting,
    requirements_of,
    settings_of,
    tighten,
)
from nas.search.selection import paired_error, pick, rank, spread
from space import get_family
from space.contractions import Candidate


def config(**changes: object) -> RunConfig:
    return RunConfig(**{"seed": "21M", "target_params": 5_000_000, **changes})  # type: ignore[arg-type]


@settings(max_examples=200, derandomize=True)
@given(target=st.integers(10_000, 19_000_000), steps=st.integers(1, 12), tolerance=st.floats(0.0, 0.5))
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


def bounds(c: RunConfig, step: int, parent_ratio: float = 1.0, seed: float = 100.0) -> StepBounds:
    """The bounds of a step for a seed that has the value `seed` of whatever is required."""
    values = {r: 1.0 if r.metric == "speedup" else seed for r in requirements_of(c)}
    return bounds_at(step, c, seed_params=20_000_000, seed_values=values, parent_ratio=parent_ratio)


def test_bounds_tighten_geometrically_and_hold_together() -> None:
    c = config(min_speedup=2.0, min_throughput=400.0, steps=4, require=("latency_ms<=25@cpu:b1",))
    found = [bounds(c, k) for k in range(1, 5)]
    wanted = {
        "speedup": [2.0 ** (k / 4) for k in range(1, 5)],
        "images_per_s": [100 * 4.0 ** (k / 4) for k in range(1, 5)],
        "latency_ms": [100 * 0.25 ** (k / 4) for k in range(1, 5)],
    }
    for metric, values in wanted.items():
        own = [next(r.bound for r in b.requirements if r.metric == metric) for b in found]
        assert own == pytest.approx(values, rel=1e-5)
    assert all(b.least_ratio is None for b in found)
    assert found[-1].requirements == requirements_of(c), "the last step asks what the user did"


@settings(max_examples=200, derandomize=True)
@given(
    metric=st.sampled_from(sorted(set(METRICS) - {"params", "speedup"})),
    bound=st.floats(1e-3, 1e9),
    seed=st.floats(1e-3, 1e9),
    steps=st.integers(1, 12),
)
def test_no_step_asks_for_less_than_the_one_before_nor_more_than_the_user(
    metric: str, bound: float, seed: float, steps: int
) -> None:
    """Either sense, whether the seed meets the bound already or not."""
    required = Requirement(metric, bound, None if metric == "macs" else Setting())
    asked = [tighten(required, k / steps, seed) for k in range(1, steps + 1)]
    values = [r.bound if r.sense == "<=" else -r.bound for r in asked]
    assert all(a >= b - 1e-9 * abs(b) for a, b in pairwise(values))
    assert asked[-1] == required
    met = seed <= bound if required.sense == "<=" else seed >= bound
    if met:
        assert all(r.bound == pytest.approx(bound) for r in asked)


def test_counted_requirements_bound_the_band_itself() -> None:
    c = config(steps=2, require=("macs<=1G", "params<=5.2M"))
    first, last = bounds(c, 1, seed=4e9), bounds(c, 2, seed=4e9)
    assert (first.band.max_macs, last.band.max_macs) == (2_000_000_000, 1_000_000_000)
    assert last.band.hi == 5_200_000
    assert last.requirements == ()
    assert last.least_ratio is not None, "counts say nothing about pace"


def test_bounds_at_the_ends() -> None:
    """A throughput below the seed's is asked of every step alike; without one, none may be slower than its parent."""
    c = config(min_throughput=50.0, steps=3)
    for k in range(1, 4):
        assert [r.bound for r in bounds(c, k).requirements] == pytest.approx([50.0])
    for c in (config(), config(require=("peak_mem_mb<=500@cpu",))):
        assert bounds(c, 2, parent_ratio=1.3).least_ratio == pytest.approx(1.3 * (1 - NO_SLOWER_SLACK))
    band = band_at(21_198_568, config(), 4)
    assert band.lo <= 5_392_764 <= band.hi, "the published 5M is inside the band of 5M"


def test_the_primary_setting_is_that_of_the_first_required_pace() -> None:
    """Short forms are about the --bench flags' setting; the primary one comes first, each once."""
    c = config(bench_runtime="openvino", bench_batch=4, min_speedup=1.2)
    assert primary_setting(c) == Setting("cpu", "openvino", "float32", 4)
    c = config(require=("latency_ms<=9@cpu", "speedup>=2@cpu:onnxruntime:b1", "macs<=1G"))
    assert primary_setting(c) == Setting("cpu", "onnxruntime", "float32", 1)
    assert settings_of(c) == (primary_setting(c), Setting("cpu", "eager", "float32", 1))
    assert primary_setting(config(require=("latency_ms<=9@cpu",))) == Setting()


timed_lists = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.floats(0.5, 4.0), st.booleans()), min_size=1, max_size=15
)


Features = dict[str, tuple[float, ...]]


def as_timed(rows: list[tuple[int, int, float, bool]]) -> tuple[list[Candidate], Features]:
    """Candidates of which only the key, the ratio and the baseline count, and their places."""
    seed = get_family("tinyvit").seed("5M")
    found = [
        Candidate(seed, f"k{i}", 1, 1, 1, (), "uniform" if baseline else None, seed, ratio=r)
        for i, (_, _, r, baseline) in enumerate(rows)
    ]
    return found, {f"k{i}": (a, b) for i, (a, b, _, _) in enumerate(rows)}


@settings(max_examples=200, derandomize=True)
@given(rows=timed_lists, count=st.integers(1, 8), random_seed=st.integers(0, 99))
def test_spread_chooses_distinct_keys_anchors_first_in_any_input_order(
    rows: list[tuple[int, int, float, bool]], count: int, random_seed: int
) -> None:
    timed, features = as_timed(rows)
    found = spread(timed, features, count, random_seed=random_seed)
    chosen = [c.key for c in found]
    assert len(chosen) == len(set(chosen)) == min(count, len(timed))
    assert spread(timed[::-1], features, count, random_seed=random_seed) == found
    baselines = {t.key for t in timed if t.baseline}
    first = min(len(baselines), (count + 1) // 2)
    assert set(chosen[:first]) <= baselines


@settings(max_examples=200, derandomize=True)
@given(rows=timed_lists, count=st.integers(1, 8))
def test_nearest_takes_the_list_in_its_order_with_baselines_in_at_most_half_of_the_places(
    rows: list[tuple[int, int, float, bool]], count: int
) -> None:
    timed, features = as_timed(rows)
    chosen = [c.key for c in pick(timed, features, count, "nearest", random_seed=0)]
    assert len(chosen) == len(set(chosen)) == min(count, len(timed))
    baselines, others = ([t.key for t in timed if bool(t.baseline) == kind] for kind in (True, False))
    mine = [k for k in chosen if k in others]
    assert mine == others[: len(mine)]
    assert [k for k in chosen if k in baselines] == baselines[: len(chosen) - len(mine)]
    if len(baselines) >= (count + 1) // 2 and len(others) >= count // 2:
        assert len(mine) == count // 2
    far = spread(timed, features, count, random_seed=3)
    assert pick(timed, features, count, "diverse", random_seed=3) == far


@settings(max_examples=100, derandomize=True)
@given(rows=timed_lists, random_seed=st.integers(0, 9))
def test_each_choice_is_as_far_as_any_other_was(rows: list[tuple[int, int, float, bool]], random_seed: int) -> None:
    timed, features = as_timed([(a, b, r, False) for a, b, r, _ in rows])
    spreaded = spread(timed, features, min(4, len(timed)), random_seed=random_seed)
    chosen = [c.key for c in spreaded]
    raw = {t.key: np.array([*features[t.key], math.log(t.ratio or 1.0)]) for t in timed}
    stack = np.stack(list(raw.values()))
    extent = np.ptp(stack, axis=0)
    scaled = {k: v / np.where(extent > 0, extent, 1) for k, v in raw.items()}
    for i in range(1, len(chosen)):
        before = [scaled[k] for k in chosen[:i]]
        away = {k: min(np.linalg.norm(v - b) for b in before) for k, v in scaled.items()}
        assert away[chosen[i]] >= max(away.values()) - 1e-9


scored_lists = st.lists(
    st.tuples(st.floats(0.1, 3.0), st.floats(0.001, 0.2), st.floats(0.5, 4.0)), min_size=1, max_size=12
)


@settings(max_examples=200, derandomize=True)
@given(rows=scored_lists)
def test_ranking_puts_the_fastest_of_the_tied_first_and_the_rest_by_loss(
    rows: list[tuple[float, float, float]],
) -> None:
    scored = [SimpleNamespace(key=f"k{i}", soft_loss=loss, ratio=ratio) for i, (loss, _, ratio) in enumerate(rows)]
    errors = {f"k{i}": se for i, (_, se, _) in enumerate(rows)}

    def error(a: str, b: str) -> float:
        return math.hypot(errors[a], errors[b])

    order = rank(scored, error)
    assert sorted(order) == sorted(s.key for s in scored)
    by_key = {s.key: s for s in scored}
    best = min(scored, key=lambda s: (s.soft_loss, -s.ratio, s.key))
    tied = {s.key for s in scored if s is best or s.soft_loss - best.soft_loss <= error(s.key, best.key)}
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
