"""Contractions drawn uniformly from a band, and the one nearest to a wanted arch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from space.contractions import Axis, Band, Ints, axes_of, checked, inside_band, seeded, smaller_than, walk, walk_near
from space.family import Arch, Array, Context, Family

SHORT = 1 << 18  # points: products up to this are walked at once
TRIES = 1 << 18  # points drawn at random before everything is walked instead
CHUNK = 1 << 13  # of them tested together


def sample_band(
    family: Family,
    origin: Arch,
    ctx: Context,
    band: Band,
    number: int,
    *,
    random_seed: int,
    exclude: Collection[str] = (),
) -> list[Arch]:
    """Draw `number` contractions of `origin` in `band`, each net as built equally likely.

    Without repeats and without the keys in `exclude`; fewer when there are fewer. Drawing again with the same random
    seed and what came before excluded continues the same sequence. Raises `InputError` when the product of moves is too
    large to walk.
    """
    axes = checked(axes_of(family, origin, ctx))
    below, tried = smaller_than(family, origin, ctx, band), set(exclude)
    drawn: list[Arch] = []
    if number < 1 or below.lo > below.hi:
        return drawn
    for place in _places(family, axes, ctx, below, number + len(tried), random_seed):
        arch = _arch_at(family, axes, place)
        if family.key(arch, ctx) not in tried:
            drawn.append(arch)
            if len(drawn) == number:
                break
    return drawn


def _places(
    family: Family, axes: Sequence[Axis], ctx: Context, band: Band, most: int, random_seed: int
) -> Iterator[int]:
    """Return at most `most` places of the band, each once, in an order drawn uniformly.

    Points of the product are drawn and rejected. A band that is hit too seldom is walked: what was not met yet follows
    in a seeded order.
    """
    rng = np.random.default_rng(random_seed % 2**64)
    shape = tuple(len(a.values) for a in axes)
    met: dict[int, None] = {}
    for _ in range(TRIES // CHUNK if math.prod(shape) > SHORT else 0):
        rows = tuple(rng.integers(0, n, CHUNK) for n in shape)
        table = {a.field: a.values[i] for a, i in zip(axes, rows, strict=True)}
        inside = inside_band(family, table, ctx, band)
        for place in np.ravel_multi_index(rows, shape)[inside].tolist():
            if place not in met:
                met[place] = None
                yield place
        if len(met) >= most:
            return
    left = np.zeros(0, dtype=np.int64)
    known = np.array(list(met), dtype=np.int64)
    for cut, fits in walk(family, axes, ctx, band):
        found = np.unravel_index(np.flatnonzero(fits), fits.shape)
        rows = tuple(i + part.start for i, part in zip(found, cut, strict=True))
        places = np.ravel_multi_index(rows, shape)
        left = np.concatenate([left, places[~np.isin(places, known)]])
        if len(left) > 2 * most:
            left = left[np.argsort(seeded(left, random_seed), kind="stable")[:most]]
    yield from left[np.argsort(seeded(left, random_seed), kind="stable")].tolist()


def _arch_at(family: Family, axes: Sequence[Axis], place: int) -> Arch:
    """Return the arch at a mixed-radix place of the product."""
    rows = np.unravel_index(place, tuple(len(a.values) for a in axes))
    return family.arch({a.field: a.values[i].tolist() for a, i in zip(axes, rows, strict=True)})


class _Point(Arch):
    """Values by field that need not make an arch: only distances from it are used."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        for field, value in values.items():
            setattr(self, field, tuple(value) if isinstance(value, list | tuple) else value)


def nearest(
    family: Family,
    origin: Arch,
    wanted: Arch | Mapping[str, Any],
    ctx: Context,
    band: Band,
    *,
    random_seed: int,
    exclude: Collection[str] = (),
) -> Arch | None:
    """Find the contraction of `origin` in `band` with the fewest grid steps from `wanted`.

    `wanted`: an arch, or a value for every field; it need be neither in the band nor buildable. Steps are counted
    between nets as built: values that build the same part are none apart. Ties fall by a seeded order. None when
    nothing outside `exclude` is left.
    """
    point = _Point(family.to_dict(wanted) if isinstance(wanted, Arch) else wanted)
    moves = family.moves(origin)
    axes = [replace(a, steps=_away(family, point, a, moves[a.field], ctx)) for a in axes_of(family, origin, ctx)]
    below, tried = smaller_than(family, origin, ctx, band), set(exclude)
    if below.lo > below.hi:
        return None
    shape = tuple(len(a.values) for a in axes)
    nearest_of = [int(a.steps.min()) for a in axes]
    farthest = sum(int(a.steps.max()) for a in axes)
    slack = min(2, farthest - sum(nearest_of))  # steps beyond what cannot be avoided
    while True:
        radius = sum(nearest_of) + slack
        near = checked([a.within(n + slack) for a, n in zip(axes, nearest_of, strict=True)])
        for place in _closest(family, near, shape, ctx, below, radius, len(tried) + 1, random_seed):
            arch = _arch_at(family, axes, place)
            if family.key(arch, ctx) not in tried:
                return arch
        if radius == farthest:
            return None
        slack = min(farthest - sum(nearest_of), slack + max(2, slack // 2))


def _away(family: Family, point: _Point, axis: Axis, values: Array, ctx: Context) -> Ints:
    """Count the grid steps from `point` to each value of an axis, as built.

    `values` are all joint values of the field; of those that build alike the nearest one counts.
    """
    field = axis.field
    steps = family.grid_steps(point, {field: values})[field]
    own, everything, target = (
        family.effective({field: v}, ctx)[field].reshape(n, -1)
        for v, n in (
            (axis.values, len(axis.values)),
            (values, len(values)),
            (np.array([getattr(point, field)], dtype=values.dtype), 1),
        )
    )
    _, group = np.unique(np.concatenate([own, everything]), axis=0, return_inverse=True)
    group = group.reshape(-1)
    least = np.full(int(group.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, group[len(own) :], steps)
    return np.where((own == target).all(axis=1), 0, least[group[: len(own)]])


def _closest(
    family: Family,
    near: Sequence[Axis],
    shape: tuple[int, ...],
    ctx: Context,
    band: Band,
    radius: int,
    number: int,
    random_seed: int,
) -> list[int]:
    """Return the places of the `number` nearest ones within `radius` steps, nearest first."""
    places, steps = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for rows, away in walk_near(family, near, ctx, band, radius):
        keep = away <= radius
        whole = tuple(a.place[i[keep]] for a, i in zip(near, rows, strict=True))
        places = np.concatenate([places, np.ravel_multi_index(whole, shape)])
        steps = np.concatenate([steps, away[keep]])
        order = np.lexsort((seeded(places, random_seed), steps))[:number]
        places, steps = places[order], steps[order]
        if len(places) == number:
            radius = int(steps[-1])  # nothing farther can be among them any more
    return [int(p) for p in places]
