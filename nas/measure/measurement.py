"""A throughput with its intervals, conditions and verdicts; importable without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from nas.core.requirement import LATENCIES, Requirement, Setting
from nas.measure.intervals import COVERAGE, MIN_VISITS, QUANTILES, Verdict, verdict, visit_interval
from space import Context
from space.errors import refuse

LEAST_PASSES = {"p50": 1, "p90": 60, "p99": 500}
"""Passes, of all visits, without which a latency's quantile has no interval."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Throughput and latency of one network, and the conditions of the moment.

    A visit is one fresh process. What one visit finds has no interval; `combined` visits enclose with probability
    `coverage` what further visits would find by `_lo` and `_hi`. `ratio` is images/s over the reference's, from blocks
    that alternate with the reference's; None without a reference. `blocks` and `passes` are per network, of all visits.
    `latency_ms_*` are milliseconds of one pass of `batch` images, waited for (on a GPU at larger batches: the mean of a
    block's); percentiles have no interval where there were too few passes. `parity` is the largest difference of the
    logits from eager float32, as a share of the largest logit; `agrees` whether that is inside the runtime's tolerance;
    `done` describes what the runtime did to the network.

    `waited` is the share of time in which the process's threads could not run, `disturbed` the disturbances in words,
    `attempts` how often a visit was repeated because of them. `load`, `when` (UTC) and `clock_mhz` are of the moment
    when measuring began (of the last visit): conditions, not identity.
    """

    images_per_s: float
    images_per_s_lo: float | None = None
    images_per_s_hi: float | None = None
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    reference_images_per_s: float | None = None
    latency_ms_p50: float | None = None
    latency_ms_p50_lo: float | None = None
    latency_ms_p50_hi: float | None = None
    latency_ms_p90: float | None = None
    latency_ms_p90_lo: float | None = None
    latency_ms_p90_hi: float | None = None
    latency_ms_p99: float | None = None
    latency_ms_p99_lo: float | None = None
    latency_ms_p99_hi: float | None = None
    peak_mem_bytes: int | None = None
    parity: float | None = None
    agrees: int | None = None
    done: str = ""
    coverage: float = 0.0
    visits: int = 1
    blocks: int
    passes: int
    seconds: float
    waited: float | None = None
    disturbed: str = ""
    attempts: int = 1
    load: float | None = None
    clock_mhz: float | None = None
    when: str

    def __post_init__(self) -> None:
        """Refuse numbers that no measurement gives (a table may come from anywhere)."""
        for name in ("images_per_s", "ratio", *(f"latency_ms_{name}" for name in LATENCIES.values())):
            self._check_interval(name)
        self._check_positive("visits", "blocks", "passes")

    def _check_interval(self, name: str) -> None:
        middle, lo, hi = self._ends(name)
        if (middle, lo, hi) == (None, None, None) and name != "images_per_s":
            return
        if middle is not None and (lo, hi) == (None, None):
            lo = hi = middle
        if middle is None or lo is None or hi is None or not 0 < lo <= middle <= hi < math.inf:
            raise refuse(f"measurement.{name}", f"{middle} in [{lo}, {hi}]", "0 < lo <= middle <= hi")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise refuse(f"measurement.{name}", getattr(self, name), "an integer >= 1")

    def _ends(self, name: str) -> tuple[float | None, ...]:
        return tuple(getattr(self, name + end) for end in ("", "_lo", "_hi"))

    def interval(self, metric: str) -> tuple[float, float, float]:
        """Return a measured metric of `nas.core.requirement.METRICS` as (middle, lo, hi).

        Without an interval (one visit, or too few passes for a percentile) it is (middle, 0, infinity).
        """
        if metric == "peak_mem_mb":
            assert self.peak_mem_bytes is not None, "memory was not measured"
            value = self.peak_mem_bytes / 1e6
            return value, value, value
        name = {"speedup": "ratio"}.get(metric, metric)
        if metric in LATENCIES:
            name = f"latency_ms_{LATENCIES[metric]}"
        middle, lo, hi = self._ends(name)
        assert middle is not None, f"{metric} was not measured"
        if lo is None or hi is None:
            return middle, 0.0, math.inf
        return middle, lo, hi

    @property
    def half_width(self) -> float:
        """Half the interval of the ratio (without a reference: of images/s), as a share; infinite without one."""
        middle, lo, hi = self.interval("images_per_s" if self.ratio is None else "speedup")
        return (hi - lo) / (2.0 * middle)

    def with_latency(self, other: Throughput | None) -> Throughput:
        """Return these values with the latencies of another measurement, or with none."""
        names = [f.name for f in fields(Throughput) if f.name.startswith("latency_ms_")]
        latency: dict[str, Any] = {name: getattr(other, name, None) for name in names}
        return replace(self, **latency)


@dataclass(frozen=True, kw_only=True)
class Measurement(Throughput):
    """A `Throughput` under a stated setting, resolution and device."""

    img_size: int
    num_classes: int
    in_chans: int
    batch: int
    dtype: str
    runtime: str
    device: str
    threads: int
    fingerprint: str

    def __post_init__(self) -> None:
        """Refuse numbers that no measurement gives."""
        super().__post_init__()
        self._check_positive("img_size", "num_classes", "in_chans", "batch", "threads")

    @property
    def throughput(self) -> Throughput:
        """The values without setting and device."""
        return Throughput(**{f.name: getattr(self, f.name) for f in fields(Throughput)})

    def verdict_of(self, required: Requirement) -> Verdict:
        """Compare one requirement with the interval's ends."""
        _, lo, hi = self.interval(required.metric)
        if required.sense == ">=":
            return verdict(lo, hi, required.bound)
        return verdict(-hi, -lo, -required.bound)

    def meets(self, requirements: Sequence[Requirement]) -> Verdict:
        """Compare all: one "fail" fails, one "undecided" stays so; nothing required is a pass."""
        found = [self.verdict_of(required) for required in requirements]
        if "fail" in found:
            return "fail"
        return "undecided" if "undecided" in found else "pass"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Inverse of `to_dict`; refuses missing fields, ignores others."""
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise refuse("measurement", ", ".join(missing) + " missing", "all its fields")
        return cls(**{name: values[name] for name in names})


T = TypeVar("T", bound=Throughput)


def combined(visits: Sequence[T], looks: int = 1) -> T:
    """Combine visits of one network, in time order, to one result with intervals over them.

    The intervals hold together over that many `looks` for a decision (union bound). Fewer than `MIN_VISITS` have none.
    """
    last, n = visits[-1], len(visits)
    assert visits, "no visits"
    passes = sum(visit.passes for visit in visits)
    values: dict[str, Any] = {"visits": n, "passes": passes, "coverage": 0.0}
    values |= {name: sum(getattr(visit, name) for visit in visits) for name in ("blocks", "seconds", "attempts")}
    share = 1.0 - (1.0 - COVERAGE) / looks
    for name in ("images_per_s", "ratio", *(f"latency_ms_{name}" for name in QUANTILES)):
        found = [getattr(visit, name) for visit in visits]
        if any(value is None for value in found):
            values |= dict.fromkeys((name, f"{name}_lo", f"{name}_hi"))
        elif n < MIN_VISITS:
            values[name] = math.exp(math.fsum(map(math.log, found)) / n)
        else:
            of = visit_interval(found, share)
            values |= {name: of.median, "coverage": COVERAGE}
            if passes >= LEAST_PASSES.get(name.rpartition("_")[2], 1):
                values |= {f"{name}_lo": of.lo, f"{name}_hi": of.hi}
    beside = [visit.reference_images_per_s for visit in visits if visit.reference_images_per_s is not None]
    if beside:
        values["reference_images_per_s"] = math.exp(math.fsum(map(math.log, beside)) / len(beside))
    waited = [visit.waited for visit in visits if visit.waited is not None]
    values["waited"] = max(waited, default=None)
    values["disturbed"] = "; ".join(dict.fromkeys(visit.disturbed for visit in visits if visit.disturbed))
    worst = [visit for visit in visits if visit.parity is not None]
    if worst:
        of_worst = max(worst, key=lambda visit: visit.parity or 0.0)
        values |= {"parity": of_worst.parity, "agrees": of_worst.agrees}
    return replace(last, **values)


def calmest(visits: Sequence[T], least: int) -> list[T]:
    """Return the visits that nothing disturbed, or all where fewer than `least` are so."""
    calm = [visit for visit in visits if not visit.disturbed]
    return calm if len(calm) >= least else list(visits)


def visits_needed(of: Throughput, required: Requirement) -> int | None:
    """Return about how many visits would decide a requirement that is undecided, by their spread; None: no telling."""
    middle, lo, hi = of.interval(required.metric)
    if not (0.0 < lo < hi < math.inf):
        return None
    away = abs(math.log(middle / required.bound))
    half = math.log(hi / lo) / 2.0
    return None if away < 1e-3 else math.ceil(of.visits * (half / away) ** 2) + 1


def measured_under(of: Throughput, setting: Setting, ctx: Context, threads: int, fingerprint: str) -> Measurement:
    """Return a throughput as a measurement under a setting, in a context, on a device by its fingerprint's id."""
    return Measurement(**vars(of), **vars(setting), **vars(ctx), threads=threads, fingerprint=fingerprint)
