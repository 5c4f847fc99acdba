"""How well does a short proxy rank the archs of a step's band? `python -m benchmarks.proxy`.

Archs of one step's band, half of them as the search would list them and half drawn uniformly, are scored by each proxy,
and trained about ten times longer, on several random seeds: the truth. The table holds Kendall's tau of every proxy
with the truth, the ceiling that the truth's own noise sets (`nas.core.stats`), and the regret of the proxy's pick.
Beside the proxies: parameters, MACs, throughput, and scores of untrained networks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.estimates import check_at_least, draw_intervals, run_command, write_table
from benchmarks.trainings import CRITERION, PROXY_SEED, Trained, Training, TrainingPool, add_short_flags, open_pool
from nas.contract.proxy_check import ProxyCheckRow, compare_scores, training_free_scores
from nas.contract.state import derived_seed
from nas.core.cli import Parser
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from nas.core.stats import describe_tied, regret, tied_with_best
from space.contractions import propose
from space.errors import InputError, refuse
from space.family import Arch
from space.sampling import sample_band

TRUTH_SEED = 1000
"""Random seed of the first training of the truth."""
CRITERIA = (CRITERION, "prefix", "taylor")
HOW = ("rule", "uniform")
"""How archs were listed: by the search's rule, or drawn uniformly from the band."""
LEAST = 4
"""Archs that a ranking needs."""
CHEAP = 0.1
"""At most this share of the truth's cost has the proxy that the summary is of."""


def candidates(pool: TrainingPool, number: int) -> list[tuple[str, Arch]]:
    """Return (how drawn, arch): half by the search's rule, half uniformly from the band."""
    run = pool.run
    family, seed, context, band = run.family, run.seed_arch, run.context, run.band(run.config.steps)
    drawn_from = derived_seed(run.config.random_seed, "proxy_rank")
    half = (number + 1) // 2
    ruled = propose(family, [seed], context, band, half, random_seed=drawn_from, baselines=False)
    keys = {run.key(c.arch) for c in ruled}
    drawn = sample_band(family, seed, context, band, number - len(ruled), random_seed=drawn_from, exclude=keys)
    return [(HOW[0], c.arch) for c in ruled] + [(HOW[1], arch) for arch in drawn]


def chosen(listed: Sequence[tuple[str, Arch]], number: int) -> list[Arch]:
    """Take so many of the listed archs, half of either kind as far as there are."""
    ruled, drawn = ([arch for how, arch in listed if how == kind] for kind in HOW)
    ruled = ruled[: max((number + 1) // 2, number - len(drawn))]
    return ruled + drawn[: number - len(ruled)]


def named_archs(pool: TrainingPool, given: argparse.Namespace, affordable: Callable[[], int]) -> list[Arch]:
    """Return the archs to compare, named in the pool's folder before anything is trained. Raises InputError.

    Benchmarks of one folder share them, and so their trainings.
    """
    family, path = pool.run.family, pool.run.folder.path / f"listed-{pool.run.config.target_params}.json"
    if not path.exists():
        drawn = candidates(pool, given.archs or affordable())
        write_json(path, [[how, family.to_dict(arch)] for how, arch in drawn])
    listed = [(how, family.arch(arch)) for how, arch in read_json(path, "the archs of a benchmark")]
    archs = chosen(listed, given.archs or len(listed))
    if given.archs and len(archs) < given.archs:
        want = f"at most {len(archs)}, those named in {path}"
        raise refuse("--archs", given.archs, want, "name another folder with --work")
    return archs


def lengths(given: argparse.Namespace) -> tuple[int, ...]:
    """Return the lengths of the proxies, in epochs: half of the longest, and the longest."""
    return tuple(sorted({max(1, given.proxy_epochs // 2), given.proxy_epochs}))


def named(what: str, epochs: int) -> str:
    """Name a proxy of so many epochs."""
    return f"{what}, {epochs} epoch{'s' if epochs > 1 else ''}"


def proxies(pool: TrainingPool, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the proxies by name, each the settings of a short training on `--images` images."""
    found: dict[str, dict[str, Any]] = {}
    for epochs in lengths(given):
        for criterion in CRITERIA:
            start = {"init": "inherit", "parent": pool.parent(criterion), "epochs": epochs}
            found[named(f"inherited ({criterion})", epochs)] = start
        found[named("from scratch", epochs)] = {"init": "scratch", "epochs": epochs}
    shortest = lengths(given)[0]
    own = found[named(f"inherited ({CRITERION})", shortest)]
    found[named("inherited, hard labels", shortest)] = {**own, "hard_weight": 1.0}
    return found


def affordable(pool: TrainingPool, given: argparse.Namespace) -> int:
    """Return how many archs the budget pays for: fewer archs before fewer random seeds."""
    data = pool.run.dataset
    images, holdout = len(data.train.labels), len(data.holdout.labels)
    truth = given.truth_epochs * min(images, given.truth_images or images) + 4 * holdout / 3
    short = sum((len(CRITERIA) + 1) * (e * given.images + holdout / 3) for e in lengths(given))
    each = given.seeds * truth + short + given.images + holdout / 3
    return max(6, min(24, pool.affordable(each, given.budget_hours)))


def rank(given: argparse.Namespace, console: Console) -> tuple[list[ProxyCheckRow], dict[str, Any]]:
    """Train what is missing; return the table's rows and the summary."""
    with open_pool(given, console) as pool:
        key = pool.run.key
        archs = named_archs(pool, given, lambda: affordable(pool, given))
        console.line(f"{len(archs)} archs, {given.seeds} random seeds of the truth")
        short = proxies(pool, given)
        wanted = [
            Training(arch, **how, random_seed=PROXY_SEED, images=given.images)
            for how in short.values()
            for arch in archs
        ]
        # The truth trains on from the seed's inherited weights, as users train a winner on.
        long: dict[str, Any] = {"init": "inherit", "epochs": given.truth_epochs, "parent": pool.parent(CRITERION)}
        wanted += [
            Training(arch, **long, random_seed=TRUTH_SEED + s, images=given.truth_images)
            for s in range(given.seeds)
            for arch in archs
        ]
        done = pool.train(wanted)
        failed = {key(t.of.arch): t.failed for t in done if t.failed is not None}
        for name, reason in failed.items():  # an outcome: seeds are fixed, it would fail again
            console.line(f"left out: {name}: {reason}")
        done = [t for t in done if key(t.of.arch) not in failed]
        archs = [arch for arch in archs if key(arch) not in failed]
        if len(archs) < LEAST:
            raise InputError(f"{len(archs)} archs are left, too few to rank: {LEAST} are needed")
        truth = done[len(short) * len(archs) :]
        scored = {name: done[i * len(archs) : (i + 1) * len(archs)] for i, name in enumerate(short)}
        free = training_free_scores(pool.run, archs)
        pool.run.executor.close()
        return table(pool, given, archs, scored, truth, free)


def table(
    pool: TrainingPool,
    given: argparse.Namespace,
    archs: Sequence[Arch],
    scored: Mapping[str, Sequence[Trained]],
    truth: Sequence[Trained],
    free: Mapping[str, Sequence[float]],
) -> tuple[list[ProxyCheckRow], dict[str, Any]]:
    """Compare every score with the truth."""
    n = len(archs)
    losses = np.array([t.values["soft_loss"] for t in truth]).reshape(-1, n)
    cost = sum(pool.cost(t.of) for t in truth[:n])
    scores: dict[str, tuple[npt.ArrayLike, float | None]] = {}
    for name, trained in scored.items():
        values = np.array([t.values["soft_loss"] for t in trained])
        scores[name] = values, sum(pool.cost(t.of) for t in trained) / cost
    shortest, longest = lengths(given)[0], lengths(given)[-1]
    if longest == 2 * shortest:  # as long as the longest, half of it each way
        both = [scores[named(f"inherited ({CRITERION})", shortest)], scores[named("from scratch", shortest)]]
        ranks = sum((np.argsort(np.argsort(v)).astype(float) for v, _ in both), np.zeros(n))
        together = sum(s for _, s in both if s is not None)
        scores[f"both, {named('ranks added', shortest)} each"] = ranks, together
    scores |= {name: (values, 0.0) for name, values in free.items()}
    rows = compare_scores(scores, losses)
    ceiling = rows[-1].estimate
    per_image = {
        pool.run.key(arch): np.array([truth[s * n + i].losses() for s in range(given.seeds)])
        for i, arch in enumerate(archs)
    }
    of_default = [r for r in rows if r.name in scored and r.name.startswith(f"inherited ({CRITERION})")]
    cheap = [r for r in of_default if r.cost_share is not None and r.cost_share <= CHEAP + 1e-9]
    own = max(cheap, key=lambda r: r.cost_share or 0.0, default=of_default[0])
    summary = {
        "archs": n,
        "seeds": given.seeds,
        "holdout": len(pool.run.dataset.holdout.labels),
        "proxy": own.name,
        "cost_share": own.cost_share,
        "regret": own.regret,
        "within_one_sd": own.within_one_sd,
        "tau": own.estimate,
        "ceiling": ceiling,
        "tau_share": own.estimate / ceiling if ceiling else None,
        "seed_sd": regret(scores[own.name][0], losses).seed_sd,
        "words": describe_tied(tied_with_best(per_image), per_image),
        "truth": losses.tolist(),
        "scores": {name: np.asarray(values).tolist() for name, (values, _) in scores.items()},
        "labels": [pool.run.family.label(arch) for arch in archs],
    }
    return rows, summary


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, report; the last line is JSON. Exit status 0, 2 on bad input."""
    parser = Parser("python -m benchmarks.proxy", description=__doc__)
    add_short_flags(parser)
    parser.add_argument("--truth-images", type=int, help="training images of the truth (default: all)")
    parser.add_argument("--out", type=Path, default=Path("results/proxy_rank.csv"))

    def work(given: argparse.Namespace) -> dict[str, Any]:
        check_at_least(given, seeds=2, archs=LEAST)  # before anything is named or trained
        rows, summary = rank(given, Console())
        write_table(given.out, rows, command=given.command)
        write_json(given.out.with_suffix(".json"), summary)
        label = f"Kendall's tau with the truth ({summary['archs']} archs, {summary['seeds']} random seeds)"
        ceilings = {r.name: r.estimate for r in rows if r.name.startswith("ceiling")}
        # A tau without an interval is drawn as a point.
        spans = [(r.estimate, r.estimate if r.lo is None else r.lo, r.estimate if r.hi is None else r.hi) for r in rows]
        shown = [(r.name, span) for r, span in zip(rows, spans, strict=True) if r.name not in ceilings]
        shown.sort(key=lambda named: -named[1][0])
        draw_intervals(given.out.with_suffix(".png"), shown, label, lines=ceilings)
        for row in rows:
            line = f"{row.name:<36} tau {row.tau.text('+.2f')}"
            if row.cost_share is not None:
                line += f"  cost {row.cost_share:.0%} of the truth"
            if row.regret is not None:
                line += f"  regret {row.regret:.4f} [{row.regret_lo:.4f}, {row.regret_hi:.4f}]"
            print(line)
        print(summary["words"])
        return {k: v for k, v in summary.items() if k not in ("truth", "scores", "labels", "words")}

    return run_command(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
