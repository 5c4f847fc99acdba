"""Inheritance, racing and search efficiency: what they make of tables and curves."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import proxy as proxy_rank
from benchmarks._estimates import bootstrap, crossed, share
from benchmarks._lattice import (
    Lattice,
    Scored,
    Settings,
    best_so_far,
    closed,
    lattice_of,
    reached_after,
    replay,
)
from benchmarks.inheritance import Crossing, ablation_rows, epochs_to_loss, ratio_rows
from benchmarks.lab import Lab, Training
from benchmarks.strategies import quartiles, rows_of, seed_sd
from nas.search.strategies import get_strategy, strategy_names
from space import Context, get_family
from space.contractions import Band, contains
from space.errors import InputError
from space.family import Arch

LENGTHS = (1, 2, 4, 8, 16)


# -- epochs to a loss ------------------------------------------------------------------------------


def test_crossings_lie_on_the_curve_and_are_censored_outside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        losses = rng.normal(size=len(LENGTHS)).tolist()
        target = float(rng.normal())
        found = epochs_to_loss(LENGTHS, losses, target)
        if losses[0] <= target:
            assert found == Crossing(1.0, -1)
        elif min(losses) > target:
            assert found == Crossing(16.0, 1)
        else:  # naively: the first of many small steps that is low enough
            x = np.linspace(0, 4, 4001)
            y = np.interp(x, np.log2(LENGTHS), losses)
            assert found.censored == 0
            assert math.log2(found.epochs) == pytest.approx(x[np.argmax(y <= target)], abs=2e-3)


def test_a_lower_target_never_takes_fewer_epochs_nor_what_follows_a_crossing() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        losses = rng.normal(size=5).tolist()
        a, b = sorted(rng.normal(size=2).tolist())
        assert (
            epochs_to_loss(LENGTHS, losses, a).epochs >= epochs_to_loss(LENGTHS, losses, b).epochs
        )
        first = next((i for i, v in enumerate(losses) if v <= b), 4)  # later ones are not trained
        short = epochs_to_loss(LENGTHS, losses[: first + 1], b)
        assert short == epochs_to_loss(LENGTHS, losses, b)


def test_exact_power_laws_give_their_own_ratio() -> None:
    for ratio in (1.5, 2.0, 3.0, 11.0):
        losses = [5.0 - math.log(e) for e in LENGTHS]
        found = epochs_to_loss(LENGTHS, losses, 5.0 - math.log(ratio))
        assert found.epochs == pytest.approx(ratio)


def test_ratio_rows_say_when_the_median_is_a_bound() -> None:
    got = [[Crossing(3.0, 0), Crossing(5.0, 0)] for _ in range(6)]
    rows = {r.name: r for r in ratio_rows(got, 16, "c")}
    median = rows["epochs from scratch per inherited epoch, median"]
    assert median.lo <= median.estimate <= median.hi
    assert median.estimate in (3.0, 5.0)
    assert rows["share of trainings with at least 2x"].estimate == 1.0
    assert rows["share of trainings with at least 4x"].estimate == 0.5
    never = [[Crossing(16.0, 1)] * 2 for _ in range(6)]
    rows = {r.name: r for r in ratio_rows(never, 16, "c")}
    median = rows["epochs from scratch per inherited epoch, median"]
    assert (median.estimate, median.lo, median.hi) == (16.0, 16.0, 16.0)
    assert median.note.startswith(">= 16")
    assert "12 of 12" in median.note


def test_criteria_are_compared_on_the_same_images() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(size=(8, 50)) * 10  # what archs and images do to all criteria alike
    names = [
        f"{c}, {w}"
        for c in ("prefix", "l1", "l2", "taylor")
        for w in ("0 epochs", "0 epochs, norms as inherited", "1 epoch")
    ]
    shift = {name: float(rng.normal()) for name in names}
    rows = ablation_rows({name: common + shift[name] for name in names}, "c")
    assert len({r.name for r in rows}) == len(rows) == 13
    for row in rows:
        assert row.hi - row.lo < 1e-9
    by = {r.name: r.estimate for r in rows}
    assert by["l1 - prefix, 1 epoch"] == pytest.approx(
        shift["l1, 1 epoch"] - shift["prefix, 1 epoch"]
    )
    assert by["norms anew - as inherited, l2"] == pytest.approx(
        shift["l2, 0 epochs"] - shift["l2, 0 epochs, norms as inherited"]
    )


def test_intervals_enclose_their_estimate() -> None:
    rng = np.random.default_rng(3)
    for n in (5, 40):
        values = rng.normal(size=(n, 3))
        for mid, lo, hi in (
            bootstrap(values, lambda v: float(v.mean()), random_seed=0),
            crossed(values, random_seed=0),
            *(share(hits, n) for hits in range(n + 1)),
        ):
            assert lo <= mid <= hi
    assert share(0, 10)[1] == 0.0
    assert share(10, 10) == (1.0, pytest.approx(0.025 ** (1 / 10)), 1.0)


# -- ranks -----------------------------------------------------------------------------------------


class _Lab:
    """As much of a lab as the table needs: an arch is its position."""

    def __init__(self) -> None:
        self.run = self
        self.family = self
        self.dataset = SimpleNamespace(holdout=SimpleNamespace(labels=range(40)))

    def key(self, arch: int) -> str:
        return f"a{arch}"

    label = key

    def cost(self, of: Training) -> float:
        return float(of.epochs * (of.images or 0))


@pytest.mark.parametrize("number", range(1, 12))
@pytest.mark.parametrize(("ruled", "drawn"), [(5, 5), (6, 4), (2, 7)])
def test_fewer_archs_are_half_of_either_kind_and_none_twice(
    number: int, ruled: int, drawn: int
) -> None:
    listed = [("rule", i) for i in range(ruled)] + [("uniform", 100 + i) for i in range(drawn)]
    found = proxy_rank.chosen(listed, number)  # type: ignore[arg-type]
    assert len(found) == len(set(found)) == min(number, ruled + drawn)
    kinds = [sum(arch < 100 for arch in found), sum(arch >= 100 for arch in found)]  # type: ignore[operator]
    if number <= 2 * min(ruled, drawn):
        assert abs(kinds[0] - kinds[1]) <= 1


class _Trained(SimpleNamespace):
    def losses(self) -> np.ndarray:
        return np.asarray(self.per_image)


def _done(worth: float, epochs: int, images: int) -> _Trained:
    of = Training(cast(Arch, 0), "inherit", epochs, 0, images=images)
    return _Trained(
        of=of, values={epochs: {"soft_loss": worth}}, per_image=np.linspace(-1, 1, 40) + worth
    )


def test_the_proxy_that_is_asked_costs_a_tenth_of_the_truth_at_most() -> None:
    rng, n = np.random.default_rng(6), 8
    worth = np.arange(n, dtype=np.float64)
    given = argparse.Namespace(truth_epochs=5, proxy_epochs=2, images=1000, seeds=3)
    truth = [_done(w + rng.normal() * 0.01, 5, 2000) for _ in range(3) for w in worth]
    scored = {
        proxy_rank.named(what, epochs): [_done(w, epochs, 1000) for w in by]
        for what, by in (("inherited (l1)", worth), ("from scratch", -worth))
        for epochs in proxy_rank.lengths(given)
    }
    free = {"parameters": list(-worth)}

    def table(of: Any) -> Any:
        return proxy_rank.table(cast(Lab, _Lab()), given, cast(Any, range(n)), of, truth, free)  # type: ignore[arg-type]

    rows, told = table(scored)
    by_name = {row.name: row for row in rows}
    assert told["proxy"] == "inherited (l1), 1 epoch"
    assert told["cost_share"] == pytest.approx(0.1)
    assert told["regret"] == pytest.approx(0.0, abs=0.05)
    for name, row in by_name.items():
        if name.startswith("inherited"):
            assert row.estimate == pytest.approx(1.0)
        if name.startswith(("from scratch", "parameters")):
            assert row.estimate == pytest.approx(-1.0)
    both = by_name["both, ranks added, 1 epoch each"]  # opposite ranks cancel
    assert math.isnan(both.estimate)
    assert both.cost_share == pytest.approx(0.2)
    given.images = 4000  # nothing is cheap enough: the shortest is asked, and its share is told
    longer = {
        name: [_done(float(t.values[t.of.epochs]["soft_loss"]), t.of.epochs, 4000) for t in these]
        for name, these in scored.items()
    }
    _, told = table(longer)
    assert told["proxy"] == "inherited (l1), 1 epoch"
    assert told["cost_share"] == pytest.approx(0.4)
    kinds = ["rule"] * 5 + ["uniform"] * 3  # too few of the second to rank
    assert list(proxy_rank.within(told, kinds)) == ["rule (5)"]
    assert proxy_rank.within(told, kinds)["rule (5)"][str(told["proxy"])] == 1.0


def test_quartiles_are_of_all_searches_those_without_an_answer_too() -> None:
    inf = math.inf
    found = quartiles([[inf, 3.0, 1.5], [inf, inf, 2.0], [4.0, 2.0, 1.0]], 1.0)
    assert found == [[None, 2.0, 0.5], [None, 2.0, 0.5], [None, None, 1.0]]


# -- races -----------------------------------------------------------------------------------------


def _write(folder: Path, name: str, losses: np.ndarray) -> None:
    (folder / "work" / name).mkdir(parents=True)
    path = folder / "work" / name / "holdout.safetensors"
    save_file({"soft_loss": losses.astype(np.float32)}, path)


# -- searches on a table ---------------------------------------------------------------------------

FREE = ("depths[2]", "embed_dims[2]", "embed_dims[3]", "mlp_ratio", "mbconv_expand_ratio")
SMALL = {
    "embed_dims": [64, 64, 96, 128],
    "depths": [1, 1, 2, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def lattice() -> Lattice:
    family = get_family("tinyvit")
    seed, context = family.arch(SMALL), Context(32, 10)
    params = family.count_params(seed, context)
    bands = []
    for step in range(1, 5):
        middle = params * (4e5 / params) ** (step / 4)
        bands.append(Band(math.ceil(middle * 0.9), math.floor(middle * 1.1)))
    return lattice_of(family, seed, context, bands, FREE)


@pytest.fixture(scope="module")
def losses(lattice: Lattice) -> dict[str, float]:
    """Additive: every slot has a worth per place, plus a little that is an arch's own."""
    rng = np.random.default_rng(5)
    worth: dict[tuple[str, str], float] = {}
    found = {}
    for key, arch in lattice.archs.items():
        parts = lattice.family.to_dict(arch).items()
        found[key] = 0.01 * float(rng.normal()) + sum(
            worth.setdefault((f, str(v)), float(rng.normal())) for f, v in parts
        )
    return found


def test_the_lattice_is_closed(lattice: Lattice) -> None:
    family, context = lattice.family, lattice.context
    assert set(lattice.final) < set(lattice.archs)
    frozen = ("window_sizes", "head_dim")
    for arch in lattice.archs.values():
        assert contains(family, lattice.seed, arch, context)
        assert all(getattr(arch, f) == getattr(lattice.seed, f) for f in frozen)
        for field, values in family.moves(arch).items():
            own = family.moves(lattice.seed)[field].reshape(-1, values[0].size).tolist()
            assert all(v in own for v in values.reshape(len(values), -1).tolist())
    with pytest.raises(InputError):
        closed(get_family("tinyvit"), lattice.seed, ["embed_dims[9]"])


@pytest.mark.parametrize("proxied", [0, 3])
def test_replays_stay_inside_count_everything_and_only_improve(
    lattice: Lattice, losses: dict[str, float], proxied: int
) -> None:
    best = min(losses[k] for k in lattice.final)
    for name in strategy_names():
        if name == "gp":  # imports torch; the same code as tpe otherwise
            continue
        budget = 1 if name == "uniform" else 12  # which walks far for its last ones
        listed = 1 if name == "uniform" else 4
        settings = Settings(steps=4, shortlist=listed, proxied=proxied, beam=2, budget=budget)
        strategy = get_strategy(name)
        done = replay(lattice, losses, strategy, settings, random_seed=0)
        if name in ("contraction", "evolution"):
            assert done == replay(lattice, losses, strategy, settings, random_seed=0)
        assert 1 <= len(done) <= budget
        assert all(s.key in lattice.archs and s.loss == losses[s.key] for s in done)
        per_step = proxied or 4
        for step in {s.step for s in done}:
            keys = [s.key for s in done if s.step == step]
            assert len(keys) == len(set(keys))
            if not (strategy.stepwise and step == 4):
                assert len(keys) <= per_step
            if strategy.stepwise:
                band = lattice.bands[step - 1]
                sizes = [
                    lattice.family.count_params(lattice.archs[k], lattice.context) for k in keys
                ]
                assert all(band.lo <= size <= band.hi for size in sizes)
        if not strategy.stepwise:
            assert all(s.key in lattice.final for s in done)
            assert len({s.key for s in done}) == len(done)
        curve = best_so_far(done, lattice, 12)
        assert all(a >= b for a, b in itertools.pairwise(curve))
        for slack in (0.0, 0.5, 3.0):  # reaching agrees with the curve, and is monotone in the goal
            after = reached_after(done, lattice, best + slack)
            naive = next((i + 1 for i, v in enumerate(curve) if v <= best + slack), math.inf)
            assert after == naive
        goals = [reached_after(done, lattice, best + s) for s in np.linspace(0, 5, 20)]
        assert goals == sorted(goals, reverse=True)


def test_with_budget_enough_random_search_sees_the_whole_band(
    lattice: Lattice, losses: dict[str, float]
) -> None:
    for proxied in (0, 2):
        settings = Settings(4, 5, proxied, 2, 500)
        done = replay(lattice, losses, get_strategy("random"), settings, random_seed=3)
        assert {s.key for s in done} == lattice.final
        best = min(losses[k] for k in lattice.final)
        assert reached_after(done, lattice, best) <= len(lattice.final)


def test_contraction_goes_on_in_its_last_step_until_nothing_is_left(
    lattice: Lattice, losses: dict[str, float]
) -> None:
    for proxied in (0, 2):
        settings = Settings(4, 5, proxied, 2, 500)
        done = replay(lattice, losses, get_strategy("contraction"), settings, random_seed=3)
        first = [s for s in done if s.step < 4]
        assert len(first) == 3 * (proxied or 5)
        last = [s.key for s in done if s.step == 4]
        whole = replay(
            lattice, losses, get_strategy("contraction"), Settings(4, 500, 0, 2, 500), random_seed=3
        )
        assert len(last) == len(set(last)) > 5
        assert len(whole) < 500


def test_only_archs_of_the_last_band_count_as_found(lattice: Lattice) -> None:
    outside = next(k for k in lattice.archs if k not in lattice.final)
    inside = min(lattice.final)
    done = [Scored(1, outside, -9.0), Scored(2, inside, 1.0)]
    assert reached_after(done, lattice, 1.0) == 2
    assert reached_after(done, lattice, 0.0) == math.inf
    assert best_so_far(done, lattice, 3) == [math.inf, 1.0, 1.0]


def test_searches_that_end_short_are_censored_at_the_budget(lattice: Lattice) -> None:
    inside, settings = min(lattice.final), Settings(4, 5, 0, 2, 20)
    quick, never = [Scored(1, inside, 0.0)], [Scored(1, inside, 5.0)]
    found = {"contraction": [quick] * 6, "random": [never] * 6}
    rows = {r.name: r for r in rows_of(found, lattice, 0.0, -1.0, settings, "smoke", "c")}
    assert rows["contraction: evaluations to within one sd, median"].estimate == 1.0
    late = rows["random: evaluations to within one sd, median"]
    assert (late.estimate, late.lo, late.hi) == (20.0, 20.0, 20.0)
    assert late.note == "censored at the budget"
    assert rows["random: reached within 20 evaluations"].estimate == 0.0
    assert rows["random - contraction"].estimate == 19.0
    # Four steps of five, and two rounds of five: the best is at -1.
    assert rows["contraction: behind the best after the 20 trainings of a run, mean nats"].lo == 1.0
    ended = rows["random: behind the best after the 10 trainings of a run, mean nats"]
    assert (ended.estimate, ended.n) == (6.0, 6)


def test_the_deviation_over_seeds_is_found_again_without_common_shifts() -> None:
    rng = np.random.default_rng(6)
    losses = rng.normal(size=(5, 400)) * 0.3 + rng.normal(size=400) + rng.normal(size=(5, 1)) * 9
    sd, lo, hi = seed_sd(losses)
    assert lo < 0.3 < hi
    assert sd == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(("name", "value"), [("--seeds", "1"), ("--archs", "3")])
def test_too_few_to_rank_are_refused_before_anything_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    assert proxy_rank.main([name, value, "--work", str(tmp_path / "w")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: got {value}, want")
    assert not (tmp_path / "w").exists()
