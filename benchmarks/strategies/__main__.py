"""How soon a search strategy finds the best arch: `python -m benchmarks.strategies --table T`.

T is a closed table: every arch of a small lattice (a few free slots, all step bands from the seed to the target) with
its loss after a short training from the seed's sliced weights. Each strategy searches it from many random seeds, as a
run asks it, without baselines. Counted is every evaluation, those of contraction's early steps too, until an arch of
the last band is within one standard deviation (over random seeds of the training) of the best there. Throughput plays
no part. In the table, children inherit from the seed; in a run, from the step before.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import (
    EstimateRow,
    Floats,
    bootstrap,
    check_at_least,
    new_figure,
    run_command,
    share,
    write_table,
)
from benchmarks.strategies.replay import (
    FIXED,
    ClosedTable,
    Lattice,
    ReplaySettings,
    Scored,
    best_so_far,
    open_table,
    reached_after,
    replay_all,
)
from nas.core.cli import Parser, usable_cpus
from nas.core.config import ROUNDS, choices_of, effort_defaults
from nas.core.io import read_json, write_json
from nas.core.settings import EFFORTS
from nas.search.strategies import get_strategy, strategy_names
from space.errors import InputError, refuse

FREE = "depths[2],embed_dims[3],mlp_ratio,mbconv_expand_ratio"


def rows_of(
    searches: Mapping[str, Sequence[Sequence[Scored]]],
    lattice: Lattice,
    goal: float,
    best: float,
    settings: ReplaySettings,
    effort: str,
    command: str,
) -> list[EstimateRow]:
    """Return the strategies' rows: evaluations needed, how often they suffice, differences."""
    budget, rows = float(settings.budget), list[EstimateRow]()
    needed = {
        name: np.array([reached_after(one, lattice, goal) for one in all_of]) for name, all_of in searches.items()
    }

    def add(name: str, found: Sequence[float], n: int, note: str) -> None:
        estimate, lo, hi = found
        rows.append(EstimateRow(name, estimate, lo, hi, n, "searches", note, command))

    for name, after in needed.items():
        n, hits = len(after), int(np.isfinite(after).sum())
        median = bootstrap(after, _median)
        notes = ["censored at the budget"] if median[0] > budget else []
        notes += ["the same for every random seed"] if name in FIXED else []
        add(f"{name}: evaluations to within one sd, median", [min(v, budget) for v in median], n, "; ".join(notes))
        add(f"{name}: reached within {settings.budget} evaluations", share(hits, n), n, "exact interval")
        # How far behind the best a search is when a run of the effort would end.
        rounds = settings.steps if get_strategy(name).stepwise else ROUNDS[effort]
        end = min(settings.budget, rounds * (settings.train_per_step or settings.candidates_per_step))
        behind = np.array([best_so_far(one, lattice, end)[-1] for one in searches[name]]) - best
        there = behind[np.isfinite(behind)]
        mean = bootstrap(there, _mean) if len(there) else (math.nan,) * 3
        note = f"{n - len(there)} searches have no arch of the last band by then"
        add(f"{name}: behind the best after the {end} trainings of a run, mean nats", mean, len(there), note)
    if "contraction" not in needed:
        return rows
    own = needed.pop("contraction")
    for name, after in needed.items():
        both = np.minimum(np.stack([np.resize(after, len(own)), own], axis=1), budget)
        gap = bootstrap(both[:, 0] - both[:, 1], _mean)
        note = "mean evaluations, unreached counted as the budget; above 0: contraction needs fewer"
        add(f"{name} - contraction", gap, len(own), note)
    return rows


def _mean(values: Floats) -> float:
    return float(values.mean())


def _median(values: Floats) -> float:
    # The upper of two middle ones: no mean of a number and an infinity.
    return float(np.percentile(values, 50, method="higher"))


def quartiles(curves: Sequence[Sequence[float]], best: float) -> list[list[float | None]]:
    """Return quartiles and median [3, evaluations] of how far searches are behind the best.

    None where that many of them have nothing in the last band yet.
    """
    behind = np.array(curves, dtype=np.float64) - best
    found = np.percentile(behind, [25, 50, 75], axis=0, method="higher")
    return [[round(float(v), 6) if math.isfinite(v) else None for v in row] for row in found]


def draw_curves(path: Path, summary: Mapping[str, Any]) -> None:
    """Draw the best so far in the last band against evaluations: median and quartiles."""
    x = np.arange(1, summary["budget"] + 1)
    with new_figure(path, 7.5, 4.5) as (_, ax):
        for at, (name, curves) in enumerate(summary["quartiles"].items()):
            lo, middle, hi = np.array(curves, dtype=np.float64)  # None: NaN
            ax.step(x, middle, where="post", lw=1.4, color=f"C{at}", label=name)
            ax.fill_between(x, lo, hi, step="post", alpha=0.12, color=f"C{at}", lw=0)
        ax.axhline(summary["sd"], color="black", lw=0.7, ls=":", label="one standard deviation")
        ax.set_yscale("symlog", linthresh=summary["sd"])  # linear below one standard deviation
        ax.set_ylim(bottom=0)
        ax.set_xlabel("evaluations, those of early steps too")
        ax.set_ylabel("best so far in the last band minus the best there, nats")
        title = f"{summary['archs']} archs, {summary['final']} in the last band; median and quartiles"
        ax.set_title(title, fontsize=9)
        ax.legend(fontsize=7)


def compare(given: argparse.Namespace) -> tuple[list[EstimateRow], dict[str, Any]]:
    """Replay the searches on the table; return the rows and the summary. Raises InputError."""
    asked = ("seed", "target_params", "free", "img_size", "num_classes", "effort", "steps")
    table = ClosedTable(given.table, **{name: getattr(given, name) for name in asked})
    lattice, losses = open_table(table)
    if len(lattice.final) < 2:
        raise refuse("--free", f"{len(lattice.final)} archs in the last band", "at least 2")
    beside = given.table.with_name(f"{given.table.stem.removesuffix('_table')}.json")
    sd = given.sd if given.sd is not None else read_json(beside, "the summary of a table")["sd"]
    sizes = (given.candidates_per_step, given.train_per_step, given.beam, given.evaluations, given.selection)
    settings = ReplaySettings(len(lattice.bands), *sizes)
    found = replay_all(table, given.strategies, settings, given.replays, given.workers)
    best = min(losses[key] for key in lattice.final)
    rows = rows_of(found, lattice, best + sd, best, settings, given.effort, given.command)
    curves = {name: [best_so_far(one, lattice, settings.budget) for one in all_of] for name, all_of in found.items()}
    summary = {
        **vars(settings),
        "archs": len(lattice.archs),
        "final": len(lattice.final),
        "in_reach": sum(losses[key] <= best + sd for key in lattice.final),
        "sd": sd,
        "best": best,
        "median": {r.name.split(":")[0]: r.estimate for r in rows if r.name.endswith("median")},
        "reached": {r.name.split(":")[0]: r.estimate for r in rows if ": reached" in r.name},
        "quartiles": {name: quartiles(all_of, best) for name, all_of in curves.items()},
    }
    return rows, summary


def _names(text: str) -> tuple[str, ...]:
    try:
        return tuple(get_strategy(name).name for name in text.split(","))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Replay and report; the last line is JSON. Exit status 0, 2 on bad input."""
    parser = Parser("python -m benchmarks.strategies", description=__doc__)
    add = parser.add_argument
    table = Path("results/search_efficiency_table.csv")
    add("--table", type=Path, default=table, help="key and soft_loss by arch (%(default)s)")
    add("--sd", type=float, metavar="NATS", help="default: that in the table's JSON file")
    add("--seed", default="5M", help="of the table (default %(default)s)")
    add("--target-params", default="3.6M", help="of the table (default %(default)s)")
    add("--free", default=FREE, help="slots that change in the table (default %(default)s)")
    add("--img-size", type=int, default=64, help="of the table (default %(default)s)")
    add("--num-classes", type=int, default=100, help="of the table (default %(default)s)")
    add("--effort", choices=EFFORTS, default="normal", help="whose sizes a search has")
    add("--steps", type=int, help="of contraction (default: those of the effort)")
    add("--candidates-per-step", type=int, help="archs listed a step (default: the effort's)")
    add("--train-per-step", type=int, help="of them scored, 0: all (default: the effort's)")
    add("--beam", type=int, help="default: the effort's")
    ways = choices_of("selection")
    add("--selection", choices=ways, default=ways[0], help="as nas.contract (default %(default)s)")
    add("--evaluations", type=int, default=60, help="what a search may spend (default %(default)s)")
    add("--replays", type=int, default=50, help="random seeds a strategy (default %(default)s)")
    add("--strategies", type=_names, default=strategy_names(), help="default: all, with commas")
    add("--workers", type=int, default=usable_cpus(), help="searches at a time")
    add("--out", type=Path, required=True, help="the table of estimates; .json and .png beside")

    def work(given: argparse.Namespace) -> dict[str, Any]:
        for name in ("candidates_per_step", "train_per_step", "beam"):
            if getattr(given, name) is None:
                setattr(given, name, effort_defaults(given.effort)[name])
        check_at_least(given, steps=1, candidates_per_step=1, train_per_step=0, beam=1, evaluations=1, replays=2)
        rows, summary = compare(given)
        write_table(given.out, rows)
        write_json(given.out.with_suffix(".json"), summary)
        draw_curves(given.out.with_suffix(".png"), summary)
        print("\n".join(map(str, rows)))
        return {k: summary[k] for k in ("archs", "final", "in_reach", "sd", "budget", "median")}

    return run_command(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
