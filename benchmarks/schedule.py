"""Where a driver and its barriers saturate: `python -m benchmarks.schedule`.

The executors' own `Dispatcher` under a simulated clock: races of 100 to 10,000 candidates on 1 to
1,000 workers that die, hang and lag, several ways to dispatch them, and what became of every
worker-second. Trainings last as recorded ones did, relative to each other: `--record RUN` takes
those from a finished run's `attempts.csv` (no simulation then). Beside it, what the driver's own
parts cost in processor time, measured here. `--plan` prints the arithmetic of `docs/scale.md`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import _label_plan
from benchmarks._cluster import (
    NO_FAULTS,
    Cluster,
    Durations,
    Faults,
    Load,
    Outcome,
    Policy,
    replay,
    simulate,
)
from benchmarks._driver import driver_rows
from benchmarks._estimates import in_words, integers, write_rows
from nas.command import Parser, guarded
from nas.files import read_json
from nas.race import rungs_of
from space.errors import refuse

RAN = re.compile(r"(?P<candidate>s\d+-.+?)(?:-rung(?P<rung>\d+))?")
"""Jobs of a race, as `nas.scoring` and `nas.race` name them."""
LEAST_RECORDED = 8
"""Candidates that a record needs."""

DEATHS = Faults(hang_share=0.0, slow_share=0.0)
SLOW = replace(NO_FAULTS, slow_share=Faults.slow_share)
HANGS = replace(NO_FAULTS, hang_share=Faults.hang_share)
ALL = Faults()
LOCAL = Policy()
"""What a `LocalExecutor` does, without a flag: the rule for hung ones, run-ahead of half."""
RAY = Policy(copies=True)
"""What a `RayExecutor` does."""
LIMIT_S = 3600.0
"""`--job-minutes 60`."""


@dataclass(frozen=True)
class Way:
    """What goes wrong, and what is done about it; `limit_s` None: no limit but a person's."""

    name: str
    faults: Faults
    policy: Policy = LOCAL
    racing: bool = True
    limit_s: float | None = None


WAYS = (
    Way("nothing fails", NO_FAULTS),
    Way("deaths only", DEATHS),
    Way("slow nodes only", SLOW),
    Way("hangs only", HANGS),
    Way("all faults", ALL),
    Way("all faults, no rule for hung ones", ALL, replace(LOCAL, hung=False)),
    Way("all faults, limit of 1 h", ALL, limit_s=LIMIT_S),
    Way("all faults, no run-ahead", ALL, replace(LOCAL, ahead="none")),
    Way("all faults, as before", ALL, replace(LOCAL, ahead="keep", hung=False), limit_s=LIMIT_S),
    Way("all faults, copies", ALL, RAY),
    Way("all faults, copies, limit of 1 h", ALL, RAY, limit_s=LIMIT_S),
    Way("all faults, copies, no run-ahead", ALL, replace(RAY, ahead="none")),
    Way("all faults, copies, as before", ALL, replace(RAY, ahead="keep", hung=False),
        limit_s=LIMIT_S),
    Way("all faults, no rungs", ALL, racing=False),
    Way("all faults, copies, no rungs", ALL, RAY, racing=False),
)  # fmt: skip
"""`as before`: a limit of an hour that the user had to give, and run-ahead of the few that a race
keeps."""
DRAWN = (
    "nothing fails", "all faults, as before", "all faults", "all faults, copies, as before",
    "all faults, copies",
)  # fmt: skip
IN_STEPS = DRAWN[1:]
"""Ways that are also simulated with the candidates in ten steps."""
STEPS = 10


@dataclass(frozen=True)
class Recorded:
    """One training of a recorded race: its candidate, epochs and seconds."""

    candidate: str
    epochs: int
    seconds: float
    command: str


@dataclass(frozen=True)
class Simulated:
    """One simulated race: medians over random seeds, and the range of what it took.

    Shares are of all worker-seconds and add up to 1, but for `tail_share`, of the time. `ideal`
    is how often longer it took than the counted work needs on workers that never wait.
    """

    way: str
    workers: int
    candidates: int
    steps: int
    makespan_h: float
    makespan_h_lo: float
    makespan_h_hi: float
    ideal: float
    useful_share: float
    idle_share: float
    lost_share: float
    spare_share: float
    unchosen_share: float
    boot_share: float
    down_share: float
    tail_share: float
    tail_idle_share: float
    jobs: int
    attempts: int
    given_up: int
    hung: int
    late: int
    wronged: int
    dispatch_us: float
    driver_share: float
    random_seeds: int
    command: str


def recorded(run: Path, command: str) -> list[Recorded]:
    """Read the trainings of a run's races. Too few, or no run: refused."""
    told = read_json(run / "run.json", "a run's configuration")
    try:
        epochs = int(told["config"]["proxy_epochs"])
        with open(run / "attempts.csv", encoding="utf-8", newline="") as table:
            rows = [row for row in csv.DictReader(table) if row["outcome"] == "done"]
        found = []
        for row in rows:
            match = RAN.fullmatch(row["job"])
            if match is None or match["candidate"].endswith("-more"):
                continue
            rungs = [0, *rungs_of(epochs)]
            reached = int(match["rung"] or epochs)
            own = reached - rungs[rungs.index(reached) - 1]
            found.append(Recorded(match["candidate"], own, float(row["seconds"]), command))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise refuse("--record", f"{run} ({error})", "the folder of a run with races") from error
    if len({each.candidate for each in found}) < LEAST_RECORDED:
        got = f"{run} with {len(found)} raced trainings"
        raise refuse("--record", got, f"those of {LEAST_RECORDED} candidates or more")
    # Names say nothing here, and an arch's is long.
    numbers = {c: f"c{at:03d}" for at, c in enumerate(dict.fromkeys(e.candidate for e in found))}
    return [replace(each, candidate=numbers[each.candidate]) for each in found]


def read_durations(path: Path) -> Durations:
    """Read how long recorded trainings were relative to each other. Raises InputError."""
    try:
        with open(path, encoding="utf-8", newline="") as table:
            rows = [
                (row["candidate"], float(row["seconds"]) / float(row["epochs"]))
                for row in csv.DictReader(table)
            ]
    except (OSError, KeyError, ValueError, ZeroDivisionError) as error:
        want = "a file made by --record"
        raise refuse("--durations", f"{path} ({error})", want) from error
    by: dict[str, list[float]] = {}
    for candidate, pace in rows:
        by.setdefault(candidate, []).append(pace)
    if len(by) < LEAST_RECORDED:
        raise refuse("--durations", f"{len(by)} candidates", f"{LEAST_RECORDED} or more")
    means = {candidate: statistics.mean(paces) for candidate, paces in by.items()}
    usual = statistics.median(means.values())
    jitters = [pace / means[c] for c, paces in by.items() for pace in paces if len(paces) > 1]
    return Durations(
        np.array([mean / usual for mean in means.values()]), np.array(jitters or [1.0])
    )


def simulated(
    way: Way, load: Load, cluster: Cluster, durations: Durations, seeds: Sequence[int], command: str
) -> Simulated:
    """Simulate a way with every random seed; the dispatcher's cost is of the first."""
    load = replace(load, racing=way.racing)
    cluster = replace(cluster, faults=way.faults, limit_s=way.limit_s or cluster.limit_s)
    outs = [
        simulate(load, cluster, way.policy, durations, random_seed=seed, record=seed == seeds[0])
        for seed in seeds
    ]
    spent_s = replay(outs[0].calls, way.policy)
    hours = [out.makespan_s / 3600 for out in outs]

    def share(name: str) -> float:
        return statistics.median(
            float(getattr(out.spent, name)) / (cluster.workers * out.makespan_s) for out in outs
        )

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    def whole(out: Outcome) -> float:
        return cluster.workers * out.makespan_s

    return Simulated(
        way.name, cluster.workers, load.candidates, load.steps,
        middle(hours), min(hours), max(hours),
        middle([whole(out) / out.work_s for out in outs]),
        share("useful_s"), share("idle_s"), share("lost_s"), share("spare_s"),
        share("unchosen_s"), share("boot_s"), share("down_s"),
        middle([out.tail_s / out.makespan_s for out in outs]),
        middle([out.tail_idle_s / whole(out) for out in outs]),
        round(middle([len(out.ended) for out in outs])),
        round(middle([out.attempts for out in outs])),
        round(middle([out.given_up for out in outs])),
        round(middle([out.hung for out in outs])),
        round(middle([out.late for out in outs])),
        round(middle([out.wronged for out in outs])),
        1e6 * spent_s / len(outs[0].ended), spent_s / outs[0].makespan_s,
        len(seeds), command,
    )  # fmt: skip


def simulate_all(given: argparse.Namespace, command: str) -> list[Simulated]:
    """Simulate all ways at all sizes; a line each."""
    durations = read_durations(given.durations)
    found = []
    for candidates in given.candidates:
        for workers in given.workers:
            for way in WAYS:
                steps = (1, STEPS) if way.name in IN_STEPS and candidates >= STEPS else (1,)
                for number in steps:
                    load = Load(candidates, number, given.epochs, given.epoch_s)
                    cluster = Cluster(workers, way.faults, limit_s=given.limit_s)
                    row = simulated(way, load, cluster, durations, given.random_seeds, command)
                    found.append(row)
                    print(shown(row), flush=True)
    return found


def shown(row: Simulated) -> str:
    """Say a row in one line."""
    return (
        f"{row.candidates:>6,} on {row.workers:>5,}, {row.steps:>2} steps, {row.way:<38} "
        f"{row.makespan_h:8.2f} h = {row.ideal:5.2f} x ideal; useful {row.useful_share:6.1%}, "
        f"idle {row.idle_share:6.1%} ({row.tail_idle_share:6.1%} in tails), "
        f"lost {row.lost_share:5.2%}, "
        f"{row.given_up} given up, {row.hung}+{row.late} ended ({row.wronged} wrongly), "
        f"{row.dispatch_us:.0f} us a job"
    )


def figure(path: Path, rows: Sequence[Simulated]) -> None:
    """Draw how much longer than the work takes, over workers, a panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = sorted({row.candidates for row in rows})
    fig, panels = plt.subplots(
        1, len(sizes), figsize=(3.4 * len(sizes) + 0.4, 4.2), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for panel, size in zip(panels[0], sizes, strict=True):
        for at, name in enumerate(DRAWN):
            own = [
                r for r in rows if (r.candidates, r.way, r.steps) == (size, name, 1)
            ]  # fmt: skip
            panel.plot(
                [r.workers for r in own], [100 * r.useful_share for r in own],
                marker="os^Dv"[at], ms=5, lw=1.2, color=f"C{at}", label=name,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_ylim(0, 102)
        panel.set_title(f"{size:,} candidates in one race", fontsize=9)
        panel.set_xlabel("workers", fontsize=8)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("useful worker-seconds, %", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.schedule", description=__doc__)
    add = parser.add_argument
    add("--record", type=Path, metavar="RUN", help="write a run's trainings to --durations; end")
    add("--plan", action="store_true", help="print the arithmetic of docs/scale.md; end")
    add("--durations", type=Path, default=Path("results/durations.csv"))
    add("--workers", type=integers, default=(1, 10, 100, 1000), help="(default 1,10,100,1000)")
    add("--candidates", type=integers, default=(100, 1000, 10_000),
        help="(default 100,1000,10000)")  # fmt: skip
    add("--epochs", type=int, default=8, help="of a candidate (default %(default)s)")
    add("--epoch-s", type=float, default=60.0, metavar="S",
        help="seconds a usual candidate's epoch takes (default %(default)s)")  # fmt: skip
    add("--limit-s", type=float, default=Cluster.limit_s, metavar="S",
        help="after which a person ends what does not end (default %(default)s)")  # fmt: skip
    add("--random-seeds", type=integers, default=(1, 2, 3), help="(default 1,2,3)")
    add("--out", type=Path, default=Path("results/schedule.csv"))
    return parser


def summary(rows: Sequence[Simulated]) -> Mapping[str, object]:
    """Return what a table's last line says: the largest case, way by way."""
    largest = max((row.candidates, row.workers) for row in rows)
    return {
        f"{row.way}, {row.steps} steps": asdict(row)["makespan_h"]
        for row in rows
        if (row.candidates, row.workers) == largest
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, simulate, report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = build_parser().parse_args(argv)
    command = " ".join(["python -m benchmarks.schedule", *argv])

    def work() -> int:
        if given.plan:
            print(_label_plan.told())
            return 0
        if given.record is not None:
            rows = recorded(given.record, command)
            write_rows(given.durations, rows)
            print(f"{len(rows)} trainings of {len({r.candidate for r in rows})} candidates")
            return 0
        if given.epochs < 1 or min(given.epoch_s, given.limit_s) <= 0:
            got = f"{given.epochs}, {given.epoch_s}, {given.limit_s}"
            raise refuse("--epochs, --epoch-s, --limit-s", got, "numbers above 0")
        found = simulate_all(given, command)
        write_rows(given.out, found)
        figure(given.out.with_suffix(".png"), found)
        parts = driver_rows(command)
        write_rows(given.out.with_name(f"{given.out.stem}_driver.csv"), parts)
        for part in parts:
            print(in_words(part))
        print(json.dumps(summary(found)))
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
