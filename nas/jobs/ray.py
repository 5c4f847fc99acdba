"""Run jobs as tasks of a Ray cluster: a running one, or one of this machine for this run alone.

Ray schedules tasks and retries those whose node or worker died. It ends a process whose cluster is lost, so the driver
talks to it through a process of its own (`python -m nas.jobs.ray`).
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
from nas.jobs.worker import Message, Send, limit_memory, open_pipes, printing_to, throttled
from space.errors import refuse

CONNECT_S, POLL_S, REPORT_S = 60.0, 0.2, 1.0
"""Seconds that a cluster has to answer, between polls of tasks, and between reports of progress."""

OBJECT_STORE_BYTES, LOG_BYTES = 2 << 30, 1 << 20
"""Memory of the object store of a cluster of this machine; the part of a log that is returned."""

EVENTS: Mapping[str, Any] = {each.__name__: each for each in (Progress, Ended, Lost)}


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """The settings of the client process and of its tasks.

    `token` is a file of the driver's and its text: a node that reads it reads all of its files.
    """

    config: ExecutorConfig
    options: WorkerOptions
    cpus: int
    gpus: float
    session: str
    token: tuple[Path, str] | None = None


class RayBackend(LocalBackend):
    """The tasks of a cluster, and one worker process here for jobs that write no folder.

    Raises InputError where Ray is not installed, and where a cluster does not answer or is lost.
    """

    def __init__(self, config: ExecutorConfig, options: WorkerOptions, *, device: str, workers: int) -> None:
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
        self._replies: Queue[Message | None] = Queue()
        self._remote: set[tuple[str, int]] = set()

    def _is_remote(self, job: Job) -> bool:
        if job.timed:
            return self._settings.config.benchmark_resource is not None
        return not job.driver_only and job.folder is not None

    def has_slot(self, job: Job) -> bool:
        """Return whether the cluster, or the worker here, takes a job now."""
        return self._is_remote(job) or super().has_slot(job)

    def start(self, job: Job, attempt: int) -> None:
        """Start an attempt on the cluster or here."""
        if not self._is_remote(job):
            super().start(job, attempt)
            return
        self._child = self._child or self._connect()
        self._remote.add((job.key, attempt))
        self._child.send({**encode_job(job), "attempt": attempt})

    def _connect(self) -> Child:
        settings, logs = self._settings, self._settings.options.logs
        if logs is not None and not settings.config.copy_files:
            file = logs.parent / "run.json"
            settings = replace(settings, token=(file, file.read_text()) if file.exists() else None)
        self._replies = replies = Queue[Message | None]()
        command = [sys.executable, "-m", "nas.jobs.ray"]
        child = Child(command, lambda _, message: replies.put(message), log=settings.options.log)
        child.send(to_json(settings))
        return child

    def cancel(self, key: str, attempt: int) -> None:
        """End an attempt."""
        super().cancel(key, attempt)
        if (key, attempt) in self._remote and self._child is not None:
            self._child.send({"cancel": [key, attempt]})
        self._remote.discard((key, attempt))

    def poll(self, timeout_s: float) -> list[Event]:
        """Return the events of the cluster and of the worker here."""
        events = super().poll(0.0 if self._remote else timeout_s)
        with contextlib.suppress(Empty):
            while self._remote:
                message = self._replies.get(timeout=0.0 if events else timeout_s)
                if message is None or "refused" in message:
                    reason = "it was lost" if message is None else message["refused"]
                    got = f"{self._settings.config.ray_address or 'a local cluster'} ({reason})"
                    want, remedy = "a cluster that answers", "start it, then --resume"
                    raise refuse("--ray-address", got, want, remedy)
                if "error" in message:
                    want = "nodes that are large enough, and writable disks"
                    raise refuse("--executor", f"ray ({message['error']})", want, "then --resume")
                event: Event = from_json(EVENTS[message["event"]], message["value"])
                if (event.key, event.attempt) in self._remote:
                    events.append(event)
                    if not isinstance(event, Progress):
                        self._remote.discard((event.key, event.attempt))
        return events

    def close(self) -> None:
        """Leave the cluster and end the worker here."""
        self._remote.clear()
        super().close()
        child, self._child = self._child, None
        if child is not None:
            child.end(grace_s=15.0)
        _remove_files(self._settings.session)  # this machine may be a node of a lost cluster


@dataclass
class _RayTask:
    which: tuple[str, int]
    request: Message
    job: Job
    began: float | None = None


class RayClient:
    """A connection to a cluster, and the tasks that run there."""

    def __init__(self, settings: RaySettings, send: Send) -> None:
        import ray
        from ray.util.queue import Queue as RayQueue

        self._ray: Any = ray
        self._settings, self._send = settings, send
        self._tasks: dict[Any, _RayTask] = {}
        self._bundles: dict[Path, tuple[files.State, files.Bundle]] = {}
        self._copies = settings.config.copy_files
        root, address = Path(nas.__file__).resolve().parent.parent, settings.config.ray_address
        own = {"address": "local", "num_cpus": settings.cpus, "include_dashboard": False}
        own["object_store_memory"] = OBJECT_STORE_BYTES
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=f"contraction-{settings.session}",
            runtime_env={  # nodes run the driver's version of the code
                "py_modules": [str(root / "nas"), str(root / "space")],
                "env_vars": worker_environment(settings.options.threads),
            },
            **(own if address is None else {"address": address}),
        )
        here = self._on(ray.get_runtime_context().get_node_id())
        self._progress = RayQueue(actor_options={"num_cpus": 0, **here})

    def _on(self, node: str) -> dict[str, Any]:
        """Return the options that run a task on a node."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        return {"scheduling_strategy": strategy(node, soft=False)}

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def handle(self, request: Message) -> None:
        """Start or cancel an attempt."""
        if "cancel" in request:
            for ref, task in list(self._tasks.items()):
                if list(task.which) == request["cancel"]:
                    self._cancel(ref)
            return
        try:
            self._start(request)
        except Exception as error:  # a file that it reads is missing, say
            self._report(Lost(request["key"], request["attempt"], reason_of(error), "cluster"))

    def _start(self, request: Message) -> None:
        """Start an attempt, or report that no node is large enough."""
        settings, job = self._settings, decode_job(request)
        device = {settings.config.benchmark_resource: 1} if job.timed else {}
        asked = {"CPU": settings.options.threads, "GPU": settings.gpus, **device}
        asked["memory"] = settings.options.memory_bytes or 0
        nodes = [node["Resources"] for node in self._nodes()]
        fitting = [n for n in nodes if all(n.get(k, 0) >= value for k, value in asked.items())]
        if not fitting:
            what = ", ".join(f"{value:g} {name}" for name, value in asked.items() if value)
            see = "see --threads, --job-memory-gb, --benchmark-resource"
            self._send({"error": f"no node has {what}; {see}"})
            return
        task = self._ray.remote(run_task).options(
            max_retries=settings.config.retries,
            # A device that is timed runs nothing else.
            num_cpus=min(node["CPU"] for node in fitting) if job.timed else asked["CPU"],
            num_gpus=asked["GPU"],
            memory=asked["memory"] or None,
            resources=device,
        )
        bundles = self._pack(job) if self._copies else None
        ref = task.remote(request, bundles, self._progress, settings)
        self._tasks[ref] = _RayTask((job.key, request["attempt"]), request, job)

    def _pack(self, job: Job) -> dict[str, files.Bundle]:
        """Put the files that a job reads into the object store, unless they are there."""
        bundles = {}
        reads = {name: each for name, each in job.files.items() if "reads" in each[1]}
        for dotted, (path, use) in reads.items():
            top_only = "top_only" in use
            state = files.file_states(path, top_only=top_only)
            known = self._bundles.get(path)
            if known is None or known[0] != state:
                data = self._ray.put(files.read_files(path, top_only=top_only))
                file = path.name if path.is_file() else ""
                known = (state, files.Bundle(data.hex(), file, data))
            if "last" not in use:  # a reference keeps them in the object store
                self._bundles[path] = known
            bundles[dotted] = known[1]
        return bundles

    def _cancel(self, ref: Any) -> None:
        del self._tasks[ref]
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.cancel(ref, force=True)

    def poll(self) -> None:
        """Report progress and the attempts that ended; cancels those that take too long."""
        if not self._tasks:
            time.sleep(POLL_S)
            return
        running = {task.which: task for task in self._tasks.values()}
        for which, units in self._progress.get_nowait_batch(self._progress.qsize()):
            if which in running:
                running[which].began = running[which].began or time.monotonic()
                self._report(Progress(which[0], which[1], units))
        for ref in self._ray.wait(list(self._tasks), num_returns=1, timeout=POLL_S)[0]:
            self._finish(ref, self._tasks.pop(ref))
        limit = self._settings.options.limit_s
        for ref, task in list(self._tasks.items()):
            if limit is not None and task.began and time.monotonic() - task.began > limit:
                self._cancel(ref)
                reason = f"no end after {limit:g} s (--job-minutes)"
                self._report(Lost(*task.which, reason, "cluster", limit, late=True))

    def _report(self, event: Event) -> None:
        self._send({"event": type(event).__name__, "value": to_json(event)})

    def _finish(self, ref: Any, task: _RayTask) -> None:
        """Write the files and the log of an attempt, and report its result."""
        job, logs, errors = task.job, self._settings.options.logs, self._ray.exceptions
        try:
            answer = self._ray.get(ref)
        except errors.RayError as error:
            cause = getattr(error, "cause", None) or error
            full = disk_refusal(cause)
            died = not isinstance(error, errors.RayTaskError)  # then Ray itself has retried
            if full is None:
                self._report(Lost(*task.which, reason_of(cause), "cluster", final=died))
            else:  # not the candidate's fault
                self._send({"error": f"a node of the cluster: {full}"})
            return
        if answer is None:  # the node cannot read the driver's files: from now on send them
            self._copies = True
            self.handle(task.request)
            return
        try:
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                with (logs / f"{job.key}.log").open("ab") as log:
                    log.write(f"-- on {answer['where']}\n".encode() + answer["log"])
            if job.folder is not None and answer["result"].ok:
                files.write_files(job.files[job.folder][0], answer["files"])
        except OSError as error:  # the driver's disk is full, say: not the node's fault
            self._send({"error": f"{error.filename}: {error.strerror or error}"})
            return
        self._report(Ended(*task.which, answer["result"], answer["where"]))

    def close(self) -> None:
        """Remove the files on the nodes that answer, and leave the cluster."""
        for ref in (ending := list(self._tasks)):
            self._cancel(ref)
        with contextlib.suppress(Exception):
            if ending:  # a task that still writes would leave files
                self._ray.wait(ending, num_returns=len(ending), timeout=5.0)
            remove = self._ray.remote(_remove_files)
            on = [remove.options(num_cpus=0, **self._on(n["NodeID"])) for n in self._nodes()]
            refs = [each.remote(self._settings.session) for each in on]
            self._ray.wait(refs, num_returns=len(refs), timeout=5.0)
            self._ray.shutdown()


def run_task(
    request: Message, bundles: dict[str, files.Bundle] | None, progress: Any, settings: RaySettings
) -> Message | None:
    """Run a job on a node; returns its result, the files that it wrote, its log and the host.

    None: this node cannot read the driver's files, and got no `bundles` of them. The driver alone writes to a run's
    folder, so that an attempt that dies leaves nothing there.
    """
    import ray

    job, started = decode_job(request), time.monotonic()
    used, left = job.files, job.folder
    path, text = settings.token or (Path(), "")
    seen = settings.config.ray_address is None or (path.is_file() and path.read_text() == text)
    if bundles is None and not seen:
        return None
    cache = _sent_files(settings.session)
    cache.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="job-", dir=cache))
    try:
        paths = {name: files.fetch(each, cache, ray.get) for name, each in (bundles or {}).items()}
        work = own / ("out" if left is None else used[left][0].name)
        work.mkdir()
        if left is not None:
            if "reads" in used[left][1]:  # it adds to an existing folder
                source = paths.get(left, used[left][0])
                files.write_files(work, files.read_files(source, top_only=True))
            paths[left] = work
        before = files.file_states(work)
        job = replace(job, argument=with_files(job.argument, paths))
        with printing_to(own / "log"):
            result = _run(job, request["attempt"], progress, settings)
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
                shutil.rmtree(cache / bundle.name, ignore_errors=True)


def _run(job: Job, attempt: int, progress: Any, settings: RaySettings) -> Result:
    which = (job.key, attempt)
    progress.put((which, 0.0))  # its time limit starts
    threads, memory_bytes = settings.options.threads, settings.options.memory_bytes
    if job.timed:
        timer = _timing_worker(threads, memory_bytes, settings.config.retries)
        if job.fresh:
            timer.release()
        return timer.run(job)
    import torch

    limit_memory(memory_bytes)
    torch.set_num_threads(threads)
    tick, _ = throttled(lambda units: progress.put((which, units)), REPORT_S)
    return run_job(job, tick)


@functools.cache  # it stays from job to job
def _timing_worker(threads: int, memory_bytes: int | None, retries: int) -> LocalExecutor:
    return LocalExecutor(threads=threads, memory_bytes=memory_bytes, retries=retries)


def _sent_files(session: str) -> Path:
    return Path(tempfile.gettempdir(), f"vision-contraction-{session}")


def _remove_files(session: str) -> None:
    shutil.rmtree(_sent_files(session), ignore_errors=True)


def main() -> int:
    """Serve a driver until standard input ends."""
    send, lines = open_pipes(grace_s=30.0)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    def exit_refused(reason: str) -> None:
        send({"refused": reason})
        os._exit(1)

    timer = threading.Timer(CONNECT_S, exit_refused, ["no answer"])
    timer.start()
    try:
        client = RayClient(from_json(RaySettings, lines.get()), send)
    except Exception as error:
        exit_refused(reason_of(error))
    timer.cancel()
    while True:
        client.poll()
        with contextlib.suppress(Empty):
            while (request := lines.get_nowait()) is not None:
                client.handle(request)
            client.close()
            return 0


if __name__ == "__main__":
    from nas.jobs.ray import main as main_of_module  # nodes import functions by this name

    sys.exit(main_of_module())
