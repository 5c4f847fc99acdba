"""Disturb runs in every way that machines do, and count those that end otherwise: chaos.csv.

Each try begins a run, labels or a training anew, disturbs it at a random instant, goes on with it
as a user would, and compares it with an undisturbed one: decisions, winner and weights must be
equal, no process and no temporary file may be left, and what is refused must be one line and exit
status 2. `lost` counts the tries that fail in any of this.
"""

from __future__ import annotations

import argparse
import csv
import random
import shlex
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._chaos_arena import Arena
from benchmarks._chaos_faults import FAULTS, Fault, Try
from benchmarks._estimates import write_rows
from nas.command import Parser, guarded
from nas.progress import Console
from space.checks import read_int
from space.errors import refuse


@dataclass(frozen=True)
class Row:
    """One kind of fault: how often it was tried and survived, and what recovering costs.

    `seconds_to_recover` is the median of how much later a disturbed run ended than an undisturbed
    one, empty where that means nothing.
    """

    fault: str
    tried: int
    survived: int
    lost: int
    seconds_to_recover: float
    command: str


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="python -m benchmarks.chaos", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--only", nargs="+", metavar="FAULT", help=f"of {', '.join(FAULTS)} (default: all)")
    add("--tries", type=int, metavar="N", help="of each fault (default: its own number)")
    add("--jobs", type=int, default=2, help="tries at a time, of one thread each (2)")
    add("--minutes", type=float, help="begin nothing new after so long")
    add("--random-seed", type=int, default=0)
    add("--folder", type=Path, default=Path("results/runs/chaos"))
    add("--out", type=Path, default=Path("results/chaos.csv"))
    add("--keep", action="store_true", help="keep the folders of tries that survived too")
    return parser


def tries_of(given: argparse.Namespace) -> list[tuple[str, Fault, int]]:
    """List every try: the name of its fault, the fault, its number."""
    names = given.only or list(FAULTS)
    for name in names:
        if name not in FAULTS:
            raise refuse("--only", name, f"one of {', '.join(FAULTS)}")
    if given.tries is not None:
        read_int("--tries", given.tries, 1, 100_000)
    found = []
    for name in names:
        fault = FAULTS[name]
        found += [(name, fault, number) for number in range(given.tries or fault.tries)]
    return found


def campaign(given: argparse.Namespace, console: Console, command: str) -> dict[str, list[Try]]:
    """Do the tries, several at a time; the table grows with each."""
    read_int("--jobs", given.jobs, 1, 64)
    arena = Arena(given.folder, console.line)
    wanted = tries_of(given)
    for fault in {id(f): f for _, f, _ in wanted}.values():
        for kind in fault.kinds(arena):
            arena.truth(kind)
    done: dict[str, list[Try]] = {}
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    console.start(float(len(wanted)), "tries")

    def one(task: tuple[str, Fault, int]) -> None:
        name, fault, number = task
        if until is not None and time.monotonic() > until:
            return
        folder = arena.folder / f"{name.replace(' ', '-')}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rng = random.Random(f"{given.random_seed}/{name}/{number}")
        try:
            outcome = fault.do(arena, folder, rng)
        except Exception as error:  # the campaign's own fault counts as a loss, and is looked at
            outcome = Try([f"{type(error).__name__}: {error}"])
        done.setdefault(name, []).append(outcome)
        for wrong in outcome.wrong:
            console.line(f"LOST {folder.name}: {wrong}")
        if not outcome.wrong and not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
        write(given.out, {name: row_of(name, done[name], command)})
        console.advance(1.0)

    side_by_side = [task for task in wanted if not task[1].solo]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, side_by_side))
    for task in wanted:
        if task[1].solo:
            one(task)
    console.stop()
    return done


def row_of(name: str, outcomes: Sequence[Try], command: str) -> Row:
    """Count the tries of a fault."""
    lost = sum(bool(o.wrong) for o in outcomes)
    late = [o.late_s for o in outcomes if o.late_s is not None]
    median = statistics.median(late) if late else float("nan")
    return Row(name, len(outcomes), len(outcomes) - lost, lost, round(median, 1), command)


_WRITING = threading.Lock()


def write(path: Path, rows: Mapping[str, Row]) -> None:
    """Put faults' rows into the table, those of other faults staying as they are."""
    with _WRITING:
        held: dict[str, Any] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for line in csv.DictReader(file):
                    late = float(line["seconds_to_recover"] or "nan")
                    held[line["fault"]] = Row(
                        line["fault"], int(line["tried"]), int(line["survived"]), int(line["lost"]),
                        late, line["command"],
                    )  # fmt: skip
        held.update(rows)
        names = [name for name in FAULTS if name in held]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, [held[name] for name in names])


def main(argv: Sequence[str] | None = None) -> int:
    """Disturb, count, write. Returns the exit status: 1 where anything was lost."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        console = Console()
        words = list(argv if argv is not None else sys.argv[1:])
        command = " ".join(["python -m benchmarks.chaos", *map(shlex.quote, words)])
        done = campaign(given, console, command)
        rows = [row_of(name, done[name], command) for name in FAULTS if done.get(name)]
        for row in rows:
            console.line(
                f"{row.fault:<44} {row.survived} of {row.tried} survived, "
                f"{row.seconds_to_recover:.1f} s later"
            )
        return 1 if any(row.lost for row in rows) else 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
