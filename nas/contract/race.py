"""Race the proxy trainings of a step in rungs on the same batches; likely losers stop.

Each rung is a job that continues the one before. Decisions follow when all candidates have reached a rung, in the order
of keys, so they depend on results alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.contract.gate import settle
from nas.contract.state import MORE, RUNG, Incumbent, Run, Task
from nas.contract.step import SCORES, THROUGHPUT, Step, places, trial_of
from nas.core.per_image import losses_of
from nas.inherit.jobs import ImportanceJob, rank_by_importance
from nas.jobs.job import CHECKPOINT, Job, Result, failed_before, keep_failure, log_of
from nas.search.racing import racing_decision
from nas.search.study import Trial
from space.contractions import Candidate

ALPHA = 0.05
"""Probability, over a whole race, that image noise stops its best candidate."""

DRIFT_NATS = 0.05
"""Standard deviation of how much two candidates' difference still moves until the last rung."""

IMPORTANCE_IMAGES = 256
"""Training images behind the importance of units and blocks."""


def rungs_of(epochs: int) -> list[int]:
    """Return the epochs at which a race decides: the whole length, halved down to one."""
    found = [epochs]
    while found[0] > 1:
        found.insert(0, -(-found[0] // 2))
    return found


def race(run: Run, step: Step, selected: Sequence[Candidate]) -> list[Trial]:
    """Train a step's selected candidates and return them as trials, in their order.

    Each trains the epochs of a proxy unless a paired test on the holdout shows earlier that it cannot be among the best
    (`nas.search.racing`); failures are trials too. A stepwise strategy gives saved epochs to the remaining candidates,
    equally; other strategies compare candidates of different steps, which must be trained equally long.
    """
    config, keep, epochs = run.config, places(run, step.number), run.config.proxy_epochs
    rungs = rungs_of(epochs) if config.racing and len(selected) > keep else [epochs]
    starts = {parent.key: parent for parent in map(step.parent_of, selected)}
    parents = {key: with_order(run, parent) for key, parent in starts.items()}
    trials: dict[str, Trial] = {}
    racing, earlier = list(selected), None
    for rung in rungs:
        tasks = []
        for each in racing:
            task = run.training(
                each.arch,
                _folder(run, step, each, rung).name,
                epochs=epochs,
                parent=parents[step.parent_of(each).key],
                first_epoch=run.first_epoch(step.number),
                rung=None if rung == epochs else rung,
                before=None if earlier is None else (earlier, _folder(run, step, each, earlier)),
            )
            tasks.append(task)
        results = run.train_all(tasks, remember=True)
        for at, (each, task, result) in enumerate(zip(racing, tasks, results, strict=True)):
            if earlier is not None:
                _drop_checkpoint(_folder(run, step, each, earlier))
            racing[at] = each = replace(each, seconds=each.seconds + result.seconds)
            trials[each.key] = _trial(run, step, each, task, result, rung)
        racing = [each for each in racing if trials[each.key].state != "failed"]
        racing = _settled(run, step, racing, trials, last=rung == epochs)
        if rung == epochs or not racing:
            break
        folders = {each.key: _folder(run, step, each, rung) for each in racing}
        losses = {key: losses_of(folders[key], config.metric) for key in sorted(folders)}
        decision = racing_decision(losses, keep, alpha=ALPHA, looks=len(rungs) - 1, drift_sd=DRIFT_NATS)
        for key, reason in decision.stop.items():
            reason = f"stopped after {rung} of {epochs} epochs: {reason}"
            trials[key] = replace(trials[key], stage="race", state="pruned", reason=reason)
            _drop_checkpoint(folders[key])
        racing = [each for each in racing if each.key in decision.stay]
        earlier = rung
    if run.strategy.stepwise:
        trials |= _train_on_saved_epochs(run, step, racing, parents, trials)
    return [trials[each.key] for each in selected]


def _settled(
    run: Run, step: Step, racing: Sequence[Candidate], trials: dict[str, Trial], *, last: bool
) -> list[Candidate]:
    """Time provisional candidates further, between trainings; those that miss a requirement leave the race."""
    left = []
    for each in racing:
        candidate, missed = settle(run, step, each, last=last)
        trials[each.key] = trial = replace(trials[each.key], **_timing_of(candidate))
        if not missed:
            left.append(candidate)
            continue
        reason, violation = "; ".join(text for text, _ in missed), max(v for _, v in missed)
        trials[each.key] = replace(trial, stage="throughput", state="pruned", reason=reason, violation=violation)
    return left


def _timing_of(candidate: Candidate) -> dict[str, Any]:
    values = {name: getattr(candidate, name) for name in THROUGHPUT}
    return {**values, "basis": candidate.basis, "requirements": "; ".join(candidate.requirements)}


def _folder(run: Run, step: Step, candidate: Candidate, rung: int) -> Path:
    """Return the folder of a candidate's training: of a rung, or of the whole length."""
    cut = "" if rung == run.config.proxy_epochs else f"{RUNG}{rung}"
    return run.folder.job_folder(f"s{step.number}-{candidate.key}{cut}")


def _trial(run: Run, step: Step, candidate: Candidate, task: Task, result: Result, epochs: int) -> Trial:
    """Return a trained candidate as a trial."""
    outcome: dict[str, Any] = {"state": "failed", "reason": result.reason or "failed"}
    if result.ok:
        scores = {name: result.values.get(name) for name in SCORES}
        outcome = {**scores, "state": "complete", "epochs": epochs}
    return trial_of(run, step.number, candidate, stage="proxy", log=log_of(task.out.name), **outcome)


def _train_on_saved_epochs(
    run: Run, step: Step, through: Sequence[Candidate], parents: Mapping[str, Incumbent], trials: Mapping[str, Trial]
) -> dict[str, Trial]:
    """Train the candidates that reached the end on the epochs that stopped ones saved."""
    epochs, stored = run.config.proxy_epochs, run.store["use_epochs"]
    saved = sum(epochs - trial.epochs for trial in trials.values() if trial.stage == "race")
    more = saved // max(len(through), 1)  # equally long for all: their scores are compared
    if more < 1 or len(through) < 2:
        return {}
    # Where stored epochs run out, they start again from the first.
    first_epoch = run.first_epoch(step.number) + epochs
    first_epoch = first_epoch if first_epoch + more <= stored else 0
    length = min(more, stored)
    tasks = []
    for each in through:
        folder = run.trial_folder(trials[each.key])
        parent, weights = parents[step.parent_of(each).key], folder / "weights.safetensors"
        own = replace(parent, arch=each.arch, key=each.key, weights=weights, order=None)
        options: dict[str, Any] = {"epochs": length, "init": "inherit", "parent": own, "first_epoch": first_epoch}
        tasks.append(run.training(each.arch, f"{folder.name}{MORE}", **options))
    results = run.train_all(tasks, remember=True)
    if not all(result.ok for result in results):
        return {}  # all keep their first scores, equally long
    found = {}
    for each, task, result in zip(through, tasks, results, strict=True):
        longer = replace(each, seconds=each.seconds + result.seconds)
        found[each.key] = _trial(run, step, longer, task, result, epochs + length)
        run.folder.drop_weights(run.trial_folder(trials[each.key]).name)
    return found


def _drop_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a rung that nothing continues."""
    with contextlib.suppress(OSError):
        (folder / CHECKPOINT).unlink()


def with_order(run: Run, incumbent: Incumbent) -> Incumbent:
    """Return the incumbent with its units and blocks ranked by importance, for its children."""
    config = run.config
    if config.proxy_init == "scratch" or config.importance == "prefix" or incumbent.order:
        return incumbent
    # The same arch may be kept in two steps, with other weights.
    path = run.folder.work / f"{config.importance}-{incumbent.step}-{incumbent.key}.json"
    if not path.exists():
        job = ImportanceJob(
            **run.job_fields(incumbent.arch),
            weights=incumbent.weights,
            criterion=config.importance,
            images=min(IMPORTANCE_IMAGES, len(run.dataset.train.labels)),
            random_seed=config.random_seed,
            out=path,
        )
        result = failed_before(path) or run.do(Job(rank_by_importance, job, f"order-{incumbent.key}"))
        if not result.ok:
            keep_failure(path, result)
            run.console.line(f"note: no order of importance, the first units: {result.reason}")
            return incumbent
    return replace(incumbent, order=path)
