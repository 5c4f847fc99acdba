"""Disturb runs in every way that machines do, and count those that end otherwise.

`python -m benchmarks.faults`: each try begins a run, labels or a training, disturbs it at a random
instant, resumes it as a user would, and compares it with an undisturbed one: decisions, winner and
weights must be equal, no process and no temporary file may be left, and a refusal must be one line
and exit status 2. `lost` counts the tries that fail in any of this. Undisturbed runs alternate with
the tries of a fault, on as busy a machine, to measure what recovering costs.
"""

from __future__ import annotations

import argparse
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
from benchmarks.faults.catalogue import FAULTS
from benchmarks.faults.references import References
from benchmarks.faults.tries import Do, Try
from nas.core.cli import Parser, guarded
from nas.core.progress import Console
from space.errors import refuse

CALM_EVERY = 4
"""Tries of a fault for every undisturbed one among them."""


@dataclass(frozen=True)
class FaultRow:
    """One kind of fault: how often it was tried and survived, and what recovering costs.

    `seconds_to_recover` is by how much the median of what the disturbed ones took is longer than
    that of the undisturbed ones among them; empty where that means nothing.
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
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", metavar="FAULT", help=f"of {', '.join(FAULTS)} (default: all)")
    add("--tries", type=int, metavar="N", help="of each fault (default: its own number)")
    add("--jobs", type=int, default=2, help="tries at a time, of one thread each (2)")
    add("--minutes", type=float, help="begin nothing new after so long")
    add("--random-seed", type=int, default=0)
    add("--folder", type=Path, default=Path("results/runs/faults"))
    add("--out", type=Path, default=Path("results/faults.csv"))
    add("--keep", action="store_true", help="keep the folders of tries that survived too")
    return parser


@dataclass(frozen=True)
class Turn:
    """One try of a fault, or an undisturbed one among them (`calm`)."""

    fault: str
    number: int
    calm: bool
    do: Do

    @property
    def name(self) -> str:
        """What its folder is called and its random decisions go by."""
        return f"{self.fault}/{'calm/' if self.calm else ''}{self.number}"


@dataclass(frozen=True)
class Found:
    """What came of a fault's tries, and of the undisturbed ones among them."""

    tries: list[Try]
    calm: list[Try]


def turns_of(given: argparse.Namespace) -> list[Turn]:
    """List everything to do, in its order. Raises InputError."""
    names = given.only or list(FAULTS)
    for name in names:
        if name not in FAULTS:
            raise refuse("--only", name, f"one of {', '.join(FAULTS)}")
    found = []
    for name in names:
        fault = FAULTS[name]
        for number in range(given.tries or fault.tries):
            if fault.calm is not None and number % CALM_EVERY == 0:
                found.append(Turn(name, number, True, fault.calm))
            found.append(Turn(name, number, False, fault.do))
    return found


def command_of(given: argparse.Namespace, fault: str) -> str:
    """Return the command that does a fault's tries alone: they depend on nothing else."""
    words = ["python", "-m", "benchmarks.faults", "--only", fault]
    for flag in ("tries", "jobs", "random_seed"):
        if getattr(given, flag) != build_parser().get_default(flag):
            words += [f"--{flag.replace('_', '-')}", str(getattr(given, flag))]
    return shlex.join(words)


def run_all(given: argparse.Namespace, console: Console) -> dict[str, Found]:
    """Do all tries, several at a time; the table is written after each."""
    check_at_least(given, jobs=1, tries=1)
    turns = turns_of(given)
    references = References(given.folder, console.line)
    for name in dict.fromkeys(turn.fault for turn in turns):
        references.of(FAULTS[name].kind(references))
    done: dict[str, Found] = {}
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    console.start(float(len(turns)), "tries")

    def one(turn: Turn) -> None:
        if until is not None and time.monotonic() > until:
            return
        folder = references.folder / turn.name.replace(" ", "-").replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rng = random.Random(f"{given.random_seed}/{turn.name}")
        try:
            outcome = turn.do(references, folder, rng)
        except Exception as error:  # an error of ours counts as a loss
            outcome = Try([f"{type(error).__name__}: {error}"])
        with _WRITING:
            found = done.setdefault(turn.fault, Found([], []))
            (found.calm if turn.calm else found.tries).append(outcome)
            if found.tries:
                command = command_of(given, turn.fault)
                write(given.out, row_of(turn.fault, found, command))
        for wrong in outcome.wrong:
            console.line(f"{'WRONG' if turn.calm else 'LOST'} {folder.name}: {wrong}")
        if not outcome.wrong and not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
        console.advance(1.0)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, [turn for turn in turns if not FAULTS[turn.fault].solo]))
    for turn in turns:
        if FAULTS[turn.fault].solo:
            one(turn)
    console.stop()
    return done


def row_of(name: str, found: Found, command: str) -> FaultRow:
    """Count the tries of a fault."""
    lost = sum(bool(o.wrong) for o in found.tries)
    took, calm = (
        [o.took_s for o in outcomes if o.took_s is not None and not o.wrong]
        for outcomes in (found.tries, found.calm)
    )
    late = statistics.median(took) - statistics.median(calm) if took and calm else float("nan")
    tried = len(found.tries)
    return FaultRow(name, tried, tried - lost, lost, round(late, 1), command)


_WRITING = threading.Lock()


def write(path: Path, row: FaultRow) -> None:
    """Put a fault's row into the table; those of other faults stay as they are."""
    import pandas as pd

    held: dict[str, Any] = {}
    if path.exists():
        held = {row["fault"]: row for row in pd.read_csv(path).to_dict("records")}
    held[row.fault] = vars(row)
    write_table(path, [held[name] for name in FAULTS if name in held])


def main(argv: Sequence[str] | None = None) -> int:
    """Disturb, count, write. Returns the exit status: 1 where anything was lost."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        console = Console()
        done = run_all(given, console)
        rows = [
            row_of(name, done[name], command_of(given, name))
            for name in FAULTS
            if name in done and done[name].tries
        ]
        for row in rows:
            console.line(
                f"{row.fault:<44} {row.survived} of {row.tried} survived, "
                f"{row.seconds_to_recover:.1f} s later"
            )
        calm = [outcome for found in done.values() for outcome in found.calm]
        return 1 if any(row.lost for row in rows) or any(o.wrong for o in calm) else 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
