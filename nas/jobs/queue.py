"""Run jobs on a backend: in order, each again where its worker was lost, results as they end."""

from __future__ import annotations

import contextlib
import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from nas.core.progress import Tick, no_tick
from nas.core.table import Writer
from nas.jobs.job import Job, Result, run_job

KeyTick = Callable[[str, float], None]
"""Called with a job's key and the units of it that were finished since the last call."""

ATTEMPT_COLUMNS = ("job", "attempt", "where", "when", "seconds", "outcome", "reason")
"""Columns of `attempts.csv`; `outcome` is `done`, `failed`, `lost`, `late` or `cancelled`."""

POLL_S = 0.2

Self = TypeVar("Self", bound="Executor")


def no_key_tick(key: str, units: float) -> None:
    """Ignore progress."""


class OutOfTime(Exception):
    """The deadline came before the jobs were done; their work is lost, nothing else."""


@dataclass(frozen=True)
class Progress:
    """Units of an attempt that are finished."""

    key: str
    attempt: int
    units: float


@dataclass(frozen=True)
class Ended:
    """An attempt that came to its end, well or not: the job's own doing."""

    key: str
    attempt: int
    result: Result
    where: str


@dataclass(frozen=True)
class Lost:
    """An attempt whose worker or node went away, or that was `late`: not the job's doing.

    One that is `final` is not tried again: the backend has done so.
    """

    key: str
    attempt: int
    reason: str
    where: str
    seconds: float = 0.0
    late: bool = False
    final: bool = False


Event = Progress | Ended | Lost


class Backend(Protocol):
    """Where attempts run. Nothing blocks but `poll`, and that no longer than it is told."""

    def has_slot(self, job: Job) -> bool:
        """Tell whether a job could start now."""

    def start(self, job: Job, attempt: int) -> None:
        """Start an attempt."""

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt; no event tells of it afterwards."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait for events, and return them."""

    def release(self) -> None:
        """Free the memory and cores that nothing uses now."""

    def close(self) -> None:
        """End everything."""


class JobQueue:
    """Jobs that wait and run: which one starts next, and whether a lost one is tried again.

    Jobs start in the order given; a lost one is tried again before all that wait, up to `retries`
    times. A timed job starts when nothing runs, and nothing starts beside it.
    """

    def __init__(self, jobs: Sequence[Job], retries: int = 0) -> None:
        self.running: dict[str, Job] = {}
        self._waiting = deque(jobs)
        self._attempts: dict[str, int] = {}
        self._retries = retries

    def next(self, has_slot: Callable[[Job], bool]) -> tuple[Job, int] | None:
        """Start a job: return it and the number of its attempt, None where none can start."""
        if not self._waiting or any(job.timed for job in self.running.values()):
            return None
        job = self._waiting[0]
        if (job.timed and self.running) or not has_slot(job):
            return None
        self._waiting.popleft()
        self.running[job.key] = job
        self._attempts[job.key] = attempt = self._attempts.get(job.key, 0) + 1
        return job, attempt

    def is_running(self, key: str, attempt: int) -> bool:
        """Tell whether this attempt of a job runs."""
        return key in self.running and self._attempts[key] == attempt

    def attempts(self, key: str) -> int:
        """Return how often a job was started."""
        return self._attempts.get(key, 0)

    def finished(self, key: str) -> None:
        """Forget a job whose attempt ended."""
        del self.running[key]

    def lost(self, key: str, *, final: bool = False) -> bool:
        """Return whether a job whose attempt was lost is tried again."""
        job = self.running.pop(key)
        again = not final and self._attempts[key] <= self._retries
        if again:
            self._waiting.appendleft(job)
        return again


class _Progress:
    """Passes units on; of several attempts the furthest counts: work done twice is no progress."""

    def __init__(self, tick: KeyTick) -> None:
        self._tick = tick
        self._done: dict[str, float] = {}
        self._own: dict[tuple[str, int], float] = {}

    def add(self, event: Progress) -> None:
        which, before = (event.key, event.attempt), self._done.get(event.key, 0.0)
        self._own[which] = own = self._own.get(which, 0.0) + event.units
        self._done[event.key] = max(before, own)
        self._tick(event.key, max(0.0, own - before))


class Executor:
    """Runs jobs on a backend.

    A job that raises or refuses is a failed `Result` with a reason in one line; one whose worker
    died is tried again up to `retries` times, and is a failed result after that. Every attempt
    becomes a line of `record` (`attempts.csv`), where there is one: a log that nothing reads back.
    """

    def __init__(self, backend: Backend, *, retries: int = 0, record: Path | None = None) -> None:
        self._backend = backend
        self._retries = retries
        self._record = record

    def run(
        self,
        job: Job,
        *,
        tick: Tick = no_tick,
        deadline: float | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Result:
        """Run one job and wait for its result; see `stream`."""
        results = self.stream(
            [job], tick=lambda _, units: tick(units), deadline=deadline, heartbeat=heartbeat
        )
        (result,) = results
        return result

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
        the jobs that run.
        """
        left = {job.key for job in jobs}
        assert len(left) == len(jobs), "two jobs of one name"
        queue, progress = JobQueue(jobs, self._retries), _Progress(tick)
        try:
            while left:
                if deadline is not None and time.monotonic() >= deadline:
                    raise OutOfTime(", ".join(sorted(left)))
                if heartbeat is not None:
                    heartbeat()
                while (start := queue.next(self._backend.has_slot)) is not None:
                    self._backend.start(*start)
                for event in self._backend.poll(POLL_S):
                    if not queue.is_running(event.key, event.attempt):
                        continue
                    if isinstance(event, Progress):
                        progress.add(event)
                    elif (result := self._ended(queue, event)) is not None:
                        left.discard(event.key)
                        yield result
        finally:
            for key in queue.running:
                attempt = queue.attempts(key)
                self._backend.cancel(key, attempt)
                self._write(key, attempt, "", 0.0, "cancelled", "nobody waits for it any more")

    def _ended(self, queue: JobQueue, event: Ended | Lost) -> Result | None:
        """Write an attempt down; returns the job's result unless it is tried again."""
        key, attempt = event.key, event.attempt
        if isinstance(event, Ended):
            queue.finished(key)
            result = event.result
            outcome = "done" if result.ok else "failed"
            self._write(key, attempt, event.where, result.seconds, outcome, result.reason or "")
            return result
        again = queue.lost(key, final=event.final)
        outcome = "late" if event.late else "lost"
        self._write(key, attempt, event.where, event.seconds, outcome, event.reason)
        if again:
            return None
        reason = event.reason
        if self._retries:
            reason = f"{reason}; {self._retries + 1} attempts"
        return Result(key, False, {}, reason, event.seconds)

    def release(self) -> None:
        """Free memory and cores; nothing runs."""
        self._backend.release()

    def close(self) -> None:
        """End everything. The next job starts anew."""
        self._backend.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(
        self, key: str, attempt: int, where: str, seconds: float, outcome: str, reason: str
    ) -> None:
        if self._record is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        out = io.StringIO()
        writer = Writer(out, ATTEMPT_COLUMNS)
        if not self._record.exists():
            writer.writeheader()
        writer.writerow([key, attempt, where, now, round(seconds, 3), outcome, reason])
        # A log: a full disk is found out by what matters.
        with contextlib.suppress(OSError), self._record.open("a", encoding="utf-8") as file:
            file.write(out.getvalue())


class InlineExecutor(Executor):
    """Runs jobs in this process: for tests and debuggers. A crash takes the run along."""

    def __init__(self) -> None:
        """Nothing to prepare."""

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

    def release(self) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Nothing to end."""
