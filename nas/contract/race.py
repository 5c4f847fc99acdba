"""The proxy trainings of a step, raced: in rungs on the same batches; who cannot win stops.

A rung is a job of its own that goes on from the one before. Decisions fall when all candidates
have reached a rung, in the order of keys, so they depend on results alone.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from nas.contract.state import MORE, RUNG, Incumbent, Run, Task
from nas.core.per_image import losses_of
from nas.jobs.job import Result
from nas.jobs.outcomes import CHECKPOINT
from nas.search.racing import share_saved, survivors
from space.family import Arch

ALPHA = 0.05
"""The chance, over a whole race, that the best of it is stopped for the noise of its images."""

DRIFT_NATS = 0.05
"""How far (standard deviation) two candidates' losses still move apart until the last rung."""


@dataclass(frozen=True)
class Entrant:
    """A candidate of a race: what is trained, from what, and the name of its job."""

    key: str
    name: str
    arch: Arch
    parent: Incumbent


@dataclass(frozen=True)
class Ran:
    """What became of an entrant.

    `result` is that of the last job, `epochs` what it trained in all, `stopped` why it did not
    reach the end (None: it did, or failed). `folder` holds its per-image losses.
    """

    entrant: Entrant
    result: Result
    epochs: int
    seconds: float
    folder: Path
    stopped: str | None = None


def rungs_of(epochs: int) -> list[int]:
    """Return the epochs after which a race looks: the whole length, halved down to one."""
    found = [epochs]
    while found[0] > 1:
        found.insert(0, -(-found[0] // 2))
    return found


def race(
    run: Run,
    entrants: Sequence[Entrant],
    *,
    keep: int,
    epochs: int,
    first_epoch: int,
    stored_epochs: int,
) -> list[Ran]:
    """Train all entrants and return what became of them, in their order.

    Each trains `epochs` epochs unless a paired test on the holdout says before that it cannot be
    among the best `keep` (`nas.search.racing`). The epochs that are saved go to those that
    remain, as a further schedule from their weights, equally long for all; not so where a later
    step is compared with this one, as its candidates would not be trained equally long.
    `stored_epochs` is how many epochs of labels there are.
    """
    rungs = rungs_of(epochs) if run.config.racing and len(entrants) > keep else [epochs]
    lane = _Lane(run, epochs, first_epoch)
    ended: dict[str, Ran] = {}
    racing = list(entrants)
    seconds = dict.fromkeys((e.key for e in entrants), 0.0)
    earlier: int | None = None
    for rung, coming in zip(rungs, [*rungs[1:], None], strict=True):
        last = coming is None
        results = run.train_all(
            [lane.task(e, rung, earlier) for e in racing],
            remember=True,
            ahead=partial(lane.leading, racing, rung, coming, keep),
        )
        ran = []
        for entrant, result in zip(racing, results, strict=True):
            if earlier is not None:
                _forget(lane.folder(entrant, earlier))
            seconds[entrant.key] += result.seconds
            ran.append(Ran(entrant, result, rung, seconds[entrant.key], lane.folder(entrant, rung)))
        for each in ran:
            if last or not each.result.ok:
                ended[each.entrant.key] = each
        alive = {each.entrant.key: each for each in ran if each.result.ok}
        if last or not alive:
            break
        losses = {key: losses_of(alive[key].folder, run.config.metric) for key in sorted(alive)}
        decision = survivors(losses, keep, alpha=ALPHA, looks=len(rungs) - 1, drift_sd=DRIFT_NATS)
        for key, reason in decision.stop.items():
            said = f"stopped after {rung} of {epochs} epochs: {reason}"
            ended[key] = replace(alive[key], stopped=said)
            _forget(alive[key].folder)
            assert coming is not None
            run.discard([lane.folder(alive[key].entrant, coming)])
        racing = [e for e in racing if e.key in decision.stay]
        earlier = rung
    ran = [ended[e.key] for e in entrants]
    if not run.strategy.stepwise:
        return ran
    return _prolonged(run, ran, epochs, first_epoch, stored_epochs)


@dataclass(frozen=True)
class _Lane:
    """How every entrant of a race is trained: by rungs of a schedule of `epochs`."""

    run: Run
    epochs: int
    first_epoch: int
    described: dict[str, Task] = field(default_factory=dict)

    def folder(self, entrant: Entrant, rung: int) -> Path:
        """Return the folder of an entrant's job: of a rung, or of the whole length."""
        cut = "" if rung == self.epochs else f"{RUNG}{rung}"
        return self.run.folder.job_folder(f"{entrant.name}{cut}")

    def task(self, entrant: Entrant, rung: int, before: int | None) -> Task:
        """Describe an entrant's training up to a rung, from an earlier one."""
        folder = self.folder(entrant, rung)
        if folder.name not in self.described:  # it is asked for again while others are awaited
            self.described[folder.name] = self.run.training(
                entrant.arch,
                folder.name,
                out=folder,
                epochs=self.epochs,
                init=self.run.config.proxy_init,
                parent=entrant.parent,
                first_epoch=self.first_epoch,
                rung=None if rung == self.epochs else rung,
                before=None if before is None else (before, self.folder(entrant, before)),
            )
        return self.described[folder.name]

    def leading(
        self,
        entrants: Sequence[Entrant],
        rung: int,
        coming: int | None,
        keep: int,
        found: Mapping[str, Result],
        room: int,
    ) -> list[Task]:
        """Describe the coming rung's jobs of the half that leads so far: they may well go on.

        No more than have `room` at a time. On a thousand workers, where hung and slow ones hold a
        rung up, half of a race's time is saved by it (`docs/scale.md`).
        """
        if coming is None:
            return []
        by_job = {self.folder(entrant, rung).name: entrant for entrant in entrants}
        done = [name for name, result in found.items() if result.ok]
        lead = heapq.nsmallest(
            min(room, max(keep, len(entrants) // 2)),
            done,
            key=lambda name: (found[name].values["soft_loss"], name),
        )
        return [self.task(by_job[name], coming, rung) for name in lead]


def _prolonged(
    run: Run, ran: Sequence[Ran], epochs: int, first_epoch: int, stored_epochs: int
) -> list[Ran]:
    """Give the epochs that stopped entrants saved to those that reached the end."""
    stopped = [each for each in ran if each.stopped is not None]
    through = [each for each in ran if each.stopped is None and each.result.ok]
    shares = share_saved(sum(epochs - s.epochs for s in stopped), [t.entrant.key for t in through])
    more = min(shares.values(), default=0)  # as long for all: their scores are compared
    if more < 1 or len(through) < 2:
        return list(ran)
    # Where stored epochs run out, they are taken from the start again.
    start = first_epoch + epochs if first_epoch + epochs + more <= stored_epochs else 0
    length = min(more, stored_epochs)
    tasks = []
    for each in through:
        own = replace(
            each.entrant.parent,
            arch=each.entrant.arch,
            key=each.entrant.key,
            weights=each.folder / "weights.safetensors",
            order=None,
        )
        folder = run.folder.job_folder(f"{each.entrant.name}{MORE}")
        tasks.append(
            run.training(
                each.entrant.arch,
                folder.name,
                out=folder,
                epochs=length,
                init="inherit",
                parent=own,
                first_epoch=start,
            )
        )
    results = run.train_all(tasks, remember=True)
    if not all(result.ok for result in results):
        return list(ran)  # all are compared by what they had, equally long
    longer = {
        each.entrant.key: replace(
            each,
            result=result,
            epochs=epochs + length,
            seconds=each.seconds + result.seconds,
            folder=task.out,
        )
        for each, task, result in zip(through, tasks, results, strict=True)
    }
    found = [longer.get(each.entrant.key, each) for each in ran]
    for each in through:
        run.folder.drop_weights(each.folder.name)
    return found


def _forget(folder: Path) -> None:
    """Remove where a rung stood, as nothing goes on from there."""
    with contextlib.suppress(OSError):
        (folder / CHECKPOINT).unlink()
