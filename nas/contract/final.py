"""The end of a run: time the finalists again, train and test the winner, write the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contract.models import write_best, write_models_table
from nas.contract.race import with_order
from nas.contract.state import MORE, Incumbent, Run, Task, derived_seed
from nas.contract.step import THROUGHPUT, band_text
from nas.contract.timing import interval_text, verdict_text
from nas.core.cli import path_argument, resume_flags, shell_command
from nas.core.io import read_object, write_json
from nas.core.per_image import losses_of, paired_difference
from nas.jobs.job import Result
from nas.measure.measurement import Measurement, visits_needed
from nas.report import write_report
from nas.search.constraints import requirements_of
from nas.search.selection import paired_error, rank
from nas.search.study import StepRow
from space import REFERENCE_CONTEXT, get_family
from space.contractions import contains
from space.family import Arch


@dataclass
class RunProgress:
    """The progress of a run, which is recorded when time runs out."""

    status: str = "stopped"
    message: str = ""
    seed: Incumbent | None = None
    steps: list[StepRow] = field(default_factory=list)
    incumbents: list[Incumbent] = field(default_factory=list)
    path: Sequence[Sequence[Incumbent]] = ()
    best: Incumbent | None = None
    final: dict[str, Any] | None = None
    reused: dict[str, Any] | None = None


def finish(run: Run, seed: Incumbent, progress: RunProgress) -> None:
    """Confirm the finalists, pick the winner and compare it; `progress` records each."""
    progress.incumbents = confirm(run, progress.incumbents)
    picked = pick_winner(run, progress.incumbents)
    if isinstance(picked, list):
        progress.best = picked[0]
        progress.status, progress.message = "unverified", _unverified(run, picked)
    elif isinstance(picked, str):
        progress.status, progress.message = "stuck", picked
    elif isinstance(compared := compare(run, seed, picked), str):
        progress.status, progress.message = "stuck", compared
    else:
        progress.best, progress.final = picked.of, compared
        progress.status = "undecided" if picked.undecided else "reached"
        progress.message = _outcome(run, compared, picked.undecided)


def confirm(run: Run, finalists: Sequence[Incumbent]) -> list[Incumbent]:
    """Train the finalists from a second random seed too, and rank them by both, equally long.

    Where a second training fails, all keep their places by the first.
    """
    if len(finalists) < 2 or any(i.parent is None for i in finalists):
        return list(finalists)
    config = run.config
    losses: dict[str, npt.NDArray[np.float64]] = {}
    second: dict[str, float] = {}
    tasks = []
    for each in finalists:
        task = run.training(
            each.arch,
            f"s{each.step}-{each.key}-again",
            epochs=config.proxy_epochs,
            parent=None if each.parent is None else with_order(run, each.parent),
            first_epoch=run.first_epoch(each.step),
            random_seed=derived_seed(config.random_seed, "again"),
        )
        tasks.append(task)
    for each, task, result in zip(finalists, tasks, run.train_all(tasks, remember=True), strict=True):
        if not result.ok:
            run.console.line(f"note: {each.key}: the second random seed failed: {result.reason}")
            continue
        # As long as the second one: without the saved epochs of a race.
        first = each.weights.parent
        first = first.with_name(first.name.removesuffix(MORE))
        losses[each.key] = (losses_of(first, config.metric) + losses_of(task.out, config.metric)) / 2
        second[each.key] = result.values["soft_loss"]
        run.folder.drop_weights(task.out.name)
    if len(second) < len(finalists):
        return list(finalists)
    scored = [replace(i, soft_loss=float(losses[i.key].mean())) for i in finalists]
    by_key = {i.key: i for i in finalists}
    return [replace(by_key[key], second_loss=second[key]) for key in rank(scored, paired_error(losses.__getitem__))]


@dataclass(frozen=True)
class Finalist:
    """A finalist timed afresh: its primary timing, every requirement's verdict, and those left open, in words."""

    of: Incumbent
    measured: Measurement
    verdicts: tuple[str, ...] = ()
    undecided: str = ""


def pick_winner(run: Run, ranked: Sequence[Incumbent]) -> Finalist | list[Incumbent] | str:
    """Time the finalists again, best first; return the first that meets all requirements.

    Otherwise the first that `--max-visits` leaves undecided; otherwise the finalists that a device table only predicts,
    and does not rule out; without any, a sentence with how much the last one missed.
    """
    text, likely, undecided = "", list[Incumbent](), list[Finalist]()
    for incumbent in ranked:
        missed, finalist, guessed = _fresh(run, incumbent)
        if missed:
            text = f"{run.family.label(incumbent.arch)}, timed afresh, {missed}"
        elif guessed:
            likely.append(incumbent)
        else:
            assert finalist is not None
            if not finalist.undecided:
                return finalist
            undecided.append(finalist)
    return undecided[0] if undecided else likely or text


def _fresh(run: Run, finalist: Incumbent) -> tuple[str, Finalist | None, bool]:
    """Time a finalist under every setting: what it missed, how it was timed, and whether any of it is a guess."""
    primary, guessed, missed = None, False, ""
    verdicts: tuple[str, ...] = ()
    still_open: list[str] = []
    for setting in run.settings:
        required = tuple(r for r in requirements_of(run.config) if r.setting == setting)
        if missed or not (required or setting == run.primary):
            continue
        measured = run.timings.measure(
            finalist.arch, "final", reference=run.seed_arch, requirements=required, setting=setting
        )
        if isinstance(measured, Result):
            missed = f"failed under {setting.text}: {measured.reason}"
            continue
        primary = measured if setting == run.primary else primary
        guessed = guessed or run.timings.predicts(setting, finalist.arch, final=True)
        verdicts += tuple(verdict_text(measured, one) for one in required)
        failed = [one for one in required if measured.verdict_of(one) == "fail"]
        if failed:
            missed = f"misses {failed[0].text}: {interval_text(measured, failed[0].metric)}"
        for one in required:
            if measured.verdict_of(one) == "undecided":
                needed = visits_needed(measured, one)
                what = "no number of visits" if needed is None else f"about {needed} visits"
                value = interval_text(measured, one.metric)
                still_open.append(f"{one.text} at {value} after {measured.visits} visits; {what} would decide it")
    if primary is None:
        return missed, None, guessed
    return missed, Finalist(finalist, primary, verdicts, "; ".join(still_open)), guessed


def final_training(run: Run, arch: Arch, seed: Incumbent) -> Task:
    """Describe a training of the final comparison: from the seed's weights (or scratch), longer."""
    name, epochs = f"final-{run.key(arch)}", run.config.final_epochs
    return run.training(arch, name, epochs=epochs, parent=with_order(run, seed), test=True)


def nearest_published(run: Run, params: int) -> tuple[str, Arch]:
    """Return the published arch nearest in size to `params`, as built in this run's context.

    Contractions of the seed come first: only they inherit all their weights. Where no published arch can be built for
    these images, the seed itself.
    """
    # The comparison is with the released archs, whatever the run froze.
    family, context = get_family(run.config.family), run.context
    fits = [p for p in family.published if family.fits(p.arch, context)]
    if not fits:
        return run.config.seed, run.seed_arch
    below = [p for p in fits if contains(family, run.seed_arch, p.arch, context)]
    published = min(below or fits, key=lambda p: abs(math.log(family.count_params(p.arch, context) / params)))
    return published.name, published.arch


def _side(run: Run, name: str, arch: Arch, measured: Measurement, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return one side of the final comparison as plain JSON."""
    return {
        "name": name,
        "key": run.key(arch),
        "params": run.family.count_params(arch, run.context),
        "macs": run.family.count_macs(arch, run.context),
        "params_1000": run.family.count_params(arch, REFERENCE_CONTEXT),
        **{field: getattr(measured, field) for field in THROUGHPUT},
        "basis": run.timings.basis(arch, final=True),
        "top1": values["test_top1"],
        "top1_se": values["test_top1_se"],
        "test_n": values["test_n"],
        "metric": values.get("test_metric"),
        "metric_se": values.get("test_metric_se"),
        "soft_loss": values["soft_loss"],
        "soft_loss_se": values["soft_loss_se"],
        "holdout_top1": values["top1"],
    }


def compare(run: Run, seed: Incumbent, picked: Finalist) -> dict[str, Any] | str:
    """Train and test the winner beside the published seed nearest in size, treated alike.

    Returns the `final` part of `result.json`, or a sentence when the winner's training failed.
    """
    winner, measured = picked.of, picked.measured
    name, arch = nearest_published(run, run.family.count_params(winner.arch, run.context))
    itself = run.key(arch) == winner.key
    timed = None if itself else run.timings.measure(arch, "final", reference=run.seed_arch)
    sides = [winner.arch] if timed is None or isinstance(timed, Result) else [winner.arch, arch]
    tasks = [final_training(run, each, seed) for each in sides]
    trained, *others = run.train_all(tasks)
    if not trained.ok:
        return f"the winner's final training failed: {trained.reason}"
    final: dict[str, Any] = {
        "init": run.config.proxy_init,
        "metric": run.config.metric,
        "epochs": run.config.final_epochs,
        "winner": _side(run, "winner", winner.arch, measured, trained.values),
        "requirements": list(picked.verdicts),
        "fvcore_macs": trained.values.get("fvcore_macs"),
    }
    if timed is None:
        final["published"] = {**final["winner"], "name": name}
        final["note"] = f"the winner is the published {name} itself: a tie"
    elif isinstance(timed, Result) or not others[0].ok:
        failure = timed.reason if isinstance(timed, Result) else others[0].reason
        final["note"] = f"the published {name} could not be compared: {failure}"
    else:
        final["published"] = _side(run, name, arch, timed, others[0].values)
        outs = [task.out for task in tasks]
        final["paired"] = paired_difference(outs[0], outs[1], run.config.metric, run.context.num_classes)
    return final


def write_result(run: Run, progress: RunProgress, seconds: float) -> dict[str, Any]:
    """Write the best model, the tables, `result.json` and the report; return `result.json`."""
    folder = run.folder.path
    won = None if progress.final is None else progress.best
    result = {
        "status": progress.status,
        "exit_code": 0 if progress.status == "reached" else 3,
        "message": progress.message,
        "winner": None if won is None else won.key,
        "path": [incumbents[0].key for incumbents in progress.path],
        "final": progress.final,
        "reused": progress.reused,
        "proxy_check": None,
        "work": asdict(run.work()),
        "finalists": [
            {"key": i.key, "ratio": i.ratio, "soft_loss": i.soft_loss, "soft_loss_again": i.second_loss}
            for i in progress.incumbents
            if i.parent is not None
        ],
        "seconds": round(seconds, 1),
        # Tells how busy the machine was.
        "seed_images_per_s": next((r.images_per_s for r in run.study.rows if r.step == 0), None),
    }
    write_best(run, progress.best, progress.final)
    run.study.write_csv(folder / "trials.csv")
    write_models_table(folder)
    run.study.export(folder / "study.db")
    write_json(run.folder.result_json, result)
    write_report(folder)
    return result


def _outcome(run: Run, final: Mapping[str, Any], undecided: str) -> str:
    winner = final["winner"]
    band = run.band(run.config.steps)
    text = (
        f"{'undecided' if undecided else 'reached'}: {winner['params']:,} parameters in {band_text(band.lo, band.hi)}, "
        f"{winner['ratio']:.2f}x the seed's throughput "
        f"[{winner['ratio_lo']:.2f}, {winner['ratio_hi']:.2f}], "
        f"test top-1 {winner['top1']:.1%} +- {winner['top1_se']:.1%}"
    )
    if final["metric"] != "top1" and winner["metric"] is not None:
        name = final["metric"].replace("_", " ")
        text += f", {name} {winner['metric']:.1%} +- {winner['metric_se']:.1%}"
    if undecided:
        text += f"; {undecided} (--max-visits)"
    if run.timings.reused:
        text += f"; {run.timings.reused} measurements were taken from the cache of earlier runs"
    return text


def _unverified(run: Run, finalists: Sequence[Incumbent]) -> str:
    """Write `finalists.json`, the archs to measure on the table's device; return the message with the next commands."""
    table, family = run.table, run.family
    assert table is not None, "only predictions leave finalists unverified"
    path = run.folder.path / "finalists.json"
    listed = []
    for each in finalists:
        guess = table.measurement(each.arch)
        speed = [guess.images_per_s, guess.images_per_s_lo, guess.images_per_s_hi]
        ratio = [guess.ratio, guess.ratio_lo, guess.ratio_hi]
        named = {"arch": family.to_dict(each.arch), "label": family.label(each.arch)}
        listed.append({**named, "predicted_images_per_s": speed, "predicted_ratio": ratio})
    write_json(path, {"family": family.name, "finalists": listed})
    setting = table.setting
    flags = {
        "arch": path_argument(path),
        "reference": run.config.seed,
        **{name: getattr(setting, name) for name in ("device", "runtime", "dtype", "batch")},
        "img-size": run.context.img_size,
        "num-classes": run.context.num_classes,
        "out": "finalists.csv",
    }
    measure = shell_command("benchmarks.throughput", *(part for k, v in flags.items() for part in (f"--{k}", v)))
    return (
        f"unverified: {len(finalists)} finalists meet the requirements by prediction only; measure them on their "
        f"device: {measure}; then continue here with: python -m nas.contract {resume_flags(run.folder.path)} "
        "--final-measurements finalists.csv"
    )


def read_result(path: Path) -> dict[str, Any]:
    """Read a finished run's `result.json`; a damaged one is refused."""
    return read_object(path, "the result of a run", {"status": str, "exit_code": int, "message": str})
