"""How good our timings are: against timm's method, as a gate, and as predictions.

`python -m benchmarks.timing agreement`: the ratios of the published models' throughput by timm's own method (the
`benchmark.py` of its repository: ten passes to warm up, then the mean over forty) beside ours, in rounds that
alternate.

`gate`: a network against its own copy, so that the true ratio is 1: passing a bound of 1.03 is a false accept, failing
one of 0.97 a false reject. Live trials time both sides as a run does, simulated ones replay windows of recorded blocks,
both on a quiet machine and beside a process that keeps one core busy now and then; a single mean over the same blocks
(one network first, then the other) stands beside.

`predictor TABLE`: throughput predicted for networks not seen (ten folds), against what parameters and MACs alone would
order, over the whole range and inside a band of +-10 % parameters. TABLE is of
`python -m benchmarks.throughput --space tinyvit --sample 200 --band 5.4M`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import RESAMPLES, Floats, Row, check_at_least, run_command, write_table
from nas.core.cli import Parser
from nas.core.config import parse_count
from nas.core.progress import Console
from nas.core.requirement import Setting
from nas.core.stats import kendall, resampled
from nas.measure.device_table import OK, one_fingerprint, read_rows
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interleave import Bounds, Samples, TimingPlan, measure_rounds, planned_looks, settle, timing_result
from nas.measure.intervals import median_interval
from nas.measure.predict import MODELS, held_out, terms_of
from space import Context, get_family
from space.errors import refuse

Timers = dict[str, Callable[[int], list[float]]]
Verdict = tuple[str, int, float]
"""A verdict, the blocks behind it, the seconds that they took."""

TIMM_WARM_UP, TIMM_PASSES = 10, 40
"""What timm's benchmark.py does by default for inference."""
BLOCKS, MIN_BLOCK_S = 12, 0.06
"""Blocks of one of our ratios, and their least length."""
BOUNDS = (0.97, 1.03)
LOADS = ("none", "one core now and then")


def write_timings(given: argparse.Namespace, rows: Sequence[Row], *names: str) -> None:
    """Write rows to `--out`, if given, with the named flags and this device in each."""
    if given.out is not None:
        where = take_fingerprint("cpu", given.threads)
        conditions = {name: getattr(given, name) for name in names}
        write_table(given.out, rows, **conditions, fingerprint=where.id, device=where.describe())


# Agreement with timm


def timers(archs: Sequence[str], batch: int, dtype: str, size: int) -> Timers:
    """Prepare published archs in eager mode and return their timers."""
    from nas.measure.throughput import prepare

    family, ctx = get_family("tinyvit"), Context(img_size=size, num_classes=1000)
    setting = Setting("cpu", "eager", dtype, batch)
    return {name: prepare(family.build(family.seed(name), ctx), ctx=ctx, setting=setting).ready.timer for name in archs}


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
    plan = TimingPlan(blocks=BLOCKS, max_blocks=BLOCKS, min_block_s=MIN_BLOCK_S)
    for name in names:
        measured = measure_rounds([at[name], at["21M"]], [batch, batch], plan)
        assert measured.ratio is not None
        found[name] = measured.ratio.median
    return found


def compare_methods(given: argparse.Namespace, console: Console) -> list[Row]:
    """Compare the ratios by both methods, round by round; a row for each dtype, arch and method.

    `ratio` with its interval is images/s of `arch` over those of 21M, the median over rounds; `difference` is from
    timm's ratio, as a share.
    """
    import torch

    rows = []
    for dtype in given.dtype:
        at = timers(("5M", "11M", "21M"), given.batch, dtype, given.img_size)
        found: dict[tuple[str, str], list[float]] = {}
        with torch.inference_mode():
            for number in range(given.rounds):
                for method in ("timm", "ours")[:: 1 if number % 2 == 0 else -1]:
                    console.describe(f"{dtype}, {method}")
                    for arch, ratio in method_ratios(method, at, given.batch).items():
                        found.setdefault((method, arch), []).append(ratio)
                    console.advance(1.0)
        for (method, arch), ratios in found.items():
            middle = median_interval(ratios)
            row = {"dtype": dtype, "arch": arch, "method": method, "repeats": len(ratios)}
            row |= {"ratio": middle.median, "ratio_lo": middle.lo, "ratio_hi": middle.hi}
            rows.append({**row, "difference": middle.median / statistics.median(found["timm", arch]) - 1.0})
    return rows


def measure_agreement(given: argparse.Namespace) -> dict[str, Any]:
    """Compare the methods, print and write the rows."""
    import torch

    torch.set_num_threads(given.threads)
    console = Console(stream=sys.stderr)
    console.start(2.0 * given.rounds * len(given.dtype))
    try:
        rows = compare_methods(given, console)
    finally:
        console.stop()
    for row in rows:
        line = "{dtype:<9} {arch:>4} {method:<5} {ratio:.3f} [{ratio_lo:.3f}, {ratio_hi:.3f}] x 21M"
        print(line.format(**row) + f", {row['difference']:+.1%} from timm's")
    write_timings(given, rows, "batch", "img_size")
    worst = max(abs(row["difference"]) for row in rows)
    return {"rows": len(rows), "largest_difference": round(worst, 4)}


# Errors of the gate


@contextmanager
def busy_core(random_seed: int) -> Iterator[None]:
    """Keep one core busy now and then: half to two seconds on, as long off."""
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


def record(sides: Sequence[Any], given: argparse.Namespace) -> list[Samples]:
    """Time blocks of both sides in the order A B B A ...; returns a series each."""
    import torch

    series = [Samples(), Samples()]
    with torch.inference_mode():
        passes = [settle(side.ready.timer, given.min_block_s) for side in sides]
        for number in range(given.recorded):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                took = math.fsum(sides[which].ready.timer(passes[which]))
                series[which].images_per_s.append(given.batch * passes[which] / took)
                series[which].durations_s.append(took)
    return series


def simulate(
    recorded: Sequence[Samples], bound: float, trials: int, looks: list[int], random_seed: int
) -> tuple[list[Verdict], list[Verdict]]:
    """Replay windows of a recording: the trials of the gate, and those of single means.

    The mean of a trial uses as many blocks a side as the gate did there, from the same moment on: first one network's,
    then the other's.
    """
    rng, gate, mean = random.Random(random_seed), list[Verdict](), list[Verdict]()
    length = len(recorded[0].images_per_s)
    for _ in range(trials):
        start = rng.randrange(length - 2 * looks[-1])
        verdict, used = "undecided", looks[-1]
        for used in looks:
            window = [
                Samples(s.images_per_s[start : start + used], s.durations_s[start : start + used]) for s in recorded
            ]
            verdict = timing_result(window, looks, 1).decides(Bounds(ratio=bound))
            if verdict != "undecided":
                break
        seconds = sum(sum(s.durations_s[start : start + used]) for s in recorded)
        gate.append((verdict, used, seconds))
        # A, then B: 2 * used rounds hold `used` blocks of the one and, later, of the other.
        first = recorded[0].images_per_s[start : start + used]
        second = recorded[1].images_per_s[start + used : start + 2 * used]
        mean.append(("pass" if sum(first) >= bound * sum(second) else "fail", used, seconds))
    return gate, mean


def live(sides: Sequence[Any], bound: float, trials: int, given: argparse.Namespace) -> list[Verdict]:
    """Measure as a run does, again and again."""
    from nas.measure.throughput import measure_prepared

    found = []
    plan = TimingPlan(given.blocks, given.max_blocks, given.min_block_s, bounds=Bounds(ratio=bound))
    for _ in range(trials):
        started = time.perf_counter()
        measured = measure_prepared(sides[0], sides[1], plan)
        assert measured.ratio_lo is not None
        assert measured.ratio_hi is not None
        verdict = "pass" if measured.ratio_lo >= bound else "fail" if measured.ratio_hi < bound else "undecided"
        found.append((verdict, measured.blocks, time.perf_counter() - started))
    return found


def gate_row(kind: str, load: str, method: str, bound: float, found: Sequence[Verdict]) -> Row:
    """Summarise the trials against one bound; the true ratio is 1.

    `errors` are the share of passes at 1.03, of fails at 0.97; `error_hi` is the upper end of its exact one-sided 95 %
    interval. `undecided` are trials that the limit of blocks ended.
    """
    from scipy.stats import binomtest

    n, verdicts = len(found), [verdict for verdict, _, _ in found]
    passed, failed = verdicts.count("pass"), verdicts.count("fail")
    wrong = passed if bound > 1.0 else failed
    upper = binomtest(wrong, n, alternative="less").proportion_ci(0.95).high
    row: Row = {"kind": kind, "load": load, "method": method, "bound": bound, "trials": n}
    row |= {"passed": passed, "failed": failed, "undecided": verdicts.count("undecided")}
    row |= {"errors": wrong / n, "error_hi": float(upper), "blocks": statistics.mean(b for _, b, _ in found)}
    return row | {"seconds": statistics.mean(s for _, _, s in found)}


def measure_gate(given: argparse.Namespace) -> dict[str, Any]:
    """Record, simulate and measure live, print and write the rows."""
    import torch

    from nas.measure.throughput import prepare

    check_at_least(given, recorded=3 * given.max_blocks)
    torch.set_num_threads(given.threads)
    looks = planned_looks(given.blocks, given.max_blocks)
    family, ctx = get_family("tinyvit"), Context(img_size=given.img_size, num_classes=1000)
    model, setting = family.build(family.seed(given.arch), ctx), Setting("cpu", "eager", "float32", given.batch)
    sides = [prepare(model, ctx=ctx, setting=setting) for _ in range(2)]
    rows: list[Row] = []

    def add(*row: Any) -> None:
        rows.append(gate_row(*row))
        line = "{kind:<10} load: {load:<22} {method:<12} bound {bound}: {errors:.1%} wrong (below "
        line += "{error_hi:.1%}), {undecided} of {trials} undecided, {blocks:.0f} blocks"
        print(line.format(**rows[-1]), flush=True)

    for load, trials in zip(LOADS, (given.live // 2, given.live_loaded // 2), strict=True):
        with nullcontext() if load == "none" else busy_core(given.random_seed):
            recorded = record(sides, given)
            for bound in BOUNDS if trials else ():
                add("live", load, "gate", bound, live(sides, bound, trials, given))
        for bound in BOUNDS:
            both = simulate(recorded, bound, given.simulated, looks, given.random_seed)
            for method, found in zip(("gate", "single mean"), both, strict=True):
                add("simulated", load, method, bound, found)
    write_timings(given, rows, "arch", "img_size", "batch")
    return {"rows": len(rows), "worst": max(r["errors"] for r in rows if r["method"] == "gate")}


# Predictions


def compare_orders(paces: Floats, scores: dict[str, Floats], name: str) -> list[Row]:
    """Return a row for each way to order the networks, on the same resamples of them.

    `tau` is Kendall's, with measured throughput; intervals are 95 % of a bootstrap over networks. `median_error` and
    `error_95` are of |predicted / measured - 1|; `ahead` is tau less that of the best of parameters and MACs.
    """
    taus = {by: resampled(score, paces, RESAMPLES, 0) for by, score in scores.items()}
    plain = {by: kendall(score, paces) for by, score in scores.items()}
    costs = [by for by in scores if by not in MODELS]
    rows = []
    for by, score in scores.items():
        lo, hi = np.percentile(taus[by], [2.5, 97.5])
        row: Row = {"range": name, "by": by, "networks": len(paces), "tau": plain[by]}
        row |= {"tau_lo": float(lo), "tau_hi": float(hi)}
        row |= dict.fromkeys(("median_error", "error_95", "ahead", "ahead_lo", "ahead_hi"))
        if by in MODELS:
            error = np.abs(score / paces - 1.0)
            row["median_error"], row["error_95"] = map(float, np.percentile(error, [50, 95]))
            row["ahead"] = plain[by] - max(plain[cost] for cost in costs)
            over = taus[by] - np.max([taus[cost] for cost in costs], axis=0)
            row["ahead_lo"], row["ahead_hi"] = map(float, np.percentile(over, [2.5, 97.5]))
        rows.append(row)
    return rows


def measure_predictor(given: argparse.Namespace) -> dict[str, Any]:
    """Predict the networks of a table, print and write the rows. Raises InputError."""
    band = parse_count("--band", given.band)
    rows = [row for row in read_rows(given.table, "TABLE") if row.state == OK and row.spec]
    if len(rows) < 30:
        raise refuse("TABLE", f"{len(rows)} measured networks", "30 at least", "measure more")
    fingerprint = one_fingerprint(rows, str(given.table))
    family = get_family(rows[0].family)
    ctx = Context(img_size=rows[0].img_size, num_classes=rows[0].num_classes)
    archs = [family.arch(json.loads(row.spec)) for row in rows]
    metric = "speedup" if all(row.measured.ratio is not None for row in rows) else "images_per_s"
    paces = np.array([row.measured.interval(metric)[0] for row in rows])
    terms = terms_of(family, archs, ctx)
    scores = {name: 1.0 / held_out(fit, terms, 1.0 / paces) for name, fit in MODELS.items()}
    params = np.array([family.count_params(arch, ctx) for arch in archs], dtype=float)
    scores["parameters"] = -params
    scores["MACs"] = -np.array([family.count_macs(arch, ctx) for arch in archs], dtype=float)
    found = compare_orders(paces, scores, "whole range")
    inside = (params >= 0.9 * band) & (params <= 1.1 * band)
    if inside.sum() >= 10:
        within = {by: score[inside] for by, score in scores.items()}
        found += compare_orders(paces[inside], within, f"{band / 1e6:g}M +-10 %")
    for row in found:
        line = "{range:<14} {by:<16} {networks:>4} networks  tau {tau:.3f} [{tau_lo:.3f}, {tau_hi:.3f}]"
        if row["ahead"] is not None:
            line += "  error {median_error:.1%}, 95 % below {error_95:.1%}"
            line += "  ahead {ahead:+.3f} [{ahead_lo:+.3f}, {ahead_hi:+.3f}]"
        print(line.format(**row))
    if given.out is not None:
        write_table(given.out, found, fingerprint=fingerprint, device=rows[0].on_device_name)
    models = [r for r in found if r["by"] in MODELS and r["range"] == "whole range"]
    best = max(models, key=lambda row: row["tau"])
    return {"rows": len(found), "best": best["by"], "tau": round(best["tau"], 4)}


# Command line


def build_parser() -> Parser:
    """Return the parser."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.timing", description=__doc__, formatter_class=raw)
    parts = parser.add_subparsers(dest="part", required=True)

    def part(name: str, work: Callable[[argparse.Namespace], dict[str, Any]]) -> Callable[..., Any]:
        sub = parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(work=work)
        sub.add_argument("--out", type=Path, metavar="FILE", help="the table, as CSV")
        return sub.add_argument

    add = part("agreement", measure_agreement)
    add("--dtype", nargs="+", default=["float32", "bfloat16"], help="of weights and images")
    add("--img-size", type=int, default=224, metavar="PX", help="pixels")
    add("--batch", type=int, default=1, metavar="N", help="images")
    add("--threads", type=int, default=2, metavar="N", help="of this process")
    add("--rounds", type=int, default=7, metavar="N", help="of both methods")
    add = part("gate", measure_gate)
    add("--arch", default="5M", help="compared with its own copy")
    add("--img-size", type=int, default=48, metavar="PX", help="pixels")
    add("--batch", type=int, default=4, metavar="N", help="images")
    add("--threads", type=int, default=1, metavar="N", help="of this process")
    add("--blocks", type=int, default=10, metavar="N", help="at least")
    add("--max-blocks", type=int, default=80, metavar="N", help="at most")
    add("--min-block-s", type=float, default=0.04, metavar="S", help="seconds of a block")
    add("--recorded", type=int, default=1200, metavar="N", help="blocks recorded")
    add("--simulated", type=int, default=500, metavar="N", help="trials a bound")
    add("--live", type=int, default=50, metavar="N", help="trials, half a bound")
    add("--live-loaded", type=int, default=20, metavar="N", help="beside the load")
    add("--random-seed", type=int, default=0, metavar="N", help="of what is drawn")
    add = part("predictor", measure_predictor)
    add("table", type=Path, metavar="TABLE", help="the CSV of measured networks")
    add("--band", default="5.4M", metavar="N", help="parameters")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part; the last line is JSON. Exit status 0, 2 on bad input."""
    return run_command(build_parser(), lambda given: given.work(given), argv)


if __name__ == "__main__":
    sys.exit(main())
