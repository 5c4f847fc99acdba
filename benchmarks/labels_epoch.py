"""What distillation from stored labels costs: a proxy epoch against bare training, and against a
teacher that runs along.

    python -m benchmarks.labels_epoch [--students 5M] [--img-size 48] [--threads N]
                                      [--blocks N] [--device cpu] [--out CSV]

1. Share: images/s of training steps on replayed inputs and labels - image by image with timm's
   transforms, and with the batched engine - over those of the same steps on tensors that are
   there already. Once with the optimizer on both sides, once against forward and backward alone.
2. Ways: seconds an epoch and peak memory without distillation (the same inputs, hard labels), with
   a teacher in the loop, and with replay; for a teacher of the student's size and one about ten
   times larger (TinyViT, fresh weights: only time is looked at). Memory is that of a process of
   its own each.

All ways take turns block by block in one process; a ratio is the median over blocks, with a
distribution-free interval. Data: the formula-driven images, 100 classes. Prints tables and, as its
last line, JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.labels_stock import SMALL, data_for, store_for, teacher_of
from nas.core.cpus import read_threads
from nas.core.io import write_atomic
from nas.core.table import Writer
from nas.data import Dataset
from nas.export.weights import place
from nas.labels.reader import Batch, Replay
from nas.labels.store import LabelStore
from nas.measure.fingerprint import take_fingerprint
from nas.measure.intervals import median_interval
from nas.train.loop import TrainSettings, make_optimizer
from nas.train.losses import SoftLoss
from space import Context, InputError, get_family
from space.errors import refuse

COLUMNS = (
    "part",
    "student",
    "teacher",
    "way",
    "against",
    "ratio",
    "lo",
    "hi",
    "images_per_s",
    "epoch_s",
    "peak_mem_mb",
    "blocks",
    "batch",
    "img_size",
    "threads",
    "device",
    "fingerprint",
)
BATCH = 32
IMAGES = 1000
"""Training images of an epoch here; seconds an epoch are told for so many."""
WAYS = ("none", "online", "replay")
Step = Callable[[], None]


class Trainer:
    """One student and its steps; every way trains a student of its own, from the same weights."""

    def __init__(self, student: str, classes: int, img_size: int, device: str) -> None:
        family = get_family("tinyvit")
        arch = family.arch(SMALL) if student == "small" else family.seed(student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = place(family.build(arch, Context(img_size, classes)), device).train()
        self.optimizer = make_optimizer(self.model, TrainSettings(epochs=1, lr=1e-4))
        self.device = device
        self.loss = SoftLoss()

    def step(self, batch: Batch, *, optimize: bool = True, hard: bool = False) -> None:
        """Take one training step as the proxy takes it."""
        inputs = batch.inputs.to(self.device, memory_format=torch.channels_last)
        index, prob, tail, truth = (
            t.to(self.device) for t in (batch.index, batch.prob, batch.tail, batch.truth)
        )
        logits = self.model(inputs)
        if hard:
            loss = torch.nn.functional.cross_entropy(logits.float(), truth)
        else:
            loss = self.loss(logits, index, prob, tail).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimize:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()


def endless(replay: Replay) -> Iterator[Batch]:
    """Replay epoch after epoch."""
    epoch = 0
    while True:
        yield from replay.epoch(epoch)
        epoch += 1


def timed(work: Step, steps: int, device: str) -> float:
    """Seconds of so many steps."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def interleaved(
    ways: dict[str, Step], steps: int, blocks: int, device: str
) -> dict[str, list[float]]:
    """Let the ways take turns: seconds a block each, the first round being warm-up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for block in range(blocks + 1):
        for name in order if block % 2 else reversed(order):
            seconds = timed(ways[name], steps, device)
            if block:
                found[name].append(seconds)
    return found


def shares(
    student: str, dataset: Dataset, stores: dict[str, LabelStore], blocks: int, device: str
) -> list[dict[str, Any]]:
    """Compare replayed with resident batches, both engines."""
    ways: dict[str, Step] = {}
    resident = next(Replay(dataset.train, stores["timm"], BATCH, 0).epoch(0)).to(device)
    own = {
        name: Trainer(student, dataset.num_classes, dataset.img_size, device)
        for name in ("resident", "bare", "timm", "batched")
    }
    ways["resident"] = lambda: own["resident"].step(resident)
    ways["bare"] = lambda: own["bare"].step(resident, optimize=False)
    for engine in ("timm", "batched"):
        batches = endless(Replay(dataset.train, stores[engine], BATCH, 0, device=device))
        ways[engine] = lambda batches=batches, t=own[engine]: t.step(next(batches))  # type: ignore[misc]
    seconds = interleaved(ways, 6, blocks, device)
    rows = []
    for engine in ("timm", "batched"):
        for against in ("resident", "bare"):
            ratios = [a / b for a, b in zip(seconds[against], seconds[engine], strict=True)]
            rows.append(_row("share", student, "", engine, against, ratios, seconds[engine], 6))
    return rows


def _row(
    part: str,
    student: str,
    teacher: str,
    way: str,
    against: str,
    ratios: list[float],
    seconds: list[float],
    steps: int,
) -> dict[str, Any]:
    found = median_interval(ratios)
    middle, lo, hi = found.median, found.lo, found.hi
    pace = steps * BATCH / sorted(seconds)[len(seconds) // 2]
    return {
        "part": part,
        "student": student,
        "teacher": teacher,
        "way": way,
        "against": against,
        "ratio": round(middle, 4),
        "lo": round(lo, 4),
        "hi": round(hi, 4),
        "images_per_s": round(pace, 1),
        "epoch_s": round(IMAGES / pace, 2),
        "peak_mem_mb": "",
        "blocks": len(ratios),
        "batch": BATCH,
    }


def way_of(
    name: str, student: str, teacher: str, dataset: Dataset, store: LabelStore, device: str
) -> Step:
    """Make the step of one way: augmentation included in all, the teacher's pass where it runs."""
    own = Trainer(student, dataset.num_classes, dataset.img_size, device)
    batches = endless(Replay(dataset.train, store, BATCH, 0, device=device))
    if name == "replay":
        return lambda: own.step(next(batches))
    if name == "none":
        return lambda: own.step(next(batches), hard=True)
    net = teacher_of(teacher, dataset, device)

    def online() -> None:
        batch = next(batches)
        with torch.no_grad():
            said = torch.softmax(net(batch.inputs.to(device)).float(), 1)
        prob, index = said.topk(store.spec.topk, dim=1)
        tail = (1 - prob.sum(1)).clamp(min=0)
        own.step(Batch(batch.inputs, index, prob, tail, batch.truth, batch.rows))

    return online


def compare_ways(
    student: str, teacher: str, dataset: Dataset, store: LabelStore, blocks: int, device: str
) -> list[dict[str, Any]]:
    """Compare epochs without distillation, with an online teacher and with replay."""
    ways = {name: way_of(name, student, teacher, dataset, store, device) for name in WAYS}
    seconds = interleaved(ways, 6, blocks, device)
    rows = []
    for name in WAYS:
        ratios = [a / b for a, b in zip(seconds[name], seconds["none"], strict=True)]
        rows.append(_row("way", student, teacher, name, "none", ratios, seconds[name], 6))
    return rows


def peak_mem_mb(way: str, student: str, teacher: str, cache: Path, options: Sequence[str]) -> float:
    """Run a few steps of one way in a process of its own: its peak memory."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.labels_epoch",
            "--one",
            way,
            "--students",
            student,
            "--teacher",
            teacher,
            "--cache-dir",
            str(cache),
            *options,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def _one(arguments: argparse.Namespace) -> int:
    """Be that process."""
    dataset, stores = _stock(arguments)
    step = way_of(
        arguments.one,
        arguments.students[0],
        arguments.teacher,
        dataset,
        stores["timm"],
        arguments.device,
    )
    for _ in range(8):
        step()
    if arguments.device != "cpu":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        print(_peak_of_this_process())
    return 0


def _peak_of_this_process() -> float:
    """Peak resident memory in MB. Linux counts it per program in /proc; what `getrusage` says there
    may be what the parent had when it forked."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1.024e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def _stock(arguments: argparse.Namespace) -> tuple[Dataset, dict[str, LabelStore]]:
    dataset = data_for(arguments.cache_dir, arguments.img_size, IMAGES)
    stores = {
        engine: store_for(arguments.cache_dir, dataset, engine) for engine in ("timm", "batched")
    }
    return dataset, stores


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything; one row each."""
    dataset, stores = _stock(arguments)
    rows: list[dict[str, Any]] = []
    for student in arguments.students:
        rows += shares(student, dataset, stores, arguments.blocks, arguments.device)
    options = [
        "--img-size",
        str(arguments.img_size),
        "--threads",
        str(arguments.threads),
        "--device",
        arguments.device,
    ]
    for student, teacher in (("small", "small"), ("small", "21M")):
        found = compare_ways(
            student, teacher, dataset, stores["timm"], arguments.blocks, arguments.device
        )
        for row in found:
            mem = peak_mem_mb(row["way"], student, teacher, arguments.cache_dir, options)
            row["peak_mem_mb"] = round(mem, 1)
        rows += found
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.labels_epoch", description=__doc__)
    parser.add_argument("--students", nargs="+", default=["5M"], metavar="ARCH")
    parser.add_argument("--img-size", type=int, default=48, metavar="PX")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--blocks", type=int, default=12, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-dir", type=Path, help="default: a folder that is removed again")
    parser.add_argument("--out", type=Path, help="also write the table to this CSV file")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", default="small", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0, or 2 for bad input. The last line is JSON."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.blocks < 6:
            raise refuse("--blocks", arguments.blocks, "an integer >= 6")
        torch.set_num_threads(read_threads(arguments.threads))
        if arguments.cache_dir is None:
            with tempfile.TemporaryDirectory() as folder:
                arguments.cache_dir = Path(folder)
                return _report(arguments)
        return _one(arguments) if arguments.one else _report(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _report(arguments: argparse.Namespace) -> int:
    where = take_fingerprint(arguments.device, arguments.threads)
    rows = measure(arguments)
    common = {
        "img_size": arguments.img_size,
        "threads": arguments.threads,
        "device": arguments.device,
        "fingerprint": where.id,
    }
    text = io.StringIO()
    writer = Writer(text, COLUMNS)
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, **common})
        print(
            f"{row['part']:6} {row['student']:6} {row['teacher']:6} {row['way']:8} / "
            f"{row['against']:8} {row['ratio']:.3f} [{row['lo']:.3f}, {row['hi']:.3f}] "
            f"{row['images_per_s']:8.1f} images/s {row['epoch_s']:7.2f} s {row['peak_mem_mb']} MB"
        )
    if arguments.out:
        write_atomic(arguments.out, text.getvalue().encode())
    print(json.dumps({"rows": rows, **common, "device_name": where.describe()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
