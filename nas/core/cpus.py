"""How many processors there are for us, and how many threads and processes may be asked for."""

from __future__ import annotations

import os

from space.checks import read_int

MOST_AT_ONCE = 1024
"""Threads or processes of one command: more than a machine's cores. A hundred times as many would
fill its memory with stacks."""


def usable_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_threads(value: int) -> int:
    """Return the threads that --threads asks for. Raises InputError."""
    return read_int("--threads", value, 1, MOST_AT_ONCE)
