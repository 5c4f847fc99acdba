"""Draws from a band and the nearest contraction, against everything written out one by one."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from space_cases import FAMILY, SMALL, random_arch

from space import Arch, Context
from space import sampling as module
from space.contractions import Band, contains, count_contractions
from space.sampling import nearest, sample_band


def random_origin(rng: random.Random) -> tuple[Arch, Context]:
    """Draw an arch whose product of moves is short, and a context, often with small maps."""
    while True:
        if rng.random() < 0.5:
            origin = FAMILY.arch(SMALL | {"mlp_ratio": rng.choice([2.0, 3.0])})
        else:
            origin = random_arch(rng, most=96, deepest=2)
        if 8 <= np.prod([len(v) for v in FAMILY.moves(origin).values()]) <= 1500:
            return origin, Context(rng.choice([32, 48, 64, 224]), rng.choice([3, 10, 1000]))


def written(origin: Arch, ctx: Context) -> dict[str, list[Arch]]:
    """Every contraction: key -> all ways in which it can be written from the moves."""
    moves = FAMILY.moves(origin)
    found: dict[str, list[Arch]] = {}
    for values in itertools.product(*(v.tolist() for v in moves.values())):
        fields: dict[str, Any] = dict(zip(moves, values, strict=True))
        if any(d % fields["head_dim"] for d in fields["embed_dims"][1:]):
            continue
        if fields["embed_dims"][0] % 2:
            continue
        arch = FAMILY.arch(fields)
        found.setdefault(FAMILY.key(arch, ctx), []).append(arch)
    limit = FAMILY.count_params(origin, ctx)
    return {k: a for k, a in found.items() if FAMILY.count_params(a[0], ctx) < limit}


def random_band(rng: random.Random, origin: Arch, ctx: Context) -> Band:
    params, macs = FAMILY.count_params(origin, ctx), FAMILY.count_macs(origin, ctx)
    low, high = sorted((rng.uniform(0.1, 1.1), rng.uniform(0.1, 1.1)))
    light = int(macs * rng.uniform(0.3, 1.0)) if rng.random() < 0.4 else None
    return Band(int(params * low), int(params * high), light)


def inside(everything: dict[str, list[Arch]], band: Band, ctx: Context) -> dict[str, list[Arch]]:
    return {
        key: archs
        for key, archs in everything.items()
        if band.lo <= FAMILY.count_params(archs[0], ctx) <= band.hi
        and (band.max_macs is None or FAMILY.count_macs(archs[0], ctx) <= band.max_macs)
    }


@pytest.fixture(params=["walked", "drawn", "drawn, then walked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take each of the ways to a draw, which small products would not."""
    if request.param != "walked":
        monkeypatch.setattr(module, "SHORT", 0)
        monkeypatch.setattr(module, "CHUNK", 16)
        monkeypatch.setattr(module, "TRIES", {"drawn": 1 << 12, "drawn, then walked": 32}[request.param])


@pytest.mark.usefixtures("way")
def test_a_draw_to_the_end_meets_every_contraction_of_the_band_once() -> None:
    rng = random.Random(0)
    for _ in range(4):
        origin, ctx = random_origin(rng)
        band = random_band(rng, origin, ctx)
        expected = inside(written(origin, ctx), band, ctx)
        assert len(expected) == count_contractions(FAMILY, origin, ctx, band)
        seed = rng.randint(-5, 2**70)
        drawn = sample_band(FAMILY, origin, ctx, band, len(expected) + 5, random_seed=seed)
        keys = [FAMILY.key(a, ctx) for a in drawn]
        assert sorted(keys) == sorted(expected)
        assert all(contains(FAMILY, origin, a, ctx) for a in drawn[:20])
        cut, left = rng.randint(0, len(keys)), rng.randint(1, 9)
        assert sample_band(FAMILY, origin, ctx, band, cut, random_seed=seed) == drawn[:cut]
        more = sample_band(FAMILY, origin, ctx, band, left, random_seed=seed, exclude=keys[:cut])
        assert more == drawn[cut : cut + left]


@pytest.mark.usefixtures("way")
def test_each_contraction_is_equally_likely() -> None:
    """Pearson's statistic of first and of second draws; the bound is five deviations."""
    origin, ctx = FAMILY.arch(SMALL), Context(48, 10)
    params = FAMILY.count_params(origin, ctx)
    band = Band(int(0.93 * params), int(0.97 * params))
    number, repeats = count_contractions(FAMILY, origin, ctx, band), 600
    assert 5 <= number <= 100
    drawn = [sample_band(FAMILY, origin, ctx, band, 2, random_seed=s) for s in range(repeats)]
    for place in (0, 1):
        times = Counter(FAMILY.key(pair[place], ctx) for pair in drawn)
        expected = repeats / number
        off = sum((n - expected) ** 2 / expected for n in times.values())
        off += (number - len(times)) * expected
        assert abs(off - (number - 1)) < 5 * (2 * (number - 1)) ** 0.5


def test_the_nearest_is_the_nearest_of_all() -> None:
    rng = random.Random(1)
    nothing = 0
    for _ in range(5):
        origin, ctx = random_origin(rng)
        everything = written(origin, ctx)
        for _ in range(8):
            band = random_band(rng, origin, ctx)
            fits = inside(everything, band, ctx)
            wanted: Any = random_arch(rng, most=128)
            if rng.random() < 0.5:  # a point of the moves that need not be an arch
                moves = FAMILY.moves(origin).items()
                wanted = {f: v[rng.randrange(len(v))].tolist() for f, v in moves}
            exclude = rng.sample(sorted(fits), rng.randint(0, min(5, len(fits))))
            seed = rng.randint(-5, 2**70)
            ask = {"random_seed": seed, "exclude": exclude}
            found = nearest(FAMILY, origin, wanted, ctx, band, **ask)
            assert found == nearest(FAMILY, origin, wanted, ctx, band, **ask)
            left = {k: a for k, a in fits.items() if k not in exclude}
            if found is None:
                nothing += 1
                assert not left
                continue
            away = {k: min(steps_to(wanted, a, ctx) for a in archs) for k, archs in left.items()}
            assert away[FAMILY.key(found, ctx)] == min(away.values())
    assert 0 < nothing < 25


def steps_to(wanted: Any, arch: Arch, ctx: Context) -> int:
    """Grid steps from a point to one way of writing an arch; parts built alike are none apart."""
    values = FAMILY.to_dict(wanted) if isinstance(wanted, Arch) else wanted
    total = 0
    for f in FAMILY.factors:
        one, other = (np.array(v) for v in (values[f.field], getattr(arch, f.field)))
        built = (FAMILY.effective({f.field: v[None]}, ctx)[f.field] for v in (one, other))
        if not np.array_equal(*built):
            pairs = zip(f.choices, one.reshape(-1), other.reshape(-1), strict=True)
            total += sum(choices.steps(a, b) for choices, a, b in pairs)
    return total


def test_ties_fall_by_the_random_seed() -> None:
    origin, ctx = FAMILY.seed("21M"), Context(224, 1000)
    params = FAMILY.count_params(origin, ctx)
    band = Band(int(0.8 * params), params)
    found = {nearest(FAMILY, origin, origin, ctx, band, random_seed=s) for s in range(20)}
    assert len(found) > 3
    assert len({steps_to(origin, a, ctx) for a in found if a is not None}) == 1


def test_the_21m_is_searched_well_within_a_second() -> None:
    origin, ctx = FAMILY.seed("21M"), Context(224, 1000)
    params = FAMILY.count_params(FAMILY.seed("5M"), ctx)
    band = Band(int(0.9 * params), int(1.1 * params))
    rng = random.Random(2)
    moves = FAMILY.moves(origin).items()
    points = [{f: v[rng.randrange(len(v))].tolist() for f, v in moves} for _ in range(4)]
    for wanted in (origin, FAMILY.seed("5M"), *points):
        start = time.process_time()
        found = nearest(FAMILY, origin, wanted, ctx, band, random_seed=0)
        assert found is not None
        assert time.process_time() - start < 1.0
    assert nearest(FAMILY, origin, FAMILY.seed("5M"), ctx, band, random_seed=0) == FAMILY.seed("5M")
    start = time.process_time()
    assert len(sample_band(FAMILY, origin, ctx, band, 50, random_seed=0)) == 50
    assert time.process_time() - start < 1.0
