"""Values that pass between the driver and the machines that work for it: plain JSON, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Needs:
    """What a job asks of the place that it runs on.

    `reads` and `leaves` name what it reads and leaves of the file system, as dotted paths into its
    specification: `dataset`, `parent.weights`. A place with other files is given the former, and
    gives back the latter. Without `leaves` a job stays on the driver's machine, but for one that
    is `timed`: it belongs to the device that is measured, and is `alone` there. Of the folders in
    `flat` only the files at their top are read.
    """

    reads: tuple[str, ...] = ()
    leaves: str | None = None
    flat: tuple[str, ...] = ()
    timed: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Job:
    """One piece of work that a worker can do alone.

    `kind` names a function in `nas.jobs.run_job`; `key` is unique within a run and safe as a file
    name;
    `spec` is plain JSON (paths as strings); `units` is the expected work, for progress and plans.
    """

    kind: str
    key: str
    spec: Mapping[str, Any]
    units: float = 0.0
    needs: Needs = Needs()


@dataclass(frozen=True)
class Result:
    """What became of a job. A failure is an outcome, not an exception.

    `values` is plain JSON; `reason` is one line and set if and only if `ok` is false.
    """

    key: str
    ok: bool
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    seconds: float = 0.0


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, on a CPU or a GPU."""
    text = str(error).lower()
    known = ("out of memory", "can't allocate memory", "failed to allocate", "bad_alloc")
    return isinstance(error, MemoryError) or any(words in text for words in known)
