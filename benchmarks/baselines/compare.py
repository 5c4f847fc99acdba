"""The contracted arch against its rivals: equal training, paired top-1, throughput."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from benchmarks.baselines.archs import PRUNING, PUBLISHED, Side, Target, sides_of, target_of
from benchmarks.baselines.jobs import WORKER, PrunedTrainJob, PruneJob, SeedJob, prune, train_pruned
from benchmarks.baselines.variants import VARIANTS, not_installed
from benchmarks.estimates import Floats, Interval, paired_interval, verdict
from benchmarks.trainings import Trained, Training, TrainingPool, open_pool
from nas.contract.state import Task
from nas.core.io import load_arrays
from nas.core.progress import Console
from nas.core.requirement import Requirement
from nas.jobs.job import Job, Result

FIRST_SEED = 2000
"""Random seed of the first equal training."""
INITS = ("inherit", "scratch")
LEAST_TEST_IMAGES = 2000
BLOCKS = 30
"""Blocks of a timing that compares two archs, at least."""
PROCESSES = 5
"""Processes that time them, one after the other."""
SLACK = 0.05
"""A pruned net reaches its budget at most this share below it, and not above."""
LIMIT_S = 7200.0
"""A pruning job that takes longer is an outcome."""
SPENT = "not run: the budget is spent, call again"


@dataclass(frozen=True)
class BaselineRow:
    """The contracted arch against one rival: the difference in test top-1, and its conditions.

    `estimate`, `lo`, `hi` and the one-sided `lower` are shares; `n` test images, `seeds` random
    seeds. `ratio` is the contracted arch's throughput relative to the rival's, timed interleaved.
    `image_se`, `seed_se` and `detectable` are those of `PairedDifference`. Of a pruned rival:
    whether it `reached` the contracted arch's parameters, its throughput `seed_ratio` relative to
    the seed, and whether it `loads` in timm. `outcome` is the verdict, or why there is none;
    `misses` says where the contracted arch is not as small and as fast as it has to be.
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


class HourBudget:
    """Hours of this call: what does not fit any more is left for the next one."""

    def __init__(self, hours: float) -> None:
        self.deadline = time.monotonic() + 3600 * hours
        self.guess = 0.0  # seconds a GMAC, until some were spent
        self._seconds = self._cost = 0.0

    def fits(self, cost: float) -> bool:
        """Return whether trainings of so many GMACs still fit, by the pace so far."""
        pace = self._seconds / self._cost if self._cost else self.guess
        return time.monotonic() + pace * cost < self.deadline

    def spent(self, cost: float, seconds: float) -> None:
        """Count trainings that took so long."""
        self._cost += cost
        self._seconds += seconds


def compare(given: argparse.Namespace, console: Console) -> tuple[list[BaselineRow], dict[str, dict[str, Any]]]:
    """Search and train what is missing; return the table's rows and the summary."""
    budget = HourBudget(given.budget_hours)
    rows: list[BaselineRow] = []
    told: dict[str, dict[str, Any]] = {"archs": {}, "work": {}}
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
            sides = sides_of(pool, given, target, budget.deadline, console)
            own, rivals = sides[0], sides[1:]
            ratios = {s.role: relative_throughput(pool, own, s) for s in rivals}
            told["archs"][text] = {s.role: _label(pool, s) for s in sides}
            told["work"][text] = {s.role: s.gmacs for s in sides if s.gmacs}
            pruning = PRUNING in given.against
            for init in INITS if rivals else INITS[:1]:
                tables, absent = train_equally(pool, sides, init, given, budget)
                for rival in rivals:
                    base = base_row(pool, target, init, own, rival, ratios[rival.role], given)
                    rows.append(compared(pool, base, own, rival, tables, absent))
                if pruning and init == "inherit":
                    base = base_row(pool, target, init, own, Side(PRUNING, None), None, given)
                    key = "" if own.arch is None else pool.run.key(own.arch)
                    missing = own.misses if own.arch is None else absent.get(key, "not run")
                    if key in tables:
                        rows += pruned_rows(pool, base, tables[key], given, budget)
                    else:
                        rows.append(replace(base, outcome=str(missing)))
    return rows, told


def train_equally(
    pool: TrainingPool, sides: Sequence[Side], init: str, given: argparse.Namespace, budget: HourBudget
) -> tuple[dict[str, Floats], dict[str, str]]:
    """Train every arch from one start on all random seeds, each arch once, if the budget allows.

    Returns test correctness by the arch's key [random seeds, images], and why others have none.
    """
    run = pool.run
    parent = pool.parent(run.config.importance) if init == "inherit" else None
    archs = {run.key(s.arch): s.arch for s in sides if s.arch is not None}
    if sides[0].arch is None:
        return {}, {}
    wanted = [
        Training(arch, init, given.truth_epochs, FIRST_SEED + s, parent, test=True)
        for s in range(given.seeds)
        for arch in archs.values()
    ]
    missing = pool.missing(wanted)
    cost = sum(pool.cost(t) for t in missing)
    if missing and not budget.guess:
        one = missing[0].arch
        budget.guess = 1 / (pool.pace(one) * run.image_cost(one))
    if missing and not budget.fits(cost):
        return {}, dict.fromkeys(archs, SPENT)
    started = time.monotonic()
    done = pool.train(wanted)
    if missing:
        budget.spent(cost, time.monotonic() - started)
    return correctness_by_key(pool, done)


def correctness_by_key(pool: TrainingPool, done: Sequence[Trained]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Return test correctness by the arch's key [random seeds, images], and why others fail."""
    found: dict[str, dict[int, Floats]] = {}
    failed: dict[str, str] = {}
    for each in done:
        key = pool.run.key(each.of.arch)
        if each.failed is not None:
            failed[key] = f"training failed: {each.failed}"
        else:
            found.setdefault(key, {})[each.of.random_seed] = each.correct()
    tables = {k: np.array([v[s] for s in sorted(v)]) for k, v in found.items() if k not in failed}
    return tables, failed


def relative_throughput(pool: TrainingPool, own: Side, rival: Side) -> Interval | None:
    """Return the contracted arch's throughput relative to a rival's, and the range over processes.

    Timed in several processes, as a process has a layout in memory and a moment of its own, which
    one process's interval does not include: the median of their ratios, from the lowest bound of
    an interval to the highest. Each is timed longer than in a search, and longer still while its
    interval straddles 1, as the gate of a run does.
    """
    run = pool.run
    if own.arch is None or rival.arch is None or run.key(own.arch) == run.key(rival.arch):
        return None
    longer = copy.copy(run.timings)
    longer.config = replace(run.config, bench_blocks=BLOCKS)
    faster = Requirement("speedup", 1.0, run.timings.primary)
    found: list[Interval] = []
    for number in range(PROCESSES):
        role = f"compare-{number}" if number else "compare"
        measured = longer.measure(own.arch, role, reference=rival.arch, requirements=[faster])
        run.executor.close()  # the next one is another process
        if isinstance(measured, Result):
            return None
        assert measured.ratio is not None
        assert measured.ratio_lo is not None
        assert measured.ratio_hi is not None
        found.append((measured.ratio, measured.ratio_lo, measured.ratio_hi))
    ratios, los, his = zip(*found, strict=True)
    return float(np.median(ratios)), min(los), max(his)


def base_row(
    pool: TrainingPool,
    target: Target,
    init: str,
    own: Side,
    rival: Side,
    ratio: Interval | None,
    given: argparse.Namespace,
) -> BaselineRow:
    """Return a row without a comparison."""
    role = f"{PUBLISHED} {target.published}" if rival.role == PUBLISHED else rival.role
    row = BaselineRow(
        f"{target.text}, {init}: contracted less {role}",
        target=target.text,
        init=init,
        rival=role,
        params=_params(pool, own),
        params_rival=_params(pool, rival),
        arch=_label(pool, own),
        arch_rival=_label(pool, rival),
        command=given.command,
    )
    if ratio is not None:
        row = replace(row, ratio=ratio[0], ratio_lo=ratio[1], ratio_hi=ratio[2])
    return replace(row, misses=shortcomings(row, own, rival, target))


def compared(
    pool: TrainingPool,
    base: BaselineRow,
    own: Side,
    rival: Side,
    tables: Mapping[str, Floats],
    absent: Mapping[str, str],
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
    run = pool.run
    return None if side.arch is None else run.family.count_params(side.arch, run.context)


def _label(pool: TrainingPool, side: Side) -> str:
    return "" if side.arch is None else pool.run.family.label(side.arch)


# Pruning tools


def pruned_rows(
    pool: TrainingPool, base: BaselineRow, own: Floats, given: argparse.Namespace, budget: HourBudget
) -> list[BaselineRow]:
    """Prune the seed to the contracted arch's parameters by every variant, train and compare."""
    run, config = pool.run, pool.run.config
    seed = run.training(run.seed_arch, "seed", out=run.folder.path, epochs=0, init="inherit")
    own_job = seed.job.argument
    shared = {f.name for f in fields(SeedJob)} - {"out", "random_seed"}
    common: dict[str, Any] = {name: getattr(own_job, name) for name in shared}

    def work(jobs: Sequence[Job], workers: int, threads: int) -> list[Result]:
        """Do jobs in worker processes, or take their results over; a crash is a result too."""
        tasks = [Task(job, job.argument.out, 0.0) for job in jobs]
        log = run.folder.path / "pruning.log"
        options = {"limit_s": LIMIT_S, "log": log, "command": WORKER}
        return pool.do_all(tasks, workers, threads=threads, remember=True, **options)

    rows = []
    for number, variant in enumerate(VARIANTS):
        run.console.line(f"{base.target}: {variant.name}")
        row = replace(base, name=f"{base.name}: {variant.name}", rival=variant.name)
        absent = not_installed(variant.tool)
        if absent is not None:
            rows.append(replace(row, outcome=absent))
            continue
        assert base.params is not None
        folder = run.folder.path / "pruned" / base.target / f"{number}-of-{base.params}"
        pruning = PruneJob(
            **common,
            random_seed=config.random_seed,
            weights=pool.seed.weights,
            variant=variant,
            budget=base.params,
            setting=run.primary,
            threads=config.threads,
            blocks=config.bench_blocks,
            max_blocks=config.bench_max_blocks,
            out=folder / "pruned",
        )
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
        rows.append(pruned_row(row, pruning, trainings, own, pool.workers, budget, work))
    return rows


def pruned_row(
    base: BaselineRow,
    pruning: PruneJob,
    trainings: Sequence[PrunedTrainJob],
    own: Floats,
    workers: int,
    budget: HourBudget,
    work: Callable[[Sequence[Job], int, int], Sequence[Result]],
) -> BaselineRow:
    """Prune, train on every random seed, and compare; `work` does jobs by (workers, threads)."""
    if not budget.fits(0.0) and not (pruning.out / "result.json").is_file():
        return replace(base, outcome=SPENT)
    (pruned,) = work([Job(prune, pruning, "prune")], 1, pruning.threads)
    if not pruned.ok:
        return replace(base, reached=False, outcome=f"failed: {pruned.reason}")
    params = int(pruned.values["params"])
    base = replace(
        base,
        params_rival=params,
        reached=(1 - SLACK) * pruning.budget <= params <= pruning.budget,
        loads=pruned.values["loads"],
        **{k: pruned.values[k] for k in ("seed_ratio", "seed_ratio_lo", "seed_ratio_hi")},
    )
    if not budget.fits(0.0):
        return replace(base, outcome=SPENT)
    done = work([Job(train_pruned, job, job.out.name) for job in trainings], workers, 1)
    failed = [each.reason for each in done if not each.ok]
    if failed:
        return replace(base, outcome=f"training failed: {failed[0]}")
    hits = [load_arrays(job.out / "test.safetensors")["correct"] for job in trainings]
    return with_difference(base, own, np.array(hits, dtype=np.float64))
