"""Requirements of a step's candidates: timed before the trainings, and decided between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nas.contract.state import Run
from nas.contract.step import THROUGHPUT, Step, add_trial, trial_of
from nas.contract.timing import interval_text, verdict_text
from nas.core.requirement import Requirement, Setting
from nas.jobs.job import Result, log_of
from nas.measure.measurement import Measurement
from nas.search.study import Trial
from space.contractions import Candidate


def meet_requirements(run: Run, step: Step, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Time candidates under every setting, the primary one first; return those that no requirement rejects.

    They have the fewest visits that are allowed, so some are provisional: `settle` decides them later. A candidate that
    misses a bound becomes a trial and is not measured further.
    """
    left = [c for c in candidates if not run.study.failed(step.number, c.key, "throughput")]
    for setting in run.settings:
        left = _meet_under(run, step, left, setting)
    return left


def _meet_under(run: Run, step: Step, candidates: Sequence[Candidate], setting: Setting) -> list[Candidate]:
    bounds = {each.key: step.bounds[step.parent_of(each).key] for each in candidates}
    primary = setting == run.primary
    due = [each for each in candidates if primary or bounds[each.key].under(setting)]
    required = [bounds[each.key].under(setting) for each in due]
    found = run.timings.measure_together(
        [each.arch for each in due], "gate", reference=run.seed_arch, requirements=required, setting=setting
    )
    measured = dict(zip([each.key for each in due], found, strict=True))
    kept = []
    for candidate in candidates:
        timed = measured.get(candidate.key)
        if timed is None:
            kept.append(candidate)
            continue
        candidate = replace(candidate, seconds=candidate.seconds + timed.seconds)
        if isinstance(timed, Result):
            reason = timed.reason or "failed"
            if not primary:
                reason = f"{setting.text}: {reason}"
            log = log_of(timed.key)
            trial = trial_of(run, step.number, candidate, stage="throughput", state="failed", reason=reason, log=log)
            add_trial(run, trial, candidate.arch)
            continue
        candidate = _with_timing(run, step, candidate, setting, timed)
        guessed = run.timings.predicts(setting, candidate.arch)
        missed = _missed(timed, bounds[candidate.key].under(setting), guessed or provisional(run, timed))
        least_ratio = bounds[candidate.key].least_ratio
        if primary and least_ratio is not None:
            missed = [*_slower(timed, least_ratio), *missed]
        if missed:
            add_trial(run, missed_trial(run, step, candidate, missed), candidate.arch)
            continue
        kept.append(candidate)
    return kept


def missed_trial(run: Run, step: Step, candidate: Candidate, missed: Sequence[tuple[str, float]]) -> Trial:
    """Return a candidate that misses requirements as a trial."""
    reason, violation = "; ".join(text for text, _ in missed), max(v for _, v in missed)
    return replace(trial_of(run, step.number, candidate, stage="throughput", reason=reason), violation=violation)


def provisional(run: Run, measured: Measurement) -> bool:
    """Return whether more visits may still decide a measurement."""
    return measured.visits < run.timings.looks[-1]


def _with_timing(run: Run, step: Step, candidate: Candidate, setting: Setting, timed: Measurement) -> Candidate:
    """Return a candidate with a timing's values, and the verdicts under its setting in place of earlier ones."""
    if setting == run.primary:
        values = {name: getattr(timed, name) for name in THROUGHPUT}
        candidate = replace(candidate, **values, basis=run.timings.basis(candidate.arch))
    required = step.bounds[step.parent_of(candidate).key].under(setting)
    old = tuple(text for text in candidate.requirements if not text.startswith(tuple(one.text for one in required)))
    return replace(candidate, requirements=(*old, *(verdict_text(timed, one) for one in required)))


def settle(run: Run, step: Step, candidate: Candidate, *, last: bool) -> tuple[Candidate, list[tuple[str, float]]]:
    """Make more visits while a candidate's requirements are undecided; return it as measured, and what it misses.

    One look further, or with `last` as far as `--max-visits`: what is undecided then is missed.
    """
    missed: list[tuple[str, float]] = []
    for setting in run.settings:
        required = step.bounds[step.parent_of(candidate).key].under(setting)
        if not required or run.timings.predicts(setting, candidate.arch):
            continue
        options: dict[str, Any] = {"reference": run.seed_arch, "setting": setting, "requirements": [required]}
        (timed,) = run.timings.measure_together([candidate.arch], "gate", **options)
        for look in run.timings.looks:
            if isinstance(timed, Result) or timed.meets(required) != "undecided":
                break
            if look > timed.visits:
                (timed,) = run.timings.measure_together([candidate.arch], "gate", visits=look, **options)
                if not last:
                    break
        if isinstance(timed, Result):
            return candidate, [(f"{setting.text}: {timed.reason}", 0.0)]
        candidate = _with_timing(run, step, candidate, setting, timed)
        missed += _missed(timed, required, not last and provisional(run, timed))
    return candidate, missed


def _slower(measured: Measurement, least_ratio: float) -> list[tuple[str, float]]:
    """Return the text and share by which a candidate is slower than its parent; else nothing.

    The median decides: on a noisy machine no interval would clear a bound so near to 1.
    """
    ratio, lo, hi = measured.interval("speedup")
    if ratio >= least_ratio:
        return []
    text = f"slower than {least_ratio:.3f}x the seed (its parent less 2 %): "
    return [(f"{text}{ratio:.3f} [{lo:.3f}, {hi:.3f}]", least_ratio / ratio - 1)]


def _missed(measured: Measurement, required: Sequence[Requirement], later: bool) -> list[tuple[str, float]]:
    """Return the text and share of each missed requirement.

    A measurement must meet a requirement with its whole interval; where the device is measured `later` (again), it
    misses one only with its whole interval.
    """
    found = []
    for one in required:
        verdict = measured.verdict_of(one)
        if verdict == "pass" or (later and verdict == "undecided"):
            continue
        word = "misses" if verdict == "fail" else "does not surely meet"
        _, lo, hi = measured.interval(one.metric)
        violation = one.bound / lo - 1 if one.sense == ">=" else hi / one.bound - 1
        text = f"{word} {one.text}: {interval_text(measured, one.metric)}"
        found.append((text, min(violation, 1e6)))
    return found
