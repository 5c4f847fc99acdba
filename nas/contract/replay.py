"""Reuse an earlier run's measurements and scores for a new target: `--replay`.

A run's study holds scores of archs of all sizes, and its `models/` those that its steps started from. A replay takes
scored archs that meet the new target or throughput; without any, its steps start from the nearest larger model instead
of the seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.contract.checks import saved_config, usual_steps
from nas.contract.gate import meet_requirements, missed_trial, settle
from nas.contract.run_folder import read_run_json
from nas.contract.seed import requirement_value
from nas.contract.state import MORE, Earlier, Incumbent, Run
from nas.contract.step import SCORES, Step, add_trial, places, trial_of
from nas.core.config import RunConfig, flag
from nas.core.io import read_json
from nas.core.per_image import losses_of
from nas.data import Dataset
from nas.jobs.job import Result
from nas.search.constraints import PACE, band_at, bench_setting, bounds_at, requirements_of
from nas.search.selection import paired_error, rank
from nas.search.study import Trial, read_study
from space import Context
from space.contractions import Band, Candidate, describe_candidates
from space.errors import InputError, refuse
from space.family import Arch, Family

NEW_QUESTION = (
    "target_params",
    "params_tolerance",
    "min_throughput",
    "min_speedup",
    "require",
    "steps",
    "candidates_per_step",
    "train_per_step",
    "beam",
    "selection",
    "max_draws",
    "final_epochs",
    "replay",
)
"""Settings that a replay may change; the others decide what the earlier scores mean."""


def earlier_config(folder: Path) -> tuple[RunConfig, Mapping[str, Any]]:
    """Read an earlier run's configuration and `run.json`. Raises InputError without a run."""
    data = read_run_json(folder, "--replay")
    return saved_config(data["config"]), data


def replayed_config(given: Mapping[str, Any]) -> RunConfig:
    """Return the earlier run's configuration with the new settings.

    Settings that would change what the earlier scores mean are refused. The number of steps follows the distance,
    unless it is given.
    """
    config, _ = earlier_config(Path(given["replay"]))
    for name, value in given.items():
        before = getattr(config, name)
        if name not in NEW_QUESTION and value != before:
            got = f"{value} with --replay of a run made with {before}"
            raise refuse(flag(name), got, "the earlier run's own setting", f"drop {flag(name)}, or start a new run")
    # The earlier run's own measurements hold what it took from another run's file.
    lent = config.measurements
    if "measurements" not in given and lent is not None and not Path(lent).exists():
        config = replace(config, measurements=None)
    # A new pace replaces the old one there; all other bounds stand. New bounds replace all.
    if "require" in given:
        config = replace(config, min_throughput=None, min_speedup=None, require=())
    elif "min_throughput" in given or "min_speedup" in given:
        config = replace(config, min_throughput=None, min_speedup=None)
        here = bench_setting(config)
        kept = [r for r in requirements_of(config) if r.metric not in PACE or r.setting != here]
        config = replace(config, require=tuple(r.text for r in kept))
    return replace(config, **dict(given))


def read_earlier(folder: Path, family: Family, dataset: str, *, after: Collection[Path] = ()) -> Earlier:
    """Read an earlier run's trials and models; one on other data is refused.

    `after` are the folders of replays that led here, so that none is read twice.
    """
    config, data = earlier_config(folder)
    known = data.get("dataset", {}).get("fingerprint")
    if known != dataset:
        got = f"a run on data with fingerprint {known}"
        raise refuse("--replay", got, f"the data at hand, {dataset}", "restore the data")
    study = read_study(folder, data)
    try:
        scored = tuple(
            (row, family.arch(study.arch(row.step, row.key)))
            for row in study.rows
            if row.step > 0 and row.state == "complete" and row.soft_loss is not None
        )
    finally:
        study.close()
    before, met = None, {*after, folder.resolve()}
    if config.replay is not None and Path(config.replay).resolve() not in met:
        with contextlib.suppress(InputError):  # gone or replaced: its scores cannot be compared
            before = read_earlier(Path(config.replay), family, dataset, after=met)
    return Earlier(folder, config, data, scored, read_models(folder, family), before)


def read_models(folder: Path, family: Family) -> tuple[Incumbent, ...]:
    """Read the models in a run's `models/` that have weights; damaged ones are refused."""
    found = []
    for path in sorted((folder / "models").glob("*.json")):
        model, weights = read_json(path, "a model of a run"), path.with_suffix(".safetensors")
        try:
            score, timed = model["score"], model["throughput"]
            kept = {name: timed[name] for name in ("ratio", "images_per_s")}
            kept |= {name: score[name] for name in ("soft_loss", "soft_loss_se")}
            found.append(Incumbent(arch=family.arch(model["arch"]), key=model["key"], weights=weights, **kept))
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(str(path), repr(error), "a model of a run", "restore it") from None
    return tuple(each for each in found if each.weights.is_file())


def scores_in_band(earlier: Earlier, band: Band) -> list[tuple[Trial, Arch]]:
    """Return the scored archs inside a band, best first, each net once.

    One that was scored in several steps counts by its last score.
    """
    latest: dict[str, tuple[Trial, Arch]] = {}
    for row, arch in earlier.scored:
        light = band.max_macs is None or row.macs <= band.max_macs
        if band.lo <= row.params <= band.hi and light:
            latest[row.key] = (row, arch)
    return sorted(latest.values(), key=lambda found: (found[0].soft_loss or 0.0, found[0].key))


def nearest_larger_model(earlier: Earlier, band: Band, family: Family, context: Context) -> Incumbent | None:
    """Return the smallest model larger than a band, or None."""
    models = [model for run in lineage(earlier) for model in run.models]
    sized = [(family.count_params(model.arch, context), model) for model in models]
    larger = [each for each in sized if each[0] > band.hi]
    return min(larger, key=lambda each: each[0], default=(0, None))[1]


def lineage(earlier: Earlier) -> list[Earlier]:
    """Return an earlier run, the run that it replayed, and so on."""
    return [earlier, *(lineage(earlier.before) if earlier.before is not None else ())]


# Replaying


def reuse_scores(run: Run, earlier: Earlier, seed: Incumbent) -> list[Incumbent]:
    """Return the best archs that the earlier run scored and that meet the new requirements.

    Requirements are checked again, from stored measurements where there are any. Empty when no arch passes. Scores of
    different steps come from different parents; they are compared as they are.
    """
    step = run.config.steps
    bounds = bounds_at(
        step, run.config, seed_params=run.start_params, seed_values=run.start_values, parent_ratio=seed.ratio
    )
    if not any(r.metric in ("speedup", "images_per_s") for r in bounds.requirements):
        bounds = replace(bounds, least_ratio=None)
    here = Step(step, seed, [seed], [seed], {seed.key: bounds})
    rows: dict[str, Trial] = {}
    candidates: list[Candidate] = []
    folders: dict[str, Path] = {}
    for of in lineage(earlier):
        for row, arch in scores_in_band(of, bounds.band):
            folder = _folder(of, row)
            if folder is None or row.key in folders:  # the latest run that scored it counts
                continue
            folders[row.key] = folder
            (candidate,) = describe_candidates(run.family, [run.seed_arch], [(None, arch)], run.context)
            rows[row.key] = row
            candidates.append(candidate)
    passed: dict[str, tuple[Trial, Candidate]] = {}
    for candidate in meet_requirements(run, here, candidates):
        settled, missed = settle(run, here, candidate, last=True)
        if missed:
            add_trial(run, missed_trial(run, here, settled, missed), settled.arch)
        else:
            passed[settled.key] = (rows[settled.key], settled)
    values = [replace(row, ratio=candidate.ratio) for row, candidate in passed.values()]
    order = rank(values, paired_error(lambda key: losses_of(folders[key], run.config.metric)))
    kept = order[: places(run, step)]
    found = []
    for at, key in enumerate(order):
        row, candidate = passed[key]
        trial = trial_of(
            run,
            step,
            candidate,
            **{name: getattr(row, name) for name in SCORES},
            epochs=row.epochs,
            stage="kept" if key in kept else "proxy",
            state="complete",
            reason=f"rank {at + 1} of {len(order)}; score of step {row.step} of {earlier.folder}",
        )
        add_trial(run, trial, candidate.arch)
        if key in kept:
            found.append(replace(run.incumbent(trial), weights=folders[key] / "weights.safetensors"))
    return found


def _folder(earlier: Earlier, row: Trial) -> Path | None:
    """Return the folder with the losses per image behind a score, None where it is gone.

    A replay's own scores have theirs in the run that it replayed.
    """
    longer = MORE if row.epochs > earlier.config.proxy_epochs else ""
    folder = earlier.folder / "work" / f"s{row.step}-{row.key}{longer}"
    if (folder / "holdout.safetensors").is_file():
        return folder
    if earlier.before is None:
        return None
    for old, _ in earlier.before.scored:
        if (old.key, old.soft_loss) == (row.key, row.soft_loss):
            found = _folder(earlier.before, old)
            if found is not None:
                return found
    return None


def starting_incumbent(run: Run, earlier: Earlier, seed: Incumbent) -> Incumbent:
    """Return where the steps start: the earlier run's smallest model above the band, or the seed.

    The steps' bounds tighten from there.
    """
    model = nearest_larger_model(earlier, run.band(run.config.steps), run.family, run.context)
    if model is None:
        return seed
    measured = run.timings.measure(model.arch, "gate", reference=run.seed_arch)
    if isinstance(measured, Result) or measured.ratio is None:
        return seed
    values = {}
    for required in requirements_of(run.config):
        value = requirement_value(run, model.arch, required, "gate", reference=run.seed_arch)
        if isinstance(value, Result):
            return seed
        values[required] = value
    run.start_values, run.start_ratio = values, measured.ratio
    run.start_params = run.family.count_params(model.arch, run.context)
    run.start_macs = run.family.count_macs(model.arch, run.context)
    return replace(model, key=run.key(model.arch), ratio=measured.ratio, images_per_s=measured.images_per_s)


def load_earlier(config: RunConfig, family: Family, dataset: Dataset) -> Earlier | None:
    """Load the run of `--replay`, with the scores that still have losses per image."""
    if config.replay is None:
        return None
    earlier = read_earlier(Path(config.replay), family, dataset.fingerprint)
    there = tuple(each for each in earlier.scored if _folder(earlier, each[0]) is not None)
    return replace(earlier, scored=there)


def steps_to_target(earlier: Earlier, config: RunConfig, family: Family, dataset: Dataset) -> int:
    """Return how many steps a replay takes from the earlier run's nearest model to its target."""
    context, seed = dataset.context, family.arch(config.seed_arch)
    band = band_at(family.count_params(seed, context), config, config.steps)
    start = nearest_larger_model(earlier, band, family, context)
    return usual_steps(config, family.count_params(seed if start is None else start.arch, context))


def describe_reuse(
    run: Run, earlier: Earlier, seed: Incumbent, start: Incumbent, known: Sequence[Incumbent]
) -> dict[str, Any]:
    """Return what a replay takes from the earlier run: `result.json`'s `reused`."""
    rows = [r for r in run.study.rows if r.step == run.config.steps and r.soft_loss is not None]
    scores = len(rows) if known else 0
    if known:
        message = f"{scores} archs that {earlier.folder} scored meet the new question: no step to take"
        if scores == 1:
            message += ", and no choice; a run of its own would look further"
        lengths = {row.epochs for row in rows}
        if len(lengths) > 1:
            epochs = " and ".join(f"{e:g}" for e in sorted(lengths))
            message += f"; they were trained {epochs} epochs and are compared as they are"
    elif start is not seed:
        message = (
            f"none of the {len(earlier.scored)} archs scored in {earlier.folder} meets the new "
            f"question; {run.config.steps} steps from its model of {run.start_params:,} parameters"
        )
    else:
        message = f"nothing in {earlier.folder} helps; {run.config.steps} steps from the seed"
    now = {required.text for required in requirements_of(run.config)}
    dropped = [r.text for r in requirements_of(earlier.config) if r.text not in now]
    if dropped:
        message += f"; its {' and '.join(dropped)} not asked for any more"
    return {"run": str(earlier.folder), "scores": scores, "start": None if known else start.key, "message": message}
