"""How good our timings are: against timm's method, as a gate, and as predictions.

`python -m benchmarks.timing agreement`: the ratios of the published models' throughput by timm's
own method (the `benchmark.py` of its repository: ten passes to warm up, then the mean over forty)
beside ours, in rounds that alternate; then how far either method's ratio spreads over repeats that
take equal seconds, on a quiet machine and beside a process that keeps one core busy now and then.

`gate`: a network against its own copy, so that the true ratio is 1: passing a bound of 1.03 is a
false accept, failing one of 0.97 a false reject. Live trials time both sides as a run does,
simulated ones replay windows of recorded blocks; a single mean over the same blocks (one network
first, then the other) stands beside.

`predictor TABLE`: throughput predicted for networks not seen (ten folds), against what parameters
and MACs alone would order, over the whole range and inside a band of +-10 % parameters. TABLE is of
`python -m benchmarks.throughput --space tinyvit --sample 200 --band 5.4M`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.estimates import run_command
from benchmarks.timing.agreement import measure_agreement
from benchmarks.timing.gate import measure_gate
from benchmarks.timing.predictor import measure_predictor
from nas.core.cli import Parser

PARTS = {"agreement": measure_agreement, "gate": measure_gate, "predictor": measure_predictor}


def build_parser() -> Parser:
    """Return the parser."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.timing", description=__doc__, formatter_class=raw)
    parts = parser.add_subparsers(dest="part", required=True)
    add = parts.add_parser("agreement").add_argument
    add("--dtype", nargs="+", default=["float32", "bfloat16"])
    add("--img-size", type=int, default=224, metavar="PX", help="(default: 224)")
    add("--batch", type=int, default=1, metavar="N", help="(default: 1)")
    add("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    add("--rounds", type=int, default=7, metavar="N", help="of both methods (default: 7)")
    add("--repeats", type=int, default=40, metavar="N", help="for the spread (default: 40)")
    add("--spread-img-size", type=int, default=96, metavar="PX", help="(default: 96)")
    add("--random-seed", type=int, default=0, metavar="N")
    add("--out", type=Path, metavar="FILE")
    add = parts.add_parser("gate").add_argument
    add("--arch", default="5M", help="compared with its own copy (default: 5M)")
    add("--img-size", type=int, default=48, metavar="PX", help="(default: 48)")
    add("--batch", type=int, default=4, metavar="N", help="(default: 4)")
    add("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    add("--blocks", type=int, default=10, metavar="N", help="at least (default: 10)")
    add("--max-blocks", type=int, default=80, metavar="N", help="at most (default: 80)")
    add("--min-block-s", type=float, default=0.04, metavar="S", help="(default: 0.04)")
    add("--recorded", type=int, default=1200, metavar="N", help="blocks recorded (default: 1200)")
    add("--simulated", type=int, default=500, metavar="N", help="trials a bound (default: 500)")
    add("--live", type=int, default=50, metavar="N", help="trials, half a bound (default: 50)")
    add("--live-loaded", type=int, default=20, metavar="N", help="beside the load (default: 20)")
    add("--random-seed", type=int, default=0, metavar="N")
    add("--out", type=Path, metavar="FILE")
    add = parts.add_parser("predictor").add_argument
    add("table", type=Path, metavar="TABLE", help="the CSV of measured networks")
    add("--band", default="5.4M", metavar="N", help="(default: 5.4M)")
    add("--out", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part; the last line is JSON. Exit status 0, 2 on bad input."""
    return run_command(build_parser(), lambda given: PARTS[given.part](given), argv)


if __name__ == "__main__":
    sys.exit(main())
