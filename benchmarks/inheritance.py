"""What inherited weights are worth: `python -m benchmarks.inheritance`.

Fixed archs of one step's band start from the seed's sliced weights, by each criterion of importance by which units are
inherited, with and without recalibrated batch norms, and from scratch. Compared are the holdout losses before training
and after one epoch, over archs and images. The parent's own training is not counted: a run has it anyway.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import EstimateRow, Floats, check_at_least, crossed, draw_intervals, run_command, write_table
from benchmarks.proxy import named_archs
from benchmarks.trainings import CRITERION, PROXY_SEED, Training, TrainingPool, add_short_flags, open_pool
from nas.core.cli import Parser
from nas.core.io import write_json
from nas.core.progress import Console
from space.family import Arch

CRITERIA = ("prefix", "l1", "l2", "taylor")
RAW, RENEWED, TRAINED = "0 epochs, norms as inherited", "0 epochs", "1 epoch"
LEAST, MOST = 4, 24
"""How many archs a benchmark looks at, whatever the budget."""


def affordable(pool: TrainingPool, given: argparse.Namespace) -> int:
    """Return how many archs the budget pays for."""
    holdout = len(pool.run.dataset.holdout.labels) / 3  # forward only
    each = given.seeds * (len(CRITERIA) + 1) * (given.images + holdout) + 2 * len(CRITERIA) * holdout
    return max(LEAST, min(MOST, pool.affordable(each, given.budget_hours)))


def mean_losses(pool: TrainingPool, archs: Sequence[Arch], given: argparse.Namespace) -> dict[str, Floats]:
    """Train what is missing; return losses [archs, images] over random seeds by "CRITERION, WHEN"."""
    wanted: dict[str, list[Training]] = {}
    for criterion in CRITERIA:
        parent = pool.parent(criterion)
        for when in (RENEWED, RAW):
            wanted[f"{criterion}, {when}"] = [
                Training(arch, "inherit", 0, PROXY_SEED, parent, images=given.images, recalibrate=when == RENEWED)
                for arch in archs
            ]
        wanted[f"{criterion}, {TRAINED}"] = [
            Training(arch, "inherit", 1, PROXY_SEED + s, parent, images=given.images)
            for arch in archs
            for s in range(given.seeds)
        ]
    wanted[f"scratch, {TRAINED}"] = [
        Training(arch, "scratch", 1, PROXY_SEED + s, images=given.images) for arch in archs for s in range(given.seeds)
    ]
    done = iter(pool.train_or_fail([t for these in wanted.values() for t in these]))
    losses: dict[str, Floats] = {}
    for name, these in wanted.items():
        table = np.array([next(done).losses() for _ in these])  # [archs x seeds, images]
        losses[name] = table.reshape(len(archs), -1, table.shape[1]).mean(axis=1)
    return losses


def ablation_rows(losses: Mapping[str, Floats], command: str) -> list[EstimateRow]:
    """Return the differences that matter, in nats, of losses [archs, images] by "CRITERION, WHEN"."""
    whens = (RENEWED, RAW, TRAINED)
    pairs = {f"{c} - prefix, {when}": (f"{c}, {when}", f"prefix, {when}") for when in whens for c in CRITERIA[1:]}
    pairs |= {f"norms anew - as inherited, {c}": (f"{c}, {RENEWED}", f"{c}, {RAW}") for c in CRITERIA}
    pairs[f"scratch - {CRITERION}, {TRAINED}"] = f"scratch, {TRAINED}", f"{CRITERION}, {TRAINED}"
    rows = []
    for name, (a, b) in pairs.items():
        archs, images = losses[a].shape
        note = f"nats, {images} images, below 0 is better"
        rows.append(EstimateRow(name, *crossed(losses[a] - losses[b]), archs, "archs", note, command))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, report; the last line is JSON. Exit status 0, 2 on bad input."""
    parser = Parser("python -m benchmarks.inheritance", description=__doc__)
    add_short_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("results/inheritance.csv"))

    def work(given: argparse.Namespace) -> dict[str, Any]:
        check_at_least(given, archs=2)  # intervals are over archs
        console = Console()
        with open_pool(given, console) as pool:
            archs = named_archs(pool, given, lambda: affordable(pool, given))
            console.line(f"{len(archs)} archs, {given.seeds} random seeds, {given.images} images")
            losses = mean_losses(pool, archs, given)
            sizes = {"archs": len(archs), "seeds": given.seeds, "images": given.images}
            sizes["holdout"] = len(pool.run.dataset.holdout.labels)
            labels = [pool.run.family.label(arch) for arch in archs]
        rows = ablation_rows(losses, given.command)
        means = {name: float(table.mean()) for name, table in losses.items()}
        write_table(given.out, rows)
        write_json(given.out.with_suffix(".json"), {**sizes, "means": means, "labels": labels})
        shown = [(r.name, (r.estimate, r.lo, r.hi)) for r in rows]
        draw_intervals(given.out.with_suffix(".png"), shown, "difference in holdout loss, nats")
        print("\n".join(map(str, rows)))
        return sizes

    return run_command(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
