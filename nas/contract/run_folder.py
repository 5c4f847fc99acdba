"""A run's folder: its files, its lock and its `run.json`."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nas.core.cli import resume_flags
from nas.core.io import read_json, remove_leftovers, write_json
from nas.jobs.job import LOGS, RECORD, WORKER_LOG
from space.errors import refuse

SCHEMA = 1


def read_run_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a run's `run.json`. Raises InputError naming `name` where the folder has no run."""
    path = folder / "run.json"
    if not path.is_file():
        want = "a folder with a run in it (a run.json)"
        raise refuse(name, folder, want, "name the --out folder of an earlier run")
    data = read_json(path, "the run.json of a run")
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "config" not in data:
        raise refuse(str(path), "another format", f"schema {SCHEMA}", "start a new run")
    return data


def default_folder(seed: str, target_params: int) -> Path:
    """Return the folder of a new run without `--out`: date, time, seed and target."""
    moment = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("results/runs") / f"{moment}-{Path(seed).stem}-{target_params / 1e6:g}M"


class RunFolder:
    """The files of one run. The process that holds the lock is the only writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_json = path / "run.json"  # configuration, versions, fingerprint, and notes
        self.result_json = path / "result.json"  # the result; missing while the run is unfinished
        self.work = path / "work"  # the folders of finished jobs by key, each whole or absent
        self._lock = FileLock(path / ".lock", timeout=0)
        self.created = self.begun = False

    def check_new(self) -> None:
        """Refuse a folder that holds a run already."""
        if self.run_json.exists():
            remedy = f"it holds a run: continue it with {resume_flags(self.path)}, or name another folder"
            raise refuse("--out", self.path, "a new or empty folder", remedy)

    def create(self) -> None:
        """Make and lock a fresh folder; a used one is refused with the remedy."""
        self.check_new()
        fresh = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            ours = {".lock", WORKER_LOG, LOGS, RECORD}  # files of a start that was killed
            held = [p.name for p in self.path.iterdir() if p.name not in ours]
        except OSError as error:
            raise refuse("--out", self.path, "a folder to write in", _why(error)) from None
        if held:
            got = f"{self.path} holding {', '.join(sorted(held)[:3])}"
            raise refuse("--out", got, "a new or empty folder", "name another folder")
        self.created = fresh
        self.lock()
        self.begun = True

    def open(self) -> dict[str, Any]:
        """Lock the folder of an earlier run and return its `run.json`."""
        if self.run_json.is_file():
            self.lock()
        data = read_run_json(self.path, "--resume")
        for folder in (self.path, self.work, self.path / "models"):
            remove_leftovers(folder)
        return data

    def lock(self) -> None:
        """Lock the folder for this process. Raises InputError where another one has it."""
        try:
            self._lock.acquire()
        except Timeout:
            remedy = "wait for it, or name another --out"
            raise refuse(str(self.path), "in use by another process", "one process a run folder", remedy) from None
        except OSError as error:
            raise refuse(str(self.path), _why(error), "a folder to write in") from None

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def discard(self) -> None:
        """Undo `create` after a refusal."""
        if not self.begun:
            return
        self.release()
        with contextlib.suppress(OSError):
            (self.path / ".lock").unlink()
        if self.created:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            tables = ("run.json", "study.db", "measurements.csv", "device_table.csv")
            for name in (*tables, RECORD, WORKER_LOG):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            for folder in (self.work, self.path / LOGS):
                shutil.rmtree(folder, ignore_errors=True)

    def job_folder(self, key: str) -> Path:
        """Return the folder of a job's result."""
        return self.work / key

    def drop_weights(self, key: str) -> None:
        """Remove the weights of a job that nothing starts from; its result stays."""
        with contextlib.suppress(OSError):
            (self.job_folder(key) / "weights.safetensors").unlink()

    def add_notes(self, notes: Sequence[str]) -> None:
        """Add notes to `run.json`, each once; a run that is only planned has none."""
        if not self.run_json.exists():
            return
        data = read_run_json(self.path, "--resume")
        known = list(data.get("notes", ()))
        new = [note for note in dict.fromkeys(notes) if note not in known]
        if new:
            write_json(self.run_json, {**data, "notes": [*known, *new]})

    def write_run(self, data: Mapping[str, Any]) -> None:
        """Write `run.json`, before any work; only notes are added later."""
        write_json(self.run_json, {"schema": SCHEMA, **data})


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
