"""Strategies compared live: one run each, for equally long."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks._estimates import Row
from nas.command import default_cache
from nas.contract import contract
from space.errors import InputError


def live(given: argparse.Namespace, told: Mapping[str, Any]) -> list[Row]:
    """Run contraction and the best rival once each, for equally long; return their final rows.

    Children inherit from their parents and races are run as usual; the same slots are free. `told`:
    what the replays found, with `median` evaluations by strategy and the `frozen` slots.
    """
    rivals = {n: m for n, m in told["median"].items() if n != "contraction"}
    names = ["contraction", *([min(rivals, key=lambda n: (rivals[n], n))] if rivals else [])]
    cache = default_cache() if given.cache_dir is None else given.cache_dir
    rows = []
    for name in names:
        folder = given.out.parent / "runs" / f"{given.out.stem}-live-{name}"
        resume = (folder / "run.json").exists()
        settings: dict[str, Any] = {} if resume else {
            "seed": given.seed, "target_params": given.target_params, "data": given.data,
            "img_size": given.img_size, "seed_epochs": given.seed_epochs,
            "teacher_epochs": given.teacher_epochs, "final_epochs": given.truth_epochs,
            "steps": given.steps, "shortlist": given.shortlist,
            "proxied": given.proxied or given.shortlist, "beam": given.beam,
            "proxy_epochs": given.proxy_epochs, "strategy": name, "racing": True, "anchors": False,
            "freeze": tuple(told["frozen"]), "random_seed": given.random_seed,
            "device": given.device,
        }  # fmt: skip
        ended = contract(
            out=folder, resume=resume, max_hours=given.live_hours, cache_dir=cache, **settings
        )
        final = ended.result.get("final")
        if final is None:
            raise InputError(f"--live {name}: {ended.message}; more --live-hours finish it")
        won = final["winner"]
        for key in ("soft_loss", "top1"):
            lo, hi = (won[key] + z * won[f"{key}_se"] for z in (-1.96, 1.96))
            rows.append(Row(f"live, {name}: {key} of the winner", won[key], lo, hi, 1, "run",
                            "interval over images only", given.command))  # fmt: skip
    return rows
