"""Contractions: the set against its definition, the shortlist against its rule."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import space_cases
from space_cases import FAMILY, random_arch, random_context

from space import Arch, Context, InputError
from space.contractions import Band, Candidate, contains, count_contractions, propose

IMAGENET, DIGITS = Context(224, 1000), Context(48, 10)
CONTEXTS = pytest.mark.parametrize("ctx", [IMAGENET, DIGITS], ids=["imagenet", "digits"])
SMALL = FAMILY.arch(space_cases.SMALL)


def reached(start: float, grid: list[float], down: bool, up: int) -> list[tuple[float, int]]:
    """What one slot may become, and how far away: written from the issue, not from the code."""
    below = [(v, n + 1) for n, v in enumerate(sorted((v for v in grid if v < start), reverse=True))]
    above = [(v, n + 1) for n, v in enumerate(sorted(v for v in grid if v > start))]
    return [(start, 0), *(below if down else []), *above[:up]]


def by_definition(arch: Arch, ctx: Context) -> dict[str, tuple[Arch, int, frozenset[str]]]:
    """Every contraction of an arch, one by one: key -> (arch, grid steps, fields moved)."""
    a = FAMILY.to_dict(arch)
    dims = [reached(d, list(range(32, 2000, 32)), True, 1) for d in a["embed_dims"]]
    depths = [reached(n, list(range(1, n + 1)), True, 0) for n in a["depths"]]
    windows = [reached(w, [7, 14], True, 2) for w in a["window_sizes"][:2]]
    ratios = [reached(a[f], [2.0, 3.0, 4.0], True, 0) for f in ("mbconv_expand_ratio", "mlp_ratio")]
    heads = reached(a["head_dim"], [16, 32], True, 2)
    limit = FAMILY.count_params(arch, ctx)
    found: dict[str, tuple[Arch, int, frozenset[str]]] = {}
    for d in itertools.product(*dims):
        widths = [v for v, _ in d]
        if widths != sorted(widths) and widths != a["embed_dims"]:
            continue
        for n, w, r, m, e in itertools.product(itertools.product(*depths), itertools.product(*windows), *ratios, heads):
            if any(v % e[0] for v in widths[1:]):
                continue
            fields = {"embed_dims": d, "depths": n, "window_sizes": w}
            values: dict[str, Any] = {f: [v for v, _ in moves] for f, moves in fields.items()}
            values["window_sizes"].append(a["window_sizes"][2])
            values |= {"mbconv_expand_ratio": r[0], "mlp_ratio": m[0], "head_dim": e[0]}
            child = FAMILY.arch(values)
            steps = {f: sum(s for _, s in moves) for f, moves in fields.items()}
            steps |= {"mbconv_expand_ratio": r[1], "mlp_ratio": m[1], "head_dim": e[1]}
            if FAMILY.count_params(child, ctx) >= limit:
                continue
            key, total = FAMILY.key(child, ctx), sum(steps.values())
            if key not in found or total < found[key][1]:
                found[key] = child, total, frozenset(f for f, s in steps.items() if s)
    return found


OFF_GRID = FAMILY.arch(
    space_cases.SMALL
    | {"embed_dims": [30, 48, 96, 72], "window_sizes": [10, 3, 5], "head_dim": 24}
    | {"mbconv_expand_ratio": 2.5, "mlp_ratio": 1.5}
)


@pytest.mark.parametrize(
    ("arch", "ctx"),
    [(SMALL, IMAGENET), (SMALL, DIGITS), (SMALL, Context(32, 3)), (OFF_GRID, IMAGENET)],
    ids=["imagenet", "digits", "tiny", "off-grid"],
)
def test_the_set_is_its_definition(arch: Arch, ctx: Context) -> None:
    expected = by_definition(arch, ctx)
    sizes = {k: FAMILY.count_params(a, ctx) for k, (a, _, _) in expected.items()}
    assert count_contractions(FAMILY, arch, ctx, Band(0, 10**12)) == len(expected)
    for low, high in ((0.3, 0.5), (0.5, 0.9), (0.9, 1.0)):
        ordered = sorted(sizes.values())
        band = Band(ordered[int(low * len(ordered))], ordered[int(high * len(ordered)) - 1])
        inside = {k for k, n in sizes.items() if band.lo <= n <= band.hi}
        assert count_contractions(FAMILY, arch, ctx, band) == len(inside)
        listed = draw([arch], ctx, band, 60, baselines=False)
        keys = [FAMILY.key(s.arch, ctx) for s in listed]
        assert set(keys) <= inside
        assert len(listed) == min(60, len(inside))
        # Fewest steps first: nobody left out is nearer than the farthest on the list.
        steps = [expected[k][1] for k in keys]
        assert [s.grid_steps for s in listed] == steps == sorted(steps)
        assert [frozenset(s.moved) for s in listed] == [expected[k][2] for k in keys]
        rest = [expected[k][1] for k in inside - set(keys)]
        assert not rest or min(rest) >= max(steps)


def draw(parents: list[Arch], ctx: Context, band: Band, size: int = 24, **more: object) -> list[Candidate]:
    return propose(FAMILY, parents, ctx, band, size, **{"random_seed": 0, **more})


def steps_between(parent: Arch, child: Arch) -> int:
    return sum(int(n[0]) for n in FAMILY.grid_steps(parent, FAMILY.table([child])).values())


def around(name: str, ctx: Context, tolerance: float = 0.1) -> Band:
    params = FAMILY.count_params(FAMILY.seed(name), ctx)
    return Band(int(params * (1 - tolerance)), int(params * (1 + tolerance)))


@CONTEXTS
@pytest.mark.parametrize(("large", "small", "grid_steps"), [("21M", "11M", 11), ("11M", "5M", 7), ("21M", "5M", 18)])
def test_published_models_are_contractions_of_each_other(large: str, small: str, grid_steps: int, ctx: Context) -> None:
    parent, child = FAMILY.seed(large), FAMILY.seed(small)
    assert contains(FAMILY, parent, child, ctx)
    assert not contains(FAMILY, child, parent, ctx)
    params = FAMILY.count_params(child, ctx)
    exactly = Band(params, params)
    assert count_contractions(FAMILY, parent, ctx, exactly) >= 1
    everything = draw([parent], ctx, exactly, 500, baselines=False)
    assert child in [s.arch for s in everything]  # the rule reaches it when nothing else is left
    (baseline,) = (s for s in draw([parent], ctx, around(small, ctx)) if s.arch == child)
    assert (baseline.grid_steps, baseline.baseline) == (grid_steps, f"published:{small}")
    assert (baseline.moved, baseline.parent) == (("embed_dims",), parent)
    assert steps_between(parent, child) == grid_steps


def random_case(rng: random.Random) -> tuple[Arch, Context, Band]:
    """Draw a parent, a context and a band below it that holds something."""
    while True:
        arch = rng.choice([*(p.arch for p in FAMILY.published), random_arch(rng, most=256)])
        ctx = rng.choice([IMAGENET, DIGITS, random_context(rng)])
        params = FAMILY.count_params(arch, ctx)
        low = rng.uniform(0.3, 0.95)
        band = Band(int(params * low), int(params * rng.uniform(low + 0.02, 1.05)))
        if count_contractions(FAMILY, arch, ctx, band):
            return arch, ctx, band


def test_a_second_draw_continues_where_the_first_ended() -> None:
    rng = random.Random(1)
    for _ in range(8):
        parent, ctx, band = random_case(rng)
        sizes = rng.randint(1, 20), rng.randint(1, 20)
        baselines = rng.random() < 0.5
        whole = draw([parent], ctx, band, sum(sizes), baselines=baselines)
        first = draw([parent], ctx, band, sizes[0], baselines=baselines)
        tried = [FAMILY.key(s.arch, ctx) for s in first]
        second = draw([parent], ctx, band, sizes[1], baselines=baselines, exclude=tried)
        assert first + second == whole


def test_drawing_to_the_end_meets_every_contraction_once() -> None:
    parent, ctx = SMALL, DIGITS
    params = FAMILY.count_params(parent, ctx)
    band = Band(int(0.8 * params), int(0.9 * params))
    number = count_contractions(FAMILY, parent, ctx, band)
    tried: list[str] = []
    while new := draw([parent], ctx, band, 64, exclude=tried):
        tried += [FAMILY.key(s.arch, ctx) for s in new]
    assert len(tried) == len(set(tried)) == number


def test_the_random_seed_changes_the_order_and_not_the_rings() -> None:
    parent, band = FAMILY.seed("21M"), around("11M", IMAGENET)
    lists = [draw([parent], IMAGENET, band, random_seed=s, baselines=False) for s in range(5)]
    assert len({tuple(s.arch for s in one) for one in lists}) == 5
    assert len({tuple(s.grid_steps for s in one) for one in lists}) == 1


def test_factors_take_turns() -> None:
    """Inside one ring no set of moved factors gets two places more than one that is still full."""
    parent, ctx = FAMILY.seed("21M"), IMAGENET
    params = FAMILY.count_params(parent, ctx)
    band = Band(int(0.9 * params), params)
    everything = draw([parent], ctx, band, 500, baselines=False)
    for ring in (1, 2):
        pool = [s.moved for s in everything if s.grid_steps == ring]
        nearer = sum(s.grid_steps < ring for s in everything)
        times = dict.fromkeys(set(pool), 0)
        for s in everything[:nearer]:
            times[s.moved] = times.get(s.moved, 0) + 1
        for s in everything[nearer : nearer + len(pool)]:
            still = [m for m in set(pool) if pool.count(m)]
            assert times[s.moved] == min(times[m] for m in still)
            times[s.moved] += 1
            pool.remove(s.moved)


def test_baselines_are_there_if_and_only_if_they_fit() -> None:
    parent = FAMILY.seed("21M")
    for ctx in (IMAGENET, DIGITS):
        for small in ("5M", "11M"):
            band = around(small, ctx)
            listed = draw([parent], ctx, band)
            assert [s.baseline for s in listed[:2]] == [f"published:{small}", "uniform"]
            assert all(s.baseline is None for s in listed[2:])
            assert draw([parent], ctx, band, 2) == listed[:2]
            uniform = FAMILY.to_dict(listed[1].arch)
            same = {k: v for k, v in FAMILY.to_dict(parent).items() if k != "embed_dims"}
            assert {k: uniform[k] for k in same} == same
            ratios = np.array(uniform["embed_dims"]) / FAMILY.to_dict(parent)["embed_dims"]
            assert ratios.max() - ratios.min() <= 32 / 96  # one step of the narrowest
        params = FAMILY.count_params(parent, ctx)
        assert draw([FAMILY.seed("5M")], ctx, Band(0, params))[0].baseline == "uniform"
        narrow = Band(params - 2, params - 1)  # nothing so near
        assert all(s.baseline is None for s in draw([parent], ctx, narrow))
        tried = [FAMILY.key(s.arch, ctx) for s in listed[:2]]
        again = draw([parent], ctx, band, exclude=tried)
        assert all(s.baseline is None for s in again)


def test_several_parents_take_turns_and_share() -> None:
    ctx, band = IMAGENET, around("11M", IMAGENET)
    first = FAMILY.seed("21M")
    other = draw([first], ctx, Band(15_000_000, 16_000_000), baselines=False)[3].arch
    far = FAMILY.seed("5M")  # smaller than the band: cannot contract into it
    listed = draw([first, other, far], ctx, band, 40)
    keys = [FAMILY.key(s.arch, ctx) for s in listed]
    assert len(set(keys)) == len(keys) == 40
    assert {s.parent for s in listed} == {first, other}
    for s in listed:
        assert s.params < FAMILY.count_params(s.parent, ctx)
        away = [steps_between(p, s.arch) for p in (first, other) if contains(FAMILY, p, s.arch, ctx)]
        assert s.grid_steps == min(away)  # counted from the nearest
    rules = [{FAMILY.key(s.arch, ctx) for s in draw([p], ctx, band, 40, baselines=False)} for p in (first, other)]
    ruled = [k for k, s in zip(keys, listed, strict=True) if s.baseline is None]
    assert min(sum(k in rule for k in ruled) for rule in rules) >= 12  # both have their share
    assert draw([far], ctx, band) == []


def test_an_empty_band_gives_nothing() -> None:
    parent = FAMILY.seed("5M")
    for band in (Band(10, 5), Band(0, 10), Band(10**8, 10**9)):
        assert count_contractions(FAMILY, parent, IMAGENET, band) == 0
        assert draw([parent], IMAGENET, band) == []


def test_archs_too_large_to_walk_are_refused_in_one_line() -> None:
    base = FAMILY.to_dict(FAMILY.seed("21M"))
    wide = FAMILY.arch({**base, "embed_dims": [4096, 8192, 8192, 16384]})
    with pytest.raises(InputError, match=r"embed_dims: got .* start from a smaller arch"):
        FAMILY.moves(wide)
    deep = FAMILY.arch({**base, "depths": [20, 20, 20, 20]})
    with pytest.raises(InputError, match=r"arch: got .* start from a smaller arch"):
        count_contractions(FAMILY, deep, IMAGENET, Band(0, 10**9))
    params = FAMILY.count_params(deep, IMAGENET)
    assert len(draw([deep], IMAGENET, Band(int(0.9 * params), params))) == 24  # nearby is enough


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_bound_on_macs_keeps_exactly_the_lighter_ones(share: float) -> None:
    seed, ctx = FAMILY.seed("5M"), Context(48, 10)
    params, macs = FAMILY.count_params(seed, ctx), FAMILY.count_macs(seed, ctx)
    band = Band(int(0.5 * params), int(0.8 * params))
    light = replace(band, max_macs=int(share * macs))
    drawn = draw([seed], ctx, light)
    assert drawn
    assert all(d.macs <= share * macs for d in drawn)
    assert all(FAMILY.count_macs(d.arch, ctx) == d.macs for d in drawn)
    assert count_contractions(FAMILY, seed, ctx, light) < count_contractions(FAMILY, seed, ctx, band)
    everything = replace(band, max_macs=macs * 10)
    assert draw([seed], ctx, everything) == draw([seed], ctx, band)
