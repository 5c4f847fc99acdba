"""The one loop for everything that trains: teacher, proxy, and later the full recipe.

What differs between them - batches and loss - is passed in.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nas.jobs import Tick, no_tick
from nas.training.checkpoint import Position, load_checkpoint_into, save_checkpoint
from nas.training.schedule import lr_at
from space.errors import refuse

B = TypeVar("B")

_CHECK_EVERY = 32
"""On a GPU, where every look waits for the device; on a CPU every step is looked at."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. AdamW, cosine per step after a linear warm-up.

    `epochs` is the length of the schedule; `lr` its peak; `warmup_epochs` may be a fraction;
    `clip_norm` None means off; `amp` asks for mixed precision where the device has it (CUDA).
    """

    epochs: int
    lr: float
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    clip_norm: float | None = 5.0
    batch_size: int = 32
    amp: bool = True

    def __post_init__(self) -> None:
        """Check the values at the door."""
        for name, low in (("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < low:
                raise refuse(name, getattr(self, name), f"an integer >= {low}")
        for name in ("lr", "min_lr", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise refuse(name, value, "a finite number >= 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise refuse("clip_norm", self.clip_norm, "a number > 0, or None for off")


@dataclass(frozen=True)
class Epoch:
    """One epoch's mean training loss, images and seconds."""

    loss: float
    images: int
    seconds: float


@dataclass(frozen=True)
class History:
    """What training did: one entry per epoch, those before a resume included."""

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
    """The loss stopped being finite: a recorded outcome of a candidate."""

    def __init__(self, step: int, loss: float) -> None:
        """Remember the 0-based step at which it was seen, and the loss (nan or inf)."""
        super().__init__(f"loss became {loss} by step {step}")
        self.step = step
        self.loss = loss


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW through timm: no decay on 1-D parameters, biases, and what the model itself excludes.

    For TinyViT that is `attention_biases`, as in the authors' recipe. Fused: a third of the time of
    the plain form on a CPU, where it is 5 to 10 % of a 21M model's step.
    """
    factory: Any = importlib.import_module("timm.optim")
    optimizer: torch.optim.Optimizer = factory.create_optimizer_v2(
        model, opt="adamw", lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )
    return optimizer


def place(model: nn.Module, device: str) -> nn.Module:
    """Move a model, in place, to a device and into the memory layout that it trains fastest in.

    Channels last: steps 10 % faster on CPUs (measured); GPUs' half precision wants it too.
    """
    return model.to(device).to(memory_format=torch.channels_last)


def amp_dtype(settings: TrainSettings, device: str) -> torch.dtype | None:
    """Mixed-precision type for this device, or None for full precision (always on the CPU)."""
    if not settings.amp or not device.startswith("cuda"):
        return None
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


def check_every(device: str) -> int:
    """Steps between two looks at the loss, for which a GPU has to be waited for."""
    return _CHECK_EVERY if device.startswith("cuda") else 1


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
    """Train `model` in place on `device`; leaves it in training mode.

    `epoch_batches(e)` gives the `steps_per_epoch` batches of epoch e and must depend on e alone.
    `step_loss(model, batch)` moves its batch to the device and returns the loss of each image
    [B], float32. `tick` receives images done. With `checkpoint`, the position is written there at
    the end of each epoch and a later call continues from it, on the CPU to the same bits as an
    undisturbed run. `stop_after` ends after that many epochs of the schedule (a rung of a race).
    Raises `Diverged` once the loss is not finite: at that step on the CPU, within 32 on a GPU.
    """
    place(model, device)
    optimizer = make_optimizer(model, settings)
    scaler = _make_scaler(settings, device)
    plan = {**asdict(settings), "steps_per_epoch": steps_per_epoch}
    done: list[Epoch] = []
    if checkpoint is not None and checkpoint.exists():
        position = load_checkpoint_into(checkpoint, model, optimizer, plan)
        done = [Epoch(**record) for record in position.extra["epochs"]]
        scaler.load_state_dict(position.extra["scaler"])
        tick(float(sum(e.images for e in done)))
    last = settings.epochs if stop_after is None else min(stop_after, settings.epochs)
    for epoch in range(len(done), last):
        model.train()
        record = _train_epoch(
            model, optimizer, scaler, epoch_batches(epoch), step_loss, settings,
            epoch=epoch, steps_per_epoch=steps_per_epoch, device=device, tick=tick,
        )  # fmt: skip
        done.append(record)
        if checkpoint is not None:
            extra = {"epochs": [asdict(e) for e in done], "scaler": scaler.state_dict()}
            save_checkpoint(checkpoint, model, optimizer, Position(len(done), plan, extra))
    model.train()
    return History(tuple(done))


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    batches: Iterable[B],
    step_loss: Callable[[nn.Module, B], torch.Tensor],
    settings: TrainSettings,
    *,
    epoch: int,
    steps_per_epoch: int,
    device: str,
    tick: Tick,
) -> Epoch:
    """One pass over the batches of an epoch."""
    started = time.perf_counter()
    total_steps = settings.epochs * steps_per_epoch
    warmup_steps = min(round(settings.warmup_epochs * steps_per_epoch), total_steps - 1)
    dtype = amp_dtype(settings, device)
    every = check_every(device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    images = 0
    step = epoch * steps_per_epoch
    for batch in batches:
        rate = lr_at(
            step, total_steps=total_steps, warmup_steps=warmup_steps,
            lr=settings.lr, min_lr=min(settings.min_lr, settings.lr),
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        with _autocast(device, dtype):
            losses = step_loss(model, batch)
        assert losses.ndim == 1, "step_loss returns one loss per image"
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses.mean()).backward()
        if settings.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        # A non-finite sum stays so: on a GPU a late look still sees what happened before.
        loss_sum += losses.detach().sum(dtype=torch.float64)
        if step % every == 0 and not math.isfinite(float(loss_sum)):
            raise Diverged(step, float(loss_sum))
        scaler.step(optimizer)
        scaler.update()
        images += len(losses)
        step += 1
        tick(float(len(losses)))
    assert step == (epoch + 1) * steps_per_epoch, "an epoch has as many batches as announced"
    total = float(loss_sum)
    if not math.isfinite(total):
        raise Diverged(step - 1, total)
    return Epoch(total / max(images, 1), images, time.perf_counter() - started)


def _autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=dtype)


def _make_scaler(settings: TrainSettings, device: str) -> Any:
    """Gradient scaler; does nothing unless training in float16."""
    enabled = amp_dtype(settings, device) is torch.float16
    return torch.amp.GradScaler("cuda", enabled=enabled)
