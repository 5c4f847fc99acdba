"""Speed and memory of training from stored labels, against bare training and an online teacher."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from nas.core.cpus import read_threads
from nas.data import Dataset, DataSpec, prepare
from nas.export.trained_teacher import TeacherInfo
from nas.export.weights import place
from nas.labels.build import begin_store, build_shards
from nas.labels.reader import Batch, LabelReader
from nas.labels.request import LabelRequest
from nas.labels.store import LabelStore, open_store
from nas.measure.intervals import median_interval
from nas.train.losses import DistillLoss, TeacherTargets
from nas.train.optim import make_optimizer
from space import Context, get_family

Row = dict[str, Any]
Step = Callable[[], None]

SMALL = {
    "embed_dims": [32, 64, 128, 192],
    "depths": [1, 2, 4, 2],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}
"""About a tenth of the 21M's parameters."""
BATCH, STEPS = 32, 6
"""Images of a step, and steps of a block."""
IMAGES = 1000
"""Training images of an epoch; `epoch_s` is for so many."""
WAYS = ("none", "online", "replay")


def fractals(cache: Path, img_size: int, images: int) -> Dataset:
    """Render or find formula-driven images: 100 classes, about so many to train on."""
    return prepare(DataSpec("fractals", img_size=img_size, proxy_images=round(images / 0.8)), cache)


def label_store(cache: Path, dataset: Dataset, engine: str, epochs: int = 2) -> LabelStore:
    """Build or find a store by a fixed random linear teacher: any labels cost the same."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3 * dataset.img_size**2, dataset.num_classes, generator=generator) * 0.05
    numbers = dict.fromkeys(("epochs", "holdout_top1", "holdout_top1_se", "holdout_images"), 0)
    info = TeacherInfo(
        folder="",
        id="linear",
        digest="0" * 32,
        model="linear",
        kwargs={},
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        input_size=None,
        student_mean=dataset.mean,
        student_std=dataset.std,
        notes=(),
        **numbers,
    )
    request = LabelRequest(epochs=epochs, preset="batched" if engine == "batched" else "default")
    store = begin_store(cache / "labels", dataset, info, request, made_by={}, named=False)
    build_shards(store, dataset, lambda inputs: inputs.flatten(1) @ weights)
    return open_store(store.folder)


def network(name: str, dataset: Dataset, device: str) -> torch.nn.Module:
    """Build a published TinyViT, or the small one, with the same fresh weights every time."""
    family = get_family("tinyvit")
    arch = family.arch(SMALL) if name == "small" else family.seed(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.build(arch, Context(dataset.img_size, dataset.num_classes))
    return place(model, device)


class Student:
    """One student and its steps; every way trains a student of its own."""

    def __init__(self, name: str, dataset: Dataset, device: str) -> None:
        self.model = network(name, dataset, device).train()
        self.optimizer = make_optimizer(self.model, lr=1e-4, weight_decay=0.05)
        self.device = device
        self.loss = DistillLoss()

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
            targets = TeacherTargets(index=index, prob=prob, tail=tail)
            loss = self.loss(logits, truth, targets).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimize:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()


def endless(replay: LabelReader) -> Iterator[Batch]:
    """Replay epoch after epoch."""
    epoch = 0
    while True:
        yield from replay.epoch(epoch)
        epoch += 1


def alternate(ways: Mapping[str, Step], blocks: int, device: str) -> dict[str, list[float]]:
    """Run the ways in turn, forwards and backwards: seconds a block, the first round left out."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(blocks + 1):
        for name in list(ways)[:: 1 if block % 2 else -1]:
            if device != "cpu":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            for _ in range(STEPS):
                ways[name]()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if block:
                found[name].append(time.perf_counter() - started)
    return found


def epoch_row(part: str, student: str, teacher: str, way: str, against: str, **more: Any) -> Row:
    """Return one row of the epoch table, from seconds a block of the way and the base."""
    seconds, ratios = more["seconds"], more["ratios"]
    at, pace = median_interval(ratios), STEPS * BATCH / sorted(seconds)[len(seconds) // 2]
    return {
        **{"part": part, "student": student, "teacher": teacher, "way": way, "against": against},
        **{"ratio": at.median, "lo": at.lo, "hi": at.hi, "images_per_s": pace},
        **{"epoch_s": IMAGES / pace, "peak_mem_mb": None, "blocks": len(ratios), "batch": BATCH},
    }


def compare_engines(
    student: str, dataset: Dataset, stores: Mapping[str, LabelStore], given: argparse.Namespace
) -> list[Row]:
    """Compare replayed with resident batches, both engines."""
    device = given.device
    resident = next(LabelReader(dataset.train, stores["timm"], BATCH, 0).epoch(0)).to(device)
    own = {n: Student(student, dataset, device) for n in ("resident", "bare", "timm", "batched")}
    batches = {
        e: endless(LabelReader(dataset.train, stores[e], BATCH, 0, device=device)) for e in stores
    }
    ways: dict[str, Step] = {
        "resident": lambda: own["resident"].step(resident),
        "bare": lambda: own["bare"].step(resident, optimize=False),
        "timm": lambda: own["timm"].step(next(batches["timm"])),
        "batched": lambda: own["batched"].step(next(batches["batched"])),
    }
    took = alternate(ways, given.blocks, device)
    rows = []
    for engine in stores:
        for against in ("resident", "bare"):
            ratios = [a / b for a, b in zip(took[against], took[engine], strict=True)]
            seconds = took[engine]
            rows.append(
                epoch_row("share", student, "", engine, against, ratios=ratios, seconds=seconds)
            )
    return rows


def way_of(
    name: str, student: str, teacher: str, dataset: Dataset, store: LabelStore, device: str
) -> Step:
    """Return the step of one way: augmentation in all, the teacher's pass where it runs."""
    own = Student(student, dataset, device)
    batches = endless(LabelReader(dataset.train, store, BATCH, 0, device=device))
    if name != "online":
        return lambda: own.step(next(batches), hard=name == "none")
    net = network(teacher, dataset, device).eval()

    def online() -> None:
        batch = next(batches)
        with torch.no_grad():
            inputs = batch.inputs.to(device, memory_format=torch.channels_last)
            said = torch.softmax(net(inputs).float(), 1)
        prob, index = said.topk(store.spec.topk, dim=1)
        tail = (1 - prob.sum(1)).clamp(min=0)
        own.step(Batch(batch.inputs, index, prob, tail, batch.truth, batch.rows))

    return online


def peak_mem_mb(
    way: str, student: str, teacher: str, img_size: int, cache: Path, threads: int, device: str
) -> float:
    """Take a few steps of one way and return this process's peak memory in MB."""
    torch.set_num_threads(threads)
    dataset = fractals(cache, img_size, IMAGES)
    store = label_store(cache, dataset, "timm")
    step = way_of(way, student, teacher, dataset, store, device)
    for _ in range(8):
        step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    # What `getrusage` reports on Linux may be what the parent had when it forked.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [float(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure_epochs(given: argparse.Namespace, cache: Path) -> list[Row]:
    """Measure both engines and all ways; one row each."""
    torch.set_num_threads(read_threads(given.threads))
    dataset = fractals(cache, given.img_size, IMAGES)
    stores = {engine: label_store(cache, dataset, engine) for engine in ("timm", "batched")}
    rows = [r for s in given.students for r in compare_engines(s, dataset, stores, given)]
    for student, teacher in (("small", "small"), ("small", "21M")):
        own = (student, teacher, dataset, stores["timm"], given.device)
        took = alternate({name: way_of(name, *own) for name in WAYS}, given.blocks, given.device)
        for name in WAYS:
            ratios = [a / b for a, b in zip(took[name], took["none"], strict=True)]
            row = epoch_row(
                "way", student, teacher, name, "none", ratios=ratios, seconds=took[name]
            )
            asked = (name, student, teacher, given.img_size, cache, given.threads, given.device)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(row | {"peak_mem_mb": pool.submit(peak_mem_mb, *asked).result()})
    return rows
