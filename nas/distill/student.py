"""Train a student on stored soft labels, and score it on the holdout."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nas.core.progress import Tick, no_tick
from nas.data import Dataset
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.views import EVAL_BATCH, outputs
from nas.data.dataset import subset_by_key
from nas.export.weights import load_into, load_weights, place, save_weights
from nas.inherit.batchnorm import first_inputs, recalibrate
from nas.inherit.slice import inherit
from nas.labels.reader import Batch, LabelReader, holdout_batches
from nas.labels.store import LabelStore
from nas.train.loop import TrainSettings, train
from nas.train.losses import DistillLoss, TeacherTargets, set_token_training, sparse_soft_cross_entropy
from space import Context
from space.family import Arch, Array, Family


def proxy_settings(epochs: int, lr: float, *, batch_size: int = 32) -> TrainSettings:
    """Give the proxy's recipe for `epochs` epochs at a peak rate (`nas.train.optim.peak_lr`)."""
    warmup = min(1.0, 0.2 * epochs)
    return TrainSettings(epochs=epochs, lr=lr, warmup_epochs=warmup, batch_size=batch_size)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Per image of a split, in its order: soft loss float32 [n] in nats (NaN without labels), the
    class that came first and the true one, int64 [n]."""

    soft_loss: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the true class came first, bool [n]."""
        return np.asarray(self.predicted == self.truth)

    def save(self, path: Path) -> None:
        """Keep the arrays for paired tests as safetensors, and `correct` (uint8) beside them."""
        kept = {name: torch.from_numpy(value) for name, value in vars(self).items()}
        save_weights(path, {**kept, "correct": torch.from_numpy(self.correct).to(torch.uint8)})

    @staticmethod
    def load(path: Path) -> Evaluation:
        """Read what `save` wrote; damaged: refused."""
        kept = load_weights(path, name="per-image scores")
        return Evaluation(*(kept[name].numpy() for name in ("soft_loss", "predicted", "truth")))


@dataclass(frozen=True)
class ProxyScore:
    """What a proxy training yields: plain values.

    `soft_loss`: mean cross-entropy in nats against the teacher's labels of the holdout, `top1`: the
    share of true labels hit there, each with its standard error over images. `weights_digest`
    and the paths are set if weights were asked for. `copied` counts inherited numbers.
    """

    soft_loss: float
    soft_loss_se: float
    top1: float
    top1_se: float
    holdout_images: int
    train_loss: float
    epochs: int
    images: int
    images_per_s: float
    seconds: float
    copied: int
    weights_digest: str | None
    weights: str | None
    per_image: str | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True, eq=False, kw_only=True)
class ParentNetwork:
    """A trained network whose weights a student takes over.

    `context` None: the student's own. `order` tells which of its units and blocks are wanted most
    (`Family.slicing`); None: the first.
    """

    arch: Arch
    weights: Path
    context: Context | None = None
    order: Mapping[str, Array] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentTraining:
    """All that decides a training of an arch on stored labels.

    Fresh weights come from `random_seed` alone; with a `parent` they are sliced from its, and batch
    norms behind a change see the first batches before. Epoch e trains on the store's epoch
    `first_epoch` + e, so that all candidates see the same batches. `images` takes a seeded subset
    of the training images. `missing`, `label_overflow`, `topk` and `label_epochs` (`epochs`) are
    those of `LabelReader`. The score is the plain cross-entropy, whatever `loss` trains; one that
    teaches a distillation token teaches the one head of a net without.
    """

    family: Family
    arch: Arch
    context: Context
    settings: TrainSettings
    random_seed: int
    device: str = "cpu"
    parent: ParentNetwork | None = None
    first_epoch: int = 0
    images: int | None = None
    workers: int = 0
    missing: str = "error"
    label_overflow: str = "cycle"
    label_epochs: int | None = None
    topk: int | None = None
    loss: DistillLoss = field(default_factory=DistillLoss)


def train_and_score(
    training: StudentTraining,
    dataset: Dataset,
    store: LabelStore,
    *,
    out_weights: Path | None = None,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
    tick: Tick = no_tick,
) -> ProxyScore:
    """Train an arch on stored labels and score it on the holdout; no teacher in memory.

    Weights go to `out_weights`, per-image scores beside them (`<stem>.holdout.safetensors`).
    `checkpoint` and `stop_after` are those of `nas.train.loop.train`. Raises `Diverged`,
    `InputError`.
    """
    started = time.perf_counter()
    loss, device, settings = training.loss, training.device, training.settings
    replay = LabelReader(
        dataset.train,
        store,
        settings.batch_size,
        training.random_seed,
        workers=training.workers,
        subset=subset_by_key(dataset.train, training.images),
        missing=training.missing,
        label_overflow=training.label_overflow,
        epochs=training.label_epochs,
        topk=training.topk,
        device=device,
    )
    resumed = checkpoint is not None and checkpoint.exists()  # it has its own statistics
    model, copied = start_model(
        training.family,
        training.arch,
        training.context,
        random_seed=training.random_seed,
        parent=training.parent,
        inputs=None if resumed else first_inputs(replay, training.first_epoch),
        device=device,
    )

    notes, learns = list(replay.notes), loss.on(model)
    set_token_training(model, learns.kind == "token")
    if learns != loss:
        notes.append(f"no distillation token here: {learns.kind} distillation on its one head")

    def step_loss(net: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, index, prob, tail = _placed(batch, device)
        targets = TeacherTargets(index=index, prob=prob, tail=tail)
        return learns(net(inputs), batch.truth.to(device), targets)

    def batches(epoch: int) -> Iterator[Batch]:
        for batch in replay.epoch(epoch):
            if learns.needs_truth:
                # Of mixed images the classes of both, as the teacher's labels are of both.
                yield replace(batch, truth=replay.truth(epoch, batch.rows.numpy()))
            else:
                yield batch

    with torch.random.fork_rng(devices=[]):  # what a net may draw (dropout) is the job's own, too
        torch.manual_seed(training.random_seed)
        history = train(
            model,
            lambda epoch: batches(training.first_epoch + epoch),
            step_loss,
            settings,
            steps_per_epoch=replay.steps_per_epoch,
            device=device,
            tick=tick,
            checkpoint=checkpoint,
            stop_after=stop_after,
        )
    scored = evaluate(
        model, holdout_batches(dataset, store, EVAL_BATCH, training.missing), dataset.holdout.labels, device, tick
    )
    digest = per_image = None
    if out_weights is not None:
        digest = save_weights(out_weights, model.state_dict())
        per_image = out_weights.with_name(f"{out_weights.stem}.holdout.safetensors")
        scored.save(per_image)
    soft_loss, soft_loss_se = mean_se(scored.soft_loss)
    top1, top1_se = mean_se(scored.correct)
    return ProxyScore(
        soft_loss=soft_loss,
        soft_loss_se=soft_loss_se,
        top1=top1,
        top1_se=top1_se,
        holdout_images=len(scored.correct),
        train_loss=history.final_loss,
        epochs=len(history.epochs),
        images=sum(e.images for e in history.epochs),
        images_per_s=history.images_per_s,
        seconds=time.perf_counter() - started,
        copied=copied,
        weights_digest=digest,
        weights=str(out_weights) if out_weights is not None else None,
        per_image=str(per_image) if per_image is not None else None,
        notes=tuple(notes),
    )


def start_model(
    family: Family,
    arch: Arch,
    ctx: Context,
    *,
    random_seed: int,
    parent: ParentNetwork | None = None,
    inputs: Iterable[torch.Tensor] | None = None,
    device: str = "cpu",
) -> tuple[nn.Module, int]:
    """Build an arch with its first weights; returns it and how many numbers were inherited.

    With a parent and `inputs`, batch-norm statistics are estimated anew on them, on `device`,
    behind all that differs from the parent (`recalibrate`). The global generator is left as it was.
    Raises InputError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        model = family.build(arch, ctx)
    if parent is None:
        return model, 0
    there = parent.context or ctx
    slicing = family.slicing(parent.arch, arch, there, ctx, parent.order)
    state = load_weights(parent.weights, name="parent weights")
    found = inherit(model, state, slicing)
    if inputs is not None:
        resized = there.img_size != ctx.img_size
        recalibrate(model, state, slicing, inputs, device, new_input=resized)
    return model, found.copied


def evaluate(
    model: nn.Module, batches: Iterable[Batch], labels: npt.NDArray[np.int64], device: str, tick: Tick = no_tick
) -> Evaluation:
    """Score a model on labelled batches of a split whose true labels are `labels` [n].

    Rows that no batch has are left out. Float32 and eval mode; leaves the model there.
    """
    loss = np.full(len(labels), np.nan, dtype=np.float32)
    predicted = np.zeros(len(labels), dtype=np.int64)
    seen = np.zeros(len(labels), dtype=bool)
    model.train()  # drops what eval mode may have cached of older weights
    model.eval()
    for batch in batches:
        inputs, index, prob, tail = _placed(batch, device)
        rows = batch.rows.numpy()
        with torch.no_grad():
            logits = model(inputs).float()
            found = sparse_soft_cross_entropy(logits, index, prob, tail)
        loss[rows] = found.cpu().numpy()
        predicted[rows] = logits.argmax(1).cpu().numpy()
        seen[rows] = True
        tick(float(len(rows)))
    return Evaluation(loss[seen], predicted[seen], np.array(labels, dtype=np.int64)[seen])


def evaluate_test(
    family: Family,
    arch: Arch,
    ctx: Context,
    weights: Path,
    dataset: Dataset,
    augment: AugmentSpec,
    *,
    device: str,
    tick: Tick = no_tick,
) -> Evaluation:
    """Test weights once on the test split against true labels: per image, for paired comparison.

    `soft_loss` is the plain cross-entropy there, since the test split has no stored labels.
    """
    model = family.build(arch, ctx)
    load_into(model, load_weights(weights), name=str(weights))
    place(model, device).train()
    model.eval()
    split = dataset.test
    loss = np.empty(len(split), dtype=np.float32)
    predicted = np.zeros(len(split), dtype=np.int64)
    truth = torch.from_numpy(np.array(split.labels, dtype=np.int64))
    for rows, said in outputs(model, split, augment, device=device):
        logits = said.cpu()
        at = torch.from_numpy(rows)
        loss[rows] = nn.functional.cross_entropy(logits, truth[at], reduction="none").numpy()
        predicted[rows] = logits.argmax(1).numpy()
        tick(float(len(rows)))
    return Evaluation(loss, predicted, np.array(split.labels, dtype=np.int64))


def mean_se(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean over images and its standard error (0 for a single image)."""
    n = len(values)
    wide = values.astype(np.float64)
    spread = float(wide.std(ddof=1)) if n > 1 else 0.0
    return float(wide.mean()), spread / math.sqrt(n)


def _placed(batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = batch.inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
    index, prob, tail = (t.to(device) for t in (batch.index, batch.prob, batch.tail))
    return inputs, index, prob, tail
