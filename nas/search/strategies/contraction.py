"""Progressive contraction: few grid steps at a time, from the incumbents of the step before."""

from __future__ import annotations

from nas.search.strategies.strategy import Ask, Strategy
from space.contractions import Candidate, propose


class Contraction(Strategy):
    """The toolkit's own strategy; the rule is that of `space.contractions.propose`."""

    name = "contraction"
    stepwise = True
    summary = "contractions of the incumbents, fewest grid steps first, the factors taking turns"

    def propose(self, ask: Ask) -> list[Candidate]:
        """Return the baselines on a step's first draw, then candidates by the rule."""
        return propose(
            ask.family,
            list(ask.incumbents),
            ask.context,
            ask.band,
            ask.number,
            random_seed=ask.random_seed,
            baselines=ask.baselines and ask.draw == 0,
            exclude=ask.exclude,
        )
