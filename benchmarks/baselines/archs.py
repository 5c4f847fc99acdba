"""The archs of a comparison at one target: the contracted one, and its rivals."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.trainings import TrainingPool
from nas.contract import contract
from nas.contract.final import nearest_published
from nas.contract.run import RunResult
from nas.core.cli import default_cache
from nas.core.config import effort_defaults, parse_count, steps_of
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from nas.jobs.job import Result
from space.contractions import Band
from space.errors import InputError, refuse
from space.family import Arch

CONTRACTED, PUBLISHED, UNIFORM, PRUNING = "contracted", "published", "uniform", "pruning"
TOLERANCE = 0.1
SIZES = ("steps", "candidates_per_step", "train_per_step", "beam", "max_draws", "proxy_epochs")
"""Sizes of a search that have a flag of their own here; without it, those of the effort."""


@dataclass(frozen=True)
class Target:
    """A size to contract to: parameters wanted and at most allowed, the published arch nearest in
    size, and its throughput relative to the seed, which the search requires."""

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
    """One arch of a comparison; `misses` says what it falls short of, None: nothing.

    Without `arch` there is none, and `misses` says why.
    """

    role: str
    arch: Arch | None
    misses: str | None = None
    trainings: int | None = None
    gmacs: float | None = None


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
    if most >= run.family.count_params(run.seed_arch, run.context):
        raise refuse("--targets", text, f"a size below that of --seed {run.config.seed}")
    kept = run.folder.path / f"target-{text}.json"
    if not kept.exists():  # asked once: a search goes on only with its own requirement
        measured = run.timings.measure(arch, "final", reference=run.seed_arch)
        run.executor.close()
        if isinstance(measured, Result):
            raise InputError(f"the published {name} cannot be timed: {measured.reason}")
        assert measured.ratio is not None
        write_json(kept, {"min_speedup": float(f"{measured.ratio:.4g}")})
    least = float(read_json(kept, "the requirement of a search")["min_speedup"])
    return Target(text, wanted, most, name, arch, least)


def search_settings(pool: TrainingPool, given: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Return the settings of a search, equal for every strategy."""
    config = pool.run.config
    # All of them, so that a search made with other sizes is not taken for this one.
    asked = {name: getattr(given, name) for name in SIZES}
    start = pool.run.family.count_params(pool.run.seed_arch, pool.run.context)
    usual = {**effort_defaults(given.effort), "steps": steps_of(given.effort, start, target.params)}
    sizes = {k: usual[k] if v is None else v for k, v in asked.items()}
    return {
        **sizes,
        "effort": given.effort,
        "data": config.data,
        "img_size": config.img_size,
        "max_images": None,
        "require": (f"params<={target.most}",),
        "min_speedup": target.min_speedup,
        "params_tolerance": TOLERANCE,
        "baselines": False,
        "seed_epochs": config.seed_epochs,
        "teacher_epochs": config.teacher_epochs,
        "final_epochs": 1,  # the equal training is the one that counts
        "bench_batch": config.bench_batch,
        "device": config.device,
        "threads": config.threads,
        "random_seed": config.random_seed,
    }


def search(
    pool: TrainingPool, given: argparse.Namespace, target: Target, strategy: str, deadline: float, console: Console
) -> Side:
    """Search with a strategy, or take over what is finished.

    `deadline` is on `time.monotonic()`. A search that stays stuck gives the best it had.
    """
    role = CONTRACTED if strategy == "contraction" else strategy
    way = "-spread" if strategy == "contraction" and given.selection == "diverse" else ""
    folder = pool.run.folder.path / f"search-{target.text}-{strategy}-{given.effort}{way}"
    hours = (deadline - time.monotonic()) / 3600
    finished = (folder / "result.json").exists()
    if hours <= 0.01 and not finished:
        return Side(role, None, "not run: the budget is spent, call again")
    common: dict[str, Any] = {
        "out": folder,
        "max_hours": max(hours, 0.01),
        "console": console,
        "cache_dir": default_cache() if given.cache_dir is None else given.cache_dir,
    }
    settings = {**search_settings(pool, given, target), "strategy": strategy}
    if strategy == "contraction":
        settings["selection"] = given.selection
    if (folder / "run.json").exists():
        outcome = contract(resume=True, **common, **settings)
    else:
        try:
            outcome = contract(pool.run.config.seed, target.params, **common, **settings)
        except InputError as refused:  # no contraction of the seed is that small and that fast
            return Side(role, None, f"refused: {refused}")
    console.line(f"{target.text}, {strategy}: {outcome.message}")
    return found_by(pool, role, outcome)


def found_by(pool: TrainingPool, role: str, outcome: RunResult) -> Side:
    """Read what a search ended with."""
    work: Mapping[str, Any] = outcome.result.get("work") or {}
    counted = work.get("trainings"), work.get("train_gmacs")
    best = outcome.folder / "best.json"
    if outcome.status == "stopped":
        return Side(role, None, f"not run: {outcome.message}", *counted)
    if not best.exists():
        return Side(role, None, f"nothing found: {outcome.message}", *counted)
    arch = pool.run.family.arch(read_json(best, "the result of a search")["arch"])
    misses = None if outcome.status == "reached" else outcome.message
    return Side(role, arch, misses, *counted)


def uniform_scaling(pool: TrainingPool, target: Target) -> Side:
    """Return the seed with all widths scaled by one factor: the largest in the target's band."""
    run, band = pool.run, target.band
    scaled = {run.family.scaled(run.seed_arch, k / 512) for k in range(1, 512)}
    sizes = {arch: run.family.count_params(arch, run.context) for arch in scaled}
    inside = [arch for arch, size in sizes.items() if band.lo <= size <= band.hi]
    if not inside:
        return Side(UNIFORM, None, "not run: no scaling of the widths lies in the band")
    found = max(inside, key=lambda arch: (sizes[arch], run.key(arch)))
    measured = run.timings.measure(found, "final", reference=run.seed_arch)
    run.executor.close()
    misses = None
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
