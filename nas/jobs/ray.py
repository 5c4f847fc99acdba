"""Jobs as Ray tasks: on a running cluster, or on one of this machine that lives as long as we do.

The driver talks to `nas.jobs.bridge`, a process of its own, and imports no Ray. What a job
leaves comes back and is put in place on the driver's machine; a job that leaves nothing there, or
whose files only this machine has, runs in a worker process here, as without Ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from nas.jobs.child import Child, Message
from nas.jobs.job import Job, Result, encode_job, file_fields
from nas.jobs.local import LocalPlaces
from nas.jobs.node import session_place
from nas.jobs.pool import Begun, Ended, Event, Lost, Pool, Ticked
from nas.jobs.ship import content_name
from space.errors import refuse

if TYPE_CHECKING:
    from nas.jobs.means import Means

RECONNECTS, CONNECT_S, CALM_S = 3, 60.0, 600.0
"""How often a broken connection is made again, how long that may take, and after how long without
a break it is forgotten."""

SILENCE_S, NO_ROOM_S, RENOUNCE_S = 180.0, 60.0, 5.0
"""How long the bridge may say nothing, the cluster have no node that could hold a job, and the
bridge take to answer that an attempt is not wanted any more."""


class RayExecutor(Pool):
    """Runs jobs on a Ray cluster; see `nas.jobs.pool.Pool`.

    A cluster of this machine alone has room for `workers` jobs. Raises InputError where Ray is not
    installed; a cluster that does not answer is refused when the first job needs it.
    """

    def __init__(
        self,
        *,
        means: Means,
        threads: int,
        device: str = "cpu",
        workers: int = 1,
        log: Path | None = None,
        logs: Path | None = None,
        record: Path | None = None,
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise refuse(
                "--executor",
                "ray, which is not installed",
                "an installed executor",
                "pip install -e '.[ray]'",
            )
        here = LocalPlaces(
            threads=threads,
            workers=1,
            gpus=(),
            limit_s=means.limit_s,
            log=log,
            logs=logs,
            command=None,
            memory_bytes=means.memory_bytes,
        )
        places = RayPlaces(
            means, threads=threads, device=device, workers=workers, log=log, logs=logs, here=here
        )
        super().__init__(places, retries=means.retries, copies=True, queues=True, record=record)


def _left_by(job: Job) -> str | None:
    """Return the dotted name of the folder that a job leaves."""
    return next((k for k, use in file_fields(job.argument).items() if "leaves" in use), None)


class RayPlaces:
    """The places of a cluster, and one here."""

    def __init__(
        self,
        means: Means,
        *,
        threads: int,
        device: str,
        workers: int = 1,
        log: Path | None,
        logs: Path | None,
        here: LocalPlaces,
    ) -> None:
        self._means = means
        self._threads = threads
        self._workers = workers
        self._gpu_share = means.gpu_share if device.startswith("cuda") else 0.0
        self._log = log
        self._logs = logs
        self._here = here
        self._waiting: list[tuple[Job, int]] = []
        self._begun: list[tuple[str, int]] = []
        self._bridge: _Bridge | None = None
        self._far: dict[tuple[str, int], tuple[Job, float]] = {}
        self._slots = 1
        self._breaks = 0
        self._broke_at = self._last_word = time.monotonic()
        self._since_none: float | None = None
        self._session = uuid.uuid4().hex[:12]
        # A node that sees this very file sees all of ours.
        self._token = None if logs is None else logs.parent / "run.json"

    def room(self) -> int:
        """Return how many jobs the cluster takes at a time, as far as is known."""
        return self._slots

    def idle(self) -> int:
        """Return how many more jobs the cluster takes; a few wait there already."""
        ahead = max(1, self._slots // 4) if self._means.ray_address is not None else 0
        # Where there is no room at all, one waits: then it is said that there is none.
        return max(0, max(1, self._slots) + ahead - len(self._far) - len(self._waiting))

    def start(self, job: Job, attempt: int) -> None:
        """Start an attempt, there or here."""
        timed_there = job.timed and self._means.measure_on is not None
        if not timed_there and (job.timed or job.stays or _left_by(job) is None):
            self._waiting.append((job, attempt))
            self._start_here()
            return
        self._far[job.key, attempt] = (job, math.inf)
        self._order({"bench" if timed_there else "start": self._told(job, attempt)})

    def _told(self, job: Job, attempt: int) -> dict[str, Any]:
        log = None if self._logs is None else str(self._logs / f"{job.key}.log")
        files = file_fields(job.argument)
        return {
            **encode_job(job),
            "attempt": attempt,
            "log": log,
            "reads": [] if job.timed else [k for k, use in files.items() if "reads" in use],
            "leaves": None if job.timed else _left_by(job),
            "flat": [k for k, use in files.items() if "top_only" in use],
        }

    def _start_here(self) -> None:
        while self._waiting and self._here.idle():
            job, attempt = self._waiting.pop(0)
            self._here.start(job, attempt)
            self._begun.append((job.key, attempt))

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt."""
        self._waiting = [w for w in self._waiting if (w[0].key, w[1]) != (key, attempt)]
        self._begun = [of for of in self._begun if of != (key, attempt)]
        if self._far.pop((key, attempt), None) is None:
            self._here.cancel(key, attempt)
        elif self._bridge is not None:
            self._bridge.cancel(key, attempt)

    def poll(self, timeout_s: float) -> list[Event]:
        """Return what happened, there and here."""
        events: list[Event] = [Begun(*of) for of in self._begun]
        self._begun.clear()
        events += self._here.poll(0.0 if self._far or events else timeout_s)
        self._start_here()
        if self._far:
            events += self._heard(timeout_s)
            events += self._late()
        return events

    def _heard(self, timeout_s: float) -> list[Event]:
        assert self._bridge is not None
        events: list[Event] = []
        messages = self._bridge.take(timeout_s)
        now = time.monotonic()
        if messages:
            self._last_word = now
        elif now - self._last_word > SILENCE_S:
            return self._broken()
        for message in messages:
            if message is None:
                return [*events, *self._broken()]
            if "slots" in message:
                self._slots = int(message["slots"])
                self._since_none = None if self._slots else (self._since_none or now)
                continue
            if "key" not in message:
                continue
            events += self._events(message)
        if self._since_none is not None and now - self._since_none > NO_ROOM_S:
            declared = f"{self._threads} threads a job"
            if self._means.memory_bytes:
                declared += f", {self._means.job_memory_gb:g} GB"
            if self._gpu_share:
                declared += f", {self._gpu_share:g} of a GPU"
            got = f"ray, where no node has room for {declared}"
            want = "less for a job, or larger nodes"
            raise refuse("--executor", got, want, "--threads, --job-memory-gb")
        return events

    def _events(self, message: Mapping[str, Any]) -> list[Event]:
        key, attempt = message["key"], message["attempt"]
        if (key, attempt) not in self._far:
            return []
        if "tick" in message or "begun" in message:
            events: list[Event] = []
            job, since = self._far[key, attempt]
            if since == math.inf:  # that it began may have been lost with who was told
                self._far[key, attempt] = (job, time.monotonic())
                events.append(Begun(key, attempt))
            if "tick" in message:
                events.append(Ticked(key, attempt, float(message["tick"])))
            return events
        if "broken" in message:
            want = "a place to write, and nodes that are there"
            raise refuse("--executor", f"ray ({message['broken']})", want, "then --resume")
        del self._far[key, attempt]
        if "lost" in message:
            return [Lost(key, attempt, message["lost"], "cluster", message["seconds"])]
        return [Ended(key, attempt, Result(**message["result"]), message["where"])]

    def _late(self) -> list[Event]:
        """Give up attempts that take longer than they may."""
        limit = self._means.limit_s
        events: list[Event] = []
        for (key, attempt), (_, since) in list(self._far.items()):
            seconds = time.monotonic() - since
            if limit is not None and seconds > limit:
                self.cancel(key, attempt)
                reason = f"no end after {limit:g} s (--job-minutes)"
                events.append(Lost(key, attempt, reason, "cluster", seconds, late=True))
        return events

    def _broken(self) -> list[Event]:
        """Everything out there is lost with the connection; the next start makes a new one."""
        said = self._end_bridge()
        if time.monotonic() - self._broke_at > CALM_S:
            self._breaks = 0
        self._breaks += 1
        self._broke_at = time.monotonic()
        if self._breaks > RECONNECTS:
            raise self._away(said)
        far, self._far = self._far, {}
        now = time.monotonic()
        reason = "the connection to the cluster broke"
        return [
            Lost(*which, reason, "cluster", max(0.0, now - since), counts=False)
            for which, (_, since) in far.items()
        ]

    def _order(self, message: Mapping[str, Any]) -> None:
        if self._bridge is None:
            self._bridge = self._connect()
        self._bridge.send(message)

    def _connect(self) -> _Bridge:
        """Start a bridge and wait until it stands. Raises InputError."""
        until = time.monotonic() + CONNECT_S
        said = "no answer"
        first = self._breaks == 0
        while True:
            bridge = _Bridge(self._hello(), self._log)
            try:
                answer = bridge.first(until - time.monotonic())
            except BaseException:  # an interrupt: nobody else knows of it
                bridge.end(patience_s=0.0)
                raise
            if answer is not None and "ready" in answer:
                self._last_word = time.monotonic()
                return bridge
            bridge.end(patience_s=0.0)
            said = said if answer is None else str(answer.get("refused", said))
            if first or time.monotonic() >= until:
                raise self._away(said)
            time.sleep(2.0)  # a cluster that was lost may be on its way back

    def _away(self, said: str) -> Exception:
        named = self._means.ray_address or "a cluster of this machine"
        want = "a cluster that answers"
        return refuse("--ray-address", f"{named} ({said})", want, "start it, then --resume")

    def _hello(self) -> dict[str, Any]:
        token = None
        if self._token is not None and self._token.is_file() and not self._means.ship:
            token = [str(self._token), content_name(self._token)]
        return {
            "address": self._means.ray_address,
            "cpus": self._workers * self._threads,
            "threads": self._threads,
            "gpu_share": self._gpu_share,
            "memory_bytes": self._means.memory_bytes,
            "measure_on": self._means.measure_on,
            "session": self._session,
            "retries": self._means.retries,
            "token": token,
        }

    def _end_bridge(self) -> str:
        bridge, self._bridge = self._bridge, None
        self._since_none, self._slots = None, 1
        return "" if bridge is None else bridge.end()

    def rest(self) -> None:
        """Let the worker here end, and the one that times; the cluster's others stay."""
        self._here.rest()
        if self._bridge is not None and self._means.measure_on is not None:
            self._bridge.send({"rest": True})

    def close(self) -> None:
        """Leave the cluster and end the worker here."""
        self._far.clear()
        self._waiting.clear()
        self._begun.clear()
        self._here.close()
        self._end_bridge()
        # Where this machine is a node whose cluster went away, nobody else can.
        shutil.rmtree(session_place(self._session), ignore_errors=True)


class _Bridge:
    """The process that talks to Ray."""

    def __init__(self, hello: Mapping[str, Any], log: Path | None) -> None:
        self._said: Queue[Message | None] = Queue()
        self._news = threading.Condition()
        self._renounced: set[tuple[str, int]] = set()
        self._mute = False
        command = [sys.executable, "-m", "nas.jobs.bridge"]
        self._child = Child(command, self._hear, log=log)
        self._child.say(hello)

    def _hear(self, _: Child, message: Message | None) -> None:
        """Take in what it says, in a thread of the child's."""
        if message is None or "renounced" not in message:
            self._said.put(message)
        with self._news:
            self._mute = self._mute or message is None
            if message is not None and "renounced" in message:
                key, attempt = message["renounced"]
                self._renounced.add((key, attempt))
            self._news.notify_all()

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt; when this returns nothing that it left is put in place any more."""
        self._child.say({"cancel": [key, attempt]})
        which = (key, attempt)
        with self._news:
            answered = self._news.wait_for(
                lambda: self._mute or which in self._renounced, RENOUNCE_S
            )
            self._mute = self._mute or not answered
            self._renounced.discard(which)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a line; a bridge that is gone is found out by `take`."""
        self._child.say(message)

    def first(self, timeout_s: float) -> Message | None:
        """Return the first thing that it says, None if it ends or is silent."""
        try:
            return self._said.get(timeout=max(1.0, timeout_s))
        except Empty:
            return None

    def take(self, timeout_s: float) -> list[Message | None]:
        """Return what it said; None among it: it ended."""
        found: list[Message | None] = []
        with contextlib.suppress(Empty):
            found.append(self._said.get(timeout=timeout_s))
            while True:
                found.append(self._said.get_nowait())
        return found

    def end(self, patience_s: float = 15.0) -> str:
        """Let it leave the cluster, or make it after a while; returns how it ended."""
        return f"its process ended with status {self._child.end(patience_s)}"
