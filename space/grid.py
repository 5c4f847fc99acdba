"""The product of what each factor of an arch may become, walked in blocks on open grids.

Each factor keeps an axis of its own, so a family's formula does most of its work on small arrays:
tens of millions of archs take well under a second, and no more than a block is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from space.errors import refuse
from space.family import Arch, Array, Context, Family

BLOCK = 1 << 17  # archs looked at together: a few arrays of 1 MB
MAX_GRID = 20_000_000_000  # archs that one walk may meet: minutes

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Band:
    """Parameter counts from `lo` to `hi`, both included; with `max_macs`, at most so many MACs."""

    lo: int
    hi: int
    max_macs: int | None = None


@dataclass(frozen=True)
class Axis:
    """What one factor may become: joint values, notches to each, places in the whole list."""

    field: str
    bit: int
    length: int
    values: Array
    notches: Ints
    place: Ints

    def within(self, radius: int) -> Axis:
        """Keep the values within `radius` notches."""
        near = self.notches <= radius
        values, notches, place = self.values[near], self.notches[near], self.place[near]
        return replace(self, values=values, notches=notches, place=place)


def axes_of(family: Family, arch: Arch, ctx: Context) -> list[Axis]:
    """Lay out what each factor may become, most values first; built alike is there once."""
    moves = family.moves(arch)
    notches = family.notches(arch, moves)
    found = []
    for k, field in enumerate(moves):
        values, steps = moves[field], notches[field]
        built = family.effective({field: values}, ctx)[field]
        keep = np.arange(len(values))
        if not np.array_equal(built, values):
            nearest = np.argsort(steps, kind="stable")
            rows = built.reshape(len(values), -1)[nearest]
            keep = np.sort(nearest[np.unique(rows, axis=0, return_index=True)[1]])
        length = len(keep)
        found.append(Axis(field, 1 << k, length, values[keep], steps[keep], np.arange(length)))
    return sorted(found, key=lambda a: -a.length)


def _blocks(sizes: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cut a product into slices of at most about `BLOCK` elements, in order."""
    rest = math.prod(sizes[1:])
    step = max(1, BLOCK // rest) if sizes[1:] else BLOCK
    for i in range(0, sizes[0], step):
        here = slice(i, min(i + step, sizes[0]))
        if rest <= BLOCK:
            yield (here, *(slice(0, n) for n in sizes[1:]))
        else:
            for others in _blocks(sizes[1:]):
                yield (here, *others)


def mesh(columns: Sequence[Array], cut: Sequence[slice], slots: bool = False) -> list[Array]:
    """Give every column an axis of its own; with `slots`, 2-D columns keep their last one."""
    meshed = []
    for k, (column, part) in enumerate(zip(columns, cut, strict=True)):
        shape = [1] * len(columns)
        shape[k] = part.stop - part.start
        meshed.append(column[part].reshape(*shape, *(column.shape[1:] if slots else ())))
    return meshed


def walk(
    family: Family, axes: Sequence[Axis], ctx: Context, band: Band
) -> Iterator[tuple[tuple[slice, ...], npt.NDArray[np.bool_]]]:
    """Walk the product in blocks: (where, which of them can be built and lie in the band)."""
    for cut in _blocks([len(a.values) for a in axes]):
        meshed = mesh([a.values for a in axes], cut, slots=True)
        table = {a.field: column for a, column in zip(axes, meshed, strict=True)}
        params = family.count_params_many(table, ctx)
        inside = (params >= band.lo) & (params <= band.hi) & family.valid_many(table, ctx)
        if band.max_macs is not None:
            inside &= family.count_macs_many(table, ctx) <= band.max_macs
        yield cut, inside


def checked(axes: Sequence[Axis]) -> Sequence[Axis]:
    """Refuse a product that is too large to walk."""
    number = math.prod(len(a.values) for a in axes)
    if number > MAX_GRID:
        want = f"at most {MAX_GRID:,} contractions"
        raise refuse("arch", f"{number:,}", want, "start from a smaller arch")
    return axes
