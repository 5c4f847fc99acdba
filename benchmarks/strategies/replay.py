"""A closed lattice of archs with one loss each, and search strategies replayed on it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np

from nas.contract.checks import make_config
from nas.contract.state import derived_seed
from nas.core.config import parse_count, steps_of
from nas.search.constraints import band_at
from nas.search.selection import pick
from nas.search.strategies import SearchState, Strategy, get_strategy
from nas.search.study import Trial
from space import Context, get_family
from space.contractions import Band, Candidate
from space.errors import refuse
from space.family import Arch, Array, Family
from space.freeze import freeze
from space.sampling import sample_band

FIXED = ("uniform",)
"""Strategies whose answers no random seed changes: replayed once."""


@dataclass(frozen=True)
class Lattice:
    """The contractions of a seed in the bands of all steps; nothing leads out of it.

    `archs` by key; `final`: the keys inside the last step's band.
    """

    family: Family
    context: Context
    seed: Arch
    bands: tuple[Band, ...]
    archs: Mapping[str, Arch]
    final: frozenset[str]


def closed(family: Family, seed: Arch, free: Sequence[str]) -> Family:
    """Make a family whose archs move in the `free` slots only, and nowhere the seed itself cannot.

    Some grids allow a step up from where an arch stands; taken again and again, that would lead contractions of
    contractions out of what the seed's own contractions are. Raises InputError.
    """
    every = [f.field if f.scalar else f"{f.field}[{i}]" for f in family.factors for i in range(f.slots)]
    unknown = [name for name in free if name not in every]
    if unknown:
        raise refuse("--free", unknown[0], f"one of {', '.join(every)}")
    frozen = freeze(family, seed, [name for name in every if name not in free])
    kind = type(frozen)
    allowed = {f: {_joint(v) for v in values} for f, values in frozen.moves(seed).items()}

    def moves(self: Family, arch: Arch) -> dict[str, Array]:
        """Give the joint values per factor that the seed reaches too (see `Family.moves`)."""
        found = kind.moves(self, arch)
        return {f: values[[_joint(v) in allowed[f] for v in values]] for f, values in found.items()}

    made = type(f"Closed{kind.__name__}", (kind,), {"moves": moves, "__module__": __name__})
    result = cast(Family, object.__new__(made))
    vars(result).update(vars(frozen))
    return result


def _joint(value: Any) -> tuple[float, ...]:
    return tuple(np.atleast_1d(value).tolist())


def lattice_of(family: Family, seed: Arch, context: Context, bands: Sequence[Band], free: Sequence[str]) -> Lattice:
    """List the archs that contraction from a seed may meet in these bands, by step."""
    own = closed(family, seed, free)
    archs: dict[str, Arch] = {}
    final: dict[str, Arch] = {}
    for band in bands:
        found = sample_band(own, seed, context, band, 1 << 20, random_seed=0)
        final = {own.key(arch, context): arch for arch in found}
        archs |= final
    return Lattice(own, context, seed, tuple(bands), dict(sorted(archs.items())), frozenset(final))


@dataclass(frozen=True)
class ReplaySettings:
    """Sizes of a search, as in `nas.core.config.RunConfig`; `train_per_step` 0 scores all listed."""

    steps: int
    candidates_per_step: int
    train_per_step: int
    beam: int
    budget: int
    selection: str = "nearest"


@dataclass(frozen=True)
class Scored:
    """One evaluation of a replayed search, in order."""

    step: int
    key: str
    loss: float


def replay(
    lattice: Lattice, losses: Mapping[str, float], strategy: Strategy, settings: ReplaySettings, *, random_seed: int
) -> list[Scored]:
    """Replay a search on a table of losses by key; returns every evaluation, at most the budget.

    Strategies are asked as a run asks them, without baselines. All that is listed counts as fast enough, and losses are
    those of the table whatever the step. A stepwise strategy takes its steps, then lists more in the last one; the
    others take steps until the budget is spent. In the last step, what was listed and not scored comes before what is
    listed anew. Ends early when nothing new is listed. An arch that is listed in two steps of contraction counts twice,
    as a run trains it twice.
    """
    family, context = lattice.family, lattice.context
    incumbents, beside = [lattice.seed], dict[str, float]()
    past: list[tuple[Trial, Arch]] = []
    done: list[Scored] = []
    tried: set[str] = set()
    step, draw = 1, 0
    left: list[str] = []
    while len(done) < settings.budget:
        if left:
            chosen = _chosen(lattice, left, settings, derived_seed(random_seed, "left", draw))
            chosen = chosen[: settings.budget - len(done)]
            done += [Scored(step, key, losses[key]) for key in chosen]
            left = [key for key in left if key not in chosen]
            continue
        band = lattice.bands[min(step, settings.steps) - 1 if strategy.stepwise else -1]
        listed = strategy.propose(
            SearchState(
                step=step,
                steps=settings.steps,
                number=settings.candidates_per_step,
                draw=draw,
                family=family,
                context=context,
                seed=lattice.seed,
                incumbents=tuple(incumbents),
                band=band,
                random_seed=derived_seed(random_seed, "shortlist", step),
                baselines=False,
                # What is scored is not asked for again; what was only listed is, at the very end.
                exclude=frozenset(tried if strategy.stepwise else beside),
                trials=tuple(past),
            )
        )
        by_key = {family.key(each.arch, context): each for each in listed}
        keys = list(by_key)
        if not keys:
            break
        chosen = keys[: settings.train_per_step or len(keys)]  # a strategy's best guesses come first
        if strategy.stepwise:
            chosen = _chosen(lattice, keys, settings, derived_seed(random_seed, "spread", step, draw))
        chosen = chosen[: settings.budget - len(done)]
        done += [Scored(step, key, losses[key]) for key in chosen]
        for key, each in by_key.items():
            past.append((_trial(step, each, losses[key] if key in chosen else None), each.arch))
        scored = {key: losses[key] for key in chosen}
        if not strategy.stepwise:
            beside |= scored
            scored = beside
        elif step >= settings.steps:  # the same parents, more of their contractions
            draw, tried = draw + 1, tried | set(keys)
            left = [key for key in keys if key not in chosen]
            continue
        kept = sorted(scored, key=lambda k: (scored[k], k))
        incumbents = [lattice.archs[k] for k in kept[: settings.beam]]
        step, draw, tried = step + 1, 0, set()
    return done


def _trial(step: int, candidate: Candidate, loss: float | None) -> Trial:
    """Return a candidate as a trial: scored, or not selected where it has no loss."""
    return Trial(
        step=step,
        key=candidate.key,
        label="",
        parent="",
        moves="",
        grid_steps=candidate.grid_steps,
        baseline="",
        params=candidate.params,
        params_1000=candidate.params,
        macs=candidate.macs,
        ratio=1.0,
        soft_loss=loss,
        stage="selection" if loss is None else "proxy",
        state="pruned" if loss is None else "complete",
    )


def _chosen(lattice: Lattice, keys: Sequence[str], settings: ReplaySettings, random_seed: int) -> list[str]:
    """Choose which of the listed archs are scored, all as fast as each other."""
    if not settings.train_per_step:
        return list(keys)
    listed = [Candidate(lattice.archs[key], key, 0, 0, 0, (), None, lattice.seed) for key in keys]
    features = {
        key: tuple(float(v) for value in lattice.family.to_dict(lattice.archs[key]).values() for v in _joint(value))
        for key in keys
    }
    chosen = pick(listed, features, settings.train_per_step, settings.selection, random_seed=random_seed)
    return [candidate.key for candidate in chosen]


def best_so_far(done: Sequence[Scored], lattice: Lattice, budget: int) -> list[float]:
    """Return the best loss in the last band after 1, 2, ... evaluations; inf before there is one.

    A search that ended early keeps what it had.
    """
    found = np.full(budget, math.inf)
    for at, each in enumerate(done[:budget]):
        found[at] = each.loss if each.key in lattice.final else math.inf
    return [float(best) for best in np.minimum.accumulate(found)]


def reached_after(done: Sequence[Scored], lattice: Lattice, goal: float) -> float:
    """Return after how many evaluations an arch of the last band met the goal; inf if none did."""
    best = best_so_far(done, lattice, len(done))
    return next((float(at) for at, loss in enumerate(best, start=1) if loss <= goal), math.inf)


@dataclass(frozen=True)
class ClosedTable:
    """A CSV file with the loss of every arch of a lattice, and the flags that made it."""

    path: Path
    seed: str
    target_params: str
    free: str
    img_size: int
    num_classes: int
    effort: str
    steps: int | None

    def lattice(self) -> Lattice:
        """List the archs. Raises InputError."""
        family = get_family("tinyvit")
        seed, context = family.seed(self.seed), Context(self.img_size, self.num_classes)
        start = family.count_params(seed, context)
        target = parse_count("--target-params", self.target_params)
        steps = self.steps or steps_of(self.effort, start, target)
        asked = {"seed": self.seed, "effort": self.effort, "img_size": self.img_size}
        config = make_config({**asked, "target_params": target, "steps": steps})
        bands = [band_at(start, config, step) for step in range(1, steps + 1)]
        return lattice_of(family, seed, context, bands, self.free.split(","))

    def losses(self, lattice: Lattice) -> dict[str, float]:
        """Read the losses of the archs, by key. Raises InputError."""
        import pandas as pd

        try:
            found = pd.read_csv(self.path, usecols=["key", "soft_loss"]).set_index("key")["soft_loss"]
        except (OSError, ValueError) as error:
            got = f"{self.path} ({str(error).splitlines()[0]})"
            raise refuse("--table", got, "a table with key, soft_loss") from None
        missing = [key for key in lattice.archs if key not in found.index]
        if missing:
            got = f"{self.path} without {len(missing)} of {len(lattice.archs)} archs"
            raise refuse("--table", got, "all of them", "give the flags that made the table")
        return {key: float(found[key]) for key in lattice.archs}


@lru_cache(maxsize=1)
def open_table(table: ClosedTable) -> tuple[Lattice, dict[str, float]]:
    """Return the archs and losses of a table, read once a process. Raises InputError."""
    lattice = table.lattice()
    return lattice, table.losses(lattice)


def replay_one(table: ClosedTable, name: str, settings: ReplaySettings, random_seed: int) -> list[Scored]:
    """Replay one search, in whatever process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return replay(*open_table(table), get_strategy(name), settings, random_seed=random_seed)


def replay_all(
    table: ClosedTable, names: Sequence[str], settings: ReplaySettings, number: int, workers: int
) -> dict[str, list[list[Scored]]]:
    """Replay `number` searches of every strategy, `workers` at a time."""
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn")) as pool:
        waiting = {
            name: [pool.submit(replay_one, table, name, settings, s) for s in range(1 if name in FIXED else number)]
            for name in names
        }
        return {name: [each.result() for each in all_of] for name, all_of in waiting.items()}
