"""A worker with a few more kinds of jobs, for the executor's tests: `python tests/_worker.py`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from nas import runner, worker
from nas.jobs import Tick
from space.errors import refuse


def _echo(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    import torch

    print("noise on standard output")
    for _ in range(spec.get("ticks", 0)):
        tick(1.0)
    return {"said": spec.get("say"), "pid": os.getpid(), "threads": torch.get_num_threads()}


def _raise(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    raise {"runtime": RuntimeError("two\nlines"), "memory": MemoryError()}[spec["what"]]


def _refuse(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    raise refuse("--teacher", "x", "y")


def _die(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    if spec["how"] == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _sleep(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    with open(spec["pid_file"], "w") as out:
        out.write(str(os.getpid()))
    time.sleep(spec["seconds"])
    return {}


def _fork(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    """Leave a child that holds the worker's pipes, as some libraries do; die if asked to."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    if spec["die"]:
        os._exit(7)
    return {"child": child}


runner._KINDS.update(fork=_fork)
runner._KINDS.update(echo=_echo, **{"raise": _raise}, refuse=_refuse, die=_die, sleep=_sleep)

if __name__ == "__main__":
    sys.exit(worker.main())
