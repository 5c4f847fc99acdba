"""torch itself: as built, fused, channels last, compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from nas.core.requirement import Setting
from nas.measure.runtimes.runtime import PreparedModel, Runtime, RuntimeRequest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.measure.runtimes.runtime import Images


class Eager(Runtime):
    """The network as it was built."""

    name = "eager"
    fused: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False

    def prepare(self, request: RuntimeRequest) -> PreparedModel:
        """Cast to the dtype (no autocast) and move to the device."""
        import torch

        model, done = request.net, []
        if self.fused:
            from nas.export.fuse import fuse_batch_norms

            folded = fuse_batch_norms(model, request.images[:1])
            done.append(f"{folded} batch norms folded")
        dtype = getattr(torch, request.setting.dtype)
        model = model.to(device=request.setting.device, dtype=dtype)
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
            done.append("channels last")
        return torch_ready(self.wrap(model, done), request, layout, done)

    def wrap(self, model: nn.Module, done: list[str]) -> Callable[[Any], Any]:
        """Return what is called with images; adds to what was done."""
        return model


class EagerFused(Eager):
    """Batch norms folded into the layers before them."""

    name = "eager-fused"
    fused = True


class EagerChannelsLast(Eager):
    """Weights and images in channels-last layout."""

    name = "eager-channels-last"
    channels_last = True


class EagerFusedChannelsLast(Eager):
    """Both."""

    name = "eager-fused-channels-last"
    fused = True
    channels_last = True


class Compile(Eager):
    """`torch.compile` by its default backend, the whole network in one graph."""

    name = "compile"

    def wrap(self, model: nn.Module, done: list[str]) -> Callable[[Any], Any]:
        """Compile; a network that would fall back to eager in parts raises instead."""
        import torch
        import torch._dynamo

        # Every candidate shares its code with the others: past the default limit of 8 compilations
        # of one function, torch would give up.
        torch._dynamo.config.recompile_limit = 1_000_000
        torch._dynamo.config.accumulated_recompile_limit = 1_000_000
        done.append("inductor, one graph, static shapes")
        compiled: Callable[[Any], Any] = torch.compile(model, fullgraph=True, dynamic=False)
        return compiled


def torch_ready(forward: Callable[[Any], Any], request: RuntimeRequest, layout: Any, done: list[str]) -> PreparedModel:
    """Bind a torch callable to its images and a timer that waits for the device."""
    import torch

    device, dtype = request.setting.device, getattr(torch, request.setting.dtype)

    def put(images: Tensor) -> Tensor:
        return (
            images.to(device=device, dtype=dtype).contiguous(memory_format=layout)
            if (layout is torch.channels_last)
            else images.to(device=device, dtype=dtype)
        )

    bound = put(request.images)

    def once() -> None:
        forward(bound)

    def logits(images: Images) -> Images:
        with torch.inference_mode():
            found = forward(put(torch.from_numpy(images)))
        result: Images = found.float().cpu().numpy()
        return result

    timer = cuda_timer(once, request.setting) if device.startswith("cuda") else cpu_timer(once)

    def timed(passes: int) -> list[float]:
        with torch.inference_mode():
            return timer(passes)

    return PreparedModel(timed, logits, "; ".join(done))


def cpu_timer(once: Callable[[], object]) -> Callable[[int], list[float]]:
    """Clock every pass: on a CPU a pass is over when it returns."""

    def run(passes: int) -> list[float]:
        durations = []
        for _ in range(passes):
            start = time.perf_counter()
            once()
            durations.append(time.perf_counter() - start)
        return durations

    return run


def cuda_timer(once: Callable[[], object], setting: Setting) -> Callable[[int], list[float]]:
    """Clock with CUDA events; batch 1 waits for each pass, larger batches for the block.

    Passes of a throughput follow one another as in deployment; a latency is of a pass alone.
    """
    import torch

    alone = setting.batch == 1

    def run(passes: int) -> list[float]:
        durations = []
        torch.cuda.synchronize(setting.device)
        for _ in range(passes if alone else 1):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(1 if alone else passes):
                once()
            stop.record()
            stop.synchronize()
            durations.append(start.elapsed_time(stop) / 1e3)
        return durations

    return run


RUNTIMES = (Eager, EagerFused, EagerChannelsLast, EagerFusedChannelsLast, Compile)
