"""Optuna's samplers as strategies: TPE, NSGA-II and a Gaussian process.

Each proposal makes a new sampler and adds the past trials of the `SearchState` to it, so that a resumed run repeats
itself. A sampler gets

- scored trials: complete, with their soft loss, the one objective;
- trials that missed a requirement: complete, with their violation as a constraint and, as they have
  no loss, the mean of the known losses, which is neutral;
- no trial that met everything but was not trained, as its loss is unknown, and no failure.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from nas.search.strategies.encoding import decode, dimensions_of
from nas.search.strategies.strategy import FromSeed, SearchState
from space.family import Arch

if TYPE_CHECKING:
    import optuna


def startup_trials(state: SearchState) -> int:
    """Return how many trials a sampler needs: Optuna's ten, fewer for short lists.

    With fewer it draws each slot uniformly.
    """
    return min(10, max(5, state.number // 2))


class Sampled(FromSeed):
    """A strategy that asks an Optuna sampler for one choice per slot of a factor.

    Choices are integers in ascending order, so that their distance has a meaning. Each suggestion moves to the nearest
    new contraction in the band, which is added as a running trial so that the next suggestion differs.
    """

    generational: ClassVar[bool] = False
    """Whether past trials pass through ask and tell, for a sampler that counts generations."""

    @abstractmethod
    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler; `number` is how many trials it needs before it models them."""

    def attempt(self, state: SearchState, number: int, tried: Collection[str]) -> list[Arch]:
        """Add the past trials, then ask for suggestions until there are enough."""
        import optuna
        from optuna.distributions import BaseDistribution, IntDistribution
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        dimensions = dimensions_of(state.family, state.seed, state.context)
        space: dict[str, BaseDistribution] = {g.name: IntDistribution(0, len(g.values) - 1) for g in dimensions}

        def known(arch: Arch, **more: Any) -> optuna.trial.FrozenTrial:
            return create_trial(params={g.name: g.index(arch) for g in dimensions}, distributions=space, **more)

        random_seed = state.derived_seed()
        study = optuna.create_study(sampler=self.sampler(random_seed, startup_trials(state)))
        for past, value, constraints in past_trials(state):
            if not self.generational:
                study.add_trial(known(past, value=value, constraints=dict(constraints)))
                continue
            study.enqueue_trial(known(past, value=value).params)
            trial = study.ask(space)
            assert isinstance(study.sampler, optuna.samplers.NSGAIISampler)
            # A trial with fixed values never reaches the sampler, which would number it.
            study.sampler.get_trial_generation(study, study.trials[trial.number])
            for name, violation in constraints.items():
                trial.set_constraint(name, violation)
            study.tell(trial, value)
        found: dict[str, Arch] = {}
        while len(found) < number:
            trial = study.ask(space)
            study.tell(trial, state=TrialState.FAIL)  # the moved arch follows
            values = decode(state.family, state.seed, dimensions, trial.params)
            arch = state.nearest(values, random_seed + len(found), {*tried, *found})
            if arch is None:
                break
            found[state.family.key(arch, state.context)] = arch
            study.add_trial(known(arch, state=TrialState.RUNNING))
        return list(found.values())

    def describe(self, state: SearchState) -> str:
        """Return how many candidates are drawn at random before the model is used."""
        return f"{self.summary}, drawn at random until {startup_trials(state)} are known"


def past_trials(state: SearchState) -> list[tuple[Arch, float, Mapping[str, float]]]:
    """Return what a sampler learns from: (arch, value, violations by name).

    In order of decision, each net once: as it was scored, else as decided last. A trial that a race stopped counts as
    the worst scored one. Violations are given only if there are any.
    """
    latest = {trial.key: (trial, arch) for trial, arch in (*state.trials, *state.scored)}
    losses = [trial.soft_loss for trial, _ in state.scored if trial.soft_loss is not None]
    decided = [each for each in latest.values() if each[0].state != "failed"]
    missed = any(trial.violation > 0 for trial, _ in decided)
    found: list[tuple[Arch, float, Mapping[str, float]]] = []
    for trial, arch in decided:
        value = None
        if trial.violation > 0:
            value = math.fsum(losses) / max(len(losses), 1)
        elif trial.state == "complete":
            value = trial.soft_loss
        elif trial.stage == "race" and losses:
            value = max(losses)
        if value is not None:
            found.append((arch, value, {"violation": trial.violation} if missed else {}))
    return found


class Tpe(Sampled):
    """Tree-structured Parzen estimators (Bergstra et al. 2011), all slots jointly."""

    name = "tpe"
    summary = "Optuna's TPE over positions among the choices"

    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler; running candidates count as bad ones."""
        import optuna

        return optuna.samplers.TPESampler(
            seed=random_seed, n_startup_trials=number, multivariate=True, constant_liar=True
        )


class Nsga2(Sampled):
    """NSGA-II (Deb et al. 2002) on the soft loss alone: requirements are constraints here.

    With one objective it is a genetic algorithm with elitism. Generations hold as many trials as other samplers need to
    start.
    """

    name = "nsga2"
    summary = "Optuna's NSGA-II over positions among the choices, on the soft loss alone"
    generational = True

    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler."""
        import optuna

        return optuna.samplers.NSGAIISampler(seed=random_seed, population_size=number)


class Gp(Sampled):
    """A Gaussian process and expected improvement. Optuna's needs torch, inside this call only."""

    name = "gp"
    summary = "Optuna's Gaussian process over positions among the choices"

    def sampler(self, random_seed: int, number: int) -> optuna.samplers.BaseSampler:
        """Make the sampler."""
        import optuna

        return optuna.samplers.GPSampler(seed=random_seed, n_startup_trials=number, warn_independent_sampling=False)
