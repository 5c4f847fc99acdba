"""A replay at work: answered from an earlier run's scores, or begun at one of its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.contract.gates import Candidate, add_row, gate, measured_of, ratio_of, row_of
from nas.contract.replay import Earlier, answers, lineage, read_earlier, set_aside, start_of
from nas.contract.scoring import places
from nas.contract.state import MORE, Incumbent, Run
from nas.core.config import RunConfig
from nas.core.per_image import losses_of
from nas.data import Dataset
from nas.jobs.job import Result
from nas.search.constraints import band_at, bounds_at, requirements_of, usual_steps
from nas.search.selection import Scored, paired_error, rank
from nas.search.study import Trial
from space import Context
from space.contractions import listed
from space.family import Family


def answered(run: Run, earlier: Earlier, seed: Incumbent) -> list[Incumbent]:
    """Return the best archs that the earlier run scored and that meet the new question.

    Each passes the gates anew, from stored measurements where there are any. Empty when none does.
    Scores of different steps come from different parents; they are compared as they are.
    """
    step = run.config.steps
    bounds = bounds_at(
        step,
        run.config,
        seed_params=run.start_params,
        seed_values=run.start_values,
        parent_ratio=seed.ratio,
    )
    if not any(r.metric in ("speedup", "images_per_s") for r in bounds.requirements):
        bounds = replace(bounds, least_ratio=None)
    passed: list[tuple[Trial, Candidate]] = []
    folders: dict[str, Path] = {}
    known = [(of, *each) for of in lineage(earlier) for each in answers(of, bounds.band)]
    for of, row, arch in known:
        folder = _folder(of, row)
        if folder is None or row.key in folders:  # the last run that scored it tells
            continue
        folders[row.key] = folder
        told = listed(run.family, [run.seed_arch], [(None, arch)], run.context)[0]
        candidate = gate(run, step, Candidate(told, row.key, seed), bounds)
        if candidate is not None:
            passed.append((row, candidate))
    if not passed:
        return []
    values = [
        Scored(row.key, row.soft_loss or 0.0, row.soft_loss_se or 0.0, ratio_of(candidate))
        for row, candidate in passed
    ]
    order = rank(values, paired_error(lambda key: losses_of(folders[key], run.config.metric)))
    by_key = {row.key: (row, candidate) for row, candidate in passed}
    kept = order[: places(run, step)]
    found = []
    for key in order:
        row, candidate = by_key[key]
        place = f"rank {order.index(key) + 1} of {len(order)}"
        add_row(
            run,
            row_of(
                run,
                step,
                candidate,
                soft_loss=row.soft_loss,
                soft_loss_se=row.soft_loss_se,
                top1=row.top1,
                top1_se=row.top1_se,
                metric=row.metric,
                metric_se=row.metric_se,
                epochs=row.epochs,
                stage="kept" if key in kept else "proxy",
                state="complete",
                reason=f"{place}; score of step {row.step} of {earlier.folder}",
            ),
            candidate.of.arch,
        )
        if key in kept:
            found.append(
                Incumbent(
                    arch=candidate.of.arch,
                    key=key,
                    weights=folders[key] / "weights.safetensors",
                    ratio=ratio_of(candidate),
                    images_per_s=measured_of(candidate).images_per_s,
                    soft_loss=row.soft_loss or 0.0,
                    soft_loss_se=row.soft_loss_se or 0.0,
                    step=step,
                )
            )
    return found


def _folder(earlier: Earlier, row: Trial) -> Path | None:
    """Return where the losses per image behind a score lie, None where they are gone.

    A replay's own answers have theirs with the run that it replayed.
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


def begun_at(run: Run, earlier: Earlier, seed: Incumbent) -> Incumbent:
    """Return where the steps begin: the earlier run's smallest model above the band, or the seed.

    The steps' bounds tighten from there.
    """
    milestone = start_of(earlier, run.band(run.config.steps))
    if milestone is None:
        return seed
    measured = run.timings.measure(milestone.arch, "gate", reference=run.seed_arch)
    if isinstance(measured, Result) or measured.ratio is None:
        return seed
    values = {}
    for required in requirements_of(run.config):
        if required.setting is None:
            count = run.family.count_params
            if required.metric == "macs":
                count = run.family.count_macs
            values[required] = float(count(milestone.arch, run.context))
            continue
        weigh = (required,) if required.metric == "peak_mem_mb" else ()
        there = run.timings.measure(
            milestone.arch,
            "gate",
            reference=run.seed_arch,
            requirements=weigh,
            setting=required.setting,
        )
        if isinstance(there, Result):
            return seed
        values[required] = there.interval(required.metric)[0]
    run.start_values = values
    run.start_params = milestone.params
    run.start_macs = run.family.count_macs(milestone.arch, run.context)
    run.start_ratio = measured.ratio
    score = milestone.score
    return Incumbent(
        arch=milestone.arch,
        key=run.key(milestone.arch),
        weights=milestone.weights,
        ratio=measured.ratio,
        images_per_s=measured.images_per_s,
        soft_loss=score["soft_loss"],
        soft_loss_se=score["soft_loss_se"],
        step=0,
    )


def earlier_of(config: RunConfig, family: Family, dataset: Dataset) -> Earlier | None:
    """Read the run that a replay answers from, with the scores whose losses per image are left."""
    if config.replay is None:
        return None
    earlier = read_earlier(Path(config.replay), family, dataset.fingerprint)
    there = tuple(each for each in earlier.scored if _folder(earlier, each[0]) is not None)
    return replace(earlier, scored=there)


def steps_from(earlier: Earlier, config: RunConfig, family: Family, dataset: Dataset) -> int:
    """Return how many steps a replay takes from the earlier run's nearest model to its target."""
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    seed_params = family.count_params(family.arch(config.seed_arch), context)
    start = start_of(earlier, band_at(seed_params, config, config.steps))
    params = seed_params if start is None else start.params
    return usual_steps(config, params)


def reused_words(
    bench: Run, earlier: Earlier, seed: Incumbent, start: Incumbent, known: Sequence[Incumbent]
) -> dict[str, Any]:
    """Say what a replay takes from the earlier run."""
    scores = (
        sum(
            row.step == bench.config.steps and row.soft_loss is not None
            for row in bench.ledger.rows
        )
        if known
        else 0
    )
    if known:
        says = f"{scores} archs that {earlier.folder} scored meet the new question: no step to take"
        if scores == 1:
            says += ", and no choice; a run of its own would look further"
        lengths = {
            row.epochs
            for row in bench.ledger.rows
            if row.step == bench.config.steps and row.soft_loss is not None
        }
        if len(lengths) > 1:
            epochs = " and ".join(f"{e:g}" for e in sorted(lengths))
            says += f"; they were trained {epochs} epochs and are compared as they are"
    elif start is not seed:
        says = (
            f"none of the {len(earlier.scored)} archs scored in {earlier.folder} meets the new "
            f"question; {bench.config.steps} steps from its model of {bench.start_params:,} "
            "parameters"
        )
    else:
        says = f"nothing in {earlier.folder} helps; {bench.config.steps} steps from the seed"
    dropped = set_aside(earlier.config, bench.config)
    if dropped:
        says += f"; its {' and '.join(dropped)} not asked for any more"
    return {
        "run": str(earlier.folder),
        "scores": scores,
        "start": None if known else start.key,
        "says": says,
    }
