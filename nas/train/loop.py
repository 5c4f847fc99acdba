"""The training step that all trainings share, and the loop of teachers and proxies.

Callers pass batches and loss. A full training (`nas.train.fit`) takes the same step in a loop of
its own, which can stop and resume inside an epoch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nas.core.progress import Tick, no_tick
from nas.export.weights import place
from nas.train.checkpoint import Position, load_checkpoint_into, save_checkpoint
from nas.train.optim import lr_at, make_optimizer

B = TypeVar("B")

CHECK_EVERY = {"cpu": 1, "cuda": 32}
"""Steps between two checks of the loss: on a GPU each one waits for the device."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a teacher's or proxy's training: AdamW, cosine after a linear warm-up.

    `epochs` is the length of the schedule; `lr` its peak; `warmup_epochs` may be a fraction; `clip_norm` None means
    off; `amp` asks for mixed precision where the device has it (CUDA).
    """

    epochs: int
    lr: float
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    clip_norm: float | None = 5.0
    batch_size: int = 32
    amp: bool = True


@dataclass(frozen=True)
class Epoch:
    """One epoch's mean training loss, images and seconds."""

    loss: float
    images: int
    seconds: float


@dataclass(frozen=True)
class History:
    """The epochs of a training, those before a resume included."""

    epochs: tuple[Epoch, ...]

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last epoch; NaN before the first."""
        return self.epochs[-1].loss if self.epochs else math.nan

    @property
    def images_per_s(self) -> float:
        """Training speed over all epochs, images per second; 0 before the first."""
        seconds = sum(e.seconds for e in self.epochs)
        return sum(e.images for e in self.epochs) / seconds if seconds > 0 else 0.0


class Diverged(RuntimeError):
    """A loss that is not finite, at a 0-based step: a recorded outcome of a candidate."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"loss became {loss} by step {step}")
        self.step = step
        self.loss = loss


def half_precision(device: str) -> torch.dtype | None:
    """Return the half precision of a GPU, bfloat16 from compute capability 8 on; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


def train(
    model: nn.Module,
    epoch_batches: Callable[[int], Iterable[B]],
    step_loss: Callable[[nn.Module, B], torch.Tensor],
    settings: TrainSettings,
    *,
    steps_per_epoch: int,
    device: str,
    tick: Tick = no_tick,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
) -> History:
    """Train `model` in place on `device`; it stays in training mode.

    `epoch_batches(e)` returns the `steps_per_epoch` batches of epoch e and must depend on e alone. `step_loss(model,
    batch)` moves its batch to the device and returns the loss of each image [B], float32. `tick` receives images done.
    With `checkpoint`, the position is written there at the end of each epoch and a later call continues from it, on
    the CPU to the same bits as an undisturbed run. `stop_after` ends after that many epochs of the schedule (a rung of
    a race). Raises `Diverged` once the loss is not finite: at that step on the CPU, within 32 on a GPU.
    """
    place(model, device)
    optimizer = make_optimizer(model, lr=settings.lr, weight_decay=settings.weight_decay)
    dtype = half_precision(device) if settings.amp else None
    stepper = Stepper(model, optimizer, device=device, dtype=dtype, clip_norm=settings.clip_norm)
    plan = {**asdict(settings), "steps_per_epoch": steps_per_epoch}
    done: list[Epoch] = []
    if checkpoint is not None and checkpoint.exists():
        position = load_checkpoint_into(checkpoint, model, optimizer, plan)
        done = [Epoch(**record) for record in position.extra["epochs"]]
        stepper.scaler.load_state_dict(position.extra["scaler"])
        tick(float(sum(e.images for e in done)))
    total_steps = settings.epochs * steps_per_epoch
    warmup_steps = min(round(settings.warmup_epochs * steps_per_epoch), total_steps - 1)
    min_lr = min(settings.min_lr, settings.lr)
    last = settings.epochs if stop_after is None else min(stop_after, settings.epochs)
    for epoch in range(len(done), last):
        model.train()
        stepper.begin()
        started, step = time.perf_counter(), epoch * steps_per_epoch
        for batch in epoch_batches(epoch):
            rate = lr_at(step, total_steps=total_steps, warmup_steps=warmup_steps, lr=settings.lr, min_lr=min_lr)
            tick(float(stepper.take(model, (batch,), step_loss, rate, step=step)))
            step += 1
        assert step == (epoch + 1) * steps_per_epoch, "an epoch has as many batches as announced"
        mean = stepper.check_loss(step - 1) / max(stepper.images, 1)
        done.append(Epoch(mean, stepper.images, time.perf_counter() - started))
        if checkpoint is not None:
            extra = {"epochs": [asdict(e) for e in done], "scaler": stepper.scaler.state_dict()}
            save_checkpoint(checkpoint, model, optimizer, Position(len(done), plan, extra))
    model.train()
    return History(tuple(done))


class Stepper:
    """Takes optimizer steps and sums the loss since `begin`.

    `dtype` is that of mixed precision, or None for full precision. `all_reduce` sums a number over all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: str,
        dtype: torch.dtype | None,
        clip_norm: float | None,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ) -> None:
        self.optimizer = optimizer
        self._all_reduce = all_reduce
        self._device, self._dtype, self._clip = device, dtype, clip_norm
        self._kind = device.split(":")[0]
        self.scaler: Any = torch.amp.GradScaler(self._kind, enabled=dtype is torch.float16)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.begin()

    def begin(self, loss_sum: float = 0.0, images: int = 0) -> None:
        """Start the sums anew, or from those of a checkpoint."""
        self.loss_sum = torch.full((), loss_sum, dtype=torch.float64, device=self._device)
        self.images = images

    def take(
        self,
        network: nn.Module,
        batches: Sequence[B],
        step_loss: Callable[[nn.Module, B], torch.Tensor],
        rate: float,
        *,
        step: int,
        weight: float | None = None,
    ) -> int:
        """Take one step on the mean loss of one batch, or of several micro-batches.

        `rate` is the learning rate, of which each group takes its `lr_scale`. `weight` multiplies the sum of losses
        (one over the images of the global batch); None means the mean of the one batch. Returns the images of this
        process. Raises `Diverged` where the loss is checked and is not finite.
        """
        assert weight is not None or len(batches) == 1
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        seen, last = 0, len(batches) - 1
        for at, batch in enumerate(batches):
            # Processes average their gradients once, with the last micro-batch.
            held_back: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if at < last and isinstance(network, nn.parallel.DistributedDataParallel):
                held_back = network.no_sync()
            with held_back:
                with torch.autocast(self._kind, dtype=self._dtype, enabled=self._dtype is not None):
                    losses = step_loss(network, batch)
                assert losses.ndim == 1, "step_loss returns one loss per image"
                if at == 0:
                    self.optimizer.zero_grad(set_to_none=True)
                loss = losses.mean() if weight is None else losses.sum() * weight
                self.scaler.scale(loss).backward()
            # A non-finite sum stays so: a later check on a GPU still sees it.
            self.loss_sum += losses.detach().sum(dtype=torch.float64)
            seen += len(losses)
        if self._clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        if step % CHECK_EVERY[self._kind] == 0:
            self.check_loss(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.images += seen
        return seen

    def check_loss(self, step: int) -> float:
        """Return the sum of losses since `begin`, of all processes; raises `Diverged`."""
        total = float(self._all_reduce(self.loss_sum))
        if not math.isfinite(total):
            raise Diverged(step, total)
        return total
