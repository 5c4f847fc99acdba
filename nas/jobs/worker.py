"""A worker process: takes jobs as JSON lines on standard input, answers on standard output.

It ends when its driver does: the end of its standard input stops it, whatever it is doing, so a
driver that is killed leaves no orphan. Everything that libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
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

from nas.core.progress import Tick
from nas.jobs.job import decode_job, run_job

TICK_S = 0.2
"""How often progress is reported."""

Message = dict[str, Any]
Say = Callable[[Message], None]


def open_pipes(patience_s: float = 0.0) -> tuple[Say, Queue[Message | None]]:
    """Return a function that sends a line to the driver, and the lines that the driver sends.

    After the last line comes None, and after `patience_s` more the process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not reach the driver
    lines: Queue[Message | None] = Queue()

    def read() -> None:
        for line in sys.stdin:
            with contextlib.suppress(ValueError):  # the last line of a driver that was killed
                lines.put(json.loads(line))
        lines.put(None)
        time.sleep(patience_s)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()

    def say(message: Message) -> None:
        print(json.dumps(message), file=out, flush=True)

    return say, lines


def collected(tick: Tick, every_s: float) -> tuple[Tick, Callable[[], None]]:
    """Return a tick that passes units on at most every so many seconds, and one for the rest."""
    held, last = 0.0, time.monotonic()

    def rest() -> None:
        nonlocal held, last
        if held:
            tick(held)
        held, last = 0.0, time.monotonic()

    def add(units: float) -> None:
        nonlocal held
        held += units
        if time.monotonic() - last >= every_s:
            rest()

    return add, rest


def limit_memory(memory_bytes: int | None) -> None:
    """Let too much memory be this process's end, not the driver's nor another worker's."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("900")
    if memory_bytes is not None:
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


@contextlib.contextmanager
def printing_to(path: Path | None, header: str = "") -> Iterator[None]:
    """Let what libraries print go to a file meanwhile, below a header."""
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


def _usable() -> list[int] | None:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return None


def _pin(cores: list[int] | None) -> None:
    """Move this process, all of its threads, to some cores; a timed job has them all."""
    if not cores:
        return
    with contextlib.suppress(AttributeError, OSError):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)


def _do(message: Message, say: Say, modules: Sequence[str]) -> None:
    """Run a job, and send its progress and its result."""
    which = {"key": message["key"], "attempt": message["attempt"]}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = f"{message['function']} {which['key']}, attempt {which['attempt']}"
    log = None if message["log"] is None else Path(message["log"])
    tick, rest = collected(lambda units: say({**which, "tick": units}), TICK_S)
    with printing_to(log, f"-- {now} {about}, process {os.getpid()}\n"):
        result = run_job(decode_job(message, modules), tick)
    rest()
    say({**which, "result": asdict(result)})


def main(modules: Sequence[str] = ()) -> int:
    """Serve jobs until standard input ends; `modules` are further ones whose functions it runs."""
    say, lines = open_pipes()
    hello = lines.get()
    assert hello is not None
    cores, every = hello.get("cores"), _usable()
    _pin(cores)
    limit_memory(hello.get("memory_bytes"))
    import torch

    torch.set_num_threads(int(hello["threads"]))
    say({"ready": os.getpid()})
    while (message := lines.get()) is not None:
        if cores:
            _pin(every if message["timed"] else cores)
        _do(message, say, modules)
    return 0


if __name__ == "__main__":
    sys.exit(main())
