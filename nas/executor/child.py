"""A process of ours that is spoken to in JSON lines, and ends with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import nas

Message = dict[str, Any]

SILENT_S = 1.0
"""How long a process that ended may have nothing to say before all it said has been heard."""


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
    one. `environment` is added to ours. Raises OSError where it cannot be started.
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
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed,
                text=True, encoding="utf-8", start_new_session=True,
                env={**os.environ, "PYTHONPATH": package_path(), **(environment or {})},
            )  # fmt: skip
        finally:
            if not isinstance(printed, int):
                printed.close()
        self._hear = hear
        self._over = False
        self._silent_since: float | None = None
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a line; a child that is gone is found out by what is heard of it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

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
        """Let it end by itself for so long, then end it with all that it started.

        Returns its exit status, below zero for the signal that ended it.
        """
        self._over = True
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if patience_s:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.close()
            self.ended(patience_s)
        # The whole group: a child that a library forked would hold our pipe open for ever.
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                stream.close()
        return code

    def _read(self) -> None:
        """Pass its lines on, until there are no more or it is ended."""
        assert self._process.stdout is not None
        # The stream may be closed under us: the same end.
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                message = None
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                if self._over:
                    return
                if isinstance(message, dict):
                    self._hear(self, message)
        if not self._over:
            self._hear(self, None)
