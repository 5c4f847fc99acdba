"""The flags of `python -m benchmarks.throughput`, and what they ask for, checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.throughput.networks import Net, find_nets, sample
from nas.core.cli import Parser, read_threads, usable_cpus
from nas.core.config import parse_count
from nas.core.requirement import Setting
from nas.measure.runtimes import find_runtime
from space import Context, get_family
from space.errors import refuse


@dataclass(frozen=True)
class Plan:
    """What to measure, apart from the networks. With `auto`, each network has its own batch."""

    settings: tuple[Setting, ...]
    auto: bool
    sizes: tuple[int, ...]
    num_classes: int
    reference: Net | None
    reference_runtime: str | None
    threads: int
    blocks: int
    max_blocks: int
    precision: float | None
    latency_passes: int
    memory: bool
    accuracy_data: str | None
    random_seed: int = 0


def build_parser(description: str | None) -> Parser:
    """Return the command line."""
    parser = Parser(
        prog="python -m benchmarks.throughput",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("networks")
    what.add_argument(
        "--arch",
        nargs="+",
        default=[],
        metavar="NET",
        help="5M 11M 21M, best.json or another arch's JSON file, inline JSON, a run's folder (its "
        "Pareto set), or any timm name",
    )
    what.add_argument("--space", metavar="FAMILY", help="draw networks from a family's space")
    what.add_argument("--sample", type=int, metavar="N", help="how many to draw (with --space)")
    what.add_argument("--band", metavar="N", help="a third of them within 10 %% of N parameters")
    what.add_argument(
        "--seed", default="21M", metavar="ARCH", help="draw contractions of this arch"
    )
    what.add_argument(
        "--reference", metavar="NET", help="timed alongside (default: 21M; none: off)"
    )
    what.add_argument(
        "--reference-runtime",
        metavar="NAME",
        help="fix the reference's runtime, so that rows of several runtimes share one scale "
        "(default: the row's own)",
    )
    how = parser.add_argument_group("settings, each a list")
    how.add_argument(
        "--batch", nargs="+", default=["16"], metavar="N", help="or auto (default: 16)"
    )
    how.add_argument("--dtype", nargs="+", default=["float32"], help="(default: float32)")
    how.add_argument("--img-size", nargs="+", type=int, default=[224], metavar="PX")
    how.add_argument("--runtime", nargs="+", default=["eager"], metavar="NAME")
    how.add_argument("--device", nargs="+", default=["cpu"], metavar="NAME")
    how.add_argument("--num-classes", type=int, default=1000, metavar="N")
    size = parser.add_argument_group("how long")
    size.add_argument("--threads", type=int, metavar="N", help="(default: the usable CPUs)")
    size.add_argument("--blocks", type=int, default=12, metavar="N", help="at least (default: 12)")
    size.add_argument(
        "--max-blocks", type=int, default=96, metavar="N", help="at most (default: 96)"
    )
    size.add_argument(
        "--precision",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="time on until half the interval is this share (default: 0.03; 0: --blocks suffice)",
    )
    size.add_argument(
        "--latency-passes",
        type=int,
        default=100,
        metavar="N",
        help="passes behind the latency percentiles (default: 100; 0: none)",
    )
    size.add_argument("--no-memory", dest="memory", action="store_false", help="do not weigh")
    size.add_argument(
        "--accuracy-data",
        metavar="DATA",
        help="test nets that have weights (best.json) on this data, in each runtime",
    )
    size.add_argument("--random-seed", type=int, default=0, metavar="N")
    ends = parser.add_argument_group("results")
    ends.add_argument("--out", type=Path, metavar="FILE", help="the table as CSV")
    ends.add_argument("--resume", action="store_true", help="take over the rows of --out")
    ends.add_argument("--figure", type=Path, metavar="FILE", help="(default: beside --out, .png)")
    ends.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="measure nothing: write ONNX files and one script for a device without torch",
    )
    ends.add_argument("--quiet", action="store_true", help="print the last line only")
    return parser


def plan_of(given: argparse.Namespace) -> tuple[list[Net], Plan]:
    """Return the networks and how they are measured, all flags checked. Raises InputError."""
    family = get_family(given.space or "tinyvit")
    threads = usable_cpus() if given.threads is None else given.threads
    read_threads(threads)
    for name, least, value in (
        ("--blocks", 6, given.blocks),
        ("--max-blocks", given.blocks, given.max_blocks),
        ("--num-classes", 1, given.num_classes),
        ("--latency-passes", 0, given.latency_passes),
    ):
        if value < least:
            raise refuse(name, value, f"an integer >= {least}")
    if not 0.0 <= given.precision < 1.0:
        raise refuse("--precision", given.precision, "a share in [0, 1)")
    if (given.space is None) != (given.sample is None):
        raise refuse("--space and --sample", "one of them", "both", "--space tinyvit --sample 200")
    if given.sample is not None and given.sample < 1:
        raise refuse("--sample", given.sample, "an integer >= 1")
    if not given.arch and given.sample is None:
        given.arch = [p.name for p in family.published]
    sizes = tuple(dict.fromkeys(given.img_size))
    contexts = [Context(img_size=s, num_classes=given.num_classes) for s in sizes]
    auto = "auto" in given.batch
    if auto and len(given.batch) > 1:
        raise refuse("--batch", " ".join(given.batch), "auto alone, or numbers")
    batches = [1] if auto else [_whole("--batch", text) for text in given.batch]
    for name in given.runtime:
        find_runtime(name)
    if given.reference_runtime is not None:
        find_runtime(given.reference_runtime, "--reference-runtime")
    settings = tuple(
        Setting(device, runtime, dtype, batch)
        for device in given.device
        for runtime in given.runtime
        for dtype in given.dtype
        for batch in batches
    )
    nets = find_nets(given.arch, family)
    if given.sample is not None:
        band = None if given.band is None else parse_count("--band", given.band)
        nets += sample(
            family,
            family.seed(given.seed),
            contexts[0],
            given.sample,
            band=band,
            random_seed=given.random_seed,
        )
    if not nets:
        raise refuse("--arch", "nothing", "a network", "such as --arch 5M 11M 21M")
    reference = None
    named = given.reference or family.published[-1].name
    if named != "none":
        reference = find_nets([named], family)[0]
    plan = Plan(
        settings=settings,
        auto=auto,
        sizes=sizes,
        num_classes=given.num_classes,
        reference=reference,
        reference_runtime=given.reference_runtime,
        threads=threads,
        blocks=given.blocks,
        max_blocks=given.max_blocks,
        precision=given.precision or None,
        latency_passes=given.latency_passes,
        memory=given.memory,
        accuracy_data=given.accuracy_data,
        random_seed=given.random_seed,
    )
    return nets, plan


def _whole(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise refuse(name, text, "an integer >= 1, or auto")
    return int(text)
