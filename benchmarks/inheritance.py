"""What inherited weights save: `python -m benchmarks.inheritance`.

Archs of one step's band are trained one epoch from the seed's sliced weights, and from scratch for
1, 2, 4, ... epochs, each length a schedule of its own, trained to its end. The table holds how many
epochs from scratch reach the loss of the inherited one, and what the criterion of importance, by
which units are inherited, and recalibrated batch norms do to the loss, before and after training.
The parent's own training is not counted: a run has it anyway.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import (
    EstimateRow,
    Floats,
    bootstrap,
    check_at_least,
    crossed,
    draw_intervals,
    run_command,
    share,
    write_table,
)
from benchmarks.proxy import candidates, chosen, held
from benchmarks.trainings import CRITERION, PROXY_SEED, Training, TrainingPool, add_flags, open_pool
from nas.core.cli import Parser
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from space.family import Arch
from space.sampling import sample_band

CRITERIA = ("prefix", "l1", "l2", "taylor")
LEAST, MOST = 4, 24
"""How many archs a benchmark looks at, whatever the budget."""
AIM, STRETCH = 2.0, 4.0
"""How many times fewer epochs inheriting is to need."""


@dataclass(frozen=True)
class Crossing:
    """After how many epochs a loss is reached; `censored` -1: at most so many, 1: more."""

    epochs: float
    censored: int


def epochs_to_loss(lengths: Sequence[int], losses: Sequence[float], target: float) -> Crossing:
    """Return after how many epochs the losses of trainings of these lengths first reach a target.

    `losses` [n] belong to the first n of `lengths`, ascending. Between two lengths the loss is
    taken for linear in the logarithm of the length. A target that the shortest reaches is censored
    there, one that none reaches at the longest.
    """
    assert 0 < len(losses) <= len(lengths), "no training to look at"
    if losses[0] <= target:
        return Crossing(float(lengths[0]), -1)
    for at in range(1, len(losses)):
        if losses[at] <= target:
            way = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
            step = math.log(lengths[at] / lengths[at - 1])
            return Crossing(lengths[at - 1] * math.exp(way * step), 0)
    return Crossing(float(lengths[len(losses) - 1]), 1)


def affordable(pool: TrainingPool, given: argparse.Namespace) -> int:
    """Return how many archs the budget pays for, if no scratch training ends early."""
    run = pool.run
    band = run.band(run.config.steps)
    arch = sample_band(run.family, run.seed_arch, run.context, band, 1, random_seed=0)[0]
    holdout = len(run.dataset.holdout.labels) / 3  # forward only
    epochs = sum(given.lengths) + len(CRITERIA)
    each = given.seeds * (epochs * given.images + (len(given.lengths) + len(CRITERIA)) * holdout)
    each += 2 * len(CRITERIA) * holdout
    return max(LEAST, min(MOST, int(given.budget_hours * 3600 * pool.pace(arch) / each)))


def listed(pool: TrainingPool, given: argparse.Namespace) -> list[Arch]:
    """Return the archs, named before anything is trained and the same when run again.

    Those that `benchmarks.proxy` named in the same folder come first: trainings are shared.
    """
    family, folder = pool.run.family, pool.run.folder.path
    path = folder / f"listed-inheritance-{pool.run.config.target_params}.json"
    if path.exists():
        named = read_json(path, "the archs of an inheritance benchmark")
        archs = [family.arch(a) for a in named]
        if given.archs in (None, len(archs)):
            return archs
    number = given.archs or affordable(pool, given)
    found = chosen(held(pool), number)
    if len(found) < number:
        found = [arch for _, arch in candidates(pool, number)]
    write_json(path, [family.to_dict(a) for a in found])
    return found


def curves(
    pool: TrainingPool, archs: Sequence[Arch], targets: Floats, given: argparse.Namespace
) -> list[list[list[float]]]:
    """Return the losses from scratch by arch, random seed and length, as far as they were needed.

    `targets` [archs, seeds]. A longer schedule is trained only where no shorter one got there.
    """
    found: list[list[list[float]]] = [[[] for _ in range(given.seeds)] for _ in archs]
    for length in given.lengths:
        waiting = [
            (a, s)
            for a in range(len(archs))
            for s in range(given.seeds)
            if not found[a][s] or found[a][s][-1] > targets[a, s]
        ]
        wanted = [
            Training(archs[a], "scratch", length, PROXY_SEED + s, images=given.images)
            for a, s in waiting
        ]
        for (a, s), done in zip(waiting, pool.train_or_fail(wanted), strict=True):
            found[a][s].append(float(done.values[length]["soft_loss"]))
    return found


def ratio_rows(
    crossings: Sequence[Sequence[Crossing]], longest: int, command: str
) -> list[EstimateRow]:
    """Return the rows on epochs saved, from crossings by arch and random seed."""
    epochs = np.array([[c.epochs for c in of_arch] for of_arch in crossings])
    above = np.array([[c.censored == 1 for c in of_arch] for of_arch in crossings])
    below = int(sum(c.censored == -1 for of_arch in crossings for c in of_arch))
    rows: list[EstimateRow] = []

    def add(name: str, found: Sequence[float], note: str) -> None:
        estimate, lo, hi = found
        rows.append(EstimateRow(name, estimate, lo, hi, len(epochs), "archs", note, command))

    # A censored training is beyond every length, so a median among those is only a bound.
    open_ended = np.where(above, np.inf, epochs)
    cells = f"{int(above.sum())} of {epochs.size} trainings did not get there in {longest} epochs"
    cells += f", {below} were there after the shortest" if below else ""
    median = [min(v, float(longest)) for v in bootstrap(open_ended, _median, random_seed=0)]
    beyond = f">= {longest}; " if not math.isfinite(_median(open_ended)) else ""
    add("epochs from scratch per inherited epoch, median", median, beyond + cells)
    mean = bootstrap(epochs, lambda v: float(np.exp(np.log(v).mean())), random_seed=0)
    bound = "a lower bound: " if above.any() else ""
    add("epochs from scratch per inherited epoch, geometric mean", mean, bound + cells)
    for aim in (AIM, STRETCH):
        reached = bootstrap(open_ended >= aim, lambda v: float(v.mean()), random_seed=0)
        add(f"share of trainings with at least {aim:g}x", reached, "bootstrap over archs")
        hits = int((np.median(open_ended, axis=1) >= aim).sum())
        name = f"share of archs with at least {aim:g}x (median of their seeds)"
        add(name, share(hits, len(epochs)), "exact interval")
    return rows


def _median(values: Floats) -> float:
    # The lower of two middle ones: no mean of a number and an infinity.
    return float(np.percentile(values, 50, method="lower"))


def ablation(
    pool: TrainingPool, archs: Sequence[Arch], given: argparse.Namespace, command: str
) -> tuple[list[EstimateRow], dict[str, float]]:
    """Compare the criteria at 0 epochs, with and without batch norms anew, and after one.

    Returns rows of mean differences in soft loss (nats), and the mean losses by name.
    """
    wanted: dict[str, list[Training]] = {}
    for criterion in CRITERIA:
        parent = pool.parent(criterion)
        for raw in (False, True):
            wanted[f"{criterion}, 0 epochs{', norms as inherited' if raw else ''}"] = [
                Training(
                    arch, "inherit", 0, PROXY_SEED, parent, images=given.images, recalibrate=not raw
                )
                for arch in archs
            ]
        wanted[f"{criterion}, 1 epoch"] = [
            Training(arch, "inherit", 1, PROXY_SEED + s, parent, images=given.images)
            for arch in archs
            for s in range(given.seeds)
        ]
    done = iter(pool.train_or_fail([t for these in wanted.values() for t in these]))
    losses: dict[str, Floats] = {}
    for name, these in wanted.items():
        table = np.array([next(done).losses() for _ in these])  # [archs x seeds, images]
        losses[name] = table.reshape(len(archs), -1, table.shape[1]).mean(axis=1)
    rows = ablation_rows(losses, command)
    return rows, {name: float(table.mean()) for name, table in losses.items()}


def ablation_rows(losses: Mapping[str, Floats], command: str) -> list[EstimateRow]:
    """Return the differences that matter of losses [archs, images] by "CRITERION, WHEN"."""
    whens = ("0 epochs", "0 epochs, norms as inherited", "1 epoch")
    pairs = {
        f"{c} - prefix, {when}": (f"{c}, {when}", f"prefix, {when}")
        for when in whens
        for c in CRITERIA[1:]
    }
    for c in CRITERIA:
        pairs[f"norms anew - as inherited, {c}"] = f"{c}, {whens[0]}", f"{c}, {whens[1]}"
    rows = []
    for name, (a, b) in pairs.items():
        archs, images = losses[a].shape
        note = f"nats, {images} images, below 0 is better"
        found = crossed(losses[a] - losses[b])
        rows.append(EstimateRow(name, *found, archs, "archs", note, command))
    return rows


def compare(
    given: argparse.Namespace, console: Console
) -> tuple[list[EstimateRow], dict[str, Any]]:
    """Train what is missing; return the table's rows and the summary."""
    with open_pool(given, console) as pool:
        run = pool.run
        stored = int(run.store["use_epochs"])
        # Longer trainings see stored epochs again, rather than have more labels made.
        run.config = replace(run.config, beyond="cycle")
        archs = listed(pool, given)
        console.line(f"{len(archs)} archs, {given.seeds} random seeds, {given.images} images")
        parent = pool.parent(CRITERION)
        inherited = pool.train_or_fail(
            [
                Training(arch, "inherit", 1, PROXY_SEED + s, parent, images=given.images)
                for arch in archs
                for s in range(given.seeds)
            ]
        )
        targets = np.array([t.values[1]["soft_loss"] for t in inherited])
        targets = targets.reshape(len(archs), given.seeds)
        criteria, means = ablation(pool, archs, given, given.command)
        losses = curves(pool, archs, targets, given)
        crossings = [
            [epochs_to_loss(given.lengths, of, targets[a, s]) for s, of in enumerate(losses[a])]
            for a in range(len(archs))
        ]
        ratios = ratio_rows(crossings, given.lengths[-1], given.command)
        told = {
            "archs": len(archs),
            "seeds": given.seeds,
            "images": given.images,
            "holdout": len(run.dataset.holdout.labels),
            "label_epochs": stored,
            "ratio": ratios[0].estimate,
            "ratio_lo": ratios[0].lo,
            "ratio_hi": ratios[0].hi,
            "censored": sum(c.censored == 1 for of in crossings for c in of),
            "reached_aim": ratios[0].lo >= AIM,
            "reached_stretch": ratios[0].lo >= STRETCH,
            "lengths": list(given.lengths),
            "targets": targets.tolist(),
            "scratch": losses,
            "epochs": [[c.epochs for c in of] for of in crossings],
            "means": means,
            "labels": [run.family.label(arch) for arch in archs],
        }
        return [*ratios, *criteria], told


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser("python -m benchmarks.inheritance", description=__doc__)
    add_flags(parser)
    add = parser.add_argument
    add("--archs", type=int, help="how many archs (default: what the budget pays, at least 4)")
    lengths = "epochs of the trainings from scratch (default 1,2,4,8,16)"
    add("--lengths", type=_lengths, default=(1, 2, 4, 8, 16), help=lengths)
    add("--out", type=Path, default=Path("results/inheritance.csv"))
    return parser


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or list(found) != sorted(set(found)):
        message = f"{text} is not a list of ascending integers such as 1,2,4"
        raise argparse.ArgumentTypeError(message)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, report; the last line is JSON. Exit status 0, 2 on bad input."""

    def work(given: argparse.Namespace) -> dict[str, Any]:
        check_at_least(given, archs=2)  # intervals are over archs
        rows, told = compare(given, Console())
        write_table(given.out, rows)
        write_json(given.out.with_suffix(".json"), told)
        shown = [(r.name, (r.estimate, r.lo, r.hi)) for r in rows if r.note.startswith("nats")]
        draw_intervals(given.out.with_suffix(".png"), shown, "difference in holdout loss, nats")
        print("\n".join(map(str, rows)))
        return {k: v for k, v in told.items() if not isinstance(v, (list, dict))}

    return run_command(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
