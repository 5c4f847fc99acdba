"""What a driver spends on a candidate, part by part: the toolkit's own code, without workers."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from benchmarks._estimates import Row
from nas.config import RunConfig
from nas.executor.dispatch import LEAST_KNOWN, Dispatcher
from nas.executor.pool import Ended, Event, Pool, Ticked
from nas.jobs import Job, Result
from nas.race import ALPHA, DRIFT_NATS, Entrant, race
from nas.run import Incumbent, Run, Task
from nas.search.ledger import Row as LedgerRow
from nas.search.ledger import ledger_of
from nas.search.racing import survivors
from space import Context, get_family

ROUNDS = 5


class _Places:
    """Places of which the one that began first ends at every poll, or all tell of progress."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._began: deque[tuple[str, int]] = deque()
        self.tells = False

    def room(self) -> int:
        return self._workers

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
        values = {"soft_loss": random.Random(key).random()}
        return [Ended(key, attempt, Result(key, True, values, None, 1.0), "nowhere")]

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


class _Race(Run):
    """A run with nothing behind it: how its first rung goes, for a few results of it."""

    def __init__(self, folder: Path, workers: int, *, ahead: bool, results: int) -> None:
        self.config = RunConfig(seed="21M", target_params=5_000_000)
        self.family = get_family("tinyvit")
        self.context = Context(224, 1000)
        train = SimpleNamespace(labels=range(10_000))
        self.dataset = cast(Any, SimpleNamespace(folder=folder / "data", train=train))
        self.store = {"folder": str(folder / "store"), "id": "id", "use_epochs": 10}
        self.folder = cast(
            Any, SimpleNamespace(path=folder, job_folder=lambda name: folder / "work" / name)
        )  # fmt: skip
        self.console = cast(
            Any,
            SimpleNamespace(
                advance=lambda units: None, describe=lambda text: None, refresh=self._refresh
            ),
        )
        self.executor = Pool(_Places(workers), record=folder / "attempts.csv")
        self.deadline = None
        self.trained = {}
        self._ahead, self._count = ahead, results
        self._turns = 0
        self._began = 0.0
        self.seconds = 0.0

    def _first(self) -> int:
        """The turn from which on half of the race is done: as many lead as ever will."""
        return len(self.trained) // 2 + 2

    def _refresh(self) -> None:
        """A turn of the pool, which brings a result: the first has to queue all that may lead."""
        self._turns += 1
        if self._turns == self._first() + 1:
            self._began = time.process_time()
        if self._turns == self._first() + 1 + self._count:
            self.seconds = (time.process_time() - self._began) / self._count
            raise _Enough

    def train_all(self, tasks: Sequence[Task], **options: Any) -> list[Result]:
        asked = options.pop("ahead")

        def ahead(found: Any, room: int) -> Sequence[Task]:
            return asked(found, room) if self._turns >= self._first() else []

        return super().train_all(tasks, ahead=ahead if self._ahead else None, **options)


def result_s(entrants: int, workers: int, *, ahead: bool, results: int = 10) -> float:
    """Return seconds that a driver spends on each result of a race's rung.

    All that it sets off: pool and record, the next job, and with `ahead` who leads, the jobs of
    those, and their places in the queue.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = _Race(Path(folder), workers, ahead=ahead, results=results)
        published = {each.name: each.arch for each in run.family.published}
        # Every other arch differs from its neighbour, as nothing is kept from one to the next.
        archs = list(published.values())
        parent = Incumbent(archs[0], "k", Path(folder) / "parent.safetensors", 1.0, 1.0, 1.0)
        racing = [
            Entrant(f"k{at:05d}", f"s1-k{at:05d}", archs[at % len(archs)], parent)
            for at in range(entrants)
        ]
        with contextlib.suppress(_Enough):
            race(run, racing, keep=4, epochs=8, first_epoch=0, stored_epochs=8)
        return run.seconds


def hung_s(running: int, times: int = 20) -> float:
    """Return seconds to look once for those that will never end, every five seconds."""
    queue = Dispatcher()
    for at in range(LEAST_KNOWN + running):
        queue.add(f"s1-candidate-{at:05d}-rung1", kind="train", units=1.0)
    for start in queue.next(0.0, LEAST_KNOWN):
        queue.finished(start.key, start.attempt, 1.0)
    queue.next(1.0, running)
    return spent(lambda: [queue.hung(2.0) for _ in range(times)], times)


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
        _Part("pool: looking for hung ones, 1,000 workers", lambda: hung_s(1000), "a look"),
        *(
            _Part(f"race: a result{told}, {entrants:,} candidates, {workers:,} workers",
                  partial(result_s, entrants, workers, ahead=ahead), "a result")
            for entrants, workers in ((100, 10), (1000, 100), (1000, 1000), (10_000, 1000))
            for ahead, told in ((False, ""), (True, " and what may run ahead"))
        ),
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
