"""The frozen configuration of a run: what decides its answer, and the dial that sets the sizes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from nas.core.augment_config import AugmentConfig
from nas.core.cli import MOST_AT_ONCE
from nas.core.data_config import DataConfig
from nas.core.requirement import parse_requirement
from nas.core.settings import EFFORTS, changed_setting, check_settings, parse_share, setting, settings_of
from space.errors import refuse

STEP_KEEPS: Mapping[str, float] = {"smoke": 0.5, "normal": 0.7, "high": 0.8}
"""What share of the parameters a step keeps, roughly, by effort: 21M to 5M in 2, 4 or 6 steps."""
ROUNDS: Mapping[str, int] = {"smoke": 2, "normal": 4, "high": 6}
"""Steps of a strategy that works in the target's band all along: how often it learns and lists."""
MOST_STEPS = 64

NO_SLOWER_SLACK = 0.02
"""Without a throughput constraint, a contraction may measure this much slower than its parent."""


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


@dataclass(frozen=True, kw_only=True)
class RunConfig(AugmentConfig, DataConfig):
    """Everything that decides the answer of a run.

    Two runs of equal configuration, measurements and threads end with the same arch, score and weights. Settings with
    `efforts` take their default from `effort` (`with_effort`).
    """

    data: str = changed_setting(DataConfig, "data", default="digits")
    img_size: int | None = changed_setting(
        DataConfig, "img_size", efforts=(48, None, None), default_text="smoke 48, else from data"
    )
    max_images: int | None = changed_setting(
        DataConfig, "max_images", low=20, efforts=(800, None, None), default_text="smoke 800, else 10000"
    )
    seed: str = setting(
        MISSING, "where contraction starts: 5M, 11M, 21M, or a JSON file", group="what to reach", metavar="ARCH"
    )
    target_params: int = setting(MISSING, "parameters to reach: 5M, 350K, ...", metavar="N", low=1, parse=parse_count)
    seed_arch: Mapping[str, Any] = field(default_factory=dict)
    params_tolerance: float = setting(
        0.10, "the target is a band of this share either way", metavar="SHARE", parse=parse_share, low=0.0
    )
    min_throughput: float | None = setting(
        None,
        "least throughput on the device",
        metavar="IMAGES_PER_S",
        above=0.0,
        want="a number above 0 (images/s)",
        default_text="no such bound",
    )
    min_speedup: float | None = setting(
        None,
        "least throughput relative to the seed, timed interleaved; with neither bound, a "
        "contraction may not be slower than its parent, less 2 %",
        metavar="RATIO",
        above=0.0,
        want="a number above 0 (a ratio to the seed, such as 1.9)",
        default_text="no such bound",
    )
    require: tuple[str, ...] = setting(
        (),
        "METRIC>=VALUE@DEVICE[:RUNTIME][:DTYPE][:bBATCH], may be repeated: "
        "'speedup>=1.9@cpu:onnxruntime:b1', 'images_per_s>=3000@cuda:b256', "
        "'latency_ms<=20@cpu:b1', 'latency_p99_ms<=30@cpu', 'peak_mem_mb<=400@cpu:b1', "
        "'macs<=1.2G', 'params<=5.2M'",
        metavar="REQUIREMENT",
        want="a list of requirements",
    )
    device_table: tuple[str, ...] = setting(
        (),
        "measurements of a device that is not this one, made there by python -m "
        "benchmarks.throughput; what it has not measured is predicted, and nothing is promised "
        "before the finalists are measured there (--final-measurements)",
        metavar="FILE",
        many=True,
    )
    family: str = setting("tinyvit", "kind of model")
    teacher: str = setting(
        "auto", "auto, a timm name, MODEL:FILE, a checkpoint, a folder", group="teacher and labels", metavar="MODEL"
    )
    labels: str | None = setting(None, "use this soft-label store", metavar="STORE")
    label_epochs: int | None = setting(
        None, "epochs of labels to store", metavar="N", low=1, default_text="those of the longest training"
    )
    label_overflow: str = setting(
        "error", "training past the stored epochs", metavar="POLICY", choices=("error", "cycle")
    )
    missing_labels: str = setting(
        "error", "images without a label in --labels", metavar="POLICY", choices=("error", "skip")
    )
    topk: int | None = setting(
        None,
        "classes kept a label",
        metavar="K",
        low=1,
        default_text="10, or 100 of more than 10,000; at most classes-1",
    )
    codec: str = setting("packed", "records", choices=("plain", "packed"))
    augment: str = setting(
        "default", "augmentation", metavar="PRESET", choices=("default", "22k", "1k", "finetune", "batched")
    )
    distill: str = setting(
        "sparse",
        "what seed, candidates and winner learn: the teacher's stored labels alone (sparse), or "
        "half the true labels and half the teacher's: soft (KL), hard (its best class), token "
        "(hard, on the distillation token's own head; without a token as hard); scores stay the "
        "loss against the teacher's labels",
        metavar="KIND",
        choices=("sparse", "soft", "hard", "token"),
    )
    seed_weights: str | None = setting(
        None, "start the seed from a file, a folder or a timm tag", metavar="FILE|TAG", default_text="from scratch"
    )
    effort: str = setting(
        "normal", "sets what names the efforts as its defaults", group="how hard to look", choices=EFFORTS
    )
    steps: int = setting(
        4,
        "steps from seed to target",
        metavar="N",
        low=1,
        high=MOST_STEPS,
        default_text="as many as cut about this share each: "
        + ", ".join(f"{effort} {1 - keeps:.0%}" for effort, keeps in STEP_KEEPS.items()),
    )
    candidates_per_step: int = setting(
        12, "candidates timed a step", metavar="N", low=1, high=100_000, efforts=(6, 12, 24)
    )
    train_per_step: int = setting(3, "candidates trained a step", metavar="N", low=1, high=100_000, efforts=(2, 3, 8))
    beam: int = setting(2, "incumbents kept a step", metavar="N", low=1, high=100_000, efforts=(1, 2, 3))
    max_draws: int = setting(
        3, "shortlists drawn before a step is stuck", metavar="N", low=1, high=100_000, efforts=(4, 3, 3)
    )
    teacher_epochs: int = setting(
        10, "epochs of the auto teacher", metavar="N", low=1, high=100_000, efforts=(10, 10, 30)
    )
    seed_epochs: int = setting(4, "epochs of the seed", metavar="N", low=1, high=100_000, efforts=(3, 4, 20))
    proxy_epochs: int = setting(2, "epochs of a candidate", metavar="N", low=1, high=100_000, efforts=(1, 2, 5))
    final_epochs: int = setting(
        8, "epochs of the final comparison", metavar="N", low=1, high=100_000, efforts=(3, 8, 30)
    )
    batch_size: int = setting(32, "training batch", metavar="N", low=2, high=65_536)
    proxy_init: str = setting(
        "inherit", "where a candidate starts, its parent's sliced weights or fresh ones", choices=("inherit", "scratch")
    )
    strategy: str = setting(
        "contraction",
        "what lists the candidates; all but contraction look inside the target's band at once",
        metavar="NAME",
        choices=("contraction", "random", "uniform", "evolution", "tpe", "nsga2", "gp"),
    )
    selection: str = setting(
        "nearest",
        "which of contraction's candidates are trained, the nearest to their parent first or those that differ most",
        metavar="HOW",
        choices=("nearest", "diverse"),
    )
    importance: str = setting(
        "l1",
        "which units and blocks of its parent a child takes",
        metavar="NAME",
        choices=("prefix", "l1", "l2", "taylor"),
    )
    racing: bool = setting(True, "train every candidate to the end, also those that cannot win any more")
    freeze: tuple[str, ...] = setting(
        (),
        "keep a factor, a slot or a stage as it is, may be repeated: window_sizes, 'embed_dims[3]', stage1",
        metavar="PART",
        want="a list of factors, slots or parts",
    )
    metric: str = setting(
        "top1",
        "the score; with balanced_accuracy and macro_f1 every class counts alike",
        metavar="NAME",
        choices=("top1", "balanced_accuracy", "macro_f1"),
    )
    baselines: bool = setting(True, "do not add uniform scaling and published archs to the shortlists")
    device: str = setting("cpu", "cpu, cuda or cuda:N", group="device and measuring")
    threads: int = setting(1, "torch threads", metavar="N", low=1, high=MOST_AT_ONCE, default_text="the usable CPUs")
    bench_batch: int = setting(16, "images a pass", metavar="N", low=1, high=100_000, efforts=(16, 16, 32))
    bench_runtime: str = setting(
        "eager",
        "what executes the networks that are timed: eager, eager-fused, compile, onnxruntime, openvino, ...",
        metavar="NAME",
    )
    bench_device: str | None = setting(None, "where they are timed", default_text="the --device")
    measurement_cache: bool = setting(
        True, "time everything anew instead of taking what earlier runs measured on this device"
    )
    bench_dtype: str = setting("float32", "their arithmetic", choices=("float32", "bfloat16", "float16"))
    visits: int = setting(
        4, "fresh processes that time a network, at least", metavar="N", low=4, high=1_000, efforts=(4, 4, 6)
    )
    max_visits: int = setting(
        8, "at most, while a requirement is undecided", metavar="N", low=4, high=1_000, efforts=(8, 8, 24)
    )
    measurements: str | None = setting(
        None, "reuse the measurements of equal fingerprint from another run's measurements.csv", metavar="FILE"
    )
    replay: str | None = setting(
        None, "answer from what an earlier run measured and scored, training only what is missing", metavar="DIR"
    )
    random_seed: int = setting(0, "of every draw", metavar="N", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_visits < self.visits:
            raise refuse("--max-visits", self.max_visits, f"an integer >= --visits={self.visits}")
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise refuse("--device", self.device, "cpu, cuda or cuda:N")
        for text in self.require:
            parse_requirement(text, dtype=self.bench_dtype, batch=self.bench_batch)
        for name in ("params_tolerance", "max_corrupt"):
            if getattr(self, name) >= 1.0:
                raise refuse(flag(name), getattr(self, name), "a share in [0, 1), such as 0.01 or 1%")
        for name, most in (("train_per_step", "candidates_per_step"), ("beam", "train_per_step")):
            value, limit = getattr(self, name), getattr(self, most)
            if value > limit:
                raise refuse(flag(name), value, f"at most {flag(most)}={limit}", "lower one or raise the other")
        if self.labels is not None and self.teacher != "auto":
            raise refuse(
                "--labels with --teacher",
                f"{self.labels} and {self.teacher}",
                "one of the two, as a store already holds its teacher's labels",
                "drop --teacher",
            )

    @property
    def images_may_grow(self) -> bool:
        """Whether `max_images` is the effort's default, which grows with the classes."""
        return self.max_images is not None and self.max_images == effort_defaults(self.effort)["max_images"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, the inverse of `config_from_dict`."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
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
    settings = dict(data)
    for each in settings_of(RunConfig):
        if each.kind is tuple and settings.get(each.name) is not None:
            settings[each.name] = tuple(settings[each.name])
    return RunConfig(**settings)


def effort_defaults(effort: str) -> dict[str, Any]:
    """Return the settings that an effort sets. Raises InputError."""
    if effort not in EFFORTS:
        raise refuse("--effort", effort, f"one of {', '.join(EFFORTS)}")
    at = EFFORTS.index(effort)
    return {f.name: f.about.efforts[at] for f in settings_of(RunConfig) if f.about.efforts}


def with_effort(effort: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one effort, overridden by those that the user gave."""
    return {**effort_defaults(effort), **given, "effort": effort}


def choices_of(name: str) -> tuple[str, ...]:
    """Return what a setting of a run may be."""
    return next(f.about.choices for f in settings_of(RunConfig) if f.name == name)


def steps_of(effort: str, params: int, target_params: int) -> int:
    """Return how many steps an effort takes from one number of parameters to another.

    Steps as long as the way asks for, rather than a fixed number of them: on a short way, many small steps spend
    trainings on archs that are not yet in the target's band.
    """
    steps = round(math.log(target_params / params) / math.log(STEP_KEEPS[effort]))
    return min(max(steps, 1), MOST_STEPS)


def flag(name: str) -> str:
    """Return the command-line spelling of a setting: `target_params` -> `--target-params`."""
    return next(field.flag for field in settings_of(RunConfig) if field.name == name)
