"""What runs on a cluster's nodes: tasks that do jobs, an actor that times, one that hears of both.

`nas.jobs.bridge` starts them; Ray finds them here, in the driver's own version of the code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from nas.jobs.job import Result, decode_job
from nas.jobs.node import Piece, do_here, node_place

EXPORTS, WEIGHS = "nas.measure.jobs:export_model", "nas.measure.jobs:peak_memory"

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
        told,
        pieces,
        node_place(node, options["session"]),
        threads=options["threads"],
        token=options["token"],
        said=said,
        began=lambda: board.begin.remote(key, attempt),
    )


def _at_most(size: int) -> None:
    """Limit the memory of this process, so that too much is the job's failure and nobody else's."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))


class Bench:
    """An actor that has a whole node to itself and times there, in a process of its own."""

    def __init__(self, hello: Mapping[str, Any], board: Any, node: str) -> None:
        from nas.jobs.local import LocalExecutor

        self._executor = LocalExecutor(
            threads=hello["threads"], retries=hello["retries"], memory_bytes=hello["memory_bytes"]
        )
        self._board = board
        # Swept with what else was sent here, should this actor be lost.
        self._place = node_place(node, hello["session"]) / "staged"

    def do(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Do a measuring job; what it stages for a later one stays on this node until then."""
        import shutil
        import socket

        self._board.begin.remote(told["key"], told["attempt"])
        result = self._do(told)
        if told["function"] == WEIGHS or not result.ok:
            shutil.rmtree(self._place, ignore_errors=True)
        answer = {"result": dataclasses.asdict(result), "files": {}, "log": b""}
        return {**answer, "where": socket.gethostname()}

    def _do(self, told: Mapping[str, Any]) -> Result:
        argument = dict(told["argument"])
        if told["function"] == EXPORTS:
            argument["out"] = self._room()
        staged = argument.get("staged")
        if staged is not None and not os.path.exists(staged):  # lost with an earlier actor
            again = {k: v for k, v in argument.items() if k != "staged"}
            again["out"] = self._room()
            made = self._run({**told, "function": EXPORTS, "argument": again})
            if not made.ok:
                return made
            self._executor.rest()  # what is weighed has a fresh process
            argument["staged"] = made.values["file"]
        return self._run({**told, "argument": argument})

    def _run(self, told: Mapping[str, Any]) -> Result:
        return self._executor.run(decode_job(told))

    def _room(self) -> str:
        self._place.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="stage-", dir=self._place)

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
