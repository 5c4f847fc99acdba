"""One step of a search: propose candidates, select some to train, rank them.

Everything here is a function of the configuration, the measurements and the jobs' results, so a resumed run repeats
itself: finished work is reused and no trial is written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contract.state import Incumbent, Run, derived_seed
from nas.contract.timing import MEASURE_COST
from nas.core.per_image import losses_of
from nas.core.requirement import Requirement
from nas.search import selection
from nas.search.constraints import PACE, StepBounds, bounds_at
from nas.search.strategies import SearchState
from nas.search.study import StepRow, Trial
from space import REFERENCE_CONTEXT
from space.contractions import Band, Candidate, count_contractions
from space.family import Arch

THROUGHPUT = ("images_per_s", "images_per_s_lo", "images_per_s_hi", "ratio", "ratio_lo", "ratio_hi")
"""Fields of the primary measurement that a candidate and its trial keep."""
SCORES = ("soft_loss", "soft_loss_se", "top1", "top1_se", "metric", "metric_se")
"""Fields of a training's result that a trial keeps."""


@dataclass
class Step:
    """The state of one step.

    `start` is the first incumbent of the run, `incumbents` are those of the step before, `parents` the ones that are
    contracted, `bounds` what their children must meet, by the parent's key; `contractions` counts the band;
    `candidates` are those proposed so far, by key.
    """

    number: int
    start: Incumbent
    incumbents: Sequence[Incumbent]
    parents: Sequence[Incumbent]
    bounds: dict[str, StepBounds]
    contractions: int = 0
    candidates: dict[str, Candidate] = field(default_factory=dict)

    @property
    def first_bounds(self) -> StepBounds:
        """Return the bounds of the best parent's children; the band is the same for all."""
        return self.bounds[self.parents[0].key]

    def parent_of(self, candidate: Candidate) -> Incumbent:
        """Return the incumbent that a candidate is a contraction of."""
        return next(each for each in self.parents if each.arch == candidate.parent)


def begin_step(run: Run, number: int, start: Incumbent, incumbents: Sequence[Incumbent]) -> Step:
    """Begin a step at the incumbents, or at the start for a strategy that searches one band."""
    config, stepwise = run.config, run.strategy.stepwise
    parents = incumbents if stepwise else [start]
    bounds = {
        parent.key: bounds_at(
            number if stepwise else config.steps,
            config,
            seed_params=run.start_params,
            seed_values=run.start_values,
            parent_ratio=parent.ratio,
        )
        for parent in parents
    }
    step = Step(number, start, incumbents, parents, bounds)
    step.contractions = count(run, [each.arch for each in parents], step.first_bounds.band)
    return step


def propose(run: Run, step: Step, draw: int, past: Sequence[tuple[Trial, Arch]] | None = None) -> list[Candidate]:
    """Return the strategy's next candidates, from `past` trials: by default, those of the run."""
    config, strategy = run.config, run.strategy
    state = SearchState(
        step=step.number,
        steps=config.steps,
        number=config.candidates_per_step,
        draw=draw,
        family=run.family,
        context=run.context,
        seed=step.start.arch,
        incumbents=tuple(i.arch for i in step.incumbents),
        band=lighter_band(run, step.first_bounds, draw),
        random_seed=derived_seed(config.random_seed, "shortlist", step.number),
        baselines=config.baselines and draw == 0,
        exclude=frozenset(step.candidates),
        trials=_decided(run, step) if past is None else tuple(past),
    )
    if past is None and step.number == 1 and draw == 0 and not strategy.stepwise:
        run.console.line(f"strategy {strategy.name}: {strategy.describe(state)}")
    found = strategy.propose(state)
    if past is None and draw:
        run.console.extend(len(found) * MEASURE_COST)
    step.candidates |= {each.key: each for each in found}
    return found


def _decided(run: Run, step: Step) -> tuple[tuple[Trial, Arch], ...]:
    """Return what is decided so far: all steps before, and this step's earlier draws.

    Trials of this step that a resumed run finds before it proposes them again are left out, so that it proposes what it
    proposed the first time.
    """
    return tuple(
        (trial, run.family.arch(run.study.arch(trial.step, trial.key)))
        for trial in run.study.rows
        if 0 < trial.step < step.number or (trial.step == step.number and trial.key in step.candidates)
    )


def lighter_band(run: Run, bounds: StepBounds, draw: int) -> Band:
    """Return the band of a draw: the step's own for the first, fewer MACs for the others.

    When no contraction of the first draw was fast enough, each further draw asks for fewer MACs than the required
    throughput suggests.
    """
    own = bounds.band.max_macs
    if draw == 0:
        return bounds.band
    ratio = (bounds.least_ratio or run.start_ratio) / run.start_ratio
    for required in bounds.requirements:
        if required.metric in PACE:
            ratio = max(ratio, speedup_of(run, required))
    lighter = int(run.start_macs / ratio * 0.8 ** (draw - 1))
    return replace(bounds.band, max_macs=lighter if own is None else min(own, lighter))


def speedup_of(run: Run, tightened: Requirement) -> float:
    """Return the speedup over the start that a step's requirement on pace needs."""
    start = {(own.metric, own.setting): value for own, value in run.start_values.items()}
    bound, from_value = tightened.bound, start[tightened.metric, tightened.setting]
    return bound / from_value if tightened.sense == ">=" else from_value / bound


def count(run: Run, parents: Sequence[Arch], band: Band) -> int:
    """Count the contractions of the parents in a band, each parent and band once."""
    for parent in parents:
        key = (run.key(parent), band)
        if key not in run.counted:
            run.counted[key] = count_contractions(run.family, parent, run.context, band)
    return sum(run.counted[run.key(parent), band] for parent in parents)


def binding_constraint(run: Run, parents: Sequence[Arch], band: Band) -> str:
    """Return the counted bound that keeps a band empty: multiply-adds or parameters."""
    by_macs = band.max_macs is not None and count(run, parents, replace(band, max_macs=None)) > 0
    return "multiply-adds" if by_macs else "parameters"


def band_text(lo: int, hi: int) -> str:
    """Return a parameter band in words."""
    return f"[{lo / 1e6:.3f}M, {hi / 1e6:.3f}M]"


# Trials


def trial_of(run: Run, step: int, candidate: Candidate, **more: Any) -> Trial:
    """Return a candidate as a trial with what is known of it, and `more`."""
    arch, family = candidate.arch, run.family
    return replace(
        Trial(
            step=step,
            key=candidate.key,
            label=family.label(arch),
            parent=run.key(candidate.parent),
            moves=family.describe_moves(candidate.parent, arch),
            grid_steps=candidate.grid_steps,
            baseline=candidate.baseline or "",
            params=candidate.params,
            params_1000=family.count_params(arch, REFERENCE_CONTEXT),
            macs=candidate.macs,
            **{name: getattr(candidate, name) for name in THROUGHPUT},
            reference="" if candidate.images_per_s is None else run.key(run.seed_arch),
            requirements="; ".join(candidate.requirements),
            basis=candidate.basis,
            seconds=round(candidate.seconds, 3),
        ),
        **more,
    )


def add_trial(run: Run, trial: Trial, arch: Arch) -> None:
    """Add a decided candidate to the study, with its violations (at most 0 where met)."""
    over = trial.params - run.band(trial.step).hi
    violations = {"params": float(over), "throughput": trial.violation}
    run.study.add(trial, run.family.to_dict(arch), violations)


# Selecting and ranking


def select(run: Run, step: Step, passed: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates to train; the others become trials.

    `--selection` chooses for a stepwise strategy; the others propose their best guess first.
    """
    number = run.config.train_per_step
    diverse = run.strategy.stepwise and run.config.selection == "diverse"
    reason = f"fast enough, but not among the {f'{number} best spread' if diverse else f'first {number}'}"
    chosen = selected(run, step.number, passed)
    for candidate in passed:
        if candidate not in chosen:
            add_trial(run, trial_of(run, step.number, candidate, stage="selection", reason=reason), candidate.arch)
    run.study.write_csv(run.folder.path / "trials.csv")  # for --status
    return chosen


def selected(run: Run, number: int, passed: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of a step to train, of those that passed."""
    config, features = run.config, {}
    if not run.strategy.stepwise:
        return list(passed[: config.train_per_step])
    for candidate in passed:  # numbers, one per slot, for distances between candidates
        slots = run.family.to_dict(candidate.arch).values()
        features[candidate.key] = np.hstack([np.asarray(slot, dtype=float) for slot in slots]).tolist()
    seed = derived_seed(config.random_seed, "spread", number)
    return selection.pick(passed, features, config.train_per_step, config.selection, random_seed=seed)


def rank(run: Run, step: Step, raced: Sequence[Trial]) -> list[Incumbent]:
    """Rank the trained candidates, write their trials, and return the best as incumbents.

    Strategies that search one band keep incumbents of earlier steps for the same places; an arch that was trained again
    counts by the new training. Returns none when no candidate reached the end of the race.
    """
    scored = [trial for trial in raced if trial.state != "failed"]
    for trial in raced:
        if trial.state == "failed":
            add_trial(run, trial, step.candidates[trial.key].arch)
    through = {trial.key: trial for trial in scored if trial.stage not in ("race", "throughput")}
    older: dict[str, Incumbent] = {}
    if scored and not run.strategy.stepwise:
        older = {i.key: i for i in step.incumbents if i is not step.start and i.key not in through}
    folders = {key: run.trial_folder(trial) for key, trial in through.items()}
    folders |= {key: incumbent.weights.parent for key, incumbent in older.items()}

    @cache
    def losses(key: str) -> npt.NDArray[np.float64]:
        return losses_of(folders[key], run.config.metric)

    ranked: dict[str, Trial | Incumbent] = {**through, **older}
    order = selection.rank([*ranked.values()], selection.paired_error(losses))
    kept = order[: places(run, step.number)]
    position = {key: at for at, key in enumerate(order)}
    for trial in sorted(scored, key=lambda t: position.get(t.key, len(order))):
        if trial.key in position:
            place = f"rank {position[trial.key] + 1} of {len(order)}"
            if trial.key in kept:
                trial = replace(trial, stage="kept", reason=f"kept, {place}")
            else:
                behind = (trial.soft_loss or 0.0) - (ranked[order[0]].soft_loss or 0.0)
                trial = replace(trial, reason=f"{place}: {behind:+.4f} nats against rank 1")
        add_trial(run, trial, step.candidates[trial.key].arch)
        if trial.key not in kept:
            run.folder.drop_weights(run.trial_folder(trial).name)
    return [
        older[key] if key in older else run.incumbent(through[key], parent=step.parent_of(step.candidates[key]))
        for key in kept
    ]


def places(run: Run, step: int) -> int:
    """Return how many incumbents a step keeps: the beam, or at least two finalists."""
    return run.config.beam if step < run.config.steps else max(run.config.beam, 2)


# The end of a step


def end_step(run: Run, step: Step, kept: Sequence[Incumbent], steps: list[StepRow]) -> None:
    """Write the step to the study and the tables, log it, and drop weights not needed."""
    rows = [r for r in run.study.rows if r.step == step.number]
    best = next(r for r in run.study.rows if (r.key, r.step) == (kept[0].key, kept[0].step))
    band = step.first_bounds.band
    summary = StepRow.of(step.number, step.first_bounds, step.contractions, rows, best)
    steps.append(summary)
    run.study.add_step(summary)
    run.study.write_steps(run.folder.path / "steps.csv")
    run.study.write_csv(run.folder.path / "trials.csv")
    run.console.line(
        f"step {step.number}/{run.config.steps}  band {band_text(band.lo, band.hi)}  "
        f"{step.contractions:,} contractions, {summary.candidates} timed, {summary.too_slow} too "
        f"slow, {summary.scored} scored  ->  {best.label}  {best.params / 1e6:.2f}M  {best.ratio:.2f}x  "
        f"soft loss {best.soft_loss:.4f} +- {best.soft_loss_se:.4f}  top-1 {best.top1:.1%}"
    )
    # The start's weights start the final training and are shared through the cache; the last step's parents start the
    # finalists' second random seed.
    keys = {incumbent.key for incumbent in kept}
    for old in step.incumbents:
        if old.key not in keys and old is not step.start and step.number < run.config.steps:
            run.folder.drop_weights(old.weights.parent.name)


def stuck_message(run: Run, step: Step) -> str:
    """Return which constraint binds and how far off the nearest candidate was."""
    run.study.write_csv(run.folder.path / "trials.csv")
    bounds = step.first_bounds
    rows = [r for r in run.study.rows if r.step == step.number]
    where = f"stuck at step {step.number} of {run.config.steps}: "
    band = band_text(bounds.band.lo, bounds.band.hi)
    if not step.candidates:
        by = binding_constraint(run, [p.arch for p in step.parents], bounds.band)
        return (
            f"{where}the budget of {by} binds: {step.contractions} contractions of the incumbent "
            f"fall in {band}; widen --params-tolerance, loosen the bound or raise --steps"
        )
    slow = [r for r in rows if r.stage == "throughput" and r.state == "pruned"]
    if slow:
        nearest = max(slow, key=lambda r: r.ratio or 0.0)
        need = bounds.describe()
        if bounds.least_ratio is not None:
            need = " and ".join(filter(None, (f"{bounds.least_ratio:.3f}x the seed", need)))
        return (
            f"{where}throughput binds: {len(slow)} of {len(rows)} candidates in {band} miss "
            f"{need}; the nearest, {nearest.label}, reached {nearest.ratio:.3f}x "
            f"({nearest.images_per_s:.1f} images/s): {nearest.reason}"
        )
    passed = sum(r.stage != "throughput" for r in rows)
    last = rows[-1].reason if rows else "no reason recorded"
    return f"{where}all {passed or len(rows)} candidates in {band} failed, the last: {last}"
