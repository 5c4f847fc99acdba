"""A closed lattice of archs with one loss each, and search strategies replayed on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from nas.contract.state import derived_seed
from nas.search.selection import pick
from nas.search.strategies import Ask, Seen, Strategy
from space.contractions import Band, Candidate
from space.errors import refuse
from space.family import Arch, Array, Context, Family
from space.freeze import freeze
from space.sampling import sample_band


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


def slots_of(family: Family) -> list[str]:
    """Name every slot of every factor, as `space.freeze.freeze` takes them."""
    return [
        f.field if f.scalar else f"{f.field}[{i}]" for f in family.factors for i in range(f.slots)
    ]


def closed(family: Family, seed: Arch, free: Sequence[str]) -> Family:
    """Make a family whose archs move in the `free` slots only, and nowhere the seed itself cannot.

    Some ladders allow a notch up from where an arch stands; taken again and again, that would lead
    contractions of contractions out of what the seed's own contractions are.
    """
    every = slots_of(family)
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


def lattice_of(
    family: Family, seed: Arch, context: Context, bands: Sequence[Band], free: Sequence[str]
) -> Lattice:
    """List the archs that contraction from a seed may meet in these bands, by step."""
    own = closed(family, seed, free)
    archs: dict[str, Arch] = {}
    final: dict[str, Arch] = {}
    for band in bands:
        found = sample_band(own, seed, context, band, 1 << 20, random_seed=0)
        final = {own.key(arch, context): arch for arch in found}
        archs |= final
    ordered = {key: archs[key] for key in sorted(archs)}
    return Lattice(own, context, seed, tuple(bands), ordered, frozenset(final))


@dataclass(frozen=True)
class Settings:
    """How a search goes about it: as in `nas.core.config.RunConfig`; `proxied` 0 scores all "
    "listed."""

    steps: int
    shortlist: int
    proxied: int
    beam: int
    budget: int
    choose: str = "near"


@dataclass(frozen=True)
class Scored:
    """One evaluation of a replayed search, in order."""

    step: int
    key: str
    loss: float


def replay(
    lattice: Lattice,
    losses: Mapping[str, float],
    strategy: Strategy,
    settings: Settings,
    *,
    random_seed: int,
) -> list[Scored]:
    """Replay a search on a table of losses by key; returns every evaluation, at most the budget.

    Strategies are asked as `nas.contract.step` asks them, anchors off. Throughput plays no
    part: all
    that is listed passes, and losses are those of the table whatever the step. A stepwise strategy
    takes its steps, then lists more in the last one; the others take steps until the budget is
    spent. In the last step, what was listed and not scored comes before what is listed anew. Ends
    early when nothing new is listed. An arch that is listed in two steps of contraction counts
    twice, as a run trains it twice.
    """
    family, context = lattice.family, lattice.context
    incumbents, beside = [lattice.seed], dict[str, float]()
    seen: list[Seen] = []
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
        listed = strategy.shortlist(
            Ask(
                step=step,
                steps=settings.steps,
                number=settings.shortlist,
                draw=draw,
                family=family,
                context=context,
                seed=lattice.seed,
                incumbents=tuple(incumbents),
                band=band,
                random_seed=derived_seed(random_seed, "shortlist", step),
                anchors=False,
                # What is scored is not asked for again; what was only listed is, at the very end.
                exclude=frozenset(tried if strategy.stepwise else beside),
                seen=tuple(seen),
            )
        )
        by_key = {family.key(each.arch, context): each for each in listed}
        keys = list(by_key)
        if not keys:
            break
        chosen = keys[: settings.proxied or len(keys)]  # a strategy's best guesses come first
        if strategy.stepwise:
            seed = derived_seed(random_seed, "spread", step, draw)
            chosen = _chosen(lattice, keys, settings, seed)
        chosen = chosen[: settings.budget - len(done)]
        done += [Scored(step, key, losses[key]) for key in chosen]
        for key, each in by_key.items():
            loss = losses[key] if key in chosen else None
            seen.append(Seen(step, each.arch, key, each.params, 0.0, loss, 1.0))
        scored = {key: losses[key] for key in chosen}
        if not strategy.stepwise:
            beside |= scored
            scored = beside
        last = step >= settings.steps
        if strategy.stepwise and last:  # the same parents, more of their contractions
            draw, tried = draw + 1, tried | set(keys)
            left = [key for key in keys if key not in chosen]
            continue
        kept = sorted(scored, key=lambda k: (scored[k], k))
        incumbents = [lattice.archs[k] for k in kept[: settings.beam]]
        step, draw, tried = step + 1, 0, set()
    return done


def _chosen(
    lattice: Lattice, keys: Sequence[str], settings: Settings, random_seed: int
) -> list[str]:
    """Choose which of the listed archs are scored, all as fast as each other."""
    if not settings.proxied:
        return list(keys)
    seed = lattice.seed
    listed = [Candidate(lattice.archs[key], key, 0, 0, 0, (), None, seed) for key in keys]
    features = {key: _numbers(lattice, key) for key in keys}
    chosen = pick(listed, features, settings.proxied, settings.choose, random_seed=random_seed)
    return [candidate.key for candidate in chosen]


def _numbers(lattice: Lattice, key: str) -> tuple[float, ...]:
    values = lattice.family.to_dict(lattice.archs[key]).values()
    return tuple(
        float(v) for value in values for v in (value if isinstance(value, list) else [value])
    )


def reached_after(done: Sequence[Scored], lattice: Lattice, goal: float) -> float:
    """Return after how many evaluations an arch of the last band met the goal; inf if none did."""
    for at, scored in enumerate(done):
        if scored.key in lattice.final and scored.loss <= goal:
            return float(at + 1)
    return math.inf


def best_so_far(done: Sequence[Scored], lattice: Lattice, budget: int) -> list[float]:
    """Return the best loss in the last band after 1, 2, ... evaluations; inf before there is one.

    A search that ended early keeps what it had.
    """
    found, best = [], math.inf
    for at in range(budget):
        if at < len(done) and done[at].key in lattice.final:
            best = min(best, done[at].loss)
        found.append(best)
    return found
