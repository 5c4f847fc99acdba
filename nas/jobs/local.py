"""Run jobs in worker processes of this machine, each pinned to its cores or GPU."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue, SimpleQueue
from typing import Any

import nas
from nas.jobs.job import Job, Result, encode_job
from nas.jobs.queue import Ended, Event, Executor, Lost, Progress
from nas.jobs.worker import FORKS, Message, usable_cores
from space.errors import refuse

START_S, EXIT_S = 300.0, 5.0
"""Seconds that a worker may load its libraries before a job's limit begins, and that it may run on after it closed its
output."""

SILENT_S, KILLED_S = 1.0, 30.0
"""Seconds in which the last lines of an ended process arrive, and in which a killed one ends."""

EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of a system without free processes, memory or files."""


class Child:
    """A process that reads and writes JSON lines; other lines are ignored.

    Until `end`, a thread calls `on_message` with each message, and with None after the last. The process prints to
    `log`, if given; `environment` is added to ours. Raises OSError where it cannot be started, InputError where the
    system allows no further process.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_message: Callable[[Child, Message | None], None],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        root = str(Path(nas.__file__).resolve().parent.parent)  # the child imports this same code
        path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            with (log or Path(os.devnull)).open("ab") as printed:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **(environment or {})},
                )
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise _exhausted(error.strerror) from None
            raise
        self._on_message = on_message
        self._ended = False
        self._silent_since: float | None = None
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        try:
            for work in (self._write, self._read):
                threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:
            self.end()
            raise _exhausted(str(error)) from None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; returns at once, even where the process ended or does not read."""
        self._lines.put(json.dumps(message) + "\n")

    def gone(self) -> bool:
        """Return whether the process ended and no more messages will arrive.

        A child of its own may hold the pipe open, so the end of its output may never come.
        """
        if self.alive:
            return False
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        return now - self._silent_since > SILENT_S

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; returns whether it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=timeout_s)
        return not self.alive

    def end(self, grace_s: float = 0.0) -> int:
        """Close its input, wait up to `grace_s`, then kill its process group.

        Returns its exit status, negative for a signal.
        """
        self._ended = True
        self._lines.put(None)
        if grace_s:
            self.wait(grace_s)
        # The whole group: a child that a library forked would keep our pipe open.
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(KILLED_S)
        code = self._process.returncode
        return -signal.SIGKILL if code is None else code

    def _write(self) -> None:
        """Write lines, in a thread of its own: a child that does not read blocks no caller."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout, contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                message = None
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                if isinstance(message, dict) and not self._ended:
                    self._on_message(self, message)
        if not self._ended:
            self._on_message(self, None)


def _exhausted(reason: str | None) -> Exception:
    want = "limits that allow one more (ulimit -n, ulimit -u)"
    return refuse("a worker process", f"none from the system ({reason})", want, "fewer --workers")


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment variables that a process that runs jobs needs."""
    return {
        # One pool of the asked size; nested pools would change the bits and the timings.
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that spin while they wait starve each other on busy cores; those that sleep at once are slow on a
        # quiet machine.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
    }


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """The settings of worker processes: `threads` each, at most `limit_s` seconds a job.

    `memory_bytes` limits a worker's data (not mapped files). Workers print to `log`, and during a job to `<key>.log` in
    the folder `logs`, if given. `command` starts a worker.
    """

    threads: int
    limit_s: float | None = None
    memory_bytes: int | None = None
    log: Path | None = None
    logs: Path | None = None
    command: Sequence[str] = (sys.executable, "-m", "nas.jobs.worker")


class LocalExecutor(Executor):
    """Runs jobs in `workers` processes of this machine; `more` are fields of `WorkerOptions`.

    A worker that dies is replaced, and the others go on. Several workers are each pinned to cores of their own if there
    are enough (not in a timed job), and to one of `gpus` (indices) in turn.
    """

    def __init__(
        self, *, workers: int = 1, gpus: Sequence[int] = (), retries: int = 0, record: Path | None = None, **more: Any
    ) -> None:
        backend = LocalBackend(WorkerOptions(**more), workers, gpus)
        super().__init__(backend, retries=retries, record=record)


@dataclass
class _Task:
    job: Job
    attempt: int
    since: float


class LocalBackend:
    """The worker processes of a `LocalExecutor`, each started when it is first needed."""

    def __init__(self, options: WorkerOptions, workers: int = 1, gpus: Sequence[int] = ()) -> None:
        self._limit_s = options.limit_s
        self._messages: Queue[_Incoming] = Queue()
        usable, threads = usable_cores(), options.threads
        pinned = workers > 1 and workers * threads <= len(usable)
        self._workers = []
        for n in range(workers):
            cores = usable[n * threads : (n + 1) * threads] if pinned else []
            gpu = gpus[n % len(gpus)] if gpus else None
            self._workers.append(_Worker(f"worker {n}", options, cores, gpu, self._messages))

    def has_slot(self, job: Job) -> bool:
        """Return whether a worker is idle."""
        return any(worker.task is None for worker in self._workers)

    def start(self, job: Job, attempt: int) -> None:
        """Give a job to an idle worker."""
        idle = [worker for worker in self._workers if worker.task is None]
        # A running one has its libraries loaded; timed jobs share one worker and so one device.
        worker = idle[0] if job.timed else next((w for w in idle if w.alive), idle[0])
        if job.fresh or (job.forked and worker.used):
            worker.end()
        worker.take(_Task(job, attempt, time.monotonic()))

    def cancel(self, key: str, attempt: int) -> None:
        """End the worker that runs an attempt."""
        for worker in self._workers:
            task = worker.task
            if task is not None and (task.job.key, task.attempt) == (key, attempt):
                worker.end()

    def poll(self, timeout_s: float) -> list[Event]:
        """Return the workers' messages, and the attempts whose worker died or took too long."""
        events: list[Event] = []
        with contextlib.suppress(Empty):
            events += self._events(*self._messages.get(timeout=timeout_s))
            while True:
                events += self._events(*self._messages.get_nowait())
        for worker in self._workers:
            task = worker.task
            if task is None:
                continue
            seconds, limit = time.monotonic() - task.since, self._limit_s
            if limit is not None and seconds > (limit if worker.ready else max(limit, START_S)):
                events.append(worker.lost(f"no end after {limit:g} s (--job-minutes)", late=True))
            elif worker.child is not None and worker.child.gone():
                events.append(worker.died())
        return events

    def _events(self, worker: _Worker, child: Child, message: Message | None) -> list[Event]:
        task = worker.task
        if task is None or child is not worker.child:
            return []
        if message is None:
            if child.wait(EXIT_S):
                return [worker.died()]
            return [worker.lost("the worker closed its output, but did not end")]
        if "ready" in message:  # its start does not count as the job's time
            task.since = time.monotonic()
            worker.ready = True
            return []
        key, attempt = task.job.key, task.attempt
        if (message.get("key"), message.get("attempt")) != (key, attempt):
            return []
        if "tick" in message:
            return [Progress(key, attempt, float(message["tick"]))]
        worker.task = None
        return [Ended(key, attempt, Result(**message["result"]), worker.name)]

    def release(self) -> None:
        """End the idle workers; the next job gets a fresh one."""
        for worker in self._workers:
            if worker.task is None:
                worker.end()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()


_Incoming = tuple["_Worker", Child, Message | None]


class _Worker:
    """One process that runs one job at a time; `used` where it ran one itself, so that it cannot be forked from."""

    def __init__(
        self, name: str, options: WorkerOptions, cores: list[int], gpu: int | None, messages: Queue[_Incoming]
    ) -> None:
        self.name = name
        self.task: _Task | None = None
        self.child: Child | None = None
        self.ready = self.used = False
        self._options, self._cores, self._gpu, self._messages = options, cores, gpu, messages

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.child is not None and self.child.alive

    def take(self, task: _Task) -> None:
        """Start a job, in a new process where none runs."""
        self.task = task
        log = self._log_of(task.job) if self._options.logs is not None else None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        more = {"attempt": task.attempt, "log": log and str(log)}
        # `poll` notices a worker that is dead already.
        child = self._running()
        self.used = self.used or not (task.job.forked and FORKS)
        child.send({**encode_job(task.job), **more})

    def _log_of(self, job: Job) -> Path | None:
        logs = self._options.logs
        return self._options.log if logs is None else logs / f"{job.key}.log"

    def died(self) -> Lost:
        """Return that the attempt was lost as the process ended, and how it did."""
        task = self.task
        assert task is not None
        code, log = self._end(), self._log_of(task.job)
        reason = f"the worker ended with status {code}"
        if code < 0:
            hint = "; out of memory?" if -code == signal.SIGKILL else ""
            reason = f"the worker was killed by {signal.Signals(-code).name}{hint}"
        return self.lost(reason if log is None else f"{reason} (see {log.name})")

    def lost(self, reason: str, *, late: bool = False) -> Lost:
        """End the process; returns that its attempt was lost."""
        task = self.task
        assert task is not None
        self.end()
        seconds = time.monotonic() - task.since
        return Lost(task.job.key, task.attempt, reason, self.name, seconds, late=late)

    def end(self) -> None:
        """End the process, if one runs, with all that it started."""
        self.task = None
        self._end()

    def _end(self) -> int:
        child, self.child = self.child, None
        return 0 if child is None else child.end()

    def _running(self) -> Child:
        if self.child is not None and self.child.alive:
            return self.child
        self._end()
        options = self._options
        gpu = {} if self._gpu is None else {"CUDA_VISIBLE_DEVICES": str(self._gpu)}
        self.ready = self.used = False
        self.child = Child(
            options.command,
            lambda child, message: self._messages.put((self, child, message)),
            environment={**worker_environment(options.threads), **gpu},
            log=options.log,
        )
        self.child.send({"threads": options.threads, "cores": self._cores, "memory_bytes": options.memory_bytes})
        return self.child
