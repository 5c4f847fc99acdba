"""Timing in interleaved blocks of passes, in any runtime; standard library only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nas.measure.interference import Disturbance, Watch
from nas.measure.intervals import COVERAGE, Interval, Verdict, quantile_interval, verdict

Timer = Callable[[int], list[float]]
"""Runs that many passes to the end and returns the seconds of each piece that was clocked alone:
every pass where clocks are free (a CPU), the whole block where waiting would cost (a GPU)."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
"""The reported latencies, by name."""

WARM_UP_S = 60.0

UNDISTURBED = Disturbance(None, "")


@dataclass(frozen=True)
class Bounds:
    """What a measurement is to decide; None: no bound.

    `ratio` and `images_per_s` are least values, `latency_ms` the most milliseconds a pass, by the
    name of the quantile. `precision` is the most half width of the interval, as a share.
    """

    ratio: float | None = None
    images_per_s: float | None = None
    latency_ms: tuple[tuple[str, float], ...] = ()
    precision: float | None = None

    @property
    def any(self) -> bool:
        """Whether anything is to be decided, so that more blocks may be worth their time."""
        return self != Bounds()


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
    disturbance: Disturbance
    attempts: int
    seconds: float

    def decides(self, bounds: Bounds) -> Verdict:
        """Judge every bound by its interval: one "fail" fails, one "undecided" stays open."""
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
    timers: Sequence[Timer],
    *,
    batch: int,
    bounds: Bounds,
    blocks: int,
    max_blocks: int,
    min_block_s: float,
    min_passes: int = 1,
    warm_up_s: float = 0.0,
    retries: int = 1,
    device: str = "cpu",
    reference_batch: int | None = None,
) -> TimingResult:
    """Time one network, or one beside its reference (`timers[1]`), in alternating blocks.

    Blocks run in the order A B B A A B ..., so that a drift of the machine meets both alike; the
    ratio is the median over neighbouring pairs. While a bound lies inside its interval, the number
    of blocks is doubled, up to `max_blocks`; intervals are widened so that all looks together keep
    their coverage (union bound), and where neighbouring blocks resemble each other.

    A measurement that was disturbed is repeated, `retries` times at most, and the calmest one is
    returned with what disturbed it.
    """
    started = time.perf_counter()
    passes = [max(min_passes, settle(t, min_block_s, warm_up_s)) for t in timers]
    best: TimingResult | None = None
    attempt = 0
    while attempt <= retries:
        attempt += 1
        seen = Watch(device)
        batches = [batch, reference_batch or batch][: len(timers)]
        series, looks = _rounds(timers, passes, batches, bounds, blocks, max_blocks)
        made = timing_result(series, looks, passes[0], seen.read())
        if best is None or _unrest(made) < _unrest(best):
            best = made
        if not made.disturbance.text:
            break
    assert best is not None
    return replace(best, attempts=attempt, seconds=time.perf_counter() - started)


def _unrest(of: TimingResult) -> tuple[bool, float]:
    # Undisturbed beats disturbed, whatever it was: a clock drifts without anyone waiting.
    return bool(of.disturbance.text), of.disturbance.waited or 0.0


def _rounds(
    timers: Sequence[Timer], passes: Sequence[int], batches: Sequence[int], bounds: Bounds, blocks: int, max_blocks: int
) -> tuple[list[Samples], list[int]]:
    looks = planned_looks(blocks, max_blocks if bounds.any else blocks)
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
        if timing_result(series, looks, passes[0]).decides(bounds) != "undecided":
            break
    return series, looks


def timing_result(
    series: Sequence[Samples], looks: Sequence[int], passes: int, disturbance: Disturbance = UNDISTURBED
) -> TimingResult:
    """Return the intervals of one or two networks' samples, at one of the planned looks.

    Each look may miss with a share of the allowed probability.
    """
    share = 1.0 - (1.0 - COVERAGE) / len(looks)
    own = quantile_interval(series[0].images_per_s, 0.5, share, drift=True)
    ratio = reference = None
    if len(series) == 2:
        both = zip(series[0].images_per_s, series[1].images_per_s, strict=True)
        ratio = quantile_interval([a / b for a, b in both], 0.5, share, drift=True)
        reference = quantile_interval(series[1].images_per_s, 0.5, share, drift=True)
    latency = {
        name: _in_ms(quantile_interval(series[0].durations_s, q, share, drift=True)) for name, q in QUANTILES.items()
    }
    missed = len(looks) * (1.0 - min(own.coverage, own.coverage if ratio is None else ratio.coverage))
    return TimingResult(
        own=own,
        ratio=ratio,
        reference=reference,
        latency_ms=latency,
        coverage=max(0.0, 1.0 - missed),
        blocks=len(series[0].images_per_s),
        passes=passes,
        disturbance=disturbance,
        attempts=1,
        seconds=0.0,
    )


def enough(of: Interval) -> bool:
    """Return whether the values enclose a quantile: the 99th of 100 has no end."""
    return of.coverage >= COVERAGE - 0.02


LEAST_PASSES = {"p50": 1, "p90": 60, "p99": 500}
"""Passes without which a quantile's interval has no upper end, with some to spare for looks."""


def _in_ms(of: Interval) -> Interval:
    return Interval(of.median * 1e3, of.lo * 1e3, of.hi * 1e3, of.coverage, of.count)


def settle(timer: Timer, min_block_s: float, warm_up_s: float = 0.0) -> int:
    """Warm up until passes stop becoming faster; return how many passes fill a block.

    The first passes allocate, pick kernels and raise clocks. Warm is what runs for at least
    `warm_up_s` and whose last three passes, at their best, no longer beat the best before them by
    2 %; a minute at most, as a machine that never settles is measured all the same.
    """
    took: list[float] = []
    while True:
        took.append(math.fsum(timer(1)))
        spent = math.fsum(took)
        if spent < warm_up_s or len(took) < 4:
            if spent > WARM_UP_S and len(took) >= 2:
                break
            continue
        if min(took[-3:]) > 0.98 * min(took[:-3]) or spent > WARM_UP_S:
            break
    return max(1, math.ceil(min_block_s / max(min(took), 1e-9)))


def summary(of: TimingResult) -> dict[str, Any]:
    """Return the fields of a `Throughput` that come from the clock."""
    values: dict[str, Any] = {
        "images_per_s": of.own.median,
        "images_per_s_lo": of.own.lo,
        "images_per_s_hi": of.own.hi,
        "ratio": None if of.ratio is None else of.ratio.median,
        "ratio_lo": None if of.ratio is None else of.ratio.lo,
        "ratio_hi": None if of.ratio is None else of.ratio.hi,
        "reference_images_per_s": None if of.reference is None else of.reference.median,
        "coverage": of.coverage,
        "blocks": of.blocks,
        "passes": of.passes,
        "seconds": of.seconds,
        "waited": of.disturbance.waited,
        "disturbed": of.disturbance.text,
        "attempts": of.attempts,
    }
    for name, at in of.latency_ms.items():
        values[f"latency_ms_{name}"] = at.median
        values[f"latency_ms_{name}_lo"] = at.lo if enough(at) else None
        values[f"latency_ms_{name}_hi"] = at.hi if enough(at) else None
    return values
