"""The contracted arch against its rivals: equal training, paired top-1, throughput."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from benchmarks.baselines.archs import PRUNING, PUBLISHED, Side, Target, sides_of, target_of
from benchmarks.baselines.jobs import (
    VARIANTS,
    WORKER,
    PrunedTrainJob,
    PrunedVisitJob,
    PruneJob,
    SeedJob,
    not_installed,
    prune,
    train_pruned,
    visit_pruned,
)
from benchmarks.estimates import Floats, Interval, paired_interval, verdict
from benchmarks.trainings import Training, TrainingPool, open_pool
from nas.contract.state import Task
from nas.core.io import load_arrays
from nas.core.progress import Console
from nas.core.requirement import Requirement
from nas.jobs.job import Job, Result
from nas.jobs.queue import OutOfTime
from nas.measure.measurement import Measurement, combined

FIRST_SEED = 2000
"""Random seed of the first equal training."""
INITS = ("inherit", "scratch")
LEAST_TEST_IMAGES = 2000
SLACK = 0.05
"""A pruned net reaches its budget at most this share below it, and not above."""
LIMIT_S = 7200.0
"""A pruning job that takes longer is an outcome."""
SPENT = "not run: the budget is spent, call again"

Tables = dict[str, Floats]
"""Test correctness by the arch's key [random seeds, images]."""
Work = Callable[[Sequence[Job], int, int], Sequence[Result]]
"""Does jobs with so many workers and threads; OutOfTime at the deadline."""


@dataclass(frozen=True)
class BaselineRow:
    """The contracted arch against one rival: the difference in test top-1, and its conditions.

    `estimate`, `lo`, `hi` and the one-sided `lower` are shares; `n` test images, `seeds` random seeds. `ratio` is the
    contracted arch's throughput relative to the rival's, timed interleaved. `image_se`, `seed_se` and `detectable` are
    those of `PairedDifference`. Of a pruned rival: whether it `reached` the contracted arch's parameters, its
    throughput `seed_ratio` relative to the seed, and whether it `loads` in timm. `outcome` is the verdict, or why there
    is none; `misses` is where the contracted arch is not as small and as fast as it has to be.
    """

    name: str
    estimate: float | None = None
    lo: float | None = None
    hi: float | None = None
    n: int = 0
    lower: float | None = None
    seeds: int = 0
    target: str = ""
    init: str = ""
    rival: str = ""
    top1: float | None = None
    top1_rival: float | None = None
    params: int | None = None
    params_rival: int | None = None
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    image_se: float | None = None
    seed_se: float | None = None
    detectable: float | None = None
    reached: bool | None = None
    seed_ratio: float | None = None
    seed_ratio_lo: float | None = None
    seed_ratio_hi: float | None = None
    loads: bool | None = None
    outcome: str = ""
    misses: str = ""
    arch: str = ""
    arch_rival: str = ""
    command: str = ""


def compare(given: argparse.Namespace, console: Console) -> tuple[list[BaselineRow], dict[str, dict[str, Any]]]:
    """Search and train what is missing; return the table's rows and the summary.

    What the hours of this call do not suffice for is left for the next one.
    """
    deadline = time.monotonic() + 3600 * given.budget_hours
    rows: list[BaselineRow] = []
    summary: dict[str, dict[str, Any]] = {"archs": {}, "work": {}}
    with open_pool(given, console) as pool:
        images = len(pool.run.dataset.test.labels)
        if images < LEAST_TEST_IMAGES:
            console.line(f"note: {images} test images, fewer than {LEAST_TEST_IMAGES:,}")
        for text in given.targets:
            target = target_of(pool, text)
            console.line(
                f"{text}: at most {target.most:,} parameters and at least "
                f"{target.min_speedup}x the seed's throughput, as the published {target.published}"
            )
            sides = sides_of(pool, given, target, deadline, console)
            own, rivals = sides[0], sides[1:]
            summary["archs"][text] = {s.role: _label(pool, s) for s in sides}
            summary["work"][text] = {s.role: s.gmacs for s in sides if s.gmacs}
            ratios = {s.role: relative_throughput(pool, own, s) for s in rivals}
            for init in INITS if rivals else INITS[:1]:
                tables, absent = train_equally(pool, sides, init, given, deadline)
                for rival in rivals:
                    base = base_row(pool, target, init, own, rival, ratios[rival.role], given.command)
                    rows.append(compared(pool, base, own, rival, tables, absent))
                if PRUNING in given.against and init == "inherit":
                    base = base_row(pool, target, init, own, Side(PRUNING, None), None, given.command)
                    key = "" if own.arch is None else pool.run.key(own.arch)
                    if key in tables:
                        rows += pruned_rows(pool, base, tables[key], given, deadline)
                    else:
                        missing = own.misses if own.arch is None else absent.get(key, "not run")
                        rows.append(replace(base, outcome=str(missing)))
    return rows, summary


def train_equally(
    pool: TrainingPool, sides: Sequence[Side], init: str, given: argparse.Namespace, deadline: float
) -> tuple[Tables, dict[str, str]]:
    """Train every arch from one start on all random seeds, each arch once.

    Returns the archs' correctness, and by key why others have none.
    """
    run = pool.run
    if sides[0].arch is None:
        return {}, {}
    parent = pool.parent(run.config.importance) if init == "inherit" else None
    archs = {run.key(s.arch): s.arch for s in sides if s.arch is not None}
    wanted = [
        Training(arch, init, given.truth_epochs, FIRST_SEED + s, parent, test=True)
        for s in range(given.seeds)
        for arch in archs.values()
    ]
    try:
        done = pool.train(wanted, deadline)
    except OutOfTime:  # those that ended are kept for the next call
        return {}, dict.fromkeys(archs, SPENT)
    failed = {run.key(t.of.arch): f"training failed: {t.failed}" for t in done if t.failed is not None}
    tables = {
        key: np.array([t.correct() for t in done if run.key(t.of.arch) == key]) for key in archs if key not in failed
    }
    return tables, failed


def relative_throughput(pool: TrainingPool, own: Side, rival: Side) -> Interval | None:
    """Return the contracted arch's throughput relative to a rival's: more visits while its interval straddles 1."""
    run = pool.run
    if own.arch is None or rival.arch is None or run.key(own.arch) == run.key(rival.arch):
        return None
    faster = Requirement("speedup", 1.0, run.timings.primary)
    measured = run.timings.measure(own.arch, "compare", reference=rival.arch, requirements=[faster])
    return None if isinstance(measured, Result) else measured.interval("speedup")


def base_row(
    pool: TrainingPool, target: Target, init: str, own: Side, rival: Side, ratio: Interval | None, command: str
) -> BaselineRow:
    """Return a row without a comparison."""
    role = f"{PUBLISHED} {target.published}" if rival.role == PUBLISHED else rival.role
    middle, lo, hi = ratio or (None, None, None)
    row = BaselineRow(
        f"{target.text}, {init}: contracted less {role}",
        target=target.text,
        init=init,
        rival=role,
        params=_params(pool, own),
        params_rival=_params(pool, rival),
        ratio=middle,
        ratio_lo=lo,
        ratio_hi=hi,
        arch=_label(pool, own),
        arch_rival=_label(pool, rival),
        command=command,
    )
    return replace(row, misses=shortcomings(row, own, rival, target))


def compared(
    pool: TrainingPool, base: BaselineRow, own: Side, rival: Side, tables: Tables, absent: Mapping[str, str]
) -> BaselineRow:
    """Compare the contracted arch with one rival; what is missing is an outcome."""
    keys = []
    for side in (own, rival):
        if side.arch is None:
            return replace(base, outcome=f"{side.role}: {side.misses}")
        keys.append(pool.run.key(side.arch))
        if keys[-1] not in tables:
            return replace(base, outcome=absent.get(keys[-1], "not run"))
    row = with_difference(base, tables[keys[0]], tables[keys[1]])
    outcome = "tie: the same arch" if keys[0] == keys[1] else row.outcome
    misses = "" if rival.misses is None else f" (the rival {rival.misses})"
    return replace(row, outcome=outcome + misses)


def with_difference(base: BaselineRow, own: Floats, rival: Floats) -> BaselineRow:
    """Fill in the difference of two tables of correctness [random seeds, images]."""
    found = paired_interval(own, rival)
    same = ("lo", "hi", "lower", "seeds", "image_se", "seed_se", "detectable")
    values: dict[str, Any] = {name: getattr(found, name) for name in same}
    return replace(
        base,
        **values,
        estimate=found.value,
        n=found.images,
        top1=float(own.mean()),
        top1_rival=float(rival.mean()),
        outcome=verdict(found) + ("" if found.seeds > 1 else " (of one random seed: images only)"),
    )


def shortcomings(of: BaselineRow, own: Side, rival: Side, target: Target) -> str:
    """Return where the contracted arch is not at least as small and as fast as it has to be."""
    found = [] if own.arch is None or own.misses is None else [own.misses]
    if rival.role == PUBLISHED:
        if of.params is not None and of.params > target.most:
            found.append(f"{of.params:,} parameters, more than {target.most:,}")
    elif of.params is not None and of.params_rival is not None and of.params > of.params_rival:
        found.append(f"larger by {of.params / of.params_rival - 1:.1%}")
    if of.ratio_hi is not None and of.ratio_hi < 1:
        found.append(f"slower: {of.ratio:.3f}x its throughput")
    elif of.ratio_lo is not None and of.ratio_lo < 1:
        found.append(f"perhaps slower: {of.ratio:.3f}x its throughput, from {of.ratio_lo:.3f}x")
    return "; ".join(found)


def _params(pool: TrainingPool, side: Side) -> int | None:
    return None if side.arch is None else pool.run.family.count_params(side.arch, pool.run.context)


def _label(pool: TrainingPool, side: Side) -> str:
    return "" if side.arch is None else pool.run.family.label(side.arch)


def pruned_rows(
    pool: TrainingPool, base: BaselineRow, own: Floats, given: argparse.Namespace, deadline: float
) -> list[BaselineRow]:
    """Prune the seed to the contracted arch's parameters by every variant, train and compare."""
    run, config = pool.run, pool.run.config
    assert base.params is not None
    task = run.training(run.seed_arch, "seed", out=run.folder.path, epochs=0, init="inherit", parent=pool.seed)
    shared = {f.name for f in fields(SeedJob)} - {"out", "random_seed", "recalibrate"}
    common: dict[str, Any] = {name: getattr(task.job.argument, name) for name in shared} | {"recalibrate": True}
    options = {"limit_s": LIMIT_S, "log": run.folder.path / "pruning.log", "command": WORKER}

    def work(jobs: Sequence[Job], workers: int, threads: int) -> list[Result]:
        tasks = [Task(job, job.argument.out, 0.0) for job in jobs]
        return pool.do_all(tasks, workers, remember=True, deadline=deadline, threads=threads, **options)

    rows = []
    for number, variant in enumerate(VARIANTS):
        run.console.line(f"{base.target}: {variant.name}")
        row = replace(base, name=f"{base.name}: {variant.name}", rival=variant.name)
        absent = not_installed(variant.tool)
        if absent is not None:
            rows.append(replace(row, outcome=absent))
            continue
        folder = run.folder.path / "pruned" / base.target / f"{number}-of-{base.params}"
        pruning = PruneJob(
            **common, random_seed=config.random_seed, variant=variant, budget=base.params, out=folder / "pruned"
        )
        visits = [
            PrunedVisitJob(
                **common,
                random_seed=config.random_seed,
                pruned=folder / "pruned" / "pruned.safetensors",
                setting=run.primary,
                out=folder / f"visit-{number}",
            )
            for number in range(config.visits)
        ]
        trainings = [
            PrunedTrainJob(
                **common,
                random_seed=seed,
                pruned=folder / "pruned" / "pruned.safetensors",
                epochs=given.truth_epochs,
                out=folder / f"e{given.truth_epochs}-r{seed}",
            )
            for seed in range(FIRST_SEED, FIRST_SEED + given.seeds)
        ]
        rows.append(pruned_row(row, pruning, visits, trainings, own, pool.workers, config.threads, work))
    return rows


def pruned_row(
    base: BaselineRow,
    pruning: PruneJob,
    visits: Sequence[PrunedVisitJob],
    trainings: Sequence[PrunedTrainJob],
    own: Floats,
    workers: int,
    threads: int,
    work: Work,
) -> BaselineRow:
    """Prune, time beside the seed, train on every random seed, and compare."""
    row = base
    try:
        (pruned,) = work([Job(prune, pruning, "prune")], 1, threads)
        if not pruned.ok:
            return replace(row, reached=False, outcome=f"failed: {pruned.reason}")
        params = int(pruned.values["params"])
        found = work([Job(visit_pruned, job, job.out.name, timed=True, fresh=True) for job in visits], 1, threads)
        timed = [Measurement.from_dict(each.values) for each in found if each.ok]
        ratio, lo, hi = combined(timed).interval("speedup") if len(timed) == len(visits) else (None, None, None)
        row = replace(
            row,
            params_rival=params,
            reached=(1 - SLACK) * pruning.budget <= params <= pruning.budget,
            loads=pruned.values["loads"],
            seed_ratio=ratio,
            seed_ratio_lo=lo,
            seed_ratio_hi=hi,
        )
        done = work([Job(train_pruned, job, job.out.name) for job in trainings], workers, 1)
    except OutOfTime:
        return replace(row, outcome=SPENT)
    failed = [each.reason for each in done if not each.ok]
    if failed:
        return replace(row, outcome=f"training failed: {failed[0]}")
    hits = [load_arrays(job.out / "test.safetensors")["correct"] for job in trainings]
    return with_difference(row, own, np.array(hits, dtype=np.float64))
