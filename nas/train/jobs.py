"""Jobs about training: how fast this device trains a network, and whether one has two heads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nas.core.progress import Tick
from nas.jobs.job import Values
from space import Context, get_family


@dataclass(frozen=True, kw_only=True)
class HeadsJob:
    """An arch (as JSON) of a family, in its context."""

    family: str
    arch: Mapping[str, Any]
    context: Context


@dataclass(frozen=True, kw_only=True)
class PaceJob(HeadsJob):
    """An arch in its context, to train for so many seconds at a batch size."""

    batch_size: int
    seconds: float
    device: str


def heads(job: HeadsJob, tick: Tick) -> Values:
    """Return whether an arch has a distillation token, without memory for its weights: `{"token": bool}`."""
    import torch

    from nas.train.losses import has_token

    family = get_family(job.family)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = family.build(family.arch(job.arch), job.context)
    return {"token": has_token(model)}


def pace(job: PaceJob, tick: Tick) -> Values:
    """Train an arch on random images: `{"images_per_s", "steps"}`, by the best of its steps. Nothing is kept."""
    import torch

    from nas.export.weights import place
    from nas.train.loop import Stepper, half_precision
    from nas.train.optim import make_optimizer

    family, context, device, size = get_family(job.family), job.context, job.device, job.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = place(family.build(family.arch(job.arch), context), device).train()
        images = torch.randn(size, context.in_chans, context.img_size, context.img_size)
        labels = torch.randint(context.num_classes, (size,)).to(device)
    inputs = images.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, lr=1e-4, weight_decay=0.05)
    stepper = Stepper(model, optimizer, device=device, dtype=half_precision(device), clip_norm=None)

    def loss(net: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(batch), labels, reduction="none")

    best, steps, until = float("inf"), 0, time.perf_counter() + job.seconds
    while steps < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        stepper.take(model, (inputs,), loss, 1e-4, step=steps)
        stepper.check_loss(steps)  # waits for a GPU
        best, steps = min(best, time.perf_counter() - started), steps + 1
    return {"images_per_s": size / best, "steps": steps}
