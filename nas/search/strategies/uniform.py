"""Uniform scaling: the baseline that needs no search."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np

from nas.search.strategies.strategy import FromSeed, SearchState
from space.contractions import PARTS, contains, scalings, smaller_than
from space.family import Arch

DEPTH = "N"  # the symbol of the factor that counts blocks, in every family that has one


class Uniform(FromSeed):
    """All widths by one factor; when those run out, all depths by another as well.

    Whatever the random seed. Depths shrink as little as possible: for each common factor, from the seed's own depths
    on, the widths that come nearest to the middle of the band come first. It ends when no depth is left to take.
    """

    name = "uniform"
    summary = "the seed with all widths scaled by one factor, then its depths by another as well"

    def attempt(self, state: SearchState, number: int, tried: Collection[str]) -> list[Arch]:
        """Scale until the list is full."""
        family, ctx = state.family, state.context
        found: dict[str, Arch] = {}
        for arch in _scalings(state):
            key = family.key(arch, ctx)
            if key in tried or key in found or not contains(family, state.seed, arch, ctx):
                continue
            found[key] = arch
            if len(found) == number:
                break
        return list(found.values())


def _scalings(state: SearchState) -> Iterator[Arch]:
    """Yield the scalings that lie in the band, in the order in which they are listed."""
    band = smaller_than(state.family, state.seed, state.context, state.band)
    for shallow in _shallower(state):
        yield from scalings(state.family, shallow, state.context, band, state.band.lo + state.band.hi)


def _shallower(state: SearchState) -> Iterator[Arch]:
    """Yield the seed, then the seed with its depths scaled by ever smaller factors."""
    yield state.seed
    values = state.family.to_dict(state.seed)
    met = []
    for field in (f.field for f in state.family.factors if f.symbol == DEPTH):
        moves = state.family.moves(state.seed)[field]
        options = {tuple(np.atleast_1d(v).tolist()) for v in moves}
        depths, scalar = values[field], not isinstance(values[field], list)
        for k in range(PARTS - 1, 0, -1):
            full = [depths] if scalar else depths
            cut = [max(1, math.floor(v * k / PARTS + 0.5)) for v in full]
            if cut != full and cut not in met and tuple(cut) in options:
                met.append(cut)
                yield state.family.arch({**values, field: cut[0] if scalar else cut})
