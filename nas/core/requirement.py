"""What a user requires of the result, and where: `speedup>=1.9@cpu:onnxruntime:b1`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from space.errors import refuse

DTYPES = ("float32", "bfloat16", "float16")

METRICS = {
    "speedup": ">=",
    "images_per_s": ">=",
    "latency_ms": "<=",
    "latency_p90_ms": "<=",
    "latency_p99_ms": "<=",
    "peak_mem_mb": "<=",
    "macs": "<=",
    "params": "<=",
}
"""What can be required, and the only sense that makes sense of it. Latencies are milliseconds a pass (the median,
unless a percentile is named), `peak_mem_mb` is 10**6 bytes; `speedup` is relative to the seed under the same setting.
"""

COUNTED = ("macs", "params")
"""Metrics that are counted, not measured: they name no device."""

LATENCIES = {"latency_ms": "p50", "latency_p90_ms": "p90", "latency_p99_ms": "p99"}

_FORM = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=|==|=|>|<)\s*([^@\s]+)\s*(?:@\s*(\S+))?\s*")
_EXAMPLE = "METRIC>=VALUE@DEVICE[:RUNTIME][:DTYPE][:bBATCH], such as speedup>=1.9@cpu:eager:b16"


@dataclass(frozen=True)
class Setting:
    """Under which a network is timed on a device; the resolution comes with the arch's context."""

    device: str = "cpu"
    runtime: str = "eager"
    dtype: str = "float32"
    batch: int = 16

    def __post_init__(self) -> None:
        """Refuse what no measurement could be made under."""
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise refuse("device", self.device, "cpu, cuda or cuda:N")
        if self.dtype not in DTYPES:
            raise refuse("--dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise refuse("--batch", self.batch, "an integer >= 1")

    @property
    def text(self) -> str:
        """The setting as it is written on the command line: `cpu:onnxruntime:float32:b1`."""
        return f"{self.device}:{self.runtime}:{self.dtype}:b{self.batch}"


def parse_setting(name: str, text: str, *, dtype: str, batch: int) -> Setting:
    """Read `DEVICE[:RUNTIME][:DTYPE][:bBATCH]`, the parts after the device in any order.

    The runtime's name is checked by the registry of runtimes. Raises `InputError`.
    """
    parts = text.split(":")
    device = parts.pop(0)
    if device == "cuda" and parts and re.fullmatch(r"[0-9]+", parts[0]):
        device += ":" + parts.pop(0)
    runtime, seen = "eager", set()
    for part in parts:
        if re.fullmatch(r"b[0-9]+", part):
            kind, batch = "batch", int(part[1:])
        elif part in DTYPES:
            kind, dtype = "dtype", part
        elif re.fullmatch(r"[a-z][a-z0-9_.-]*", part):
            kind, runtime = "runtime", part
        else:
            raise refuse(name, text, "DEVICE[:RUNTIME][:DTYPE][:bBATCH]", f"'{part}' is none")
        if kind in seen:
            raise refuse(name, text, f"one {kind}", f"'{part}' is a second one")
        seen.add(kind)
    return Setting(device, runtime, dtype, batch)


@dataclass(frozen=True)
class Requirement:
    """A bound on one metric; `setting` is None where the metric is counted."""

    metric: str
    bound: float
    setting: Setting | None

    @property
    def sense(self) -> str:
        """Whether the bound is a least (`>=`) or a most (`<=`)."""
        return METRICS[self.metric]

    @property
    def text(self) -> str:
        """The requirement as it is written on the command line; it reads back exactly."""
        where = "" if self.setting is None else f"@{self.setting.text}"
        return f"{self.metric}{self.sense}{_shown(self.bound)}{where}"


def parse_requirement(text: str, *, dtype: str, batch: int, name: str = "--require") -> Requirement:
    """Read `METRIC>=VALUE@SETTING`; parts that are left out are `dtype`, `batch`, and eager.

    A latency without a batch is that of batch 1. Raises `InputError` saying what is malformed.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise refuse(name, text, _EXAMPLE)
    metric, sense, value, where = found.groups()
    if metric not in METRICS:
        raise refuse(name, text, f"a metric of {', '.join(METRICS)}", f"'{metric}' is none")
    if sense != METRICS[metric]:
        raise refuse(name, text, f"{metric}{METRICS[metric]}...", f"'{sense}' cannot be met here")
    bound = _number(name, text, value, counted=metric in COUNTED)
    if metric in COUNTED:
        if where is not None:
            raise refuse(name, text, f"{metric}{sense}{value}", "a count is the same everywhere")
        return Requirement(metric, bound, None)
    if where is None:
        raise refuse(name, text, _EXAMPLE, "add the device, such as @cpu or @cuda:b256")
    batch = 1 if metric in LATENCIES else batch
    return Requirement(metric, bound, parse_setting(name, where, dtype=dtype, batch=batch))


def _shown(bound: float) -> str:
    if bound.is_integer() and bound < 1e15:
        return f"{bound:.0f}"
    short = f"{bound:.6g}"
    return short if float(short) == bound else repr(bound)


_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


def _number(name: str, text: str, value: str, *, counted: bool) -> float:
    scale = _SUFFIXES.get(value[-1:], 1.0) if counted else 1.0
    body = value[:-1] if scale != 1.0 else value
    try:
        bound = float(body) * scale
    except ValueError:
        bound = math.nan
    if not (0.0 < bound < math.inf):
        raise refuse(name, text, "a number above 0 as the bound", f"'{value}' is none")
    return bound
