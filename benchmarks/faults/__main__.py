"""Disturb runs in every way that machines do, and count those that end otherwise.

`python -m benchmarks.faults`: each try begins a run, labels or a training, disturbs it at a random instant, resumes it
as a user would, and compares it with an undisturbed one: decisions, winner and weights must be equal, no process and no
temporary file may be left, and a refusal must be one line and exit status 2. `lost` counts the tries that fail in any
of this.
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.estimates import check_at_least, write_table
from benchmarks.faults.catalogue import FAULTS, Try
from benchmarks.faults.references import References
from nas.core.cli import Parser, exit_status
from nas.core.progress import Console
from space.errors import refuse


@dataclass(frozen=True)
class FaultRow:
    """One kind of fault: how often it was tried and survived, and what recovering costs.

    `seconds_to_recover` is by how much the median of the surviving tries is longer than an undisturbed run, which had
    the machine to itself; empty where that means nothing.
    """

    fault: str
    tried: int
    survived: int
    lost: int
    seconds_to_recover: float
    command: str


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser("python -m benchmarks.faults", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", metavar="FAULT", help=f"of {', '.join(FAULTS)} (default: all)")
    add("--tries", type=int, metavar="N", help="of each fault (default: its own number)")
    add("--jobs", type=int, default=2, help="tries at a time, of one thread each (2)")
    add("--minutes", type=float, default=math.inf, help="begin nothing new after so long")
    add("--random-seed", type=int, default=0)
    add("--folder", type=Path, default=Path("results/runs/faults"))
    add("--out", type=Path, default=Path("results/faults.csv"))
    add("--keep", action="store_true", help="keep the folders of tries that survived too")
    return parser


def command_of(given: argparse.Namespace, fault: str) -> str:
    """Return the command that does a fault's tries alone: they depend on nothing else."""
    words = ["python", "-m", "benchmarks.faults", "--only", fault]
    for flag in ("tries", "jobs", "random_seed"):
        if getattr(given, flag) != build_parser().get_default(flag):
            words += [f"--{flag.replace('_', '-')}", str(getattr(given, flag))]
    return shlex.join(words)


def run_all(given: argparse.Namespace, console: Console) -> list[FaultRow]:
    """Do all tries, several at a time; the table is written after each. Raises InputError."""
    check_at_least(given, jobs=1, tries=1)
    names = given.only or list(FAULTS)
    for name in names:
        if name not in FAULTS:
            raise refuse("--only", name, f"one of {', '.join(FAULTS)}")
    references = References(given.folder, console.line)
    undisturbed = {name: references.of(FAULTS[name].make(references, random.Random(0)))[1] for name in names}
    done: dict[str, list[Try]] = {name: [] for name in names}
    rows: dict[str, FaultRow] = {}
    writing = threading.Lock()
    until = time.monotonic() + 60 * given.minutes
    todo = [(name, n) for name in names for n in range(given.tries or FAULTS[name].tries)]
    console.start(float(len(todo)), "tries")

    def one(task: tuple[str, int]) -> None:
        if time.monotonic() > until:
            return
        name, number = task
        folder = references.folder / f"{name}/{number}".replace(" ", "-").replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            rng = random.Random(f"{given.random_seed}/{name}/{number}")
            outcome = FAULTS[name].do(references, FAULTS[name].make(references, rng), folder, rng)
        except Exception as error:  # an error of ours counts as a loss
            outcome = Try([f"{type(error).__name__}: {error}"])
        with writing:
            done[name].append(outcome)
            rows[name] = row_of(name, done[name], undisturbed[name], command_of(given, name))
            write(given.out, rows[name])
        for wrong in outcome.wrong:
            console.line(f"LOST {folder.name}: {wrong}")
        if not outcome.wrong and not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
        console.advance(1.0)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, [task for task in todo if not FAULTS[task[0]].solo]))
    for task in todo:
        if FAULTS[task[0]].solo:
            one(task)
    console.stop()
    return [rows[name] for name in FAULTS if name in rows]


def row_of(name: str, tries: Sequence[Try], undisturbed_s: float, command: str) -> FaultRow:
    """Count the tries of a fault."""
    tried, lost = len(tries), sum(bool(o.wrong) for o in tries)
    took = [o.took_s for o in tries if o.took_s is not None and not o.wrong]
    late = statistics.median(took) - undisturbed_s if took else math.nan
    return FaultRow(name, tried, tried - lost, lost, round(late, 1), command)


def write(path: Path, row: FaultRow) -> None:
    """Put a fault's row into the table; those of other faults stay as they are."""
    import pandas as pd

    rows: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    held = {each["fault"]: each for each in [*rows, vars(row)]}
    write_table(path, [held[name] for name in FAULTS if name in held])


def main(argv: Sequence[str] | None = None) -> int:
    """Disturb, count, write. Returns the exit status: 1 where anything was lost."""

    def work() -> int:
        console = Console()
        rows = run_all(build_parser().parse_args(argv), console)
        for row in rows:
            late = f"{row.seconds_to_recover:.1f} s later"
            console.line(f"{row.fault:<44} {row.survived} of {row.tried} survived, {late}")
        return 1 if any(row.lost for row in rows) else 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
