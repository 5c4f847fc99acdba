"""What the commands share: one-line errors, exit statuses, signals, cache folder, CPU count."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from nas.core.io import disk_refusal
from space.errors import InputError, read_int, without_passwords

EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 2, 130, 141, 143
MOST_AT_ONCE = 1024
"""Threads or processes of one command: more than a machine's cores. A hundred times as many would fill its memory with
stacks."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are one line (rule 2 of the design)."""

    def error(self, message: str) -> NoReturn:
        """End with one line and exit status 2."""
        self.exit(EXIT_BAD_INPUT, f"error: {without_passwords(message)} (see --help)\n")


def default_cache() -> Path:
    """Return where datasets, teachers, labels and trained seeds are kept between runs."""
    named = os.environ.get("VISION_CONTRACTION_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vision-contraction"


def exit_status(work: Callable[[], int]) -> int:
    """Do a command's work; returns its exit status. Bad input, and a disk that is full or may not be written to, is one
    line on standard error and 2, Ctrl-C 130; SIGTERM leaves through `SystemExit` with 143, so that what is open is
    closed. A second signal ends the process at once: whatever is on disk is whole at any moment."""
    signalled = False

    def leave(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal signalled
        status = EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_TERMINATED
        if signalled:
            os._exit(status)
        signalled = True
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(status)

    # A shell that starts us in the background may have had SIGINT ignored: so it stays.
    heard = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {each: signal.signal(each, leave) for each in heard}
    try:
        return work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our lines has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        refused = disk_refusal(error)
        if refused is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        return EXIT_BAD_INPUT
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def usable_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_threads(value: int) -> int:
    """Return the threads that --threads asks for. Raises InputError."""
    return read_int("--threads", value, 1, MOST_AT_ONCE)
