"""How often the throughput gate errs: `python -m benchmarks.gate --out results/gate.csv`.

A network is compared with its own copy, so the true ratio is 1: passing a bound of 1.03 is a false
accept, failing one of 0.97 a false reject. Live trials time both sides as a run does. Simulated
trials replay windows of blocks that were recorded before, on the quiet machine and beside a process
that is busy on one core now and then. A single mean over the same blocks - one network first, then
the other - stands beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nas.core.cli import Parser, guarded
from nas.core.io import write_atomic
from nas.core.progress import Console
from nas.core.requirement import Setting
from nas.core.table import Writer
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interleave import Bounds, Series, planned_looks, settle, timed_of
from space import Context, get_family
from space.errors import refuse

BOUNDS = (0.97, 1.03)
LOADED = "one core now and then"


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


def upper_share(count: int, of: int) -> float:
    """Return the exact one-sided 95 % upper limit of a share (Clopper and Pearson, 1934)."""
    from scipy.stats import beta

    return 1.0 if count >= of else float(beta.ppf(0.95, count + 1, of - count))


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


class Pair:
    """A network and its copy, ready in a runtime."""

    def __init__(self, arch: str, img_size: int, batch: int, threads: int) -> None:
        import torch

        from nas.measure.throughput import prepare

        torch.set_num_threads(threads)
        family = get_family("tinyvit")
        ctx = Context(img_size=img_size, num_classes=1000)
        model = family.build(family.seed(arch), ctx)
        setting = Setting("cpu", "eager", "float32", batch)
        self.sides = [prepare(model, ctx=ctx, setting=setting) for _ in range(2)]
        self.batch = batch

    def record(self, blocks: int, min_block_s: float, console: Console) -> list[Series]:
        """Time blocks of both sides in the order A B B A ...; returns a series each."""
        import torch

        with torch.inference_mode():
            passes = [settle(side.ready.timer, min_block_s) for side in self.sides]
            series = [Series(), Series()]
            for number in range(blocks):
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    took = math.fsum(self.sides[which].ready.timer(passes[which]))
                    series[which].images_per_s.append(self.batch * passes[which] / took)
                    series[which].pieces_s.append(took)
                console.advance(1.0)
        return series


def simulate(
    recorded: Sequence[Series], bound: float, trials: int, looks: list[int], random_seed: int
) -> tuple[list[tuple[str, int, float]], list[tuple[str, int, float]]]:
    """Replay windows of a recording: verdict, blocks and seconds of the gate, and of single means.

    The mean of a trial uses as many blocks a side as the gate did there, from the same moment on:
    first one network's, then the other's.
    """
    rng = random.Random(random_seed)
    length = len(recorded[0].images_per_s)
    gate, mean = [], []
    for _ in range(trials):
        start = rng.randrange(length - 2 * looks[-1])
        verdict, used = "undecided", looks[-1]
        for until in looks:
            window = [
                Series(s.images_per_s[start : start + until], s.pieces_s[start : start + until])
                for s in recorded
            ]
            verdict = timed_of(window, looks, 1).decides(Bounds(ratio=bound))
            used = until
            if verdict != "undecided":
                break
        seconds = sum(sum(s.pieces_s[start : start + used]) for s in recorded)
        gate.append((verdict, used, seconds))
        # A, then B: 2 * used rounds hold `used` blocks of the one and, later, of the other.
        first = recorded[0].images_per_s[start : start + used]
        second = recorded[1].images_per_s[start + used : start + 2 * used]
        ratio = (sum(first) / used) / (sum(second) / used)
        mean.append(("pass" if ratio >= bound else "fail", used, seconds))
    return gate, mean


def live(
    pair: Pair,
    bound: float,
    trials: int,
    blocks: int,
    max_blocks: int,
    min_block_s: float,
    console: Console,
) -> list[tuple[str, int, float]]:
    """Measure as a run does, again and again."""
    from nas.measure.throughput import measure_prepared

    found = []
    for _ in range(trials):
        started = time.perf_counter()
        measured = measure_prepared(
            pair.sides[0],
            pair.sides[1],
            bounds=Bounds(ratio=bound),
            blocks=blocks,
            max_blocks=max_blocks,
            min_block_s=min_block_s,
        )
        assert measured.ratio_lo is not None
        assert measured.ratio_hi is not None
        low, high = measured.ratio_lo >= bound, measured.ratio_hi < bound
        verdict = "pass" if low else "fail" if high else "undecided"
        found.append((verdict, measured.blocks, time.perf_counter() - started))
        console.advance(blocks)
    return found


def row_of(
    kind: str, load: str, method: str, bound: float, found: Sequence[tuple[str, int, float]]
) -> GateRow:
    """Summarise the trials against one bound."""
    n = len(found)
    passed, failed, undecided = (
        sum(verdict == word for verdict, _, _ in found) for word in ("pass", "fail", "undecided")
    )
    wrong = passed if bound > 1.0 else failed
    return GateRow(
        kind,
        load,
        method,
        bound,
        n,
        passed,
        failed,
        undecided,
        wrong / n,
        upper_share(wrong, n),
        sum(b for _, b, _ in found) / n,
        sum(s for _, _, s in found) / n,
    )


def told(row: GateRow) -> str:
    """Write a row as a line for the terminal."""
    return (
        f"{row.kind:<10} load: {row.load:<22} {row.method:<12} bound {row.bound}: "
        f"{row.errors:.1%} wrong (below {row.error_hi:.1%}), {row.undecided} of {row.trials} "
        f"undecided, {row.blocks:.0f} blocks, {row.seconds:.1f} s"
    )


def gate(given: argparse.Namespace, console: Console) -> list[GateRow]:
    """Do all trials; returns a row for each kind, load, method and bound."""
    looks = planned_looks(given.blocks, given.max_blocks)
    pair = Pair(given.arch, given.img_size, given.batch, given.threads)
    rows: list[GateRow] = []
    lives = {"none": given.live // 2, LOADED: given.live_loaded // 2}
    console.start(2.0 * given.recorded + 2.0 * sum(lives.values()) * given.blocks)

    def add(row: GateRow) -> None:
        rows.append(row)
        console.line(told(row))

    try:
        for load in ("none", LOADED):
            with busy_core(load != "none", given.random_seed):
                console.describe(f"recording, load: {load}")
                recorded = pair.record(given.recorded, given.min_block_s, console)
                for bound in BOUNDS:
                    console.describe(f"live, load: {load}")
                    found = live(
                        pair,
                        bound,
                        lives[load],
                        given.blocks,
                        given.max_blocks,
                        given.min_block_s,
                        console,
                    )
                    add(row_of("live", load, "gate", bound, found))
            for bound in BOUNDS:
                by_gate, by_mean = simulate(
                    recorded, bound, given.simulated, looks, given.random_seed
                )
                add(row_of("simulated", load, "gate", bound, by_gate))
                add(row_of("simulated", load, "single mean", bound, by_mean))
    finally:
        console.stop()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report."""
    parser = Parser(prog="python -m benchmarks.gate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", default="5M", help="compared with its own copy (default: 5M)")
    parser.add_argument("--img-size", type=int, default=48, metavar="PX", help="(default: 48)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--blocks", type=int, default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--max-blocks", type=int, default=80, metavar="N", help="(default: 80)")
    parser.add_argument("--min-block-s", type=float, default=0.04, metavar="S")
    parser.add_argument("--recorded", type=int, default=1200, metavar="N", help="blocks recorded")
    parser.add_argument("--simulated", type=int, default=500, metavar="N", help="trials a bound")
    parser.add_argument(
        "--live", type=int, default=50, metavar="N", help="live trials, half a bound"
    )
    parser.add_argument(
        "--live-loaded", type=int, default=20, metavar="N", help="the same beside the load"
    )
    parser.add_argument("--random-seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    return guarded(lambda: _main(given))


def _main(given: argparse.Namespace) -> int:
    if given.recorded < 3 * given.max_blocks:
        raise refuse("--recorded", given.recorded, f">= 3 x --max-blocks = {3 * given.max_blocks}")
    console = Console(stream=sys.stderr)
    rows = gate(given, console)
    where = take_fingerprint("cpu", given.threads)
    if given.out is not None:
        out = io.StringIO()
        names = [f.name for f in fields(GateRow)]
        writer = Writer(out, [*names, "arch", "img_size", "batch", "fingerprint", "device"])
        writer.writeheader()
        for row in rows:
            values = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(
                {
                    **values,
                    "arch": given.arch,
                    "img_size": given.img_size,
                    "batch": given.batch,
                    "fingerprint": where.id,
                    "device": where.describe(),
                }
            )
        write_atomic(given.out, out.getvalue().encode())
    print(
        json.dumps({"rows": len(rows), "worst": max(r.errors for r in rows if r.method == "gate")})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
