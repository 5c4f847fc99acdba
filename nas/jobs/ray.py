"""Run jobs as tasks of a Ray cluster: a running one, or one of this machine for this run alone.

Ray places tasks and retries those whose node or worker died. It ends a process whose cluster is
lost, so a process of its own (`python -m nas.jobs.ray`) talks to it, by JSON lines.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import nas
from nas.core.dataclass_json import from_json, to_json
from nas.core.executor_config import ExecutorConfig
from nas.core.io import disk_refusal
from nas.jobs import transfer_files as files
from nas.jobs.job import Job, Result, decode_job, encode_job, reason_of, run_job, with_files
from nas.jobs.local import Child, LocalBackend, LocalExecutor, WorkerOptions, worker_environment
from nas.jobs.queue import Ended, Event, Lost, Progress
from nas.jobs.worker import Message, Say, collected, limit_memory, open_pipes, printing_to
from space.errors import refuse

CONNECT_S, POLL_S, REPORT_S = 60.0, 0.2, 1.0
"""How long a cluster may take to answer; how often tasks are looked at, and their progress."""

OBJECT_STORE_BYTES, LOG_BYTES = 2 << 30, 1 << 20
"""Memory for files on their way in a cluster of this machine, and how much of a log comes back."""

EVENTS: Mapping[str, Any] = {each.__name__: each for each in (Progress, Ended, Lost)}


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """The settings of the process that talks to a cluster, and of the nodes.

    `token` is a file of the driver's and its text: a node that sees it sees all of the driver's.
    """

    config: ExecutorConfig
    options: WorkerOptions
    cpus: int
    gpus: float
    session: str
    token: tuple[Path, str] | None = None


class RayBackend(LocalBackend):
    """The tasks of a cluster, and one worker process here.

    A job that leaves no folder, or whose files only this machine has, runs here. Raises InputError
    where Ray is not installed, and where a cluster does not answer or is lost.
    """

    def __init__(
        self, config: ExecutorConfig, options: WorkerOptions, *, device: str, workers: int
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            got, want = "ray, which is not installed", "an installed executor"
            raise refuse("--executor", got, want, "pip install -e '.[ray]'")
        super().__init__(options)
        self._settings = RaySettings(
            config=config,
            options=options,
            cpus=workers * options.threads,
            gpus=config.gpu_share if device.startswith("cuda") else 0.0,
            session=uuid.uuid4().hex[:12],
        )
        self._child: Child | None = None
        self._told: Queue[Message | None] = Queue()
        self._far: set[tuple[str, int]] = set()

    def _goes_far(self, job: Job) -> bool:
        if job.timed:
            return self._settings.config.benchmark_resource is not None
        return not job.stays and job.folder is not None

    def has_slot(self, job: Job) -> bool:
        """Tell whether the cluster, or the worker here, takes a job now."""
        return self._goes_far(job) or super().has_slot(job)

    def start(self, job: Job, attempt: int) -> None:
        """Start an attempt, there or here."""
        if not self._goes_far(job):
            super().start(job, attempt)
            return
        self._child = self._child or self._connect()
        self._far.add((job.key, attempt))
        self._child.send({**encode_job(job), "attempt": attempt})

    def _connect(self) -> Child:
        settings, logs = self._settings, self._settings.options.logs
        if logs is not None and not settings.config.copy_files:
            file = logs.parent / "run.json"
            settings = replace(settings, token=(file, file.read_text()) if file.exists() else None)
        told: Queue[Message | None] = Queue()
        self._told = told
        command = [sys.executable, "-m", "nas.jobs.ray"]
        child = Child(command, lambda _, message: told.put(message), log=settings.options.log)
        child.send(to_json(settings))
        return child

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt."""
        super().cancel(key, attempt)
        if (key, attempt) in self._far and self._child is not None:
            self._child.send({"cancel": [key, attempt]})
        self._far.discard((key, attempt))

    def poll(self, timeout_s: float) -> list[Event]:
        """Return what happened, there and here."""
        events = super().poll(0.0 if self._far else timeout_s)
        with contextlib.suppress(Empty):
            while self._far:
                message = self._told.get(timeout=0.0 if events else timeout_s)
                if message is None or "refused" in message:
                    reason = "it was lost" if message is None else message["refused"]
                    named = self._settings.config.ray_address or "a cluster of this machine"
                    want = "a cluster that answers"
                    remedy = "start it, then --resume"
                    raise refuse("--ray-address", f"{named} ({reason})", want, remedy)
                if "broken" in message:
                    want = "nodes with room for a job, and a place to write"
                    raise refuse("--executor", f"ray ({message['broken']})", want, "then --resume")
                event: Event = from_json(EVENTS[message["event"]], message["value"])
                if (event.key, event.attempt) in self._far:
                    events.append(event)
                    if not isinstance(event, Progress):
                        self._far.discard((event.key, event.attempt))
        return events

    def close(self) -> None:
        """Leave the cluster and end the worker here."""
        self._far.clear()
        super().close()
        child, self._child = self._child, None
        if child is not None:
            child.end(patience_s=15.0)
        # Where this machine is a node whose cluster was lost, nobody else can.
        _remove_files(self._settings.session)


@dataclass
class _Attempt:
    order: Message
    job: Job
    began: float | None = None

    @property
    def which(self) -> tuple[str, int]:
        return self.job.key, self.order["attempt"]


class RayClient:
    """A connection to a cluster and the tasks that run there."""

    def __init__(self, settings: RaySettings, say: Say) -> None:
        import ray
        from ray.util.queue import Queue as RayQueue

        self._ray: Any = ray
        self._settings, self._say = settings, say
        self._tasks: dict[Any, _Attempt] = {}
        self._bundles: dict[Path, tuple[files.State, files.Bundle]] = {}
        self._copies = settings.config.copy_files
        root, address = Path(nas.__file__).resolve().parent.parent, settings.config.ray_address
        own = {"address": "local", "num_cpus": settings.cpus, "include_dashboard": False}
        own["object_store_memory"] = OBJECT_STORE_BYTES
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=f"contraction-{settings.session}",
            runtime_env={  # every node runs the driver's own version of the code
                "py_modules": [str(root / "nas"), str(root / "space")],
                "env_vars": worker_environment(settings.options.threads),
            },
            **(own if address is None else {"address": address}),  # never one that just runs here
        )
        here = self._on(ray.get_runtime_context().get_node_id())
        self._progress = RayQueue(actor_options={"num_cpus": 0, **here})

    def _remote(self, function: Any, num_cpus: float = 0, **options: Any) -> Any:
        return self._ray.remote(function).options(num_cpus=num_cpus, **options)

    def _on(self, node: str) -> dict[str, Any]:
        """Return the options that put a task on a node."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        return {"scheduling_strategy": strategy(node, soft=False)}

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def obey(self, order: Message) -> None:
        """Start or end an attempt."""
        if "cancel" in order:
            for ref, one in list(self._tasks.items()):
                if list(one.which) == order["cancel"]:
                    self._end(ref)
            return
        try:
            self._start(order)
        except LookupError as error:
            self._say({"broken": str(error)})
        except Exception as error:  # what it reads is gone, or does not fit
            self._report(Lost(order["key"], order["attempt"], reason_of(error), "cluster"))

    def _start(self, order: Message) -> None:
        """Start an attempt; raises LookupError where no node could hold it."""
        settings, job = self._settings, decode_job(order)
        device = {settings.config.benchmark_resource: 1} if job.timed else {}
        asked = {"CPU": settings.options.threads, "GPU": settings.gpus, **device}
        asked["memory"] = settings.options.memory_bytes or 0
        fitting = [
            has
            for has in (node["Resources"] for node in self._nodes())
            if all(has.get(name, 0) >= value for name, value in asked.items())
        ]
        if not fitting:
            what = ", ".join(f"{value:g} {name}" for name, value in asked.items() if value)
            raise LookupError(
                f"no node has {what}; see --threads, --job-memory-gb, --benchmark-resource"
            )
        task = self._remote(
            run_task,
            max_retries=settings.config.retries,
            # A device that is timed does nothing else.
            num_cpus=min(has["CPU"] for has in fitting) if job.timed else asked["CPU"],
            num_gpus=asked["GPU"],
            memory=asked["memory"] or None,
            resources=device,
        )
        # Files travel as soon as a node was found that does not see the driver's.
        bundles = self._pack(job) if self._copies else None
        ref = task.remote(order, bundles, self._progress, settings)
        self._tasks[ref] = _Attempt(order, job)

    def _pack(self, job: Job) -> dict[str, files.Bundle]:
        """Put what a job reads into the object store, unless it is there."""
        found = {}
        for dotted, (path, use) in job.files.items():
            if "reads" in use:
                top_only = "top_only" in use
                state = files.file_states(path, top_only=top_only)
                known = self._bundles.get(path)
                if known is None or known[0] != state:
                    data = self._ray.put(files.read_files(path, top_only=top_only))
                    file = path.name if path.is_file() else None
                    known = (state, files.Bundle(data.hex(), file, data))
                if "last" not in use:  # what somebody refers to stays in the object store
                    self._bundles[path] = known
                found[dotted] = known[1]
        return found

    def _end(self, ref: Any) -> None:
        del self._tasks[ref]
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.cancel(ref, force=True)

    def poll(self) -> None:
        """Report the attempts that ended, and end those that take too long."""
        if not self._tasks:
            time.sleep(POLL_S)
            return
        ready, others = self._ray.wait(list(self._tasks), num_returns=1, timeout=POLL_S)
        if ready and others:
            ready += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        for ref in ready:
            self._finish(ref, self._tasks.pop(ref))
        limit = self._settings.options.limit_s
        for ref, one in list(self._tasks.items()):
            if limit is not None and one.began and time.monotonic() - one.began > limit:
                self._end(ref)
                reason = f"no end after {limit:g} s (--job-minutes)"
                self._report(Lost(*one.which, reason, "cluster", limit, late=True))

    def _report(self, event: Event) -> None:
        self._say({"event": type(event).__name__, "value": to_json(event)})

    def _finish(self, ref: Any, one: _Attempt) -> None:
        """Put the files of an attempt in place, and report its result."""
        job, logs, errors = one.job, self._settings.options.logs, self._ray.exceptions
        try:
            answer = self._ray.get(ref)
        except errors.RayError as error:
            cause = getattr(error, "cause", None) or error
            full = disk_refusal(cause)
            if full is not None:  # no candidate's fault
                self._say({"broken": f"a node of the cluster: {full}"})
                return
            died = not isinstance(error, errors.RayTaskError)  # Ray itself has tried again then
            self._report(Lost(*one.which, reason_of(cause), "cluster", final=died))
            return
        if answer is None:  # the node does not see the driver's files
            self._copies = True
            self.obey(one.order)
            return
        try:
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                with (logs / f"{job.key}.log").open("ab") as log:
                    log.write(f"-- on {answer['where']}\n".encode() + answer["log"])
            if job.folder is not None and answer["result"].ok:
                files.place_files(job.files[job.folder][0], answer["files"])
        except OSError as error:  # the driver's disk is full, say: not the node's fault
            self._say({"broken": f"{error.filename}: {error.strerror or error}"})
            return
        self._report(Ended(*one.which, answer["result"], answer["where"]))

    def report_progress(self) -> None:
        """Report finished units, and start the clocks of attempts that began."""
        by_name = {one.which: one for one in self._tasks.values()}
        for which, units in self._progress.get_nowait_batch(self._progress.qsize()):
            if which in by_name:
                by_name[which].began = by_name[which].began or time.monotonic()
                self._report(Progress(which[0], which[1], units))

    def close(self) -> None:
        """Remove the files on the nodes, as far as they answer, and leave the cluster."""
        ending = list(self._tasks)
        for ref in ending:
            self._end(ref)
        with contextlib.suppress(Exception):
            if ending:  # a task that still writes would leave something behind
                self._ray.wait(ending, num_returns=len(ending), timeout=5.0)
            on = [self._remote(_remove_files, **self._on(n["NodeID"])) for n in self._nodes()]
            refs = [each.remote(self._settings.session) for each in on]
            self._ray.wait(refs, num_returns=len(refs), timeout=5.0)
            self._ray.shutdown()


def run_task(
    order: Message, bundles: Mapping[str, files.Bundle] | None, progress: Any, settings: RaySettings
) -> Message | None:
    """Run a job on a node; return its result, the files that it left, its log and the host.

    None: this node does not see the driver's files, and got no `bundles` of them. The job leaves
    its folder on the node and its files are handed back in any case, so that an attempt that dies
    leaves nothing half.
    """
    import ray

    job, started = decode_job(order), time.monotonic()
    used, left = job.files, job.folder
    path, text = settings.token or (Path(), "")
    seen = settings.config.ray_address is None or (path.is_file() and path.read_text() == text)
    if bundles is None and not seen:
        return None
    place = _sent(settings.session)
    place.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="job-", dir=place))
    get: Any = ray.get
    try:
        paths = {name: files.fetch(each, place, get) for name, each in (bundles or {}).items()}
        work = own / ("out" if left is None else used[left][0].name)
        work.mkdir()
        if left is not None and "reads" in used[left][1]:  # it adds to a folder that is there
            there = paths.get(left, used[left][0])
            files.place_files(work, files.read_files(there, top_only=True))
        if left is not None:
            paths[left] = work
        before = files.file_states(work)
        job = replace(job, argument=with_files(job.argument, paths))
        with printing_to(own / "log"):
            result = _run(job, order["attempt"], progress, settings)
        return {
            "result": replace(result, seconds=time.monotonic() - started),
            "files": files.read_files(work, before=before) if result.ok else {},
            "log": (own / "log").read_bytes()[-LOG_BYTES:],
            "where": socket.gethostname(),
        }
    finally:
        shutil.rmtree(own, ignore_errors=True)
        for dotted, bundle in (bundles or {}).items():
            if "last" in used[dotted][1]:
                shutil.rmtree(place / bundle.name, ignore_errors=True)


def _run(job: Job, attempt: int, progress: Any, settings: RaySettings) -> Result:
    which = (job.key, attempt)
    progress.put((which, 0.0))  # it begins
    threads, memory_bytes = settings.options.threads, settings.options.memory_bytes
    if job.timed:
        timer = _timer(threads, memory_bytes, settings.config.retries)
        if job.fresh:
            timer.release()
        return timer.run(job)
    import torch

    limit_memory(memory_bytes)
    torch.set_num_threads(threads)
    tick, _ = collected(lambda units: progress.put((which, units)), REPORT_S)
    return run_job(job, tick)


@functools.cache
def _timer(threads: int, memory_bytes: int | None, retries: int) -> LocalExecutor:
    """Return the worker that times on this node; it keeps its reference from job to job."""
    return LocalExecutor(threads=threads, memory_bytes=memory_bytes, retries=retries)


def _sent(session: str) -> Path:
    """Return where a machine keeps the files that a driver sent to its nodes."""
    return Path(tempfile.gettempdir(), f"vision-contraction-{session}")


def _remove_files(session: str) -> None:
    shutil.rmtree(_sent(session), ignore_errors=True)


def main() -> int:
    """Serve a driver until standard input ends."""
    say, lines = open_pipes(patience_s=30.0)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    def give_up(reason: str) -> None:
        say({"refused": reason})
        os._exit(1)

    timer = threading.Timer(CONNECT_S, give_up, ["no answer"])
    timer.start()
    try:
        client = RayClient(from_json(RaySettings, lines.get()), say)
    except Exception as error:  # whatever keeps us from a cluster is one line
        give_up(reason_of(error))
    timer.cancel()
    reported = 0.0
    while True:
        client.poll()
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            client.report_progress()
        with contextlib.suppress(Empty):
            while (order := lines.get_nowait()) is not None:
                client.obey(order)
            client.close()
            return 0


if __name__ == "__main__":
    from nas.jobs.ray import main as main_of_module  # nodes find our functions by this name

    sys.exit(main_of_module())
