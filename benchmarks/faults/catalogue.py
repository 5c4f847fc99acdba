"""All faults: how each disturbs, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.references import Kind, References, start
from benchmarks.faults.tries import (
    Fault,
    Try,
    builders,
    disturbed,
    either,
    ended,
    finished,
    interrupt_twice,
    kill_all,
    kill_driver,
    kill_worker,
    resumed,
    small_run,
    some_workers,
    terminate,
    trainer,
    two_workers,
)

EVEN = ("0", "2", "4", "6", "8")
"""Numbers of tries on a cluster whose nodes are sent all files; the others read the driver's."""

CLOCK = """
import random, time
_real, _now, _state = time.time, random.Random({seed}), [0.0]
def _jumping():
    if _now.random() < 0.02:
        _state[0] -= _now.choice([0.5, 60.0, 3600.0, 86400.0])
    return _real() + _state[0]
time.time = _jumping
time.time_ns = lambda: int(_jumping() * 1e9)
"""


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """Have a disk of so many bytes at a place; raises OSError where that is not allowed."""
    place.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise OSError(made.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def remount(place: Path, how: str) -> None:
    """Change a disk that `small_disk` made."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True, capture_output=True)


def disk_full(references: References, folder: Path, rng: random.Random) -> Try:
    """Run out of disk at some write, be given room, and go on."""
    kind = references.contract()
    references.of(kind)
    used = references.folder / kind.name
    places = (used, references.cache(kind))
    whole = sum(p.stat().st_size for f in places for p in f.rglob("*") if p.is_file())
    disk = folder / "disk"
    with small_disk(disk, max(65536, int(rng.uniform(0.02, 1.1) * whole))):
        return _refused_then_on(references, kind, disk, lambda: remount(disk, "size=2g"))


def read_only(references: References, folder: Path, rng: random.Random) -> Try:
    """Begin on a disk that may not be written to, be allowed to, and go on."""
    kind = references.contract()
    disk = folder / "disk"
    with small_disk(disk, 2 << 30):
        remount(disk, "ro")
        return _refused_then_on(references, kind, disk, lambda: remount(disk, "rw"))


def _refused_then_on(references: References, kind: Kind, disk: Path, mend: Callable[[], None]) -> Try:
    process = start(kind.begin(disk / "out", disk / "cache"), disk.with_name("first.log"))
    wrong = process.end_or_refuse()
    mend()
    if process.end() == 0:  # there was room enough after all: then nothing may be missing
        return Try(wrong + ended(kind, references.of(kind)[0], disk))
    return Try(wrong + resumed(references, kind, disk, time.monotonic()).wrong)


def locked(references: References, folder: Path, rng: random.Random) -> Try:
    """Have another process hold the study's lock for long, let go, and go on."""
    kind = references.contract()
    _, seconds = references.of(kind)
    out, cache = folder / "out", folder / "cache"
    process = start(kind.begin(out, cache), folder / "first.log")
    time.sleep(rng.uniform(0.3, 0.8) * seconds)
    while not (out / "study.db").exists() and process.process.poll() is None:
        time.sleep(0.05)
    holder = sqlite3.connect(out / "study.db", isolation_level=None, timeout=30)
    try:
        holder.execute("BEGIN EXCLUSIVE")
        wrong = process.end_or_refuse()
    finally:
        holder.close()
    return Try(wrong + resumed(references, kind, folder, time.monotonic()).wrong)


def clock_back(references: References, folder: Path, rng: random.Random) -> Try:
    """Let the wall clock jump back again and again, in driver and workers."""
    kind = two_workers(references, rng)
    expected, _ = references.of(kind)
    place = folder / "clock"
    place.mkdir()
    (place / "sitecustomize.py").write_text(CLOCK.format(seed=rng.randrange(1 << 30)))
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    out, cache = folder / "out", folder / "cache"
    process = start(kind.begin(out, cache), folder / "first.log", PYTHONPATH=os.pathsep.join(paths))
    return finished(process, kind, expected, folder, process.since)


def damaged(references: References, folder: Path, rng: random.Random) -> Try:
    """Kill a run, damage one of its files, resume; if that is refused, restore it and resume.

    Any file is cut short; bytes are changed in weights, which carry a checksum.
    """
    kind = references.contract()
    expected, seconds = references.of(kind)
    out, cache = folder / "out", folder / "cache"
    process = start(kind.begin(out, cache), folder / "first.log")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.end(rng.uniform(0.3, 0.95) * seconds)
    kill_all(process, rng)
    if not (out / "run.json").exists():
        return resumed(references, kind, folder, time.monotonic())
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
    victim = rng.choice(files)
    data = bytearray(victim.read_bytes())
    kept = folder / "kept"
    shutil.copytree(out, kept)
    if data and victim.suffix == ".safetensors" and rng.random() < 0.5:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif data:
        del data[rng.randrange(len(data)) :]
    victim.write_bytes(bytes(data))
    again = start(kind.resume(out, cache), folder / "again.log")
    wrong = again.end_or_refuse()
    if again.end() == 0:
        wrong += ended(kind, expected, folder)
    else:
        shutil.rmtree(out)
        kept.rename(out)
        wrong += resumed(references, kind, folder, time.monotonic()).wrong
    return Try([f"{victim.relative_to(out)} damaged: {text}" for text in wrong])


def cluster(act: str) -> Callable[[References, Path, random.Random], Try]:
    """Return a try on a Ray cluster of three nodes, in a network of its own (loopback only)."""

    def do(references: References, folder: Path, rng: random.Random) -> Try:
        kind = references.contract()
        expected, seconds = references.of(kind)
        out, cache = folder / "out", folder / "cache"
        told = folder / "cluster.json"
        order = {
            "act": act,
            "begin": kind.begin(out, cache),
            "resume": kind.resume(out, cache),
            "out": str(out),
            "after": rng.uniform(0.2, 0.9) * seconds,
            "told": str(told),
            "copy_files": folder.name.endswith(EVEN),
        }
        (folder / "order.json").write_text(json.dumps(order))
        code = f"from benchmarks.faults.cluster import main; main({str(folder / 'order.json')!r})"
        inside = f'ip link set lo up && exec {sys.executable} -c "$0"'
        with (folder / "first.log").open("w") as log:
            done = subprocess.run(
                ["unshare", "-n", "sh", "-c", inside, code], stdout=log, stderr=log, timeout=600, check=False
            )
        if done.returncode or not told.exists():
            return Try([f"the cluster ended with status {done.returncode}"])
        found = json.loads(told.read_text())
        wrong = list(found["wrong"])
        wrong += ended(kind, expected, folder)
        sent = Path(tempfile.gettempdir()).glob("vision-contraction-*")
        wrong += [f"left on a node: {path}" for path in sent]
        return Try(wrong, found["took_s"])

    return do


def published(references: References, rng: random.Random | None = None) -> Kind:
    """Return the headline contraction: TinyViT-21M to 5M, effort smoke, on a quarter of its images.

    Its cache is warm: what a kill does to data, teacher, labels and the seed is for the small runs.
    """
    return references.contract(seed="21M", size="--target-params 5M --max-images 200", warm=True)


BUILD_WORKER = disturbed(builders, kill_worker, continues=True)
WORKER = disturbed(some_workers, kill_worker, continues=True)
FAULTS: dict[str, Fault] = {
    "kill -9 of the driver": Fault(15, small_run, disturbed(some_workers, kill_driver)),
    "kill -9 of a worker": Fault(12, small_run, WORKER),
    "kill -9 of everything at once": Fault(10, small_run, disturbed(some_workers, kill_all)),
    "kill -9 of the label builder": Fault(18, References.labels, disturbed(builders, either)),
    "kill -9 of a worker that builds labels": Fault(8, References.labels, BUILD_WORKER),
    "kill -9 of the trainer": Fault(27, References.training, disturbed(trainer, kill_driver)),
    "SIGTERM, then SIGKILL after 5 s": Fault(5, small_run, disturbed(some_workers, terminate)),
    "Ctrl-C twice": Fault(5, small_run, disturbed(some_workers, interrupt_twice)),
    "the clock jumps back": Fault(3, small_run, clock_back),
    "the disk is full": Fault(6, small_run, disk_full),
    "the disk is read-only": Fault(1, small_run, read_only),
    "the database is locked": Fault(3, small_run, locked),
    "a file of the run is damaged": Fault(8, small_run, damaged),
    "Ray: a node removed in every step": Fault(2, small_run, cluster("node"), solo=True),
    "Ray: the driver killed": Fault(2, small_run, cluster("driver"), solo=True),
    "Ray: the head lost": Fault(2, small_run, cluster("head"), solo=True),
    "kill -9 of the driver, TinyViT-21M": Fault(10, published, disturbed(published, kill_driver, warm=True), solo=True),
}
