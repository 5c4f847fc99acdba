"""What is compared at a target: the contracted arch, and the archs that it has to beat."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab import Lab
from nas.contract import contract
from nas.contract.final import nearest_published
from nas.contract.run import RunResult
from nas.core.cli import default_cache
from nas.core.config import EFFORTS, choices_of, effort_defaults, parse_count, steps_of
from nas.core.cpus import usable_cpus
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from nas.jobs.job import Result
from space.contractions import Band
from space.errors import InputError, refuse
from space.family import Arch

CONTRACTED, PUBLISHED, UNIFORM, RANDOM = "contracted", "published", "uniform", "random"
TOLERANCE = 0.1
SIZES = ("steps", "shortlist", "proxied", "beam", "draws", "proxy_epochs")
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


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a comparison; the names are those that `benchmarks.lab.opened` reads."""
    add = parser.add_argument
    hours = "hours for this call (default 2); what is left over is named, calling again goes on"
    add("--budget-hours", type=float, default=2.0, help=hours)
    add("--seed", default="21M", help="the arch that is contracted (default 21M)")
    add("--targets", nargs="+", default=["5M", "11M"], metavar="N", help="default 5M 11M")
    add("--data", default="fractals", help="default fractals")
    add("--img-size", type=int, default=64, help="pixels (default 64)")
    add("--seeds", type=int, default=3, help="random seeds (default 3)")
    longest = "epochs of the equal training (default 5)"
    add("--epochs", dest="truth_epochs", type=int, default=5, help=longest)
    add("--seed-epochs", type=int, default=10, help="default 10")
    add("--teacher-epochs", type=int, default=15, help="default 15")
    add("--effort", default="normal", help=f"of the searches: {', '.join(EFFORTS)} (normal)")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, help="of the searches (that of the effort)")
    ways = choices_of("choose")
    add("--choose", choices=ways, default=ways[0], help=f"as nas.contract (default {ways[0]})")
    add("--device", default="cpu", help="default cpu")
    add("--workers", type=int, default=usable_cpus(), help="trainings at a time")
    add("--random-seed", type=int, default=0, help="of what is drawn (default 0)")
    add("--work", type=Path, help="where trainings are kept (results/runs/lab-...)")
    add("--cache-dir", type=Path, help="data, teachers, labels")


def checked(given: argparse.Namespace) -> argparse.Namespace:
    """Check what the lab does not; give the lab what it asks for besides."""
    if not given.budget_hours > 0:
        raise refuse("--budget-hours", given.budget_hours, "a number of hours above 0")
    if given.seeds < 1:
        raise refuse("--seeds", given.seeds, "an integer >= 1")
    if given.effort not in EFFORTS:
        raise refuse("--effort", given.effort, f"one of {', '.join(EFFORTS)}")
    for text in given.targets:
        parse_count("--targets", text)
    if len(set(given.targets)) < len(given.targets):
        raise refuse("--targets", " ".join(given.targets), "each target once")
    given.target_params = given.targets[0]
    if given.proxy_epochs is None:
        given.proxy_epochs = effort_defaults(given.effort)["proxy_epochs"]
    return given


def target_of(lab: Lab, text: str) -> Target:
    """Say what a target asks for: no more parameters and no less pace than the published arch.

    A published arch of another size altogether (below the band) leaves the band as it is.
    """
    run = lab.run
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


def search_settings(lab: Lab, given: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Return the settings of a search, equal for every strategy."""
    config = lab.run.config
    # All of them, so that a search made with other sizes is not taken for this one.
    asked = {name: getattr(given, name) for name in SIZES}
    start = lab.run.family.count_params(lab.run.seed_arch, lab.run.context)
    usual = {**effort_defaults(given.effort), "steps": steps_of(given.effort, start, target.params)}
    sizes = {k: usual[k] if v is None else v for k, v in asked.items()}
    return {
        **sizes,
        "effort": given.effort,
        "data": config.data,
        "img_size": config.img_size,
        "proxy_images": None,
        "require": (f"params<={target.most}",),
        "min_speedup": target.min_speedup,
        "params_tolerance": TOLERANCE,
        "anchors": False,
        "seed_epochs": config.seed_epochs,
        "teacher_epochs": config.teacher_epochs,
        "final_epochs": 1,  # the equal training is the one that counts
        "bench_batch": config.bench_batch,
        "device": config.device,
        "threads": config.threads,
        "random_seed": config.random_seed,
    }


def search(
    lab: Lab,
    given: argparse.Namespace,
    target: Target,
    role: str,
    deadline: float,
    console: Console,
) -> Side:
    """Search with the strategy of a role, or take over what is finished.

    `deadline` is on `time.monotonic()`. A search that stays stuck gives the best it had.
    """
    strategy = "random" if role == RANDOM else "contraction"
    way = "-spread" if strategy == "contraction" and given.choose == "spread" else ""
    folder = lab.run.folder.path / f"search-{target.text}-{strategy}-{given.effort}{way}"
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
    settings = {**search_settings(lab, given, target), "strategy": strategy}
    if strategy == "contraction":
        settings["choose"] = given.choose
    if (folder / "run.json").exists():
        outcome = contract(resume=True, **common, **settings)
    else:
        try:
            outcome = contract(lab.run.config.seed, target.params, **common, **settings)
        except InputError as refused:  # no contraction of the seed is that small and that fast
            return Side(role, None, f"refused: {refused}")
    console.line(f"{target.text}, {strategy}: {outcome.message}")
    return found_by(lab, role, outcome)


def found_by(lab: Lab, role: str, outcome: RunResult) -> Side:
    """Read what a search ended with."""
    work: Mapping[str, Any] = outcome.result.get("work") or {}
    counted = work.get("trainings"), work.get("train_gmacs")
    best = outcome.folder / "best.json"
    if outcome.status == "stopped":
        return Side(role, None, f"not run: {outcome.message}", *counted)
    if not best.exists():
        return Side(role, None, f"nothing found: {outcome.message}", *counted)
    arch = lab.run.family.arch(read_json(best, "the result of a search")["arch"])
    misses = None if outcome.status == "reached" else outcome.message
    return Side(role, arch, misses, *counted)


def uniform_scaling(lab: Lab, target: Target) -> Side:
    """Return the seed with all widths scaled by one factor: the largest in the target's band."""
    run, band = lab.run, target.band
    scaled = {run.family.scaled(run.seed_arch, k / 512) for k in range(1, 512)}
    sizes = {arch: run.family.count_params(arch, run.context) for arch in scaled}
    inside = [arch for arch, size in sizes.items() if band.lo <= size <= band.hi]
    if not inside:
        return Side(UNIFORM, None, "not run: no scaling of the widths lies in the band")
    found = max(inside, key=lambda arch: (sizes[arch], run.key(arch)))
    measured = run.timings.measure(found, "final", reference=run.seed_arch)
    run.executor.close()
    misses = None
    if (
        not isinstance(measured, Result)
        and measured.ratio_hi is not None
        and measured.ratio_hi < target.min_speedup
    ):
        misses = f"is slower than asked: {measured.ratio:.3g}x the seed's throughput"
    return Side(UNIFORM, found, misses)


def sides_of(
    lab: Lab, given: argparse.Namespace, target: Target, deadline: float, console: Console
) -> list[Side]:
    """Return the contracted arch, then its rivals at a target."""
    return [
        search(lab, given, target, CONTRACTED, deadline, console),
        Side(PUBLISHED, target.published_arch),
        uniform_scaling(lab, target),
        search(lab, given, target, RANDOM, deadline, console),
    ]
