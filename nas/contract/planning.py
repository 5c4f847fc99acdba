"""`--plan`: the run that is planned, without a folder of its own, and the plan in words."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.contract.campaign import band_text
from nas.contract.checks import (
    ask_fingerprints,
    check_possible,
    check_requirements,
    check_token,
    make_config,
    read_data,
    read_device_table,
    resolved,
    with_classes,
    with_steps,
)
from nas.contract.plan import Plan, make_plan
from nas.contract.proxy_check import check_band
from nas.contract.run_folder import RunDir
from nas.contract.state import Run
from nas.core.progress import Console
from nas.jobs.executor import Executor, LocalExecutor
from space import get_family
from space.errors import refuse
from space.freeze import freeze


def plan(
    given: Mapping[str, Any],
    *,
    cache: Path,
    quiet: bool,
    console: Console | None,
    executor: Executor | None,
    trust: int | None = None,
) -> tuple[Plan, str]:
    """Plan a run in a folder that goes away again; see `nas.contract.plan`."""
    console = console if console is not None else Console(quiet=quiet)
    given = resolved(given)
    if "replay" in given:
        raise refuse("--plan", "with --replay", "a new run", "a replay tells what it reuses itself")
    config = make_config(given)
    family = get_family(config.family)
    seed_arch = family.seed(config.seed)
    family = freeze(family, seed_arch, config.freeze)
    config = dataclasses.replace(config, seed_arch=family.to_dict(seed_arch))
    dataset = with_classes(config, read_data(config, cache, console), cache, console)
    config = with_steps(config, given, family, seed_arch, dataset)
    check_possible(config, family, seed_arch, dataset)
    check_band(trust, config, family, seed_arch, dataset)
    tables = [Path(p) for p in config.device_table]
    config, device_table = read_device_table(config, tables, family, seed_arch, dataset)
    check_requirements(config, family, seed_arch, dataset, device_table)
    with tempfile.TemporaryDirectory(prefix="plan-") as text:
        folder = RunDir(Path(text) / "plan")
        folder.create()
        worker = executor or LocalExecutor(threads=config.threads, log=folder.path / "worker.log")
        try:
            fingerprints = ask_fingerprints(config, worker, device_table)
            check_token(config, worker, family, seed_arch, dataset)
            bench = Run(
                config=config,
                family=family,
                seed_arch=seed_arch,
                dataset=dataset,
                folder=folder,
                executor=worker,
                console=console,
                cache=cache,
                deadline=None,
                fingerprints=fingerprints,
                table=device_table,
            )
            made = make_plan(bench, trust=trust)
            bench.ledger.close()
            return made, told(bench, made)
        finally:
            if executor is None:
                worker.close()
            folder.release()


def told(run: Run, plan: Plan) -> str:
    """Write the plan as lines for the terminal."""
    lines = [
        f"{'step':>4}  {'band':<20} {'contractions':>13} {'on the way':>11} {'fast enough':>12}  "
        f"{'timed':>5} {'trained':>7} {'GMACs':>9}  what binds"
    ]
    for s in plan.steps:
        share = "-" if s.fast_share is None else f"about {s.fast_share:.0%}"
        lines.append(
            f"{s.step:>4}  {band_text(s.band_lo, s.band_hi):<20} {s.contractions:>13,} "
            f"{s.likely:>11,} {share:>12}  {s.timings:>5} {s.trainings:>7} {s.train_gmacs:>9,.0f}  "
            f"{s.binds}"
        )
    floor = f"{plan.floor_params:,} parameters"
    if plan.floor_ratio is not None:
        floor += f" at {plan.floor_ratio:.2f}x the seed's throughput"
    lines += [
        "contractions: of the seed in the band, exact; on the way: of the incumbents that a plan "
        "without training meets; fast enough: an estimate",
        f"the space reaches from {floor} (measured) to {plan.ceiling_params:,} parameters",
        f"work: {plan.work.timings} timings, {plan.work.trainings} trainings of "
        f"{plan.work.train_gmacs:,.0f} GMACs in all, the teacher beside them",
        f"estimated: {plan.hours:.2f} device-hours here ({plan.pace.gmacs_per_s:,.1f} GMACs/s of "
        f"training, {plan.pace.timing_s:.1f} s a timing; less where the cache helps) and "
        f"{plan.disk_bytes / 1e6:,.0f} MB of disk at most",
        f"throughput estimated from MACs over {plan.pace.measured} timed archs, "
        f"+-{math.expm1(plan.pace.spread):.0%} (one standard deviation)",
    ]
    if plan.trust is not None:
        lines.append(
            f"of this the trust report, after a run that reaches its target: {plan.trust.timings} "
            f"timings, {plan.trust.trainings} trainings of {plan.trust.train_gmacs:,.0f} GMACs"
        )
    if plan.stuck is not None:
        lines.append(f"warning: {plan.stuck}")
    return "\n".join(lines)
