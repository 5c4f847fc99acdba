"""The contraction itself: step by step from the seed to the target, as DESIGN tells it.

Everything here is a function of the configuration, the measurements and the jobs' results, so a
resumed run repeats itself: jobs and measurements that are done are taken over, rows that are
written are not written twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from nas.contract.gates import Candidate, gate
from nas.contract.milestones import write_milestone
from nas.contract.scoring import choose, decide, score
from nas.contract.state import Incumbent, Run, derived_seed
from nas.contract.timing import MEASURE_COST
from nas.core.requirement import Requirement
from nas.search.constraints import PACE, StepBounds, bounds_at, requirements_of
from nas.search.strategies import Ask, Seen
from nas.search.study import StepRow
from space.contractions import Band, count_contractions
from space.family import Arch


@dataclass(frozen=True)
class Stuck:
    """A step that no candidate survived: which constraint binds, in words."""

    message: str


def contract_steps(
    run: Run, seed: Incumbent, steps: list[StepRow]
) -> tuple[list[Incumbent], Stuck | None, list[list[Incumbent]]]:
    """Take every step; return the last incumbents, why it stopped early, and all incumbents.

    `steps` collects one row a step as they finish, for `steps.csv`.
    """
    incumbents = [seed]
    path = [incumbents]
    for step in range(1, run.config.steps + 1):
        outcome = _step(run, step, seed, incumbents, steps)
        if isinstance(outcome, Stuck):
            if run.strategy.stepwise or (step == run.config.steps and incumbents == [seed]):
                return incumbents, outcome, path
            continue  # the next list of a strategy that looks in one band may fare better
        kept = {i.key for i in outcome}
        for old in incumbents:
            # The seed's weights start the final training, and are shared through the cache; the
            # last step's parents start the second random seed of the finalists.
            if old.key not in kept and old is not seed and step < run.config.steps:
                run.folder.drop_weights(old.weights.parent.name)
        incumbents = outcome
        path.append(incumbents)
        write_milestone(run, step, incumbents[0])
    return incumbents, None, path


def _step(
    run: Run, step: int, seed: Incumbent, incumbents: Sequence[Incumbent], steps: list[StepRow]
) -> list[Incumbent] | Stuck:
    config, family, strategy = run.config, run.family, run.strategy
    parents = incumbents if strategy.stepwise else [seed]
    bounds = {
        parent.key: bounds_at(
            step if strategy.stepwise else config.steps,
            config,
            seed_params=run.start_params,
            seed_values=run.start_values,
            parent_ratio=parent.ratio,
        )
        for parent in parents
    }
    own = bounds[parents[0].key]
    counted = sum(_count(run, parent.arch, own.band) for parent in parents)
    tried: set[str] = set()
    failed = 0
    for draw in range(config.draws):
        ask = Ask(
            step=step,
            steps=config.steps,
            number=config.shortlist,
            draw=draw,
            family=family,
            context=run.context,
            seed=seed.arch,
            incumbents=tuple(i.arch for i in incumbents),
            band=lighter_band(run, own, draw),
            random_seed=derived_seed(config.random_seed, "shortlist", step),
            anchors=config.anchors and draw == 0,
            exclude=frozenset(tried),
            seen=_seen(run, step, tried),
        )
        if step == 1 and draw == 0 and not strategy.stepwise:
            run.console.line(f"strategy {strategy.name}: {strategy.describe(ask)}")
        drawn = strategy.shortlist(ask)
        passed = []
        if draw:
            run.console.extend(len(drawn) * MEASURE_COST)
        for listed in drawn:
            key = run.key(listed.arch)
            tried.add(key)
            parent = next(i for i in parents if i.arch == listed.parent)
            candidate = gate(run, step, Candidate(listed, key, parent), bounds[parent.key])
            if candidate is not None:
                passed.append(candidate)
        chosen = choose(run, step, passed) if passed else []
        run.ledger.write_csv(run.folder.path / "ledger.csv")  # for those who look in
        scored = score(run, step, chosen, first_epoch=run.first_epoch(step)) if chosen else []
        if scored:
            beside = [] if strategy.stepwise else [i for i in incumbents if i is not seed]
            ranked = decide(run, step, chosen, scored, beside)
            if ranked:
                _close_step(run, step, own, counted, ranked, steps)
                return ranked
        failed += len(passed)
    by = counted_bound(run, [p.arch for p in parents], own.band)
    where = band_text(own.band.lo, own.band.hi)
    return _stuck(run, step, where, counted, tried, failed, bounds, by)


def _count(run: Run, parent: Arch, band: Band) -> int:
    """Count the contractions of a parent in a band, once."""
    key = (run.key(parent), band)
    if key not in run.counted:
        run.counted[key] = count_contractions(run.family, parent, run.context, band)
    return run.counted[key]


def counted_bound(run: Run, parents: Sequence[Arch], band: Band) -> str:
    """Say which counted bound keeps a band empty: without it there would be contractions."""
    heavier = replace(band, max_macs=None)
    if band.max_macs is not None and any(_count(run, parent, heavier) for parent in parents):
        return "multiply-adds"
    return "parameters"


def _seen(run: Run, step: int, tried: Collection[str]) -> tuple[Seen, ...]:
    """Tell a strategy what is decided so far: all steps before, and this step's earlier draws.

    Rows of this step that a resumed run finds but has not come to yet are left out, so that it
    asks as it did the first time.
    """
    return tuple(
        Seen(
            step=row.step,
            arch=run.family.arch(run.ledger.arch(row.step, row.key)),
            key=row.key,
            params=row.params,
            violation=math.inf if row.state == "failed" else row.violation,
            loss=row.soft_loss if row.state == "complete" else None,  # a whole training's
            ratio=row.ratio,
            stopped=row.stage == "race",
        )
        for row in run.ledger.rows
        if 0 < row.step < step or (row.step == step and row.key in tried)
    )


def band_text(lo: int, hi: int) -> str:
    """Return a parameter band in words."""
    return f"[{lo / 1e6:.3f}M, {hi / 1e6:.3f}M]"


def lighter_band(run: Run, bounds: StepBounds, draw: int) -> Band:
    """Return the band that a draw looks at: the first one the step's own, the others fewer MACs.

    When no contraction of the first draw was fast enough, the fewest notches were the wrong
    place to look: each further draw asks for fewer MACs than the required pace suggests.
    """
    own = bounds.band.max_macs
    if draw == 0:
        return bounds.band
    ratio = (bounds.least_ratio or run.start_ratio) / run.start_ratio
    for required in bounds.requirements:
        start = run.start_values[run_requirement(run, required)]
        if required.metric in PACE:
            faster = required.bound / start if required.sense == ">=" else start / required.bound
            ratio = max(ratio, faster)
    lighter = int(run.start_macs / ratio * 0.8 ** (draw - 1))
    return replace(bounds.band, max_macs=lighter if own is None else min(own, lighter))


def run_requirement(run: Run, tightened: Requirement) -> Requirement:
    """Return the run's own requirement that a step's tightened one stands for."""
    return next(
        r
        for r in requirements_of(run.config)
        if (r.metric, r.setting) == (tightened.metric, tightened.setting)
    )


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
    best = next(r for r in run.ledger.rows if r.key == kept[0].key and r.step == kept[0].step)
    summary = StepRow.of(step, bounds, counted, rows, best)
    steps.append(summary)
    run.ledger.add_step(summary)
    run.ledger.write_steps(run.folder.path / "steps.csv")
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
    by: str,
) -> Stuck:
    """Name the constraint that binds and how far off the nearest candidate was."""
    run.ledger.write_csv(run.folder.path / "ledger.csv")
    rows = [r for r in run.ledger.rows if r.step == step]
    where = f"stuck at step {step} of {run.config.steps}: "
    if not tried:
        return Stuck(
            f"{where}the budget of {by} binds: {counted} contractions of the incumbent fall in "
            f"{band}; widen --params-tolerance, loosen the bound or raise --steps"
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
