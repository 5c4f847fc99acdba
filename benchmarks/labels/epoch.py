"""Speed and memory of training from stored labels, against bare training and an online teacher."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimates import Row
from nas.core.cli import read_threads
from nas.data import Dataset, DataSpec, prepare
from nas.distill.student import batch_loss
from nas.export.teacher_net import TeacherInfo
from nas.export.weights import place
from nas.labels.build import begin_store, build_shards
from nas.labels.reader import Batch, LabelReader
from nas.labels.request import LabelRequest
from nas.labels.store import LabelStore, open_store
from nas.measure.intervals import median_interval
from nas.measure.memory import highest_resident_bytes
from nas.train.losses import DistillLoss
from nas.train.optim import make_optimizer
from space import Context, get_family

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
WAYS = ("none", "online", "replay", "replay batched", "resident", "bare")
"""Hard labels; a teacher in the loop; stored labels, image by image and by the batched engine; the same tensors again
and again, with and without the optimizer."""
COMPARED = (
    *(("online", "none"), ("replay", "none"), ("replay batched", "none")),
    *(("replay", "resident"), ("replay batched", "resident"), ("replay", "bare")),
)


def fractals(cache: Path, img_size: int, images: int = IMAGES) -> Dataset:
    """Render or find formula-driven images: 100 classes, about so many to train on."""
    return prepare(DataSpec("fractals", img_size=img_size, max_images=round(images / 0.8)), cache)


def label_stores(cache: Path, dataset: Dataset, epochs: int = 2) -> dict[str, LabelStore]:
    """Build or find a store of either engine by a fixed random linear teacher: any labels cost the same."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3 * dataset.img_size**2, dataset.num_classes, generator=generator) * 0.05
    normalized: dict[str, Any] = {"mean": dataset.mean, "std": dataset.std}
    zeros: dict[str, Any] = dict.fromkeys(("epochs", "holdout_top1", "holdout_top1_se", "holdout_images"), 0)
    info = TeacherInfo(
        **zeros,
        **normalized,
        **{f"student_{name}": value for name, value in normalized.items()},
        folder="",
        id="linear",
        digest="0" * 32,
        model="linear",
        kwargs={},
        classes=dataset.classes,
        input_size=None,
        notes=(),
    )
    found = {}
    for engine, augment in (("timm", "default"), ("batched", "batched")):
        request = LabelRequest(epochs=epochs, augment=augment)
        store = begin_store(cache / "labels", dataset, info, request, made_by={}, named=False)
        build_shards(store, dataset, lambda inputs: inputs.flatten(1) @ weights)
        found[engine] = open_store(store.folder)
    return found


def network(name: str, dataset: Dataset, device: str) -> torch.nn.Module:
    """Build a published TinyViT, or the small one, with the same fresh weights every time."""
    family = get_family("tinyvit")
    arch = family.arch(SMALL) if name == "small" else family.seed(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.build(arch, Context(dataset.img_size, dataset.num_classes))
    return place(model, device)


def endless(reader: LabelReader) -> Iterator[Batch]:
    """Read epoch after epoch."""
    epoch = 0
    while True:
        yield from reader.epoch(epoch)
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


def step_of(
    way: str, student: str, teacher: str, dataset: Dataset, stores: Mapping[str, LabelStore], device: str
) -> Step:
    """Return the training step of one way, as the proxy takes it, on a student of its own; see `WAYS`."""
    model = network(student, dataset, device).train()
    optimizer = make_optimizer(model, lr=1e-4, weight_decay=0.05)
    store = stores["batched" if way == "replay batched" else "timm"]
    batches = endless(LabelReader(dataset.train, store, BATCH, 0, device=device))

    def step(batch: Batch) -> None:
        if way == "none":
            inputs = batch.inputs.to(device, memory_format=torch.channels_last)
            loss = torch.nn.functional.cross_entropy(model(inputs).float(), batch.truth.to(device))
        else:
            loss = batch_loss(model, batch, DistillLoss(), device).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if way != "bare":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    if way in ("resident", "bare"):
        resident = next(batches).to(device)
        return lambda: step(resident)
    if way != "online":
        return lambda: step(next(batches))
    net = network(teacher, dataset, device).eval()

    def online() -> None:
        batch = next(batches)
        with torch.no_grad():
            taught = torch.softmax(net(batch.inputs.to(device, memory_format=torch.channels_last)).float(), 1)
        prob, index = taught.topk(store.spec.topk, dim=1)
        tail = (1 - prob.sum(1)).clamp(min=0)
        step(Batch(batch.inputs, index, prob, tail, batch.truth, batch.rows))

    return online


def peak_mem_mb(way: str, student: str, teacher: str, img_size: int, cache: Path, threads: int, device: str) -> float:
    """Take a few steps of one way and return this process's peak memory in MB."""
    torch.set_num_threads(threads)
    dataset = fractals(cache, img_size)
    step = step_of(way, student, teacher, dataset, label_stores(cache, dataset), device)
    for _ in range(8):
        step()
    return (highest_resident_bytes() if device == "cpu" else torch.cuda.max_memory_allocated()) / 1e6


def measure_epochs(given: argparse.Namespace, cache: Path) -> list[Row]:
    """Measure all ways of every student; a row for each way and what it is compared with.

    `ratio`, with its interval, is the way's images/s over those of `against`.
    """
    torch.set_num_threads(read_threads(given.threads))
    dataset = fractals(cache, given.img_size)
    stores, rows = label_stores(cache, dataset), list[Row]()
    for student in given.students:
        steps = {way: step_of(way, student, given.teacher, dataset, stores, given.device) for way in WAYS}
        took = alternate(steps, given.blocks, given.device)
        memory: dict[str, float] = {}
        for way, against in COMPARED:
            if way not in memory:
                asked = (way, student, given.teacher, given.img_size, cache, given.threads, given.device)
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    memory[way] = pool.submit(peak_mem_mb, *asked).result()
            ratio = median_interval([a / b for a, b in zip(took[against], took[way], strict=True)])
            pace = STEPS * BATCH / sorted(took[way])[given.blocks // 2]
            row: Row = {"student": student, "teacher": given.teacher, "way": way, "against": against}
            row |= {"ratio": ratio.median, "lo": ratio.lo, "hi": ratio.hi, "images_per_s": pace}
            row |= {"epoch_s": IMAGES / pace, "peak_mem_mb": memory[way], "blocks": given.blocks, "batch": BATCH}
            rows.append(row)
    return rows
