"""A throughput with its interval, conditions and verdict; importable without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from space.errors import refuse

Verdict = Literal["pass", "fail", "undecided"]

MIN_BLOCKS = 6
"""Fewest blocks of which the extremes enclose the median with 95 %: 1 - 2 * 0.5**6 = 0.969."""

COVERAGE = 0.95
"""Least probability with which an interval encloses the true median, over all its looks."""


@dataclass(frozen=True)
class Interval:
    """Median of a sample with a distribution-free interval; `coverage` is its exact probability."""

    median: float
    lo: float
    hi: float
    coverage: float


def median_interval(values: Sequence[float], coverage: float = COVERAGE) -> Interval:
    """Enclose the median of the values' distribution by two of the order statistics.

    The k-th smallest and k-th largest of n independent values enclose the median with probability
    1 - 2 P(Binomial(n, 1/2) < k), whatever the distribution; the largest k that still reaches
    `coverage` is taken, and k = 1 where none does (`coverage` of the result then says less).
    Source: David and Nagaraja, Order Statistics, section 7.1.
    """
    assert values, "no values"
    ordered = sorted(values)
    n = len(ordered)
    middle = n // 2
    median = ordered[middle] if n % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    rank, reached = 1, 1.0 - 2.0 * 0.5**n
    for k in range(2, n // 2 + 1):
        at_k = 1.0 - 2.0 * sum(math.comb(n, i) for i in range(k)) * 0.5**n
        if at_k < coverage:
            break
        rank, reached = k, at_k
    return Interval(median, ordered[rank - 1], ordered[n - rank], max(0.0, reached))


def verdict(lo: float, hi: float, at_least: float) -> Verdict:
    """Judge an interval against a bound: pass when all of it meets the bound, fail when none."""
    if lo >= at_least:
        return "pass"
    return "fail" if hi < at_least else "undecided"


@dataclass(frozen=True)
class Measurement:
    """Throughput of one network under stated conditions, alone or beside a reference network.

    `ratio` is images/s over the reference's, from blocks that alternate with the reference's; None
    without a reference. `_lo` and `_hi` enclose the medians with probability `coverage` (blocks
    taken as independent). `blocks` are per network, of `passes` forward passes each. `load` is the
    load average when measuring began, `when` that moment in UTC; both are conditions, not identity.
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

    def __post_init__(self) -> None:
        """Refuse numbers that no measurement gives (a table may come from anywhere)."""
        _check_interval(self, "images_per_s")
        ratios = (self.ratio, self.ratio_lo, self.ratio_hi)
        if any(value is not None for value in ratios):
            _check_interval(self, "ratio")
        for name in ("blocks", "passes", "img_size", "num_classes", "in_chans", "batch", "threads"):
            if getattr(self, name) < 1:
                raise refuse(f"measurement.{name}", getattr(self, name), "an integer >= 1")

    def meets(
        self,
        ratio_at_least: float | None = None,
        images_per_s_at_least: float | None = None,
    ) -> Verdict:
        """Judge the bounds by the interval ends: any "fail" fails, any "undecided" stays so.

        A ratio bound needs a measurement with a reference. No bound at all is a pass.
        """
        found: list[Verdict] = []
        if ratio_at_least is not None:
            assert self.ratio_lo is not None, "a ratio bound needs a reference"
            assert self.ratio_hi is not None, "a ratio bound needs a reference"
            found.append(verdict(self.ratio_lo, self.ratio_hi, ratio_at_least))
        if images_per_s_at_least is not None:
            found.append(verdict(self.images_per_s_lo, self.images_per_s_hi, images_per_s_at_least))
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
