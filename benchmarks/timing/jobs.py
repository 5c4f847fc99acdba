"""A process that records blocks of a network and of its reference, and what other methods find there."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass
from typing import Any

from nas.core.progress import Tick
from nas.core.requirement import Setting
from nas.jobs.job import Values
from nas.measure.interleave import keep_freed_memory, settle
from space import Context, get_family

WORKER = (
    sys.executable,
    "-c",
    "import sys; from nas.jobs.worker import main; sys.exit(main(['benchmarks.timing.jobs']))",
)
"""A worker that knows these jobs."""

TIMM_WARM_UP, TIMM_PASSES = 10, 40
"""What timm's benchmark.py does by default for inference."""


@dataclass(frozen=True, kw_only=True)
class RecordJob:
    """Two published archs (a network, its reference) to time: `blocks` of both, in each of `copies` fresh copies.

    With `keep` the process keeps the memory that it frees. With `methods`, timm's and torch's own methods follow.
    """

    archs: tuple[str, str]
    context: Context
    setting: Setting
    blocks: int
    copies: int = 1
    keep: bool = True
    methods: bool = False
    min_block_s: float = 0.06


def record(job: RecordJob, tick: Tick) -> Values:
    """Time in the order A B B A ...

    `{"copies": [[[network_s, reference_s], ...]]}`, seconds an image of each block. With methods also
    `{"timm": ratio, "torch": [ratio, lo, hi]}`: ratios of throughput, torch's with the quartiles of its replicates.
    """
    import torch

    from nas.measure.throughput import prepare

    if job.keep:
        keep_freed_memory()
    family, ctx = get_family("tinyvit"), job.context
    found: list[list[list[float]]] = []
    with torch.inference_mode():
        for _ in range(job.copies):
            models = [family.build(family.seed(name), ctx) for name in job.archs]
            timers = [prepare(model, ctx=ctx, setting=job.setting).ready.timer for model in models]
            passes = [settle(timer, job.min_block_s) for timer in timers]
            rounds = []
            for number in range(job.blocks):
                took = [0.0, 0.0]
                for at in (0, 1) if number % 2 == 0 else (1, 0):
                    took[at] = math.fsum(timers[at](passes[at])) / passes[at] / job.setting.batch
                rounds.append(took)
            found.append(rounds)
        values: dict[str, Any] = {"copies": found}
        if job.methods:
            means, replicates = [], []
            for timer in timers:
                timer(TIMM_WARM_UP)
                means.append(math.fsum(timer(TIMM_PASSES)))
            for timer in timers:
                from torch.utils.benchmark import Timer

                measured = Timer("timer(1)", globals={"timer": timer}).blocked_autorange(min_run_time=0.5)
                replicates.append(statistics.quantiles(measured.times, n=4) if len(measured.times) > 1 else [])
            values["timm"] = means[1] / means[0]
            if all(replicates):
                a, b = replicates
                values["torch"] = [b[1] / a[1], b[0] / a[2], b[2] / a[0]]
    return values
