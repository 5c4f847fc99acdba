"""A throughput with its intervals, conditions and verdicts; importable without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nas.core.requirement import LATENCIES, Requirement, Setting
from nas.measure.intervals import Verdict, verdict
from space import Context
from space.errors import refuse


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Throughput and latency of one network, with intervals and the conditions of the moment.

    `ratio` is images/s over the reference's, from blocks that alternate with the reference's; None without a reference.
    `_lo` and `_hi` enclose the medians with probability `coverage`, drift accounted for. `blocks` are per network, of
    `passes` forward passes each. `latency_ms_*` are milliseconds of one pass of `batch` images, waited for (on a GPU at
    larger batches: the mean of a block's); percentiles have no interval where there were too few passes. `parity` is
    the largest difference of the logits from eager float32, as a share of the largest logit; `agrees` whether that is
    inside the runtime's tolerance; `done` describes what the runtime did to the network.

    `waited` is the share of time in which the process's threads could not run, `disturbed` the disturbances in words,
    `attempts` how often it was measured because of them. `load`, `when` (UTC) and `clock_mhz` are of the moment when
    measuring began: conditions, not identity.
    """

    images_per_s: float
    images_per_s_lo: float
    images_per_s_hi: float
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
    coverage: float
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
        self._check_interval("images_per_s")
        if any(value is not None for value in self._ends("ratio")):
            self._check_interval("ratio")
        for name in LATENCIES.values():
            if getattr(self, f"latency_ms_{name}_lo") is not None:
                self._check_interval(f"latency_ms_{name}")
        self._check_positive("blocks", "passes")

    def _check_interval(self, name: str) -> None:
        middle, lo, hi = self._ends(name)
        if middle is None or lo is None or hi is None or not 0 < lo <= middle <= hi < math.inf:
            raise refuse(f"measurement.{name}", f"{middle} in [{lo}, {hi}]", "0 < lo <= median <= hi")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise refuse(f"measurement.{name}", getattr(self, name), "an integer >= 1")

    def _ends(self, name: str) -> tuple[float | None, ...]:
        return tuple(getattr(self, name + end) for end in ("", "_lo", "_hi"))

    def interval(self, metric: str) -> tuple[float, float, float]:
        """Return a measured metric of `nas.core.requirement.METRICS` as (median, lo, hi)."""
        if metric == "peak_mem_mb":
            assert self.peak_mem_bytes is not None, "memory was not measured"
            value = self.peak_mem_bytes / 1e6
            return value, value, value
        name = {"speedup": "ratio"}.get(metric, metric)
        if metric in LATENCIES:
            name = f"latency_ms_{LATENCIES[metric]}"
        middle, lo, hi = self._ends(name)
        assert middle is not None, f"{metric} was not measured"
        if lo is None or hi is None:  # too few passes for a percentile so far out
            return middle, 0.0, math.inf
        return middle, lo, hi

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


def measured_under(of: Throughput, setting: Setting, ctx: Context, threads: int, fingerprint: str) -> Measurement:
    """Return a throughput as a measurement under a setting, in a context, on a device by its fingerprint's id."""
    return Measurement(**vars(of), **vars(setting), **vars(ctx), threads=threads, fingerprint=fingerprint)
