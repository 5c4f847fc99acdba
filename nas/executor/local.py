"""Where jobs run: a worker process of this machine, which may die without taking the run along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

import nas
from nas.jobs import Job, Result, Tick, no_tick


class OutOfTime(Exception):
    """The deadline came before the job was done; the job's work is lost, nothing else."""


class LocalExecutor:
    """Runs jobs one after another in a process of its own, on a fixed number of threads.

    A job that raises, runs out of memory or kills its process is a failed `Result` with a reason
    in one line; the next job gets a fresh process. `log` receives what the worker prints;
    `command` starts a worker other than `nas.worker`.
    """

    def __init__(
        self, *, threads: int, log: Path | None = None, command: Sequence[str] | None = None
    ) -> None:
        self._command = [sys.executable, "-m", "nas.worker"] if command is None else list(command)
        self._threads = threads
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._messages: Queue[dict[str, Any] | None] = Queue()

    def run(
        self,
        job: Job,
        *,
        tick: Tick = no_tick,
        deadline: float | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Result:
        """Run one job and wait for its result.

        `deadline` is on `time.monotonic()`; past it the worker is killed and `OutOfTime` raised.
        `heartbeat` is called a few times a second while waiting.
        """
        started = time.monotonic()
        process = self._worker()
        message = {"kind": job.kind, "key": job.key, "spec": dict(job.spec), "units": job.units}
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except OSError:
            return self._died(job, started)
        while True:
            if deadline is not None and time.monotonic() >= deadline:
                self.close()
                raise OutOfTime(job.key)
            if heartbeat is not None:
                heartbeat()
            gone = process.poll() is not None
            try:
                answer = self._messages.get(timeout=1.0 if gone else 0.2)
            except Empty:
                if gone:  # a child of the worker's may still hold its end of the pipe
                    return self._died(job, started)
                continue
            if answer is None:
                return self._died(job, started)
            if "tick" in answer:
                tick(float(answer["tick"]))
            elif "result" in answer:
                return Result(**answer["result"])

    def close(self) -> None:
        """End the worker process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        # The whole group: a child that a library forked would hold our pipe open for ever.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _worker(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        root = str(Path(nas.__file__).resolve().parent.parent)
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            # One pool of the asked size; nested pools would change the bits and the timings.
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
            # Threads that spin while they wait can starve each other when other processes take
            # the cores; asleep at once, they are slow on a quiet machine. A short spin lies
            # between: see `python -m benchmarks.waiting`.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        }
        log: IO[bytes] | int = subprocess.DEVNULL
        if self._log is not None:
            log = self._log.open("ab")
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=environment,
                start_new_session=True,
            )
        finally:
            if not isinstance(log, int):
                log.close()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps({"threads": self._threads}) + "\n")
            process.stdin.flush()
        self._messages = Queue()
        threading.Thread(target=_read, args=(process.stdout, self._messages), daemon=True).start()
        self._process = process
        return process

    def _died(self, job: Job, started: float) -> Result:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; out of memory?" if -code == signal.SIGKILL else ""
            reason = f"the worker was killed by {name}{hint}"
        else:
            reason = f"the worker ended with status {code}"
        if self._log is not None:
            reason += f" (see {self._log.name})"
        return Result(job.key, False, {}, reason, time.monotonic() - started)


def _read(stream: IO[str] | None, messages: Queue[dict[str, Any] | None]) -> None:
    """Pass the worker's lines on; `None` says that there will be no more."""
    assert stream is not None
    try:
        for line in stream:
            with contextlib.suppress(ValueError):
                messages.put(json.loads(line))
    except (OSError, ValueError):
        pass  # the stream was closed under us: the same end
    messages.put(None)


class InlineExecutor:
    """Runs jobs in this process: for tests and debuggers. A crash takes the run along."""

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
        from nas.runner import run_job

        return run_job(job, tick)

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
