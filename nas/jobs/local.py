"""Worker processes of this machine, each pinned to its cores or GPU, which may die alone."""

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
from typing import IO, Any

import nas
from nas.jobs.job import Job, Result, encode_job
from nas.jobs.queue import Ended, Event, Executor, Lost, Progress
from space.errors import refuse

START_S, ENDING_S = 300.0, 5.0
"""How long a worker may take to load its libraries before a job's limit begins, and to end after
its output ended."""

SILENT_S, KILLED_S = 1.0, 30.0
"""How long after a process's end its last lines may arrive, and how long the system may take to end
one that was killed."""

NO_ROOM = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of a system that has no more processes, memory or files for us."""

Message = dict[str, Any]


class Child:
    """A process that reads and writes JSON lines; other lines are left out.

    `hear` is called from a thread of its own with each message, and with None after the last one,
    but not after `end`. What the process prints goes to the file `log`, where there is one.
    `environment` is added to ours. Raises OSError where the process cannot be started, InputError
    where the system has no room for one more.
    """

    def __init__(
        self,
        command: Sequence[str],
        hear: Callable[[Child, Message | None], None],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        printed: IO[bytes] | int = subprocess.DEVNULL if log is None else log.open("ab")
        root = str(Path(nas.__file__).resolve().parent.parent)  # the child runs this very code
        path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
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
            if error.errno in NO_ROOM:
                raise _no_room(error.strerror) from None
            raise
        finally:
            if not isinstance(printed, int):
                printed.close()
        self._hear = hear
        self._over = False
        self._silent_since: float | None = None
        self._orders: SimpleQueue[str | None] = SimpleQueue()
        try:
            for work in (self._write, self._read):
                threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:
            self.end()
            raise _no_room(str(error)) from None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a line; returns at once, also where the process is gone or does not read."""
        self._orders.put(json.dumps(message) + "\n")

    def gone(self) -> bool:
        """Tell whether the process ended and no more lines will arrive.

        A child of its own may hold its end of the pipe, so its output may never end.
        """
        if self.alive:
            return False
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        return now - self._silent_since > SILENT_S

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; True where it came."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=timeout_s)
        return not self.alive

    def end(self, patience_s: float = 0.0) -> int:
        """Close its input, let it end by itself for so long, then kill it and all that it started.

        Returns its exit status, below zero for the signal that ended it.
        """
        self._over = True
        self._orders.put(None)
        if patience_s:
            self.wait(patience_s)
        # The whole group: a child that a library forked would hold our pipe open for ever.
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(KILLED_S)
        code = self._process.returncode
        return -signal.SIGKILL if code is None else code

    def _write(self) -> None:
        """Send lines in a thread, so that a child that does not read holds up nobody."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self._orders.get()) is not None:
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
                if isinstance(message, dict) and not self._over:
                    self._hear(self, message)
        if not self._over:
            self._hear(self, None)


def _no_room(reason: str | None) -> Exception:
    want = "limits that allow one more (ulimit -n, ulimit -u)"
    return refuse("a process of ours", f"none from the system ({reason})", want, "fewer --workers")


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that does jobs, beside what there is."""
    return {
        # One pool of the asked size; nested pools would change the bits and the timings.
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that spin while they wait can starve each other when other processes take
        # the cores; asleep at once, they are slow on a quiet machine. A short spin lies
        # between.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
    }


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How worker processes run: `threads` each, a job at most `limit_s` seconds.

    A worker may not take more than `memory_bytes` (data, not files that are mapped). `log` receives
    what workers print; with `logs`, a folder, what they print during a job goes to `<its key>.log`
    there. `command` starts a worker other than `nas.jobs.worker`.
    """

    threads: int
    limit_s: float | None = None
    memory_bytes: int | None = None
    log: Path | None = None
    logs: Path | None = None
    command: Sequence[str] = (sys.executable, "-m", "nas.jobs.worker")


class LocalExecutor(Executor):
    """Runs jobs in `workers` processes of this machine; `more` are fields of `WorkerOptions`.

    A worker that dies takes nothing else along, and the next job gets a fresh one. Several workers
    are each pinned to cores of their own as far as there are enough (but not while they time), and
    to one of `gpus` (their indices) in turn. See `Executor` for `retries` and `record`.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        gpus: Sequence[int] = (),
        retries: int = 0,
        record: Path | None = None,
        **more: Any,
    ) -> None:
        backend = LocalBackend(WorkerOptions(**more), workers, gpus)
        super().__init__(backend, retries=retries, record=record)


@dataclass
class _Task:
    job: Job
    attempt: int
    since: float


class LocalBackend:
    """The worker processes of a `LocalExecutor`; started when they are needed."""

    def __init__(self, options: WorkerOptions, workers: int = 1, gpus: Sequence[int] = ()) -> None:
        self._limit_s = options.limit_s
        self._messages: Queue[tuple[_Worker, Child, Message | None]] = Queue()
        cores = _cores(options.threads, workers)
        self._workers = [
            _Worker(n, options, cores[n], gpus[n % len(gpus)] if gpus else None, self._messages)
            for n in range(workers)
        ]

    def has_slot(self, job: Job) -> bool:
        """Tell whether a worker is idle."""
        return any(worker.task is None for worker in self._workers)

    def start(self, job: Job, attempt: int) -> None:
        """Give a job to an idle worker."""
        idle = [worker for worker in self._workers if worker.task is None]
        # One that runs already has its libraries loaded; all that is timed has one device.
        worker = idle[0] if job.timed else next((w for w in idle if w.alive), idle[0])
        if job.fresh:
            worker.end()
        worker.take(_Task(job, attempt, time.monotonic()))

    def cancel(self, key: str, attempt: int) -> None:
        """End the worker that does this."""
        for worker in self._workers:
            task = worker.task
            if task is not None and (task.job.key, task.attempt) == (key, attempt):
                worker.end()

    def poll(self, timeout_s: float) -> list[Event]:
        """Return the workers' messages, and which of them died or took too long."""
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
                worker.end()
                reason = f"no end after {limit:g} s (--job-minutes)"
                events.append(
                    Lost(task.job.key, task.attempt, reason, worker.name, seconds, late=True)
                )
            elif worker.child is not None and worker.child.gone():
                events.append(worker.died())
        return events

    def _events(self, worker: _Worker, child: Child, message: Message | None) -> list[Event]:
        task = worker.task
        if task is None or child is not worker.child:
            return []
        if message is None:
            if child.wait(ENDING_S):
                return [worker.died()]
            worker.end()
            reason = "the worker closed its output, but did not end"
            seconds = time.monotonic() - task.since
            return [Lost(task.job.key, task.attempt, reason, worker.name, seconds)]
        if "ready" in message:  # its start is not the job's time
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
        number: int,
        options: WorkerOptions,
        cores: list[int] | None,
        gpu: int | None,
        messages: Queue[tuple[_Worker, Child, Message | None]],
    ) -> None:
        self.name = f"worker {number}"
        self.task: _Task | None = None
        self.child: Child | None = None
        self.ready = False
        self._options = options
        self._cores = cores
        self._gpu = gpu
        self._messages = messages

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.child is not None and self.child.alive

    def take(self, task: _Task) -> None:
        """Begin a job, in a fresh process where there is none."""
        self.task = task
        log = self._log_of(task.job) if self._options.logs is not None else None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        more = {"attempt": task.attempt, "log": log and str(log)}
        # A worker that is dead already is found out by `poll`.
        self._running().send({**encode_job(task.job), **more})

    def _log_of(self, job: Job) -> Path | None:
        logs = self._options.logs
        return self._options.log if logs is None else logs / f"{job.key}.log"

    def died(self) -> Lost:
        """Clear away a process that ended, and tell how it did."""
        task = self.task
        assert task is not None
        code = self._end()
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; out of memory?" if -code == signal.SIGKILL else ""
            reason = f"the worker was killed by {name}{hint}"
        else:
            reason = f"the worker ended with status {code}"
        log = self._log_of(task.job)
        if log is not None:
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
        options = self._options
        gpu = {} if self._gpu is None else {"CUDA_VISIBLE_DEVICES": str(self._gpu)}
        self.ready = False
        self.child = Child(
            options.command,
            lambda child, message: self._messages.put((self, child, message)),
            environment={**worker_environment(options.threads), **gpu},
            log=options.log,
        )
        self.child.send(
            {"threads": options.threads, "cores": self._cores, "memory_bytes": options.memory_bytes}
        )
        return self.child
