"""What inherited weights save: `python -m benchmarks.inheritance`.

Archs of one step's band are trained one epoch from the seed's sliced weights, and from scratch for
1, 2, 4, ... epochs, each length a schedule of its own, trained to its end. The table holds how many
epochs from scratch reach the loss of the inherited one, and what the criterion of importance, by
which units are inherited, and batch norms estimated anew do to the loss. The parent's own training
is not counted: a run has it anyway. What inheriting does to the ranking: `benchmarks.proxy`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks._estimates import Floats, Row, bootstrap, crossed, in_words, share, write_rows
from benchmarks.lab import Lab, Trained, Training, arguments, opened
from benchmarks.proxy import CRITERION, PROXY_SEED, candidates, chosen, held
from nas.core.cli import Parser, guarded
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from space.errors import InputError, refuse
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


def affordable(lab: Lab, given: argparse.Namespace) -> int:
    """Return how many archs the budget pays for, if no scratch training ends early."""
    run = lab.run
    band = run.band(run.config.steps)
    arch = sample_band(run.family, run.seed_arch, run.context, band, 1, random_seed=0)[0]
    holdout = len(run.dataset.holdout.labels) / 3  # forward only
    epochs = sum(given.lengths) + len(CRITERIA)
    each = given.seeds * (epochs * given.images + (len(given.lengths) + len(CRITERIA)) * holdout)
    each += 2 * len(CRITERIA) * holdout
    return max(LEAST, min(MOST, int(given.budget_hours * 3600 * lab.pace(arch) / each)))


def listed(lab: Lab, given: argparse.Namespace) -> list[Arch]:
    """Return the archs, named before anything is trained and the same when run again.

    Those that `benchmarks.proxy` named in the same folder come first: trainings are shared.
    """
    family, folder = lab.run.family, lab.run.folder.path
    path = folder / f"listed-inheritance-{lab.run.config.target_params}.json"
    if path.exists():
        named = read_json(path, "the archs of an inheritance benchmark")
        archs = [family.arch(a) for a in named]
        if given.archs in (None, len(archs)):
            return archs
    number = given.archs or affordable(lab, given)
    found = chosen(held(lab), number)
    if len(found) < number:
        found = [arch for _, arch in candidates(lab, number)]
    write_json(path, [family.to_dict(a) for a in found])
    return found


def trained(lab: Lab, wanted: Sequence[Training]) -> list[Trained]:
    """Train; one that fails ends the benchmark in one line."""
    done = lab.train(wanted)
    failed = [t for t in done if t.failed is not None]
    if failed:
        raise InputError(f"{len(failed)} trainings failed, the first: {failed[0].failed}")
    return done


def curves(
    lab: Lab, archs: Sequence[Arch], targets: Floats, given: argparse.Namespace
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
        for (a, s), done in zip(waiting, trained(lab, wanted) if wanted else [], strict=True):
            found[a][s].append(float(done.values[length]["soft_loss"]))
    return found


def ratio_rows(crossings: Sequence[Sequence[Crossing]], longest: int, command: str) -> list[Row]:
    """Return the rows on epochs saved, from crossings by arch and random seed."""
    epochs = np.array([[c.epochs for c in of_arch] for of_arch in crossings])
    above = np.array([[c.censored == 1 for c in of_arch] for of_arch in crossings])
    below = int(sum(c.censored == -1 for of_arch in crossings for c in of_arch))
    n, size = len(epochs), epochs.size
    # A censored training is beyond every length, so a median among those is only a bound.
    open_ended = np.where(above, np.inf, epochs)
    cells = f"{int(above.sum())} of {size} trainings did not get there in {longest} epochs"
    if below:
        cells += f", {below} were there after the shortest"
    median = [min(v, float(longest)) for v in bootstrap(open_ended, _median, random_seed=0)]
    beyond = f">= {longest}; " if not math.isfinite(_median(open_ended)) else ""
    rows = [
        Row(
            "epochs from scratch per inherited epoch, median",
            median[0],
            median[1],
            median[2],
            n,
            "archs",
            beyond + cells,
            command,
        ),
        Row(
            "epochs from scratch per inherited epoch, geometric mean",
            *bootstrap(epochs, lambda v: float(np.exp(np.log(v).mean())), random_seed=0),
            n,
            "archs",
            "a lower bound: " + cells if above.any() else cells,
            command,
        ),
    ]
    for aim in (AIM, STRETCH):
        reached = open_ended >= aim
        interval = bootstrap(reached, lambda v: float(v.mean()), random_seed=0)
        name = f"share of trainings with at least {aim:g}x"
        rows.append(Row(name, *interval, n, "archs", "bootstrap over archs", command))
        hits = int((np.median(open_ended, axis=1) >= aim).sum())
        name = f"share of archs with at least {aim:g}x (median of their seeds)"
        rows.append(Row(name, *share(hits, n), n, "archs", "exact interval", command))
    return rows


def _median(values: Floats) -> float:
    # The lower of two middle ones: no mean of a number and an infinity.
    return float(np.percentile(values, 50, method="lower"))


def ablation(
    lab: Lab, archs: Sequence[Arch], given: argparse.Namespace, command: str
) -> tuple[list[Row], dict[str, float]]:
    """Compare the criteria at 0 epochs, with and without batch norms anew, and after one.

    Returns rows of mean differences in soft loss (nats), and the mean losses by name.
    """
    wanted: dict[str, list[Training]] = {}
    for criterion in CRITERIA:
        parent = lab.parent(criterion)
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
    done = iter(trained(lab, [t for these in wanted.values() for t in these]))
    losses: dict[str, Floats] = {}
    for name, these in wanted.items():
        table = np.array([next(done).losses() for _ in these])  # [archs x seeds, images]
        losses[name] = table.reshape(len(archs), -1, table.shape[1]).mean(axis=1)
    rows = ablation_rows(losses, command)
    return rows, {name: float(table.mean()) for name, table in losses.items()}


def ablation_rows(losses: Mapping[str, Floats], command: str) -> list[Row]:
    """Return the differences that matter of losses [archs, images] by "CRITERION, WHEN"."""
    pairs = []
    for when in ("0 epochs", "0 epochs, norms as inherited", "1 epoch"):
        pairs += [
            (f"{c} - prefix, {when}", f"{c}, {when}", f"prefix, {when}")
            for c in CRITERIA
            if c != "prefix"
        ]
    pairs += [
        (f"norms anew - as inherited, {c}", f"{c}, 0 epochs", f"{c}, 0 epochs, norms as inherited")
        for c in CRITERIA
    ]
    return [
        Row(
            name,
            *crossed(losses[a] - losses[b], random_seed=0),
            len(losses[a]),
            "archs",
            f"nats, {losses[a].shape[1]} images, below 0 is better",
            command,
        )
        for name, a, b in pairs
    ]


def compare(given: argparse.Namespace, console: Console) -> tuple[list[Row], dict[str, object]]:
    """Train what is missing; return the table's rows and what else is told."""
    with opened(given, console) as lab:
        run = lab.run
        stored = int(run.store["use_epochs"])
        # Longer trainings see stored epochs again, rather than have more labels made.
        run.config = replace(run.config, beyond="cycle")
        archs = listed(lab, given)
        console.line(f"{len(archs)} archs, {given.seeds} random seeds, {given.images} images")
        parent = lab.parent(CRITERION)
        inherited = trained(
            lab,
            [
                Training(arch, "inherit", 1, PROXY_SEED + s, parent, images=given.images)
                for arch in archs
                for s in range(given.seeds)
            ],
        )
        targets = np.array([t.values[1]["soft_loss"] for t in inherited])
        targets = targets.reshape(len(archs), given.seeds)
        criteria, means = ablation(lab, archs, given, given.command)
        losses = curves(lab, archs, targets, given)
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


def figure(path: Path, rows: Sequence[Row], told: Mapping[str, object]) -> None:
    """Draw the losses from scratch against the inherited one's, and the criteria's differences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    lengths, targets, scratch = told["lengths"], told["targets"], told["scratch"]
    assert isinstance(lengths, list)
    assert isinstance(targets, list)
    assert isinstance(scratch, list)
    for target, of_arch in zip(targets, scratch, strict=True):
        for goal, losses in zip(target, of_arch, strict=True):
            behind = [v - goal for v in losses]
            left.plot(lengths[: len(losses)], behind, color="tab:blue", lw=0.8, alpha=0.6)
    left.axhline(0, color="black", lw=0.8, label="inherited (l1), 1 epoch")
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [str(v) for v in lengths])
    left.set_xlabel(f"epochs of {told['images']} images from scratch, each a whole schedule")
    left.set_ylabel("holdout loss minus the inherited one's, nats")
    bound = f"{rows[0].estimate:.3g} [{rows[0].lo:.3g}, {rows[0].hi:.3g}]"
    if rows[0].note.startswith(">="):  # beyond every length that was trained
        bound = f"above {lengths[-1]}"
    left.set_title(f"{rows[0].name}: {bound}", fontsize=8)
    left.legend(fontsize=7)
    shown = [r for r in rows if r.note.startswith("nats")]
    y = list(range(len(shown)))
    right.errorbar(
        [r.estimate for r in shown],
        y,
        xerr=[
            [max(0.0, r.estimate - r.lo) for r in shown],
            [max(0.0, r.hi - r.estimate) for r in shown],
        ],
        fmt="o",
        ms=4,
        lw=1,
    )
    right.axvline(0, color="black", lw=0.5)
    right.set_xscale("symlog", linthresh=0.1)
    right.set_yticks(y, [r.name for r in shown], fontsize=7)
    right.set_xlabel("difference in holdout loss, nats, 95 % over archs and images", fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.inheritance", description=__doc__)
    arguments(parser)
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
        raise argparse.ArgumentTypeError(
            f"{text} is not a list of ascending integers such as 1,2,4"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train what is missing, report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = build_parser().parse_args(argv)
    given.command = " ".join(["python -m benchmarks.inheritance", *argv])

    def work() -> int:
        if given.archs is not None and given.archs < 2:
            raise refuse("--archs", given.archs, "an integer >= 2 (intervals are over archs)")
        rows, told = compare(given, Console())
        write_rows(given.out, rows)
        write_json(given.out.with_suffix(".json"), told)
        figure(given.out.with_suffix(".png"), rows, told)
        for row in rows:
            print(in_words(row))
        print("what inheriting does to the ranking: python -m benchmarks.proxy")
        keys = (
            "archs",
            "seeds",
            "ratio",
            "ratio_lo",
            "ratio_hi",
            "censored",
            "reached_aim",
            "reached_stretch",
            "label_epochs",
        )
        print(json.dumps({k: told[k] for k in keys}))
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
