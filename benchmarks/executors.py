"""What executors cost: workers against threads, Ray against local, memory over many candidates.

One step's candidates are trained again and again, the two sides taking turns; ratios are of
wall-clock times. Overheads are what an executor adds to the jobs' own seconds, per candidate.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._chaos_arena import ARCH, start, tagged
from benchmarks._estimates import Row, in_words, write_rows
from benchmarks.lab import Lab, arguments, opened
from nas.command import Parser, guarded
from nas.executor import LocalExecutor, Pool
from nas.executor.make import make_executor
from nas.executor.means import Means
from nas.files import write_json
from nas.progress import Console
from nas.run import Task
from space.checks import read_int
from space.errors import refuse
from space.neighbours import shortlist

PARTS = ("workers", "ray", "flat")
MOST_GROWTH_MIB = 20.0
"""How much a process may grow between the 100th and the 500th candidate."""


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.executors", description=__doc__)
    arguments(
        parser, data="digits", img_size=48, seed="5M", seed_epochs=1, teacher_epochs=2, images=400
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rounds", type=int, default=5, help="of each comparison (5)")
    add("--candidates", type=int, default=6, help="of a step (6)")
    add("--many", type=int, default=500, help="candidates of the run that is watched (500)")
    add("--out", type=Path, default=Path("results/executors.csv"))
    return parser


def candidates(lab: Lab, number: int, images: int) -> list[Task]:
    """Describe the trainings of a step: contractions of the seed, one epoch from its weights."""
    run = lab.run
    listed = shortlist(run.family, [run.seed_arch], run.context, run.band(1), number, random_seed=0)
    parent = lab.parent("prefix")
    tasks = []
    for each in listed:
        name = f"bench-{run.key(each.arch)}"
        tasks.append(
            run.training(
                each.arch, name, out=run.folder.job_folder(name), epochs=1, init="inherit",
                parent=parent, images=images,
            )
        )  # fmt: skip
    return tasks


def timed(executor: Pool, tasks: Sequence[Task]) -> tuple[float, float]:
    """Do jobs anew; returns wall-clock seconds, and the sum of the jobs' own."""
    for task in tasks:
        shutil.rmtree(task.out, ignore_errors=True)
    began = time.monotonic()
    results = list(executor.stream([task.job for task in tasks]))
    wall = time.monotonic() - began
    for result in results:
        if not result.ok:
            raise refuse(result.key, result.reason, "a training that ends")
    return wall, sum(result.seconds for result in results)


def threaded(tasks: Sequence[Task], part: str) -> list[Task]:
    """Return the same jobs under names of their own, in folders of their own."""
    found = []
    for task in tasks:
        out = task.out.with_name(f"{task.out.name}-{part}")
        spec = {**task.job.spec, "out": str(out)}
        job = dataclasses.replace(task.job, key=out.name, spec=spec)
        found.append(Task(job, out, task.cost))
    return found


def ratio_row(name: str, ratios: Sequence[float], note: str, command: str) -> Row:
    """Return the median of a ratio with its range."""
    middle = statistics.median(ratios)
    return Row(name, middle, min(ratios), max(ratios), len(ratios), "rounds", note, command)


def workers_against_threads(
    lab: Lab, given: argparse.Namespace, console: Console, command: str
) -> list[Row]:
    """Train a step's candidates by two workers of a thread, and by one of two."""
    tasks = candidates(lab, given.candidates, given.images)
    sides = {"two": threaded(tasks, "two"), "one": threaded(tasks, "one")}
    two = LocalExecutor(threads=1, workers=2)
    one = LocalExecutor(threads=2, workers=1)
    ratios = []
    with two, one:
        for turn in range(given.rounds + 1):
            walls = {}
            for name, executor in (("two", two), ("one", one)):
                walls[name], _ = timed(executor, sides[name])
            if turn:  # the first round warms both up
                ratios.append(walls["two"] / walls["one"])
                console.line(f"2 x 1 {walls['two']:.1f} s, 1 x 2 {walls['one']:.1f} s")
    for side in sides.values():
        for task in side:
            shutil.rmtree(task.out, ignore_errors=True)
    what = f"{len(tasks)} candidates of {lab.run.config.seed}, {given.images} images"
    note = f"{what}; below 1: faster"
    name = "2 workers x 1 thread / 1 worker x 2 threads, wall-clock"
    return [ratio_row(name, ratios, note, command)]


def ray_against_local(
    lab: Lab, given: argparse.Namespace, console: Console, command: str
) -> list[Row]:
    """Train small candidates by a worker here and by one of Ray, files sent and not."""
    tasks = candidates(lab, given.candidates, 32)
    means = {
        "local": Means(),
        "ray, files seen": Means(executor="ray", workers=1),
        "ray, files sent": Means(executor="ray", workers=1, ship=True),
    }
    own: dict[str, list[float]] = {name: [] for name in means}
    walls: dict[str, list[float]] = {name: [] for name in means}
    sides = {name: threaded(tasks, name.replace(", ", "-").replace(" ", "-")) for name in means}
    with contextlib.ExitStack() as stack:
        executors = {
            name: stack.enter_context(make_executor(each, threads=1, folder=lab.run.folder.path))
            for name, each in means.items()
        }
        for turn in range(given.rounds + 1):
            for name, executor in executors.items():
                wall, inside = timed(executor, sides[name])
                if turn:
                    walls[name].append(1000 * wall / len(tasks))
                    own[name].append(1000 * (wall - inside) / len(tasks))
            console.line(", ".join(f"{n} {v[-1]:.0f} ms" for n, v in walls.items() if v))
    for side in sides.values():
        for task in side:
            shutil.rmtree(task.out, ignore_errors=True)
    rows = [
        ratio_row(f"{name}: beside its jobs, ms a candidate", values, "one place", command)
        for name, values in own.items()
    ]
    for name in list(means)[1:]:
        more = [a - b for a, b in zip(walls[name], walls["local"], strict=True)]
        note = "wall-clock, taking turns; files taken from the node's store and brought back"
        rows.append(ratio_row(f"{name} - local, ms a candidate", more, note, command))
    return rows


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise refuse("memory", f"process {pid}", "a process that runs")


def watched(given: argparse.Namespace, folder: Path) -> dict[str, dict[int, tuple[float, int]]]:
    """Run a step of many candidates; memory (MiB) and open files of driver and worker on the way.

    Keyed by the process, then by how many candidates were trained.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "small.json", ARCH)
    out = folder / "out"
    many = str(given.many * 6 // 5)  # some are too slow, and not trained
    begun = start(
        [
            "nas.contract", "--seed", str(folder / "small.json"), "--target-params", "400K",
            "--params-tolerance", "0.3", "--effort", "smoke", "--steps", "1", "--no-racing",
            "--shortlist", many, "--proxied", many, "--proxy-epochs", "1", "--threads", "1",
            "--img-size", "32", "--proxy-images", "40", "--teacher-epochs", "1",
            "--final-epochs", "1", "--bench-blocks", "6", "--bench-max-blocks", "6",
            "--seed-epochs", "1", "--no-measurement-cache",
            "--out", str(out), "--cache-dir", str(folder / "cache"),
        ],
        folder / "log",
    )  # fmt: skip
    found: dict[str, dict[int, tuple[float, int]]] = {"driver": {}, "worker": {}}
    marks = sorted({100, given.many, *range(50, given.many, 50)})
    while begun.process.poll() is None and marks:
        time.sleep(0.1)
        if _trained(out) < marks[0]:
            continue
        mark = marks.pop(0)
        pids = {"driver": begun.process.pid}
        for pid, words in tagged(begun.tag).items():
            if "nas.worker" in words:
                pids["worker"] = pid
        for name, pid in pids.items():
            with contextlib.suppress(OSError):
                files = len(os.listdir(f"/proc/{pid}/fd"))
                found[name][mark] = (resident_mib(pid), files)
    begun.process.kill()
    begun.end()
    if marks:
        raise refuse("--many", f"a run that ended before {marks[0]} candidates", "a longer one")
    return found


def _trained(out: Path) -> int:
    with contextlib.suppress(OSError), (out / "attempts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
        return sum(row["job"].startswith("s1-") and row["outcome"] == "done" for row in rows)
    return 0


def flat(given: argparse.Namespace, console: Console, command: str) -> list[Row]:
    """Tell how driver and worker grow between the 100th and the last candidate."""
    found = watched(given, Path("results/runs/executors-flat"))
    rows = []
    for name, by_mark in found.items():
        late = {mark: v for mark, v in by_mark.items() if mark >= 100}
        grown = late[given.many][0] - late[100][0]
        sizes = [size - late[100][0] for size, _ in late.values()]
        note = f"{late[100][0]:.0f} MiB at the 100th; range of the growth at every 50th"
        rows.append(
            Row(f"{name}: memory from the 100th to the {given.many}th candidate, MiB", grown,
                min(sizes), max(sizes), len(late), "readings", note, command)
        )  # fmt: skip
        files = [number for _, number in late.values()]
        rows.append(
            Row(f"{name}: open files", statistics.median(files), min(files), max(files),
                len(files), "readings", "from the 100th candidate on", command)
        )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns the exit status."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        read_int("--rounds", given.rounds, 2, 1000)
        read_int("--candidates", given.candidates, 2, 100)
        read_int("--many", given.many, 150, 100_000)
        console = Console()
        words = list(argv if argv is not None else sys.argv[1:])
        command = " ".join(["python -m benchmarks.executors", *words])
        rows: list[Row] = []
        if {"workers", "ray"} & set(given.only):
            with opened(replace_work(given), console) as lab:
                if "workers" in given.only:
                    rows += workers_against_threads(lab, given, console, command)
                if "ray" in given.only:
                    rows += ray_against_local(lab, given, console, command)
        if "flat" in given.only:
            rows += flat(given, console, command)
        for row in rows:
            console.line(in_words(row))
        write_rows(given.out, rows)
        return 0

    return guarded(work)


def replace_work(given: argparse.Namespace) -> argparse.Namespace:
    """Give the trainings a folder of their own."""
    work = given.work or Path("results/runs/executors")
    return argparse.Namespace(**{**vars(given), "work": work})


if __name__ == "__main__":
    sys.exit(main())
