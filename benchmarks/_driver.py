"""What a driver spends on a candidate, part by part: the toolkit's own code, without workers."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks._estimates import Row
from nas.executor.pool import Ended, Event, Pool, Ticked
from nas.jobs import Job, Result
from nas.race import ALPHA, DRIFT_NATS, Entrant, race
from nas.search.ledger import Row as LedgerRow
from nas.search.ledger import ledger_of
from nas.search.racing import survivors

ROUNDS = 5


class _Places:
    """Places of which the one that began first ends at every poll, or all tell of progress."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._began: deque[tuple[str, int]] = deque()
        self.tells = False

    def idle(self) -> int:
        return self._workers - len(self._began)

    def start(self, job: Job, attempt: int) -> None:
        self._began.append((job.key, attempt))

    def cancel(self, key: str, attempt: int) -> None:
        self._began.remove((key, attempt))

    def poll(self, timeout_s: float) -> list[Event]:
        if self.tells:
            return [Ticked(key, attempt, 1.0) for key, attempt in self._began]
        key, attempt = self._began.popleft()
        return [Ended(key, attempt, Result(key, True, {}, None, 1.0), "nowhere")]

    def rest(self) -> None:
        pass

    def close(self) -> None:
        self._began.clear()


def spent(work: Callable[[], object], of: int) -> float:
    """Return the processor seconds of some work, divided by `of`."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / of


def pool_s(workers: int, jobs: int) -> float:
    """Return seconds a job that a pool starts, ends, records and gives back."""
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(_Places(workers), record=Path(folder) / "attempts.csv")
        named = [Job("train", f"s1-candidate-{at:05d}-rung1", {}, 1.0) for at in range(jobs)]
        return spent(lambda: deque(pool.stream(named), maxlen=0), jobs)


def tick_s(workers: int, rounds: int = 3) -> float:
    """Return seconds for one word of progress while `workers` jobs run."""
    places = _Places(workers)
    pool = Pool(places)
    named = [Job("train", f"s1-candidate-{at:05d}-rung1", {}, 1e9) for at in range(workers)]
    beats = 0

    def heartbeat() -> None:
        nonlocal beats
        beats += 1
        if beats == 2:
            places.tells = True
            began.append(time.process_time())
        if beats == 2 + rounds:
            places.tells = False
            began.append(time.process_time())

    began: list[float] = []
    deque(pool.stream(named, heartbeat=heartbeat), maxlen=0)
    return (began[1] - began[0]) / (rounds * workers)


class _Enough(Exception):
    """What was to be measured is measured."""


def leading_s(entrants: int, keep: int = 4) -> float:
    """Return seconds that a race spends on each result to say what could run ahead."""
    found: list[float] = []

    def train_all(tasks: Sequence[Any], *, ahead: Any, **_: Any) -> None:
        results: Mapping[str, Result] = {
            task.job.key: Result(task.job.key, True, {"soft_loss": float(at % 97)})
            for at, task in enumerate(tasks[:-1])
        }
        found.append(spent(lambda: ahead(results), 1))
        raise _Enough

    def training(arch: Any, name: str, *, out: Path, **_: Any) -> Any:
        return SimpleNamespace(job=Job("train", name, {}), out=out)

    run: Any = SimpleNamespace(
        config=SimpleNamespace(racing=True, proxy_init="inherit"),
        folder=SimpleNamespace(job_folder=lambda name: Path("work") / name),
        training=training,
        train_all=train_all,
    )
    nobody: Any = None
    racing = [Entrant(f"k{at:05d}", f"s1-k{at:05d}", nobody, nobody) for at in range(entrants)]
    with contextlib.suppress(_Enough):
        race(run, racing, keep=keep, epochs=8, first_epoch=0, stored_epochs=8)
    return found[0]


def survivors_s(entrants: int, images: int) -> float:
    """Return seconds of a decision at a barrier, as the paired tests take it."""
    rng = np.random.default_rng(0)
    losses = {f"k{at:05d}": rng.gamma(2.0, 0.5, images) for at in range(entrants)}
    return spent(
        lambda: survivors(losses, 4, alpha=ALPHA, looks=3, drift_sd=DRIFT_NATS), 1
    )  # fmt: skip


def ledger_s(rows: int) -> float:
    """Return seconds for a decided candidate to enter the study."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = ledger_of(Path(folder), None)
        decided = [
            LedgerRow(1, f"k{at}", "", "k", "", 1, "", 5_000_000, 5_000_000, 10**9)
            for at in range(rows)
        ]
        began = time.process_time()
        for row in decided:
            ledger.add(row, {"depths": [1, 2]}, {})
        ended = time.process_time()
        ledger.close()
    return (ended - began) / rows


@dataclass(frozen=True)
class _Part:
    name: str
    measure: Callable[[], float]
    note: str


def driver_rows(command: str, rounds: int = ROUNDS) -> list[Row]:
    """Measure all parts `rounds` times; microseconds, the median with the least and the most."""
    parts = [
        _Part("pool: a job, 100 workers, 1,000 jobs", lambda: pool_s(100, 1000), "a job"),
        _Part("pool: a job, 1,000 workers, 10,000 jobs", lambda: pool_s(1000, 10_000), "a job"),
        _Part("pool: a tick, 10 workers", lambda: tick_s(10, 300), "a word of progress"),
        _Part("pool: a tick, 100 workers", lambda: tick_s(100, 30), "a word of progress"),
        _Part("pool: a tick, 1,000 workers", lambda: tick_s(1000), "a word of progress"),
        _Part("race: what may run ahead, 100 candidates", lambda: leading_s(100), "a result"),
        _Part("race: what may run ahead, 1,000 candidates", lambda: leading_s(1000), "a result"),
        _Part("race: what may run ahead, 10,000 candidates", lambda: leading_s(10_000), "a result"),
        _Part("race: a decision, 100 candidates, 1,000 images", lambda: survivors_s(100, 1000),
              "a barrier"),
        _Part("race: a decision, 1,000 candidates, 1,000 images", lambda: survivors_s(1000, 1000),
              "a barrier"),
        _Part("ledger: a row", lambda: ledger_s(50), "a candidate"),
    ]  # fmt: skip
    found = []
    for part in parts:
        values = sorted(part.measure() * 1e6 for _ in range(rounds))
        note = f"microseconds of processor time for {part.note}; least and most"
        found.append(
            Row(part.name, values[len(values) // 2], values[0], values[-1], rounds, "rounds",
                note, command)
        )  # fmt: skip
    return found
