"""A process of ours that is spoken to in JSON lines, and ends with all that it started."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import nas
from space.errors import refuse

Message = dict[str, Any]

SILENT_S, KILLED_S = 1.0, 30.0
"""How long a process that ended may have nothing to say before all it said has been heard, and how
long the system may take to end one that was killed."""

SHORT = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What the system says where it has no more processes, memory or files for us."""


def package_path() -> str:
    """Return a PYTHONPATH by which a child finds this very package."""
    root = str(Path(nas.__file__).resolve().parent.parent)
    return os.pathsep.join(
        [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    )


class Child:
    """A process that hears and says JSON lines; what it says otherwise is left out.

    `hear` is called from a thread of its own with the child and each message, and with None in the
    end: when it said its last, but not after `end`. It prints to the file `log`, where there is
    one. `environment` is added to ours. Nothing here waits for the child but what says so. Raises
    OSError where it cannot be started, InputError where the system has no room for one more.
    """

    def __init__(
        self,
        command: Sequence[str],
        hear: Callable[[Child, Message | None], None],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        printed: IO[bytes] | int = subprocess.DEVNULL if log is None else log.open("ab")
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": package_path(), **(environment or {})},
            )
        except OSError as error:
            if error.errno in SHORT:
                raise _no_room(error.strerror) from None
            raise
        finally:
            if not isinstance(printed, int):
                printed.close()
        self._hear = hear
        self._over = False
        self._silent_since: float | None = None
        self._orders: SimpleQueue[str | None] = SimpleQueue()
        try:
            for work in (self._write, self._read):
                threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:
            self.end()
            raise _no_room(str(error)) from None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a line; a child that is gone is found out by what is heard of it."""
        self._orders.put(json.dumps(message) + "\n")

    def gone(self) -> bool:
        """Tell whether the process ended and nothing more will be heard of it.

        A child of its own may hold its end of the pipe, so its output may never end.
        """
        if self.alive:
            return False
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        return now - self._silent_since > SILENT_S

    def ended(self, patience_s: float) -> bool:
        """Wait a while for its end; True where it came."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience_s)
        return not self.alive

    def end(self, patience_s: float = 0.0) -> int:
        """Close its input and let it end by itself for so long, then end all that it started.

        Returns its exit status, below zero for the signal that ended it.
        """
        self._over = True
        self._orders.put(None)
        if patience_s:
            self.ended(patience_s)
        # The whole group: a child that a library forked would hold our pipe open for ever.
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.ended(KILLED_S)
        code = self._process.returncode
        return -signal.SIGKILL if code is None else code

    def _write(self) -> None:
        """Send what is to be said, until it ends; a child that does not listen holds up nobody."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self._orders.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def _read(self) -> None:
        """Pass its lines on, until there are no more; of one that is being ended none."""
        assert self._process.stdout is not None
        with self._process.stdout, contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                message = None
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                if isinstance(message, dict) and not self._over:
                    self._hear(self, message)
        if not self._over:
            self._hear(self, None)


def _no_room(reason: str | None) -> Exception:
    want = "limits that allow one more (ulimit -n, ulimit -u)"
    return refuse("a process of ours", f"none from the system ({reason})", want, "fewer --workers")
