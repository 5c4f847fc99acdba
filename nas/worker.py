"""A worker process: takes jobs as JSON lines on standard input, answers on standard output.

It ends when its driver does: the end of its standard input stops it, whatever it is doing, so a
driver that is killed leaves no orphan. Everything that libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any, TextIO

from nas.jobs import Job

_TICK_EVERY_S = 0.2


def _watch(jobs: queue.Queue[dict[str, Any]]) -> None:
    """Feed jobs to the main thread; leave at once when the driver is gone."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)


class _Ticker:
    """Sends finished units to the driver, at most a few times a second."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
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
            send(self._out, {"tick": self._units})
            self._units = 0.0


def send(out: TextIO, message: dict[str, Any]) -> None:
    """Write one message as one line."""
    out.write(json.dumps(message) + "\n")
    out.flush()


def main() -> int:
    """Serve jobs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not reach the protocol
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_watch, args=(jobs,), daemon=True).start()

    hello = jobs.get()
    import torch

    torch.set_num_threads(int(hello["threads"]))
    from nas.runner import run_job

    send(out, {"ready": os.getpid()})
    while True:
        message = jobs.get()
        job = Job(message["kind"], message["key"], message["spec"], message["units"])
        ticker = _Ticker(out)
        result = run_job(job, ticker)
        ticker.flush()
        send(
            out,
            {
                "result": {
                    "key": result.key,
                    "ok": result.ok,
                    "values": dict(result.values),
                    "reason": result.reason,
                    "seconds": result.seconds,
                }
            },
        )


if __name__ == "__main__":
    sys.exit(main())
