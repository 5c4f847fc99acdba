"""A worker process: takes jobs as JSON lines on standard input, answers on standard output.

It ends when its driver does: the end of its standard input stops it, whatever it is doing, so a
driver that is killed leaves no orphan. Everything that libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, TextIO

from nas.jobs.job import decode_job, run_job

_TICK_EVERY_S = 0.2


def _watch(jobs: queue.Queue[dict[str, Any]]) -> None:
    """Feed jobs to the main thread; leave at once when the driver is gone."""
    try:
        for line in sys.stdin:
            jobs.put(json.loads(line))
    finally:  # whatever a driver that was killed left of its last line
        os._exit(0)


class _Ticker:
    """Sends finished units to the driver, at most a few times a second."""

    def __init__(self, out: TextIO, which: dict[str, Any]) -> None:
        self._out = out
        self._which = which
        self._units = 0.0
        self._last = time.monotonic()

    def __call__(self, units: float) -> None:
        self._units += units
        now = time.monotonic()
        if now - self._last >= _TICK_EVERY_S:
            self.flush()
            self._last = now

    def flush(self) -> None:
        if self._units:
            send(self._out, {**self._which, "tick": self._units})
            self._units = 0.0


def _usable() -> list[int] | None:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return None


def _settle(cores: list[int] | None) -> None:
    """Move this process, all of its threads, to some cores; what is timed has them all."""
    if not cores:
        return
    with contextlib.suppress(AttributeError, OSError):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)


def _limit(memory_bytes: int | None) -> None:
    """Let too much memory be this process's end, not the driver's nor another worker's."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("900")
    if memory_bytes is not None:
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


class _Output:
    """Lets what libraries print during a job go to the job's own log, and back afterwards."""

    def __init__(self) -> None:
        self._usual = os.dup(2)

    def begin(self, path: str | None, what: str) -> None:
        """Open a job's log; without a place to write, everything stays as it is."""
        if path is None:
            return
        with contextlib.suppress(OSError):
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(log, f"-- {what}\n".encode())
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)

    def end(self) -> None:
        """Go back to the worker's own log."""
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os.dup2(self._usual, 1)
        os.dup2(self._usual, 2)


def send(out: TextIO, message: dict[str, Any]) -> None:
    """Write one message as one line."""
    out.write(json.dumps(message) + "\n")
    out.flush()


def main(modules: Sequence[str] = ()) -> int:
    """Serve jobs until standard input ends; `modules` are further ones whose functions it runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not reach the protocol
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_watch, args=(jobs,), daemon=True).start()

    hello = jobs.get()
    cores, every = hello.get("cores"), _usable()
    _settle(cores)
    _limit(hello.get("memory_bytes"))
    import torch

    torch.set_num_threads(int(hello["threads"]))
    output = _Output()
    send(out, {"ready": os.getpid()})
    while True:
        message = jobs.get()
        which = {"key": message["key"], "attempt": message.get("attempt")}
        moment = datetime.now(timezone.utc).isoformat(timespec="seconds")
        told = (
            f"{moment} {message['function']} {message['key']}, attempt {which['attempt']}, "
            f"process {os.getpid()}"
        )
        output.begin(message.get("log"), told)
        if cores:
            _settle(every if message.get("timed") else cores)
        ticker = _Ticker(out, which)
        result = run_job(decode_job(message, modules), ticker)
        ticker.flush()
        output.end()
        send(out, {**which, "result": dataclasses.asdict(result)})


if __name__ == "__main__":
    sys.exit(main())
