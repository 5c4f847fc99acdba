"""Contracting a seed model to a budget, as functions for Python users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nas.contract.plan import Plan
from nas.contract.planning import plan as plan_run
from nas.contract.proxy_check import check_number
from nas.contract.start import run
from nas.contract.work import Outcome
from nas.core.cli import default_cache
from nas.core.config import parse_count
from nas.jobs.means import Means
from space.errors import refuse


def contract(
    seed: str | None = None,
    target_params: str | int | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    max_hours: float | None = None,
    cache_dir: str | Path | None = None,
    finalists: str | Path | None = None,
    trust: int | None = None,
    storage: str | None = None,
    quiet: bool = True,
    console: Any = None,
    executor: Any = None,
    means: Means | None = None,
    **settings: Any,
) -> Outcome:
    """Contract `seed` to `target_params` and leave everything in the run folder `out`.

    `settings` are the fields of `nas.core.config.RunConfig` (`min_speedup=1.5`, `effort="smoke"`,
    ...); those not given follow the effort. With `resume`, `out` is an earlier run's folder and
    only settings that equal its own may be given. `trust` archs are trained longer afterwards, for
    a report on how far the scores can be trusted (`nas.contract.proxy_check`). `means` say where
    jobs run and how
    many at once (`nas.jobs.means`), which changes no answer. `storage` is the address of a
    PostgreSQL database for the study, in place of a `study.db` in the folder. Raises `InputError`
    (a `ValueError` of one line) on bad input. A run that ends stuck or out of time is an
    `Outcome`, not an error.
    """
    given = dict(settings)
    if seed is not None:
        given["seed"] = seed
    if target_params is not None:
        given["target_params"] = parse_count("--target-params", target_params)
    if max_hours is not None and not (max_hours > 0 and max_hours < 1e6):
        raise refuse("--max-hours", max_hours, "a number of hours above 0")
    check_number(trust)
    return run(
        given,
        out=None if out is None else Path(out),
        resume=resume,
        max_hours=max_hours,
        cache=Path(cache_dir) if cache_dir is not None else default_cache(),
        quiet=quiet,
        console=console,
        executor=executor,
        finalists=None if finalists is None else Path(finalists),
        trust=trust,
        storage=storage,
        means=means,
    )


def plan(
    seed: str,
    target_params: str | int,
    *,
    cache_dir: str | Path | None = None,
    trust: int | None = None,
    quiet: bool = True,
    console: Any = None,
    executor: Any = None,
    **settings: Any,
) -> tuple[Plan, str]:
    """Plan `contract` without training: the plan, and the same as text.

    Takes about a minute of measuring; nothing is kept but measurements in the cache.
    """
    check_number(trust)
    given = {"seed": seed, **settings}
    given["target_params"] = parse_count("--target-params", target_params)
    return plan_run(
        given,
        cache=Path(cache_dir) if cache_dir is not None else default_cache(),
        quiet=quiet,
        console=console,
        executor=executor,
        trust=trust,
    )
