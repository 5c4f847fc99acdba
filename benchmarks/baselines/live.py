"""Strategies compared live: one run each, of equally much training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks._estimates import Row
from nas.contract import contract
from nas.contract.run import RunResult
from nas.core.cli import default_cache
from nas.core.config import parse_count
from nas.core.per_image import paired_difference
from nas.report.read import read_run
from nas.search.study import Trial
from space.errors import InputError


def live(given: argparse.Namespace, told: Mapping[str, Any]) -> list[Row]:
    """Run contraction and the best rival once each; return rows of how they ended.

    The rival takes as many rounds as train about what contraction trained (GMACs, from its
    trials), so that the two last equally long but for what the machine does meanwhile; the seconds
    of either stand beside. Children inherit from their parents; the same slots are free. `told`:
    what the replays found, with `median` evaluations by strategy and the `frozen` slots.
    """
    rivals = {n: m for n, m in told["median"].items() if n != "contraction"}
    rows, own = _ran(given, told, "contraction", given.steps)
    if rivals:
        best = min(rivals, key=lambda n: (rivals[n], n))
        each = (given.proxied or given.shortlist) * given.proxy_epochs
        steps = max(1, round(_searched(own) / (each * own.result["final"]["winner"]["macs"])))
        more, other = _ran(given, told, best, steps)
        rows += [*more, _difference(own, other, best, given.command)]
    return rows


def _candidates(of: RunResult) -> list[Trial]:
    return [trial for trial in read_run(of.folder).trials if trial.step > 0]


def _searched(of: RunResult) -> float:
    """Return what the candidates of a finished run trained, in MACs x epochs."""
    return sum(trial.macs * trial.epochs for trial in _candidates(of))


def _difference(own: RunResult, other: RunResult, name: str, command: str) -> Row:
    """Compare the two winners over the same test images."""
    keys = [each.result["winner"] for each in (own, other)]
    called = f"live: test top-1, contraction - {name}"
    if keys[0] == keys[1]:
        return Row(called, 0.0, 0.0, 0.0, 0, "test images", "the same arch: a tie", command)
    a, b = (e.folder / "work" / f"final-{e.result['winner']}" for e in (own, other))
    found = paired_difference(a, b, "top1", 0)
    note = "paired over images; one run each, so nothing is said of other random seeds"
    return Row(
        called,
        found["difference"],
        found["lo"],
        found["hi"],
        int(found["n"]),
        "test images",
        note,
        command,
    )


def _ran(
    given: argparse.Namespace, told: Mapping[str, Any], name: str, steps: int
) -> tuple[list[Row], RunResult]:
    """Run a strategy, or take over what is finished; settings that differ are refused."""
    folder = given.out.parent / "runs" / f"{given.out.stem}-live-{name}"
    settings: dict[str, Any] = {
        "seed": given.seed,
        "target_params": parse_count("--target-params", given.target_params),
        "data": given.data,
        "img_size": given.img_size,
        "seed_epochs": given.seed_epochs,
        "teacher_epochs": given.teacher_epochs,
        "final_epochs": given.truth_epochs,
        "steps": steps,
        "shortlist": given.shortlist,
        "proxied": given.proxied or given.shortlist,
        "beam": given.beam,
        "proxy_epochs": given.proxy_epochs,
        "strategy": name,
        "choose": given.choose,
        "anchors": False,
        "freeze": tuple(told["frozen"]),
        "random_seed": given.random_seed,
        "device": given.device,
    }
    ended = contract(
        out=folder,
        resume=(folder / "run.json").exists(),
        max_hours=given.live_hours,
        cache_dir=default_cache() if given.cache_dir is None else given.cache_dir,
        **settings,
    )
    final = ended.result.get("final")
    if final is None:
        raise InputError(f"--live {name}: {ended.message}; more --live-hours finish it")
    won = final["winner"]
    rows = []
    for key in ("soft_loss", "top1"):
        lo, hi = (won[key] + z * won[f"{key}_se"] for z in (-1.96, 1.96))
        rows.append(
            Row(
                f"live, {name}: {key} of the winner",
                won[key],
                lo,
                hi,
                1,
                "run",
                "interval over images only",
                given.command,
            )
        )
    taken = _candidates(ended)
    seconds = sum(trial.seconds for trial in taken)
    trained = sum(trial.epochs > 0 for trial in taken)
    note = f"{steps} steps, {len(taken)} archs timed, {trained} trained"
    rows.append(
        Row(
            f"live, {name}: seconds of the search",
            seconds,
            seconds,
            seconds,
            1,
            "run",
            note,
            given.command,
        )
    )
    gmacs = _searched(ended) / 1e9
    rows.append(
        Row(
            f"live, {name}: GMACs a training image of the search",
            gmacs,
            gmacs,
            gmacs,
            1,
            "run",
            "forward passes over all epochs",
            given.command,
        )
    )
    return rows, ended
