"""The contraction itself: step by step from the seed to the target, as DESIGN tells it.

Everything here is a function of the configuration, the measurements and the jobs' results, so a
resumed run repeats itself: jobs and measurements that are done are taken over, rows that are
written are not written twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.gates import Candidate, add_row, gate, measured_of, ratio_of, row_of
from nas.requirement import Requirement
from nas.run import MEASURE_COST, Incumbent, Run
from nas.search.constraints import PACE, StepBounds, bounds_at, requirements_of
from nas.search.selection import Scored, Timed, paired_error, rank, spread
from nas.tables import StepRow, write_steps
from space.neighbours import count_contractions, shortlist


@dataclass(frozen=True)
class Stuck:
    """A step that no candidate survived: which constraint binds, in words."""

    message: str


def derived_seed(*parts: object) -> int:
    """Return a seed for one decision, from the run's random seed and what is decided."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def contract_steps(
    run: Run, seed: Incumbent, steps: list[StepRow]
) -> tuple[list[Incumbent], Stuck | None, list[list[Incumbent]]]:
    """Take every step; return the last incumbents, why it stopped early, and all incumbents.

    `steps` collects one row a step as they finish, for `steps.csv`.
    """
    incumbents = [seed]
    path = [incumbents]
    for step in range(1, run.config.steps + 1):
        outcome = _step(run, step, incumbents, steps)
        if isinstance(outcome, Stuck):
            return incumbents, outcome, path
        kept = {i.key for i in outcome}
        for old in incumbents:
            # The seed's weights start the final training, and are shared through the cache.
            if old.key not in kept and old is not seed:
                run.folder.drop_weights(f"s{step - 1}-{old.key}")
        incumbents = outcome
        path.append(incumbents)
    return incumbents, None, path


def _step(
    run: Run, step: int, incumbents: Sequence[Incumbent], steps: list[StepRow]
) -> list[Incumbent] | Stuck:
    config, family = run.config, run.family
    seed_params = family.count_params(run.seed_arch, run.context)
    bounds = {
        incumbent.key: bounds_at(
            step,
            config,
            seed_params=seed_params,
            seed_values=run.seed_values,
            parent_ratio=incumbent.ratio,
        )
        for incumbent in incumbents
    }
    band = bounds[incumbents[0].key].band
    counted = sum(
        count_contractions(family, incumbent.arch, run.context, band) for incumbent in incumbents
    )
    tried: set[str] = set()
    failed = 0
    for draw in range(config.draws):
        drawn = shortlist(
            family,
            [i.arch for i in incumbents],
            run.context,
            replace(band, max_macs=_lighter(run, bounds[incumbents[0].key], draw)),
            config.shortlist,
            random_seed=derived_seed(config.random_seed, "shortlist", step),
            anchors=config.anchors and draw == 0,
            exclude=tried,
        )
        passed = []
        if draw:
            run.console.extend(len(drawn) * MEASURE_COST)
        for listed in drawn:
            key = run.key(listed.arch)
            tried.add(key)
            parent = next(i for i in incumbents if i.arch == listed.parent)
            candidate = gate(run, step, Candidate(listed, key, parent), bounds[parent.key])
            if candidate is not None:
                passed.append(candidate)
        scored = _proxy(run, step, passed) if passed else []
        if scored:
            ranked = _decide(run, step, scored)
            _close_step(run, step, bounds[incumbents[0].key], counted, ranked, steps)
            return ranked
        failed += len(passed)
    return _stuck(run, step, band_text(band.lo, band.hi), counted, tried, failed, bounds)


def band_text(lo: int, hi: int) -> str:
    """Return a parameter band in words."""
    return f"[{lo / 1e6:.3f}M, {hi / 1e6:.3f}M]"


def _lighter(run: Run, bounds: StepBounds, draw: int) -> int | None:
    """Return the most MACs that a further draw looks at; the first draw has only the run's own.

    When no contraction of the first draw was fast enough, the fewest notches were the wrong
    place to look: each further draw asks for fewer MACs than the required pace suggests.
    """
    own = bounds.band.max_macs
    if draw == 0:
        return own
    ratio = bounds.least_ratio or 1.0
    for required in bounds.requirements:
        seed = run.seed_values[run_requirement(run, required)]
        if required.metric == "speedup":
            ratio = max(ratio, required.bound)
        elif required.metric in PACE:
            faster = required.bound / seed if required.sense == ">=" else seed / required.bound
            ratio = max(ratio, faster)
    lighter = int(run.seed_macs / ratio * 0.8 ** (draw - 1))
    return lighter if own is None else min(own, lighter)


def run_requirement(run: Run, tightened: Requirement) -> Requirement:
    """Return the run's own requirement that a step's tightened one stands for."""
    return next(
        r
        for r in requirements_of(run.config)
        if (r.metric, r.setting) == (tightened.metric, tightened.setting)
    )


@dataclass(frozen=True)
class Trained:
    """A candidate that was scored, with what its training job said."""

    candidate: Candidate
    values: Mapping[str, Any]


def _features(run: Run, candidate: Candidate) -> tuple[float, ...]:
    """Return the arch as numbers, for distances between candidates."""
    numbers: list[float] = []
    for value in run.family.to_dict(candidate.of.arch).values():
        numbers.extend(float(v) for v in (value if isinstance(value, list) else [value]))
    return tuple(numbers)


def _proxy(run: Run, step: int, passed: Sequence[Candidate]) -> list[Trained]:
    """Train those best spread; the others, and the failures, become rows."""
    config = run.config
    chosen = spread(
        [Timed(c.key, _features(run, c), ratio_of(c), c.of.anchor is not None) for c in passed],
        config.proxied,
        random_seed=derived_seed(config.random_seed, "spread", step),
    )
    for candidate in passed:
        if candidate.key not in chosen:
            row = row_of(
                run,
                step,
                candidate,
                stage="selection",
                state="pruned",
                reason=f"fast enough, but not among the {config.proxied} best spread",
            )
            add_row(run, row, candidate.of.arch)
    by_key = {c.key: c for c in passed}
    trained = []
    for key in chosen:
        candidate = by_key[key]
        if run.ledger.failed(step, key):
            continue
        result = run.train(
            candidate.of.arch,
            f"s{step}-{key}",
            out=run.folder.job_folder(f"s{step}-{key}"),
            epochs=config.proxy_epochs,
            init=config.proxy_init,
            parent=candidate.parent,
            first_epoch=(step - 1) * config.proxy_epochs,
        )
        seconds = candidate.seconds + result.seconds
        candidate = replace(candidate, seconds=seconds)
        if result.ok:
            trained.append(Trained(candidate, result.values))
            continue
        reason = result.reason or "failed"
        row = row_of(run, step, candidate, stage="proxy", state="failed", reason=reason)
        add_row(run, row, candidate.of.arch)
    return trained


def _losses(run: Run, step: int, key: str) -> npt.NDArray[np.float64]:
    """Return the per-image soft losses of a scored candidate, in holdout order."""
    from safetensors.numpy import load_file

    arrays = load_file(run.folder.job_folder(f"s{step}-{key}") / "holdout.safetensors")
    return np.asarray(arrays["soft_loss"], dtype=np.float64)


def _decide(run: Run, step: int, trained: Sequence[Trained]) -> list[Incumbent]:
    """Rank the scored candidates and write their rows; the best `beam` go on."""
    scored = [
        Scored(
            t.candidate.key, t.values["soft_loss"], t.values["soft_loss_se"], ratio_of(t.candidate)
        )
        for t in trained
    ]

    @cache
    def losses(key: str) -> npt.NDArray[np.float64]:
        return _losses(run, step, key)

    order = rank(scored, paired_error(losses))
    by_key = {t.candidate.key: t for t in trained}
    kept = order[: run.config.beam]
    best = by_key[order[0]].values["soft_loss"]
    for key in order:
        item = by_key[key]
        place = order.index(key) + 1
        behind = item.values["soft_loss"] - best
        reason = f"kept, rank {place} of {len(order)}"
        if key not in kept:
            reason = f"rank {place} of {len(order)}: {behind:+.4f} nats against rank 1"
        row = row_of(
            run,
            step,
            item.candidate,
            soft_loss=item.values["soft_loss"],
            soft_loss_se=item.values["soft_loss_se"],
            top1=item.values["top1"],
            top1_se=item.values["top1_se"],
            stage="kept" if key in kept else "proxy",
            state="complete",
            reason=reason,
        )
        add_row(run, row, item.candidate.of.arch)
        if key not in kept:
            run.folder.drop_weights(f"s{step}-{key}")
    return [
        Incumbent(
            arch=by_key[key].candidate.of.arch,
            key=key,
            weights=run.folder.job_folder(f"s{step}-{key}") / "weights.safetensors",
            ratio=ratio_of(by_key[key].candidate),
            images_per_s=measured_of(by_key[key].candidate).images_per_s,
            soft_loss=by_key[key].values["soft_loss"],
        )
        for key in kept
    ]


def _close_step(
    run: Run,
    step: int,
    bounds: StepBounds,
    counted: int,
    kept: Sequence[Incumbent],
    steps: list[StepRow],
) -> None:
    """Add the step to `steps.csv`, redraw `ledger.csv`, and say it in one line."""
    rows = [r for r in run.ledger.rows if r.step == step]
    best = next(r for r in rows if r.key == kept[0].key)
    summary = StepRow.of(step, bounds, counted, rows, best)
    steps.append(summary)
    write_steps(run.folder.path / "steps.csv", steps)
    run.ledger.write_csv(run.folder.path / "ledger.csv")
    run.console.line(
        f"step {step}/{run.config.steps}  band {band_text(bounds.band.lo, bounds.band.hi)}  "
        f"{counted:,} contractions, {summary.shortlisted} timed, {summary.too_slow} too slow, "
        f"{summary.scored} scored  ->  {best.label}  {best.params / 1e6:.2f}M  "
        f"{best.ratio:.2f}x  soft loss {best.soft_loss:.4f} +- {best.soft_loss_se:.4f}  "
        f"top-1 {best.top1:.1%}"
    )


def _stuck(
    run: Run,
    step: int,
    band: str,
    counted: int,
    tried: set[str],
    failed: int,
    bounds: Mapping[str, StepBounds],
) -> Stuck:
    """Name the constraint that binds and how far off the nearest candidate was."""
    run.ledger.write_csv(run.folder.path / "ledger.csv")
    rows = [r for r in run.ledger.rows if r.step == step]
    where = f"stuck at step {step} of {run.config.steps}: "
    if not tried:
        return Stuck(
            f"{where}the parameter budget binds: {counted} contractions of the incumbent fall in "
            f"{band}; widen --params-tolerance or raise --steps"
        )
    slow = [r for r in rows if r.stage == "throughput" and r.state == "pruned"]
    if slow:
        bound = next(iter(bounds.values()))
        nearest = max(slow, key=lambda r: r.ratio or 0.0)
        need = bound.describe()
        if bound.least_ratio is not None:
            need = " and ".join(filter(None, (f"{bound.least_ratio:.3f}x the seed", need)))
        return Stuck(
            f"{where}throughput binds: {len(slow)} of {len(rows)} candidates in {band} miss "
            f"{need}; the nearest, {nearest.label}, reached {nearest.ratio:.3f}x "
            f"({nearest.images_per_s:.1f} images/s): {nearest.reason}"
        )
    last = rows[-1].reason if rows else "no reason recorded"
    return Stuck(f"{where}all {failed or len(rows)} candidates in {band} failed, the last: {last}")
