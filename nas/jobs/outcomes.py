"""What a job leaves of itself: a folder with its result, why it failed, its log."""

from __future__ import annotations

import shutil
from pathlib import Path

from nas.core.io import check_sha256, member, read_object, write_json
from nas.jobs.job import Result
from nas.jobs.means import LOGS

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
    schema = {"values": dict, "seconds": float, "files": dict}
    data = read_object(told, "a finished job's result", schema)
    needed = {member(out, name, str(told)): sha256 for name, sha256 in data["files"].items()}
    if all(path.is_file() for path in needed if path.name not in SPENT):
        for path, sha256 in needed.items():
            if path.is_file():
                check_sha256(path, sha256, "restore it, or remove its folder to repeat its job")
        return Result(key, True, data["values"], None, data["seconds"])
    shutil.rmtree(out)
    return None


def failed_before(out: Path) -> Result | None:
    """Return that the job of `out` failed, if it did: an outcome. Raises InputError."""
    kept = _failure(out)
    if not kept.exists():
        return None
    told = read_object(kept, "why a job failed", {"reason": str, "seconds": float})
    return Result(out.name, False, {}, told["reason"], told["seconds"])


def keep_failure(out: Path, result: Result) -> None:
    """Keep beside `out` that its job failed, for a resumed run to find."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(_failure(out), {"reason": result.reason, "seconds": result.seconds})


def left(out: Path) -> bool:
    """Tell whether a job left its folder whole."""
    return (out / "result.json").is_file()
