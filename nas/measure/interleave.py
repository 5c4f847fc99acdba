"""Timing in interleaved blocks of passes within one process, in any runtime; standard library only.

What one process finds is a visit: another process may find something else, so intervals are over visits
(`nas.measure.measurement.combined`).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nas.measure.interference import Disturbance, Watch, conditions
from nas.measure.intervals import QUANTILES, quantile
from nas.measure.measurement import Throughput
from space.errors import refuse

Timer = Callable[[int], list[float]]
"""Runs that many passes to the end and returns the seconds of each piece that was clocked alone: every pass where
clocks are free (a CPU), the whole block where waiting would cost (a GPU)."""

WARM_UP_S = 60.0

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1
"""Parameters of glibc's `mallopt`."""


@dataclass(frozen=True)
class TimingPlan:
    """How long a visit times each network: `blocks` of at least `min_passes` passes and `min_block_s` seconds.

    What was disturbed is repeated `retries` times at most.
    """

    blocks: int = 6
    min_block_s: float = 0.06
    min_passes: int = 1
    retries: int = 1

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise refuse("blocks", self.blocks, ">= 1")
        if not 0.0 < self.min_block_s < math.inf:
            raise refuse("min_block_s", self.min_block_s, "seconds > 0")


@dataclass
class Samples:
    """One network's blocks in time order: images/s of each, and the seconds of each piece."""

    images_per_s: list[float] = field(default_factory=list)
    durations_s: list[float] = field(default_factory=list)


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, where the C library is glibc; call it before anything is timed.

    By default glibc returns large blocks to the system and takes them again with every pass, or does not, depending on
    what the process freed before: the largest part of what made two processes differ. Servers that run for long keep
    their memory too.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
                mallopt(parameter, value)


def time_visit(
    timers: Sequence[Timer], batches: Sequence[int], plan: TimingPlan, device: str = "cpu", *, reference: bool = True
) -> list[Throughput]:
    """Time networks in alternating blocks; with `reference`, the last one is what the others are compared with.

    Blocks run in the order A B R R B A A B ..., so that a drift of the machine meets all alike; a ratio is the median
    over the rounds. Of disturbed attempts the calmest is returned, with what disturbed it. The result is what one
    process found, without intervals; the reference has none of its own.
    """
    started, began = time.perf_counter(), conditions(device)
    # A GPU hides its first passes behind its queue and raises its clocks late.
    warm_up_s = 0.5 if device.startswith("cuda") else 0.0
    passes = [max(plan.min_passes, settle(t, plan.min_block_s, warm_up_s)) for t in timers]
    attempts: list[tuple[Disturbance, list[Samples]]] = []
    while len(attempts) <= plan.retries:
        watch = Watch(device)
        series = _rounds(timers, passes, batches, plan.blocks)
        attempts.append((watch.read(), series))
        if not attempts[-1][0].text:
            break
    # Undisturbed beats disturbed, whatever it was: a clock drifts without anyone waiting.
    seen, best = min(attempts, key=lambda of: (bool(of[0].text), of[0].waited or 0.0))
    other = best[-1].images_per_s if reference else None
    networks = len(timers) - reference
    own = Throughput(
        images_per_s=1.0,
        blocks=plan.blocks,
        passes=1,
        seconds=(time.perf_counter() - started) / max(networks, 1),
        waited=seen.waited,
        disturbed=seen.text,
        attempts=len(attempts),
        load=began.load,
        # An idle GPU's clock, before all, is not that of the passes.
        clock_mhz=seen.clock_mhz or began.clock_mhz,
        when=began.when,
    )
    return [_found(own, best[n], other, passes[n] * plan.blocks) for n in range(networks)]


def _found(own: Throughput, samples: Samples, reference: Sequence[float] | None, passes: int) -> Throughput:
    latency: dict[str, Any] = {
        f"latency_ms_{name}": 1e3 * quantile(samples.durations_s, q) for name, q in QUANTILES.items()
    }
    found = replace(own, images_per_s=statistics.median(samples.images_per_s), passes=passes, **latency)
    if reference is None:
        return found
    ratio = statistics.median(a / b for a, b in zip(samples.images_per_s, reference, strict=True))
    return replace(found, ratio=ratio, reference_images_per_s=statistics.median(reference))


def _rounds(timers: Sequence[Timer], passes: Sequence[int], batches: Sequence[int], blocks: int) -> list[Samples]:
    series = [Samples() for _ in timers]
    for number in range(blocks):
        order = range(len(timers)) if number % 2 == 0 else reversed(range(len(timers)))
        for which in order:
            pieces = timers[which](passes[which])
            took = max(math.fsum(pieces), 1e-9)
            series[which].images_per_s.append(batches[which] * passes[which] / took)
            series[which].durations_s.extend(piece * len(pieces) / passes[which] for piece in pieces)
    return series


def settle(timer: Timer, min_block_s: float, warm_up_s: float = 0.0) -> int:
    """Warm up until passes stop becoming faster; return how many passes fill a block.

    The first passes allocate, pick kernels and raise clocks. Warm is what runs for at least `warm_up_s` and whose last
    three passes, at their best, no longer beat the best before them by 2 %; a minute at most, as a machine that never
    settles is measured all the same.
    """
    took: list[float] = []
    while True:
        took.append(math.fsum(timer(1)))
        spent = math.fsum(took)
        warm = spent >= warm_up_s and len(took) >= 4 and min(took[-3:]) > 0.98 * min(took[:-3])
        if warm or (spent > WARM_UP_S and len(took) >= 2):
            break
    return max(1, math.ceil(min_block_s / max(min(took), 1e-9)))
