"""What a job leaves of itself: a folder with its result, why it failed, its log."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nas.core.io import member, read_json, write_json
from nas.jobs.job import Result
from nas.jobs.means import LOGS
from space.errors import refuse

CHECKPOINT = "checkpoint.safetensors"
"""What a rung leaves in its folder (`nas.distill.jobs.train`)."""

SPENT = ("weights.safetensors", CHECKPOINT)
"""Files of a finished job that may be gone: nothing starts from them any more."""


def log_of(job: str) -> str:
    """Name the log of a job, as its row does: a path in the run's folder."""
    return f"{LOGS}/{job}.log"


def _failure(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed.json")


def finished_before(out: Path, key: str) -> Result | None:
    """Return what an earlier process of a run finished in `out` (job `key`), if it is all there.

    What is there in part is removed, to be done again. Raises InputError.
    """
    if not left(out):
        return None
    told = out / "result.json"
    data = read_json(told, "a finished job's result")
    if not _is_result(data):
        want = "a finished job's result"
        raise refuse(str(told), "another format", want, "remove its folder")
    needed = [member(out, name, str(told)) for name in data.get("files", [])]
    if all(path.is_file() for path in needed if path.name not in SPENT):
        return Result(key, True, data["values"], None, data["seconds"])
    shutil.rmtree(out)
    return None


def failed_before(out: Path) -> Result | None:
    """Return that the job of `out` failed, if it did: an outcome. Raises InputError."""
    kept = _failure(out)
    if not kept.exists():
        return None
    told = read_json(kept, "why a job failed")
    if not isinstance(told, dict) or not {"reason", "seconds"} <= told.keys():
        raise refuse(str(kept), "another format", "why a job failed", "remove it")
    return Result(out.name, False, {}, told["reason"], told["seconds"])


def keep_failure(out: Path, result: Result) -> None:
    """Keep beside `out` that its job failed, for a resumed run to find."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(_failure(out), {"reason": result.reason, "seconds": result.seconds})


def _is_result(data: Any) -> bool:
    """Tell whether something read has the form of what a job leaves of itself."""
    return (
        isinstance(data, dict)
        and isinstance(data.get("values"), dict)
        and isinstance(data.get("seconds"), (int, float))
        and isinstance(data.get("files", []), list)
    )


def left(out: Path) -> bool:
    """Tell whether a job left its folder whole."""
    return (out / "result.json").is_file()
