"""How soon a search finds the best: `python -m benchmarks.strategies`.

Every arch of a small closed lattice (a few free slots, all step bands from the seed to the target)
is scored once from the seed's sliced weights; then each strategy searches that table, from many
random seeds, asked as a run asks it, anchors off. Counted is every evaluation, those of
contraction's early steps too, until an arch of the last band is within one standard deviation (over
random seeds of the training) of the best there. Throughput plays no part: feasible is what the
counts say. In the table, children inherit from the seed; in a run, from the step before.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks._estimates import Floats, Row, bootstrap, in_words, share, write_rows
from benchmarks._lattice import (
    Lattice,
    Scored,
    Settings,
    best_so_far,
    lattice_of,
    reached_after,
    slots_of,
)
from benchmarks._searches import FIXED, World, searches
from benchmarks.baselines.live import live
from benchmarks.lab import Lab, Trained, Training, arguments, opened
from benchmarks.proxy import CRITERION, PROXY_SEED
from nas.core.cli import Parser, guarded
from nas.core.config import EFFORTS, ROUNDS, choices_of, effort_defaults, steps_of
from nas.core.io import read_json, write_atomic, write_json
from nas.core.progress import Console
from nas.core.table import Writer
from nas.search.constraints import band_at
from nas.search.selection import paired_error
from nas.search.strategies import get_strategy, strategy_names
from space.errors import InputError, refuse

FREE = "depths[2],embed_dims[2],embed_dims[3],mlp_ratio,mbconv_expand_ratio"


def planned_epochs(lab: Lab, lattice: Lattice, given: argparse.Namespace) -> int:
    """Return how many epochs the table's archs train: one if the budget pays for it, else none.

    Scoring alone costs about a third of a holdout's images trained. Kept in the lab's folder, so
    that a run that goes on decides the same.
    """
    path = lab.run.folder.path / "search_efficiency.json"
    if given.table_epochs is not None:
        return int(given.table_epochs)
    asked = {
        "archs": len(lattice.archs),
        "target": lab.run.config.target_params,
        "images": given.images,
        "budget_hours": given.budget_hours,
        "sd": [given.sd_archs, given.sd_seeds],
    }
    if path.exists():
        held = read_json(path, "the plan of a search_efficiency")
        if held.get("asked") == asked:
            return int(held["table_epochs"])
    holdout = len(lab.run.dataset.holdout.labels) / 3
    trainings = len(lattice.archs) + given.sd_archs * (given.sd_seeds - 1)
    middle = lattice.archs[min(lattice.final)]
    hours = trainings * (given.images + holdout) / lab.pace(middle) / 3600
    scored = trainings * holdout / (given.images + holdout) * hours
    epochs = 1 if hours <= given.budget_hours else 0
    lab.run.console.line(
        f"{trainings} trainings: about {hours:.1f} h with one epoch of {given.images} images, "
        f"{scored:.1f} h with none; the budget is {given.budget_hours:g} h: {epochs}"
    )
    write_json(path, {"asked": asked, "table_epochs": epochs})
    return epochs


def trained(lab: Lab, wanted: Sequence[Training]) -> list[Trained]:
    """Train; one that fails ends the benchmark in one line."""
    done = lab.train(wanted)
    failed = [t for t in done if t.failed is not None]
    if failed:
        raise InputError(f"{len(failed)} trainings failed, the first: {failed[0].failed}")
    return done


def tabled(
    lab: Lab, lattice: Lattice, epochs: int, given: argparse.Namespace
) -> dict[str, Trained]:
    """Score every arch of the lattice once; by key."""
    parent = lab.parent(CRITERION)
    wanted = [
        Training(arch, "inherit", epochs, PROXY_SEED, parent, images=given.images)
        for arch in lattice.archs.values()
    ]
    return dict(zip(lattice.archs, trained(lab, wanted), strict=True))


def seed_losses(lab: Lab, lattice: Lattice, epochs: int, given: argparse.Namespace) -> Floats:
    """Return losses [random seeds, archs] of some archs of the last band, drawn at random."""
    parent = lab.parent(CRITERION)
    keys = sorted(lattice.final)
    number = min(given.sd_archs, len(keys))
    rng = np.random.default_rng(lab.run.config.random_seed)
    drawn = sorted(rng.choice(keys, number, replace=False).tolist())
    wanted = [
        Training(lattice.archs[k], "inherit", epochs, PROXY_SEED + s, parent, images=given.images)
        for s in range(given.sd_seeds)
        for k in drawn
    ]
    losses = [t.values[epochs]["soft_loss"] for t in trained(lab, wanted)]
    return np.array(losses, dtype=np.float64).reshape(given.sd_seeds, number)


def seed_sd(losses: Floats) -> tuple[float, float, float]:
    """Return the standard deviation over random seeds of losses [seeds, archs], 95 % interval.

    What a random seed does to all archs alike changes no order and is left out; normal noise.
    """
    s, n = losses.shape
    rest = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
    dof = (s - 1) * (n - 1)
    total = float((rest**2).sum())
    lo, hi = (math.sqrt(total / float(stats.chi2.ppf(q, dof))) for q in (0.975, 0.025))
    return math.sqrt(total / dof), lo, hi


def rows_of(
    found: Mapping[str, Sequence[Sequence[Scored]]],
    lattice: Lattice,
    goal: float,
    best: float,
    settings: Settings,
    effort: str,
    command: str,
) -> list[Row]:
    """Return the strategies' rows: evaluations needed, how often they were enough, differences."""
    budget, rows = float(settings.budget), []
    needed = {
        name: np.array([reached_after(one, lattice, goal) for one in all_of])
        for name, all_of in found.items()
    }
    for name, after in needed.items():
        n = len(after)
        median = bootstrap(after, _median, random_seed=0)
        note = "censored at the budget" if median[0] > budget else ""
        if name in FIXED:
            note = f"{note}; the same for every random seed".lstrip("; ")
        capped = [min(v, budget) for v in median]
        rows.append(
            Row(
                f"{name}: evaluations to within one sd, median",
                capped[0],
                capped[1],
                capped[2],
                n,
                "searches",
                note,
                command,
            )
        )
        hits = int(np.isfinite(after).sum())
        rows.append(
            Row(
                f"{name}: reached within {settings.budget} evaluations",
                *share(hits, n),
                n,
                "searches",
                "exact interval",
                command,
            )
        )
        rows.append(_at_the_end(name, found[name], lattice, best, settings, effort, command))
    own = needed.get("contraction")
    for name, after in needed.items():
        if own is None or name == "contraction":
            continue
        both = np.minimum(np.stack([np.resize(after, len(own)), own], axis=1), budget)
        gap = bootstrap(both, lambda v: float((v[:, 0] - v[:, 1]).mean()), random_seed=0)
        note = "mean evaluations, those that did not reach it at the budget; above 0: contraction"
        rows.append(
            Row(f"{name} - contraction", *gap, len(own), "searches", f"{note} needs fewer", command)
        )
    return rows


def _at_the_end(
    name: str,
    searched: Sequence[Sequence[Scored]],
    lattice: Lattice,
    best: float,
    settings: Settings,
    effort: str,
    command: str,
) -> Row:
    """Tell how far behind the best a search is when a run of the effort would end."""
    rounds = settings.steps if get_strategy(name).stepwise else ROUNDS[effort]
    own = min(settings.budget, rounds * (settings.proxied or settings.shortlist))
    behind = np.array([best_so_far(one, lattice, own)[-1] for one in searched]) - best
    there = behind[np.isfinite(behind)]
    note = f"{len(behind) - len(there)} searches have no arch of the last band by then"
    mean, lo, hi = math.nan, math.nan, math.nan
    if len(there):
        mean, lo, hi = bootstrap(there, lambda v: float(v.mean()), random_seed=0)
    return Row(
        f"{name}: behind the best after the {own} trainings of a run, mean nats",
        mean,
        lo,
        hi,
        len(there),
        "searches",
        note,
        command,
    )


def _median(values: Floats) -> float:
    # The upper of two middle ones: no mean of a number and an infinity.
    return float(np.percentile(values, 50, method="higher"))


def compare(given: argparse.Namespace, console: Console) -> tuple[list[Row], dict[str, Any]]:
    """Score what is missing, replay the searches; return the rows and what else is told."""
    free = tuple(given.free.split(","))
    with opened(given, console) as lab:
        run = lab.run
        if given.steps is None:
            given.steps = steps_of(given.effort, run.start_params, run.config.target_params)
        settings = Settings(
            given.steps, given.shortlist, given.proxied, given.beam, given.evaluations, given.choose
        )
        stepped = replace(run.config, steps=given.steps)
        bands = tuple(
            band_at(run.start_params, stepped, step) for step in range(1, given.steps + 1)
        )
        lattice = lattice_of(run.family, run.seed_arch, run.context, bands, free)
        if len(lattice.final) < 2 or len(lattice.archs) > given.most:
            got = f"{len(lattice.archs)} archs, {len(lattice.final)} of them in the last band"
            want = f"at most {given.most} archs, 2 or more in the last band"
            raise refuse("--free", got, want, "free other slots")
        console.line(f"{len(lattice.archs)} archs, {len(lattice.final)} of them in the last band")
        epochs = planned_epochs(lab, lattice, given)
        table = tabled(lab, lattice, epochs, given)
        losses = {key: float(t.values[epochs]["soft_loss"]) for key, t in table.items()}
        best = min(lattice.final, key=lambda k: (losses[k], k))
        if epochs:
            sd = seed_sd(seed_losses(lab, lattice, epochs, given))
            what = "random seeds"
        else:  # without training, random seeds change next to nothing; the images still do
            error = paired_error(lambda key: table[key].losses())
            errors = [error(key, best) for key in sorted(lattice.final) if key != best]
            middle = float(np.median(errors)) if errors else 0.0
            sd, what = (middle, min(errors, default=0.0), max(errors, default=0.0)), "images"
        write_table(given.out.with_name(f"{given.out.stem}_table.csv"), lattice, table, epochs)
        world = World(
            run.family.name,
            json.dumps(run.family.to_dict(run.seed_arch)),
            run.context,
            bands,
            free,
            tuple(losses.items()),
        )
    console.line(f"replaying {given.replays} searches by each of {', '.join(given.strategies)}")
    found = searches(world, given.strategies, settings, given.replays, max(1, given.workers))
    goal = losses[best] + sd[0]
    in_reach = sum(losses[key] <= goal for key in lattice.final)
    rows = [
        Row(
            f"one standard deviation over {what}, nats",
            *sd,
            len(lattice.final),
            "archs",
            f"{in_reach} of {len(lattice.final)} archs are within it of the best",
            given.command,
        ),
        *rows_of(found, lattice, goal, losses[best], settings, given.effort, given.command),
    ]
    curves = {
        name: [best_so_far(one, lattice, settings.budget) for one in all_of]
        for name, all_of in found.items()
    }
    told = {
        "steps": settings.steps,
        "shortlist": settings.shortlist,
        "proxied": settings.proxied,
        "beam": settings.beam,
        "choose": settings.choose,
        "archs": len(lattice.archs),
        "final": len(lattice.final),
        "in_reach": in_reach,
        "table_epochs": epochs,
        "images": given.images,
        "sd": sd[0],
        "best": losses[best],
        "budget": settings.budget,
        "frozen": [slot for slot in slots_of(lattice.family) if slot not in free],
        "median": {r.name.split(":")[0]: r.estimate for r in rows if r.name.endswith("median")},
        "reached": {r.name.split(":")[0]: r.estimate for r in rows if ": reached" in r.name},
        "quartiles": {name: quartiles(all_of, losses[best]) for name, all_of in curves.items()},
    }
    return rows, told


def quartiles(curves: Sequence[Sequence[float]], best: float) -> list[list[float | None]]:
    """Return quartiles and median [3, evaluations] of how far searches are behind the best.

    None where that many of them have nothing in the last band yet.
    """
    behind = np.array(curves, dtype=np.float64) - best
    found = np.percentile(behind, [25, 50, 75], axis=0, method="higher")
    return [[round(float(v), 6) if math.isfinite(v) else None for v in row] for row in found]


def write_table(path: Path, lattice: Lattice, table: Mapping[str, Trained], epochs: int) -> None:
    """Write every arch of the lattice with its parameters and loss."""
    family, out = lattice.family, io.StringIO()
    writer = Writer(out)
    writer.writerow(
        [
            "key",
            "label",
            "params",
            "macs",
            "last_band",
            "epochs",
            "soft_loss",
            "soft_loss_se",
            "top1",
        ]
    )
    for key, arch in lattice.archs.items():
        told = table[key].values[epochs]
        writer.writerow(
            [
                key,
                family.label(arch),
                family.count_params(arch, lattice.context),
                family.count_macs(arch, lattice.context),
                int(key in lattice.final),
                epochs,
                *(round(float(told[name]), 6) for name in ("soft_loss", "soft_loss_se", "top1")),
            ]
        )
    write_atomic(path, out.getvalue().encode())


def figure(path: Path, told: Mapping[str, Any]) -> None:
    """Draw the best so far in the last band against evaluations: median and quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    x = np.arange(1, told["budget"] + 1)
    for at, (name, curves) in enumerate(told["quartiles"].items()):
        lo, middle, hi = np.array(curves, dtype=np.float64)  # None: NaN
        ax.step(x, middle, where="post", lw=1.4, color=f"C{at}", label=name)
        ax.fill_between(x, lo, hi, step="post", alpha=0.12, color=f"C{at}", lw=0)
    ax.axhline(told["sd"], color="black", lw=0.7, ls=":", label="one standard deviation")
    ax.set_yscale("symlog", linthresh=told["sd"])  # linear below one standard deviation
    ax.set_ylim(bottom=0)
    ax.set_xlabel("evaluations, those of early steps too")
    ax.set_ylabel("best so far in the last band minus the best there, nats")
    title = f"{told['archs']} archs, {told['final']} in the last band; median and quartiles"
    ax.set_title(title, fontsize=9)
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.strategies", description=__doc__)
    arguments(parser)
    add = parser.add_argument
    add("--free", default=FREE, help="slots that may change (default %(default)s)")
    add("--most", type=int, default=400, help="archs of the lattice (default %(default)s)")
    epochs = "epochs of --images images per arch of the table; 0: sliced weights are scored as "
    epochs += "they are (default: 1 if the budget pays for it)"
    add("--table-epochs", type=int, choices=(0, 1, 2, 3), help=epochs)
    add("--sd-archs", type=int, default=12, help="for the deviation (default %(default)s)")
    add("--sd-seeds", type=int, default=5, help="random seeds of those (default %(default)s)")
    efforts = f"whose steps and sizes a search has: {', '.join(EFFORTS)} (default %(default)s)"
    add("--effort", choices=tuple(EFFORTS), default="normal", help=efforts)
    add("--steps", type=int, help="of contraction (default: those of the effort)")
    add("--shortlist", type=int, help="archs listed a step (default: the effort's)")
    add("--proxied", type=int, help="of them scored, 0: all (default: the effort's)")
    add("--beam", type=int, help="default: the effort's")
    ways = choices_of("choose")
    add("--choose", choices=ways, default=ways[0], help="as nas.contract (default %(default)s)")
    add("--evaluations", type=int, default=60, help="what a search may spend (default %(default)s)")
    add("--replays", type=int, default=50, help="random seeds a strategy (default %(default)s)")
    add("--strategies", type=_names, default=strategy_names(), help="default: all, with commas")
    add("--live", action="store_true", help="also contraction and the best rival as real runs")
    add("--live-hours", type=float, default=1.0, help="at most, each (default %(default)s)")
    add("--out", type=Path, default=Path("results/search_efficiency.csv"))
    return parser


def _names(text: str) -> tuple[str, ...]:
    try:
        return tuple(get_strategy(name).name for name in text.split(","))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, score what is missing, replay, report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = build_parser().parse_args(argv)
    given.command = " ".join(["python -m benchmarks.strategies", *argv])

    def work() -> int:
        for name in ("shortlist", "proxied", "beam"):
            if getattr(given, name) is None:
                setattr(given, name, effort_defaults(given.effort)[name])
        for name, least in (
            ("sd_archs", 2),
            ("sd_seeds", 2),
            ("steps", 1),
            ("shortlist", 1),
            ("proxied", 0),
            ("beam", 1),
            ("evaluations", 1),
            ("replays", 2),
        ):
            if getattr(given, name) is not None and getattr(given, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise refuse(flag, getattr(given, name), f"an integer >= {least}")
        rows, told = compare(given, Console())
        write_rows(given.out, rows)
        write_json(given.out.with_suffix(".json"), told)
        figure(given.out.with_suffix(".png"), told)
        if given.live:
            rows += live(given, told)
            write_rows(given.out, rows)
        for row in rows:
            print(in_words(row))
        keys = ("archs", "final", "in_reach", "table_epochs", "sd", "budget", "median", "reached")
        print(json.dumps({k: told[k] for k in keys}))
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
