"""Train a student on stored soft labels, and score it on the holdout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nas.core.metrics import mean_se
from nas.core.progress import Tick, no_tick
from nas.export.weights import load_weights, save_weights
from nas.inherit.batchnorm import recalibrate
from nas.inherit.slice import head_slices, inherit
from nas.labels.reader import Batch, LabelReader
from nas.train.loop import History, TrainSettings, train
from nas.train.losses import DistillLoss, TeacherTargets, set_token_training, sparse_soft_cross_entropy
from space import Context
from space.family import Arch, Array, Family


def proxy_settings(epochs: int, lr: float, *, batch_size: int = 32) -> TrainSettings:
    """Return the proxy's recipe for `epochs` epochs at a peak rate (`nas.train.optim.peak_lr`)."""
    return TrainSettings(epochs=epochs, lr=lr, warmup_epochs=min(1.0, 0.2 * epochs), batch_size=batch_size)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Per image of a split, in its order: the loss float32 [n] in nats, the class that came first and the true one,
    int64 [n]."""

    soft_loss: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the true class came first, bool [n]."""
        return np.asarray(self.predicted == self.truth)

    def save(self, path: Path) -> None:
        """Write what `nas.core.per_image` reads, and `correct` (uint8) beside it."""
        kept = {name: torch.from_numpy(value) for name, value in vars(self).items()}
        save_weights(path, {**kept, "correct": torch.from_numpy(self.correct).to(torch.uint8)})

    def scores(self) -> dict[str, Any]:
        """Return mean soft loss and top-1 with their standard errors over images.

        Raises FloatingPointError for a loss that is not finite.
        """
        soft_loss, soft_loss_se = mean_se(self.soft_loss)
        if not math.isfinite(soft_loss):
            raise FloatingPointError(f"the holdout loss is {soft_loss}")
        top1, top1_se = mean_se(self.correct)
        return {"soft_loss": soft_loss, "soft_loss_se": soft_loss_se, "top1": top1, "top1_se": top1_se}


@dataclass(frozen=True, eq=False, kw_only=True)
class ParentNetwork:
    """A trained network whose weights a student takes over.

    `context` None: the student's own. `order` ranks its units and blocks, most wanted first (`Family.slicing`); None:
    as they stand. `class_rows`: the row of its head for each class, -1 for none; None: its classes are the student's.
    """

    arch: Arch
    weights: Path
    context: Context | None = None
    order: Mapping[str, Array] | None = None
    class_rows: Sequence[int] | None = None


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

    Fresh weights depend on `random_seed` alone. With a parent and `inputs`, batch-norm statistics are estimated anew
    on them, on `device`, behind all that differs from the parent (`recalibrate`). The global generator is left as it
    was. Raises InputError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        model = family.build(arch, ctx)
    if parent is None:
        return model, 0
    there = parent.context or ctx
    slicing = dict(family.slicing(parent.arch, arch, there, ctx, parent.order))
    if parent.class_rows is not None:
        slicing |= head_slices(family, arch, ctx, parent.class_rows)
    state = load_weights(parent.weights, name="parent weights")
    found = inherit(model, state, slicing)
    if inputs is not None:
        recalibrate(model, state, slicing, inputs, device, new_input=there.img_size != ctx.img_size)
    return model, found.copied


def train_on_labels(
    model: nn.Module,
    reader: LabelReader,
    loss: DistillLoss,
    settings: TrainSettings,
    *,
    random_seed: int,
    device: str,
    first_epoch: int = 0,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
    tick: Tick = no_tick,
) -> tuple[History, list[str]]:
    """Train a model on stored labels, in place, with no teacher in memory; returns the epochs and notes.

    A loss that teaches a distillation token teaches the one head of a net without. `checkpoint` and `stop_after` are
    those of `nas.train.loop.train`. Raises `Diverged`, InputError.
    """
    learns = loss.on(model)
    set_token_training(model, learns.kind == "token")
    notes = [f"no distillation token here: {learns.kind} distillation on its one head"] if learns != loss else []

    def batches(epoch: int) -> Iterator[Batch]:
        for batch in reader.epoch(first_epoch + epoch):
            if learns.needs_truth:
                # Of mixed images the classes of both, as the teacher's labels are of both.
                batch = replace(batch, truth=reader.truth(first_epoch + epoch, batch.rows.numpy()))
            yield batch

    with torch.random.fork_rng(devices=[]):  # what a net may draw (dropout) is the job's own, too
        torch.manual_seed(random_seed)
        history = train(
            model,
            batches,
            lambda net, batch: batch_loss(net, batch, learns, device),
            settings,
            steps_per_epoch=reader.steps_per_epoch,
            device=device,
            tick=tick,
            checkpoint=checkpoint,
            stop_after=stop_after,
        )
    return history, notes


def batch_loss(model: nn.Module, batch: Batch, loss: DistillLoss, device: str) -> torch.Tensor:
    """Return the loss of every image of a labelled batch [B]."""
    inputs, index, prob, tail = _placed(batch, device)
    return loss(model(inputs), batch.truth.to(device), TeacherTargets(index=index, prob=prob, tail=tail))


def evaluate(
    model: nn.Module, batches: Iterable[Batch], labels: npt.NDArray[np.int64], device: str, tick: Tick = no_tick
) -> Evaluation:
    """Score a model on labelled batches of a split whose true labels are `labels` [n].

    Rows that no batch has are left out. Float32 and eval mode; leaves the model there.
    """
    loss = np.full(len(labels), np.nan, dtype=np.float32)
    predicted = np.zeros(len(labels), dtype=np.int64)
    seen = np.zeros(len(labels), dtype=bool)
    model.train().eval()  # drops what eval mode may have cached of older weights
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


def _placed(batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = batch.inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
    index, prob, tail = (t.to(device) for t in (batch.index, batch.prob, batch.tail))
    return inputs, index, prob, tail
