"""A worker process: reads jobs as JSON lines from standard input, answers on standard output.

The end of its standard input ends it at once, so a killed driver leaves no orphan. What libraries print goes to
standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from queue import Queue
from typing import Any

from nas.core.cli import escape_unprintable
from nas.core.progress import Tick
from nas.jobs.job import Result, decode_job, run_job

TICK_S = 0.2
"""Seconds between reports of progress."""

PRELOADED = ("torch", "timm")
"""Libraries that a process loads before it forks."""

FORKS = sys.platform == "linux"
"""Whether a process that loaded torch may fork; elsewhere a forked job is a fresh one."""

PR_SET_PDEATHSIG = 1

Message = dict[str, Any]
Send = Callable[[Message], None]


def open_pipes(grace_s: float = 0.0) -> tuple[Send, Queue[Message | None]]:
    """Return a function that sends a message to the driver, and the queue of the driver's.

    None follows the last message, and `grace_s` seconds later the process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the driver reads messages only
    lines: Queue[Message | None] = Queue()

    def read() -> None:
        for line in sys.stdin:
            with contextlib.suppress(ValueError):  # the last line of a driver that was killed
                lines.put(json.loads(line))
        lines.put(None)
        time.sleep(grace_s)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()

    def send(message: Message) -> None:
        print(json.dumps(message), file=out, flush=True)

    return send, lines


def throttled(tick: Tick, every_s: float) -> tuple[Tick, Callable[[], None]]:
    """Return a tick that reports the sum at most every `every_s`, and a flush of the rest."""
    held, last = 0.0, time.monotonic()

    def flush() -> None:
        nonlocal held, last
        if held:
            tick(held)
        held, last = 0.0, time.monotonic()

    def add(units: float) -> None:
        nonlocal held
        held += units
        if time.monotonic() - last >= every_s:
            flush()

    return add, flush


def limit_memory(memory_bytes: int | None) -> None:
    """Let the system end this process first where memory runs out, and limit its data."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("900")
    if memory_bytes is not None:
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


@contextlib.contextmanager
def printing_to(path: Path | None, header: str = "") -> Iterator[None]:
    """Redirect what this process and its libraries print to a file, below a header."""
    kept = [os.dup(1), os.dup(2)]
    try:
        if path is not None:
            with contextlib.suppress(OSError), path.open("ab") as log:
                log.write(header.encode())
                log.flush()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, handle in zip((1, 2), kept, strict=True):
            os.dup2(handle, number)
            os.close(handle)


def usable_cores() -> list[int]:
    """Return the cores that this process may use; empty on a system that does not tell."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:
        return []


def _pin(cores: Sequence[int]) -> None:
    """Pin all threads of this process to some cores."""
    if not cores:
        return
    with contextlib.suppress(AttributeError, OSError):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)


def _serve(message: Message, send: Send, modules: Sequence[str]) -> None:
    """Run a job; sends its progress and its result."""
    which = {"key": message["key"], "attempt": message["attempt"]}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = f"{message['function']} {which['key']}, attempt {which['attempt']}"
    log = None if message["log"] is None else Path(message["log"])
    tick, flush = throttled(lambda units: send({**which, "tick": units}), TICK_S)
    with printing_to(log, f"-- {now} {about}, process {os.getpid()}\n"):
        result = run_job(decode_job(message, modules), tick)
    flush()
    send({**which, "result": asdict(result)})


def _serve_forked(message: Message, send: Send, serve: Callable[[], None]) -> None:
    """Run a job in a fork of this process, which ends with it; a fork that is killed is a failed job."""
    for library in PRELOADED:
        importlib.import_module(library)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # else it died before we asked to die with it
            serve()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        result = Result(message["key"], False, {}, f"the process was {why}" if status < 0 else f"the process {why}")
        send({"key": message["key"], "attempt": message["attempt"], "result": asdict(result)})


def main(modules: Sequence[str] = ()) -> int:
    """Serve jobs until standard input ends; `modules` are more modules with job functions."""
    send, lines = open_pipes()
    options = lines.get()
    assert options is not None
    escape_unprintable()  # what libraries print goes to a log
    cores, every = options["cores"], usable_cores()
    _pin(cores)
    limit_memory(options["memory_bytes"])
    import torch

    send({"ready": os.getpid()})
    while (message := lines.get()) is not None:
        if cores:
            _pin(every if message["timed"] else cores)  # a timed job has all cores

        def serve(message: Message = message) -> None:
            torch.set_num_threads(int(options["threads"]))
            _serve(message, send, modules)

        if message.get("forked") and FORKS:
            _serve_forked(message, send, serve)
        else:
            serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
