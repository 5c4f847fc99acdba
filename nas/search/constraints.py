"""The requirements of a run, and how their bounds tighten from the seed to the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nas.core.config import NO_SLOWER_SLACK, RunConfig
from nas.core.requirement import COUNTED, LATENCIES, Requirement, Setting, parse_requirement
from space.contractions import Band

PACE = ("speedup", "images_per_s", *LATENCIES)
"""Metrics of throughput and latency."""


def requirements_of(config: RunConfig) -> tuple[Requirement, ...]:
    """Return a run's requirements: the short flags first, then `--require` in order."""
    short = (("speedup", config.min_speedup), ("images_per_s", config.min_throughput))
    found = [Requirement(metric, least, bench_setting(config)) for metric, least in short if least is not None]
    named = [parse_requirement(r, dtype=config.bench_dtype, batch=config.bench_batch) for r in config.require]
    return (*found, *named)


def bench_setting(config: RunConfig) -> Setting:
    """Return the setting of the `--bench` flags, which the short flags refer to."""
    device = config.device if config.bench_device is None else config.bench_device
    return Setting(device, config.bench_runtime, config.bench_dtype, config.bench_batch)


def primary_setting(config: RunConfig) -> Setting:
    """Return the setting whose throughput a run's tables and figures show.

    That of the first requirement on throughput, else the one of the `--bench` flags.
    """
    required = (r.setting for r in requirements_of(config) if r.metric in ("speedup", "images_per_s"))
    return next(required, None) or bench_setting(config)


def settings_of(config: RunConfig) -> tuple[Setting, ...]:
    """Return every setting that a run times under, the primary one first, each once."""
    named = (r.setting for r in requirements_of(config) if r.setting is not None)
    return tuple(dict.fromkeys((primary_setting(config), *named)))


@dataclass(frozen=True)
class StepBounds:
    """What a candidate of one step must meet.

    `band` is inclusive, in parameters as built, with the most MACs where they are bounded. `requirements` are the
    measured ones, as tight as this step asks. `least_ratio` is set where a run requires no pace: the least median
    throughput relative to the seed, from the parent's own measurement (2 % slack).
    """

    step: int
    band: Band
    requirements: tuple[Requirement, ...]
    least_ratio: float | None = None

    def under(self, setting: Setting) -> tuple[Requirement, ...]:
        """Return the requirements of one setting."""
        return tuple(r for r in self.requirements if r.setting == setting)

    def describe(self) -> str:
        """Return the requirements as on the command line."""
        return " and ".join(r.text for r in self.requirements)


def band_at(seed_params: int, config: RunConfig, step: int) -> Band:
    """Return the parameter band of a step: geometric from the seed's size to the target.

    The last step's band is the target's own, `target * (1 -+ tolerance)`, cut at a `params<=` requirement.
    """
    centre, tolerance = float(config.target_params), config.params_tolerance
    if step < config.steps:
        centre = seed_params * (config.target_params / seed_params) ** (step / config.steps)
    # The slack keeps float rounding from excluding the user's bound.
    lo = max(1, math.ceil(centre * (1 - tolerance) - 1e-6))
    hi = math.floor(centre * (1 + tolerance) + 1e-6)
    if step == config.steps:
        hi = min([hi, *(math.floor(r.bound) for r in requirements_of(config) if r.metric == "params")])
    return Band(lo=lo, hi=hi)


def tighten(required: Requirement, share: float, seed_value: float) -> Requirement:
    """Return a requirement with the bound at a share of the way from the seed's value.

    Geometric; a seed that meets the bound already is held to it from the first step on.
    """
    bound = required.bound
    start = min(seed_value, bound) if required.sense == ">=" else max(seed_value, bound)
    if share >= 1.0:
        return required
    # Six digits read well in messages, and rounding keeps the order of the steps.
    rounded = float(f"{start * (bound / start) ** share:.6g}")
    return replace(required, bound=min(max(rounded, min(start, bound)), max(start, bound)))


def bounds_at(
    step: int, config: RunConfig, *, seed_params: int, seed_values: Mapping[Requirement, float], parent_ratio: float
) -> StepBounds:
    """Return the bounds of a step. All constraints hold together and tighten geometrically.

    `seed_values` are the seed's own values of what is required, in the metric's unit.
    """
    share = step / config.steps
    required = requirements_of(config)
    at_step = tuple(tighten(r, share, seed_values[r]) for r in required)
    band = band_at(seed_params, config, step)
    most = [math.floor(r.bound + 1e-6) for r in at_step if r.metric == "macs"]
    if most:
        band = replace(band, max_macs=min(most))
    measured = tuple(r for r in at_step if r.metric not in COUNTED)
    least = None
    if not any(r.metric in PACE for r in measured):
        least = parent_ratio * (1 - NO_SLOWER_SLACK)
    return StepBounds(step, band, measured, least)
