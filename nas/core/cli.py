"""What the commands share: one-line errors, exit statuses, signals, cache folder, CPU count."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nas.core.io import disk_refusal
from space.errors import InputError, read_int, without_passwords

EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 2, 130, 141, 143
MOST_AT_ONCE = 1024
"""Threads or processes of one command: more than a machine's cores. A hundred times as many would fill its memory with
stacks."""


class Parser(argparse.ArgumentParser):
    """An argument parser of whole flags, whose refusals are one line and whose description is printed as it is."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, **{"allow_abbrev": False, "formatter_class": raw, **options})

    def parse_known_args(self, *args: Any, **named: Any) -> Any:
        """Parse, where help and refusals may be printed."""
        escape_unprintable()
        return super().parse_known_args(*args, **named)

    def error(self, message: str) -> NoReturn:
        """End with one line and exit status 2."""
        self.exit(EXIT_BAD_INPUT, f"error: {without_passwords(message)} (see --help)\n")


def escape_unprintable() -> None:
    """Let this process print any text: characters that its terminal cannot show are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def path_argument(path: object) -> str:
    """Return a path as an argument that no command takes for a flag, a name, a home or JSON: `./5M`."""
    text = str(path)
    if text.startswith("~"):
        return str(Path(text).absolute())
    return f"./{text}" if text.startswith(("-", "{")) or "/" not in text else text


def shell_command(module: str, *arguments: object) -> str:
    """Return a command for a POSIX shell, quoted where that is needed."""
    return shlex.join(["python", "-m", module, *map(str, arguments)])


def recorded_command(argv: Sequence[str]) -> str:
    """Return a command line for the record, without passwords and without the value of `--storage`."""
    words = list(argv)
    for at, word in enumerate(words):
        if word.startswith("--storage="):
            words[at] = "--storage=..."
        elif word == "--storage" and at + 1 < len(words):
            words[at + 1] = "..."
    return " ".join(map(without_passwords, words))


def resume_flags(folder: object) -> str:
    """Return the flags that continue a run or training, for a POSIX shell."""
    return shlex.join(["--resume", path_argument(folder)])


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
    escape_unprintable()
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
