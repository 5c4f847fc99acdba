"""A job: a function with a frozen dataclass argument that another process can run.

A job function is a function `f(argument, tick) -> values` in a `jobs.py` beside the code that it calls. It imports
torch inside, so that the driver does not load it.
"""

from __future__ import annotations

import inspect
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from nas.core.dataclass_json import from_json, to_json
from nas.core.io import check_sha256, disk_refusal, member, read_object, write_json
from nas.core.progress import Tick, no_tick
from space.errors import InputError

LOGS, RECORD, WORKER_LOG = "logs", "attempts.csv", "worker.log"
"""In a run's folder: the folder of logs by job, the attempts, and the log of the workers."""

CHECKPOINT = "checkpoint.safetensors"
"""The checkpoint in a rung's folder (`nas.distill.jobs.train`)."""

SPENT = ("weights.safetensors", CHECKPOINT)
"""Files of a finished job that may be deleted once no job starts from them."""

A = TypeVar("A")
Values = dict[str, Any]
JobFunction = Callable[[Any, Tick], Values]

READS: Mapping[str, Any] = {"reads": True}
"""Metadata of a path field: the job reads this file or folder."""
READS_LAST: Mapping[str, Any] = {"reads": True, "last": True}
"""The job reads it, and no later job does."""
WRITES: Mapping[str, Any] = {"writes": True}
"""The job writes this folder; only a job with such a field runs on a cluster."""
EXTENDS: Mapping[str, Any] = {"reads": True, "writes": True, "top_only": True}
"""The job reads the files at the top of this folder and adds to it."""


@dataclass(frozen=True)
class Job:
    """A call of `function` with `argument` in a worker.

    `key` is unique within a run and safe as a file name; `units` is the expected work, for progress. A `timed` job has
    the measured device to itself; a `fresh` one gets a new process; a `forked` one a copy of a process that loaded its
    libraries and did nothing else; a `driver_only` one runs on the driver's machine, never on a cluster.
    """

    function: JobFunction
    argument: Any
    key: str
    units: float = 0.0
    timed: bool = False
    fresh: bool = False
    forked: bool = False
    driver_only: bool = False

    if TYPE_CHECKING:  # a type checker compares the function's argument with what it is given

        def __init__(
            self,
            function: Callable[[A, Tick], Values],
            argument: A,
            key: str,
            units: float = 0.0,
            timed: bool = False,
            fresh: bool = False,
            forked: bool = False,
            driver_only: bool = False,
        ) -> None: ...

    @property
    def name(self) -> str:
        """The function as `module:function`."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @property
    def folder(self) -> str | None:
        """The dotted name of the argument's field with the folder that the job writes."""
        return next((name for name, (_, use) in self.files.items() if "writes" in use), None)

    @property
    def files(self) -> dict[str, tuple[Path, Mapping[str, Any]]]:
        """The paths in the argument, with their metadata (`file_fields`)."""
        return file_fields(self.argument)


@dataclass(frozen=True)
class Result:
    """The outcome of a job; a failure is an outcome, not an exception.

    `values` is plain JSON; `reason` is one line and set if and only if `ok` is false.
    """

    key: str
    ok: bool
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    seconds: float = 0.0


_PLAIN = ("key", "units", "timed", "fresh", "forked")


def encode_job(job: Job) -> dict[str, Any]:
    """Return a job as plain JSON."""
    more = {name: getattr(job, name) for name in _PLAIN}
    return {"function": job.name, "argument": to_json(job.argument), **more}


def decode_job(data: Mapping[str, Any], modules: Sequence[str] = ()) -> Job:
    """Build a job from `encode_job`'s JSON.

    Functions are looked up in `nas.<package>.jobs` and in `modules` only; another is a ValueError.
    """
    module, _, name = data["function"].partition(":")
    if not re.fullmatch(r"nas\.\w+\.jobs", module) and module not in modules:
        raise ValueError(f"{data['function']} is no job function")
    function: JobFunction = getattr(import_module(module), name)
    parameter = next(iter(inspect.signature(function).parameters))
    argument = from_json(get_type_hints(function)[parameter], data["argument"])
    return Job(function, argument, **{name: data[name] for name in _PLAIN})


def file_fields(argument: Any, prefix: str = "") -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """Return the paths in an argument, with their metadata, by dotted name: `parent.weights`.

    Fields without a value or without metadata are left out.
    """
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for each in fields(argument) if is_dataclass(argument) else ():
        value = getattr(argument, each.name)
        if is_dataclass(value):
            found |= file_fields(value, f"{prefix}{each.name}.")
        elif value is not None and each.metadata:
            found[f"{prefix}{each.name}"] = (value, each.metadata)
    return found


def with_files(argument: Any, paths: Mapping[str, Path]) -> Any:
    """Return an argument with some of its paths replaced, by dotted name."""
    changes: dict[str, Any] = {}
    for dotted, path in paths.items():
        name, _, rest = dotted.partition(".")
        inner = changes.get(name, getattr(argument, name))
        changes[name] = with_files(inner, {rest: path}) if rest else path
    return replace(argument, **changes)


def run_job(job: Job, tick: Tick = no_tick) -> Result:
    """Run one job; an exception becomes a failed result with a reason in one line."""
    started = time.monotonic()
    values: Values = {}
    reason: str | None = None
    try:
        values = job.function(job.argument, tick)
    except Exception as error:
        # A full disk is not the candidate's fault: the run stops and can be resumed.
        refused = error if isinstance(error, InputError) else disk_refusal(error)
        values, reason = ({}, reason_of(error)) if refused is None else ({"input_error": True}, str(refused))
        if refused is None:
            traceback.print_exc()
    return Result(job.key, reason is None, values, reason, time.monotonic() - started)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on a CPU or a GPU."""
    text = str(error).lower()
    known = ("out of memory", "can't allocate memory", "failed to allocate", "bad_alloc")
    return isinstance(error, MemoryError) or any(words in text for words in known)


def reason_of(error: BaseException) -> str:
    """Return an exception as a reason in one line."""
    text = " ".join(str(error).split())
    if out_of_memory(error):
        return f"out of memory: {text[:160]}".rstrip(": ")
    return f"{type(error).__name__}: {text[:200]}"


def log_of(job: str) -> str:
    """Return the path of a job's log in the run's folder."""
    return f"{LOGS}/{job}.log"


def _failure(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed.json")


def finished_before(out: Path, key: str) -> Result | None:
    """Return the result that an earlier process of a run wrote in `out`, if it is complete.

    An incomplete folder is removed. Raises InputError where a file is damaged.
    """
    path = out / "result.json"
    if not path.is_file():
        return None
    schema = {"values": dict, "seconds": float, "files": dict}
    data = read_object(path, "a finished job's result", schema)
    needed = {member(out, name, str(path)): sha256 for name, sha256 in data["files"].items()}
    if all(each.is_file() for each in needed if each.name not in SPENT):
        for each, sha256 in needed.items():
            if each.is_file():
                check_sha256(each, sha256, "restore it, or remove its folder to repeat its job")
        return Result(key, True, data["values"], None, data["seconds"])
    shutil.rmtree(out)
    return None


def failed_before(out: Path) -> Result | None:
    """Return the failure of the job of `out`, if it failed. Raises InputError."""
    path = _failure(out)
    if not path.exists():
        return None
    data = read_object(path, "why a job failed", {"reason": str, "seconds": float})
    return Result(out.name, False, {}, data["reason"], data["seconds"])


def keep_failure(out: Path, result: Result) -> None:
    """Write beside `out` that its job failed, for a resumed run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(_failure(out), {"reason": result.reason, "seconds": result.seconds})
