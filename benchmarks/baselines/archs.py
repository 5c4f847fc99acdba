"""The archs of a comparison at one target: the contracted one, and its rivals."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.trainings import TrainingPool
from nas.contract import contract
from nas.contract.final import nearest_published
from nas.core.config import effort_defaults, parse_count, steps_of
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from nas.jobs.job import Result
from nas.measure.measurement import Measurement
from space.contractions import Band
from space.errors import InputError, refuse
from space.family import Arch

CONTRACTED, PUBLISHED, UNIFORM, PRUNING = "contracted", "published", "uniform", "pruning"
TOLERANCE = 0.1
SIZES = ("steps", "candidates_per_step", "train_per_step", "beam", "max_draws", "proxy_epochs")
"""Sizes of a search that have a flag of their own here; without it, those of the effort."""
SHARED = ("data", "img_size", "seed_epochs", "teacher_epochs", "bench_batch", "device", "threads", "random_seed")
"""Settings of a search that are those of the trainings."""


@dataclass(frozen=True)
class Target:
    """A size to contract to: parameters wanted and at most allowed, the published arch nearest in size, and its
    throughput relative to the seed, which the search requires."""

    text: str
    params: int
    most: int
    published: str
    published_arch: Arch
    min_speedup: float

    @property
    def band(self) -> Band:
        """The parameter band that every rival lies in; the published arch may lie outside."""
        lo = round(self.params * (1 - TOLERANCE))
        return Band(lo, min(self.most, round(self.params * (1 + TOLERANCE))))


@dataclass(frozen=True)
class Side:
    """One arch of a comparison, and what it falls short of (None: nothing); without `arch`, why there is none."""

    role: str
    arch: Arch | None
    misses: str | None = None
    gmacs: float | None = None


def timed(pool: TrainingPool, arch: Arch) -> Measurement | Result:
    """Measure an arch beside the seed, or return why that failed."""
    measured = pool.run.timings.measure(arch, "final", reference=pool.run.seed_arch)
    pool.run.executor.close()
    return measured


def target_of(pool: TrainingPool, text: str) -> Target:
    """Return a target: no more parameters, no less throughput than the published arch of its size.

    A published arch of another size altogether (below the band) leaves the band as it is.
    """
    run = pool.run
    wanted = parse_count("--targets", text)
    name, arch = nearest_published(run, wanted)
    size = run.family.count_params(arch, run.context)
    most = round(wanted * (1 + TOLERANCE))
    if abs(size / wanted - 1) <= 0.25:  # the same size by another count of classes
        wanted, most = min(wanted, size), min(most, size)
    if most >= run.start_params:
        raise refuse("--targets", text, f"a size below that of --seed {run.config.seed}")
    kept = run.folder.path / f"target-{text}.json"
    if not kept.exists():  # asked once: a search goes on only with its own requirement
        measured = timed(pool, arch)
        if isinstance(measured, Result):
            raise InputError(f"the published {name} cannot be timed: {measured.reason}")
        assert measured.ratio is not None
        write_json(kept, {"min_speedup": float(f"{measured.ratio:.4g}")})
    least = float(read_json(kept, "the requirement of a search")["min_speedup"])
    return Target(text, wanted, most, name, arch, least)


def search_settings(pool: TrainingPool, given: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Return the settings of a search, equal for every strategy."""
    steps = steps_of(given.effort, pool.run.start_params, target.params)
    usual = {**effort_defaults(given.effort), "steps": steps}
    asked = {name: getattr(given, name) for name in SIZES}
    return {
        # All of them, so that a search made with other sizes is not taken for this one.
        **{name: usual[name] if value is None else value for name, value in asked.items()},
        **{name: getattr(pool.run.config, name) for name in SHARED},
        "effort": given.effort,
        "max_images": None,
        "require": (f"params<={target.most}",),
        "min_speedup": target.min_speedup,
        "params_tolerance": TOLERANCE,
        "baselines": False,
        "final_epochs": 1,  # the equal training is the one that counts
    }


def search(
    pool: TrainingPool, given: argparse.Namespace, target: Target, strategy: str, deadline: float, console: Console
) -> Side:
    """Search with a strategy, or take over what is finished.

    `deadline` is on `time.monotonic()`. A search that stays stuck gives the best it had.
    """
    contracted = strategy == "contraction"
    role = CONTRACTED if contracted else strategy
    way = "-spread" if contracted and given.selection == "diverse" else ""
    folder = pool.run.folder.path / f"search-{target.text}-{strategy}-{given.effort}{way}"
    hours = (deadline - time.monotonic()) / 3600
    if hours <= 0.01 and not (folder / "result.json").exists():
        return Side(role, None, "not run: the budget is spent, call again")
    settings = {**search_settings(pool, given, target), "strategy": strategy}
    settings |= {"out": folder, "max_hours": max(hours, 0.01), "console": console, "cache_dir": given.cache_dir}
    if contracted:
        settings["selection"] = given.selection
    resume = (folder / "run.json").exists()
    start = () if resume else (pool.run.config.seed, target.params)
    try:
        outcome = contract(*start, resume=resume, **settings)
    except InputError as refused:
        if resume:
            raise
        return Side(role, None, f"refused: {refused}")  # no contraction of the seed is that small and that fast
    console.line(f"{target.text}, {strategy}: {outcome.message}")
    gmacs = (outcome.result.get("work") or {}).get("train_gmacs")
    best = outcome.folder / "best.json"
    if outcome.status == "stopped" or not best.exists():
        what = "not run" if outcome.status == "stopped" else "nothing found"
        return Side(role, None, f"{what}: {outcome.message}", gmacs)
    arch = pool.run.family.arch(read_json(best, "the result of a search")["arch"])
    return Side(role, arch, None if outcome.status == "reached" else outcome.message, gmacs)


def uniform_scaling(pool: TrainingPool, target: Target) -> Side:
    """Return the seed with all widths scaled by one factor: the largest in the target's band."""
    run, band = pool.run, target.band
    scaled = {run.family.scaled(run.seed_arch, k / 512) for k in range(1, 512)}
    sizes = {arch: run.family.count_params(arch, run.context) for arch in scaled}
    inside = [arch for arch, size in sizes.items() if band.lo <= size <= band.hi]
    if not inside:
        return Side(UNIFORM, None, "not run: no scaling of the widths lies in the band")
    found = max(inside, key=lambda arch: (sizes[arch], run.key(arch)))
    measured, misses = timed(pool, found), None
    if not isinstance(measured, Result) and measured.ratio_hi is not None and measured.ratio_hi < target.min_speedup:
        misses = f"is slower than asked: {measured.ratio:.3g}x the seed's throughput"
    return Side(UNIFORM, found, misses)


def sides_of(
    pool: TrainingPool, given: argparse.Namespace, target: Target, deadline: float, console: Console
) -> list[Side]:
    """Return the contracted arch, then its rivals of `--against` at a target."""
    sides = [search(pool, given, target, "contraction", deadline, console)]
    for rival in given.against:
        if rival == PUBLISHED:
            sides.append(Side(PUBLISHED, target.published_arch))
        elif rival == UNIFORM:
            sides.append(uniform_scaling(pool, target))
        elif rival != PRUNING:
            sides.append(search(pool, given, target, rival, deadline, console))
    return sides
