"""Progressive contraction: few notches at a time, from the incumbents of the step before."""

from __future__ import annotations

from nas.search.strategies.strategy import Ask, Strategy
from space.contractions import Candidate, shortlist


class Contraction(Strategy):
    """The toolkit's own strategy; the rule is that of `space.contractions.shortlist`."""

    name = "contraction"
    stepwise = True
    summary = "contractions of the incumbents, fewest notches first, the factors taking turns"

    def shortlist(self, ask: Ask) -> list[Candidate]:
        """Return the anchors on a step's first draw, then candidates by the rule."""
        return shortlist(
            ask.family,
            list(ask.incumbents),
            ask.context,
            ask.band,
            ask.number,
            random_seed=ask.random_seed,
            anchors=ask.anchors and ask.draw == 0,
            exclude=ask.exclude,
        )
