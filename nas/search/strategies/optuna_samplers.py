"""Optuna's samplers as strategies: TPE, NSGA-II and a Gaussian process.

A sampler is made afresh for every question and fed the past from `Ask.seen`: nothing is kept
between questions, and a resumed run repeats itself. It is fed

- scored candidates: complete, with their soft loss, the one objective;
- those that missed a requirement: complete, with their violation as a constraint and, as they have
  no loss, the mean of those that have one, which says nothing for or against;
- neither those that met everything but were not trained, as their loss is unknown, nor failures.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar

from nas.search.strategies.encoding import assembled, dimensions_of
from nas.search.strategies.strategy import Ask, FromSeed, Seen
from space.family import Arch
from space.sampling import nearest

if TYPE_CHECKING:
    import optuna


def startup(ask: Ask) -> int:
    """Return how many trials a sampler needs: Optuna's ten, fewer for short lists.

    With fewer it draws each slot uniformly.
    """
    return min(10, max(5, ask.number // 2))


class Sampled(FromSeed):
    """Asks a sampler for one choice per slot of a factor.

    Choices are integers in ascending order, so that their distance has a meaning. Each suggestion
    is moved to the nearest contraction in the band that is not on the list, and fed back as running
    so that the next suggestion differs.
    """

    lives: ClassVar[bool] = False
    """Whether past trials are asked for one by one, for a sampler that counts generations."""

    @abstractmethod
    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler; `number` is how many trials it needs before it models them."""

    def attempt(self, ask: Ask, number: int, tried: Collection[str]) -> list[Arch]:
        """Feed the past, then ask and move until the list is full."""
        import optuna
        from optuna.distributions import BaseDistribution, IntDistribution
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        dimensions = dimensions_of(ask.family, ask.seed, ask.context)
        space: dict[str, BaseDistribution] = {
            g.name: IntDistribution(0, len(g.values) - 1) for g in dimensions
        }

        def places(arch: Arch) -> dict[str, int]:
            return {g.name: g.index(arch) for g in dimensions}

        random_seed = ask.derived_seed()
        study = optuna.create_study(sampler=self.sampler(random_seed, startup(ask)))
        for seen, value, constraints in told(ask):
            if self.lives:
                study.enqueue_trial(places(seen.arch))
                trial = study.ask(space)
                assert isinstance(study.sampler, optuna.samplers.NSGAIISampler)
                # A trial with fixed values never reaches the sampler, which would number it.
                study.sampler.get_trial_generation(study, study.trials[trial.number])
                for name, violation in constraints.items():
                    trial.set_constraint(name, violation)
                study.tell(trial, value)
            else:
                study.add_trial(
                    create_trial(
                        params=places(seen.arch),
                        distributions=space,
                        value=value,
                        constraints=dict(constraints),
                    )
                )
        found: dict[str, Arch] = {}
        while len(found) < number:
            trial = study.ask(space)
            study.tell(trial, state=TrialState.FAIL)  # what is really tried follows, moved
            arch = nearest(
                ask.family,
                ask.seed,
                assembled(ask.family, ask.seed, dimensions, trial.params),
                ask.context,
                ask.band,
                random_seed=random_seed + len(found),
                exclude={*tried, *found},
            )
            if arch is None:
                break
            found[ask.family.key(arch, ask.context)] = arch
            study.add_trial(
                create_trial(state=TrialState.RUNNING, params=places(arch), distributions=space)
            )
        return list(found.values())

    def describe(self, ask: Ask) -> str:
        """Return how many candidates are drawn at random before the model is used."""
        return f"{self.summary}, drawn at random until {startup(ask)} are told"


def told(ask: Ask) -> list[tuple[Seen, float, Mapping[str, float]]]:
    """Return the trials that a sampler is fed: (candidate, value, violations by name).

    In order of decision, each net once: as it was scored, else as decided last. One that a race
    stopped counts as the worst that was scored. Violations are given only if there are any.
    """
    latest = {s.key: s for s in (*ask.seen, *ask.scored)}
    losses = [s.loss for s in ask.scored if s.loss is not None]
    neutral = math.fsum(losses) / len(losses) if losses else 0.0
    missed = [s for s in latest.values() if 0 < s.violation < math.inf]
    answers: list[tuple[Seen, float, Mapping[str, float]]] = []
    for seen in latest.values():
        if seen.violation == math.inf:
            continue
        value = neutral
        if seen.violation <= 0:
            if seen.loss is not None:
                value = seen.loss
            elif seen.stopped and losses:
                value = max(losses)
            else:
                continue
        answers.append((seen, value, {"violation": seen.violation} if missed else {}))
    return answers


class Tpe(Sampled):
    """Tree-structured Parzen estimators (Bergstra et al. 2011), all slots jointly."""

    name = "tpe"
    summary = "Optuna's TPE over places on the grids"

    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler; running candidates count as bad ones."""
        import optuna

        return optuna.samplers.TPESampler(
            seed=random_seed, n_startup_trials=number, multivariate=True, constant_liar=True
        )


class Nsga2(Sampled):
    """NSGA-II (Deb et al. 2002) on the soft loss alone: requirements are constraints here.

    With one objective it is a genetic algorithm with elitism. Generations hold as many told
    candidates as other samplers need to start.
    """

    name = "nsga2"
    summary = "Optuna's NSGA-II over places on the grids, on the soft loss alone"
    lives = True

    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler."""
        import optuna

        return optuna.samplers.NSGAIISampler(seed=random_seed, population_size=number)


class Gp(Sampled):
    """A Gaussian process and expected improvement. Optuna's needs torch, inside this call only."""

    name = "gp"
    summary = "Optuna's Gaussian process over places on the grids"

    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler."""
        import optuna

        return optuna.samplers.GPSampler(
            seed=random_seed, n_startup_trials=number, warn_independent_sampling=False
        )
