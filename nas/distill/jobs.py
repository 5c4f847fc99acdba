"""Jobs that train teachers and students, and score students with little or no training."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from nas.core.augment_config import AugmentConfig
from nas.core.dataclass_json import to_json
from nas.core.io import file_sha256, read_json, remove_leftovers, write_json
from nas.core.metrics import mean_se
from nas.core.progress import Tick
from nas.inherit.jobs import StudentJob
from nas.jobs.job import CHECKPOINT, READS, READS_LAST, WRITES, Values
from space import get_family
from space.errors import refuse

if TYPE_CHECKING:
    from nas.data import Dataset
    from nas.distill.student import ParentNetwork
    from nas.labels.reader import Batch, LabelReader
    from nas.labels.store import LabelStore


@dataclass(frozen=True, kw_only=True)
class TeacherJob:
    """A teacher by its name (`nas.export.load`), to be made for a data set; `augment` replaces parts of its
    augmentation."""

    dataset: Path
    cache: Path
    teacher: str
    epochs: int
    random_seed: int
    device: str
    threads: int
    augment: AugmentConfig


@dataclass(frozen=True, kw_only=True)
class ParentWeights:
    """A trained arch (as JSON), its weights and the order of importance of its units, if any."""

    arch: Mapping[str, Any]
    weights: Path = field(metadata=READS)
    order: Path | None = field(default=None, metadata=READS)


@dataclass(frozen=True, kw_only=True)
class EarlierRung:
    """An earlier rung of a race: the epochs that it trained, and where it stopped."""

    epochs: int
    checkpoint: Path = field(metadata=READS_LAST)


@dataclass(frozen=True, kw_only=True)
class TrainJob(StudentJob):
    """A student to train on stored labels, and all that decides the outcome.

    `init` is `scratch`, `inherit` (from `parent`) or `file:SOURCE`. Epoch e trains on the store's epoch `first_epoch`
    + e, so that all candidates see the same batches. `rung` stops after so many of the `epochs`; `continue_from`
    continues an earlier rung. `images` trains on a fixed subset of that size. `label_overflow` and `label_epochs` are
    those of `nas.labels.reader.LabelReader`. `hard_weight` is the share of the loss that goes by true labels;
    `distill` other than `sparse` is a `nas.train.losses.DistillLoss`. With `checkpoint` a killed training continues
    at its last epoch. `check_mirror` adds a note where mirrored images harm it. The folder `out` may be `shared` by
    several runs.
    """

    store_id: str
    label_epochs: int | None
    label_overflow: str
    epochs: int
    lr: float
    init: str
    parent: ParentWeights | None = None
    first_epoch: int = 0
    images: int | None = None
    distill: str = "sparse"
    hard_weight: float = 0.0
    rung: int | None = None
    continue_from: EarlierRung | None = None
    checkpoint: bool = False
    test: bool = False
    check_mirror: bool = False
    shared: bool = False
    out: Path = field(metadata=WRITES)


@dataclass(frozen=True, kw_only=True)
class ScoreJob(StudentJob):
    """A student to score with a parent's weights, without training.

    With `recalibrate`, batch norms are first estimated anew on the images that a training of this random seed sees
    first.
    """

    label_epochs: int | None
    label_overflow: str
    parent: ParentWeights
    recalibrate: bool
    images: int | None = None
    out: Path = field(metadata=WRITES)


@dataclass(frozen=True, kw_only=True)
class ZeroCostJob(StudentJob):
    """An untrained student to score on the first `images` images that a training would see."""

    images: int


def train_teacher(job: TeacherJob, tick: Tick) -> Values:
    """Make a teacher, or find it in the cache: `{"info": ..., "message": line}`."""
    from nas.data import open_dataset
    from nas.distill.teacher import make_teacher
    from nas.export.load import find_network

    info = make_teacher(
        find_network(job.teacher, "--teacher"),
        open_dataset(job.dataset),
        job.cache,
        random_seed=job.random_seed,
        epochs=job.epochs,
        device=job.device,
        threads=job.threads,
        augment=job.augment,
        tick=tick,
    )
    message = f"{info.id} ({info.model}), holdout top-1 {info.holdout_top1:.1%} +- {info.holdout_top1_se:.1%}"
    return {"info": to_json(info), "message": message}


def train(job: TrainJob, tick: Tick) -> Values:
    """Train an arch on stored labels and score it; leaves the folder `out` whole.

    It then holds weights.safetensors, holdout.safetensors (per image), with `test` test.safetensors too, and
    result.json with the values that are returned. With `rung`, it holds checkpoint.safetensors in place of the
    weights, from which the next rung continues, on the CPU to the same bits as without a stop.
    """
    part = job.out.with_name(f"{job.out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    # Only a folder of the shared cache has several writers; a run's own has its driver.
    lock = FileLock(job.out.with_name(f"{job.out.name}.lock")) if job.shared else nullcontext()
    with lock:
        if (job.out / "result.json").is_file():  # another run finished it while this one waited
            finished: Values = read_json(job.out / "result.json", "a finished training")["values"]
            return finished
        remove_leftovers(part)  # of a worker that was killed
        return _train_into(job, part, tick)


def _train_into(job: TrainJob, part: Path, tick: Tick) -> Values:
    from nas.data import open_dataset
    from nas.data.augment.mirror import flip_notes
    from nas.data.augment.views import EVAL_BATCH
    from nas.distill.student import Evaluation, evaluate, proxy_settings, start_model, train_on_labels
    from nas.export.weights import save_weights
    from nas.inherit.batchnorm import first_inputs
    from nas.labels.reader import holdout_batches
    from nas.labels.store import open_store
    from nas.measure.macs import fvcore_macs
    from nas.train.evaluate import evaluate as evaluate_split
    from nas.train.losses import DistillLoss
    from nas.train.norms import settle

    started = time.monotonic()
    family, context, rung, before = get_family(job.family), job.context, job.rung, job.continue_from
    arch = family.arch(job.arch)
    dataset = open_dataset(job.dataset)
    store = open_store(job.store, use=dataset)
    parent, notes = _parent_of(job, part, dataset.classes)
    checkpoint = None
    if job.checkpoint or rung is not None or before is not None:
        checkpoint = part / CHECKPOINT
        if before is not None and not checkpoint.exists():
            _take_over(before.checkpoint, checkpoint)
    if before is not None:
        tick = _without(tick, float(before.epochs * (job.images or len(dataset.train))))
    assert job.distill == "sparse" or not job.hard_weight, "one loss"
    reader = label_reader(job, dataset, store)
    resumed = checkpoint is not None and checkpoint.exists()  # it has its own statistics
    model, copied = start_model(
        family,
        arch,
        context,
        random_seed=job.random_seed,
        parent=parent,
        inputs=None if resumed else first_inputs(reader, job.first_epoch),
        device=job.device,
    )
    history, lost = train_on_labels(
        model,
        reader,
        DistillLoss(job.distill, hard_weight=job.hard_weight),
        proxy_settings(job.epochs, job.lr, batch_size=job.batch_size),
        random_seed=job.random_seed,
        first_epoch=job.first_epoch,
        device=job.device,
        checkpoint=checkpoint,
        stop_after=rung,
        tick=tick,
    )
    settle(model, dataset.train, store.spec.augment, updates=reader.steps_per_epoch, device=job.device)
    held = holdout_batches(dataset, store, EVAL_BATCH, job.missing)
    scored = evaluate(model, held, dataset.holdout.labels, job.device, tick)
    scored.save(part / "holdout.safetensors")
    mirror = flip_notes(model, dataset, store.spec.augment, device=job.device) if job.check_mirror else []
    weights = part / "weights.safetensors"
    values: Values = {
        **scored.scores(),
        "holdout_images": len(scored.truth),
        "train_loss": history.final_loss,
        "epochs": len(history.epochs),
        "images": sum(e.images for e in history.epochs),
        "images_per_s": history.images_per_s,
        "seconds": time.monotonic() - started,
        "copied": copied,
        "weights_digest": save_weights(weights, model.state_dict()),
        "notes": [*notes, *reader.notes, *lost, *mirror],
    }
    if job.test:
        found = evaluate_split(
            model, dataset.test, store.spec.augment, num_classes=context.num_classes, device=job.device
        )
        tested = Evaluation(found.loss, found.predicted, found.truth)
        tested.save(part / "test.safetensors")
        top1, top1_se = mean_se(tested.correct)
        values.update(test_top1=top1, test_top1_se=top1_se, test_n=len(tested.correct))
        values["fvcore_macs"] = fvcore_macs(family.build(arch, context), context)
        assert values["fvcore_macs"] == family.count_macs(arch, context), "the counts disagree"
    # The checkpoint of a rung is for the next one; its weights are of no use to anyone.
    for spent in (part / "adopted.safetensors", part / CHECKPOINT if rung is None else weights):
        spent.unlink(missing_ok=True)
    finish_folder(job.out, part, values, started)
    return values


def label_reader(job: TrainJob | ScoreJob, dataset: Dataset, store: LabelStore) -> LabelReader:
    """Return the batches that a training sees."""
    from nas.data.dataset import subset_by_key
    from nas.labels.reader import LabelReader

    # On a CPU training itself needs every core.
    workers = 0 if job.device == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))
    return LabelReader(
        dataset.train,
        store,
        job.batch_size,
        job.random_seed,
        workers,
        subset_by_key(dataset.train, job.images),
        missing=job.missing,
        label_overflow=job.label_overflow,
        epochs=job.label_epochs,
        device=job.device,
    )


def _parent_of(job: TrainJob, part: Path, classes: Sequence[str]) -> tuple[ParentNetwork | None, list[str]]:
    """Return the network whose weights a training starts from, and notes for the user."""
    from nas.distill.student import ParentNetwork
    from nas.inherit.slice import load_seed_weights

    init, _, source = job.init.partition(":")
    if init == "file":
        family, weights = get_family(job.family), part / "adopted.safetensors"
        arch = family.arch(job.arch)
        made_in, rows, note = load_seed_weights(family, arch, job.context, source, weights, classes)
        return ParentNetwork(arch=arch, weights=weights, context=made_in, class_rows=rows), [note]
    if init == "scratch":
        return None, []
    assert job.parent is not None, "inheriting takes a parent"
    return _network_of(job.family, job.parent), []


def _network_of(family: str, parent: ParentWeights) -> ParentNetwork:
    from nas.distill.student import ParentNetwork
    from nas.inherit.importance import load_order

    order = None if parent.order is None else load_order(parent.order)
    return ParentNetwork(arch=get_family(family).arch(parent.arch), weights=parent.weights, order=order)


def _take_over(before: Path, checkpoint: Path) -> None:
    """Copy the checkpoint of an earlier rung; refuse when it is gone."""
    aside = checkpoint.with_name(f".{checkpoint.name}.tmp")
    try:
        shutil.copyfile(before, aside)
    except FileNotFoundError:
        raise refuse(str(before), "no such file", "the checkpoint of the rung before", "start a new run") from None
    aside.replace(checkpoint)


def _without(tick: Tick, units: float) -> Tick:
    """Leave out the first `units`, which an earlier rung has reported."""
    left = units

    def after(now: float) -> None:
        nonlocal left
        skipped = min(left, now)
        left -= skipped
        if now > skipped:
            tick(now - skipped)

    return after


def empty_part(out: Path) -> Path:
    """Make the folder that `finish_folder` puts in place; nothing in an earlier one is worth continuing from."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def finish_folder(out: Path, part: Path, values: Values, started: float) -> None:
    """Put a job's folder in place with its result, whole."""
    files = {path.name: file_sha256(path) for path in sorted(part.glob("*.safetensors"))}
    seconds = time.monotonic() - started
    write_json(part / "result.json", {"values": values, "files": files, "seconds": seconds})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)


def score(job: ScoreJob, tick: Tick) -> Values:
    """Slice a parent's weights into an arch and score it on the holdout; no training.

    Leaves the folder `out` whole, with holdout.safetensors (per image) and result.json; returns
    soft_loss (nats) and top1 with their standard errors over images.
    """
    from nas.data import open_dataset
    from nas.data.augment.views import EVAL_BATCH
    from nas.distill.student import evaluate, start_model
    from nas.export.weights import place
    from nas.inherit.batchnorm import first_inputs
    from nas.labels.reader import holdout_batches
    from nas.labels.store import open_store

    started = time.monotonic()
    part = empty_part(job.out)
    family, dataset = get_family(job.family), open_dataset(job.dataset)
    store = open_store(job.store, use=dataset)
    model, _ = start_model(
        family,
        family.arch(job.arch),
        job.context,
        random_seed=job.random_seed,
        parent=_network_of(job.family, job.parent),
        inputs=first_inputs(label_reader(job, dataset, store), 0) if job.recalibrate else None,
        device=job.device,
    )
    held = holdout_batches(dataset, store, EVAL_BATCH, job.missing)
    scored = evaluate(place(model, job.device), held, dataset.holdout.labels, job.device, tick)
    values = scored.scores()
    scored.save(part / "holdout.safetensors")
    finish_folder(job.out, part, values, started)
    return values


def zero_cost(job: ZeroCostJob, tick: Tick) -> Values:
    """Score an arch by each of `nas.distill.zero_cost.ZERO_COST`, and return on how many `images`.

    The batch joins the first batches of a training until they hold as many images as asked (all of the first epoch
    where that has fewer).
    """
    from nas.data import open_dataset
    from nas.distill.zero_cost import zero_cost_scores
    from nas.labels.reader import LabelReader
    from nas.labels.store import open_store

    if job.images < 2:
        raise refuse("images", job.images, "an integer >= 2 (images are compared)")
    family, dataset = get_family(job.family), open_dataset(job.dataset)
    store = open_store(job.store, use=dataset)
    reader = LabelReader(dataset.train, store, job.batch_size, job.random_seed, missing=job.missing, device=job.device)
    batch = _first_images(reader, job.images)
    scores = zero_cost_scores(
        family, family.arch(job.arch), job.context, batch, random_seed=job.random_seed, device=job.device
    )
    tick(float(len(batch.rows)))
    return {**scores, "images": len(batch.rows)}


def _first_images(reader: LabelReader, images: int) -> Batch:
    """Join the first batches until they hold `images` images."""
    import torch

    from nas.labels.reader import Batch

    found: list[Batch] = []
    for batch in reader.epoch(0):
        found.append(batch)
        if sum(len(b.rows) for b in found) >= images:
            break
    return Batch(*(torch.cat([getattr(b, f.name) for b in found])[:images] for f in fields(Batch)))
