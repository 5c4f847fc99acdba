"""The interface of search strategies: a question about a step, the decided candidates, a list."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from space.contractions import Band, Candidate, anchors_in, listed
from space.family import Arch, Context, Family


@dataclass(frozen=True)
class Seen:
    """A decided candidate, as far as strategies use it.

    `violation`: by what share it missed a requirement; at most 0 where all are met, infinite when
    it failed. `loss`: its soft loss in nats, when it was scored. `ratio`: its throughput relative
    to the seed, when it was timed. `stopped`: a race ended it, as it could not be among the best.
    """

    step: int
    arch: Arch
    key: str
    params: int
    violation: float
    loss: float | None = None
    ratio: float | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Ask:
    """One question to a strategy: `number` candidates for a step.

    `draw`: 0 first; more when all that was listed before in this step failed. `incumbents`: where
    the step starts, the seed in step 1. `band`: that of the step for a stepwise strategy, the
    target's otherwise. `baselines`: whether the published archs and the uniform scaling are listed
    before anything else. `exclude`: keys that this step must not list again. `seen`: what was
    decided in this run, in order of decision.
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
    seen: tuple[Seen, ...] = ()

    def derived_seed(self) -> int:
        """Return a random seed for this step and draw, in 32 bits."""
        parts = [self.random_seed % 2**64, self.step, self.draw]
        return int(np.random.SeedSequence(parts).generate_state(1)[0])

    @property
    def scored(self) -> tuple[Seen, ...]:
        """The scored candidates that met the requirements, each net once, in order of decision."""
        found = {s.key: s for s in self.seen if s.loss is not None and s.violation <= 0}
        return tuple(found.values())


class Strategy(ABC):
    """A way to choose the candidates of a step.

    `stepwise`: bands tighten from step to step, and candidates are contractions of the incumbents.
    Otherwise every step looks inside the target's band, at contractions of the seed.
    """

    name: ClassVar[str]
    stepwise: ClassVar[bool]
    summary: ClassVar[str]

    @abstractmethod
    def propose(self, ask: Ask) -> list[Candidate]:
        """Return at most `ask.number` candidates; equal questions have equal answers.

        All are different nets as built, in the band, smaller than their parent, and not in
        `ask.exclude`. Fewer, or none, when no more are there.
        """

    def describe(self, ask: Ask) -> str:
        """Return in one line how the strategy is set for a question like this one."""
        return self.summary


class FromSeed(Strategy):
    """A strategy that lists contractions of the seed inside the target's band.

    What was decided in an earlier step is listed again only when nothing else is left.
    """

    stepwise = False

    @abstractmethod
    def attempt(self, ask: Ask, number: int, tried: Collection[str]) -> list[Arch]:
        """Return at most `number` different contractions of the seed whose keys are not tried."""

    def propose(self, ask: Ask) -> list[Candidate]:
        """Return the baselines on a step's first draw, then the proposals of the strategy."""
        decided = {s.key for s in ask.seen}
        return self._list(ask, ask.exclude | decided) or self._list(ask, ask.exclude)

    def _list(self, ask: Ask, tried: frozenset[str]) -> list[Candidate]:
        chosen: dict[str, tuple[str | None, Arch]] = {}
        if ask.baselines and ask.draw == 0:
            for name, arch in anchors_in(ask.family, [ask.seed], ask.context, ask.band):
                key = ask.family.key(arch, ask.context)
                if key not in tried and len(chosen) < ask.number:
                    chosen.setdefault(key, (name, arch))
        number = ask.number - len(chosen)
        if number > 0:
            for arch in self.attempt(ask, number, tried | set(chosen)):
                chosen[ask.family.key(arch, ask.context)] = (None, arch)
        return listed(ask.family, [ask.seed], list(chosen.values()), ask.context)
