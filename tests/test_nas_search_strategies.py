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
from space_cases import FAMILY, random_arch

from nas.search.strategies import Ask, Seen, get_strategy, strategy_names
from nas.search.strategies.encoding import dimensions_of
from nas.search.strategies.optuna_samplers import startup, told
from space import Arch, Context, InputError
from space.contractions import Band, Candidate, anchors_in, contains, count_contractions, propose
from space.freeze import freeze

ALL = strategy_names()
FAST = [name for name in ALL if name != "gp"]
SEEDED = ["random", "evolution", "tpe", "nsga2"]
SMALL = FAMILY.arch(
    {
        "embed_dims": [64, 64, 96, 128],
        "depths": [2, 1, 2, 2],
        "window_sizes": [7, 14, 7],
        "mbconv_expand_ratio": 4.0,
        "mlp_ratio": 4.0,
        "head_dim": 32,
    }
)
DIGITS = Context(48, 10)


def question(seed: Arch = SMALL, ctx: Context = DIGITS, **more: object) -> Ask:
    params = FAMILY.count_params(seed, ctx)
    ask = Ask(
        step=1,
        steps=4,
        number=6,
        draw=0,
        family=FAMILY,
        context=ctx,
        seed=seed,
        incumbents=(seed,),
        band=Band(int(0.5 * params), int(0.7 * params)),
        random_seed=0,
        baselines=False,
    )
    return replace(ask, **more)  # type: ignore[arg-type]


def random_question(rng: random.Random) -> Ask:
    """Draw a question of a first step: any seed, any band, often one with few nets or none."""
    ctx = Context(rng.choice([32, 48, 224]), rng.choice([3, 10, 1000]))
    seed = rng.choice([SMALL, FAMILY.seed("5M"), random_arch(rng, most=128, deepest=2)])
    params, macs = FAMILY.count_params(seed, ctx), FAMILY.count_macs(seed, ctx)
    low = rng.uniform(0.2, 1.0)
    light = int(macs * rng.uniform(0.4, 1.0)) if rng.random() < 0.4 else None
    return question(
        seed,
        ctx,
        number=rng.randint(1, 9),
        band=Band(int(low * params), int((low + rng.choice([0.001, 0.1, 0.3])) * params), light),
        random_seed=rng.randint(-5, 2**70),
        baselines=rng.random() < 0.5,
    )


def decided(ask: Ask, listed: Sequence[Candidate], rng: random.Random) -> tuple[Seen, ...]:
    """Decide a list at random: scored, passed but not trained, too slow, failed."""
    rows = []
    for s in listed:
        violation = rng.choice([-0.2, 0.0, -0.1, 0.05, 0.4, math.inf])
        loss = rng.uniform(0.5, 2.0) if violation <= 0 and rng.random() < 0.8 else None
        key = FAMILY.key(s.arch, ask.context)
        rows.append(Seen(ask.step, s.arch, key, s.params, violation, loss, rng.uniform(1, 2)))
    return tuple(rows)


@pytest.mark.parametrize("name", FAST)
def test_every_list_is_legal_and_repeats_itself(name: str) -> None:
    strategy = get_strategy(name)
    rng = random.Random(f"legal {name}")
    answered = 0
    for _ in range(7):
        ask = random_question(rng)
        for step in (1, 2, 3):
            ask = replace(ask, step=step, draw=rng.choice([0, 0, 1]))
            listed = strategy.propose(ask)
            answered += len(listed)
            assert listed == strategy.propose(ask)
            assert len(listed) <= ask.number
            keys = [FAMILY.key(s.arch, ask.context) for s in listed]
            assert len(set(keys)) == len(keys)
            assert not set(keys) & ask.exclude
            baselines = {FAMILY.key(a, ask.context) for _, a in anchors_of(ask)}
            for s, key in zip(listed, keys, strict=True):
                assert s.parent == ask.seed
                assert ask.band.lo <= s.params <= ask.band.hi
                assert s.params == FAMILY.count_params(s.arch, ask.context)
                assert s.macs == FAMILY.count_macs(s.arch, ask.context)
                assert ask.band.max_macs is None or s.macs <= ask.band.max_macs
                assert contains(FAMILY, ask.seed, s.arch, ask.context) or key in baselines
                assert s.moved
                assert s.grid_steps >= len(s.moved)
                assert s.baseline is None or (ask.baselines and ask.draw == 0)
            more = decided(ask, listed, rng)
            again = rng.random() < 0.5  # the same step asks again, or the next one does
            ask = replace(
                ask, seen=(*ask.seen, *more), exclude=frozenset(keys) if again else frozenset()
            )
    assert answered > (5 if name == "uniform" else 40)  # few scalings fit in a narrow band


def anchors_of(ask: Ask) -> list[tuple[str, Arch]]:
    return anchors_in(FAMILY, [ask.seed], ask.context, ask.band)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "nsga2" else n for n in SEEDED]
)
def test_what_was_decided_is_listed_again_only_when_nothing_else_is_left(name: str) -> None:
    strategy, rng = get_strategy(name), random.Random(1)
    ctx = Context(48, 10)
    seed = FAMILY.arch({**FAMILY.to_dict(SMALL), "embed_dims": [32, 32, 64, 64], "depths": [1] * 4})
    params = FAMILY.count_params(seed, ctx)
    ask = question(seed, ctx, number=7, band=Band(int(0.5 * params), int(0.9 * params)))
    number = count_contractions(FAMILY, seed, ctx, ask.band)
    assert 20 < number < 7 * 24
    met: set[str] = set()
    fresh = True
    for step in range(1, 25):
        ask = replace(ask, step=step, steps=25)
        listed = strategy.propose(ask)
        keys = {FAMILY.key(s.arch, ctx) for s in listed}
        assert keys, "there is always something to list again"
        if keys & met:
            assert keys <= met
            fresh = False
        assert fresh or keys <= met, "nothing new turns up later"
        met |= keys
        ask = replace(ask, seen=(*ask.seen, *decided(ask, listed, rng)))
    assert not fresh
    assert len(met) == number
    assert strategy.propose(replace(ask, exclude=frozenset(met))) == []


@pytest.mark.parametrize("name", SEEDED)
def test_the_random_seed_the_step_and_the_draw_change_the_list(name: str) -> None:
    strategy = get_strategy(name)
    past = decided(question(), strategy.propose(question(number=12)), random.Random(2))
    for seen in ((), past):
        ask = question(seen=seen)
        lists = [
            tuple(s.arch for s in strategy.propose(replace(ask, **change)))  # type: ignore[arg-type]
            for change in ({}, {"random_seed": 1}, {"step": 2}, {"draw": 1})
        ]
        assert len(set(lists)) == 4


def test_contraction_is_the_shortlist_of_the_incumbents() -> None:
    rng = random.Random(3)
    strategy = get_strategy("Contraction")
    assert strategy.stepwise
    assert [n for n in ALL if get_strategy(n).stepwise] == ["contraction"]
    for draw in (0, 1):
        ask = question(FAMILY.seed("5M"), random_seed=rng.randint(0, 9), baselines=True, draw=draw)
        others = tuple(s.arch for s in strategy.propose(replace(ask, number=2)))
        params = FAMILY.count_params(ask.seed, DIGITS)
        ask = replace(ask, incumbents=others, band=Band(int(0.3 * params), int(0.5 * params)))
        tried = frozenset(FAMILY.key(s.arch, DIGITS) for s in strategy.propose(ask)[2:])
        ask = replace(ask, exclude=tried)
        assert strategy.propose(ask) == propose(
            FAMILY,
            others,
            DIGITS,
            ask.band,
            ask.number,
            random_seed=ask.random_seed,
            baselines=draw == 0,
            exclude=tried,
        )


def test_uniform_scales_widths_first_then_depths_as_well() -> None:
    seed, ctx = FAMILY.seed("21M"), Context(224, 1000)
    params = FAMILY.count_params(FAMILY.seed("5M"), ctx)
    ask = question(seed, ctx, number=40, band=Band(int(0.9 * params), int(1.1 * params)))
    listed = get_strategy("uniform").propose(ask)
    values = [FAMILY.to_dict(s.arch) for s in listed]
    kept = {k: v for k, v in FAMILY.to_dict(seed).items() if k not in ("embed_dims", "depths")}
    assert all({k: v[k] for k in kept} == kept for v in values)
    blocks = [sum(v["depths"]) for v in values]
    assert blocks == sorted(blocks, reverse=True)
    assert blocks[0] == sum(FAMILY.to_dict(seed)["depths"]) > blocks[-1]
    for level in set(blocks):
        off = [abs(s.params - params) for s, n in zip(listed, blocks, strict=True) if n == level]
        assert all(b - a > -2 for a, b in itertools.pairwise(off))
    for v in values:
        ratios = np.array(v["embed_dims"]) / FAMILY.to_dict(seed)["embed_dims"]
        assert ratios.max() - ratios.min() <= 32 / 96  # one grid step of the narrowest


def test_children_of_an_evolution_have_their_parents_genes() -> None:
    """In a band without bounds nothing is moved: half a list differs from a parent in few slots."""
    band = Band(0, 10**9)
    dimensions = dimensions_of(FAMILY, SMALL, DIGITS)
    pool = get_strategy("random").propose(question(number=12, band=band))
    seen = tuple(
        Seen(1, s.arch, FAMILY.key(s.arch, DIGITS), s.params, -0.1, float(i))
        for i, s in enumerate(pool)
    )
    parents = [np.array([g.index(s.arch) for g in dimensions]) for s in seen[:3]]
    moved, crossed = [], 0
    for k in range(20):
        ask = question(number=12, band=band, seen=seen, step=2, random_seed=k)
        for i, s in enumerate(get_strategy("evolution").propose(ask)):
            code = np.array([g.index(s.arch) for g in dimensions])
            if i < 6:
                moved.append(min(int((code != p).sum()) for p in parents))
            else:
                crossed += any(
                    bool(((code == a) | (code == b)).all()) for a in parents for b in parents
                )
    share = np.mean(moved) / len(dimensions)
    assert 0.05 < share < 0.2  # 0.1 a slot; some draws repeat the value, some are moved
    assert crossed > 60


def test_too_few_scored_candidates_make_no_parents() -> None:
    evolution, rest = get_strategy("evolution"), get_strategy("random")
    listed = rest.propose(question(number=12))
    seen = tuple(
        Seen(1, s.arch, FAMILY.key(s.arch, DIGITS), s.params, -0.1, 1.0 + i)
        for i, s in enumerate(listed)
    )
    few, enough = (question(number=12, step=2, seen=seen[:n]) for n in (2, 3))
    assert evolution.propose(few) == rest.propose(few)
    assert evolution.propose(enough) != rest.propose(enough)
    assert "until 3 are scored" in evolution.describe(few)


def test_samplers_are_told_scores_and_violations_and_nothing_else() -> None:
    listed = get_strategy("random").propose(question(number=6))
    ways = [(-0.1, 2.0), (0.3, None), (-0.1, None), (math.inf, None), (0.0, 4.0), (-0.1, None)]
    seen = [
        Seen(1, s.arch, FAMILY.key(s.arch, DIGITS), s.params, violation, loss)
        for s, (violation, loss) in zip(listed, ways, strict=True)
    ]
    seen[5] = replace(seen[5], stopped=True)  # by a race: as bad as the worst that is known
    seen.append(replace(seen[0], step=2, loss=None))  # met again, and not trained then
    answers = [(t.key, value, dict(bad)) for t, value, bad in told(question(seen=tuple(seen)))]
    assert answers == [
        (seen[0].key, 2.0, {"violation": -0.1}),
        (seen[1].key, 3.0, {"violation": 0.3}),
        (seen[4].key, 4.0, {"violation": 0.0}),
        (seen[5].key, 4.0, {"violation": -0.1}),
    ]
    assert [bad for _, _, bad in told(question(seen=(seen[0], *seen[4:])))] == [{}, {}, {}]
    assert told(question(seen=(seen[5],))) == [], "worse than what?"
    assert [startup(question(number=n)) for n in (1, 6, 12, 24, 100)] == [5, 5, 6, 10, 10]


CLOSED = FAMILY.arch(
    {**FAMILY.to_dict(SMALL), "embed_dims": [64, 64, 64, 96], "depths": [1, 1, 2, 2]}
)


def evaluations(name: str, random_seed: int, *, most: int = 150) -> tuple[int, float]:
    """How many candidates are tried until a hidden arch is met, and the least distance to it."""
    band = Band(0, FAMILY.count_params(CLOSED, DIGITS))
    ask = question(CLOSED, number=5, band=band, random_seed=random_seed)
    dimensions = dimensions_of(FAMILY, CLOSED, DIGITS)
    hidden = get_strategy("random").propose(replace(ask, step=99))[0].arch
    done = 0
    while done < most:
        ask = replace(ask, step=ask.step + 1)
        found = []
        for s in get_strategy(name).propose(ask):
            done += 1
            if s.arch == hidden:
                return done, 0.0
            away = [
                abs(d.index(s.arch) - d.index(hidden)) / (len(d.values) - 1) for d in dimensions
            ]
            key = FAMILY.key(s.arch, DIGITS)
            found.append(Seen(ask.step, s.arch, key, s.params, -0.1, sum(away)))
        ask = replace(ask, seen=(*ask.seen, *found))
    return most, min(s.loss for s in ask.seen if s.loss is not None)


@pytest.mark.parametrize(
    "name",
    [
        "tpe",
        pytest.param("evolution", marks=pytest.mark.slow),
        pytest.param("nsga2", marks=pytest.mark.slow),
    ],
)
def test_learning_strategies_find_an_optimum_sooner_than_random(name: str) -> None:
    """One hidden arch of some 5,000; four random seeds, 150 candidates each at most."""
    assert 3_000 < count_contractions(FAMILY, CLOSED, DIGITS, Band(0, 10**9)) < 8_000
    tries = [evaluations(name, s) for s in range(4)]
    blind = [evaluations("random", s) for s in range(4)]
    assert np.mean([n for n, _ in tries]) < np.mean([n for n, _ in blind])
    assert np.mean([off for _, off in tries]) < np.mean([off for _, off in blind])


@pytest.mark.slow
def test_the_gaussian_process_is_legal_and_finds_an_optimum_sooner_than_random() -> None:
    strategy, rng = get_strategy("gp"), random.Random(4)
    ask = question(number=4)
    for step in (1, 2, 3):
        ask = replace(ask, step=step)
        listed = strategy.propose(ask)
        assert listed == strategy.propose(ask)
        keys = {FAMILY.key(s.arch, DIGITS) for s in listed}
        assert len(keys) == 4
        assert not keys & {s.key for s in ask.seen}
        assert all(ask.band.lo <= s.params <= ask.band.hi for s in listed)
        assert all(contains(FAMILY, SMALL, s.arch, DIGITS) for s in listed)
        ask = replace(ask, seen=(*ask.seen, *decided(ask, listed, rng)))
    tries = [evaluations("gp", s, most=40) for s in range(2)]
    blind = [evaluations("random", s, most=40) for s in range(2)]
    assert np.mean([n for n, _ in tries]) < np.mean([n for n, _ in blind])


@pytest.mark.parametrize("name", FAST)
def test_frozen_factors_stay_frozen(name: str) -> None:
    family = freeze(FAMILY, SMALL, ["depths", "embed_dims[3]"])
    ask = question(family=family, baselines=True)
    for step in (1, 2):
        listed = get_strategy(name).propose(replace(ask, step=step))
        assert listed
        for s in listed:
            values = FAMILY.to_dict(s.arch)
            assert values["depths"] == [2, 1, 2, 2]
            assert values["embed_dims"][3] == 128
        ask = replace(ask, seen=decided(ask, listed, random.Random(5)))


def test_an_unknown_strategy_is_refused_with_the_names() -> None:
    with pytest.raises(InputError, match=r"--strategy: got annealing, want one of contraction, "):
        get_strategy("annealing")
    for name in ALL:
        assert get_strategy(name.upper()).name == name
        assert get_strategy(name).summary
        assert get_strategy(name).describe(question())


def test_strategies_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from nas.search.strategies import get_strategy, strategy_names, Ask\n"
        "from space import Context, get_family\n"
        "from space.contractions import Band\n"
        "family = get_family('tinyvit'); seed = family.seed('5M'); ctx = Context(48, 10)\n"
        "params = family.count_params(seed, ctx)\n"
        "band = Band(int(0.6 * params), int(0.7 * params))\n"
        "ask = Ask(1, 2, 4, 0, family, ctx, seed, (seed,), band, 0, True)\n"
        "assert all(get_strategy(n).propose(ask) for n in strategy_names())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
