"""A throughput with its intervals, conditions and verdicts; importable without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nas.core.requirement import LATENCIES, Requirement
from nas.measure.intervals import Verdict, verdict
from space.errors import refuse


@dataclass(frozen=True)
class Measurement:
    """Throughput of one network under stated conditions, alone or beside a reference network.

    `ratio` is images/s over the reference's, from blocks that alternate with the reference's; None
    without a reference. `_lo` and `_hi` enclose the medians with probability `coverage`, drift
    accounted for. `blocks` are per network, of `passes` forward passes each. `latency_ms_*` are
    milliseconds of one pass of `batch` images, waited for (on a GPU at larger batches: the mean of
    a block's); percentiles have no interval where there were too few passes. `peak_mem_bytes` is
    None where it was not measured. `parity` is the largest difference of the logits from eager
    float32, as a share of the largest logit; `agrees` whether that is inside the runtime's stated
    tolerance.

    `waited` is the share of time in which our threads could not run, `disturbed` what disturbed in
    words, `attempts` how often it was measured because of that. `load`, `when` (UTC) and
    `clock_mhz` are of the moment when measuring began: conditions, not identity.
    """

    images_per_s: float
    images_per_s_lo: float
    images_per_s_hi: float
    ratio: float | None
    ratio_lo: float | None
    ratio_hi: float | None
    reference_images_per_s: float | None
    coverage: float
    blocks: int
    passes: int
    seconds: float
    img_size: int
    num_classes: int
    in_chans: int
    batch: int
    dtype: str
    runtime: str
    device: str
    threads: int
    fingerprint: str
    load: float | None
    when: str
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
    waited: float | None = None
    disturbed: str = ""
    attempts: int = 1
    clock_mhz: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that no measurement gives (a table may come from anywhere)."""
        _check_interval(self, "images_per_s")
        ratios = (self.ratio, self.ratio_lo, self.ratio_hi)
        if any(value is not None for value in ratios):
            _check_interval(self, "ratio")
        for name in LATENCIES.values():
            if getattr(self, f"latency_ms_{name}_lo") is not None:
                _check_interval(self, f"latency_ms_{name}")
        for name in ("blocks", "passes", "img_size", "num_classes", "in_chans", "batch", "threads"):
            if getattr(self, name) < 1:
                raise refuse(f"measurement.{name}", getattr(self, name), "an integer >= 1")

    def interval(self, metric: str) -> tuple[float, float, float]:
        """Return a measured metric of `nas.core.requirement.METRICS` as (median, lo, hi)."""
        if metric == "peak_mem_mb":
            assert self.peak_mem_bytes is not None, "memory was not measured"
            value = self.peak_mem_bytes / 1e6
            return value, value, value
        name = {"speedup": "ratio", "images_per_s": "images_per_s"}.get(metric)
        name = f"latency_ms_{LATENCIES[metric]}" if name is None else name
        middle, lo, hi = (getattr(self, name + end) for end in ("", "_lo", "_hi"))
        assert middle is not None, f"{metric} was not measured"
        if lo is None or hi is None:  # too few passes for a percentile so far out
            return middle, 0.0, math.inf
        return middle, lo, hi

    def judge(self, required: Requirement) -> Verdict:
        """Judge one requirement by the interval's ends."""
        _, lo, hi = self.interval(required.metric)
        if required.sense == ">=":
            return verdict(lo, hi, required.bound)
        return verdict(-hi, -lo, -required.bound)

    def meets(self, requirements: Sequence[Requirement]) -> Verdict:
        """Judge all: one "fail" fails, one "undecided" stays so; nothing required is a pass."""
        found = [self.judge(required) for required in requirements]
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


def _check_interval(of: Measurement, name: str) -> None:
    middle, lo, hi = (getattr(of, name + end) for end in ("", "_lo", "_hi"))
    sound = all(value is not None and math.isfinite(value) for value in (middle, lo, hi))
    if not (sound and 0 < lo <= middle <= hi):
        raise refuse(f"measurement.{name}", f"{middle} in [{lo}, {hi}]", "0 < lo <= median <= hi")
