"""The proxy trainings of a step, raced: in rungs on the same batches; who cannot win stops.

A rung is a job of its own that goes on from the one before. Decisions fall when all candidates
have reached a rung, in the order of keys, so they depend on results alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.files import read_json, write_json
from nas.jobs import Result
from nas.judging import losses_of
from nas.run import CHECKPOINT, MORE, RUNG, Incumbent, Run
from nas.search.racing import share_saved, survivors
from space.errors import refuse
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
    ended: dict[str, Ran] = {}
    racing = list(entrants)
    seconds = dict.fromkeys((e.key for e in entrants), 0.0)
    earlier: int | None = None
    for rung in rungs:
        last = rung == rungs[-1]
        ran = []
        for entrant in racing:
            folder = _folder(run, entrant, None if last else rung)
            before = None if earlier is None else _folder(run, entrant, earlier)
            result = trained(
                run, entrant.arch, folder.name, out=folder, epochs=epochs,
                init=run.config.proxy_init, parent=entrant.parent, first_epoch=first_epoch,
                rung=None if last else rung,
                before=None if before is None or earlier is None else (earlier, before),
            )  # fmt: skip
            if before is not None:
                _forget(before)
            seconds[entrant.key] += result.seconds
            ran.append(Ran(entrant, result, rung, seconds[entrant.key], folder))
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
        racing = [e for e in racing if e.key in decision.stay]
        earlier = rung
    ran = [ended[e.key] for e in entrants]
    if not run.strategy.stepwise:
        return ran
    return _prolonged(run, ran, epochs, first_epoch, stored_epochs)


def trained(run: Run, arch: Arch, name: str, *, out: Path, **more: Any) -> Result:
    """Train, or take over that it failed: an outcome, which a resumed run finds as it was."""
    return remembered(out, lambda: run.train(arch, name, out=out, **more))


def remembered(out: Path, work: Callable[[], Result]) -> Result:
    """Do a job that leaves `out`; that it failed is kept beside it, for a resumed run to find."""
    kept = out.with_name(f"{out.name}.failed.json")
    if kept.exists():
        told = read_json(kept, "why a job failed")
        if not isinstance(told, dict) or not {"reason", "seconds"} <= told.keys():
            raise refuse(str(kept), "another format", "why a job failed", "remove it")
        return Result(out.name, False, {}, told["reason"], told["seconds"])
    result = work()
    if not result.ok:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"reason": result.reason, "seconds": result.seconds})
    return result


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
    found = []
    for each in ran:
        if each not in through:
            found.append(each)
            continue
        own = replace(each.entrant.parent, arch=each.entrant.arch, key=each.entrant.key,
                      weights=each.folder / "weights.safetensors", order=None)  # fmt: skip
        folder = run.folder.job_folder(f"{each.entrant.name}{MORE}")
        result = trained(
            run, each.entrant.arch, folder.name, out=folder, epochs=min(more, stored_epochs),
            init="inherit", parent=own, first_epoch=start,
        )  # fmt: skip
        if not result.ok:  # all are compared by what they had, equally long
            return list(ran)
        found.append(
            replace(
                each, result=result, epochs=epochs + min(more, stored_epochs),
                seconds=each.seconds + result.seconds, folder=folder,
            )
        )  # fmt: skip
    for each in through:
        run.folder.drop_weights(each.folder.name)
    return found


def _folder(run: Run, entrant: Entrant, rung: int | None) -> Path:
    """Return the folder of an entrant's job: of a rung, or of the whole length."""
    return run.folder.job_folder(entrant.name if rung is None else f"{entrant.name}{RUNG}{rung}")


def _forget(folder: Path) -> None:
    """Remove where a rung stood, as nothing goes on from there."""
    with contextlib.suppress(OSError):
        (folder / CHECKPOINT).unlink()
