"""Frozen factors: what never moves, and that nothing else is any different."""

from __future__ import annotations

import random

import numpy as np
import pytest
from space_cases import FAMILY, random_arch, random_context

from space import Arch, Context, InputError, family_names, get_family
from space.contractions import Band, contains, count_contractions, propose
from space.freeze import freeze
from space.tinyvit import TinyVit

NAMES = [f.field for f in FAMILY.factors]
SLOTS = [f"{f.field}[{i}]" for f in FAMILY.factors if not f.scalar for i in range(f.slots)]


def held(names: list[str]) -> dict[str, set[int]]:
    """The slots that names freeze, by field."""
    return {
        f.field: {i for i in range(f.slots) if f.field in names or f"{f.field}[{i}]" in names} for f in FAMILY.factors
    }


def assert_held(names: list[str], before: Arch, after: Arch) -> None:
    for field, slots in held(names).items():
        one, other = (np.atleast_1d(getattr(arch, field)) for arch in (before, after))
        assert all(one[i] == other[i] for i in slots), field


def random_names(rng: random.Random) -> list[str]:
    return rng.sample([*NAMES, *SLOTS], rng.randint(1, 4))


def random_seed_arch(rng: random.Random) -> Arch:
    if rng.random() < 0.4:
        return FAMILY.seed(rng.choice(["5M", "11M"]))
    return random_arch(rng, most=160, deepest=2)


def test_moves_are_those_of_the_family_that_keep_the_frozen_slots() -> None:
    rng = random.Random(0)
    for _ in range(60):
        seed, names = random_seed_arch(rng), random_names(rng)
        try:
            frozen = freeze(FAMILY, seed, names)
        except InputError as error:
            assert "at least one factor left" in str(error)  # noqa: PT017  # both are fine here
            continue
        moves, free = frozen.moves(seed), FAMILY.moves(seed)
        for f in FAMILY.factors:
            keep = np.ones(len(free[f.field]), dtype=bool)
            columns = free[f.field].reshape(len(keep), -1)
            for i in held(names)[f.field]:
                keep &= columns[:, i] == np.atleast_1d(getattr(seed, f.field))[i]
            assert np.array_equal(moves[f.field], free[f.field][keep])


def test_contractions_of_a_frozen_family_keep_what_is_frozen() -> None:
    rng = random.Random(1)
    drawn = 0
    seed = FAMILY.seed("5M")
    for _ in range(4):
        ctx, names = random_context(rng), random_names(rng)
        frozen = freeze(FAMILY, seed, names)
        params = FAMILY.count_params(seed, ctx)
        band = Band(int(params * rng.uniform(0.2, 0.9)), params)
        listed = propose(frozen, [seed], ctx, band, 8, random_seed=0)
        number = count_contractions(frozen, seed, ctx, band)
        assert number <= count_contractions(FAMILY, seed, ctx, band)
        assert min(number, 8) <= len(listed) <= 8
        drawn += len(listed)
        for s in listed:
            assert contains(FAMILY, seed, s.arch, ctx)
            assert contains(frozen, seed, s.arch, ctx)
            assert_held(names, seed, s.arch)
        for s in listed[-2:]:  # and so do theirs
            for again in propose(frozen, [s.arch], ctx, Band(0, s.params - 1), 3, random_seed=0):
                assert_held(names, seed, again.arch)
    assert drawn > 12


def test_floor_is_the_smallest_contraction_and_scaled_is_one() -> None:
    rng = random.Random(2)
    for _ in range(25):
        seed, names, ctx = random_seed_arch(rng), random_names(rng), random_context(rng)
        try:
            frozen = freeze(FAMILY, seed, names)
        except InputError:
            continue
        floor = frozen.floor(seed, ctx)
        params = FAMILY.count_params(floor, ctx)
        assert floor == seed or contains(frozen, seed, floor, ctx)
        assert count_contractions(frozen, seed, ctx, Band(0, params - 1)) == 0
        for factor in (0.9, 0.6, 0.3):
            scaled = frozen.scaled(seed, factor)
            assert_held(names, seed, scaled)
            if "embed_dims" in names:
                assert scaled == seed
            if not any(n.startswith("embed_dims") for n in names):
                assert scaled == FAMILY.scaled(seed, factor)


def test_a_frozen_width_holds_back_the_free_ones() -> None:
    """Widths do not fall from stage to stage: those before a small one shrink below it."""
    seed, ctx = FAMILY.seed("21M"), Context(224, 1000)
    frozen = freeze(FAMILY, seed, ["embed_dims[1]"])
    assert frozen.to_dict(frozen.floor(seed, ctx))["embed_dims"] == [32, 192, 192, 192]
    assert frozen.to_dict(frozen.scaled(seed, 0.4))["embed_dims"] == [32, 192, 192, 224]
    baselines = propose(frozen, [seed], ctx, Band(0, 10**7), 40, random_seed=0)
    assert "uniform" in [s.baseline for s in baselines]


def test_everything_else_is_the_familys_own() -> None:
    rng, ctx = random.Random(3), Context(64, 10)
    seed = FAMILY.seed("21M")
    frozen = freeze(FAMILY, seed, ["embed_dims[3]", "depths"])
    assert isinstance(frozen, TinyVit)
    assert frozen.name == FAMILY.name
    assert get_family(FAMILY.name) is FAMILY
    assert family_names().count(FAMILY.name) == 1
    assert [p.name for p in frozen.published] == ["21M"]
    assert [p.name for p in freeze(FAMILY, seed, ["depths"]).published] == ["5M", "11M", "21M"]
    assert frozen.seed("5M") == FAMILY.seed("5M")
    for _ in range(10):
        arch = random_arch(rng)
        for call in ("key", "timm_call", "count_params"):
            assert getattr(frozen, call)(arch, ctx) == getattr(FAMILY, call)(arch, ctx)
        assert frozen.row(frozen.table([arch]), 0) == arch
        assert repr(frozen.grid_steps(seed, frozen.table([arch]))) == repr(
            FAMILY.grid_steps(seed, FAMILY.table([arch]))
        )
    assert frozen.resizes == FAMILY.resizes
    for how in FAMILY.resizes:
        resized = [f.resized(seed, ctx, Context(96, 10), how) for f in (FAMILY, frozen)]
        assert repr(resized[0]) == repr(resized[1])
    # A run that keeps no published arch at all still knows its own types and names.
    own = freeze(FAMILY, FAMILY.arch({**FAMILY.to_dict(seed), "mlp_ratio": 3.0}), ["mlp_ratio"])
    assert own.published == ()
    assert own.timm_call(seed, ctx) == FAMILY.timm_call(seed, ctx)
    assert own.moves(seed)["mlp_ratio"].dtype == np.float64


def test_freezing_nothing_is_the_family_and_freezing_twice_is_both() -> None:
    seed = FAMILY.seed("11M")
    assert freeze(FAMILY, seed, []) is FAMILY
    once = freeze(FAMILY, seed, ["depths", "embed_dims[0]"])
    twice = freeze(freeze(FAMILY, seed, ["depths"]), seed, ["embed_dims[0]"])
    for field, values in once.moves(seed).items():
        assert np.array_equal(values, twice.moves(seed)[field])
    ctx = Context(224, 1000)
    assert once.floor(seed, ctx) == twice.floor(seed, ctx)
    assert once.scaled(seed, 0.5) == twice.scaled(seed, 0.5)


def test_parts_that_a_family_names_are_frozen_as_a_whole() -> None:
    seed = FAMILY.seed("21M")
    assert list(FAMILY.parts()) == ["stage1", "stage2", "stage3", "stage4"]
    for part, members in FAMILY.parts().items():
        one, other = freeze(FAMILY, seed, [part]), freeze(FAMILY, seed, list(members))
        for field, values in one.moves(seed).items():
            assert np.array_equal(values, other.moves(seed)[field])
    stages = freeze(FAMILY, seed, ["stage1", "stage2", "stage3"])
    assert {f for f, v in stages.moves(seed).items() if len(v) > 1} == {"embed_dims", "depths"}


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("windows", "window_sizes"),
        ("embed_dim[2]", "embed_dims[2]"),
        ("embed_dims[4]", "embed_dims"),
        ("head_dim[0]", "head_dim"),
        ("neck", ""),
        ("", ""),
    ],
)
def test_unknown_names_are_refused_with_the_closest(name: str, close: str) -> None:
    with pytest.raises(InputError, match=r"--freeze: got .* want one of embed_dims") as caught:
        freeze(FAMILY, FAMILY.seed("5M"), ["depths", name])
    assert "\n" not in str(caught.value)
    assert close in str(caught.value).partition("did you mean")[2]


@pytest.mark.parametrize("names", [NAMES, [*SLOTS, *NAMES[3:]]])
def test_freezing_everything_is_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match="at least one factor left to contract"):
        freeze(FAMILY, FAMILY.seed("5M"), names)
