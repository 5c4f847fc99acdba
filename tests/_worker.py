"""Job functions for the executor's tests; `python -m tests._worker` is a worker that has them."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.core.progress import Tick
from nas.jobs import worker
from space.errors import refuse


def echo(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    import torch

    print("noise on standard output")
    for _ in range(spec.get("ticks", 0)):
        tick(1.0)
    return {"echo": spec.get("say"), "pid": os.getpid(), "threads": torch.get_num_threads()}


def fail(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    raise {"runtime": RuntimeError("two\nlines"), "memory": MemoryError()}[spec["what"]]


def refused(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    raise refuse("--teacher", "x", "y")


def die(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    if spec["how"] == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def sleep(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    with open(spec["pid_file"], "w") as out:
        out.write(str(os.getpid()))
    time.sleep(spec["seconds"])
    return {}


def fork(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    """Leave a child that holds the worker's pipes, as some libraries do; die if asked to."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    if spec["die"]:
        os._exit(7)
    return {"child": child}


def meet(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    """Come to a place and wait until others are there too: they run at the same time."""
    mine = Path(spec["mine"])
    with mine.open("a") as out:
        out.write("x")
    until = time.monotonic() + 60
    while not all(Path(other).exists() for other in spec["others"]):
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.02)
    return {"pid": os.getpid()}


def flaky(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    """Die the first few times."""
    tick(3.0)
    counter = Path(spec["counter"])
    with counter.open("a") as out:
        out.write("x")
    if len(counter.read_text()) <= spec["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"lives": len(counter.read_text())}


def during(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    began = time.monotonic()
    time.sleep(spec["seconds"])
    return {"began": began, "ended": time.monotonic()}


def cores(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    import torch

    torch.ones(64, 64) @ torch.ones(64, 64)
    threads = [int(t) for t in os.listdir("/proc/self/task")]
    return {"cores": sorted(set().union(*(os.sched_getaffinity(t) for t in threads)))}


def hog(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    import torch

    return {"sum": float(torch.ones(int(spec["bytes"]) // 4).sum())}


def full(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/weights")


def noise(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    print(spec["say"])
    os.system(f"echo {spec['say']} of a child")
    return {}


if __name__ == "__main__":
    sys.exit(worker.main(("tests._worker",)))
