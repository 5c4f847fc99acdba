"""Plan a run (`--plan`): its steps and cost, from counts and about a minute of measuring.

The steps are simulated: the strategy proposes candidates as in the run, a throughput predicted from MACs decides which
pass, and the candidate of middle MACs becomes the incumbent, as nothing is trained. Counts of a band are exact;
throughput and time are estimates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from nas.contract.final import nearest_published
from nas.contract.proxy_check import proxy_check_work
from nas.contract.race import rungs_of
from nas.contract.seed import label_epochs, measure_seed, teaching_cost
from nas.contract.state import Incumbent, Run, Work, derived_seed
from nas.contract.step import (
    band_text,
    begin_step,
    binding_constraint,
    count,
    places,
    propose,
    selected,
    speedup_of,
    trial_of,
)
from nas.data import Dataset
from nas.jobs.job import Job, Result
from nas.measure.jobs import GROUP
from nas.search.constraints import PACE, StepBounds
from nas.search.study import Trial
from nas.train.jobs import PaceJob
from nas.train.jobs import pace as train_pace
from space.contractions import Band, Candidate
from space.errors import refuse
from space.family import Arch
from space.sampling import sample_band

MEASURING_S = 60.0
"""Seconds of measuring."""
SAMPLED = 512
"""Archs of a band whose throughput is estimated."""
FEW_IMAGES, FEW_PER_CLASS = 200, 10
"""Training images, in all and of a class, below which a plan warns."""
SCARCE = 0.05
"""Throughput binds where a smaller share of a band is fast enough."""


@dataclass(frozen=True)
class Pace:
    """How throughput and training scale with MACs on this device, from a few archs.

    `power`: throughput relative to the seed is (seed's MACs / MACs) ** power, with a standard deviation of `spread` of
    its logarithm over `measured` archs. `gmacs_per_s` is of training, forward and backward; `timing_s` the seconds of
    one timing.
    """

    power: float
    spread: float
    measured: int
    gmacs_per_s: float
    timing_s: float


@dataclass(frozen=True)
class PlannedStep:
    """One planned step.

    `contractions` counts those of the seed in the band, exactly; `likely` those of the plan's own incumbents.
    `fast_share` is the share of the band estimated to be fast enough (None: nothing about pace is required), `binds`
    which constraint leaves less.
    """

    step: int
    band_lo: int
    band_hi: int
    contractions: int
    likely: int
    fast_share: float | None
    binds: str
    timings: int
    trainings: int
    train_gmacs: float


@dataclass(frozen=True)
class Plan:
    """The result of `--plan`; `hours` on this device, `disk_bytes` at most at a time.

    `work` and `hours` include the proxy check, whose share is `check_proxy`.
    """

    steps: tuple[PlannedStep, ...]
    floor_params: int
    floor_ratio: float | None
    ceiling_params: int
    work: Work
    hours: float
    disk_bytes: int
    pace: Pace
    stuck: str | None = None
    check_proxy: Work | None = None


def make_plan(run: Run, *, check_proxy: int | None = None) -> Plan:
    """Plan a run without training anything, after about a minute of measuring.

    `check_proxy` archs are for a proxy check. Raises InputError where the run itself would.
    """
    seed = measure_seed(run)
    floor_arch = run.family.floor(run.seed_arch, run.context)
    floor = run.timings.measure(floor_arch, "floor", reference=run.seed_arch)
    floor_ratio = None if isinstance(floor, Result) else floor.ratio
    pace = _pace(run, floor_arch, floor_ratio, MEASURING_S)
    steps, stuck = _steps(run, seed.images_per_s, pace)
    work = _work(run, steps)
    hours, report = _hours(run, work, pace), None
    if check_proxy is not None:
        report = proxy_check_work(run, check_proxy)
        hours += (report.timings * pace.timing_s + report.train_gmacs / pace.gmacs_per_s) / 3600
        work = Work(*(a + b for a, b in zip(astuple(work), astuple(report), strict=True)))
    return Plan(
        steps=tuple(steps),
        floor_params=run.family.count_params(floor_arch, run.context),
        floor_ratio=floor_ratio,
        ceiling_params=run.start_params - 1,
        work=work,
        hours=hours,
        disk_bytes=_disk(run, steps),
        pace=pace,
        stuck=stuck,
        check_proxy=report,
    )


def _pace(run: Run, floor: Arch, floor_ratio: float | None, seconds: float) -> Pace:
    """Time and train a few archs between the seed and the target."""
    points = [] if floor_ratio is None else [(floor, floor_ratio)]
    by_step = [_sample(run, run.band(step), 3, "plan", step) for step in range(run.config.steps, 0, -1)]
    drawn = [archs[turn] for turn in range(3) for archs in by_step if turn < len(archs)][:GROUP]
    before = time.monotonic()
    found = run.timings.measure_together(drawn, "plan", reference=run.seed_arch, visits=1)
    # As a run times them: several together, `--visits` times.
    timing_s = run.config.visits * (time.monotonic() - before) / max(len(drawn), 1)
    for arch, measured in zip(drawn, found, strict=True):
        if not isinstance(measured, Result) and measured.ratio is not None:
            points.append((arch, measured.ratio))
    macs = run.start_macs
    x = np.array([math.log(macs / run.family.count_macs(a, run.context)) for a, _ in points])
    y = np.array([math.log(ratio) for _, ratio in points])
    power = float((x * y).sum() / max((x * x).sum(), 1e-12)) if len(points) else 0.0
    rest = y - power * x
    trained = [_trained_gmacs(run, a, seconds / 6) for a in (run.seed_arch, points[-1][0])]
    return Pace(
        power=power,
        spread=float(np.sqrt((rest**2).mean())) if len(points) else 0.0,
        measured=len(points),
        gmacs_per_s=math.sqrt(trained[0] * trained[1]),
        timing_s=timing_s,
    )


def few_images(dataset: Dataset) -> str | None:
    """Return a warning where so few training images tell little of any network, else None."""
    per_class = np.bincount(dataset.train.labels, minlength=dataset.num_classes) if dataset.labelled else np.zeros(0)
    n, least = len(dataset.train), int(per_class.min(initial=FEW_PER_CLASS))
    if n >= FEW_IMAGES and least >= FEW_PER_CLASS:
        return None
    of = f", {least} of class {dataset.classes[int(per_class.argmin())]!r}" if least < FEW_PER_CLASS else ""
    return (
        f"{n:,} training images{of} are few (below {FEW_IMAGES} in all or {FEW_PER_CLASS} a class): scores will hardly "
        "tell candidates apart"
    )


def _sample(run: Run, band: Band, number: int, purpose: str, step: int) -> list[Arch]:
    """Draw archs of a step's band."""
    random_seed = derived_seed(run.config.random_seed, purpose, step)
    return sample_band(run.family, run.seed_arch, run.context, band, number, random_seed=random_seed)


def training_pace(run: Run, arch: Arch, seconds: float) -> Result:
    """Train an arch on this device for so many seconds; see `nas.train.jobs.pace`."""
    job = PaceJob(
        family=run.family.name,
        arch=run.family.to_dict(arch),
        context=run.context,
        batch_size=run.config.batch_size,
        seconds=seconds,
        device=run.config.device,
    )
    return run.do(Job(train_pace, job, f"pace-{run.key(arch)}"))


def _trained_gmacs(run: Run, arch: Arch, seconds: float) -> float:
    """Measure the GMACs a second of training an arch."""
    result = training_pace(run, arch, seconds)
    if not result.ok:
        error = str(result.reason).partition(" (see ")[0]  # a plan's log goes away with its folder
        reason = f"{run.family.label(arch)} cannot be trained: {error}"
        raise refuse("--batch-size", run.config.batch_size, "a batch that trains here", reason)
    return float(result.values["images_per_s"]) * run.image_cost(arch)


def predicted_ratio(run: Run, pace: Pace, macs: float) -> float:
    """Estimate the throughput of an arch relative to the seed."""
    return float((run.start_macs / macs) ** pace.power)


def _needed(run: Run, bounds: StepBounds, images_per_s: float) -> float | None:
    """Return the least throughput ratio to the seed that a step requires, None without one."""
    needs = [] if bounds.least_ratio is None else [bounds.least_ratio]
    for required in bounds.requirements:
        if required.metric == "speedup":
            needs.append(required.bound)
        elif required.metric == "images_per_s" and required.setting == run.primary:
            needs.append(required.bound / images_per_s)
        elif required.metric in PACE:
            needs.append(speedup_of(run, required))
    return max(needs) if needs else None


def _steps(run: Run, images_per_s: float, pace: Pace) -> tuple[list[PlannedStep], str | None]:
    """Simulate the steps; return them, and a warning where one may find no candidate."""
    config = run.config
    images = len(run.dataset.train.labels) * config.proxy_epochs
    seed = Incumbent(run.seed_arch, run.key(run.seed_arch), run.folder.path, 1.0, images_per_s, 0.0)
    incumbents = [seed]
    past: list[tuple[Trial, Arch]] = []
    found: list[PlannedStep] = []
    for number in range(1, config.steps + 1):
        step = begin_step(run, number, seed, incumbents)
        bounds = step.first_bounds
        need = _needed(run, bounds, images_per_s)
        passed: list[Candidate] = []
        for draw in range(config.max_draws):
            proposed = propose(run, step, draw, past)
            passed = _likely(run, proposed, need, pace)
            if passed:
                break
        chosen = selected(run, number, passed)
        share = _fast_share(run, bounds, need, pace)
        counted = count(run, [run.seed_arch], bounds.band)
        found.append(
            PlannedStep(
                step=number,
                band_lo=bounds.band.lo,
                band_hi=bounds.band.hi,
                contractions=counted,
                likely=step.contractions,
                fast_share=share,
                binds=_binds(run, bounds, counted, share),
                timings=len(step.candidates),
                trainings=len(chosen),
                train_gmacs=sum(images * run.image_cost(c.arch) for c in chosen),
            )
        )
        if not chosen and run.strategy.stepwise:
            need_text = "" if need is None else f" ({need:.2f}x the seed is asked for)"
            return found, f"step {number} may find nothing fast enough{need_text}"
        scored = {"stage": "proxy", "state": "complete", "soft_loss": 1.0}
        past += [(trial_of(run, number, c, **scored), c.arch) for c in proposed]
        middle = sorted(chosen, key=lambda c: (c.macs, c.key))
        at = max(0, (len(middle) - places(run, number)) // 2)
        kept = [
            replace(seed, arch=c.arch, key=c.key, ratio=predicted_ratio(run, pace, c.macs))
            for c in middle[at : at + places(run, number)]
        ]
        incumbents = kept or incumbents
    return found, None


def _likely(run: Run, candidates: Sequence[Candidate], need: float | None, pace: Pace) -> list[Candidate]:
    """Return the candidates expected to pass, the likeliest ones, with predicted ratios."""
    predicted = [replace(c, ratio=predicted_ratio(run, pace, c.macs)) for c in candidates]
    if need is None:
        return predicted
    odds = [_odds(c.ratio or 0.0, need, pace) for c in predicted]
    likeliest = sorted(range(len(candidates)), key=lambda i: -odds[i])[: round(sum(odds))]
    return [predicted[i] for i in sorted(likeliest)]


def _odds(ratio: float, need: float, pace: Pace) -> float:
    """Return the probability that an arch of an estimated ratio is fast enough."""
    z = math.log(ratio / need) / max(pace.spread, 1e-6)
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _fast_share(run: Run, bounds: StepBounds, need: float | None, pace: Pace) -> float | None:
    """Estimate the share of a band that is fast enough, given the estimate's spread."""
    if need is None:
        return None
    drawn = _sample(run, bounds.band, SAMPLED, "plan share", bounds.step)
    if not drawn:
        return 0.0
    macs = run.family.count_macs_many(run.family.table(drawn), run.context).tolist()
    return sum(_odds(predicted_ratio(run, pace, m), need, pace) for m in macs) / len(macs)


def _binds(run: Run, bounds: StepBounds, counted: int, share: float | None) -> str:
    if counted == 0:
        return f"{binding_constraint(run, [run.seed_arch], bounds.band)}: nothing in the band"
    if share is None:
        return "parameters"
    return "throughput (estimate)" if share < SCARCE else "parameters, then throughput (estimate)"


def _work(run: Run, steps: Sequence[PlannedStep]) -> Work:
    """Count the run's work from its planned steps."""
    config = run.config
    images = len(run.dataset.train.labels)
    last = run.config.target_params / run.start_params * run.image_cost(run.seed_arch)
    if steps and steps[-1].trainings:
        each = images * config.proxy_epochs * steps[-1].trainings
        last = steps[-1].train_gmacs / each
    again = min(places(run, config.steps), steps[-1].trainings if steps else 0)
    again = again if again > 1 else 0
    settings = len(run.settings)
    timings = settings * (2 + sum(s.timings for s in steps) + 1) + 1
    gmacs = images * config.seed_epochs * run.image_cost(run.seed_arch)
    gmacs += sum(s.train_gmacs for s in steps)
    # The winner is compared with the published arch nearest in size, trained as long.
    _, beside = nearest_published(run, config.target_params)
    pair = last + run.image_cost(beside)
    gmacs += images * (again * config.proxy_epochs * last + config.final_epochs * pair)
    return Work(timings, 1 + sum(s.trainings for s in steps) + again + 2, gmacs)


def _hours(run: Run, work: Work, pace: Pace) -> float:
    """Estimate the hours of a run that finds nothing in the cache."""
    config = run.config
    # Scoring on the holdout costs a third of training, per image.
    rungs = len(rungs_of(config.proxy_epochs)) if config.racing else 1
    scored = len(run.dataset.holdout.labels) * rungs / 3 * work.train_gmacs
    scored /= len(run.dataset.train.labels) * config.proxy_epochs
    gmacs = work.train_gmacs + scored + teaching_cost(run)
    return (work.timings * pace.timing_s + gmacs / pace.gmacs_per_s) / 3600


def _disk(run: Run, steps: Sequence[PlannedStep]) -> int:
    """Estimate the most bytes at a time: pixels, labels, weights, checkpoints of a race."""
    config, data = run.config, run.dataset
    images = sum(len(split.labels) for split in (data.train, data.holdout, data.test))
    classes = run.context.num_classes
    topk = config.topk or min(100 if classes > 10_000 else 10, classes - 1)
    labels = 0  # none to build for a named store
    if config.labels is None:
        labels = len(data.train.labels) * label_epochs(run) * (4 * topk + 24)
    milestones = sum(step.band_hi for step in steps)
    largest = max((s.band_hi for s in steps), default=run.start_params)
    racing = 12 * largest * config.train_per_step if config.racing else 0
    weights = 4 * (run.start_params + milestones + largest * (config.beam + 12))
    return images * 3 * run.context.img_size**2 + labels + weights + racing


def plan_text(run: Run, plan: Plan) -> str:
    """Return the plan as lines for the terminal."""
    lines = [
        f"{'step':>4}  {'band':<20} {'contractions':>13} {'on the way':>11} {'fast enough':>12}  "
        f"{'timed':>5} {'trained':>7} {'GMACs':>9}  what binds"
    ]
    for s in plan.steps:
        share = "-" if s.fast_share is None else f"about {s.fast_share:.0%}"
        lines.append(
            f"{s.step:>4}  {band_text(s.band_lo, s.band_hi):<20} {s.contractions:>13,} {s.likely:>11,} {share:>12}  "
            f"{s.timings:>5} {s.trainings:>7} {s.train_gmacs:>9,.0f}  {s.binds}"
        )
    floor, work, pace = f"{plan.floor_params:,} parameters", plan.work, plan.pace
    if plan.floor_ratio is not None:
        floor += f" at {plan.floor_ratio:.2f}x the seed's throughput"
    lines += [
        "contractions: of the seed in the band, exact; on the way: of the incumbents that a plan without training "
        "meets; fast enough: an estimate",
        f"the space reaches from {floor} (measured) to {plan.ceiling_params:,} parameters",
        f"work: {work.timings} timings, {work.trainings} trainings of {work.train_gmacs:,.0f} GMACs in all, the "
        "teacher beside them",
        f"estimated: {plan.hours:.2f} device-hours here ({pace.gmacs_per_s:,.1f} GMACs/s of training, "
        f"{pace.timing_s:.1f} s a timing; less where the cache helps) and {plan.disk_bytes / 1e6:,.0f} MB of disk at "
        "most",
        f"throughput estimated from MACs over {pace.measured} timed archs, +-{math.expm1(pace.spread):.0%} (one "
        "standard deviation)",
    ]
    if plan.check_proxy is not None:
        of = plan.check_proxy
        lines.append(
            f"of this the proxy check, after a run that reaches its target: {of.timings} timings, {of.trainings} "
            f"trainings of {of.train_gmacs:,.0f} GMACs"
        )
    lines += [f"warning: {warning}" for warning in (plan.stuck, few_images(run.dataset)) if warning is not None]
    return "\n".join(lines)
