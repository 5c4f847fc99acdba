"""A try: begun, disturbed, resumed as a user would, and compared."""

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

from benchmarks.faults.references import Kind, References, Started, differences, kill, leftovers, orphans, start, tagged
from nas.core.cli import EXIT_INTERRUPTED, EXIT_TERMINATED

GRACE_S = 5.0


@dataclass
class Try:
    """What went wrong in a try, and its seconds from the beginning to its good end."""

    wrong: list[str] = field(default_factory=list)
    took_s: float | None = None


Do = Callable[[References, Path, random.Random], Try]


@dataclass(frozen=True)
class Fault:
    """A way to disturb; `tries` of it by default. `solo`: nothing else runs meanwhile."""

    tries: int
    kind: Callable[[References], Kind]
    do: Do
    solo: bool = False


def small_run(references: References) -> Kind:
    """Return a small contraction."""
    return references.contract()


Make = Callable[[References, random.Random], Kind]
Act = Callable[[Started, random.Random], list[str]]


def ended(kind: Kind, expected: object, folder: Path) -> list[str]:
    """Return in what a finished run differs from an undisturbed one, and its leftovers."""
    out, cache = folder / "out", folder / "cache"
    wrong = [f"another {name}" for name in differences(kind, expected, out)]
    return wrong + leftovers(out, cache)


def resumed(references: References, kind: Kind, folder: Path, begun: float) -> Try:
    """Resume what was disturbed, as a user would, and compare it with an undisturbed one."""
    out, cache = folder / "out", folder / "cache"
    expected, _ = references.of(kind)
    started = (out / "run.json").exists() or kind.name not in ("run", "run-21M")
    command = kind.resume(out, cache) if started else kind.begin(out, cache)
    return finished(start(command, folder / "again.log"), kind, expected, folder, begun)


def finished(process: Started, kind: Kind, expected: object, folder: Path, begun: float) -> Try:
    """Wait for a good end, and compare it with that of an undisturbed run."""
    wrong = process.end_well()
    took = time.monotonic() - begun
    return Try(wrong or ended(kind, expected, folder), took)


def disturbed(make: Make, act: Act, *, continues: bool = False, warm: bool = False) -> Do:
    """Return a try: begin, act at a random instant, and resume unless it `continues` by itself.

    A `warm` one finds data, teacher, labels and the trained seed in its cache.
    """

    def do(references: References, folder: Path, rng: random.Random) -> Try:
        kind = make(references, rng)
        expected, seconds = references.of(kind)
        out, cache = folder / "out", folder / "cache"
        if warm:
            shutil.copytree(references.cache(kind), cache)
        process = start(kind.begin(out, cache), folder / "first.log")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.end(rng.uniform(0.02, 0.95) * seconds)
        wrong = act(process, rng)
        if continues:
            found = finished(process, kind, expected, folder, process.since)
        else:
            wrong += orphans(process.tag)
            found = resumed(references, kind, folder, process.since)
        return Try(wrong + found.wrong, found.took_s)

    return do


def some_workers(references: References, rng: random.Random) -> Kind:
    """Return a small contraction with one worker or two."""
    return references.contract("--workers", str(rng.choice([1, 2])))


def two_workers(references: References, rng: random.Random) -> Kind:
    """Return a small contraction with two workers."""
    return references.contract("--workers", "2")


def builders(references: References, rng: random.Random) -> Kind:
    """Return the building of labels by one process or two."""
    return references.labels("--processes", str(rng.choice([1, 2])))


def trainer(references: References, rng: random.Random) -> Kind:
    """Return a full training."""
    return references.training()


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
        early = "data: " not in process.output() and code == 1
        good = code in (0, EXIT_INTERRUPTED, -signal.SIGINT) or early
        good = good and (early or "Traceback" not in process.output())
        return [] if good else [f"Ctrl-C: status {code}"]
    kill_all(process, rng)
    return ["it did not end on Ctrl-C"]


def either(process: Started, rng: random.Random) -> list[str]:
    """Kill the driver or everything."""
    return rng.choice([kill_driver, kill_all])(process, rng)
