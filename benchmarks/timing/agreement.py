"""Our throughput ratios against timm's own method, and how far either spreads over repeats."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.estimates import write_table
from nas.core.progress import Console
from nas.core.requirement import Setting
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interleave import Bounds, measure_rounds, settle
from nas.measure.intervals import median_interval, quantile
from space import Context, get_family

Timers = dict[str, Callable[[int], list[float]]]

TIMM_WARM_UP, TIMM_PASSES = 10, 40
"""What timm's benchmark.py does by default for inference."""
BLOCKS, MIN_BLOCK_S = 12, 0.06
"""Blocks of one of our ratios, and their least length."""
LOADS = ("none", "one core now and then")


@dataclass(frozen=True)
class AgreementRow:
    """One comparison. `part` is "agreement" (medians over rounds) or "spread" (over repeats).

    `ratio` with its interval is images/s of `arch` over those of 21M. `spread` is the 5 % to 95 %
    range of the repeats' ratios over their median; `difference` is from timm's ratio, as a share.
    """

    part: str
    dtype: str
    load: str
    arch: str
    method: str
    repeats: int
    ratio: float
    ratio_lo: float
    ratio_hi: float
    spread: float | None
    difference: float | None
    seconds: float
    batch: int
    img_size: int


@contextmanager
def busy_core(on: bool, random_seed: int) -> Iterator[None]:
    """Keep one core busy now and then: half to two seconds on, as long off."""
    if not on:
        yield
        return
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_burn, args=(random_seed,), daemon=True)
    process.start()
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.join()


def _burn(random_seed: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rng = random.Random(random_seed)
    while True:
        until = time.perf_counter() + rng.uniform(0.5, 2.0)
        while time.perf_counter() < until:
            pass
        time.sleep(rng.uniform(0.5, 2.0))


def timers(archs: Sequence[str], batch: int, dtype: str, size: int) -> Timers:
    """Prepare published archs in eager mode and return their timers."""
    from nas.measure.throughput import prepare

    family, ctx = get_family("tinyvit"), Context(img_size=size, num_classes=1000)
    setting = Setting("cpu", "eager", dtype, batch)
    return {
        name: prepare(family.build(family.seed(name), ctx), ctx=ctx, setting=setting).ready.timer
        for name in archs
    }


def method_ratios(method: str, at: Timers, batch: int) -> dict[str, float]:
    """Return images/s relative to the 21M's, by timm's method or by ours."""
    names = [name for name in at if name != "21M"]
    if method == "timm":
        paces = {}
        for name, timer in at.items():
            timer(TIMM_WARM_UP)
            paces[name] = batch * TIMM_PASSES / math.fsum(timer(TIMM_PASSES))
        return {name: paces[name] / paces["21M"] for name in names}
    found = {}
    for name in names:
        sides, blocks = [at[name], at["21M"]], {"blocks": BLOCKS, "max_blocks": BLOCKS}
        measured = measure_rounds(
            sides, batch=batch, bounds=Bounds(), min_block_s=MIN_BLOCK_S, **blocks
        )
        assert measured.ratio is not None
        found[name] = measured.ratio.median
    return found


def agreement(given: argparse.Namespace, console: Console) -> list[AgreementRow]:
    """Compare the ratios by both methods, round by round, for each dtype."""
    import torch

    rows = []
    for dtype in given.dtype:
        at = timers(("5M", "11M", "21M"), given.batch, dtype, given.img_size)
        found: dict[tuple[str, str], list[float]] = {}
        spent = {"timm": 0.0, "ours": 0.0}
        with torch.inference_mode():
            for number in range(given.rounds):
                for method in list(spent)[:: 1 if number % 2 == 0 else -1]:
                    console.describe(f"{dtype}, {method}")
                    started = time.perf_counter()
                    for arch, ratio in method_ratios(method, at, given.batch).items():
                        found.setdefault((method, arch), []).append(ratio)
                    spent[method] += time.perf_counter() - started
                    console.advance(1.0)
        for (method, arch), ratios in found.items():
            at_median = median_interval(ratios)
            middle, by_timm = at_median.median, statistics.median(found["timm", arch])
            interval = middle, at_median.lo, at_median.hi
            how = ("agreement", dtype, LOADS[0], arch, method, len(ratios), *interval)
            seconds, off = spent[method] / len(ratios), middle / by_timm - 1.0
            rows.append(AgreementRow(*how, None, off, seconds, given.batch, given.img_size))
    return rows


def spread(given: argparse.Namespace, console: Console) -> list[AgreementRow]:
    """Repeat both methods at equal seconds, with and without load, alternating."""
    import torch

    at = timers(("5M", "21M"), given.batch, "float32", given.spread_img_size)
    ratios: dict[tuple[str, str], list[float]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode():
        passes = {name: settle(timer, MIN_BLOCK_S) for name, timer in at.items()}
        for load in LOADS:
            with busy_core(load != "none", given.random_seed):
                for number in range(given.repeats):
                    for method in ("ours", "plain mean")[:: 1 if number % 2 == 0 else -1]:
                        console.describe(f"{method}, load: {load}")
                        started = time.perf_counter()
                        ratio = _one_ratio(method, at, passes)
                        took = time.perf_counter() - started
                        ratios.setdefault((load, method), []).append(ratio)
                        seconds.setdefault((load, method), []).append(took)
                        console.advance(0.5)
    rows = []
    for (load, method), values in ratios.items():
        median = median_interval(values)
        wide = (quantile(values, 0.95) - quantile(values, 0.05)) / median.median
        interval = median.median, median.lo, median.hi
        how = ("spread", "float32", load, "5M", method, len(values), *interval, wide, None)
        each = statistics.mean(seconds[load, method])
        rows.append(AgreementRow(*how, each, given.batch, given.spread_img_size))
    return rows


def _one_ratio(method: str, at: Timers, passes: dict[str, int]) -> float:
    """Return 5M's ratio to 21M; both methods run the same numbers of passes of either network."""
    if method == "plain mean":
        each = {n: math.fsum(at[n](c * BLOCKS)) / (c * BLOCKS) for n, c in passes.items()}
        return each["21M"] / each["5M"]
    own = []
    for number in range(BLOCKS):
        order = list(passes)[:: 1 if number % 2 == 0 else -1]
        each = {name: math.fsum(at[name](passes[name])) / passes[name] for name in order}
        own.append(each["21M"] / each["5M"])
    return statistics.median(own)


def measure_agreement(given: argparse.Namespace) -> dict[str, Any]:
    """Measure agreement and spread, print and write the rows."""
    import torch

    torch.set_num_threads(given.threads)
    console = Console(stream=sys.stderr)
    console.start(2.0 * given.rounds * len(given.dtype) + 2.0 * given.repeats)
    try:
        rows = agreement(given, console) + spread(given, console)
    finally:
        console.stop()
    where = take_fingerprint("cpu", given.threads)
    for row in rows:
        line = f"{row.part:<10} {row.dtype:<9} load: {row.load:<22} {row.arch:>4} {row.method:<11}"
        line += f" {row.ratio:.3f} [{row.ratio_lo:.3f}, {row.ratio_hi:.3f}] x 21M"
        line += "" if row.spread is None else f", 5 to 95 %: {row.spread:.1%} of the median"
        line += f", {row.difference:+.1%} from timm's" if row.difference else ""
        print(f"{line}, {row.seconds:.1f} s each")
    if given.out is not None:
        write_table(given.out, rows, fingerprint=where.id, device=where.describe())
    worst = max(abs(row.difference or 0.0) for row in rows)
    return {"rows": len(rows), "largest_difference": round(worst, 4)}
