"""The process that talks to Ray for a driver: jobs as JSON lines in, answers as JSON lines out.

It is a process of its own so that nothing that happens to a cluster can happen to the driver, and
it ends when the driver does. Run by `nas.jobs.ray`, as `python -m nas.jobs.bridge`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nas.core.io import disk_refusal
from nas.jobs.local import worker_environment
from nas.jobs.node import bring_home
from nas.jobs.parcels import Parcels, on_node
from nas.jobs.remote import BOARD_S, Bench, Board, forget_session, work
from nas.jobs.ship import at

WAIT_S, NODES_S, BUSY_S = 0.1, 2.0, 10.0
DEVICE_S = 60.0
"""How long a node with the device that is measured may be away."""

OBJECT_STORE_BYTES = 2 << 30
"""Of a cluster of this machine alone: what is on its way between its processes."""


@dataclass(frozen=True)
class _Running:
    told: Mapping[str, Any]
    since: float


class Bridge:
    """A connection to a cluster and the tasks that run there for one driver."""

    def __init__(self, hello: Mapping[str, Any], out: TextIO) -> None:
        import ray

        self._ray = ray
        self._hello = hello
        self._out = out
        self._tasks: dict[Any, _Running] = {}
        self._slots = -1
        self._bench: Any = None
        self._parcels = Parcels(ray, hello["token"])
        self._asked: Any = None
        self._saying, self._homing = threading.Lock(), threading.Lock()
        self._renounced: set[tuple[str, int]] = set()
        self.over = threading.Event()
        root = Path(__file__).resolve().parent.parent.parent
        own = hello["address"] is None
        more: dict[str, Any] = {"address": hello["address"]}
        if own:
            more = {
                "address": "local",  # not one that happens to run here
                "num_cpus": hello["cpus"],
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=f"contraction-{hello['session']}",
            runtime_env={
                # The driver's own version of the code, on every node.
                "py_modules": [str(root / "nas"), str(root / "space")],
                "env_vars": worker_environment(hello["threads"]),
            },
            **more,
        )
        here = ray.get_runtime_context().get_node_id()
        actor: Any = ray.remote(Board)
        self._board = actor.options(
            num_cpus=0, max_restarts=-1, scheduling_strategy=on_node(ray, here, soft=True)
        ).remote()
        task: Any = ray.remote(work)
        self._task = task.options(max_retries=0, **self._resources())

    def bench(self, told: Mapping[str, Any]) -> None:
        """Start a measuring job where there is what is measured; it waits until nobody works there.

        Raises LookupError where no node has the resource, after a while: it may be on its way back.
        """
        if self._bench is None:
            name = self._hello["measure_on"]
            until = time.monotonic() + DEVICE_S
            while not (alive := [n for n in self._alive() if n["Resources"].get(name, 0) >= 1]):
                if time.monotonic() > until:
                    raise LookupError(f"no node with the resource {name}")
                self.say(alive=True)
                if self.over.wait(1.0):
                    raise LookupError("the driver left")
            node = min(alive, key=lambda n: str(n["NodeID"]))
            actor: Any = self._ray.remote(Bench)
            self._bench = actor.options(
                num_cpus=node["Resources"].get("CPU", 0),
                resources={name: 1},
                max_restarts=0,
                scheduling_strategy=on_node(self._ray, node["NodeID"], soft=False),
            ).remote(self._hello, self._board, node["NodeID"])
        self._tasks[self._bench.do.remote(told)] = _Running(told, time.monotonic())

    def rest(self) -> None:
        """Let the next measuring job have a fresh process."""
        if self._bench is not None:
            self._bench.rest.remote()

    def _leave_bench(self) -> None:
        """Give the measured node back to everybody."""
        if self._bench is not None:
            self._ray.kill(self._bench)
            self._bench = None

    def _alive(self) -> list[dict[str, Any]]:
        nodes: Any = self._ray.nodes  # not typed
        return [node for node in nodes() if node["Alive"]]

    @property
    def busy(self) -> bool:
        """Whether tasks run."""
        return bool(self._tasks)

    def _resources(self) -> dict[str, Any]:
        """Return what a task declares."""
        hello = self._hello
        found: dict[str, Any] = {"num_cpus": hello["threads"]}
        if hello["gpu_share"]:
            found["num_gpus"] = hello["gpu_share"]
        if hello["memory_bytes"]:
            found["memory"] = hello["memory_bytes"]
        return found

    def say(self, **message: Any) -> None:
        """Write one message as one line."""
        with self._saying:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()

    def renounce(self, key: str, attempt: int) -> None:
        """Put nothing in place any more that an attempt leaves. From any thread."""
        with self._homing:
            self._renounced.add((key, attempt))
        self.say(renounced=[key, attempt])

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """Tell the driver that we are alive while something takes long."""
        done = threading.Event()

        def tell() -> None:
            while not done.wait(BUSY_S):
                self.say(alive=True)

        threading.Thread(target=tell, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def start(self, told: Mapping[str, Any]) -> None:
        """Start an attempt as a task."""
        self._leave_bench()
        with self._heard():
            boxes = self._parcels.boxes(told, [node["NodeID"] for node in self._alive()])
        options = {k: self._hello[k] for k in ("session", "threads", "token", "memory_bytes")}
        ref = self._task.remote({**told, "pieces": len(told["reads"])}, boxes, self._board, options)
        self._tasks[ref] = _Running(told, time.monotonic())

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt, whatever it does."""
        with self._homing:
            self._renounced.discard((key, attempt))
        for ref, running in list(self._tasks.items()):
            if (running.told["key"], running.told["attempt"]) == (key, attempt):
                del self._tasks[ref]
                if running.told["leaves"] is None:  # an actor's work ends with the actor
                    self._leave_bench()
                    continue
                self._parcels.let_go(running.told)
                with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                    self._ray.cancel(ref, force=True)

    def harvest(self) -> None:
        """Bring home what is done, and tell what was lost."""
        if not self._tasks:
            return
        ready, others = self._ray.wait(list(self._tasks), num_returns=1, timeout=WAIT_S)
        if ready and others:  # whatever else is done by now
            ready += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        for ref in ready:
            running = self._tasks.pop(ref)
            told = running.told
            which = {"key": told["key"], "attempt": told["attempt"]}
            try:
                answer = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                full = disk_refusal(getattr(error, "cause", None) or error)
                if full is not None:  # a node's disk, which is no candidate's fault either
                    self.say(**which, broken=f"a node of the cluster: {full}")
                    continue
                seconds = time.monotonic() - running.since
                self.say(**which, lost=_in_one_line(error), seconds=seconds)
                if told["leaves"] is None:
                    self._bench = None  # it died with its node, or will be made anew
                continue
            if told["leaves"] is None:
                self.say(**which, result=answer["result"], where=answer["where"])
                continue
            out = Path(at(told["argument"], told["leaves"]))
            log = None if told["log"] is None else Path(told["log"])
            try:
                with self._homing:
                    if (told["key"], told["attempt"]) in self._renounced:
                        continue
                    result = bring_home(out, answer, log)
            except OSError as error:  # the driver's disk is full, say: not the node's fault
                self.say(**which, broken=f"{out}: {error.strerror or error}")
                continue
            self._drop(told["key"])  # no other attempt may write there any more
            self._parcels.let_go(told)
            self.say(**which, result=result, where=answer["where"])

    def _drop(self, key: str) -> None:
        """End all attempts of a job."""
        for running in list(self._tasks.values()):
            if running.told["key"] == key:
                self.cancel(key, running.told["attempt"])

    def ask_board(self) -> None:
        """Tell the driver of progress, and of attempts that began."""
        if not self._tasks:
            return
        # What was asked is read in any case: the board forgets what it answered.
        if self._asked is None:
            self._asked = self._board.take.remote()
        if not self._ray.wait([self._asked], timeout=BOARD_S)[0]:
            return
        asked, self._asked = self._asked, None
        try:
            begun, units = self._ray.get(asked)
        except self._ray.exceptions.RayError:
            return
        for key, attempt in begun:
            self.say(key=key, attempt=attempt, begun=True)
        for key, attempt, done in units:
            self.say(key=key, attempt=attempt, tick=done)

    def count_slots(self) -> None:
        """Tell the driver how many jobs the cluster takes at a time."""
        asked = self._resources()
        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        slots = 0
        for node in self._alive():
            has = node["Resources"]
            slots += int(min(has.get(names[k], 0) / v for k, v in asked.items() if v))
        if slots != self._slots:
            self._slots = slots
            self.say(slots=slots)

    def end(self) -> None:
        """Remove what was sent to the nodes, as far as they answer, and leave the cluster."""
        ray = self._ray
        ending = list(self._tasks)
        for running in list(self._tasks.values()):
            self.cancel(running.told["key"], running.told["attempt"])
        with contextlib.suppress(Exception):
            if ending:  # who still writes would leave something behind
                ray.wait(ending, num_returns=len(ending), timeout=5.0)
            sweep: Any = ray.remote(forget_session)
            refs = [
                sweep.options(
                    num_cpus=0, scheduling_strategy=on_node(self._ray, node["NodeID"], soft=False)
                ).remote(self._hello["session"])
                for node in self._alive()
            ]
            ray.wait(refs, num_returns=len(refs), timeout=5.0)
        with contextlib.suppress(Exception):
            ray.shutdown()


def _in_one_line(error: BaseException) -> str:
    """Say what Ray says, shortly."""
    cause = getattr(error, "cause", None)
    known = cause if isinstance(cause, BaseException) else error
    text = " ".join(str(known).split())
    return f"{type(known).__name__}: {text[:160]}"


def _listen(bridge: Bridge, orders: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        with contextlib.suppress(ValueError):
            order = json.loads(line)
            if "cancel" in order:  # at once, whatever else is done now
                bridge.renounce(*order["cancel"])
            orders.put(order)
    bridge.over.set()
    orders.put(None)


def main() -> int:
    """Serve a driver until its end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    hello = json.loads(sys.stdin.readline())
    if hello["address"] is None:  # nobody else is to reach a cluster of our own
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        bridge = Bridge(hello, out)
    except Exception as error:  # whatever keeps us from a cluster is one line
        print(json.dumps({"refused": _in_one_line(error)}), file=out, flush=True)
        return 1
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(bridge, orders), daemon=True).start()
    bridge.say(ready=os.getpid())
    board_at = nodes_at = 0.0
    while True:
        try:
            while True:
                order = orders.get(timeout=0.0 if bridge.busy else WAIT_S)
                if order is None:
                    bridge.end()
                    return 0
                _obey(bridge, order)
        except queue.Empty:
            pass
        bridge.harvest()
        now = time.monotonic()
        if now - board_at >= BOARD_S:
            board_at = now
            bridge.say(alive=True)
            bridge.ask_board()
        if now - nodes_at >= NODES_S:
            nodes_at = now
            bridge.count_slots()


def _obey(bridge: Bridge, order: Mapping[str, Any]) -> None:
    if "cancel" in order:
        bridge.cancel(*order["cancel"])
        return
    if "rest" in order:
        bridge.rest()
        return
    told = order.get("start") or order["bench"]
    try:
        if "bench" in order:
            bridge.bench(told)
        else:
            bridge.start(told)
    except LookupError as error:  # nobody can measure
        bridge.say(key=told["key"], attempt=told["attempt"], broken=f"--measure-on: {error}")
    except Exception as error:  # what it reads is gone, or does not fit
        reason = f"{type(error).__name__}: {error}"
        bridge.say(key=told["key"], attempt=told["attempt"], lost=reason, seconds=0.0)


if __name__ == "__main__":
    sys.exit(main())
