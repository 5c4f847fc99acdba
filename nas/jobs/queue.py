"""Run jobs on a backend: in order, retrying those whose worker was lost."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol, TypeVar

from nas.core.progress import Tick, no_tick
from nas.core.table import Writer
from nas.jobs.job import Job, Result

KeyTick = Callable[[str, float], None]
"""Called with a job's key and the units of it that finished since the last call."""

ATTEMPT_COLUMNS = ("job", "attempt", "where", "when", "seconds", "outcome", "reason")
"""Columns of `attempts.csv`; `outcome` is `done`, `failed`, `lost`, `late` or `cancelled`."""

POLL_S = 0.2

Self = TypeVar("Self", bound="Executor")


def no_key_tick(key: str, units: float) -> None:
    """Ignore progress."""


class OutOfTime(Exception):
    """The deadline passed before the jobs ended; only their work is lost."""


@dataclass(frozen=True)
class Progress:
    """Further units of an attempt that finished."""

    key: str
    attempt: int
    units: float


@dataclass(frozen=True)
class Ended:
    """An attempt whose function returned or raised."""

    key: str
    attempt: int
    result: Result
    where: str


@dataclass(frozen=True)
class Lost:
    """An attempt whose worker or node died, or that exceeded its time limit (`late`).

    With `final` it is not retried: the backend has done so.
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
    """Where attempts run. Only `poll` blocks, and no longer than its timeout."""

    def has_slot(self, job: Job) -> bool:
        """Return whether a job can start now."""

    def start(self, job: Job, attempt: int) -> None:
        """Start an attempt."""

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt; no event of it follows."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait for events, and return them."""

    def release(self) -> None:
        """End idle processes."""

    def close(self) -> None:
        """End everything."""


class JobQueue:
    """Waiting and running jobs: which starts next, and whether a lost one is retried.

    Jobs start in the order given; a lost one is retried before all that wait, up to `retries` times. A timed job starts
    when nothing runs, and nothing starts beside it.
    """

    def __init__(self, jobs: Sequence[Job], retries: int = 0) -> None:
        self.running: dict[str, Job] = {}
        self._waiting = deque(jobs)
        self._attempts: dict[str, int] = {}
        self._retries = retries

    def next(self, has_slot: Callable[[Job], bool]) -> tuple[Job, int] | None:
        """Start a job; returns it and the number of its attempt, None if none can start."""
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
        """Return whether this attempt of a job runs."""
        return key in self.running and self._attempts[key] == attempt

    def attempts(self, key: str) -> int:
        """Return how often a job was started."""
        return self._attempts.get(key, 0)

    def finished(self, key: str) -> None:
        """Remove a job whose attempt ended."""
        del self.running[key]

    def lost(self, key: str, *, final: bool = False) -> bool:
        """Remove a job whose attempt was lost, or queue it again; returns whether it is retried."""
        job = self.running.pop(key)
        again = not final and self._attempts[key] <= self._retries
        if again:
            self._waiting.appendleft(job)
        return again


class Executor:
    """Runs jobs on a backend.

    A job that raises is a failed `Result` with a reason in one line; one whose worker died is retried up to `retries`
    times, and fails after that. Each attempt is a line of `record` (`attempts.csv`), if there is one: a log that no
    code reads.
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
        (result,) = self.stream([job], tick=lambda _, units: tick(units), deadline=deadline, heartbeat=heartbeat)
        return result

    def stream(
        self,
        jobs: Sequence[Job],
        *,
        tick: KeyTick = no_key_tick,
        deadline: float | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Iterator[Result]:
        """Run jobs with different keys; yields their results as they end, in any order.

        `deadline` is on `time.monotonic()`; past it the jobs are ended and `OutOfTime` is raised. `heartbeat` is called
        a few times a second. A consumer that stops early ends what runs.
        """
        left = {job.key for job in jobs}
        assert len(left) == len(jobs), "two jobs with one key"
        queue = JobQueue(jobs, self._retries)
        units = defaultdict[tuple[str, int], float](float)  # by key and attempt
        furthest = defaultdict[str, float](float)
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
                        key, before = event.key, furthest[event.key]
                        units[key, event.attempt] += event.units
                        # Work that a retry repeats is no progress.
                        furthest[key] = max(before, units[key, event.attempt])
                        tick(key, furthest[key] - before)
                    elif (result := self._ended(queue, event)) is not None:
                        left.discard(event.key)
                        yield result
        finally:
            for key in queue.running:
                attempt = queue.attempts(key)
                self._backend.cancel(key, attempt)
                self._write(key, attempt, "", 0.0, "cancelled", "its result is no longer needed")

    def _ended(self, queue: JobQueue, event: Ended | Lost) -> Result | None:
        """Record an attempt; returns the job's result unless it is retried."""
        key, attempt = event.key, event.attempt
        if isinstance(event, Ended):
            queue.finished(key)
            result = event.result
            outcome = "done" if result.ok else "failed"
            self._write(key, attempt, event.where, result.seconds, outcome, result.reason or "")
            return result
        self._write(key, attempt, event.where, event.seconds, "late" if event.late else "lost", event.reason)
        if queue.lost(key, final=event.final):
            return None
        attempts = f"; {self._retries + 1} attempts" if self._retries else ""
        return Result(key, False, {}, event.reason + attempts, event.seconds)

    def release(self) -> None:
        """End idle processes, which frees their memory and cores."""
        self._backend.release()

    def close(self) -> None:
        """End everything; a later job starts new processes."""
        self._backend.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, key: str, attempt: int, where: str, seconds: float, outcome: str, reason: str) -> None:
        if self._record is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        # Only a log: a full disk is reported by what a run needs.
        with contextlib.suppress(OSError), self._record.open("a", encoding="utf-8") as file:
            writer = Writer(file, ATTEMPT_COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow([key, attempt, where, now, round(seconds, 3), outcome, reason])
