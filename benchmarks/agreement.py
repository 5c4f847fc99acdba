"""Does our number agree with timm's, and repeat better? `python -m benchmarks.agreement`.

First, the ratios of the published models' throughput by timm's own method (the `benchmark.py` of
its repository: ten passes to warm up, then the mean over forty) beside ours, in one run whose
rounds alternate between the two. Second, how far each method's ratio spreads over repeats that take
equal seconds, on the machine as it is and beside a process that is busy on one core now and then.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.gate import busy_core
from nas.core.cli import Parser, guarded
from nas.core.io import write_atomic
from nas.core.progress import Console
from nas.core.requirement import Setting
from nas.core.table import Writer
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interleave import Bounds, measure_rounds, settle
from nas.measure.intervals import median_interval, quantile
from space import Context, get_family

TIMM_WARM_UP, TIMM_PASSES = 10, 40
"""What timm's benchmark.py does by default for inference."""


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


Timers = dict[str, Callable[[int], list[float]]]


def timers(archs: Sequence[str], given: argparse.Namespace, dtype: str, size: int) -> Timers:
    """Prepare published archs in eager mode and return their timers."""
    from nas.measure.throughput import prepare

    family, ctx = get_family("tinyvit"), Context(img_size=size, num_classes=1000)
    setting = Setting("cpu", "eager", dtype, given.batch)
    return {
        name: prepare(family.build(family.seed(name), ctx), ctx=ctx, setting=setting).ready.timer
        for name in archs
    }


def timm_images_per_s(timer: Callable[[int], list[float]], batch: int) -> float:
    """Do what timm's benchmark.py does: warm up, then samples over the sum of the passes' times."""
    timer(TIMM_WARM_UP)
    return batch * TIMM_PASSES / math.fsum(timer(TIMM_PASSES))


def agreement(given: argparse.Namespace, console: Console) -> list[AgreementRow]:
    """Compare the ratios by both methods, round by round, for each dtype."""
    import torch

    rows = []
    for dtype in given.dtype:
        at = timers(("5M", "11M", "21M"), given, dtype, given.img_size)
        found: dict[tuple[str, str], list[float]] = {}
        spent = {"timm": 0.0, "ours": 0.0}
        with torch.inference_mode():
            for number in range(given.rounds):
                methods = ("timm", "ours") if number % 2 == 0 else ("ours", "timm")
                for method in methods:
                    console.describe(f"{dtype}, {method}")
                    started = time.perf_counter()
                    for arch, ratio in _ratios(method, at, given).items():
                        found.setdefault((method, arch), []).append(ratio)
                    spent[method] += time.perf_counter() - started
                    console.advance(1.0)
        for arch in ("11M", "5M"):
            by_timm = statistics.median(found["timm", arch])
            for method in ("timm", "ours"):
                ratios = found[method, arch]
                at_median = median_interval(ratios)
                rows.append(
                    AgreementRow(
                        "agreement",
                        dtype,
                        "none",
                        arch,
                        method,
                        len(ratios),
                        at_median.median,
                        at_median.lo,
                        at_median.hi,
                        None,
                        at_median.median / by_timm - 1.0,
                        spent[method] / len(ratios),
                    )
                )
    return rows


def _ratios(method: str, at: Timers, given: argparse.Namespace) -> dict[str, float]:
    if method == "timm":
        paces = {name: timm_images_per_s(timer, given.batch) for name, timer in at.items()}
        return {name: paces[name] / paces["21M"] for name in ("11M", "5M")}
    found = {}
    for name in ("11M", "5M"):
        measured = measure_rounds(
            [at[name], at["21M"]],
            batch=given.batch,
            bounds=Bounds(),
            blocks=12,
            max_blocks=12,
            min_block_s=0.06,
        )
        assert measured.ratio is not None
        found[name] = measured.ratio.median
    return found


def spread(given: argparse.Namespace, console: Console) -> list[AgreementRow]:
    """Repeat both methods at equal seconds, with and without load, alternating."""
    import torch

    at = timers(("5M", "21M"), given, "float32", given.spread_img_size)
    ratios: dict[tuple[str, str], list[float]] = {}
    spent: dict[tuple[str, str], float] = {}
    with torch.inference_mode():
        passes = [settle(at[name], 0.06) for name in ("5M", "21M")]
        for load in ("none", "one core now and then"):
            with busy_core(load != "none", given.random_seed):
                for number in range(given.repeats):
                    methods = ("ours", "plain mean")
                    for method in methods if number % 2 == 0 else methods[::-1]:
                        console.describe(f"{method}, load: {load}")
                        started = time.perf_counter()
                        ratio = _one(method, at, passes, given)
                        ratios.setdefault((load, method), []).append(ratio)
                        took = time.perf_counter() - started
                        spent[load, method] = spent.get((load, method), 0.0) + took
                        console.advance(0.5)
    rows = []
    for (load, method), values in ratios.items():
        median = median_interval(values)
        wide = (quantile(values, 0.95) - quantile(values, 0.05)) / median.median
        rows.append(
            AgreementRow(
                "spread",
                "float32",
                load,
                "5M",
                method,
                len(values),
                median.median,
                median.lo,
                median.hi,
                wide,
                None,
                spent[load, method] / len(values),
            )
        )
    return rows


def _one(method: str, at: Timers, passes: Sequence[int], given: argparse.Namespace) -> float:
    """Return one ratio; both methods run the same numbers of passes of either network."""
    blocks, batch = 12, given.batch
    if method == "plain mean":
        paces: list[float] = []
        for name, count in zip(("5M", "21M"), passes, strict=True):
            taken = math.fsum(at[name](count * blocks))
            paces.append(batch * count * blocks / taken)
        return paces[0] / paces[1]
    own: list[float] = []
    for number in range(blocks):
        pace: dict[str, float] = {}
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            name = ("5M", "21M")[which]
            pace[name] = batch * passes[which] / math.fsum(at[name](passes[which]))
        own.append(pace["5M"] / pace["21M"])
    return statistics.median(own)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report."""
    parser = Parser(prog="python -m benchmarks.agreement", description=__doc__, allow_abbrev=False)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--img-size", type=int, default=224, metavar="PX", help="(default: 224)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: 7)")
    parser.add_argument("--repeats", type=int, default=40, metavar="N", help="(default: 40)")
    parser.add_argument(
        "--spread-img-size", type=int, default=96, metavar="PX", help="(default: 96)"
    )
    parser.add_argument("--random-seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    return guarded(lambda: _main(given))


def _main(given: argparse.Namespace) -> int:
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
        told = f"{row.part:<10} {row.dtype:<9} load: {row.load:<22} {row.arch:>4} {row.method:<11}"
        told += f" {row.ratio:.3f} [{row.ratio_lo:.3f}, {row.ratio_hi:.3f}] x 21M"
        if row.spread is not None:
            told += f", 5 to 95 %: {row.spread:.1%} of the median"
        if row.difference:
            told += f", {row.difference:+.1%} from timm's"
        print(f"{told}, {row.seconds:.1f} s each")
    if given.out is not None:
        write_atomic(given.out, table(rows, given, where).encode())
    worst = max(abs(row.difference or 0.0) for row in rows)
    print(json.dumps({"rows": len(rows), "largest_difference": round(worst, 4)}))
    return 0


def table(rows: Sequence[AgreementRow], given: argparse.Namespace, where: Any) -> str:
    """Write the rows as CSV."""
    out = io.StringIO()
    names = [f.name for f in fields(AgreementRow)]
    writer = Writer(out, [*names, "batch", "img_size", "fingerprint", "device"])
    writer.writeheader()
    for row in rows:
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}
        size = given.img_size if row.part == "agreement" else given.spread_img_size
        writer.writerow(
            {
                **values,
                "batch": given.batch,
                "img_size": size,
                "fingerprint": where.id,
                "device": where.describe(),
            }
        )
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
