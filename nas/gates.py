"""A step's gates on throughput, and the ledger rows of those that stop there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nas.jobs import Result
from nas.measure.measurement import Measurement
from nas.run import Incumbent, Run
from nas.search.constraints import StepBounds, band_at
from nas.search.ledger import Row
from space import Context
from space.family import Arch
from space.neighbours import Shortlisted

REFERENCE_CONTEXT = Context(img_size=224, num_classes=1000)
"""Where `params_1000` is counted."""


@dataclass(frozen=True)
class Candidate:
    """A shortlisted arch on its way through a step's gates."""

    of: Shortlisted
    key: str
    parent: Incumbent
    measured: Measurement | None = None
    seconds: float = 0.0


def ratio_of(candidate: Candidate) -> float:
    assert candidate.measured is not None
    assert candidate.measured.ratio is not None
    return candidate.measured.ratio


def measured_of(candidate: Candidate) -> Measurement:
    assert candidate.measured is not None
    return candidate.measured


def row_of(run: Run, step: int, candidate: Candidate, **more: Any) -> Row:
    """Return a candidate's ledger row as far as it is known, with `more` filled in."""
    arch, family = candidate.of.arch, run.family
    measured = candidate.measured
    row = Row(
        step=step,
        key=candidate.key,
        label=family.label(arch),
        parent=candidate.parent.key,
        moves=family.describe_moves(candidate.parent.arch, arch),
        notches=candidate.of.notches,
        anchor=candidate.of.anchor or "",
        params=candidate.of.params,
        params_1000=family.count_params(arch, REFERENCE_CONTEXT),
        macs=candidate.of.macs,
        seconds=round(candidate.seconds, 3),
    )
    if measured is not None:
        row = replace(
            row,
            images_per_s=measured.images_per_s,
            images_per_s_lo=measured.images_per_s_lo,
            images_per_s_hi=measured.images_per_s_hi,
            ratio=measured.ratio,
            ratio_lo=measured.ratio_lo,
            ratio_hi=measured.ratio_hi,
            reference=run.key(run.seed_arch),
        )
    return replace(row, **more)


def add_row(run: Run, row: Row, arch: Arch, violation: float = 0.0) -> None:
    """Write one decided candidate to the study, with its violations (at most 0 where met).

    `violation` is by how much it missed its throughput.
    """
    seed_params = run.family.count_params(run.seed_arch, run.context)
    over = row.params - band_at(seed_params, run.config, row.step).hi
    run.ledger.add(row, run.family.to_dict(arch), {"params": float(over), "throughput": violation})


def gate(run: Run, step: int, candidate: Candidate, bounds: StepBounds) -> Candidate | None:
    """Time a candidate against its bounds; one that stops here becomes a row at once."""
    if run.ledger.failed(step, candidate.key):
        return None
    measured = run.measure(
        candidate.of.arch,
        "gate",
        reference=run.seed_arch,
        ratio_at_least=bounds.ratio,
        images_per_s_at_least=bounds.images_per_s,
    )
    arch = candidate.of.arch
    if isinstance(measured, Result):
        reason = measured.reason or "failed"
        row = row_of(run, step, candidate, stage="throughput", state="failed", reason=reason)
        add_row(run, replace(row, seconds=round(measured.seconds, 3)), arch)
        return None
    candidate = replace(candidate, measured=measured, seconds=measured.seconds)
    verdict = _verdict(measured, bounds)
    if verdict == "pass":
        return candidate
    reason, violation = _too_slow(measured, bounds, verdict)
    row = row_of(run, step, candidate, stage="throughput", state="pruned", reason=reason)
    add_row(run, row, arch, violation)
    return None


def _verdict(measured: Measurement, bounds: StepBounds) -> str:
    """Judge a measurement: what a user asked for by the interval, the parent's pace by the median.

    A requirement must be met by the whole interval. "Not slower than its parent" is a guard
    without a promise: on a noisy machine no interval would ever clear a bound so near to 1.
    """
    if bounds.follows_parent:
        assert bounds.ratio is not None
        assert measured.ratio is not None
        return "pass" if measured.ratio >= bounds.ratio else "fail"
    return measured.meets(bounds.ratio, bounds.images_per_s)


def _too_slow(measured: Measurement, bounds: StepBounds, verdict: str) -> tuple[str, float]:
    """Say which bound was missed and by how much."""
    word = "slower than" if verdict == "fail" else "not surely as fast as"
    parts, violation = [], 0.0
    if bounds.ratio is not None and (
        bounds.follows_parent or measured.meets(bounds.ratio) != "pass"
    ):
        assert measured.ratio is not None
        assert measured.ratio_lo is not None
        what = "its parent less 2 %" if bounds.follows_parent else "required"
        parts.append(
            f"{word} {bounds.ratio:.3f}x the seed ({what}): "
            f"{measured.ratio:.3f} [{measured.ratio_lo:.3f}, {measured.ratio_hi:.3f}]"
        )
        violation = max(violation, bounds.ratio - measured.ratio_lo)
    if (
        bounds.images_per_s is not None
        and measured.meets(images_per_s_at_least=bounds.images_per_s) != "pass"
    ):
        parts.append(
            f"{word} {bounds.images_per_s:.1f} images/s: {measured.images_per_s:.1f} "
            f"[{measured.images_per_s_lo:.1f}, {measured.images_per_s_hi:.1f}]"
        )
        violation = max(violation, 1 - measured.images_per_s_lo / bounds.images_per_s)
    return "; ".join(parts), violation
