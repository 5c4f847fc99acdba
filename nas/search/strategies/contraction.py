"""Progressive contraction: a few grid steps at a time, from the incumbents of the step before."""

from __future__ import annotations

from nas.search.strategies.strategy import SearchState, Strategy
from space.contractions import Candidate, propose


class Contraction(Strategy):
    """The toolkit's own strategy; the rule is that of `space.contractions.propose`."""

    name = "contraction"
    stepwise = True
    summary = "contractions of the incumbents, fewest grid steps first, the factors taking turns"

    def propose(self, state: SearchState) -> list[Candidate]:
        """Return the baselines on a step's first draw, then candidates by the rule."""
        return propose(
            state.family,
            list(state.incumbents),
            state.context,
            state.band,
            state.number,
            random_seed=state.random_seed,
            baselines=state.baselines and state.draw == 0,
            exclude=state.exclude,
        )
