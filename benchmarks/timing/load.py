"""Another process's work, to time beside: `python -m benchmarks.timing.load SEED` keeps a core busy now and then."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def busy_core(random_seed: int) -> Iterator[subprocess.Popen[bytes]]:
    """Keep one core busy now and then: half to two seconds on, as long off."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.timing.load", str(random_seed)])
    try:
        time.sleep(0.5)
        yield process
        assert process.poll() is None, "the load ended before its time"
    finally:
        process.kill()
        process.wait()


def burn(random_seed: int) -> None:
    """Burn the last core of this process for ever, with pauses."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rng = random.Random(random_seed)
    while True:
        until = time.perf_counter() + rng.uniform(0.5, 2.0)
        while time.perf_counter() < until:
            pass
        time.sleep(rng.uniform(0.5, 2.0))


if __name__ == "__main__":
    burn(int(sys.argv[1]))
