"""A try of a chaos campaign: begun, disturbed, gone on with as a user would, and compared."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.arena import (
    Arena,
    Kind,
    Started,
    differences,
    kill,
    leftovers,
    orphans,
    start,
    tagged,
)
from nas.core.cli import EXIT_INTERRUPTED, EXIT_TERMINATED

GRACE_S = 5.0


@dataclass
class Try:
    """What went wrong in a try, and how long it took from its beginning to its good end."""

    wrong: list[str] = field(default_factory=list)
    took_s: float | None = None


Do = Callable[[Arena, Path, random.Random], Try]


@dataclass(frozen=True)
class Fault:
    """A way to disturb; `tries` of it by default. `solo`: nothing else goes on meanwhile.

    `calm` is the same without the disturbance, for how long that takes; None where it says nothing.
    """

    tries: int
    kind: Callable[[Arena], Kind]
    do: Do
    calm: Do | None = None
    solo: bool = False


def small_run(arena: Arena) -> Kind:
    """Return a small contraction."""
    return arena.contract()


Make = Callable[[Arena, random.Random], Kind]
Act = Callable[[Started, random.Random], list[str]]


def one_line(said: str) -> list[str]:
    """Say what is wrong with a refusal: it is one line, without a traceback."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    wrong = [] if len(errors) == 1 else [f"{len(errors)} lines of refusal"]
    return wrong + (["a traceback"] if "Traceback" in said else [])


def ended(kind: Kind, truth: object, folder: Path) -> list[str]:
    """Say in what a finished run differs from an undisturbed one, and what it left behind."""
    out, cache = folder / "out", folder / "cache"
    wrong = [f"another {name}" for name in differences(kind, truth, out)]
    return wrong + [f"left behind: {path}" for path in leftovers(out, cache)]


def gone_on(arena: Arena, kind: Kind, folder: Path, begun: float) -> Try:
    """Go on with what was disturbed, as a user would, and compare it with an undisturbed one."""
    out, cache = folder / "out", folder / "cache"
    truth, _ = arena.truth(kind)
    started = (out / "run.json").exists() or kind.name not in ("run", "run-21M")
    command = kind.again(out, cache) if started else kind.begin(out, cache)
    again = start(command, folder / "again.log")
    code = again.end()
    took = time.monotonic() - begun
    wrong = [] if code == 0 else [f"status {code}: {again.said().strip().splitlines()[-1:]}"]
    if code == 0:
        wrong += ended(kind, truth, folder)
    wrong += [f"orphan: {words}" for words in orphans(again.tag).values()]
    return Try(wrong, took)


def disturbed(make: Make, act: Act | None, *, goes_on: bool = False, warm: bool = False) -> Do:
    """Return a try: begin, act at a random instant, and go on unless it `goes_on` by itself.

    A `warm` one finds data, teacher, labels and the trained seed in its cache. Without an act
    nothing disturbs it.
    """

    def do(arena: Arena, folder: Path, rng: random.Random) -> Try:
        kind = make(arena, rng)
        truth, seconds = arena.truth(kind)
        out, cache = folder / "out", folder / "cache"
        if warm:
            shutil.copytree(arena.cache(kind), cache)
        process = start(kind.begin(out, cache), folder / "first.log")
        wrong = []
        if act is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.end(rng.uniform(0.02, 0.95) * seconds)
            wrong += act(process, rng)
        if act is not None and not goes_on:
            wrong += [f"orphan: {words}" for words in orphans(process.tag).values()]
            found = gone_on(arena, kind, folder, process.since)
            return Try(wrong + found.wrong, found.took_s)
        code = process.end()
        took = time.monotonic() - process.since
        if code:
            wrong.append(f"status {code}: {process.said().strip().splitlines()[-1:]}")
        else:
            wrong += ended(kind, truth, folder)
        wrong += [f"orphan: {words}" for words in orphans(process.tag).values()]
        return Try(wrong, took)

    return do


def fault(
    tries: int,
    kind: Callable[[Arena], Kind],
    make: Make,
    act: Act,
    *,
    goes_on: bool = False,
    warm: bool = False,
    solo: bool = False,
) -> Fault:
    """Return a fault of `disturbed` tries."""
    return Fault(
        tries,
        kind,
        disturbed(make, act, goes_on=goes_on, warm=warm),
        calm=disturbed(make, None, warm=warm),
        solo=solo,
    )


def some_workers(arena: Arena, rng: random.Random) -> Kind:
    """Return a small contraction with one worker or two."""
    return arena.contract("--workers", str(rng.choice([1, 2])))


def two_workers(arena: Arena, rng: random.Random) -> Kind:
    """Return a small contraction with two workers."""
    return arena.contract("--workers", "2")


def builders(arena: Arena, rng: random.Random) -> Kind:
    """Return the building of labels by one process or two."""
    return arena.labels("--processes", str(rng.choice([1, 2])))


def trainer(arena: Arena, rng: random.Random) -> Kind:
    """Return a full training."""
    return arena.training()


def kill_driver(process: Started, rng: random.Random) -> list[str]:
    """Kill the driver alone."""
    kill([process.process.pid])
    process.end()
    return []


def kill_all(process: Started, rng: random.Random) -> list[str]:
    """Kill everything at once, as a machine does that loses its power."""
    kill([process.process.pid])
    kill(list(tagged(process.tag)))
    process.end()
    return []


def kill_worker(process: Started, rng: random.Random) -> list[str]:
    """Kill one of the workers, as soon as there is one."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.process.poll() is None:
        workers = [pid for pid, words in tagged(process.tag).items() if "nas.jobs.worker" in words]
        if workers:
            kill([rng.choice(sorted(workers))])
            break
        time.sleep(0.05)
    return []


def terminate(process: Started, rng: random.Random) -> list[str]:
    """Ask it to end as schedulers do, and kill it after a grace period."""
    kill([process.process.pid], signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.end(GRACE_S)
        return [] if code in (0, EXIT_TERMINATED, -signal.SIGTERM) else [f"SIGTERM: status {code}"]
    kill_all(process, rng)
    return ["it did not end within its grace period"]


def interrupt_twice(process: Started, rng: random.Random) -> list[str]:
    """Press Ctrl-C, and again."""
    kill([process.process.pid], signal.SIGINT)
    time.sleep(rng.uniform(0.0, 0.4))
    kill([process.process.pid], signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.end(20.0)
        # Before our own handlers stand, and when they have done their work, Python's own ends it in
        # its own way: by the signal, which a shell tells as 130 as well.
        early = "data: " not in process.said() and code == 1
        good = code in (0, EXIT_INTERRUPTED, -signal.SIGINT) or early
        good = good and (early or "Traceback" not in process.said())
        return [] if good else [f"Ctrl-C: status {code}"]
    kill_all(process, rng)
    return ["it did not end on Ctrl-C"]


def either(process: Started, rng: random.Random) -> list[str]:
    """Kill the driver or everything."""
    return rng.choice([kill_driver, kill_all])(process, rng)
