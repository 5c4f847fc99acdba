"""A run's folder: who may write in it, what it holds, and what a resume may change."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nas.core.io import read_json, remove_leftovers, write_json
from nas.jobs.job import LOGS, RECORD, WORKER_LOG
from space.errors import refuse

SCHEMA = 1


class RunDir:
    """The files of one run. The process that holds the lock is the only writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", timeout=0)
        self.created = self.begun = False

    @property
    def run_json(self) -> Path:
        """Configuration, versions, fingerprint: written once, before any work."""
        return self.path / "run.json"

    @property
    def result_json(self) -> Path:
        """How the run ended; missing while it runs."""
        return self.path / "result.json"

    @property
    def work(self) -> Path:
        """Finished jobs by key; a job's folder is there whole or not at all."""
        return self.path / "work"

    def check_new(self) -> None:
        """Refuse a folder that holds a run already."""
        if self.run_json.exists():
            raise refuse(
                "--out",
                self.path,
                "a new or empty folder",
                f"it holds a run: continue it with --resume {self.path}, or name another folder",
            )

    def create(self) -> None:
        """Make and lock a fresh folder; a used one is refused with the remedy."""
        self.check_new()
        fresh = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            ours = {".lock", WORKER_LOG, LOGS, RECORD}  # what a start that was killed leaves behind
            held = [p.name for p in self.path.iterdir() if p.name not in ours]
        except OSError as error:
            raise refuse("--out", self.path, "a folder to write in", _why(error)) from None
        if held:
            raise refuse(
                "--out",
                f"{self.path} holding {', '.join(sorted(held)[:3])}",
                "a new or empty folder",
                "name another folder",
            )
        self.created = fresh
        self.lock()
        self.begun = True

    def open(self) -> dict[str, Any]:
        """Lock the folder of an earlier run and return its `run.json`."""
        if not self.run_json.is_file():
            raise refuse(
                "--resume",
                self.path,
                "a folder with a run in it (a run.json)",
                "name the --out folder of an earlier run",
            )
        self.lock()
        data = read_json(self.run_json, "the run.json of a run")
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or "config" not in data:
            raise refuse(
                str(self.run_json), "another format", f"schema {SCHEMA}", "start a new run"
            )
        for place in (self.path, self.work, self.path / "models"):
            remove_leftovers(place)
        return data

    def lock(self) -> None:
        """Take the folder for this process, or refuse."""
        try:
            self._lock.acquire()
        except Timeout:
            raise refuse(
                str(self.path),
                "in use by another process",
                "one process a run folder",
                "wait for it, or name another --out",
            ) from None
        except OSError as error:
            raise refuse(str(self.path), _why(error), "a folder to write in") from None

    def release(self) -> None:
        """Let the folder go."""
        self._lock.release()

    def discard(self) -> None:
        """Undo `create` after a refusal: nothing of ours stays behind."""
        if not self.begun:
            return
        self.release()
        with contextlib.suppress(OSError):
            (self.path / ".lock").unlink()
        if self.created:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            for name in ("run.json", "study.db", "measurements.csv", "device_table.csv"):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            for name in (RECORD, WORKER_LOG):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            for place in (self.work, self.path / LOGS):
                shutil.rmtree(place, ignore_errors=True)

    def job_folder(self, key: str) -> Path:
        """Return where a job leaves its result."""
        return self.work / key

    def drop_weights(self, key: str) -> None:
        """Remove the weights of a job that nothing will start from; its result stays."""
        with contextlib.suppress(OSError):
            (self.job_folder(key) / "weights.safetensors").unlink()

    def write_run(self, data: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        write_json(self.run_json, {"schema": SCHEMA, **data})


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
