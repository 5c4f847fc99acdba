"""Is the contracted arch worth its search? `python -m benchmarks.baselines`.

At each target, the contracted arch is compared with the published one nearest in size, the seed's
widths scaled uniformly, and the best of as many random archs as the contraction scored. The search
is required to use no more parameters than the published arch and to be no slower, measured. All are
then trained equally, from scratch and from the same trained seed, on several random seeds, and
tested. The table holds differences in test top-1, paired over images and seeds: "not worse by 1.5
points" is by the one-sided 95 % bound, "better" by the two-sided interval.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.baselines.archs import (
    CONTRACTED,
    PUBLISHED,
    Side,
    Target,
    arguments,
    checked,
    sides_of,
    target_of,
)
from benchmarks.baselines.verdict import MARGIN, paired_interval, verdict
from benchmarks.lab import Lab, Trained, Training, opened
from nas.core.cli import Parser, guarded
from nas.core.io import write_atomic, write_json
from nas.core.progress import Console
from nas.core.requirement import Requirement
from nas.core.table import Writer
from nas.jobs.job import Result

Floats = npt.NDArray[np.float64]

FIRST_SEED = 2000
"""Random seed of the first equal training."""
INITS = ("inherit", "scratch")
LEAST_TEST_IMAGES = 2000
BLOCKS = 30
"""Blocks of a timing that compares two archs, at least."""
SITTINGS = 5
"""Processes that time them, one after the other."""


@dataclass(frozen=True)
class ResultRow:
    """The contracted arch against one rival: the difference in test top-1, and what goes with it.

    `estimate`, `lo`, `hi` and the one-sided `lower` are shares; `n` test images, `seeds` random
    seeds. `ratio` is the contracted arch's throughput relative to the rival's, timed interleaved.
    `image_se`, `seed_se` and `detectable` are those of `Paired`. `outcome` is the verdict, or why
    there is none.
    """

    name: str
    estimate: float | None
    lo: float | None
    hi: float | None
    n: int
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
    outcome: str = ""
    misses: str = ""
    arch: str = ""
    arch_rival: str = ""
    command: str = ""


def trainings(
    lab: Lab, sides: Sequence[Side], init: str, given: argparse.Namespace
) -> list[Training]:
    """Return the equal trainings of all archs from one start, each arch as built once."""
    parent = lab.parent(lab.run.config.importance) if init == "inherit" else None
    archs = {lab.run.key(s.arch): s.arch for s in sides if s.arch is not None}
    return [
        Training(arch, init, given.truth_epochs, FIRST_SEED + s, parent, test=True)
        for s in range(given.seeds)
        for arch in archs.values()
    ]


def tested(lab: Lab, done: Sequence[Trained]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Return correctness by the arch's key [random seeds, images], and why others have none."""
    found: dict[str, dict[int, Floats]] = {}
    failed: dict[str, str] = {}
    for each in done:
        key = lab.run.key(each.of.arch)
        if each.failed is not None:
            failed[key] = f"training failed: {each.failed}"
        else:
            found.setdefault(key, {})[each.of.random_seed] = each.correct()
    tables = {k: np.array([v[s] for s in sorted(v)]) for k, v in found.items() if k not in failed}
    return tables, failed


class Budget:
    """Hours of this call: what would not fit any more is left for the next one."""

    def __init__(self, hours: float) -> None:
        self.deadline = time.monotonic() + 3600 * hours
        self.guess = 0.0  # seconds a GMAC, until some were spent
        self._seconds = self._cost = 0.0

    def fits(self, cost: float) -> bool:
        """Tell whether trainings of so many GMACs still fit, by the pace so far."""
        pace = self._seconds / self._cost if self._cost else self.guess
        return time.monotonic() + pace * cost < self.deadline

    def spent(self, cost: float, seconds: float) -> None:
        """Learn from trainings that took so long."""
        self._cost += cost
        self._seconds += seconds


def compare(
    given: argparse.Namespace, console: Console
) -> tuple[list[ResultRow], dict[str, object]]:
    """Search and train what is missing; return the table's rows and what else is told."""
    budget = Budget(given.budget_hours)
    rows: list[ResultRow] = []
    told: dict[str, object] = {"archs": {}, "work": {}}
    with opened(given, console) as lab:
        images = len(lab.run.dataset.test.labels)
        if images < LEAST_TEST_IMAGES:
            console.line(f"note: {images} test images, fewer than {LEAST_TEST_IMAGES:,}")
        for text in given.targets:
            target = target_of(lab, text)
            console.line(
                f"{text}: at most {target.most:,} parameters and at least "
                f"{target.min_speedup}x the seed's throughput, as the published {target.published}"
            )
            sides = sides_of(lab, given, target, budget.deadline, console)
            paces = {s.role: relative_pace(lab, sides[0], s) for s in sides[1:]}
            told["archs"] |= {text: {s.role: _label(lab, s) for s in sides}}  # type: ignore[operator]
            told["work"] |= {text: {s.role: s.gmacs for s in sides if s.gmacs}}  # type: ignore[operator]
            for init in INITS:
                wanted = trainings(lab, sides, init, given) if sides[0].arch is not None else []
                missing = lab.missing(wanted)
                cost = sum(lab.cost(t) for t in missing)
                if missing and not budget.guess:
                    one = missing[0].arch
                    budget.guess = 1 / (lab.pace(one) * lab.run.image_cost(one))
                if missing and not budget.fits(cost):
                    tables: dict[str, Floats] = {}
                    absent = {
                        lab.run.key(t.arch): "not run: the budget is spent, call again"
                        for t in wanted
                    }
                else:
                    started = time.monotonic()
                    tables, absent = tested(lab, lab.train(wanted))
                    if missing:
                        budget.spent(cost, time.monotonic() - started)
                rows += [
                    row(
                        lab,
                        target,
                        init,
                        sides[0],
                        rival,
                        tables,
                        absent,
                        paces[rival.role],
                        given.command,
                    )
                    for rival in sides[1:]
                ]
    return rows, told


def relative_pace(lab: Lab, own: Side, rival: Side) -> tuple[float, float, float] | None:
    """Return the contracted arch's throughput relative to a rival's, and what it ranged over.

    Timed in several processes, as a process has a layout in memory and a moment of its own, which
    one process's interval does not tell of: the median of their ratios, from the lowest bound of an
    interval to the highest. Each is timed longer than in a search, and on while its interval
    straddles 1, as the gate of a run does.
    """
    run = lab.run
    if own.arch is None or rival.arch is None or run.key(own.arch) == run.key(rival.arch):
        return None
    longer = copy.copy(run.timings)
    longer.config = dataclasses.replace(run.config, bench_blocks=BLOCKS)
    faster = Requirement("speedup", 1.0, run.timings.primary)
    found: list[tuple[float, float, float]] = []
    for sitting in range(SITTINGS):
        role = f"compare-{sitting}" if sitting else "compare"
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


def row(
    lab: Lab,
    target: Target,
    init: str,
    own: Side,
    rival: Side,
    tables: Mapping[str, Floats],
    absent: Mapping[str, str],
    pace: tuple[float, float, float] | None,
    command: str,
) -> ResultRow:
    """Compare the contracted arch with one rival; what is missing is an outcome."""
    run = lab.run
    role = f"{PUBLISHED} {target.published}" if rival.role == PUBLISHED else rival.role
    name = f"{target.text}, {init}: contracted less {role}"
    base = ResultRow(
        name,
        None,
        None,
        None,
        0,
        target=target.text,
        init=init,
        rival=role,
        params=_params(lab, own),
        params_rival=_params(lab, rival),
        arch=_label(lab, own),
        arch_rival=_label(lab, rival),
        command=command,
    )
    if pace is not None:
        base = dataclasses.replace(base, ratio=pace[0], ratio_lo=pace[1], ratio_hi=pace[2])
    base = dataclasses.replace(base, misses=shortcomings(base, own, rival, target))
    for side in (own, rival):
        if side.arch is None:
            return dataclasses.replace(base, outcome=f"{side.role}: {side.misses}")
    assert own.arch is not None
    assert rival.arch is not None
    keys = run.key(own.arch), run.key(rival.arch)
    for key in keys:
        if key not in tables:
            return dataclasses.replace(base, outcome=absent.get(key, "not run"))
    a, b = (tables[k] for k in keys)
    found = paired_interval(a, b)
    return dataclasses.replace(
        base,
        estimate=found.value,
        lo=found.lo,
        hi=found.hi,
        lower=found.lower,
        n=found.images,
        seeds=found.seeds,
        image_se=found.image_se,
        seed_se=found.seed_se,
        detectable=found.detectable,
        top1=float(a.mean()),
        top1_rival=float(b.mean()),
        outcome=verdict(found, tie=keys[0] == keys[1])
        + ("" if found.seeds > 1 else " (of one random seed: images only)")
        + ("" if rival.misses is None else f" (the rival {rival.misses})"),
    )


def shortcomings(of: ResultRow, own: Side, rival: Side, target: Target) -> str:
    """Say where the contracted arch is not at least as small and as fast as it had to be."""
    said = [] if own.arch is None or own.misses is None else [own.misses]
    if rival.role == PUBLISHED:
        if of.params is not None and of.params > target.most:
            said.append(f"{of.params:,} parameters, more than {target.most:,}")
    elif of.params is not None and of.params_rival is not None and of.params > of.params_rival:
        said.append(f"larger by {of.params / of.params_rival - 1:.1%}")
    if of.ratio_hi is not None and of.ratio_hi < 1:
        said.append(f"slower: {of.ratio:.3f}x its throughput")
    elif of.ratio_lo is not None and of.ratio_lo < 1:
        said.append(f"perhaps slower: {of.ratio:.3f}x its throughput, from {of.ratio_lo:.3f}x")
    return "; ".join(said)


def _params(lab: Lab, side: Side) -> int | None:
    return None if side.arch is None else lab.run.family.count_params(side.arch, lab.run.context)


def _label(lab: Lab, side: Side) -> str:
    return "" if side.arch is None else lab.run.family.label(side.arch)


def write(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write the table as CSV."""
    out = io.StringIO()
    writer = Writer(out)
    writer.writerow([f.name for f in dataclasses.fields(ResultRow)])
    for each in rows:
        cells = [round(v, 5) if isinstance(v, float) else v for v in dataclasses.astuple(each)]
        writer.writerow(["" if v is None else v for v in cells])
    write_atomic(path, out.getvalue().encode())


def figure(path: Path, rows: Sequence[ResultRow]) -> None:
    """Draw the differences with their intervals and one-sided bounds, the margin as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in rows if r.estimate is not None][::-1]
    fig, ax = plt.subplots(figsize=(7.5, 0.32 * len(shown) + 1.4), layout="constrained")
    for y, each in enumerate(shown):
        assert each.estimate is not None
        assert each.lo is not None
        assert each.hi is not None
        assert each.lower is not None
        colour = "tab:blue" if each.init == "inherit" else "tab:orange"
        x, lo, hi = (100 * v for v in (each.estimate, each.lo, each.hi))
        ax.errorbar([x], [y], xerr=[[x - lo], [hi - x]], fmt="o", ms=4, lw=1, color=colour)
        ax.plot([100 * each.lower], [y], "|", ms=9, color=colour)
    ax.set_yticks(range(len(shown)), [r.name for r in shown], fontsize=8)
    ax.axvline(0, color="black", lw=0.5)
    ax.axvline(-100 * MARGIN, color="tab:red", lw=1, ls="--", label=f"-{100 * MARGIN:g} points")
    ax.set_xlabel(
        "difference in test top-1, points: 95 % intervals, bars: one-sided 95 % bound", fontsize=8
    )
    ax.legend(fontsize=7, loc="lower right")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.baselines", description=__doc__)
    arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("results/result.csv"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, search and train what is missing, report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = build_parser().parse_args(argv)
    given.command = " ".join(["python -m benchmarks.baselines", *argv])

    def work() -> int:
        rows, told = compare(checked(given), Console())
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write(given.out, rows)
        write_json(given.out.with_suffix(".json"), told)
        figure(given.out.with_suffix(".png"), rows)
        for each in rows:
            found = (
                ""
                if each.estimate is None
                else (
                    f"{each.estimate:+.2%} [{each.lo:+.2%}, {each.hi:+.2%}], "
                    f"at least {each.lower:+.2%}: "
                )
            )
            print(
                f"{each.name:<44} {found}{each.outcome}"
                + (f" ({CONTRACTED} {each.misses})" if each.misses else "")
            )
        print(
            json.dumps(
                {
                    "rows": len(rows),
                    "compared": sum(r.estimate is not None for r in rows),
                    # Claims are made only where the arch is as small and as fast as it had to be.
                    "better": sum(r.outcome.startswith("better") and not r.misses for r in rows),
                    "not_worse": sum(
                        r.lower is not None and r.lower > -MARGIN and not r.misses for r in rows
                    ),
                    "missed": sum(bool(r.misses) for r in rows),
                    "table": str(given.out),
                }
            )
        )
        return 0

    return guarded(work)
