"""Evolutionary search after SparseViT."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from nas.search.strategies.encoding import Dimension, assembled, dimensions_of
from nas.search.strategies.strategy import Ask, FromSeed, Seen
from space.family import Arch
from space.sampling import nearest, sample_band

MUTATED = 0.1  # probability that a slot of a mutated child is drawn afresh
PARENTS = 4  # one in so many of a population is a parent
TRIES = 100  # draws before a child that equals its parent is taken as it is


class Evolution(FromSeed):
    """Random candidates first, then children of the best: mutated ones and crossings by halves.

    Published (SparseViT, arXiv 2303.17605, and its code): populations of 100 satisfied candidates,
    all evaluated; the best 25 are the parents of the next, of which 50 are mutated (each slot drawn
    afresh with probability 0.1) and 50 cross two distinct parents slot by slot. Scaled here to what
    a run can train, in the same proportions: a population is the last `number` scored candidates,
    its best quarter (two at least) the parents, and half of a list is mutated. As only some of a
    list are trained, the random generation ends once a quarter of a list is scored. Children that
    cannot be built, lie outside the band or were listed before are moved to the nearest that can.
    """

    name = "evolution"
    summary = "random first, then mutations and crossings of the best quarter (SparseViT's scheme)"

    def attempt(self, ask: Ask, number: int, tried: Collection[str]) -> list[Arch]:
        """Breed children, or draw at random while too few are scored."""
        rng = np.random.default_rng(ask.derived_seed())
        parents = _parents(ask)
        if not parents:
            return sample_band(
                ask.family,
                ask.seed,
                ask.context,
                ask.band,
                number,
                random_seed=ask.derived_seed(),
                exclude=tried,
            )
        dimensions = dimensions_of(ask.family, ask.seed, ask.context)
        codes = [np.array([d.index(p.arch) for d in dimensions]) for p in parents]
        children: dict[str, Arch] = {}
        while len(children) < number:
            breed = _mutated if len(children) < number // 2 else _crossed
            child = breed(codes, dimensions, rng)
            wanted = {g.name: int(i) for g, i in zip(dimensions, child, strict=True)}
            arch = nearest(
                ask.family,
                ask.seed,
                assembled(ask.family, ask.seed, dimensions, wanted),
                ask.context,
                ask.band,
                random_seed=int(rng.integers(2**32)),
                exclude={*tried, *children},
            )
            if arch is None:
                break
            children[ask.family.key(arch, ask.context)] = arch
        return list(children.values())

    def describe(self, ask: Ask) -> str:
        """Return the sizes used here and the published ones."""
        return (
            f"{self.summary}: random until {_enough(ask)} are scored, populations of the last "
            f"{_population(ask)} scored, slots mutated with probability {MUTATED} (published: 100 "
            "scored, populations of 100, 25 parents)"
        )


def _enough(ask: Ask) -> int:
    """Return how many candidates must be scored before there are parents."""
    return max(2, ask.number // PARENTS)


def _population(ask: Ask) -> int:
    """Return from how many of the last scored candidates parents are chosen."""
    return max(PARENTS, ask.number)


def _parents(ask: Ask) -> list[Seen]:
    """Return the best quarter of the population; none while too few are scored."""
    if len(ask.scored) < _enough(ask):
        return []
    population = sorted(ask.scored[-_population(ask) :], key=lambda s: (s.loss or 0.0, s.key))
    return population[: max(2, len(population) // PARENTS)]


def _mutated(
    codes: list[np.ndarray], dimensions: tuple[Dimension, ...], rng: np.random.Generator
) -> np.ndarray:
    """Draw some slots of a random parent afresh."""
    parent = codes[rng.integers(len(codes))]
    sizes = np.array([len(g.values) for g in dimensions])
    child = parent
    for _ in range(TRIES):
        afresh = rng.random(len(dimensions)) <= MUTATED
        child = np.where(afresh, rng.integers(0, sizes), parent)
        if (child != parent).any():
            break
    return child


def _crossed(
    codes: list[np.ndarray], dimensions: tuple[Dimension, ...], rng: np.random.Generator
) -> np.ndarray:
    """Take every slot from one of two distinct parents."""
    a, b = rng.choice(len(codes), 2, replace=False)
    return np.asarray(np.where(rng.random(len(dimensions)) < 0.5, codes[a], codes[b]))
