"""Noise between visits and inside them, and what the intervals make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.estimates import Floats, Row
from nas.measure.intervals import COVERAGE, planned_looks, verdict, visit_interval

BETWEEN, WITHIN = 0.02, 0.05
"""Standard deviations of a visit's ratio and of a block's, as measured on a virtual machine of two cores."""

BLOCKS = 6


def correlated(rng: np.random.Generator, shape: tuple[int, ...], rho: float) -> Floats:
    """Draw unit noise along the last axis, a first-order autoregressive series."""
    fresh = rng.standard_normal(shape)
    for at in range(1, shape[-1]):
        fresh[..., at] = rho * fresh[..., at - 1] + math.sqrt(1.0 - rho**2) * fresh[..., at]
    return fresh


def two_state(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Draw noise of two levels: three in ten are slow, a state lasts about three values."""
    slow = rng.random(shape) < 0.3
    for at in range(1, shape[-1]):
        stays = rng.random(shape[:-1]) < 0.7
        slow[..., at] = np.where(stays, slow[..., at - 1], slow[..., at])
    return 0.3 * rng.standard_normal(shape) + 2.0 * (slow - 0.3)


def noise(name: str, rng: np.random.Generator, trials: int, visits: int) -> tuple[Floats, Floats]:
    """Draw the logarithms of visits' ratios, and the middle of the visits up to each, both `[trials, visits]`."""
    truth = np.zeros((trials, visits))
    blocks = rng.standard_normal((trials, visits, BLOCKS))
    between = rng.standard_normal((trials, visits))
    kind, _, amount = name.partition(" ")
    if kind == "blocks":
        blocks = two_state(rng, blocks.shape) if amount == "two-state" else correlated(rng, blocks.shape, float(amount))
    elif kind == "walk":
        walk = np.cumsum(float(amount) * rng.standard_normal(between.shape), axis=1)
        between, truth = (
            between + walk,
            BETWEEN * np.cumsum(walk, axis=1) / np.arange(1, visits + 1),
        )  # its own middle so far
    elif kind == "two-state":
        between = two_state(rng, between.shape)
        if amount == "alone":
            between = 0.3 * rng.standard_normal(between.shape) + 2.0 * (rng.random(between.shape) < 0.3)
        truth = np.full(between.shape, BETWEEN * float(np.median(between)))
    else:
        between = correlated(rng, between.shape, float(amount))
    return BETWEEN * between + WITHIN * np.median(blocks, axis=2), truth


SCENARIOS = (
    *(f"blocks {rho}" for rho in (0.0, 0.5, 0.8, 0.9)),
    "blocks two-state",
    "walk 0.25",
    "walk 1",
    "two-state alone",
    *(f"visits {rho}" for rho in (0.0, 0.3, 0.5, 0.8, 0.9)),
    "two-state lasting",
)
"""Noise of blocks within visits that are independent, and of the visits themselves."""


def simulate(
    visits: int, max_visits: int, trials: int, random_seed: int, scenarios: Sequence[str] = SCENARIOS
) -> list[Row]:
    """Return a row for each scenario: the coverage at every look together, and wrong and undecided verdicts at a bound.

    `coverage` is that of all looks together: the share of trials in which no look's interval missed the truth. `wrong`
    is the share of trials that decide, either way, on a bound that equals the truth; `half_width` the median of the
    last look, as a share.
    """
    looks = planned_looks(visits, max_visits)
    share = 1.0 - (1.0 - COVERAGE) / len(looks)
    rows: list[Row] = []
    for at, name in enumerate(scenarios):
        logs, truth = noise(name, np.random.default_rng((random_seed, at)), trials, max_visits)
        held = wrong = undecided = 0
        widths = []
        for series, middle in zip(np.exp(logs).tolist(), np.exp(truth).tolist(), strict=True):
            outcome, inside = "undecided", True
            for look in looks:
                of, true = visit_interval(series[:look], share), middle[look - 1]
                inside = inside and of.lo <= true <= of.hi
                if outcome == "undecided":
                    outcome = verdict(of.lo, of.hi, true)
            held, wrong = held + inside, wrong + (outcome != "undecided")
            undecided += outcome == "undecided"
            widths.append((of.hi - of.lo) / (2.0 * of.median))
        row: Row = {"noise": name, "visits": visits, "max_visits": max_visits, "trials": trials}
        row |= {"coverage": held / trials, "wrong": wrong / trials, "undecided": undecided / trials}
        rows.append({**row, "half_width": float(np.median(widths))})
    return rows


def spread_by_level(recorded: Sequence[Sequence[Sequence[Floats]]]) -> dict[str, float]:
    """Return the standard deviations that blocks, copies, processes and rounds of minutes add, as shares.

    `recorded[minute][process][copy]` are logarithms of the ratios of blocks. A level's own variance is what its means
    vary by beyond what the level below explains, 0 at least.
    """
    copies = [np.array([[np.median(copy) for copy in process] for process in minute]) for minute in recorded]
    block = float(np.median([np.std(copy, ddof=1) for minute in recorded for process in minute for copy in process]))
    per_copy = (
        float(np.mean([np.var(minute, axis=1, ddof=1).mean() for minute in copies])) if copies[0].shape[1] > 1 else 0.0
    )
    processes = [minute.mean(axis=1) for minute in copies]
    count = copies[0].shape[1]
    per_process = max(0.0, float(np.mean([np.var(each, ddof=1) for each in processes])) - per_copy / count)
    per_minute = 0.0
    if len(processes) > 1:
        below = float(np.mean([np.var(each, ddof=1) for each in processes])) / len(processes[0])
        per_minute = max(0.0, float(np.var([each.mean() for each in processes], ddof=1)) - below)
    levels = {"copy_sd": per_copy, "process_sd": per_process, "minute_sd": per_minute}
    return {"block_sd": block, **{name: math.sqrt(value) for name, value in levels.items()}}
