"""Search strategies: what every list must be, and that learning ones learn."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL_ARCH
from space_cases import FAMILY, random_arch

from nas.search.strategies import SearchState, get_strategy, strategy_names
from nas.search.strategies.encoding import dimensions_of
from nas.search.strategies.optuna_samplers import past_trials, startup_trials
from nas.search.study import Trial
from space import Arch, Context, InputError
from space.contractions import Band, Candidate, baselines_in, contains, count_contractions, propose
from space.freeze import freeze

ALL = strategy_names()
FAST = [name for name in ALL if name != "gp"]
SEEDED = ["random", "evolution", "tpe", "nsga2"]
SMALL = FAMILY.arch({**SMALL_ARCH, "depths": [2, 1, 2, 2]})
DIGITS = Context(48, 10)


def search_state(seed: Arch = SMALL, ctx: Context = DIGITS, **more: object) -> SearchState:
    params = FAMILY.count_params(seed, ctx)
    band = Band(int(0.5 * params), int(0.7 * params))
    state = SearchState(1, 4, 6, 0, FAMILY, ctx, seed, (seed,), band, random_seed=0, baselines=False)
    return replace(state, **more)  # type: ignore[arg-type]


def random_state(rng: random.Random) -> SearchState:
    """Draw a first step's state: any seed, any band, often one with few nets or none."""
    ctx = Context(rng.choice([32, 48, 224]), rng.choice([3, 10, 1000]))
    seed = rng.choice([SMALL, FAMILY.seed("5M"), random_arch(rng, most=128, deepest=2)])
    params, macs = FAMILY.count_params(seed, ctx), FAMILY.count_macs(seed, ctx)
    low = rng.uniform(0.2, 1.0)
    light = int(macs * rng.uniform(0.4, 1.0)) if rng.random() < 0.4 else None
    return search_state(
        seed,
        ctx,
        number=rng.randint(1, 9),
        band=Band(int(low * params), int((low + rng.choice([0.001, 0.1, 0.3])) * params), light),
        random_seed=rng.randint(-5, 2**70),
        baselines=rng.random() < 0.5,
    )


def trial(step: int, candidate: Candidate, **more: object) -> tuple[Trial, Arch]:
    c = candidate
    known = Trial(step, c.key, "", "", "", c.grid_steps, "", c.params, c.params, c.macs)
    return replace(known, **more), c.arch  # type: ignore[arg-type]


def scored(step: int, candidate: Candidate, loss: float) -> tuple[Trial, Arch]:
    return trial(step, candidate, stage="proxy", state="complete", soft_loss=loss)


def decided(state: SearchState, proposed: Sequence[Candidate], rng: random.Random) -> tuple[tuple[Trial, Arch], ...]:
    """Decide candidates at random: scored, passed but not trained, too slow, failed."""
    rows = []
    for candidate in proposed:
        violation = rng.choice([-0.2, 0.0, -0.1, 0.05, 0.4, math.inf])
        if violation <= 0 and rng.random() < 0.8:
            row = scored(state.step, candidate, rng.uniform(0.5, 2.0))
        elif violation == math.inf:
            row = trial(state.step, candidate, stage="throughput", state="failed")
        else:
            row = trial(state.step, candidate, stage="throughput", violation=violation)
        rows.append((replace(row[0], ratio=rng.uniform(1, 2)), row[1]))
    return tuple(rows)


@pytest.mark.parametrize("name", [*FAST, pytest.param("gp", marks=pytest.mark.slow)])
def test_every_list_is_legal_and_repeats_itself(name: str) -> None:
    strategy = get_strategy(name)
    rng = random.Random(f"legal {name}")
    answered = 0
    for _ in range(7):
        state = random_state(rng)
        for step in (1, 2, 3):
            state = replace(state, step=step, draw=rng.choice([0, 0, 1]))
            proposed = strategy.propose(state)
            answered += len(proposed)
            assert proposed == strategy.propose(state)
            assert len(proposed) <= state.number
            keys = [FAMILY.key(s.arch, state.context) for s in proposed]
            assert len(set(keys)) == len(keys)
            assert not set(keys) & state.exclude
            published = baselines_in(FAMILY, [state.seed], state.context, state.band)
            baselines = {FAMILY.key(a, state.context) for _, a in published}
            for s, key in zip(proposed, keys, strict=True):
                assert s.parent == state.seed
                assert state.band.lo <= s.params <= state.band.hi
                assert s.params == FAMILY.count_params(s.arch, state.context)
                assert s.macs == FAMILY.count_macs(s.arch, state.context)
                assert state.band.max_macs is None or s.macs <= state.band.max_macs
                assert contains(FAMILY, state.seed, s.arch, state.context) or key in baselines
                assert s.moved
                assert s.grid_steps >= len(s.moved)
                assert s.baseline is None or (state.baselines and state.draw == 0)
            more = decided(state, proposed, rng)
            again = rng.random() < 0.5  # the same step asks again, or the next one does
            state = replace(state, trials=(*state.trials, *more), exclude=frozenset(keys) if again else frozenset())
    assert answered > (5 if name == "uniform" else 40)  # few scalings fit in a narrow band


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "nsga2" else n for n in SEEDED])
def test_what_was_decided_is_listed_again_only_when_nothing_else_is_left(name: str) -> None:
    strategy, rng = get_strategy(name), random.Random(1)
    ctx = Context(48, 10)
    seed = FAMILY.arch({**FAMILY.to_dict(SMALL), "embed_dims": [32, 32, 64, 64], "depths": [1] * 4})
    params = FAMILY.count_params(seed, ctx)
    state = search_state(seed, ctx, number=7, band=Band(int(0.5 * params), int(0.9 * params)))
    number = count_contractions(FAMILY, seed, ctx, state.band)
    assert 20 < number < 7 * 24
    met: set[str] = set()
    fresh = True
    for step in range(1, 25):
        state = replace(state, step=step, steps=25)
        proposed = strategy.propose(state)
        keys = {FAMILY.key(s.arch, ctx) for s in proposed}
        assert keys, "there is always something to list again"
        if keys & met:
            assert keys <= met
            fresh = False
        assert fresh or keys <= met, "nothing new turns up later"
        met |= keys
        state = replace(state, trials=(*state.trials, *decided(state, proposed, rng)))
    assert not fresh
    assert len(met) == number
    assert strategy.propose(replace(state, exclude=frozenset(met))) == []


@pytest.mark.parametrize("name", SEEDED)
def test_the_random_seed_the_step_and_the_draw_change_the_list(name: str) -> None:
    strategy = get_strategy(name)
    past = decided(search_state(), strategy.propose(search_state(number=12)), random.Random(2))
    for trials in ((), past):
        state = search_state(trials=trials)
        lists = [
            tuple(s.arch for s in strategy.propose(replace(state, **change)))  # type: ignore[arg-type]
            for change in ({}, {"random_seed": 1}, {"step": 2}, {"draw": 1})
        ]
        assert len(set(lists)) == 4


def test_contraction_is_the_shortlist_of_the_incumbents() -> None:
    strategy = get_strategy("Contraction")
    assert [n for n in ALL if get_strategy(n).stepwise] == ["contraction"]
    for draw in (0, 1):
        state = search_state(FAMILY.seed("5M"), random_seed=draw, baselines=True, draw=draw)
        others = tuple(s.arch for s in strategy.propose(replace(state, number=2)))
        params = FAMILY.count_params(state.seed, DIGITS)
        state = replace(state, incumbents=others, band=Band(int(0.3 * params), int(0.5 * params)))
        state = replace(state, exclude=frozenset(FAMILY.key(s.arch, DIGITS) for s in strategy.propose(state)[2:]))
        wanted = {"random_seed": draw, "baselines": draw == 0, "exclude": state.exclude}
        assert strategy.propose(state) == propose(FAMILY, others, DIGITS, state.band, state.number, **wanted)


def test_uniform_scales_widths_first_then_depths_as_well() -> None:
    seed, ctx = FAMILY.seed("21M"), Context(224, 1000)
    params = FAMILY.count_params(FAMILY.seed("5M"), ctx)
    state = search_state(seed, ctx, number=40, band=Band(int(0.9 * params), int(1.1 * params)))
    proposed = get_strategy("uniform").propose(state)
    values = [FAMILY.to_dict(s.arch) for s in proposed]
    kept = {k: v for k, v in FAMILY.to_dict(seed).items() if k not in ("embed_dims", "depths")}
    assert all({k: v[k] for k in kept} == kept for v in values)
    blocks = [sum(v["depths"]) for v in values]
    assert blocks == sorted(blocks, reverse=True)
    assert blocks[0] == sum(FAMILY.to_dict(seed)["depths"]) > blocks[-1]
    for level in set(blocks):
        off = [abs(s.params - params) for s, n in zip(proposed, blocks, strict=True) if n == level]
        assert all(b - a > -2 for a, b in itertools.pairwise(off))
    for v in values:
        ratios = np.array(v["embed_dims"]) / FAMILY.to_dict(seed)["embed_dims"]
        assert ratios.max() - ratios.min() <= 32 / 96  # one grid step of the narrowest


def test_children_of_an_evolution_have_their_parents_genes() -> None:
    """In a band without bounds nothing is moved: half a list differs from a parent in few slots."""
    band = Band(0, 10**9)
    dimensions = dimensions_of(FAMILY, SMALL, DIGITS)
    pool = get_strategy("random").propose(search_state(number=12, band=band))
    trials = tuple(scored(1, s, float(i)) for i, s in enumerate(pool))
    parents = [np.array([g.index(arch) for g in dimensions]) for _, arch in trials[:3]]
    moved, crossed = [], 0
    for k in range(20):
        state = search_state(number=12, band=band, trials=trials, step=2, random_seed=k)
        for i, s in enumerate(get_strategy("evolution").propose(state)):
            code = np.array([g.index(s.arch) for g in dimensions])
            if i < 6:
                moved.append(min(int((code != p).sum()) for p in parents))
            else:
                crossed += any(bool(((code == a) | (code == b)).all()) for a in parents for b in parents)
    share = np.mean(moved) / len(dimensions)
    assert 0.05 < share < 0.2  # 0.1 a slot; some draws repeat the value, some are moved
    assert crossed > 60


def test_too_few_scored_candidates_make_no_parents() -> None:
    evolution, rest = get_strategy("evolution"), get_strategy("random")
    trials = tuple(scored(1, s, 1.0 + i) for i, s in enumerate(rest.propose(search_state(number=12))))
    few, enough = (search_state(number=12, step=2, trials=trials[:n]) for n in (2, 3))
    assert evolution.propose(few) == rest.propose(few)
    assert evolution.propose(enough) != rest.propose(enough)
    assert "until 3 are scored" in evolution.describe(few)


def test_samplers_get_scores_and_violations_and_nothing_else() -> None:
    one, slow, untrained, broken, two, stopped = get_strategy("random").propose(search_state(number=6))
    trials = [
        scored(1, one, 2.0),
        trial(1, slow, stage="throughput", violation=0.3),
        trial(1, untrained, stage="selection"),
        trial(1, broken, stage="proxy", state="failed"),
        scored(1, two, 4.0),
        trial(1, stopped, stage="race", soft_loss=9.0),  # as bad as the worst of a whole training
        trial(2, one, stage="selection"),  # met again, and not trained then
    ]
    assert past_trials(search_state(trials=tuple(trials))) == [
        (one.arch, 2.0, {"violation": 0.0}),
        (slow.arch, 3.0, {"violation": 0.3}),
        (two.arch, 4.0, {"violation": 0.0}),
        (stopped.arch, 4.0, {"violation": 0.0}),
    ]
    without = past_trials(search_state(trials=(trials[0], *trials[4:])))
    assert [bad for _, _, bad in without] == [{}, {}, {}]
    assert past_trials(search_state(trials=(trials[5],))) == [], "worse than what?"
    starts = [startup_trials(search_state(number=n)) for n in (1, 6, 12, 24, 100)]
    assert starts == [5, 5, 6, 10, 10]


CLOSED = FAMILY.arch({**FAMILY.to_dict(SMALL), "embed_dims": [64, 64, 64, 96], "depths": [1, 1, 2, 2]})


def evaluations(name: str, random_seed: int, *, most: int) -> tuple[int, float]:
    """How many candidates are tried until a hidden arch is met, and the least distance to it."""
    band = Band(0, FAMILY.count_params(CLOSED, DIGITS))
    state = search_state(CLOSED, number=5, band=band, random_seed=random_seed)
    dimensions = dimensions_of(FAMILY, CLOSED, DIGITS)
    hidden = get_strategy("random").propose(replace(state, step=99))[0].arch
    done = 0
    while done < most:
        state = replace(state, step=state.step + 1)
        found = []
        for s in get_strategy(name).propose(state):
            done += 1
            if s.arch == hidden:
                return done, 0.0
            away = [abs(g.index(s.arch) - g.index(hidden)) / (len(g.values) - 1) for g in dimensions]
            found.append(scored(state.step, s, sum(away)))
        state = replace(state, trials=(*state.trials, *found))
    return most, min(known.soft_loss or 0.0 for known, _ in state.trials)


@pytest.mark.parametrize(
    "name", ["tpe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("evolution", "nsga2", "gp"))]
)
def test_learning_strategies_find_an_optimum_sooner_than_random(name: str) -> None:
    """One hidden arch of some 5,000; four random seeds, 150 candidates each at most (the slow gp: two, 40)."""
    assert 3_000 < count_contractions(FAMILY, CLOSED, DIGITS, Band(0, 10**9)) < 8_000
    seeds, most = (2, 40) if name == "gp" else (4, 150)
    tries, blind = ([evaluations(n, s, most=most) for s in range(seeds)] for n in (name, "random"))
    assert np.mean([n for n, _ in tries]) < np.mean([n for n, _ in blind])
    assert name == "gp" or np.mean([off for _, off in tries]) < np.mean([off for _, off in blind])


@pytest.mark.parametrize("name", FAST)
def test_frozen_factors_stay_frozen(name: str) -> None:
    family = freeze(FAMILY, SMALL, ["depths", "embed_dims[3]"])
    state = search_state(family=family, baselines=True)
    for step in (1, 2):
        proposed = get_strategy(name).propose(replace(state, step=step))
        assert proposed
        for s in proposed:
            values = FAMILY.to_dict(s.arch)
            assert values["depths"] == [2, 1, 2, 2]
            assert values["embed_dims"][3] == 128
        state = replace(state, trials=decided(state, proposed, random.Random(5)))


def test_an_unknown_strategy_is_refused_with_the_names() -> None:
    with pytest.raises(InputError, match=r"--strategy: got annealing, want one of contraction, "):
        get_strategy("annealing")
    for name in ALL:
        assert get_strategy(name.upper()).name == name
        assert get_strategy(name).summary
        assert get_strategy(name).describe(search_state())


def test_strategies_reports_and_the_driver_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['timm'] = None\n"
        "import nas.contract.final, nas.contract.step, nas.jobs.executor, nas.report, nas.search.constraints\n"
        "from nas.search.strategies import get_strategy, strategy_names, SearchState\n"
        "from space import Context, get_family\n"
        "from space.contractions import Band\n"
        "family = get_family('tinyvit'); seed = family.seed('5M'); ctx = Context(48, 10)\n"
        "params = family.count_params(seed, ctx)\n"
        "band = Band(int(0.6 * params), int(0.7 * params))\n"
        "state = SearchState(1, 2, 4, 0, family, ctx, seed, (seed,), band, 0, True)\n"
        "assert all(get_strategy(n).propose(state) for n in strategy_names())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
