"""A step's gates on what is measured, and the ledger rows of those that stop there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nas.contract.state import Incumbent, Run
from nas.core.requirement import Requirement
from nas.jobs.job import Result
from nas.jobs.outcomes import log_of
from nas.measure.measurement import Measurement
from nas.search.constraints import StepBounds
from nas.search.study import Trial
from space import REFERENCE_CONTEXT
from space.contractions import Shortlisted
from space.family import Arch

UNITS = {"speedup": "x the seed", "images_per_s": " images/s", "peak_mem_mb": " MB"}


@dataclass(frozen=True)
class Candidate:
    """A shortlisted arch on its way through a step's gates.

    `measured` is under the run's primary setting; `verdicts` tells each requirement with what was
    measured.
    """

    of: Shortlisted
    key: str
    parent: Incumbent
    measured: Measurement | None = None
    verdicts: tuple[str, ...] = ()
    basis: str = ""
    seconds: float = 0.0


def ratio_of(candidate: Candidate) -> float:
    assert candidate.measured is not None
    assert candidate.measured.ratio is not None
    return candidate.measured.ratio


def measured_of(candidate: Candidate) -> Measurement:
    assert candidate.measured is not None
    return candidate.measured


def row_of(run: Run, step: int, candidate: Candidate, **more: Any) -> Trial:
    """Return a candidate's ledger row as far as it is known, with `more` filled in."""
    arch, family = candidate.of.arch, run.family
    measured = candidate.measured
    row = Trial(
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
        requirements="; ".join(candidate.verdicts),
        basis=candidate.basis,
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


def add_row(run: Run, row: Trial, arch: Arch, violation: float = 0.0) -> None:
    """Write one decided candidate to the study, with its violations (at most 0 where met).

    `violation` is by what share it missed a requirement.
    """
    row = replace(row, violation=violation)
    over = row.params - run.band(row.step).hi
    run.ledger.add(row, run.family.to_dict(arch), {"params": float(over), "throughput": violation})


def gate(run: Run, step: int, candidate: Candidate, bounds: StepBounds) -> Candidate | None:
    """Time a candidate against its bounds, setting by setting, the primary one first.

    One that stops here becomes a row at once, and is not measured under the settings left.
    """
    if run.ledger.failed(step, candidate.key, "throughput"):
        return None
    arch = candidate.of.arch
    for setting in run.settings:
        required = bounds.under(setting)
        if not required and setting != run.primary:
            continue
        measured = run.timings.measure(
            arch, "gate", reference=run.seed_arch, requirements=required, setting=setting, step=step
        )
        if isinstance(measured, Result):
            reason = measured.reason or "failed"
            if setting != run.primary:
                reason = f"{setting.text}: {reason}"
            row = row_of(
                run,
                step,
                candidate,
                stage="throughput",
                state="failed",
                reason=reason,
                log=log_of(f"gate-{candidate.key}"),
            )
            add_row(run, replace(row, seconds=round(row.seconds + measured.seconds, 3)), arch)
            return None
        guessed = run.timings.predicts(setting, arch)
        candidate = replace(
            candidate,
            measured=measured if setting == run.primary else candidate.measured,
            basis=run.timings.basis(arch) if setting == run.primary else candidate.basis,
            verdicts=(*candidate.verdicts, *(told(measured, r) for r in required)),
            seconds=candidate.seconds + measured.seconds,
        )
        missed = _missed(measured, required, bounds, guessed, primary=setting == run.primary)
        if missed:
            reason = "; ".join(text for text, _ in missed)
            row = row_of(run, step, candidate, stage="throughput", state="pruned", reason=reason)
            add_row(run, row, arch, max(violation for _, violation in missed))
            return None
    return candidate


def shown(measured: Measurement, metric: str) -> str:
    """Write a measured value with its interval: `1.93 [1.90, 1.97]x the seed`."""
    value, lo, hi = measured.interval(metric)
    digits = 3 if metric == "speedup" else 1
    unit = UNITS.get(metric, " ms")
    if lo == hi:
        return f"{value:.{digits}f}{unit}"
    return f"{value:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]{unit}"


def told(measured: Measurement, required: Requirement) -> str:
    """Say a requirement with its verdict and what was measured."""
    return f"{required.text}: {measured.judge(required)} at {shown(measured, required.metric)}"


def _missed(
    measured: Measurement,
    required: tuple[Requirement, ...],
    bounds: StepBounds,
    guessed: bool,
    *,
    primary: bool,
) -> list[tuple[str, float]]:
    """Say which bounds were missed, and by what share each.

    A requirement must be met by the whole interval; a prediction may not miss it with all of its
    own, as the device has the last word. "Not slower than its parent" is a guard without a
    promise, judged by the median: on a noisy machine no interval would clear a bound so near to 1.
    """
    found = []
    if primary and bounds.least_ratio is not None:
        ratio, lo, hi = measured.interval("speedup")
        if ratio < bounds.least_ratio:
            found.append(
                (
                    f"slower than {bounds.least_ratio:.3f}x the seed (its parent less 2 %): "
                    f"{ratio:.3f} [{lo:.3f}, {hi:.3f}]",
                    bounds.least_ratio / ratio - 1,
                )
            )
    for one in required:
        verdict = measured.judge(one)
        if verdict == "pass" or (guessed and verdict == "undecided"):
            continue
        word = "misses" if verdict == "fail" else "does not surely meet"
        _, lo, hi = measured.interval(one.metric)
        violation = one.bound / lo - 1 if one.sense == ">=" else hi / one.bound - 1
        found.append((f"{word} {one.text}: {shown(measured, one.metric)}", min(violation, 1e6)))
    return found
