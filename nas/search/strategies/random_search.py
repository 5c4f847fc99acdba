"""Random search: the baseline that every other strategy has to beat."""

from __future__ import annotations

from collections.abc import Collection

from nas.search.strategies.strategy import FromSeed, SearchState
from space.family import Arch


class Random(FromSeed):
    """Draws without repeats, each contraction of the seed in the band equally likely."""

    name = "random"
    summary = "contractions of the seed, drawn uniformly from the target's band"

    def attempt(self, state: SearchState, number: int, tried: Collection[str]) -> list[Arch]:
        """Draw from the band."""
        return state.sample(number, tried)
