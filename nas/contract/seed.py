"""Before the first step: measure the seed, make the teacher and its labels, train the seed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from typing import Any

from nas.contract.checks import label_request, teacher_settings
from nas.contract.state import Incumbent, Run
from nas.contract.step import SCORES, THROUGHPUT
from nas.contract.timing import MEASURE_COST, interval_text
from nas.core.config import RunConfig, flag
from nas.core.requirement import Requirement, Setting
from nas.data import DataSpec
from nas.distill.label_store import teach
from nas.jobs.job import Result
from nas.labels import api as labels
from nas.measure.measurement import Measurement
from nas.search.constraints import PACE, bench_setting, requirements_of
from nas.search.study import Trial
from space import REFERENCE_CONTEXT
from space.errors import InputError, refuse
from space.family import Arch

TEACHER_COST = 0.35
"""GMACs of training the auto teacher on one image at 48 px, forward and backward (roughly)."""


def teacher_cost(run: Run) -> float:
    """Estimate the GMACs of training the auto teacher on one image; as it is convolutional, they grow with the pixels.

    Another teacher's are unknown.
    """
    return TEACHER_COST * (run.context.img_size / 48) ** 2


def label_epochs(run: Run) -> int:
    """Return how many epochs of labels the longest training reads."""
    config = run.config
    return max(config.seed_epochs, config.proxy_epochs * config.steps, config.final_epochs)


def teaching_cost(run: Run) -> float:
    """Estimate the GMACs of training the auto teacher and labelling the images; none for a named store."""
    if run.config.labels is not None:
        return 0.0
    epochs = run.config.teacher_epochs + label_epochs(run) / 3
    return len(run.dataset.train.labels) * epochs * teacher_cost(run)


def expected_cost(run: Run) -> float:
    """Estimate the run's work in GMACs of training, for the progress bar."""
    config = run.config
    epoch = len(run.dataset.train.labels) * run.image_cost(run.seed_arch)
    # MACs fall about as fast as parameters along a contraction.
    share = config.target_params / run.start_params
    cost = teaching_cost(run) + config.seed_epochs * epoch
    for step in range(1, config.steps + 1):
        cost += config.candidates_per_step * MEASURE_COST
        cost += config.train_per_step * config.proxy_epochs * epoch * share ** (step / config.steps)
    return cost + 2 * (config.final_epochs * epoch * share + MEASURE_COST)


def print_config(run: Run, *, fresh: bool) -> None:
    """Print the configuration, once, before any work."""
    config, required = run.config, requirements_of(run.config)
    bounds = [each.text for each in required]
    if not any(each.metric in PACE for each in required):
        bounds.append("no step slower than its parent (2 % slack)")
    distill = "" if config.distill == "sparse" else f"; all by {config.distill} distillation"
    run.console.line(
        f"{'contract' if fresh else 'resume'} {config.seed} ({run.start_params:,} parameters here) to "
        f"{config.target_params:,} +- {config.params_tolerance:.0%}, {' and '.join(bounds)}\n"
        f"effort {config.effort}: {config.steps} steps, {config.candidates_per_step} timed and "
        f"{config.train_per_step} trained a step, beam {config.beam}; epochs: seed {config.seed_epochs}, "
        f"candidate {config.proxy_epochs} ({config.proxy_init}), final {config.final_epochs}{distill}\n"
        f"device {config.device}, {config.threads} threads, timing {run.primary.text}; "
        f"random seed {config.random_seed}; folder {run.folder.path}"
    )
    for line in () if run.table is None else run.table.describe():
        run.console.line(line)


def prepare_seed(run: Run) -> Incumbent:
    """Measure and train the seed, write its trial, and return it as the first incumbent."""
    named = run.config.labels is not None  # such a store is matched before anything is timed
    teacher = _labels(run) if named else None
    measured = measure_seed(run)
    teacher = teacher if named else _labels(run)
    weights, cached = run.config.seed_weights, run.cache / "seeds"
    init = "scratch" if weights is None else f"file:{weights}"
    how: dict[str, Any] = {"epochs": run.config.seed_epochs, "init": init, "check_mirror": True}
    task = run.training(run.seed_arch, "seed", out=cached, **how)
    out = cached / run.training_digest(task.job.argument)
    trained = run.train(run.seed_arch, "seed", out=out, **how)
    if not trained.ok:
        raise InputError(f"the seed's training failed: {trained.reason}")
    values = trained.values
    run.note("seed", values.get("notes", ()))
    _write_row(run, measured, trained)
    run.console.line(
        f"seed: soft loss {values['soft_loss']:.4f} +- {values['soft_loss_se']:.4f}, top-1 {values['top1']:.1%} on "
        f"{len(run.dataset.holdout.labels)} holdout images after {run.config.seed_epochs} epochs"
    )
    run.note("teacher", () if teacher is None else weak_teacher_notes(teacher, values))
    return Incumbent(
        arch=run.seed_arch,
        key=run.key(run.seed_arch),
        weights=out / "weights.safetensors",
        ratio=1.0,
        images_per_s=measured.images_per_s,
        soft_loss=values["soft_loss"],
        soft_loss_se=values["soft_loss_se"],
    )


def measure_seed(run: Run) -> Measurement:
    """Time the seed under every setting; refuse requirements out of reach."""
    measured = run.timings.measure(run.seed_arch, "seed", reference=None)
    if isinstance(measured, Result):
        raise _untimed(run, run.primary, measured)
    run.console.line(
        f"seed: {interval_text(measured, 'images_per_s')} at batch {measured.batch}, {measured.dtype}, "
        f"{run.context.img_size} px"
    )
    start_values: dict[Requirement, float] = {}
    for required in requirements_of(run.config):
        value: float | Result = 1.0
        if required.metric != "speedup":
            value = requirement_value(run, run.seed_arch, required, "seed", reference=None)
        if isinstance(value, Result):
            raise _untimed(run, required.setting, value)
        start_values[required] = value
    run.start_values = start_values
    _reachable(run)
    return measured


def requirement_value(
    run: Run, arch: Arch, required: Requirement, role: str, *, reference: Arch | None
) -> float | Result:
    """Return an arch's value of a requirement's metric in its unit, or a failed timing."""
    if required.setting is None:
        count = run.family.count_params if required.metric == "params" else run.family.count_macs
        return float(count(arch, run.context))
    # Only memory needs its bound to be measured; the arch itself may miss every bound.
    weigh = (required,) if required.metric == "peak_mem_mb" else ()
    measured = run.timings.measure(arch, role, reference=reference, requirements=weigh, setting=required.setting)
    return measured if isinstance(measured, Result) else measured.interval(required.metric)[0]


def _untimed(run: Run, setting: Setting | None, failure: Result) -> InputError:
    assert setting is not None
    return InputError(
        f"--seed: {run.config.seed} cannot be timed under {setting.text}: {failure.reason}; "
        "lower the batch (--bench-batch, or :bN in --require)"
    )


def _reachable(run: Run) -> None:
    """Refuse requirements that even the smallest contraction misses, before training."""
    floor = run.family.floor(run.seed_arch, run.context)
    for setting in run.settings:
        required = tuple(r for r in requirements_of(run.config) if r.setting == setting)
        if not required:
            continue
        measured = run.timings.measure(floor, "floor", reference=run.seed_arch, requirements=required, setting=setting)
        if isinstance(measured, Result):
            continue  # unknown, so not refused
        for one in required:
            if measured.verdict_of(one) == "fail":
                named = short_form(run.config, one)
                got = one.text if named == "--require" else f"{one.bound:g}"
                reach = f"about {interval_text(measured, one.metric)} at the very end"
                raise refuse(named, got, reach, f"the smallest contraction of {run.config.seed} reaches no more")


def short_form(config: RunConfig, required: Requirement) -> str:
    """Return the flag that set a requirement."""
    for name, metric in (("min_speedup", "speedup"), ("min_throughput", "images_per_s")):
        same = (required.metric, required.setting) == (metric, bench_setting(config))
        if same and getattr(config, name) is not None:
            return flag(name)
    return "--require"


def weak_teacher_notes(teacher: Mapping[str, Any], seed: Mapping[str, Any]) -> list[str]:
    """Return a note when the teacher is not better than the seed, else nothing.

    Better means by more than its standard error in holdout top-1, or both at 97 % or more.
    """
    best, error, student = teacher["holdout_top1"], teacher["holdout_top1_se"], seed["top1"]
    if best - student > error or min(best, student) >= 0.97:
        return []
    return [
        f"it does not stand above the seed ({best:.1%} +- {error:.1%} and {student:.1%}): its labels may teach little; "
        "try --teacher-epochs or --teacher"
    ]


def _labels(run: Run) -> Mapping[str, Any] | None:
    """Open the named label store, or build the teacher's own, and set `run.store`.

    Returns the teacher, or None for a named store, whose teacher's score is unknown.
    """
    config, data, needed = run.config, run.dataset, label_epochs(run)
    stored = config.label_epochs or needed
    if stored < needed and config.label_overflow == "error":
        remedy = "or let the labels start again with --label-overflow cycle"
        raise refuse(flag("label_epochs"), stored, f"{needed}, the epochs of the longest training", remedy)
    teacher: Mapping[str, Any] | None = None
    folder = config.labels
    if folder is None:
        cost = float(len(data.train.labels) * config.teacher_epochs) * teacher_cost(run)
        asked = teacher_settings(config)
        taught = teach(lambda job: run.do(job, cost=cost), data, run.cache, **asked)
        teacher = taught["info"]
        run.console.line(f"teacher: {taught['message']}")
        run.note("teacher", teacher["notes"])
        folder = _own_store(run, taught["info"], stored, asked)
    run.store = labels.open_for(
        run.do,
        folder,
        data,
        epochs=needed,
        # The run's own store is shared, and longer where another run needed more.
        stored=stored if config.labels is None else config.label_epochs,
        missing=config.missing_labels,
        label_overflow=config.label_overflow,
    )
    run.console.line(f"labels: {run.store['message']}")
    run.note("labels", run.store["notes"])
    return teacher


def _own_store(run: Run, info: Mapping[str, Any], epochs: int, asked: Mapping[str, Any]) -> str:
    """Return the folder of the run's own store in the cache, built if missing, by the teacher that was asked for."""
    config, data = run.config, run.dataset
    request = label_request(config, epochs)
    made_by = {
        "data": DataSpec.of(config, config.random_seed, images_may_grow=config.images_may_grow).to_dict(),
        **asked,
    }
    begun = labels.begin(run.do, data, info, request, run.cache / "labels", named=False, made_by=made_by)
    job = labels.build_job(begun, data, info, part=(1, 1), device=config.device)
    built = run.do(job, cost=job.units / 3 * teacher_cost(run))
    labels.job_values(built, "soft labels")
    return str(begun["folder"])


def _write_row(run: Run, measured: Measurement, trained: Result) -> None:
    """Add the seed's trial, step 0."""
    family, arch = run.family, run.seed_arch
    values: dict[str, Any] = {name: getattr(measured, name) for name in THROUGHPUT}
    values |= dict.fromkeys(("ratio", "ratio_lo", "ratio_hi"), 1.0)
    values |= {name: trained.values.get(name) for name in SCORES}
    row = Trial(
        step=0,
        key=run.key(arch),
        label=family.label(arch),
        parent="",
        moves="",
        grid_steps=0,
        baseline="seed",
        params=run.start_params,
        params_1000=family.count_params(arch, REFERENCE_CONTEXT),
        macs=run.start_macs,
        reference=run.key(arch),
        basis=run.timings.basis(arch),
        epochs=run.config.seed_epochs,
        seconds=round(measured.seconds + trained.seconds, 3),
        stage="kept",
        state="complete",
        reason="the seed",
        **values,
    )
    run.study.add(row, family.to_dict(arch), {"params": 0.0, "throughput": 0.0})
    run.study.write_csv(run.folder.path / "trials.csv")


def best_so_far(run: Run, steps: int) -> Incumbent | None:
    """Return the best incumbent of the last finished step that has weights, or None.

    Where all steps search one band, the best of all steps.
    """
    rows = [r for r in run.study.rows if r.stage == "kept" and 0 < r.step <= steps]
    if run.strategy.stepwise:
        rows = [r for r in rows if r.step == steps]
    else:
        rows.sort(key=lambda r: r.soft_loss or 0.0)
    found = (run.incumbent(row) for row in rows)
    return next((each for each in found if each.weights.exists()), None)


def remove_intermediate_weights(run: Run) -> None:
    """Remove the weights that only a resume would need; results and logs stay."""
    for path in run.folder.work.glob("*/weights.safetensors"):
        with contextlib.suppress(OSError):
            path.unlink()
    for part in run.folder.work.glob("*.part"):
        shutil.rmtree(part, ignore_errors=True)
