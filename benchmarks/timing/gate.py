"""Wrong verdicts of the throughput gate, on a network against its own copy."""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.estimates import check_at_least, write_table
from benchmarks.timing.agreement import LOADS, busy_core
from nas.core.requirement import Setting
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interleave import Bounds, Series, planned_looks, settle, timed_of
from space import Context, get_family

Verdict = tuple[str, int, float]
"""A verdict, the blocks behind it, the seconds that they took."""

BOUNDS = (0.97, 1.03)


@dataclass(frozen=True)
class GateRow:
    """Verdicts of many trials against one bound; the true ratio is 1.

    `errors` are passes at 1.03, fails at 0.97; `error_hi` is the upper end of its exact one-sided
    95 % interval. `undecided` are trials that the limit of blocks ended.
    """

    kind: str
    load: str
    method: str
    bound: float
    trials: int
    passed: int
    failed: int
    undecided: int
    errors: float
    error_hi: float
    blocks: float
    seconds: float


def record(sides: Sequence[Any], batch: int, given: argparse.Namespace) -> list[Series]:
    """Time blocks of both sides in the order A B B A ...; returns a series each."""
    import torch

    series = [Series(), Series()]
    with torch.inference_mode():
        passes = [settle(side.ready.timer, given.min_block_s) for side in sides]
        for number in range(given.recorded):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                took = math.fsum(sides[which].ready.timer(passes[which]))
                series[which].images_per_s.append(batch * passes[which] / took)
                series[which].pieces_s.append(took)
    return series


def simulate(
    recorded: Sequence[Series], bound: float, trials: int, looks: list[int], random_seed: int
) -> tuple[list[Verdict], list[Verdict]]:
    """Replay windows of a recording: the trials of the gate, and those of single means.

    The mean of a trial uses as many blocks a side as the gate did there, from the same moment on:
    first one network's, then the other's.
    """
    rng, gate, mean = random.Random(random_seed), list[Verdict](), list[Verdict]()
    length = len(recorded[0].images_per_s)
    for _ in range(trials):
        start = rng.randrange(length - 2 * looks[-1])
        verdict, used = "undecided", looks[-1]
        for used in looks:
            window = [
                Series(s.images_per_s[start : start + used], s.pieces_s[start : start + used])
                for s in recorded
            ]
            verdict = timed_of(window, looks, 1).decides(Bounds(ratio=bound))
            if verdict != "undecided":
                break
        seconds = sum(sum(s.pieces_s[start : start + used]) for s in recorded)
        gate.append((verdict, used, seconds))
        # A, then B: 2 * used rounds hold `used` blocks of the one and, later, of the other.
        first = recorded[0].images_per_s[start : start + used]
        second = recorded[1].images_per_s[start + used : start + 2 * used]
        mean.append(("pass" if sum(first) >= bound * sum(second) else "fail", used, seconds))
    return gate, mean


def live(
    sides: Sequence[Any], bound: float, trials: int, given: argparse.Namespace
) -> list[Verdict]:
    """Measure as a run does, again and again."""
    from nas.measure.throughput import measure_prepared

    found = []
    for _ in range(trials):
        started = time.perf_counter()
        measured = measure_prepared(
            sides[0],
            sides[1],
            bounds=Bounds(ratio=bound),
            blocks=given.blocks,
            max_blocks=given.max_blocks,
            min_block_s=given.min_block_s,
        )
        assert measured.ratio_lo is not None
        assert measured.ratio_hi is not None
        low, high = measured.ratio_lo >= bound, measured.ratio_hi < bound
        verdict = "pass" if low else "fail" if high else "undecided"
        found.append((verdict, measured.blocks, time.perf_counter() - started))
    return found


def gate_row(kind: str, load: str, method: str, bound: float, found: Sequence[Verdict]) -> GateRow:
    """Summarise the trials against one bound."""
    from scipy.stats import binomtest

    n, verdicts = len(found), [verdict for verdict, _, _ in found]
    passed, failed, undecided = map(verdicts.count, ("pass", "fail", "undecided"))
    wrong = passed if bound > 1.0 else failed
    upper = float(binomtest(wrong, n, alternative="less").proportion_ci(0.95).high)
    means = statistics.mean(b for _, b, _ in found), statistics.mean(s for _, _, s in found)
    counts = (n, passed, failed, undecided, wrong / n, upper)
    return GateRow(kind, load, method, bound, *counts, *means)


def measure_gate(given: argparse.Namespace) -> dict[str, Any]:
    """Record, simulate and measure live, print and write the rows."""
    import torch

    from nas.measure.throughput import prepare

    check_at_least(given, recorded=3 * given.max_blocks)
    torch.set_num_threads(given.threads)
    looks = planned_looks(given.blocks, given.max_blocks)
    family, ctx = get_family("tinyvit"), Context(img_size=given.img_size, num_classes=1000)
    model, setting = (
        family.build(family.seed(given.arch), ctx),
        Setting("cpu", "eager", "float32", given.batch),
    )
    sides = [prepare(model, ctx=ctx, setting=setting) for _ in range(2)]
    rows: list[GateRow] = []

    def add(*row: Any) -> None:
        rows.append(gate_row(*row))
        one = rows[-1]
        print(
            f"{one.kind:<10} load: {one.load:<22} {one.method:<12} bound {one.bound}: "
            f"{one.errors:.1%} wrong (below {one.error_hi:.1%}), {one.undecided} of {one.trials} "
            f"undecided, {one.blocks:.0f} blocks, {one.seconds:.1f} s",
            flush=True,
        )

    for load, trials in zip(LOADS, (given.live // 2, given.live_loaded // 2), strict=True):
        with busy_core(load != "none", given.random_seed):
            recorded = record(sides, given.batch, given)
            for bound in BOUNDS if trials else ():
                add("live", load, "gate", bound, live(sides, bound, trials, given))
        for bound in BOUNDS:
            both = simulate(recorded, bound, given.simulated, looks, given.random_seed)
            for method, found in zip(("gate", "single mean"), both, strict=True):
                add("simulated", load, method, bound, found)
    if given.out is not None:
        where = take_fingerprint("cpu", given.threads)
        conditions = {"arch": given.arch, "img_size": given.img_size, "batch": given.batch}
        write_table(given.out, rows, **conditions, fingerprint=where.id, device=where.describe())
    return {"rows": len(rows), "worst": max(r.errors for r in rows if r.method == "gate")}
