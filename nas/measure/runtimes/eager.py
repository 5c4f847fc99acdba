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
    """The network as it was built; if asked, with batch norms folded, and in channels-last layout."""

    def __init__(self, name: str, *, fused: bool = False, channels_last: bool = False) -> None:
        self.name, self._fused, self._channels_last = name, fused, channels_last

    def prepare(self, request: RuntimeRequest) -> PreparedModel:
        """Cast to the dtype (no autocast) and move to the device."""
        import torch

        model, done = request.net, []
        if self._fused:
            from nas.export.fuse import fuse_batch_norms

            folded = fuse_batch_norms(model, request.images[:1])
            done.append(f"{folded} batch norms folded")
        device, dtype = request.setting.device, getattr(torch, request.setting.dtype)
        model = model.to(device=device, dtype=dtype)
        if self._channels_last:
            model = model.to(memory_format=torch.channels_last)
            done.append("channels last")

        def put(images: Tensor) -> Tensor:
            images = images.to(device=device, dtype=dtype)
            return images.contiguous(memory_format=torch.channels_last) if self._channels_last else images

        bound = put(request.images)
        with torch.inference_mode():
            forward = self.wrap(model, bound, done)

        def once() -> None:
            forward(bound)

        timer = cuda_timer(once, request.setting) if device.startswith("cuda") else cpu_timer(once)

        def timed(passes: int) -> list[float]:
            with torch.inference_mode():
                return timer(passes)

        def logits(images: Images) -> Images:
            shown = put(torch.from_numpy(images))  # a tensor made in inference mode would compile anew
            with torch.inference_mode():
                found: Images = forward(shown).float().cpu().numpy()
            return found

        return PreparedModel(timed, logits, "; ".join(done))

    def wrap(self, model: nn.Module, images: Tensor, done: list[str]) -> Callable[[Any], Any]:
        """Return what is called with images like these; adds to what was done."""
        return model


class Compile(Eager):
    """`torch.compile` by its default backend, the whole network in one graph."""

    mode: ClassVar[str | None] = None

    def wrap(self, model: nn.Module, images: Tensor, done: list[str]) -> Callable[[Any], Any]:
        """Compile, so that no timed pass does; a network that would fall back to eager in parts raises instead."""
        import torch
        import torch._dynamo

        # Every candidate shares its code with the others: past the default limit of 8 compilations of one function,
        # torch would give up.
        torch._dynamo.config.recompile_limit = 1_000_000
        torch._dynamo.config.accumulated_recompile_limit = 1_000_000
        # timm's attention keeps its biases from the first pass on: compiled at once, the second pass would compile
        # anew, and a CUDA graph would own what is kept and write over it.
        model(images)
        compiled: Callable[[Any], Any] = torch.compile(model, fullgraph=True, dynamic=False, mode=self.mode)
        started = time.perf_counter()
        compiled(images)
        took = time.perf_counter() - started
        done.append(f"inductor, one graph, static shapes; compiled in {took:.0f} s")
        return compiled


class CudaGraphs(Compile):
    """`torch.compile` whose kernels are launched together, as one CUDA graph: at small batches launches cost most."""

    devices = ("cuda",)
    mode = "reduce-overhead"

    def wrap(self, model: nn.Module, images: Tensor, done: list[str]) -> Callable[[Any], Any]:
        """Compile and record the graph; the call that compiled was a trial in the graph's memory."""
        compiled = super().wrap(model, images, done)
        for _ in range(2):  # records, replays
            compiled(images)
        done.append("CUDA graph")
        return compiled


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

    Passes of a throughput follow one another as in deployment; a latency is of a pass alone. Events are of the
    setting's device: by default they would mark the work of the current one, which may be another.
    """
    import torch

    alone = setting.batch == 1

    def run(passes: int) -> list[float]:
        durations = []
        with torch.cuda.device(setting.device):
            torch.cuda.synchronize()
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


RUNTIMES = (
    Eager("eager"),
    Eager("eager-fused", fused=True),
    Eager("eager-channels-last", channels_last=True),
    Eager("eager-fused-channels-last", fused=True, channels_last=True),
    Compile("compile"),
    CudaGraphs("compile-cudagraphs"),
)
