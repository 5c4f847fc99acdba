"""What runs on a cluster's nodes: tasks that do jobs, an actor that times, one that hears of both.

`nas.executor.bridge` starts them; Ray finds them here, in the driver's own version of the code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from nas.executor.node import Piece, do_here, node_place
from nas.jobs import Job, Result

BOARD_S = 1.0
"""How often a task tells of its progress, and the bridge asks for it."""


class Board:
    """An actor that tasks tell of their progress, and the bridge asks."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, int], float] = {}
        self._begun: list[tuple[str, int]] = []

    def begin(self, key: str, attempt: int) -> None:
        """Take note that an attempt runs now."""
        self._begun.append((key, attempt))

    def add(self, key: str, attempt: int, units: float) -> None:
        """Add finished units."""
        self._units[key, attempt] = self._units.get((key, attempt), 0.0) + units

    def take(self) -> tuple[list[tuple[str, int]], list[tuple[str, int, float]]]:
        """Return what was said since the last time."""
        begun, units = self._begun, [(*of, n) for of, n in self._units.items()]
        self._begun, self._units = [], {}
        return begun, units


def work(
    told: Mapping[str, Any],
    boxes: Sequence[tuple[str, str, str, str | None, bool, list[Any]]],
    board: Any,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Do a job: the body of every Ray task. A box holds a reference, fetched where missing."""
    import ray

    if options["memory_bytes"]:
        _at_most(options["memory_bytes"])
    key, attempt = told["key"], told["attempt"]
    board.begin.remote(key, attempt)
    get: Any = ray.get
    pieces = [
        Piece(dotted, path, name, single, spent, partial(get, box[0]))
        for dotted, path, name, single, spent, box in boxes
    ]
    node = ray.get_runtime_context().get_node_id()
    held, last = 0.0, time.monotonic()

    def said(units: float) -> None:
        nonlocal held, last
        held += units
        if time.monotonic() - last >= BOARD_S:
            board.add.remote(key, attempt, held)
            held, last = 0.0, time.monotonic()

    return do_here(
        told, pieces, node_place(node, options["session"]), threads=options["threads"],
        token=options["token"], said=said,
    )  # fmt: skip


def _at_most(size: int) -> None:
    """Limit the memory of this process, so that too much is the job's failure and nobody else's."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))


class Bench:
    """An actor that has a whole node to itself and times there, in a process of its own."""

    def __init__(self, hello: Mapping[str, Any], board: Any) -> None:
        from nas.executor.local import LocalExecutor

        self._executor = LocalExecutor(
            threads=hello["threads"], retries=hello["retries"], memory_bytes=hello["memory_bytes"]
        )
        self._board = board
        self._staged: list[str] = []

    def do(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Do a measuring job; what it stages for a later one stays on this node."""
        import shutil
        import socket

        spec = told["spec"]
        self._board.begin.remote(told["key"], told["attempt"])
        if told["kind"] == "stage":
            self._room(spec["out"])
        result = self._lacking(told["key"], spec)
        if result is None:
            result = self._executor.run(Job(told["kind"], told["key"], spec, told["units"]))
        if told["kind"] == "peak-memory":
            while self._staged:
                shutil.rmtree(self._staged.pop(), ignore_errors=True)
        answer = {"result": dataclasses.asdict(result), "files": {}, "log": b""}
        return {**answer, "where": socket.gethostname()}

    def _room(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self._staged.append(folder)

    def _lacking(self, key: str, spec: Mapping[str, Any]) -> Result | None:
        """Stage anew what was lost with an earlier actor; how that failed, where it does."""
        staged = spec.get("staged")
        if staged is None or os.path.exists(staged):
            return None
        folder = os.path.dirname(staged)
        self._room(folder)
        made = self._executor.run(Job("stage", key, {**spec, "out": folder}))
        self._executor.rest()  # what is weighed has a fresh process
        return None if made.ok else made

    def rest(self) -> None:
        """Let the next job have a fresh process."""
        self._executor.rest()


def forget_session(session: str) -> None:
    """Remove from a node what a session sent to it."""
    import shutil

    import ray

    node = ray.get_runtime_context().get_node_id()
    shutil.rmtree(node_place(node, session), ignore_errors=True)
    with contextlib.suppress(OSError):
        node_place(node, session).parent.rmdir()
