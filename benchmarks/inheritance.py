"""What inherited weights are worth: `python -m benchmarks.inheritance`.

Fixed archs of one step's band start from the seed's sliced weights, by each criterion of importance
by which units are inherited, with and without recalibrated batch norms, and from scratch. Compared
are the holdout losses before training and after one epoch, over archs and images. The parent's own
training is not counted: a run has it anyway.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import EstimateRow, Floats, check_at_least, crossed, draw_intervals, run_command, write_table
from benchmarks.proxy import candidates, chosen, held
from benchmarks.trainings import CRITERION, PROXY_SEED, Training, TrainingPool, add_flags, open_pool
from nas.core.cli import Parser
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from space.family import Arch

CRITERIA = ("prefix", "l1", "l2", "taylor")
LEAST, MOST = 4, 24
"""How many archs a benchmark looks at, whatever the budget."""


def affordable(pool: TrainingPool, given: argparse.Namespace) -> int:
    """Return how many archs the budget pays for."""
    holdout = len(pool.run.dataset.holdout.labels) / 3  # forward only
    trainings = len(CRITERIA) + 1
    each = given.seeds * trainings * (given.images + holdout) + 2 * len(CRITERIA) * holdout
    return max(LEAST, min(MOST, pool.affordable(each, given.budget_hours)))


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


def ablation(
    pool: TrainingPool, archs: Sequence[Arch], given: argparse.Namespace, command: str
) -> tuple[list[EstimateRow], dict[str, float]]:
    """Compare the criteria at 0 epochs, with and without recalibrated norms, and after one.

    Returns rows of mean differences in soft loss (nats), and the mean losses by name.
    """
    wanted: dict[str, list[Training]] = {}
    for criterion in CRITERIA:
        parent = pool.parent(criterion)
        for raw in (False, True):
            wanted[f"{criterion}, 0 epochs{', norms as inherited' if raw else ''}"] = [
                Training(arch, "inherit", 0, PROXY_SEED, parent, images=given.images, recalibrate=not raw)
                for arch in archs
            ]
        wanted[f"{criterion}, 1 epoch"] = [
            Training(arch, "inherit", 1, PROXY_SEED + s, parent, images=given.images)
            for arch in archs
            for s in range(given.seeds)
        ]
    wanted["scratch, 1 epoch"] = [
        Training(arch, "scratch", 1, PROXY_SEED + s, images=given.images) for arch in archs for s in range(given.seeds)
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
    pairs = {f"{c} - prefix, {when}": (f"{c}, {when}", f"prefix, {when}") for when in whens for c in CRITERIA[1:]}
    for c in CRITERIA:
        pairs[f"norms anew - as inherited, {c}"] = f"{c}, {whens[0]}", f"{c}, {whens[1]}"
    pairs[f"scratch - {CRITERION}, 1 epoch"] = "scratch, 1 epoch", f"{CRITERION}, 1 epoch"
    rows = []
    for name, (a, b) in pairs.items():
        archs, images = losses[a].shape
        note = f"nats, {images} images, below 0 is better"
        found = crossed(losses[a] - losses[b])
        rows.append(EstimateRow(name, *found, archs, "archs", note, command))
    return rows


def compare(given: argparse.Namespace, console: Console) -> tuple[list[EstimateRow], dict[str, Any]]:
    """Train what is missing; return the table's rows and the summary."""
    with open_pool(given, console) as pool:
        archs = listed(pool, given)
        console.line(f"{len(archs)} archs, {given.seeds} random seeds, {given.images} images")
        rows, means = ablation(pool, archs, given, given.command)
        told = {
            "archs": len(archs),
            "seeds": given.seeds,
            "images": given.images,
            "holdout": len(pool.run.dataset.holdout.labels),
            "means": means,
            "labels": [pool.run.family.label(arch) for arch in archs],
        }
        return rows, told


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser("python -m benchmarks.inheritance", description=__doc__)
    add_flags(parser)
    add = parser.add_argument
    add("--archs", type=int, help="how many archs (default: what the budget pays, at least 4)")
    add("--out", type=Path, default=Path("results/inheritance.csv"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, report; the last line is JSON. Exit status 0, 2 on bad input."""

    def work(given: argparse.Namespace) -> dict[str, Any]:
        check_at_least(given, archs=2)  # intervals are over archs
        rows, told = compare(given, Console())
        write_table(given.out, rows)
        write_json(given.out.with_suffix(".json"), told)
        shown = [(r.name, (r.estimate, r.lo, r.hi)) for r in rows]
        draw_intervals(given.out.with_suffix(".png"), shown, "difference in holdout loss, nats")
        print("\n".join(map(str, rows)))
        return {k: v for k, v in told.items() if not isinstance(v, (list, dict))}

    return run_command(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
