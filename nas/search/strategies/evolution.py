"""Evolutionary search after SparseViT."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from nas.search.strategies.encoding import Dimension, decode, dimensions_of
from nas.search.strategies.strategy import FromSeed, SearchState
from space.family import Arch

MUTATED = 0.1  # probability that a slot of a mutated child is drawn afresh
PARENTS = 4  # one in so many of a population is a parent
TRIES = 100  # draws before a child that equals its parent is taken as it is


class Evolution(FromSeed):
    """Random candidates first, then children of the best: mutated ones and crossings by halves.

    Published (SparseViT, arXiv 2303.17605, and its code): populations of 100 satisfied candidates, all evaluated; the
    best 25 are the parents of the next, of which 50 are mutated (each slot drawn afresh with probability 0.1) and 50
    cross two distinct parents slot by slot. Here it is scaled to what a run can train, in the same proportions: a
    population is the last `number` scored candidates, its best quarter (two at least) the parents, and half of the
    proposals are mutated. Only some proposals are trained, so the random generation ends once a quarter of a proposal
    is scored. A child that is invalid, outside the band or a repeat moves to the nearest valid arch.
    """

    name = "evolution"
    summary = "random first, then mutations and crossings of the best quarter (SparseViT's scheme)"

    def attempt(self, state: SearchState, number: int, tried: Collection[str]) -> list[Arch]:
        """Return children of the best, or random archs while too few are scored."""
        if len(state.scored) < _enough(state):
            return state.sample(number, tried)
        rng = np.random.default_rng(state.derived_seed())
        population = sorted(
            state.scored[-_population(state) :], key=lambda each: (each[0].soft_loss or 0.0, each[0].key)
        )
        parents = [arch for _, arch in population[: max(2, len(population) // PARENTS)]]
        dimensions = dimensions_of(state.family, state.seed, state.context)
        codes = [np.array([dimension.index(parent) for dimension in dimensions]) for parent in parents]
        children: dict[str, Arch] = {}
        while len(children) < number:
            breed = _mutated if len(children) < number // 2 else _crossed
            child = breed(codes, dimensions, rng)
            wanted = {g.name: int(i) for g, i in zip(dimensions, child, strict=True)}
            values = decode(state.family, state.seed, dimensions, wanted)
            arch = state.nearest(values, int(rng.integers(2**32)), {*tried, *children})
            if arch is None:
                break
            children[state.family.key(arch, state.context)] = arch
        return list(children.values())

    def describe(self, state: SearchState) -> str:
        """Return the sizes used here and the published ones."""
        return (
            f"{self.summary}: random until {_enough(state)} are scored, populations of "
            f"the last {_population(state)} scored, slots mutated with probability {MUTATED} "
            "(published: 100 scored, populations of 100, 25 parents)"
        )


def _enough(state: SearchState) -> int:
    """Return how many candidates must be scored before there are parents."""
    return max(2, state.number // PARENTS)


def _population(state: SearchState) -> int:
    """Return from how many of the last scored candidates parents are chosen."""
    return max(PARENTS, state.number)


def _mutated(codes: list[np.ndarray], dimensions: tuple[Dimension, ...], rng: np.random.Generator) -> np.ndarray:
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


def _crossed(codes: list[np.ndarray], dimensions: tuple[Dimension, ...], rng: np.random.Generator) -> np.ndarray:
    """Take every slot from one of two distinct parents."""
    a, b = rng.choice(len(codes), 2, replace=False)
    return np.asarray(np.where(rng.random(len(dimensions)) < 0.5, codes[a], codes[b]))
