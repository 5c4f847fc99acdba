"""Which of a step's timed candidates are trained, how they rank, and what becomes of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nas.contract.gates import Candidate, add_row, measured_of, ratio_of, row_of
from nas.contract.race import Entrant, Ran, race
from nas.contract.state import MORE, Incumbent, Run, derived_seed
from nas.core.per_image import losses_of
from nas.inherit.jobs import ImportanceJob, rank_by_importance
from nas.jobs.job import Job
from nas.jobs.outcomes import failed_before, keep_failure, log_of
from nas.search.selection import Scored, Timed, paired_error, pick, rank

IMPORTANCE_IMAGES = 256
"""Training images that the importance of units and blocks is judged on."""


def with_order(run: Run, incumbent: Incumbent) -> Incumbent:
    """Have the incumbent's units and blocks ranked by importance, for its children to take."""
    config = run.config
    if config.proxy_init == "scratch" or config.importance == "prefix" or incumbent.order:
        return incumbent
    # The same arch may be kept in two steps, with other weights.
    path = run.folder.work / f"{config.importance}-{incumbent.step}-{incumbent.key}.json"
    if not path.exists():
        job = ImportanceJob(
            family=run.family.name,
            arch=run.family.to_dict(incumbent.arch),
            context=run.context,
            weights=incumbent.weights,
            dataset=run.dataset.folder,
            store=Path(run.store["folder"]),
            criterion=config.importance,
            images=min(IMPORTANCE_IMAGES, len(run.dataset.train.labels)),
            batch_size=config.batch_size,
            random_seed=config.random_seed,
            device=config.device,
            missing=config.missing_labels,
            out=path,
        )
        result = failed_before(path) or run.do(
            Job(rank_by_importance, job, f"order-{incumbent.key}")
        )
        if not result.ok:
            keep_failure(path, result)
            run.console.line(f"note: no order of importance, the first units: {result.reason}")
            return incumbent
    return replace(incumbent, order=path)


def choose(run: Run, step: int, passed: Sequence[Candidate]) -> list[Candidate]:
    """Choose those to train; the others become rows.

    As `--choose` says where the list is a rule's; a strategy that learns puts its best guess first.
    """
    config = run.config
    how = f"among the first {config.proxied}"
    keys = [c.key for c in passed[: config.proxied]]
    if run.strategy.stepwise:
        if config.choose == "spread":
            how = f"among the {config.proxied} best spread"
        keys = pick(
            [Timed(c.key, _features(run, c), ratio_of(c), c.of.anchor is not None) for c in passed],
            config.proxied,
            config.choose,
            random_seed=derived_seed(config.random_seed, "spread", step),
        )
    for candidate in passed:
        if candidate.key not in keys:
            row = row_of(
                run,
                step,
                candidate,
                stage="selection",
                state="pruned",
                reason=f"fast enough, but not {how}",
            )
            add_row(run, row, candidate.of.arch)
    by_key = {c.key: c for c in passed}
    return [by_key[key] for key in keys]


def _features(run: Run, candidate: Candidate) -> tuple[float, ...]:
    """Return the arch as numbers, for distances between candidates."""
    numbers: list[float] = []
    for value in run.family.to_dict(candidate.of.arch).values():
        numbers.extend(float(v) for v in (value if isinstance(value, list) else [value]))
    return tuple(numbers)


def score(run: Run, step: int, chosen: Sequence[Candidate], *, first_epoch: int) -> list[Ran]:
    """Race the chosen candidates; those that failed become rows. Returns the others."""
    entrants = [
        Entrant(c.key, f"s{step}-{c.key}", c.of.arch, with_order(run, c.parent)) for c in chosen
    ]
    ran = race(
        run,
        entrants,
        keep=places(run, step),
        epochs=run.config.proxy_epochs,
        first_epoch=first_epoch,
        stored_epochs=run.store["use_epochs"],
    )
    by_key = {c.key: c for c in chosen}
    scored = []
    for each in ran:
        if each.result.ok:
            scored.append(each)
            continue
        candidate = by_key[each.entrant.key]
        candidate = replace(candidate, seconds=candidate.seconds + each.seconds)
        reason = each.result.reason or "failed"
        row = row_of(
            run,
            step,
            candidate,
            stage="proxy",
            state="failed",
            reason=reason,
            log=log_of(each.folder.name),
        )
        add_row(run, row, candidate.of.arch)
    return scored


def decide(
    run: Run,
    step: int,
    chosen: Sequence[Candidate],
    scored: Sequence[Ran],
    beside: Sequence[Incumbent] = (),
) -> list[Incumbent]:
    """Rank the scored candidates, write their rows, and return the best `beam`.

    `beside` are incumbents of earlier steps that stand for the same places (strategies that look
    inside one band all the time); one that was trained anew stands by the new training. Returns
    none when nobody reached the end of the race.
    """
    by_key = {c.key: c for c in chosen}
    through = {r.entrant.key: r for r in scored if r.stopped is None}
    beside = [i for i in beside if i.key not in through]
    older = {i.key: i for i in beside}
    values = [
        *(
            Scored(
                key,
                r.result.values["soft_loss"],
                r.result.values["soft_loss_se"],
                ratio_of(by_key[key]),
            )
            for key, r in through.items()
        ),
        *(Scored(i.key, i.soft_loss, i.soft_loss_se, i.ratio) for i in beside),
    ]
    folders = {key: r.folder for key, r in through.items()}
    folders.update({i.key: i.weights.parent for i in beside})

    @cache
    def losses(key: str) -> npt.NDArray[np.float64]:
        return losses_of(folders[key], run.config.metric)

    order = rank(values, paired_error(losses))
    kept = order[: places(run, step)]
    best = next((v.soft_loss for v in values if v.key in order[:1]), math.nan)
    for ran in sorted(scored, key=lambda r: _place(order, r.entrant.key)):
        key, candidate = ran.entrant.key, by_key[ran.entrant.key]
        candidate = replace(candidate, seconds=candidate.seconds + ran.seconds)
        told = ran.result.values
        behind = told["soft_loss"] - best
        if ran.stopped is not None:
            stage, state, reason = "race", "pruned", ran.stopped
        elif key in kept:
            stage, state = "kept", "complete"
            reason = f"kept, rank {order.index(key) + 1} of {len(order)}"
        else:
            stage, state = "proxy", "complete"
            place = f"rank {order.index(key) + 1} of {len(order)}"
            reason = f"{place}: {behind:+.4f} nats against rank 1"
        row = row_of(
            run,
            step,
            candidate,
            soft_loss=told["soft_loss"],
            soft_loss_se=told["soft_loss_se"],
            top1=told["top1"],
            top1_se=told["top1_se"],
            metric=told.get("metric"),
            metric_se=told.get("metric_se"),
            epochs=ran.epochs,
            stage=stage,
            state=state,
            reason=reason,
            log=log_of(ran.folder.name),
        )
        add_row(run, row, candidate.of.arch)
        if key not in kept:
            run.folder.drop_weights(ran.folder.name)
    found = []
    for key in kept:
        if key in older:
            found.append(older[key])
            continue
        ran, candidate = through[key], by_key[key]
        found.append(
            Incumbent(
                arch=candidate.of.arch,
                key=key,
                weights=ran.folder / "weights.safetensors",
                ratio=ratio_of(candidate),
                images_per_s=measured_of(candidate).images_per_s,
                soft_loss=ran.result.values["soft_loss"],
                soft_loss_se=ran.result.values["soft_loss_se"],
                step=step,
                parent=candidate.parent,
            )
        )
    return found


def places(run: Run, step: int) -> int:
    """Return how many candidates of a step go on: the beam, or at least two finalists."""
    return run.config.beam if step < run.config.steps else max(run.config.beam, 2)


def _place(order: Sequence[str], key: str) -> int:
    return order.index(key) if key in order else len(order)


def confirm(run: Run, finalists: Sequence[Incumbent]) -> list[Incumbent]:
    """Train the finalists from a second random seed too, and rank them by both, equally long.

    A finalist whose second training fails keeps its place by the first.
    """
    if len(finalists) < 2 or any(i.parent is None for i in finalists):
        return list(finalists)
    config = run.config
    losses: dict[str, npt.NDArray[np.float64]] = {}
    second: dict[str, float] = {}
    tasks = []
    for each in finalists:
        name = f"s{each.step}-{each.key}-again"
        tasks.append(
            run.training(
                each.arch,
                name,
                out=run.folder.job_folder(name),
                epochs=config.proxy_epochs,
                init=config.proxy_init,
                parent=None if each.parent is None else with_order(run, each.parent),
                first_epoch=run.first_epoch(each.step),
                random_seed=derived_seed(config.random_seed, "again"),
            )
        )
    results = run.train_all(tasks, remember=True)
    for each, task, result in zip(finalists, tasks, results, strict=True):
        if not result.ok:
            run.console.line(f"note: {each.key}: the second random seed failed: {result.reason}")
            continue
        # As long as the second one: without the epochs that a race gave it besides.
        first = each.weights.parent
        first = first.with_name(first.name.removesuffix(MORE))
        both = [losses_of(folder, config.metric) for folder in (first, task.out)]
        losses[each.key] = (both[0] + both[1]) / 2
        second[each.key] = result.values["soft_loss"]
        run.folder.drop_weights(task.out.name)
    if len(second) < len(finalists):
        return list(finalists)
    scored = [Scored(i.key, float(losses[i.key].mean()), 0.0, i.ratio) for i in finalists]
    order = rank(scored, paired_error(lambda key: losses[key]))
    by_key = {i.key: i for i in finalists}
    return [replace(by_key[key], second_loss=second[key]) for key in order]
