"""What racing saves, and whether it keeps the best: `python -m benchmarks.racing`.

Many races are replayed on the curves that the long trainings of `benchmarks.proxy_rank` left in
their folder (same flags, same folder): archs and a random seed are drawn, and the paired tests of
`nas.search.racing` decide at each rung, against Optuna's successive halving and Hyperband on the
same curves. Nothing is trained here, so the budget plays no part.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._estimates import (
    Floats,
    Row,
    bootstrap,
    in_words,
    integers,
    share,
    write_rows,
)
from benchmarks.lab import arguments, folder_of
from nas.command import Parser, guarded
from nas.files import write_json
from nas.race import ALPHA, DRIFT_NATS
from nas.search.racing import Race, drift, hyperband, simulate_race, successive_halving
from space.errors import refuse

NAME = re.compile(
    r"(?P<key>.+?)-inherit(?P<epochs>\d+)(?P<images>x\d+)?-r(?P<seed>\d+)(?P<rest>-.*?)?"
    r"(?:-rung(?P<rung>\d+))?"
)
"""Folders of trainings from inherited weights, as `benchmarks.lab` names them."""

MOST_SPENT, LEAST_KEPT = 0.5, 0.95
"""The aim: at most this share of all epochs, and of those of Optuna's; the best kept this often."""
REDUCTIONS = (2, 3, 4)
"""Of Optuna's pruners; 3 is its Hyperband's own default, 4 its successive halving's."""


@dataclass(frozen=True)
class Curves:
    """Per-image holdout losses (nats) [random seeds, archs, rungs, images] and what they are of."""

    losses: Floats
    archs: tuple[str, ...]
    seeds: tuple[int, ...]
    rungs: tuple[int, ...]

    @property
    def means(self) -> Floats:
        """Mean losses [random seeds, archs, rungs]."""
        return np.asarray(self.losses.mean(axis=-1))


@dataclass(frozen=True)
class Replayed:
    """One replayed race: share of all epochs spent, and whether the best reached the last rung.

    The best by this random seed's own last rung, and by the mean over all random seeds.
    """

    share: float
    kept_own: bool
    kept_mean: bool


def read_curves(folder: Path) -> Curves:
    """Read the curves of the long trainings in a lab's folder. Too few: refused."""
    from nas.seals import load_arrays

    found: dict[tuple[str, str, str], dict[tuple[str, int], dict[int, Path]]] = {}
    for path in sorted((folder / "work").glob("*/holdout.safetensors")):
        match = NAME.fullmatch(path.parent.name)
        if match is None:
            continue
        of = match["epochs"], match["images"] or "", match["rest"] or ""
        group = found.setdefault(of, {})
        rung = int(match["rung"] or match["epochs"])
        group.setdefault((match["key"], int(match["seed"])), {})[rung] = path
    want = "the long trainings of proxy_rank, with losses at 2 rungs or more for 4 archs or more"
    remedy = "run python -m benchmarks.proxy_rank with the same flags first"
    # The truth is what has most rungs; short proxies have one.
    group = max(
        found.values(),
        key=lambda g: (max(len(v) for v in g.values()), sum(len(v) for v in g.values())),
        default={},
    )
    rungs = tuple(sorted({rung for by_rung in group.values() for rung in by_rung}))
    whole = {at for at, by_rung in group.items() if tuple(sorted(by_rung)) == rungs}
    seeds = tuple(sorted({seed for _, seed in whole}))
    archs = tuple(sorted(k for k in {key for key, _ in whole}
                         if all((k, seed) in whole for seed in seeds)))  # fmt: skip
    if len(rungs) < 2 or len(archs) < 4:
        got = f"{folder} with {len(archs)} whole archs at {len(rungs)} rungs"
        raise refuse("--work", got, want, remedy)
    losses = [
        [[load_arrays(group[key, seed][r])["soft_loss"] for r in rungs] for key in archs]
        for seed in seeds
    ]
    return Curves(np.array(losses, dtype=np.float64), archs, seeds, rungs)


def drifts(means: Floats, outside: Sequence[Sequence[int]]) -> list[float]:
    """Return the drift (nats) at each rung but the last, pooled over random seeds.

    `means` [seeds, archs, rungs]; `outside[s]`: the archs of random seed s that are looked at.
    What moves all archs of a random seed alike moves no difference, so seeds are pooled, not mixed.
    """
    found = []
    for rung in range(means.shape[2] - 1):
        squares, dof = 0.0, 0
        for s, archs in enumerate(outside):
            if len(archs) < 2:
                continue
            sd = drift({str(a): (means[s, a, rung], means[s, a, -1]) for a in archs})
            squares += (len(archs) - 1) * sd**2
            dof += len(archs) - 1
        if not dof:
            raise refuse("curves", "none outside the race", "more archs or random seeds")
        found.append(math.sqrt(squares / dof))
    return found


Method = Callable[[Curves, int, Sequence[int], int], Race]
"""A race of archs (positions) of a random seed (its position), with a random seed of its own."""


def methods(keeps: Sequence[int]) -> dict[str, Method]:
    """Return the ways to race by name."""

    def paired(keep: int, drift_of: str) -> Method:
        def race(curves: Curves, s: int, archs: Sequence[int], seed: int) -> Race:
            allowance: Sequence[float] | float | None = None
            if drift_of == "measured drift":
                every = range(len(curves.archs))
                outside = [
                    [a for a in every if at != s or a not in archs]
                    for at in range(len(curves.seeds))
                ]
                allowance = drifts(curves.means, outside)
            elif drift_of == "constant drift":
                allowance = DRIFT_NATS
            table = curves.losses[s, list(archs)]
            return simulate_race(table, curves.rungs, keep, alpha=ALPHA, drift_sd=allowance)

        return race

    def pruned(replay: Callable[..., Race], reduction: int) -> Method:
        def race(curves: Curves, s: int, archs: Sequence[int], seed: int) -> Race:
            return replay(curves.means[s, list(archs)], curves.rungs, reduction, random_seed=seed)

        return race

    def every(curves: Curves, s: int, archs: Sequence[int], seed: int) -> Race:
        order = np.argsort(curves.means[s, list(archs), -1], kind="stable")
        return Race(len(archs) * curves.rungs[-1], tuple(order.tolist()), True)

    allowances = ("constant drift", "measured drift", "images only")
    return {
        **{f"paired tests, {d}, keep {k}": paired(k, d) for k in keeps for d in allowances},
        **{f"successive halving by {r}": pruned(successive_halving, r) for r in REDUCTIONS},
        **{f"Hyperband by {r}": pruned(hyperband, r) for r in REDUCTIONS},
        "all to the end": every,
    }


def replayed(
    curves: Curves, race: Method, size: int, number: int, *, random_seed: int
) -> list[Replayed]:
    """Replay `number` races of `size` archs drawn at random, one random seed each.

    Equal random seeds draw equal races for every method.
    """
    rng = np.random.default_rng(random_seed)
    means, longest = curves.means, curves.rungs[-1]
    found = []
    for _ in range(number):
        s = int(rng.integers(len(curves.seeds)))
        archs = rng.choice(len(curves.archs), size, replace=False).tolist()
        run = race(curves, s, archs, int(rng.integers(2**31)))
        reached = {archs[i] for i in run.last_rung}
        best_own = min(archs, key=lambda a: means[s, a, -1])
        best_mean = min(archs, key=lambda a: means[:, a, -1].mean())
        found.append(
            Replayed(run.epochs_spent / (size * longest), best_own in reached, best_mean in reached)
        )
    return found


def rows_of(name: str, races: Sequence[Replayed], command: str) -> list[Row]:
    """Return a method's rows: epochs spent, and how often the best was kept."""
    n, note = len(races), "races overlap"
    own, mean = (sum(getattr(r, f) for r in races) for f in ("kept_own", "kept_mean"))
    spent = bootstrap([r.share for r in races], lambda v: float(v.mean()), random_seed=0)
    return [
        Row(f"{name}: share of epochs", *spent, n, "races", note, command),
        Row(f"{name}: keeps the best of the last rung", *share(own, n), n, "races", note, command),
        Row(f"{name}: keeps the best by the mean over random seeds", *share(mean, n), n, "races",
            note, command),
    ]  # fmt: skip


def drift_rows(curves: Curves, command: str) -> list[Row]:
    """Return the drift to recommend at each rung, with its interval over archs."""
    by_arch = np.swapaxes(curves.means, 0, 1)  # [archs, seeds, rungs]

    def at(rung: int) -> Callable[[Floats], float]:
        def statistic(drawn: Floats) -> float:
            every = [range(len(drawn))] * drawn.shape[1]
            return drifts(np.swapaxes(drawn, 0, 1)[:, :, [rung, -1]], every)[0]

        return statistic

    last = curves.rungs[-1]
    return [
        Row(f"drift from epoch {epoch} to {last}, nats",
            *bootstrap(by_arch, at(rung), random_seed=0, resamples=500), len(curves.archs), "archs",
            f"now {DRIFT_NATS} for all", command)
        for rung, epoch in enumerate(curves.rungs[:-1])
    ]  # fmt: skip


def replay_all(
    curves: Curves, given: argparse.Namespace, command: str
) -> tuple[list[Row], dict[str, object]]:
    """Replay all races; return the table's rows and what else is told."""
    # A race of all archs could be drawn in one way only.
    sizes = sorted({min(size, len(curves.archs) - 1) for size in given.sizes})
    if sizes[0] <= given.keep[0]:
        got = f"races of {sizes[0]} of {len(curves.archs)} archs that keep {given.keep[0]}"
        raise refuse("--sizes, --keep", got, "races larger than what they keep")
    rows, points = drift_rows(curves, command), []
    spent: dict[tuple[int, str], list[float]] = {}
    for size in sizes:
        keeps = [k for k in given.keep if k < size]
        for name, race in methods(keeps).items():
            races = replayed(curves, race, size, given.races, random_seed=given.random_seed)
            spent[size, name] = [r.share for r in races]
            own = rows_of(f"{name}, {size} archs", races, command)
            rows += own
            points.append((size, name, own))
    told: dict[str, object] = {
        "archs": len(curves.archs), "seeds": len(curves.seeds), "rungs": list(curves.rungs),
        "images": curves.losses.shape[-1], "sizes": sizes,
        "points": [[size, name, [[r.estimate, r.lo, r.hi] for r in own]]
                   for size, name, own in points],
    }  # fmt: skip
    by_size = {size: {name: own for at, name, own in points if at == size} for size in sizes}
    default = f"paired tests, constant drift, keep {given.keep[0]}"
    aims = [found[default] for found in by_size.values()]
    beside = {size: _beside(found, default) for size, found in by_size.items()}
    for size, (name, _) in beside.items():
        pairs = np.stack([spent[size, default], spent[size, name]], axis=1)
        ratio = bootstrap(pairs, lambda v: float(v[:, 0].mean() / v[:, 1].mean()), random_seed=0)
        note = "the cheapest that keeps the best as often as asked; races overlap"
        rows.append(Row(f"{default}, {size} archs: epochs beside {name}", *ratio, given.races,
                        "races", note, command))  # fmt: skip
    kept = all(aim[1].estimate >= LEAST_KEPT for aim in aims)
    told |= {
        "share": aims[-1][0].estimate, "kept": aims[-1][1].estimate, "kept_lo": aims[-1][1].lo,
        "kept_mean": aims[-1][2].estimate, "beside_rivals": {str(k): v for k, v in beside.items()},
        "reached_half_of_all": kept and all(aim[0].hi <= MOST_SPENT for aim in aims),
        "reached_half_of_rivals": kept and all(s <= MOST_SPENT for _, s in beside.values()),
    }  # fmt: skip
    return rows, told


def _beside(found: Mapping[str, Sequence[Row]], default: str) -> tuple[str, float]:
    """Return the cheapest of Optuna's that keeps the best as often as asked, and our epochs in its.

    Without one, the cheapest of those that keep it most often.
    """
    rivals = {n: own for n, own in found.items() if n.startswith(("successive", "Hyperband"))}
    most = max(own[1].estimate for own in rivals.values())
    good = {n: own for n, own in rivals.items() if own[1].estimate >= min(LEAST_KEPT, most)}
    name = min(good, key=lambda n: (good[n][0].estimate, n))
    return name, found[default][0].estimate / good[name][0].estimate


def figure(path: Path, told: Mapping[str, object]) -> None:
    """Draw how often the best is kept against the epochs spent, one panel a size of race."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes, points = told["sizes"], told["points"]
    assert isinstance(sizes, list)
    assert isinstance(points, list)
    wide = 3.2 * len(sizes) + 3.2
    fig, panels = plt.subplots(
        1, len(sizes), figsize=(wide, 4), layout="constrained", sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(name for _, name, _ in points))
    colours = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    for panel, size in zip(panels[0], sizes, strict=True):
        for at, name in enumerate(names):
            for _, _, (spent, own, _mean) in (p for p in points if p[:2] == [size, name]):
                panel.errorbar(
                    spent[0], own[0],
                    xerr=[[spent[0] - spent[1]], [spent[2] - spent[0]]],
                    yerr=[[own[0] - own[1]], [own[2] - own[0]]],
                    fmt="os^DvP*X"[at % 8], ms=5, lw=0.8, color=colours[at % 20], label=name,
                )  # fmt: skip
        panel.axvline(MOST_SPENT, color="black", lw=0.5, ls=":")
        panel.axhline(LEAST_KEPT, color="black", lw=0.5, ls=":")
        panel.set_title(f"races of {size}", fontsize=9)
        panel.set_xlabel("share of epochs spent", fontsize=8)
    panels[0][0].set_ylabel("best of the last rung kept, 95 %", fontsize=8)
    handles, labels = panels[0][-1].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=7, loc="outside right center")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.racing", description=__doc__)
    arguments(parser)
    add = parser.add_argument
    add("--races", type=int, default=400, help="of each size and method (default %(default)s)")
    sizes = "archs of a race (default 4,8,12, as far as there are)"
    add("--sizes", type=integers, default=(4, 8, 12), help=sizes)
    add("--keep", type=integers, default=(1, 2), help="how many a race keeps (default 1,2)")
    add("--out", type=Path, default=Path("results/racing.csv"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, replay, report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = build_parser().parse_args(argv)
    command = " ".join(["python -m benchmarks.racing", *argv])

    def work() -> int:
        if given.races < 1 or min(given.sizes) <= min(given.keep):
            got = f"races {given.races}, sizes {given.sizes}, keep {given.keep}"
            raise refuse("--races, --sizes, --keep", got, "at least one race, larger than it keeps")
        curves = read_curves(folder_of(given))
        rows, told = replay_all(curves, given, command)
        write_rows(given.out, rows)
        write_json(given.out.with_suffix(".json"), told)
        figure(given.out.with_suffix(".png"), told)
        for row in rows:
            print(in_words(row))
        print(
            f"the races overlap: all draw on {told['archs']} archs x {told['seeds']} random seeds, "
            "so their intervals speak of other draws, not of other archs"
        )
        keys = (
            "archs",
            "seeds",
            "rungs",
            "share",
            "kept",
            "kept_lo",
            "kept_mean",
            "beside_rivals",
            "reached_half_of_all",
            "reached_half_of_rivals",
        )
        print(json.dumps({k: told[k] for k in keys}))
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
