"""All faults: how each disturbs, and what must hold when the run is resumed as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.references import Kind, References, Started, ended, kill, orphans, start, tagged
from nas.core.cli import EXIT_INTERRUPTED, EXIT_TERMINATED

GRACE_S = 5.0
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


@dataclass
class Try:
    """What went wrong in a try, and its seconds from the beginning to its good end."""

    wrong: list[str] = field(default_factory=list)
    took_s: float | None = None


Do = Callable[[References, Kind, Path, random.Random], Try]
Act = Callable[[Started, random.Random], list[str]]


@dataclass(frozen=True)
class Fault:
    """A way to disturb a kind; `tries` of it by default. `solo`: nothing else runs meanwhile."""

    tries: int
    make: Callable[[References, random.Random], Kind]
    do: Do
    solo: bool = False


def small_run(references: References, rng: random.Random) -> Kind:
    """Return a small contraction, with one worker or two as it is drawn."""
    return references.contract("--workers", str(rng.choice([1, 2])))


def builders(references: References, rng: random.Random) -> Kind:
    """Return the building of labels, by one process or two as it is drawn."""
    return references.labels("--processes", str(rng.choice([1, 2])))


def trainer(references: References, rng: random.Random) -> Kind:
    """Return a full training."""
    return references.training()


def resumed(references: References, kind: Kind, folder: Path, begun: float) -> Try:
    """Resume what was disturbed, as a user would, and compare it with an undisturbed one."""
    return finished(start(kind.resume(folder), folder / "again.log"), references, kind, folder, begun)


def finished(process: Started, references: References, kind: Kind, folder: Path, begun: float) -> Try:
    """Wait for a good end, and compare it with that of an undisturbed run."""
    wrong = process.end_well()
    took = time.monotonic() - begun
    return Try(wrong or ended(kind, references.of(kind)[0], folder), took)


def disturbed(act: Act, *, continues: bool = False) -> Do:
    """Return a try: begin, act at a random instant, and resume unless it `continues` by itself.

    A warm kind finds data, teacher, labels and the trained seed in its cache.
    """

    def do(references: References, kind: Kind, folder: Path, rng: random.Random) -> Try:
        _, seconds = references.of(kind)
        if kind.warm:
            shutil.copytree(references.folder / kind.name / "cache", folder / "cache")
        process = start(kind.begin(folder), folder / "first.log")
        process.wait(rng.uniform(0.02, 0.95) * seconds)
        wrong = act(process, rng)
        if continues:
            found = finished(process, references, kind, folder, process.since)
        else:
            wrong += orphans(process.tag)
            found = resumed(references, kind, folder, process.since)
        return Try(wrong + found.wrong, found.took_s)

    return do


def kill_driver(process: Started, rng: random.Random) -> list[str]:
    """Kill the driver alone."""
    process.signal()
    process.end()
    return []


def kill_all(process: Started, rng: random.Random) -> list[str]:
    """Kill everything at once, as a machine does that loses its power."""
    process.signal()
    kill(list(tagged(process.tag)))
    process.end()
    return []


def either(process: Started, rng: random.Random) -> list[str]:
    """Kill the driver or everything."""
    return rng.choice([kill_driver, kill_all])(process, rng)


def kill_worker(process: Started, rng: random.Random) -> list[str]:
    """Kill one of the workers, as soon as there is one."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.running:
        workers = [pid for pid, words in tagged(process.tag).items() if "nas.jobs.worker" in words]
        if workers:
            kill([rng.choice(sorted(workers))])
            break
        time.sleep(0.05)
    return []


def terminate(process: Started, rng: random.Random) -> list[str]:
    """Ask it to end as schedulers do, and kill it after a grace period."""
    process.signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.end(GRACE_S)
        return [] if code in (0, EXIT_TERMINATED, -signal.SIGTERM) else [f"SIGTERM: status {code}"]
    kill_all(process, rng)
    return ["it did not end within its grace period"]


def interrupt_twice(process: Started, rng: random.Random) -> list[str]:
    """Press Ctrl-C, and again."""
    process.signal(signal.SIGINT)
    time.sleep(rng.uniform(0.0, 0.4))
    process.signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.end(20.0)
        # Before our own handlers stand, and when they have done their work, Python's own ends it in its own way: by the
        # signal, which a shell reports as 130 as well.
        early = "data: " not in process.output() and code == 1
        good = code in (0, EXIT_INTERRUPTED, -signal.SIGINT) and "Traceback" not in process.output()
        return [] if early or good else [f"Ctrl-C: status {code}"]
    kill_all(process, rng)
    return ["it did not end on Ctrl-C"]


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """Have a disk of so many bytes at a place; raises OSError where that is not allowed."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(place)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise OSError(made.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def remount(place: Path, how: str) -> None:
    """Change a disk that `small_disk` made."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True, capture_output=True)


def disk_full(references: References, kind: Kind, folder: Path, rng: random.Random) -> Try:
    """Run out of disk at some write, be given room, and go on."""
    whole = sum(p.stat().st_size for p in (references.folder / kind.name).rglob("*") if p.is_file())
    disk = folder / "disk"
    with small_disk(disk, max(65536, int(rng.uniform(0.02, 1.1) * whole))):
        return _refused_then_on(references, kind, disk, lambda: remount(disk, "size=2g"))


def read_only(references: References, kind: Kind, folder: Path, rng: random.Random) -> Try:
    """Begin on a disk that may not be written to, be allowed to, and go on."""
    disk = folder / "disk"
    with small_disk(disk, 2 << 30):
        remount(disk, "ro")
        return _refused_then_on(references, kind, disk, lambda: remount(disk, "rw"))


def _refused_then_on(references: References, kind: Kind, disk: Path, mend: Callable[[], None]) -> Try:
    process = start(kind.begin(disk), disk.with_name("first.log"))
    wrong = process.end_or_refuse()
    mend()
    if process.end() == 0:  # there was room enough after all: then nothing may be missing
        return Try(wrong + ended(kind, references.of(kind)[0], disk))
    return Try(wrong + resumed(references, kind, disk, time.monotonic()).wrong)


def locked(references: References, kind: Kind, folder: Path, rng: random.Random) -> Try:
    """Have another process hold the study's lock for long, let go, and go on."""
    _, seconds = references.of(kind)
    study = folder / "out" / "study.db"
    process = start(kind.begin(folder), folder / "first.log")
    time.sleep(rng.uniform(0.3, 0.8) * seconds)
    while not study.exists() and process.running:
        time.sleep(0.05)
    with contextlib.closing(sqlite3.connect(study, isolation_level=None, timeout=30)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        wrong = process.end_or_refuse()
    return Try(wrong + resumed(references, kind, folder, time.monotonic()).wrong)


def clock_back(references: References, kind: Kind, folder: Path, rng: random.Random) -> Try:
    """Let the wall clock jump back again and again, in driver and workers."""
    place = folder / "clock"
    place.mkdir()
    (place / "sitecustomize.py").write_text(CLOCK.format(seed=rng.randrange(1 << 30)))
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = start(kind.begin(folder), folder / "first.log", PYTHONPATH=os.pathsep.join(paths))
    return finished(process, references, kind, folder, process.since)


def damaged(references: References, kind: Kind, folder: Path, rng: random.Random) -> Try:
    """Kill a run, damage one of its files, resume; if that is refused, restore it and resume.

    Any file is cut short; bytes are changed in weights, which carry a checksum.
    """
    expected, seconds = references.of(kind)
    out, kept = folder / "out", folder / "kept"
    process = start(kind.begin(folder), folder / "first.log")
    process.wait(rng.uniform(0.3, 0.95) * seconds)
    kill_all(process, rng)
    if not (out / "run.json").exists():
        return resumed(references, kind, folder, time.monotonic())
    victim = rng.choice(sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"))
    data = bytearray(victim.read_bytes())
    shutil.copytree(out, kept)
    if data and victim.suffix == ".safetensors" and rng.random() < 0.5:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif data:
        del data[rng.randrange(len(data)) :]
    victim.write_bytes(bytes(data))
    again = start(kind.resume(folder), folder / "again.log")
    wrong = again.end_or_refuse()
    if again.end() == 0:
        wrong += ended(kind, expected, folder)
    else:
        shutil.rmtree(out)
        kept.rename(out)
        wrong += resumed(references, kind, folder, time.monotonic()).wrong
    return Try([f"{victim.relative_to(out)} damaged: {text}" for text in wrong])


def cluster(act: str) -> Do:
    """Return a try on a Ray cluster of three nodes, in a network of its own (loopback only)."""

    def do(references: References, kind: Kind, folder: Path, rng: random.Random) -> Try:
        expected, seconds = references.of(kind)
        order = {
            "act": act,
            "begin": kind.begin(folder),
            "resume": ["nas.contract", "--resume", str(folder / "out"), "--cache-dir", str(folder / "cache")],
            "folder": str(folder),
            "after": rng.uniform(0.2, 0.9) * seconds,
            "copy_files": folder.name.endswith(EVEN),
        }
        (folder / "order.json").write_text(json.dumps(order))
        code = f"from benchmarks.faults.cluster import main; main({str(folder / 'order.json')!r})"
        command = ["unshare", "-n", "sh", "-c", f'ip link set lo up && exec {sys.executable} -c "$0"', code]
        with (folder / "first.log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=log, timeout=600, check=False)
        result = folder / "cluster.json"
        if done.returncode or not result.exists():
            return Try([f"the cluster ended with status {done.returncode}"])
        found = json.loads(result.read_text())
        wrong = [*found["wrong"], *ended(kind, expected, folder)]
        sent = Path(tempfile.gettempdir()).glob("vision-contraction-*")
        return Try(wrong + [f"left on a node: {path}" for path in sent], found["took_s"])

    return do


def cluster_run(references: References, rng: random.Random) -> Kind:
    """Return a small contraction whose workers are the cluster's."""
    return references.contract()


def published(references: References, rng: random.Random) -> Kind:
    """Return the headline contraction: TinyViT-21M to 5M, effort smoke, on a quarter of its images.

    Its cache is warm: what a kill does to data, teacher, labels and the seed is for the small runs.
    """
    return references.contract(seed="21M", size="--target-params 5M --max-images 200", warm=True)


FAULTS: dict[str, Fault] = {
    "kill -9 of the driver": Fault(15, small_run, disturbed(kill_driver)),
    "kill -9 of a worker": Fault(12, small_run, disturbed(kill_worker, continues=True)),
    "kill -9 of everything at once": Fault(10, small_run, disturbed(kill_all)),
    "kill -9 of the label builder": Fault(18, builders, disturbed(either)),
    "kill -9 of a worker that builds labels": Fault(8, builders, disturbed(kill_worker, continues=True)),
    "kill -9 of the trainer": Fault(27, trainer, disturbed(kill_driver)),
    "SIGTERM, then SIGKILL after 5 s": Fault(5, small_run, disturbed(terminate)),
    "Ctrl-C twice": Fault(5, small_run, disturbed(interrupt_twice)),
    "the clock jumps back": Fault(3, small_run, clock_back),
    "the disk is full": Fault(6, small_run, disk_full),
    "the disk is read-only": Fault(1, small_run, read_only),
    "the database is locked": Fault(3, small_run, locked),
    "a file of the run is damaged": Fault(8, small_run, damaged),
    "Ray: a node removed in every step": Fault(2, cluster_run, cluster("node"), solo=True),
    "Ray: the driver killed": Fault(2, cluster_run, cluster("driver"), solo=True),
    "Ray: the head lost": Fault(2, cluster_run, cluster("head"), solo=True),
    "kill -9 of the driver, TinyViT-21M": Fault(10, published, disturbed(kill_driver), solo=True),
}
