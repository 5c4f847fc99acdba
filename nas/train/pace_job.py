"""The job that finds out how fast this device trains."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nas.core.progress import Tick
from space import Context, get_family


def pace(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    """Train an arch on random images for a few seconds; returns images/s, the best of its steps.

    Nothing is kept. `spec`: an arch in its context, `batch_size`, `seconds`, `device`.
    """
    import torch

    from nas.export.weights import place
    from nas.train.loop import TrainSettings, amp_dtype
    from nas.train.optim import make_optimizer

    family, context = get_family(spec["family"]), Context(**spec["context"])
    device, size = str(spec["device"]), int(spec["batch_size"])
    settings = TrainSettings(epochs=1, lr=1e-4, batch_size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = place(family.build(family.arch(spec["arch"]), context), device).train()
        images = torch.randn(size, context.in_chans, context.img_size, context.img_size)
        labels = torch.randint(context.num_classes, (size,))
    inputs = images.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, lr=settings.lr, weight_decay=settings.weight_decay)
    dtype = amp_dtype(settings, device)
    best, until = float("inf"), time.perf_counter() + float(spec["seconds"])
    steps = 0
    while steps < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        float(loss.detach())  # waits for a GPU
        best = min(best, time.perf_counter() - started)
        steps += 1
    return {"images_per_s": size / best, "steps": steps}
