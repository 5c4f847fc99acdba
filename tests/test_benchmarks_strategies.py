"""Strategies replayed on a closed table: they stay inside, count everything and repeat."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.strategies.__main__ import main, quartiles, rows_of
from benchmarks.strategies.replay import (
    Lattice,
    ReplaySettings,
    Scored,
    best_so_far,
    closed,
    lattice_of,
    reached_after,
    replay,
)
from nas.search.strategies import get_strategy, strategy_names
from space import Context, get_family
from space.contractions import Band, contains
from space.errors import InputError
from tests.conftest import SMALL_ARCH as SMALL

FREE = ("depths[2]", "embed_dims[2]", "embed_dims[3]", "mlp_ratio", "mbconv_expand_ratio")


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


@pytest.mark.parametrize("train_per_step", [0, 3])
@pytest.mark.parametrize("name", [n for n in strategy_names() if n != "gp"])  # which imports torch; else as tpe
def test_replays_stay_inside_count_everything_and_only_improve(
    lattice: Lattice, losses: dict[str, float], name: str, train_per_step: int
) -> None:
    budget, listed = (1, 1) if name == "uniform" else (12, 4)  # uniform walks far for its last ones
    settings = ReplaySettings(4, listed, train_per_step, 2, budget)
    strategy = get_strategy(name)
    done = replay(lattice, losses, strategy, settings, random_seed=0)
    if name in ("contraction", "evolution"):
        assert done == replay(lattice, losses, strategy, settings, random_seed=0)
    assert 1 <= len(done) <= budget
    assert all(s.key in lattice.archs and s.loss == losses[s.key] for s in done)
    for step in {s.step for s in done}:
        keys = [s.key for s in done if s.step == step]
        assert len(keys) == len(set(keys))
        if not (strategy.stepwise and step == 4):
            assert len(keys) <= (train_per_step or 4)
        if strategy.stepwise:
            band = lattice.bands[step - 1]
            sizes = [lattice.family.count_params(lattice.archs[k], lattice.context) for k in keys]
            assert all(band.lo <= size <= band.hi for size in sizes)
    if not strategy.stepwise:
        assert all(s.key in lattice.final for s in done)
        assert len({s.key for s in done}) == len(done)
    curve, best = best_so_far(done, lattice, 12), min(losses[k] for k in lattice.final)
    assert all(a >= b for a, b in itertools.pairwise(curve))
    goals = [reached_after(done, lattice, best + slack) for slack in np.linspace(0, 5, 20)]
    assert goals == sorted(goals, reverse=True)


@pytest.mark.parametrize("train_per_step", [0, 2])
def test_with_budget_enough_the_whole_band_is_seen(
    lattice: Lattice, losses: dict[str, float], train_per_step: int
) -> None:
    """By random search; contraction goes on in its last step until nothing is left."""
    settings = ReplaySettings(4, 5, train_per_step, 2, 500)
    done = replay(lattice, losses, get_strategy("random"), settings, random_seed=3)
    assert {s.key for s in done} == lattice.final
    assert reached_after(done, lattice, min(losses[k] for k in lattice.final)) <= len(lattice.final)
    done = replay(lattice, losses, get_strategy("contraction"), settings, random_seed=3)
    assert len([s for s in done if s.step < 4]) == 3 * (train_per_step or 5)
    last = [s.key for s in done if s.step == 4]
    assert 5 < len(last) == len(set(last))
    assert len(done) < 500


def test_only_archs_of_the_last_band_count_as_found(lattice: Lattice) -> None:
    outside = next(k for k in lattice.archs if k not in lattice.final)
    inside = min(lattice.final)
    done = [Scored(1, outside, -9.0), Scored(2, inside, 1.0)]
    assert reached_after(done, lattice, 1.0) == 2
    assert reached_after(done, lattice, 0.0) == math.inf
    assert best_so_far(done, lattice, 3) == [math.inf, 1.0, 1.0]


def test_searches_that_end_short_are_censored_at_the_budget(lattice: Lattice) -> None:
    inside, settings = min(lattice.final), ReplaySettings(4, 5, 0, 2, 20)
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


def test_quartiles_are_of_all_searches_those_without_an_answer_too() -> None:
    inf = math.inf
    found = quartiles([[inf, 3.0, 1.5], [inf, inf, 2.0], [4.0, 2.0, 1.0]], 1.0)
    assert found == [[None, 2.0, 0.5], [None, 2.0, 0.5], [None, None, 1.0]]


@pytest.mark.slow
def test_a_committed_table_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.csv"
    words = ["--replays", "2", "--evaluations", "12", "--strategies", "contraction,random"]
    assert main([*words, "--workers", "1", "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["archs"], told["final"], told["in_reach"]) == (75, 75, 2)
    assert len(out.read_text().splitlines()) == 8
    assert out.with_suffix(".png").stat().st_size > 1000
