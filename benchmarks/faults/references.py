"""Undisturbed runs to compare with, and the processes of disturbed ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.core.cli import EXIT_BAD_INPUT
from nas.core.io import file_sha256, read_json, write_json
from space.errors import refuse

ARCH = {
    "embed_dims": [64, 64, 96, 128],
    "depths": [1, 1, 2, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}
VIT = {"embed_dim": 32, "depth": 2, "head_dim": 16, "mlp_ratio": 2.0, "patch_size": 8, "dist_token": False}
SMALL_SIZE = (
    "--target-params 400K --steps 2 --candidates-per-step 4 --train-per-step 4 --proxy-epochs 3 --threads 1 "
    "--img-size 32 --max-images 200 --teacher-epochs 2 --final-epochs 1"
)
TIMEOUT_S = 900.0
TAG = "FAULTS_TAG"
PASSING = ("seconds", "log", "trial")
"""Columns of trials.csv that are no decisions: times, and the order."""
TIMES = ("seconds", "images_per_s", "peak_mem_bytes")
LEFTOVERS = (".*.tmp", "*.part", ".*.tmp-journal", "*.failed.json")


@dataclass(frozen=True)
class Kind:
    """A command to disturb, the `words` that begin it and the file (`state`) that it resumes from, if it can.

    It works in a folder with `out` and `cache`; `outcome` is of `out`. Kinds of one name end alike, whatever `more`
    words they work with. A `warm` one has a cache with what earlier runs kept.
    """

    name: str
    words: tuple[str, ...]
    outcome: Callable[[Path], Any]
    state: str | None = None
    more: tuple[str, ...] = ()
    recorded: Path | None = None
    warm: bool = False

    def begin(self, folder: Path) -> list[str]:
        """Return how it begins, with the `recorded` measurements once there are some."""
        known = ["--measurements", str(self.recorded)] if self.recorded and self.recorded.exists() else []
        return [*self.words, *known, "--out", str(folder / "out"), "--cache-dir", str(folder / "cache"), *self.more]

    def resume(self, folder: Path) -> list[str]:
        """Return how a user resumes it; killed before there was anything to resume from, it begins."""
        if self.state is None or not (folder / "out" / self.state).is_file():
            return self.begin(folder)
        return [self.words[0], "--resume", str(folder / "out"), "--cache-dir", str(folder / "cache"), *self.more]


@dataclass
class Started:
    """A running process, with a tag that all processes it starts inherit."""

    process: subprocess.Popen[str]
    tag: str
    since: float
    log: Path

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def end(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for its end."""
        return self.process.wait(timeout=timeout_s)

    def wait(self, seconds: float) -> None:
        """Wait so long, or for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.end(seconds)

    def signal(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; it may be gone."""
        kill([self.process.pid], number)

    def output(self) -> str:
        """Return what it printed."""
        return self.log.read_text(errors="replace")

    def end_well(self) -> list[str]:
        """Wait for its end; return what is wrong with its status, and what it left running."""
        code = self.end()
        wrong = [f"status {code}: {self.output().strip().splitlines()[-1:]}"] if code else []
        return wrong + orphans(self.tag)

    def end_or_refuse(self) -> list[str]:
        """Wait for a good end or a refusal of one line; return what is wrong with it."""
        code = self.end()
        wrong = [] if code in (0, EXIT_BAD_INPUT) else [f"status {code}"]
        return wrong + (one_line(self.output()) if code else []) + orphans(self.tag)


def one_line(output: str) -> list[str]:
    """Return what is wrong with a refusal, which is one line without a traceback."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    wrong = [] if len(errors) == 1 else [f"{len(errors)} lines of refusal"]
    return wrong + (["a traceback"] if "Traceback" in output else [])


def start(command: Sequence[str], log: Path, **environment: str) -> Started:
    """Start one of our commands in a session of its own, with SIGINT handled."""
    tag = uuid.uuid4().hex
    code = (
        "import signal,sys,runpy;signal.signal(signal.SIGINT,signal.default_int_handler);"
        "m=sys.argv[1];sys.argv=sys.argv[1:];runpy.run_module(m,run_name='__main__',alter_sys=True)"
    )
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command],
            stdout=out,
            stderr=out,
            text=True,
            env={**os.environ, TAG: tag, **environment},
            start_new_session=True,
        )
    return Started(process, tag, time.monotonic(), log)


def tagged(tag: str) -> dict[int, str]:
    """Return the living processes that a tag belongs to, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TAG}={tag}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = words.decode(errors="replace")
    return found


def orphans(tag: str, timeout_s: float = 20.0) -> list[str]:
    """Return the command lines of a tag's processes that still run after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while (left := tagged(tag)) and time.monotonic() < until:
        time.sleep(0.2)
    return [f"orphan: {words}" for words in left.values()]


def kill(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes that may be gone."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def read_rows(path: Path, without: Sequence[str]) -> list[dict[Any, Any]]:
    """Read a CSV file as text, without some of its columns."""
    import pandas as pd

    rows = pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns=list(without), errors="ignore")
    return rows.to_dict("records")


def run_outcome(out: Path) -> Any:
    """Return what must be equal for two runs of `nas.contract`."""
    result = read_json(out / "result.json", "the result of a run")
    return {
        **{name: result[name] for name in ("status", "winner", "path")},
        "trials": sorted(map(str, read_rows(out / "trials.csv", PASSING))),
        "weights": file_sha256(out / "best.safetensors"),
    }


def store_outcome(out: Path) -> Any:
    """Return what must be equal for two label stores."""
    files = sorted(p for p in out.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(out).as_posix(): file_sha256(p) for p in files if p.name != "manifest.json"}


def training_outcome(out: Path) -> Any:
    """Return what must be equal for two full trainings."""
    names = ("last.safetensors", "best.safetensors")
    return {"log": read_rows(out / "log.csv", TIMES), **{name: file_sha256(out / name) for name in names}}


def differences(kind: Kind, expected: Mapping[str, Any], out: Path) -> list[str]:
    """Return in what a disturbed run ends otherwise than an undisturbed one."""
    try:
        found = kind.outcome(out)
    except (OSError, ValueError, KeyError) as error:
        return [f"no outcome: {type(error).__name__}: {error}"]
    return [k for k in sorted({*expected, *found}) if expected.get(k) != found.get(k)]


def ended(kind: Kind, expected: Mapping[str, Any], folder: Path) -> list[str]:
    """Return in what a finished run differs from an undisturbed one, and its temporary files."""
    wrong = [f"another {name}" for name in differences(kind, expected, folder / "out")]
    left = [p for name in ("out", "cache") for pattern in LEFTOVERS for p in (folder / name).rglob(pattern)]
    return wrong + [f"left behind: {p}" for p in left]


class References:
    """The undisturbed runs, made once and kept in `folder`."""

    train_epochs = 12

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.report = report
        write_json(self.folder / "small.json", ARCH)
        write_json(self.folder / "vit.json", {"family": "vit", "arch": VIT})
        self._found: dict[str, tuple[Any, float]] = {}

    def contract(self, *more: str, seed: str | None = None, size: str = SMALL_SIZE, warm: bool = False) -> Kind:
        """Return a small contraction with recorded measurements, or one of a published seed."""
        name = "run" if seed is None else f"run-{seed}"
        start_from = seed or str(self.folder / "small.json")
        words = ("nas.contract", "--seed", start_from, "--effort", "smoke", *size.split())
        recorded = self.folder / name / "out" / "measurements.csv"
        return Kind(name, words, run_outcome, "run.json", more, recorded, warm)

    def labels(self, *more: str) -> Kind:
        """Return the building of a label store."""
        flags = "build --data digits --teacher-epochs 1 --epochs 60 --img-size 32 --threads 1"
        return Kind("labels", ("nas.labels", *flags.split()), store_outcome, more=more)

    def training(self) -> Kind:
        """Return a full training."""
        flags = (
            f"--data digits --img-size 32 --epochs {self.train_epochs} --max-images 400 "
            "--threads 1 --batch-size 8 --save-steps 5 --set drop_path=0.1 --set ema_decay=0.9"
        )
        words = ("nas.train", "--arch", str(self.folder / "vit.json"), *flags.split())
        return Kind("training", words, training_outcome, "train.json")

    def of(self, kind: Kind) -> tuple[Any, float]:
        """Return how an undisturbed run ends, and its seconds from nothing. Raises InputError."""
        if kind.name not in self._found:
            first, again = self.folder / kind.name, self.folder / f"{kind.name}-again"
            kept = self.folder / f"{kind.name}.seconds.json"
            if not kept.exists():
                self._run(kind, first, None)
                outcome = kind.outcome(first / "out")
                # Once more, with the recorded measurements: compared with the first, and timed.
                seconds = self._run(kind, again, first / "cache" if kind.warm else None)
                if outcome != kind.outcome(again / "out"):
                    raise refuse(kind.name, "two undisturbed runs that differ", "equal ones")
                write_json(kept, {"seconds": seconds})
            seconds = float(read_json(kept, "the seconds of a run")["seconds"])
            self._found[kind.name] = kind.outcome(first / "out"), seconds
        return self._found[kind.name]

    def _run(self, kind: Kind, folder: Path, cache: Path | None) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if cache is not None:
            shutil.copytree(cache, folder / "cache")
        self.report(f"undisturbed: {kind.name}")
        begun = start(replace(kind, more=()).begin(folder), self.folder / f"{kind.name}.log")
        code = begun.end()
        if code:
            last = begun.output().strip().splitlines()[-1:]
            raise refuse(kind.name, f"status {code}: {last}", "an undisturbed run that ends well")
        return time.monotonic() - begun.since
