"""Worker processes of this machine, each pinned to its cores or GPU, which may die alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

from nas.jobs.child import Child, Message
from nas.jobs.job import Job, Result, encode_job
from nas.jobs.pool import Ended, Event, Lost, Pool, Ticked

START_S, ENDING_S = 300.0, 5.0
"""How long a worker may take to load its libraries before a job's limit begins, and to end after
its last word."""

Said = tuple["_Worker", Child, "Message | None"]
"""A worker's line, or None at the end of its output, and which process said it."""


def worker_environment(threads: int) -> dict[str, str]:
    """Return what a process that does jobs needs of its environment, beside what there is."""
    return {
        # One pool of the asked size; nested pools would change the bits and the timings.
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that spin while they wait can starve each other when other processes take
        # the cores; asleep at once, they are slow on a quiet machine. A short spin lies
        # between: see `python -m benchmarks.waiting`.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
    }


class LocalExecutor(Pool):
    """Runs jobs in `workers` processes of this machine, on a fixed number of threads each.

    A worker that dies takes nothing else along, and the next job gets a fresh one; with several,
    each is pinned to cores of its own as far as there are enough (but not while it times), and to
    one of `gpus` (their indices) in turn. A job is ended after `limit_s` seconds. `log` receives
    what workers print; with `logs`, a folder, what they print during a job goes to `<its key>.log`
    there. `command` starts a worker other than `nas.jobs.worker`; one may not take more than
    `memory_bytes` (data, not files that are mapped). See `Pool` for `retries` and `record`.
    """

    def __init__(
        self,
        *,
        threads: int,
        workers: int = 1,
        gpus: Sequence[int] = (),
        limit_s: float | None = None,
        retries: int = 0,
        log: Path | None = None,
        logs: Path | None = None,
        record: Path | None = None,
        command: Sequence[str] | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        places = LocalPlaces(
            threads=threads,
            workers=workers,
            gpus=gpus,
            limit_s=limit_s,
            log=log,
            logs=logs,
            command=command,
            memory_bytes=memory_bytes,
        )
        super().__init__(places, retries=retries, record=record)


@dataclass
class _Task:
    job: Job
    attempt: int
    since: float


class LocalPlaces:
    """The worker processes of a `LocalExecutor`; started when they are needed."""

    def __init__(
        self,
        *,
        threads: int,
        workers: int,
        gpus: Sequence[int],
        limit_s: float | None,
        log: Path | None,
        logs: Path | None,
        command: Sequence[str] | None,
        memory_bytes: int | None,
    ) -> None:
        self._said: Queue[Said] = Queue()
        self._limit_s = limit_s
        cores = _cores(threads, workers)
        self._workers = [
            _Worker(
                f"worker {number}",
                command=command,
                threads=threads,
                cores=cores[number],
                gpu=gpus[number % len(gpus)] if gpus else None,
                log=log,
                logs=logs,
                said=self._said,
                memory_bytes=memory_bytes,
            )
            for number in range(workers)
        ]

    def room(self) -> int:
        """Return how many workers there are."""
        return len(self._workers)

    def idle(self) -> int:
        """Return how many workers have nothing to do."""
        return sum(worker.task is None for worker in self._workers)

    def start(self, job: Job, attempt: int) -> None:
        """Give a job to an idle worker."""
        idle = [worker for worker in self._workers if worker.task is None]
        # One that runs already has its libraries loaded.
        worker = next((w for w in idle if w.alive), idle[0])
        if job.timed:  # one device for all that is compared
            worker = idle[0]
        worker.take(_Task(job, attempt, time.monotonic()))

    def cancel(self, key: str, attempt: int) -> None:
        """End the worker that does this."""
        for worker in self._doing(key, attempt):
            worker.end()

    def _doing(self, key: str, attempt: int) -> list[_Worker]:
        return [
            w
            for w in self._workers
            if w.task is not None and (w.task.job.key, w.task.attempt) == (key, attempt)
        ]

    def poll(self, timeout_s: float) -> list[Event]:
        """Return what the workers said, and which of them died or took too long."""
        events: list[Event] = []
        with contextlib.suppress(Empty):
            events += self._heard(*self._said.get(timeout=timeout_s))
            while True:
                events += self._heard(*self._said.get_nowait())
        for worker in self._workers:
            task = worker.task
            if task is None:
                continue
            seconds = time.monotonic() - task.since
            limit = self._limit_s
            if limit is not None and seconds > (limit if worker.ready else max(limit, START_S)):
                worker.end()
                reason = f"no end after {limit:g} s (--job-minutes)"
                events.append(Lost(task.job.key, task.attempt, reason, worker.name, seconds, True))
            elif worker.child is not None and worker.child.gone():
                events.append(worker.died())
        return events

    def _heard(self, worker: _Worker, child: Child, message: Message | None) -> list[Event]:
        task = worker.task
        if task is None or child is not worker.child:
            return []
        if message is None:
            if child.ended(ENDING_S):
                return [worker.died()]
            worker.end()
            reason = "the worker closed its output, but did not end"
            seconds = time.monotonic() - task.since
            return [Lost(task.job.key, task.attempt, reason, worker.name, seconds)]
        if message.get("attempt") not in (None, task.attempt) or (
            message.get("key") not in (None, task.job.key)
        ):
            return []
        if "ready" in message:  # its start is not the job's time
            task.since = time.monotonic()
            worker.ready = True
            return []
        if "tick" in message:
            return [Ticked(task.job.key, task.attempt, float(message["tick"]))]
        if "result" in message:
            worker.task = None
            result = Result(**message["result"])
            return [Ended(task.job.key, task.attempt, result, worker.name)]
        return []

    def rest(self) -> None:
        """End the workers that are idle: the next job gets a fresh one."""
        for worker in self._workers:
            if worker.task is None:
                worker.end()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()


def _cores(threads: int, workers: int) -> list[list[int] | None]:
    """Deal the usable cores out; a single worker, or too many of them, may use all."""
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return [None] * workers
    if workers == 1 or workers * threads > len(usable):
        return [None] * workers
    return [usable[n * threads : (n + 1) * threads] for n in range(workers)]


class _Worker:
    """One process that does one job at a time."""

    def __init__(
        self,
        name: str,
        *,
        command: Sequence[str] | None,
        threads: int,
        cores: list[int] | None,
        gpu: int | None,
        log: Path | None,
        logs: Path | None,
        said: Queue[Said],
        memory_bytes: int | None,
    ) -> None:
        self._memory_bytes = memory_bytes
        self.name = name
        self.task: _Task | None = None
        self._command = (
            [sys.executable, "-m", "nas.jobs.worker"] if command is None else list(command)
        )
        self._threads = threads
        self._cores = cores
        self._gpu = gpu
        self._log = log
        self._logs = logs
        self._said = said
        self.child: Child | None = None
        self.ready = False

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.child is not None and self.child.alive

    def take(self, task: _Task) -> None:
        """Begin a job, in a fresh process where there is none."""
        self.task = task
        job = task.job
        log = None if self._logs is None else self._logs / f"{job.key}.log"
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        message = {
            **encode_job(job),
            "attempt": task.attempt,
            "log": None if log is None else str(log),
            "timed": job.timed,
        }
        # A worker that is dead already is found out by `poll`.
        self._running().say(message)

    def died(self) -> Lost:
        """Say how the process ended, and clear it away."""
        task = self.task
        assert task is not None
        code = self._end()
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; out of memory?" if -code == signal.SIGKILL else ""
            reason = f"the worker was killed by {name}{hint}"
        else:
            reason = f"the worker ended with status {code}"
        if self._log is not None:
            log = self._log if self._logs is None else self._logs / f"{task.job.key}.log"
            reason += f" (see {log.name})"
        self.task = None
        return Lost(task.job.key, task.attempt, reason, self.name, time.monotonic() - task.since)

    def end(self) -> None:
        """End the process, if there is one, with all that it started; its job is forgotten."""
        self.task = None
        self._end()

    def _end(self) -> int:
        child, self.child = self.child, None
        return 0 if child is None else child.end()

    def _running(self) -> Child:
        if self.child is not None and self.child.alive:
            return self.child
        self._end()
        gpu = {} if self._gpu is None else {"CUDA_VISIBLE_DEVICES": str(self._gpu)}
        self.ready = False
        self.child = Child(
            self._command,
            lambda child, message: self._said.put((self, child, message)),
            environment={**worker_environment(self._threads), **gpu},
            log=self._log,
        )
        self.child.say(
            {"threads": self._threads, "cores": self._cores, "memory_bytes": self._memory_bytes}
        )
        return self.child
