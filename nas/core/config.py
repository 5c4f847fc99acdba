"""The frozen configuration of a run: what decides its answer, and the dial that sets the sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from nas.core.cpus import MOST_AT_ONCE
from nas.core.requirement import parse_requirement
from space.errors import refuse

EFFORTS: Mapping[str, Mapping[str, Any]] = {
    # The whole job on digits in about a minute and a half on two quiet cores.
    "smoke": {
        "shortlist": 6,
        "proxied": 2,
        "beam": 1,
        "draws": 4,
        "proxy_images": 800,
        "img_size": 48,
        "teacher_epochs": 10,
        "seed_epochs": 3,
        "proxy_epochs": 1,
        "final_epochs": 3,
        "bench_batch": 16,
        "bench_blocks": 6,
        "bench_max_blocks": 12,
    },
    # The README's run: about ten minutes on two quiet cores with the digits.
    "normal": {
        "shortlist": 12,
        "proxied": 3,
        "beam": 2,
        "draws": 3,
        "proxy_images": None,
        "img_size": None,
        "teacher_epochs": 10,
        "seed_epochs": 4,
        "proxy_epochs": 2,
        "final_epochs": 8,
        "bench_batch": 16,
        "bench_blocks": 10,
        "bench_max_blocks": 30,
    },
    # A long run, for a night or a GPU: times 24 and trains eight a step.
    "high": {
        "shortlist": 24,
        "proxied": 8,
        "beam": 3,
        "draws": 3,
        "proxy_images": None,
        "img_size": None,
        "teacher_epochs": 30,
        "seed_epochs": 20,
        "proxy_epochs": 5,
        "final_epochs": 30,
        "bench_batch": 32,
        "bench_blocks": 20,
        "bench_max_blocks": 160,
    },
}
"""Documented constants behind `--effort`; each has a flag of its own."""

STEP_KEEPS: Mapping[str, float] = {"smoke": 0.5, "normal": 0.7, "high": 0.8}
"""What share of the parameters a step keeps, roughly, by effort: 21M to 5M in 2, 4 or 6 steps."""
ROUNDS: Mapping[str, int] = {"smoke": 2, "normal": 4, "high": 6}
"""Steps of a strategy that works in the target's band all along: how often it learns and lists."""
MOST_STEPS = 64

LABEL_CHOICES: Mapping[str, tuple[str, ...]] = {
    "beyond": ("refuse", "cycle"),
    "missing_labels": ("refuse", "skip"),
    "codec": ("plain", "packed"),
    "augment": ("default", "22k", "1k", "finetune", "batched"),
    "distill": ("sparse", "soft", "hard", "token"),
}
"""What the settings about soft labels may be; see `nas.distill`."""
SEARCH_CHOICES: Mapping[str, tuple[str, ...]] = {
    "proxy_init": ("inherit", "scratch"),
    "importance": ("prefix", "l1", "l2", "taylor"),
    "metric": ("top1", "balanced_accuracy", "macro_f1"),
    "choose": ("near", "spread"),
    "strategy": ("contraction", "random", "uniform", "evolution", "tpe", "nsga2", "gp"),
}
"""What the settings about scores and their candidates may be; see `nas.search`, `nas.distill`."""

NO_SLOWER_SLACK = 0.02
"""Without a throughput constraint, a contraction may measure this much slower than its parent."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the answer of a run. Two runs of equal configuration, measurements
    and threads end with the same arch, score and weights.

    Sizes are counts; `max_broken` and `params_tolerance` are shares; `min_throughput` is images/s
    at `bench_batch` and `bench_dtype`; `min_speedup` is a ratio to the seed's throughput; `require`
    are further requirements as `nas.core.requirement` reads them. `device_table` are files of
    measurements made on the device that the result is for, when it is not this one.
    """

    seed: str
    target_params: int
    seed_arch: Mapping[str, Any] = field(default_factory=dict)
    family: str = "tinyvit"
    params_tolerance: float = 0.10
    min_throughput: float | None = None
    min_speedup: float | None = None
    require: tuple[str, ...] = ()
    device_table: tuple[str, ...] = ()
    data: str = "digits"
    img_size: int | None = None
    proxy_images: int | None = None
    max_broken: float = 0.01
    pixel_cache: bool = True
    teacher: str = "auto"
    labels: str | None = None
    label_epochs: int | None = None
    beyond: str = "refuse"
    missing_labels: str = "refuse"
    topk: int | None = None
    codec: str = "packed"
    augment: str = "default"
    distill: str = "sparse"
    seed_weights: str | None = None
    strategy: str = "contraction"
    choose: str = "near"
    freeze: tuple[str, ...] = ()
    metric: str = "top1"
    proxy_init: str = "inherit"
    importance: str = "l1"
    racing: bool = True
    anchors: bool = True
    effort: str = "normal"
    steps: int = 4
    shortlist: int = 12
    proxied: int = 3
    beam: int = 2
    draws: int = 3
    teacher_epochs: int = 10
    seed_epochs: int = 4
    proxy_epochs: int = 2
    final_epochs: int = 8
    batch_size: int = 32
    bench_batch: int = 16
    bench_blocks: int = 10
    bench_max_blocks: int = 30
    bench_dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    random_seed: int = 0
    bench_runtime: str = "eager"
    bench_device: str | None = None
    measurements: str | None = None
    replay: str | None = None
    measurement_cache: bool = True

    def __post_init__(self) -> None:
        check_config(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, the inverse of `config_from_dict`."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def config_from_dict(data: Mapping[str, Any]) -> RunConfig:
    """Rebuild a configuration from `run.json`; unknown or missing keys are refused."""
    names = {f.name for f in dataclasses.fields(RunConfig)}
    unknown = sorted(set(data) - names)
    missing = sorted({"seed", "target_params"} - set(data))
    if unknown or missing:
        raise refuse(
            "run.json: config",
            f"unknown {unknown} and missing {missing} settings",
            "the settings of this version",
            "start a new run in another folder",
        )
    settings = {"choose": "spread", **data}  # as it was before there was a choice
    for name in ("require", "device_table", "freeze"):
        settings[name] = tuple(settings.get(name, ()))
    return RunConfig(**settings)


def with_effort(effort: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one effort, overridden by those that the user gave."""
    if effort not in EFFORTS:
        raise refuse("--effort", effort, f"one of {', '.join(EFFORTS)}")
    return {**EFFORTS[effort], **given, "effort": effort}


def steps_of(effort: str, params: int, target_params: int) -> int:
    """Return how many steps an effort takes from one number of parameters to another.

    Steps as long as the way asks for, rather than a fixed number of them: on a short way, many
    small steps spend trainings on archs that are not yet in the target's band.
    """
    steps = round(math.log(target_params / params) / math.log(STEP_KEEPS[effort]))
    return min(max(steps, 1), MOST_STEPS)


def flag(name: str) -> str:
    """Return the command-line spelling of a setting: `target_params` -> `--target-params`."""
    negated = name in ("anchors", "pixel_cache", "measurement_cache", "racing")
    return ("--no-" if negated else "--") + name.replace("_", "-")


def _whole(config: RunConfig, name: str, least: int, most: int | None = None) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refuse(flag(name), value, f"an integer >= {least}")
    if most is not None and value > most:
        raise refuse(flag(name), value, f"an integer <= {most}")


def check_config(config: RunConfig) -> None:
    """Refuse a configuration that could not run, naming the flag (house rule 2)."""
    _whole(config, "target_params", 1)
    for name in ("shortlist", "proxied", "beam", "draws", "bench_batch"):
        _whole(config, name, 1, 100_000)
    _whole(config, "steps", 1, MOST_STEPS)
    for name in ("teacher_epochs", "seed_epochs", "proxy_epochs", "final_epochs"):
        _whole(config, name, 1, 100_000)
    _whole(config, "bench_blocks", 6, 10_000)
    _whole(config, "bench_max_blocks", config.bench_blocks, 100_000)
    _whole(config, "batch_size", 2, 65_536)
    _whole(config, "threads", 1, MOST_AT_ONCE)
    _whole(config, "random_seed", 0, 2**31 - 1)
    least = {"img_size": 16, "proxy_images": 20, "topk": 1, "label_epochs": 1}
    for name, low in least.items():
        if getattr(config, name) is not None:
            _whole(config, name, low)
    for name, choices in LABEL_CHOICES.items():
        if getattr(config, name) not in choices:
            raise refuse(flag(name), getattr(config, name), f"one of {', '.join(choices)}")
    for name in ("min_throughput", "min_speedup"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            unit = "images/s" if name == "min_throughput" else "a ratio to the seed, such as 1.9"
            raise refuse(flag(name), value, f"a number above 0 ({unit})")
    if config.bench_dtype not in ("float32", "bfloat16", "float16"):
        raise refuse("--bench-dtype", config.bench_dtype, "float32, bfloat16 or float16")
    kind, _, index = config.device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or config.device == "cpu:":
        raise refuse("--device", config.device, "cpu, cuda or cuda:N")
    if isinstance(config.require, str) or not all(isinstance(r, str) for r in config.require):
        raise refuse("--require", config.require, "a list of requirements")
    for text in config.require:
        parse_requirement(text, dtype=config.bench_dtype, batch=config.bench_batch)
    if not 0.0 <= config.params_tolerance < 1.0:
        raise refuse("--params-tolerance", config.params_tolerance, "a share in [0, 1)")
    if not 0.0 <= config.max_broken < 1.0:
        raise refuse("--max-broken", config.max_broken, "a share in [0, 1), such as 0.01 or 1%")
    if config.proxied > config.shortlist:
        raise refuse(
            "--proxied",
            config.proxied,
            f"at most --shortlist={config.shortlist}",
            "lower one or raise the other",
        )
    if config.beam > config.proxied:
        raise refuse("--beam", config.beam, f"at most --proxied={config.proxied}")
    for name, choices in SEARCH_CHOICES.items():
        if getattr(config, name) not in choices:
            raise refuse(flag(name), getattr(config, name), f"one of {', '.join(choices)}")
    if isinstance(config.freeze, str) or not all(isinstance(name, str) for name in config.freeze):
        raise refuse("--freeze", config.freeze, "a list of factors, slots or parts")
    if config.labels is not None and config.teacher != "auto":
        raise refuse(
            "--labels with --teacher",
            f"{config.labels} and {config.teacher}",
            "one of the two, as a store already holds its teacher's labels",
            "drop --teacher",
        )


_SUFFIXES = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000, "g": 1_000_000_000}


def parse_count(name: str, text: str | int) -> int:
    """Parse a parameter count: `5M`, `5.4m`, `350K`, `5_000_000` or `5e6`; refuse the rest."""
    shown = str(text).strip()
    body, scale = shown, 1
    if body and body[-1].lower() in _SUFFIXES:
        scale = _SUFFIXES[body[-1].lower()]
        body = body[:-1]
    try:
        value = Decimal(body.replace("_", "")) * scale
    except InvalidOperation:
        value = Decimal("nan")
    if not (value.is_finite() and 1 <= value <= 10**15):
        raise refuse(name, shown, "a count above 0 such as 5M, 350K or 5400000")
    return round(value)


def parse_share(name: str, text: str | float) -> float:
    """Parse a share: `0.01` or `1%`."""
    shown = str(text).strip()
    try:
        value = float(shown[:-1]) / 100 if shown.endswith("%") else float(shown)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise refuse(name, shown, "a share in [0, 1) such as 0.01 or 1%")
    return value
