"""The driver's side of an executor: a queue of jobs, places that take them, their results."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from nas.core.progress import Tick, no_tick
from nas.core.table import Writer
from nas.jobs.job import Job, Result, run_job
from nas.jobs.queue import LEAST_HUNG_S, Dispatcher

KeyTick = Callable[[str, float], None]
"""Called with a job's key and the units of it that were finished since the last call."""

ATTEMPT_COLUMNS = ("job", "attempt", "where", "when", "seconds", "outcome", "reason")
"""Columns of `attempts.csv`; `outcome` is `done`, `failed`, `lost`, `late` or `spare`."""

POLL_S, HUNG_EVERY_S = 0.2, 5.0

Self = TypeVar("Self", bound="Pool")


class OutOfTime(Exception):
    """The deadline came before the jobs were done; their work is lost, nothing else."""


@dataclass(frozen=True)
class Ticked:
    """Units of an attempt that are finished."""

    key: str
    attempt: int
    units: float


@dataclass(frozen=True)
class Begun:
    """An attempt that waited at its place and begins only now."""

    key: str
    attempt: int


@dataclass(frozen=True)
class Ended:
    """An attempt that came to its end, well or not: the job's own doing."""

    key: str
    attempt: int
    result: Result
    where: str


@dataclass(frozen=True)
class Lost:
    """An attempt whose worker or node went away, or was slower than allowed: not the job's doing.

    `late` tells the second from the first. Unless it `counts`, it takes none of the job's tries.
    """

    key: str
    attempt: int
    reason: str
    where: str
    seconds: float = 0.0
    late: bool = False
    counts: bool = True


Event = Ticked | Begun | Ended | Lost


class Places(Protocol):
    """Where attempts run. Nothing blocks but `poll`, and that no longer than it is told."""

    def room(self) -> int:
        """Return how many attempts may run at once."""

    def idle(self) -> int:
        """Return how many attempts could start now."""

    def start(self, job: Job, attempt: int) -> None:
        """Start an attempt."""

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt; nothing is said of it afterwards."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait for something to happen, and return what did."""

    def rest(self) -> None:
        """Let go of memory and cores that nothing uses now."""

    def close(self) -> None:
        """End everything."""


def no_key_tick(key: str, units: float) -> None:
    """Ignore progress."""


class Pool:
    """Runs jobs on places: in order, again where a place failed them, ahead where one is idle.

    A job that raises or refuses is a failed `Result` with a reason in one line; one whose worker
    died is tried again up to `retries` times, and is a failed result after that. Every attempt
    becomes a line of `record` (`attempts.csv`), where there is one: a log that nothing reads back.
    """

    def __init__(
        self,
        places: Places,
        *,
        retries: int = 0,
        copies: bool = False,
        queues: bool = False,
        record: Path | None = None,
    ) -> None:
        self._places = places
        self._retries = retries
        self._queue = Dispatcher(retries=retries, copies=copies, queues=queues)
        self._record = record
        self._jobs: dict[str, Job] = {}
        self._results: dict[str, Result] = {}
        self._early: dict[str, float] = {}
        self._said: dict[str, dict[int, float]] = {}
        self._heard: dict[str, float] = {}
        self._looked = time.monotonic()

    @property
    def room(self) -> int:
        """How many jobs may run at once."""
        return self._places.room()

    @property
    def spare(self) -> bool:
        """Whether a place is idle that nothing waits for."""
        return self._places.idle() > self._queue.waiting

    def run(
        self,
        job: Job,
        *,
        tick: Tick = no_tick,
        deadline: float | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Result:
        """Run one job and wait for its result; see `stream`."""

        def ticked(key: str, units: float) -> None:
            tick(units)

        results = self.stream([job], tick=ticked, deadline=deadline, heartbeat=heartbeat)
        return next(iter(results))

    def stream(
        self,
        jobs: Sequence[Job],
        *,
        tick: KeyTick = no_key_tick,
        deadline: float | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Iterator[Result]:
        """Run jobs with different keys; gives their results as they end, in any order.

        `deadline` is on `time.monotonic()`; past it all is ended and `OutOfTime` raised.
        `heartbeat` is called a few times a second while waiting. A consumer that stops early ends
        what runs.
        """
        wanted = {job.key for job in jobs}
        assert len(wanted) == len(jobs), "two jobs of one name"
        for job in jobs:
            if job.key not in self._results:
                self._add(job, ahead=False)
            if early := self._early.pop(job.key, 0.0):
                tick(job.key, early)
        try:
            while wanted:
                for key in [k for k in self._results if k in wanted]:
                    wanted.discard(key)
                    yield self._results.pop(key)
                if not wanted:
                    return
                if deadline is not None and time.monotonic() >= deadline:
                    self.close()
                    raise OutOfTime(", ".join(sorted(wanted)))
                if heartbeat is not None:
                    heartbeat()
                self._turn(wanted, tick)
        finally:
            self.forget(wanted)

    def ahead(self, jobs: Iterable[Job]) -> None:
        """Do these where places are idle, in case that they are asked for; replaces what waited."""
        asked = {job.key: job for job in jobs}
        for key in [k for k in self._jobs if k not in asked and self._queue.waits_ahead(k)]:
            self.forget([key])
        for job in asked.values():
            if job.key not in self._results:
                self._add(job, ahead=True)

    def forget(self, keys: Iterable[str]) -> None:
        """End these jobs, whether they wait or run, and forget what came of them."""
        for key in list(keys):
            for attempt in self._queue.drop(key):
                self._places.cancel(key, attempt)
                self._write(key, attempt, "", 0.0, "spare", "not wanted any more")
            self._clear(key)
            self._results.pop(key, None)
            self._early.pop(key, None)

    def rest(self) -> None:
        """Let go of memory and cores; nothing runs."""
        self._places.rest()

    def close(self) -> None:
        """End everything; what runs is lost. The next job starts anew."""
        try:
            self.forget(list(self._jobs))
            self._results.clear()
        finally:
            self._places.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, job: Job, *, ahead: bool) -> None:
        self._jobs[job.key] = job
        self._queue.add(job.key, kind=job.name, units=job.units, alone=job.timed, ahead=ahead)

    def _clear(self, key: str) -> None:
        self._jobs.pop(key, None)
        self._said.pop(key, None)
        self._heard.pop(key, None)

    def _turn(self, wanted: set[str], tick: KeyTick) -> None:
        """Start what can start, and take note of what happened."""
        for start in self._queue.next(time.monotonic(), self._places.idle()):
            self._places.start(self._jobs[start.key], start.attempt)
        self._end_hung()
        for event in self._places.poll(POLL_S):
            if isinstance(event, Ticked):
                self._ticked(event, wanted, tick)
            elif isinstance(event, Begun):
                self._queue.begun(event.key, event.attempt, time.monotonic())
            elif isinstance(event, Ended):
                self._ended(event)
            else:
                self._lost(event)

    def _end_hung(self) -> None:
        """End what will never end; it counts as lost, whatever limit the user gave."""
        now = time.monotonic()
        if now - self._looked < HUNG_EVERY_S:
            return
        self._looked = now
        for start in self._queue.hung(now):
            if now - self._heard.get(start.key, -math.inf) < LEAST_HUNG_S:
                continue  # slow, but alive
            self._places.cancel(start.key, start.attempt)
            reason = "far longer than other jobs of its kind: it hangs"
            self._lost(Lost(start.key, start.attempt, reason, "", late=True))

    def _ticked(self, event: Ticked, wanted: set[str], tick: KeyTick) -> None:
        # Of several attempts the one that is furthest counts: work done twice is not progress.
        key = event.key
        if key not in self._jobs:
            return
        self._heard[key] = time.monotonic()
        said = self._said.setdefault(key, {})
        before = max(said.values(), default=0.0)
        own = said[event.attempt] = said.get(event.attempt, 0.0) + event.units
        more = max(0.0, own - before)
        if key in wanted:
            tick(key, more)
        else:
            self._early[key] = self._early.get(key, 0.0) + more

    def _ended(self, event: Ended) -> None:
        others = self._queue.attempts_of(event.key) if self._queue.knows(event.key) else []
        now, ok = time.monotonic(), event.result.ok
        if not self._queue.finished(event.key, event.attempt, now, ok=ok):
            return
        for other in others:
            if other != event.attempt:
                self._places.cancel(event.key, other)
                self._write(event.key, other, "", 0.0, "spare", "another attempt was faster")
        outcome = "done" if event.result.ok else "failed"
        self._write(
            event.key,
            event.attempt,
            event.where,
            event.result.seconds,
            outcome,
            event.result.reason or "",
        )
        self._clear(event.key)
        self._results[event.key] = event.result

    def _lost(self, event: Lost) -> None:
        if not self._queue.knows(event.key):
            return
        goes_on = self._queue.lost(event.key, event.attempt, counts=event.counts)
        outcome = "late" if event.late else "lost"
        self._write(event.key, event.attempt, event.where, event.seconds, outcome, event.reason)
        if goes_on or self._queue.knows(event.key):
            return
        self._clear(event.key)
        reason = event.reason
        if self._retries:
            reason = f"{reason}; {self._retries + 1} attempts"
        self._results[event.key] = Result(event.key, False, {}, reason, event.seconds)

    def _write(
        self, key: str, attempt: int, where: str, seconds: float, outcome: str, reason: str
    ) -> None:
        if self._record is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = [key, attempt, where, now, round(seconds, 3), outcome, reason]
        out = io.StringIO()
        writer = Writer(out, ATTEMPT_COLUMNS)
        if not self._record.exists():
            writer.writeheader()
        writer.writerow(row)
        # A log: a full disk is found out by what matters.
        with contextlib.suppress(OSError), self._record.open("a", encoding="utf-8") as file:
            file.write(out.getvalue())


class InlineExecutor:
    """Runs jobs in this process: for tests and debuggers. A crash takes the run along."""

    room = 1
    spare = False

    def run(
        self,
        job: Job,
        *,
        tick: Tick = no_tick,
        deadline: float | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Result:
        """Run one job here; the deadline is looked at before it starts only."""
        if deadline is not None and time.monotonic() >= deadline:
            raise OutOfTime(job.key)
        return run_job(job, tick)

    def stream(
        self,
        jobs: Sequence[Job],
        *,
        tick: KeyTick = no_key_tick,
        deadline: float | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Iterator[Result]:
        """Run jobs here, in the order given."""
        for job in jobs:
            yield self.run(job, tick=partial(tick, job.key), deadline=deadline)

    def ahead(self, jobs: Iterable[Job]) -> None:
        """Nothing is ever idle here."""

    def forget(self, keys: Iterable[str]) -> None:
        """Nothing runs ahead here."""

    def rest(self) -> None:
        """Nothing to let go of."""

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
