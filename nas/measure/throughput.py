"""Images per second of a network, alone or interleaved with a reference, as an interval."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nas.measure.fingerprint import Fingerprint, conditions, take_fingerprint
from nas.measure.measurement import COVERAGE, MIN_BLOCKS, Measurement, median_interval
from space import Context
from space.errors import refuse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Block = Callable[[int], float]
"""Runs that many forward passes to the end and returns the seconds they took."""


def measure(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    ctx: Context,
    batch: int,
    dtype: str = "float32",
    device: str = "cpu",
    blocks: int = 12,
    max_blocks: int = 48,
    min_block_s: float = 0.06,
    ratio_at_least: float | None = None,
    images_per_s_at_least: float | None = None,
    fingerprint: Fingerprint | None = None,
    threads: int | None = None,
) -> Measurement:
    """Time eager forward passes of `model`, in blocks that alternate with the `reference`'s.

    Blocks run in the order A B B A A B ..., so that a drift of the machine meets both networks
    alike; the ratio is the median over neighbouring pairs. While a bound lies inside its
    interval, the number of blocks is doubled, up to `max_blocks`; the intervals are widened so that
    all looks together keep their coverage (union bound).

    `batch` images of `ctx` a pass, at least `min_block_s` seconds a block. Weights are cast to
    `dtype` (no autocast). `threads` pins torch's threads for the duration. Both networks are
    copied first: the caller's networks and torch's random state stay as they were. Out of memory
    and whatever else a network raises comes through as it is.
    """
    started = time.perf_counter()
    _check(batch, dtype, blocks, max_blocks, min_block_s)
    assert ratio_at_least is None or reference is not None, "a ratio bound needs a reference"
    now = conditions()
    threads_before = torch.get_num_threads()
    if threads is not None and threads != threads_before:
        torch.set_num_threads(threads)
    try:
        on = fingerprint or take_fingerprint(device)
        timers = [_timer(model, ctx, batch, dtype, device)]
        if reference is not None:
            timers.append(_timer(reference, ctx, batch, dtype, device))
        with torch.inference_mode():
            passes = [_passes(timer, device, min_block_s) for timer in timers]
            bounded = ratio_at_least is not None or images_per_s_at_least is not None
            looks = planned_looks(blocks, max_blocks if bounded else blocks)
            speeds: list[list[float]] = [[] for _ in timers]
            for until in looks:
                for index in range(len(speeds[0]), until):
                    order = range(len(timers)) if index % 2 == 0 else reversed(range(len(timers)))
                    for which in order:
                        took = timers[which](passes[which])
                        speeds[which].append(batch * passes[which] / took)
                found = _summary(speeds, looks)
                made = Measurement(
                    **found,
                    passes=passes[0],
                    seconds=time.perf_counter() - started,
                    img_size=ctx.img_size,
                    num_classes=ctx.num_classes,
                    in_chans=ctx.in_chans,
                    batch=batch,
                    dtype=dtype,
                    runtime="eager",
                    device=device,
                    threads=torch.get_num_threads(),
                    fingerprint=on.id,
                    load=now.load,
                    when=now.when,
                )
                if made.meets(ratio_at_least, images_per_s_at_least) != "undecided":
                    break
        return made
    finally:
        if torch.get_num_threads() != threads_before:
            torch.set_num_threads(threads_before)


def private_copy(model: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Copy a network to a device in eval mode, without gradients and without stale caches.

    timm's attention caches its biases in eval mode. Such a cache may be older than the weights,
    and where it was made with gradients on, `deepcopy` refuses it. The first is cured by
    `train()` before `eval()` on the copy; the second by telling `deepcopy` what to put there.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        _detach_computed(vars(module), memo)
    made = copy.deepcopy(model, memo)
    made.train()
    made.eval()
    made.requires_grad_(False)
    return made.to(device=device, dtype=dtype)


def planned_looks(blocks: int, max_blocks: int) -> list[int]:
    """List the block counts at which a sequential measurement looks: doubling up to the maximum."""
    looks = [blocks]
    while looks[-1] < max_blocks:
        looks.append(min(2 * looks[-1], max_blocks))
    return looks


def _summary(speeds: list[list[float]], looks: list[int]) -> dict[str, Any]:
    # Each look may miss with a share of the allowed probability; what all planned looks miss
    # together depends on their counts alone and is what `coverage` states.
    share = 1.0 - (1.0 - COVERAGE) / len(looks)
    own = median_interval(speeds[0], share)
    missed = sum(1.0 - median_interval(range(n), share).coverage for n in looks)
    values: dict[str, Any] = {
        "images_per_s": own.median,
        "images_per_s_lo": own.lo,
        "images_per_s_hi": own.hi,
        "ratio": None,
        "ratio_lo": None,
        "ratio_hi": None,
        "reference_images_per_s": None,
        "coverage": max(0.0, 1.0 - missed),
        "blocks": len(speeds[0]),
    }
    if len(speeds) == 2:
        pairs = [mine / other for mine, other in zip(*speeds, strict=True)]
        ratio = median_interval(pairs, share)
        values.update(ratio=ratio.median, ratio_lo=ratio.lo, ratio_hi=ratio.hi)
        values.update(reference_images_per_s=median_interval(speeds[1], share).median)
    return values


def _timer(model: nn.Module, ctx: Context, batch: int, dtype: str, device: str) -> Block:
    own = private_copy(model, device, DTYPES[dtype])
    # Its own generator: the global random state is the caller's.
    noise = torch.Generator().manual_seed(0)
    shape = (batch, ctx.in_chans, ctx.img_size, ctx.img_size)
    inputs = torch.randn(shape, generator=noise).to(device=device, dtype=DTYPES[dtype])
    cuda = device.startswith("cuda")

    def run(passes: int) -> float:
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(passes):
            own(inputs)
        if cuda:
            torch.cuda.synchronize(device)
        return max(time.perf_counter() - start, 1e-9)

    return run


def _passes(timer: Block, device: str, min_block_s: float) -> int:
    # Warm up until a pass no longer beats the best by 5 %: the first ones allocate, pick kernels
    # and raise clocks. A GPU hides that behind its queue, so there it also takes a least time.
    least_s = 0.3 if device.startswith("cuda") else 0.0
    best, spent = math.inf, 0.0
    for count in range(1, 1001):
        took = timer(1)
        spent += took
        settled = took > 0.95 * best
        best = min(best, took)
        if count >= 2 and spent >= least_s and (settled or count >= 10):
            break
    return max(1, math.ceil(min_block_s / best))


def _detach_computed(value: object, memo: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            _detach_computed(item, memo)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _detach_computed(item, memo)


def _check(batch: int, dtype: str, blocks: int, max_blocks: int, min_block_s: float) -> None:
    if batch < 1:
        raise refuse("--batch", batch, "an integer >= 1")
    if dtype not in DTYPES:
        raise refuse("--dtype", dtype, "one of " + ", ".join(DTYPES))
    if blocks < MIN_BLOCKS:
        raise refuse("blocks", blocks, f">= {MIN_BLOCKS}", "fewer give no 95 % interval")
    if max_blocks < blocks:
        raise refuse("max_blocks", max_blocks, f">= blocks = {blocks}")
    if not (min_block_s > 0 and math.isfinite(min_block_s)):
        raise refuse("min_block_s", min_block_s, "seconds > 0")
