"""What a chaos campaign happens in: undisturbed runs to compare with, processes to be ended."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.core.io import read_json, write_json
from space.errors import refuse

ARCH = {
    "embed_dims": [64, 64, 96, 128],
    "depths": [1, 1, 2, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}
VIT = {
    "embed_dim": 32,
    "depth": 2,
    "head_dim": 16,
    "mlp_ratio": 2.0,
    "patch_size": 8,
    "dist_token": False,
}
PATIENCE_S = 900.0
TAG = "CHAOS_TAG"
PASSING = ("seconds", "log")
"""Columns of a ledger that tell of a moment, not of a decision (and `trial`: the order)."""
TIMES = ("seconds", "images_per_s", "peak_mem_bytes")
LEFTOVERS = (".*.tmp", "*.part", ".*.tmp-journal", "*.failed.json")


@dataclass(frozen=True)
class Kind:
    """Something that is disturbed: how it is begun and gone on with, and what is compared then.

    Kinds of one name end alike, whatever they work with. A `warm` one is timed with a cache that
    has what earlier runs kept.
    """

    name: str
    begin: Callable[[Path, Path], list[str]]
    again: Callable[[Path, Path], list[str]]
    outcome: Callable[[Path], Any]
    warm: bool = False


@dataclass
class Started:
    """A process under way, with a tag by which all that it starts is known."""

    process: subprocess.Popen[str]
    tag: str
    since: float
    told: Path

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end."""
        return self.process.wait(timeout=timeout_s)

    def said(self) -> str:
        """Return what it printed."""
        return self.told.read_text(errors="replace")


def start(command: Sequence[str], told: Path, **environment: str) -> Started:
    """Start one of our commands in a session of its own, with SIGINT heard."""
    tag = uuid.uuid4().hex
    code = (
        "import signal,sys,runpy;signal.signal(signal.SIGINT,signal.default_int_handler);"
        "m=sys.argv[1];sys.argv=sys.argv[1:];runpy.run_module(m,run_name='__main__',alter_sys=True)"
    )
    with told.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command],
            stdout=out,
            stderr=out,
            text=True,
            env={**os.environ, TAG: tag, **environment},
            start_new_session=True,
        )
    return Started(process, tag, time.monotonic(), told)


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


def orphans(tag: str, patience_s: float = 20.0) -> dict[int, str]:
    """Return the processes of a tag that are still there after a while."""
    until = time.monotonic() + patience_s
    while (left := tagged(tag)) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def leftovers(*folders: Path) -> list[str]:
    """Name what nobody should find after a finished run."""
    return [str(p) for f in folders for pattern in LEFTOVERS for p in f.rglob(pattern)]


def ledger_of(folder: Path) -> list[tuple[str, ...]]:
    """Return a run's decisions, in an order of their own."""
    with (folder / "ledger.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [
        tuple(f"{k}={v}" for k, v in row.items() if k not in (*PASSING, "trial")) for row in rows
    ]
    return sorted(kept)


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_outcome(folder: Path) -> Any:
    """Return what decides whether two runs of `nas.contract` ended alike."""
    result = read_json(folder / "result.json", "the result of a run")
    return {
        "status": result["status"],
        "winner": result["winner"],
        "path": result["path"],
        "ledger": ledger_of(folder),
        "weights": digest(folder / "best.safetensors"),
    }


def store_outcome(folder: Path) -> Any:
    """Return what decides whether two label stores are the same."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): digest(p) for p in files if p.name != "manifest.json"}


def training_outcome(folder: Path) -> Any:
    """Return what decides whether two full trainings ended alike."""
    with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]
    names = ("last.safetensors", "best.safetensors")
    return {"log": rows, **{name: digest(folder / name) for name in names}}


class Arena:
    """The undisturbed runs, made once and kept; `folder` holds everything."""

    train_epochs = 12

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.say = say
        write_json(self.folder / "small.json", ARCH)
        write_json(self.folder / "vit.json", {"family": "vit", "arch": VIT})
        self._truths: dict[str, tuple[Any, float]] = {}

    def contract(
        self, *more: str, seed: str | None = None, size: Sequence[str] = (), warm: bool = False
    ) -> Kind:
        """Return a small contraction with recorded measurements, or one of a published seed."""
        name = "run" if seed is None else f"run-{seed}"
        small = (
            *("--target-params", "400K", "--steps", "2", "--shortlist", "4", "--proxied", "4"),
            *("--proxy-epochs", "3", "--threads", "1", "--img-size", "32"),
            *("--proxy-images", "200", "--teacher-epochs", "2", "--final-epochs", "1"),
        )
        flags = [
            "nas.contract",
            "--seed",
            seed or str(self.folder / "small.json"),
            "--effort",
            "smoke",
            *(size or small),
        ]
        recorded = self.folder / name / "measurements.csv"

        def begin(out: Path, cache: Path) -> list[str]:
            known = ["--measurements", str(recorded)] if recorded.exists() else []
            where = ["--out", str(out), "--cache-dir", str(cache)]
            return [*flags, *known, *where, *more]

        def again(out: Path, cache: Path) -> list[str]:
            return ["nas.contract", "--resume", str(out), "--cache-dir", str(cache), *more]

        return Kind(name, begin, again, run_outcome, warm)

    def labels(self, *more: str) -> Kind:
        """Return the building of a store of labels."""

        def begin(out: Path, cache: Path) -> list[str]:
            return [
                "nas.labels",
                "build",
                "--data",
                "digits",
                "--teacher-epochs",
                "1",
                "--epochs",
                "60",
                "--img-size",
                "32",
                "--threads",
                "1",
                "--out",
                str(out),
                "--cache-dir",
                str(cache),
                *more,
            ]

        return Kind("labels", begin, begin, store_outcome)

    def training(self) -> Kind:
        """Return a full training."""

        def begin(out: Path, cache: Path) -> list[str]:
            return [
                "nas.train",
                "--arch",
                str(self.folder / "vit.json"),
                "--data",
                "digits",
                "--img-size",
                "32",
                "--epochs",
                str(self.train_epochs),
                "--proxy-images",
                "400",
                "--threads",
                "1",
                "--batch-size",
                "8",
                "--save-steps",
                "5",
                "--set",
                "drop_path=0.1",
                "--set",
                "ema_decay=0.9",
                "--out",
                str(out),
                "--cache-dir",
                str(cache),
            ]

        def again(out: Path, cache: Path) -> list[str]:
            # Killed before there was anything to go on with, it begins.
            if not (out / "train.json").is_file():
                return begin(out, cache)
            return ["nas.train", "--resume", str(out), "--cache-dir", str(cache)]

        return Kind("training", begin, again, training_outcome)

    def truth(self, kind: Kind) -> tuple[Any, float]:
        """Return how an undisturbed run ends, and how long it takes from nothing."""
        if kind.name not in self._truths:
            out, told = self.folder / kind.name, self.folder / f"{kind.name}.log"
            kept = self.folder / f"{kind.name}.seconds.json"
            if not kept.exists():
                shutil.rmtree(out, ignore_errors=True)
                self._undisturbed(kind, out, told)
                first = kind.outcome(out)
                # Once more, by what was measured: what the others are compared with, and timed by.
                again = self.folder / f"{kind.name}-again"
                shutil.rmtree(again, ignore_errors=True)
                seconds = self._undisturbed(kind, again, told)
                if first != kind.outcome(again):
                    raise refuse(kind.name, "two undisturbed runs that differ", "equal ones")
                write_json(kept, {"seconds": seconds})
            self._truths[kind.name] = (
                kind.outcome(out),
                float(json.loads(kept.read_text())["seconds"]),
            )
        return self._truths[kind.name]

    def cache(self, kind: Kind) -> Path:
        """Return the cache of a kind's undisturbed runs."""
        return self.folder / f"{kind.name}-cache"

    def _undisturbed(self, kind: Kind, out: Path, told: Path) -> float:
        cache = self.cache(kind)
        if not kind.warm:
            shutil.rmtree(cache, ignore_errors=True)
        self.say(f"undisturbed: {kind.name}")
        begun = start(kind.begin(out, cache), told)
        code = begun.end()
        if code:
            last = begun.said().strip().splitlines()[-1:]
            raise refuse(kind.name, f"status {code}: {last}", "an undisturbed run that ends well")
        return time.monotonic() - begun.since


def differences(kind: Kind, truth: Any, out: Path) -> list[str]:
    """Say in what a disturbed run ended otherwise than an undisturbed one."""
    try:
        found = kind.outcome(out)
    except (OSError, ValueError, KeyError) as error:
        return [f"no outcome: {type(error).__name__}: {error}"]
    if isinstance(truth, Mapping) and isinstance(found, Mapping):
        return [k for k in sorted({*truth, *found}) if truth.get(k) != found.get(k)]
    return [] if truth == found else ["the outcome"]


def kill(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes that may be gone."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)
