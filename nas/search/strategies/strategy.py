"""The interface of search strategies: the state of a search goes in, candidates come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nas.search.study import Trial
from space.contractions import Band, Candidate, baselines_in, describe_candidates
from space.family import Arch, Context, Family
from space.sampling import nearest, sample_band


@dataclass(frozen=True)
class SearchState:
    """What a strategy proposes from: `number` candidates are wanted for a step.

    `draw`: 0 first; more when no earlier proposal of this step survived. `incumbents`: where the step starts, the seed
    in step 1. `band`: that of the step for a stepwise strategy, else the target's. `baselines`: whether the published
    archs and the uniform scaling are proposed first. `exclude`: keys that this step must not propose again. `trials`:
    what this run decided, with the archs, in order of decision.
    """

    step: int
    steps: int
    number: int
    draw: int
    family: Family
    context: Context
    seed: Arch
    incumbents: tuple[Arch, ...]
    band: Band
    random_seed: int
    baselines: bool
    exclude: frozenset[str] = frozenset()
    trials: tuple[tuple[Trial, Arch], ...] = ()

    def derived_seed(self) -> int:
        """Return a random seed for this step and draw, in 32 bits."""
        parts = [self.random_seed % 2**64, self.step, self.draw]
        return int(np.random.SeedSequence(parts).generate_state(1)[0])

    def sample(self, number: int, exclude: Collection[str]) -> list[Arch]:
        """Draw different contractions of the seed from the band, each equally likely."""
        return sample_band(
            self.family, self.seed, self.context, self.band, number, random_seed=self.derived_seed(), exclude=exclude
        )

    def nearest(self, values: dict[str, Any], random_seed: int, exclude: Collection[str]) -> Arch | None:
        """Return the contraction of the seed in the band that is nearest to the values of an arch, or None."""
        return nearest(
            self.family, self.seed, values, self.context, self.band, random_seed=random_seed, exclude=exclude
        )

    @property
    def scored(self) -> tuple[tuple[Trial, Arch], ...]:
        """The scored trials that met the requirements, each net once, in order of decision."""
        found = {
            trial.key: (trial, arch)
            for trial, arch in self.trials
            if trial.state == "complete" and trial.violation <= 0
        }
        return tuple(found.values())


class Strategy(ABC):
    """A way to choose the candidates of a step.

    `stepwise`: bands tighten from step to step, and candidates are contractions of the incumbents. Otherwise every step
    looks inside the target's band, at contractions of the seed.
    """

    name: ClassVar[str]
    stepwise: ClassVar[bool]
    summary: ClassVar[str]

    @abstractmethod
    def propose(self, state: SearchState) -> list[Candidate]:
        """Return at most `state.number` candidates; equal states give equal candidates.

        All are different nets as built, in the band, smaller than their parent, and not in `state.exclude`. Fewer, or
        none, where no more exist.
        """

    def describe(self, state: SearchState) -> str:
        """Return in one line how the strategy is set for a state like this one."""
        return self.summary


class FromSeed(Strategy):
    """A strategy that proposes contractions of the seed inside the target's band.

    An arch of an earlier step is proposed again only when no other is left.
    """

    stepwise = False

    @abstractmethod
    def attempt(self, state: SearchState, number: int, tried: Collection[str]) -> list[Arch]:
        """Return at most `number` different contractions of the seed whose keys are not tried."""

    def propose(self, state: SearchState) -> list[Candidate]:
        """Return the baselines on a step's first draw, then the proposals of the strategy."""
        decided = {trial.key for trial, _ in state.trials}
        return self._propose(state, state.exclude | decided) or self._propose(state, state.exclude)

    def _propose(self, state: SearchState, tried: frozenset[str]) -> list[Candidate]:
        family, context = state.family, state.context
        chosen: dict[str, tuple[str | None, Arch]] = {}
        if state.baselines and state.draw == 0:
            for name, arch in baselines_in(family, [state.seed], context, state.band):
                key = family.key(arch, context)
                if key not in tried and len(chosen) < state.number:
                    chosen.setdefault(key, (name, arch))
        number = state.number - len(chosen)
        for arch in self.attempt(state, number, tried | set(chosen)) if number else ():
            chosen[family.key(arch, context)] = (None, arch)
        return describe_candidates(family, [state.seed], list(chosen.values()), context)
