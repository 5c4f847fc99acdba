"""Timing in interleaved blocks of passes, in any runtime; standard library only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nas.measure.interference import Conditions, Disturbance, Watch, conditions
from nas.measure.intervals import COVERAGE, MIN_BLOCKS, Interval, Verdict, quantile_interval, verdict
from space.errors import refuse

Timer = Callable[[int], list[float]]
"""Runs that many passes to the end and returns the seconds of each piece that was clocked alone: every pass where
clocks are free (a CPU), the whole block where waiting would cost (a GPU)."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
"""The reported latencies, by name."""

LEAST_PASSES = {"p50": 1, "p90": 60, "p99": 500}
"""Passes without which a quantile's interval has no upper end, with some to spare for looks."""

WARM_UP_S = 60.0

NOTHING_SEEN, UNKNOWN = Disturbance(None, ""), Conditions(None, "")


@dataclass(frozen=True)
class Bounds:
    """What a measurement is to decide; None: no bound.

    `ratio` and `images_per_s` are least values, `latency_ms` the most milliseconds a pass, by the name of the quantile.
    `precision` is the most half width of the interval, as a share.
    """

    ratio: float | None = None
    images_per_s: float | None = None
    latency_ms: tuple[tuple[str, float], ...] = ()
    precision: float | None = None


@dataclass(frozen=True)
class TimingPlan:
    """How long to measure: `blocks` a network, and up to `max_blocks` while one of the `bounds` is undecided.

    A block has at least `min_passes` and takes `min_block_s` or more. What was disturbed is repeated `retries` times at
    most.
    """

    blocks: int = 12
    max_blocks: int = 48
    min_block_s: float = 0.06
    min_passes: int = 1
    retries: int = 1
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        if self.blocks < MIN_BLOCKS:
            raise refuse("blocks", self.blocks, f">= {MIN_BLOCKS}", "fewer give no 95 % interval")
        if self.max_blocks < self.blocks:
            raise refuse("max_blocks", self.max_blocks, f">= blocks = {self.blocks}")
        if not 0.0 < self.min_block_s < math.inf:
            raise refuse("min_block_s", self.min_block_s, "seconds > 0")

    @property
    def least_passes(self) -> int:
        """`min_passes`, or more where a bounded percentile needs them."""
        needed = [-(-LEAST_PASSES[name] // self.blocks) for name, _ in self.bounds.latency_ms]
        return max([self.min_passes, *needed])


@dataclass
class Samples:
    """One network's blocks in time order: images/s of each, and the seconds of each piece."""

    images_per_s: list[float] = field(default_factory=list)
    durations_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TimingResult:
    """Intervals from rounds of blocks; they hold together over all planned looks."""

    own: Interval
    ratio: Interval | None
    reference: Interval | None
    latency_ms: dict[str, Interval]
    coverage: float
    blocks: int
    passes: int
    disturbance: Disturbance = NOTHING_SEEN
    attempts: int = 1
    seconds: float = 0.0
    began: Conditions = UNKNOWN

    def decides(self, bounds: Bounds) -> Verdict:
        """Compare every bound with its interval: one "fail" fails, one "undecided" stays open."""
        found: list[Verdict] = []
        if bounds.ratio is not None:
            assert self.ratio is not None, "a ratio bound needs a reference"
            found.append(verdict(self.ratio.lo, self.ratio.hi, bounds.ratio))
        if bounds.images_per_s is not None:
            found.append(verdict(self.own.lo, self.own.hi, bounds.images_per_s))
        for name, most in bounds.latency_ms:
            at = self.latency_ms[name]
            found.append(verdict(-at.hi, -at.lo, -most) if enough(at) else "undecided")
        if "fail" in found:
            return "fail"
        narrow = bounds.precision is None or self.half_width <= bounds.precision
        return "undecided" if "undecided" in found or not narrow else "pass"

    def values(self) -> dict[str, Any]:
        """Return the fields of a `Throughput` that come from the clock."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("coverage", "blocks", "passes", "seconds")}
        values |= {name: getattr(self.began, name) for name in ("load", "clock_mhz", "when")}
        values |= {"waited": self.disturbance.waited, "disturbed": self.disturbance.text, "attempts": self.attempts}
        intervals = {"images_per_s": self.own, "ratio": self.ratio}
        intervals |= {f"latency_ms_{name}": at for name, at in self.latency_ms.items()}
        for name, at in intervals.items():
            if at is not None:
                ends = (None, None) if name.startswith("latency") and not enough(at) else (at.lo, at.hi)
                values |= {name: at.median, f"{name}_lo": ends[0], f"{name}_hi": ends[1]}
        return values | {"reference_images_per_s": None if self.reference is None else self.reference.median}

    @property
    def half_width(self) -> float:
        """Half the interval of the ratio (without a reference: of images/s), as a share."""
        of = self.own if self.ratio is None else self.ratio
        return (of.hi - of.lo) / (2.0 * of.median)


def planned_looks(blocks: int, max_blocks: int) -> list[int]:
    """List the block counts at which a sequential measurement looks: doubling up to the maximum."""
    looks = [blocks]
    while looks[-1] < max_blocks:
        looks.append(min(2 * looks[-1], max_blocks))
    return looks


def measure_rounds(
    timers: Sequence[Timer], batches: Sequence[int], plan: TimingPlan, device: str = "cpu"
) -> TimingResult:
    """Time one network, or one beside its reference (the second timer), in alternating blocks.

    Blocks run in the order A B B A A B ..., so that a drift of the machine meets both alike; the ratio is the median
    over neighbouring pairs. While a bound lies inside its interval, the number of blocks is doubled; intervals are
    widened so that all looks together keep their coverage (union bound), and where neighbouring blocks resemble each
    other. Of disturbed attempts the calmest is returned, with what disturbed it.
    """
    started, began = time.perf_counter(), conditions(device)
    # A GPU hides its first passes behind its queue and raises its clocks late.
    warm_up_s = 0.5 if device.startswith("cuda") else 0.0
    passes = [max(plan.least_passes, settle(t, plan.min_block_s, warm_up_s)) for t in timers]
    found: list[TimingResult] = []
    while len(found) <= plan.retries:
        watch = Watch(device)
        series, looks = _rounds(timers, passes, batches, plan)
        found.append(replace(timing_result(series, looks, passes[0]), disturbance=watch.read()))
        if not found[-1].disturbance.text:
            break
    # Undisturbed beats disturbed, whatever it was: a clock drifts without anyone waiting.
    best = min(found, key=lambda of: (bool(of.disturbance.text), of.disturbance.waited or 0.0))
    # An idle GPU's clock, before all, is not that of the passes.
    began = replace(began, clock_mhz=best.disturbance.clock_mhz or began.clock_mhz)
    return replace(best, attempts=len(found), seconds=time.perf_counter() - started, began=began)


def _rounds(
    timers: Sequence[Timer], passes: Sequence[int], batches: Sequence[int], plan: TimingPlan
) -> tuple[list[Samples], list[int]]:
    looks = planned_looks(plan.blocks, plan.blocks if plan.bounds == Bounds() else plan.max_blocks)
    series = [Samples() for _ in timers]
    done = 0
    for until in looks:
        for number in range(done, until):
            order = range(len(timers)) if number % 2 == 0 else reversed(range(len(timers)))
            for which in order:
                pieces = timers[which](passes[which])
                took = max(math.fsum(pieces), 1e-9)
                series[which].images_per_s.append(batches[which] * passes[which] / took)
                series[which].durations_s.extend(piece * len(pieces) / passes[which] for piece in pieces)
        done = until
        if timing_result(series, looks, passes[0]).decides(plan.bounds) != "undecided":
            break
    return series, looks


def timing_result(series: Sequence[Samples], looks: Sequence[int], passes: int) -> TimingResult:
    """Return the intervals of one or two networks' samples, at one of the planned looks.

    Each look may miss with a share of the allowed probability.
    """
    share = 1.0 - (1.0 - COVERAGE) / len(looks)

    def interval(values: Sequence[float], q: float = 0.5) -> Interval:
        return quantile_interval(values, q, share, drift=True)

    own = interval(series[0].images_per_s)
    ratio = reference = None
    if len(series) == 2:
        both = zip(series[0].images_per_s, series[1].images_per_s, strict=True)
        ratio, reference = interval([a / b for a, b in both]), interval(series[1].images_per_s)
    milliseconds = [1e3 * seconds for seconds in series[0].durations_s]
    missed = len(looks) * (1.0 - min(own.coverage, own.coverage if ratio is None else ratio.coverage))
    return TimingResult(
        own=own,
        ratio=ratio,
        reference=reference,
        latency_ms={name: interval(milliseconds, q) for name, q in QUANTILES.items()},
        coverage=max(0.0, 1.0 - missed),
        blocks=len(series[0].images_per_s),
        passes=passes,
    )


def enough(of: Interval) -> bool:
    """Return whether the values enclose a quantile: the 99th of 100 has no end."""
    return of.coverage >= COVERAGE - 0.02


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
