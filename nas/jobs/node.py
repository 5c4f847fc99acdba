"""What a Ray worker does with a job: fetch what it reads, do it, hand back what it left."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.jobs.job import decode_job, run_job
from nas.jobs.ship import arrive, at, content_name, copy_of, left, place_files, put, state_of

LOG_BYTES = 1 << 20
"""How much of a job's log comes back, its end."""

SENT = "vision-contraction-"
OLD_S = 2 * 86400.0
"""After how long without a job what a session sent is old."""

Said = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something that a job reads: where it is named, its content's name, how to fetch it.

    `path` is where the driver has it; `single` its file name, None for a folder; `spent` tells
    that nobody else will read it.
    """

    dotted: str
    path: str
    name: str
    single: str | None
    spent: bool
    load: Callable[[], bytes]


def node_place(node: str, session: str) -> Path:
    """Return where a node keeps what a session of a driver sent; of its own on shared machines."""
    return session_place(session) / node


def session_place(session: str) -> Path:
    """Return where a machine keeps what a session sent to its nodes."""
    return Path(tempfile.gettempdir()) / f"{SENT}{session}"


def forget_old(place: Path) -> None:
    """Remove what sessions left that could not clean up, as their cluster went away."""
    os.utime(place)
    for other in place.parent.glob(f"{SENT}*"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > OLD_S:
                shutil.rmtree(other, ignore_errors=True)


def do_here(
    told: Mapping[str, Any],
    pieces: Sequence[Piece],
    place: Path,
    *,
    threads: int,
    token: Sequence[str] | None,
    said: Said,
    began: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Do a job on this node and return its result, the files it left, its log and where it was.

    `began` is called when all is here that it reads, `said` with what it finished.

    `token` is a file of the driver's and its content's name: where it is seen, so are the driver's
    files, and nothing travels to here. What the job leaves is written here and handed back in any
    case, so that an attempt that dies leaves nothing half.
    """
    import torch

    started = time.monotonic()
    torch.set_num_threads(threads)
    near = token is not None and sees(*token)
    if not near and len(pieces) < told["pieces"]:
        raise FileNotFoundError(f"{socket.gethostname()} does not see the driver's files")
    place.mkdir(parents=True, exist_ok=True)
    forget_old(place.parent)
    own = Path(tempfile.mkdtemp(prefix="job-", dir=place))
    changes: dict[str, Any] = {}
    spent = []
    try:
        for piece in pieces:
            if near:
                continue
            local = arrive(place, piece.name, piece.load, single=piece.single)
            changes[piece.dotted] = str(local)
            if piece.spent:
                spent.append(place / piece.name)
        dotted = told["leaves"]
        out = Path(at(told["argument"], dotted))
        work = own / out.name
        arrived = changes.get(dotted) or (str(out) if near and out.is_dir() else None)
        if arrived is not None:  # it goes on with a folder that is there
            copy_of(Path(arrived), work, flat=dotted in told["flat"])
        changes[dotted] = str(work)
        spec = put(told["argument"], changes)
        before = state_of(work)
        log = own / "log"
        began()
        with _printing_to(log):
            result = run_job(decode_job({**told, "argument": spec}), said)
        files = left(work, before) if result.ok else {}
        return {
            "result": {**dataclasses.asdict(result), "seconds": time.monotonic() - started},
            "files": files,
            "log": log.read_bytes()[-LOG_BYTES:],
            "where": socket.gethostname(),
        }
    finally:
        shutil.rmtree(own, ignore_errors=True)
        for folder in spent:
            shutil.rmtree(folder, ignore_errors=True)


def sees(path: str, name: str) -> bool:
    """Tell whether a file is here, with the content of that name."""
    file = Path(path)
    return file.is_file() and content_name(file) == name


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Let what libraries print go to a file meanwhile."""
    kept = [os.dup(1), os.dup(2)]
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        for number, handle in zip((1, 2), kept, strict=True):
            os.dup2(handle, number)
            os.close(handle)
        os.close(log)


def bring_home(out: Path, answer: Mapping[str, Any], log: Path | None) -> dict[str, Any]:
    """Put in place what a job left and its log, and return its result as plain JSON."""
    if log is not None:
        with contextlib.suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                file.write(f"-- on {answer['where']}\n".encode() + answer["log"])
    result: dict[str, Any] = answer["result"]
    if result["ok"]:
        place_files(out, answer["files"])
    return result
