"""Strategies compared live: one run each, of equally much training."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from typing import Any

from benchmarks._estimates import Row
from nas.command import default_cache
from nas.config import parse_count
from nas.contract import contract
from nas.work import Outcome
from space.errors import InputError


def live(given: argparse.Namespace, told: Mapping[str, Any]) -> list[Row]:
    """Run contraction and the best rival once each; return rows of how they ended.

    The rival takes as many steps as train about what contraction trained (GMACs, from its ledger),
    so the two last equally long but for what the machine does meanwhile; what either really trained
    and its seconds stand beside. Children inherit from their parents; nobody races, as races would
    save unequal shares; the same slots are free. `told`: what the replays found, with `median`
    evaluations by strategy and the `frozen` slots.
    """
    rivals = {n: m for n, m in told["median"].items() if n != "contraction"}
    rows, own = _ran(given, told, "contraction", given.steps)
    if rivals:
        best = min(rivals, key=lambda n: (rivals[n], n))
        each = (given.proxied or given.shortlist) * given.proxy_epochs
        steps = max(1, round(_searched(own) / (each * own.result["final"]["winner"]["macs"])))
        rows += _ran(given, told, best, steps)[0]
    return rows


def _searched(of: Outcome) -> float:
    """Return what the candidates of a finished run trained, in MACs x epochs."""
    with (of.folder / "ledger.csv").open(newline="") as text:
        rows = [row for row in csv.DictReader(text) if int(row["step"]) > 0 and row["epochs"]]
    return float(sum(int(row["macs"]) * float(row["epochs"]) for row in rows))


def _ran(
    given: argparse.Namespace, told: Mapping[str, Any], name: str, steps: int
) -> tuple[list[Row], Outcome]:
    """Run a strategy, or take over what is finished; settings that differ are refused."""
    folder = given.out.parent / "runs" / f"{given.out.stem}-live-{name}"
    settings: dict[str, Any] = {
        "seed": given.seed, "target_params": parse_count("--target-params", given.target_params),
        "data": given.data, "img_size": given.img_size, "seed_epochs": given.seed_epochs,
        "teacher_epochs": given.teacher_epochs, "final_epochs": given.truth_epochs, "steps": steps,
        "shortlist": given.shortlist, "proxied": given.proxied or given.shortlist,
        "beam": given.beam, "proxy_epochs": given.proxy_epochs, "strategy": name, "racing": False,
        "anchors": False, "freeze": tuple(told["frozen"]), "random_seed": given.random_seed,
        "device": given.device,
    }  # fmt: skip
    ended = contract(
        out=folder, resume=(folder / "run.json").exists(), max_hours=given.live_hours,
        cache_dir=default_cache() if given.cache_dir is None else given.cache_dir, **settings,
    )  # fmt: skip
    final = ended.result.get("final")
    if final is None:
        raise InputError(f"--live {name}: {ended.message}; more --live-hours finish it")
    won = final["winner"]
    rows = []
    for key in ("soft_loss", "top1"):
        lo, hi = (won[key] + z * won[f"{key}_se"] for z in (-1.96, 1.96))
        rows.append(Row(f"live, {name}: {key} of the winner", won[key], lo, hi, 1, "run",
                        "interval over images only", given.command))  # fmt: skip
    gmacs = ended.result["work"]["train_gmacs"]
    note = f"{steps} steps; final trainings included"
    rows.append(Row(f"live, {name}: GMACs trained", gmacs, gmacs, gmacs, 1, "run", note,
                    given.command))  # fmt: skip
    seconds = float(ended.result["seconds"])
    rows.append(Row(f"live, {name}: seconds", seconds, seconds, seconds, 1, "run",
                    "of the process that ended it", given.command))  # fmt: skip
    return rows, ended
