"""Many searches replayed on one table, in several processes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

from benchmarks._lattice import Lattice, Scored, Settings, lattice_of, replay
from nas.search.strategies import get_strategy
from space import Context, get_family
from space.contractions import Band

FIXED = ("uniform",)
"""Strategies whose answers no random seed changes: replayed once."""


@dataclass(frozen=True)
class World:
    """A lattice and its losses as plain values, to send to another process."""

    family: str
    seed: str
    context: Context
    bands: tuple[Band, ...]
    free: tuple[str, ...]
    losses: tuple[tuple[str, float], ...]


@lru_cache(maxsize=2)
def _opened(world: World) -> Lattice:
    family = get_family(world.family)
    seed = family.arch(json.loads(world.seed))
    return lattice_of(family, seed, world.context, world.bands, world.free)


def search(world: World, name: str, settings: Settings, random_seed: int) -> list[Scored]:
    """Replay one search, in whatever process."""
    losses = dict(world.losses)
    return replay(_opened(world), losses, get_strategy(name), settings, random_seed=random_seed)


def _single_threaded() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


def searches(
    world: World, names: Sequence[str], settings: Settings, number: int, workers: int
) -> dict[str, list[list[Scored]]]:
    """Replay `number` searches of every strategy, `workers` at a time."""
    todo = [(n, s) for n in names for s in range(1 if n in FIXED else number)]
    if workers == 1:
        done = [search(world, n, settings, s) for n, s in todo]
    else:
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_single_threaded
        ) as pool:
            waiting = [pool.submit(search, world, n, settings, s) for n, s in todo]
            done = [each.result() for each in waiting]
    found: dict[str, list[list[Scored]]] = {name: [] for name in names}
    for (name, _), one in zip(todo, done, strict=True):
        found[name].append(one)
    return found
