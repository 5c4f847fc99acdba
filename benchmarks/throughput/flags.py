"""The settings of `python -m benchmarks.throughput`, and what they ask for, checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.throughput.networks import Net, find_nets, sample
from nas.core.cli import Parser, read_threads, usable_cpus
from nas.core.config import parse_count
from nas.core.data_config import DataConfig
from nas.core.requirement import Setting
from nas.core.settings import add_settings, changed_setting, check_settings, parsed, setting
from nas.measure.runtimes import find_runtime
from space import Context, get_family
from space.errors import refuse


@dataclass(frozen=True)
class ThroughputConfig:
    """Which networks are measured, under which settings and how long."""

    arch: tuple[str, ...] = setting(
        (),
        "5M 11M 21M, best.json or another arch's JSON file, inline JSON, a run's folder (its "
        "Pareto set), or any timm name",
        group="networks",
        metavar="NET",
        many=True,
    )
    space: str | None = setting(None, "draw networks from a family's space", metavar="FAMILY")
    sample: int | None = setting(None, "how many to draw (with --space)", metavar="N", low=1)
    band: int | None = setting(None, "a third of them within 10 % of N parameters", metavar="N", parse=parse_count)
    seed: str = setting("21M", "draw contractions of this arch", metavar="ARCH")
    reference: str | None = setting(None, "timed alongside; none: off", metavar="NET", default_text="21M")
    reference_runtime: str | None = setting(
        None,
        "fix the reference's runtime, so that rows of several runtimes share one scale",
        metavar="NAME",
        default_text="the row's own",
    )
    batch: tuple[str, ...] = setting(
        ("16",), "or auto", group="settings, each a list", metavar="N", many=True, default_text="16"
    )
    dtype: tuple[str, ...] = setting(("float32",), "of weights and images", many=True, default_text="float32")
    img_size: tuple[str, ...] = setting(("224",), "pixels", metavar="PX", many=True, default_text="224")
    runtime: tuple[str, ...] = setting(
        ("eager",), "that runs the network", metavar="NAME", many=True, default_text="eager"
    )
    device: tuple[str, ...] = setting(("cpu",), "cpu, cuda or cuda:N", metavar="NAME", many=True, default_text="cpu")
    num_classes: int = setting(1000, "of the head", metavar="N", low=1)
    threads: int | None = setting(None, "of a process", group="how long", metavar="N", default_text="the usable CPUs")
    visits: int = setting(4, "fresh processes that time a network, at least", metavar="N", low=4)
    max_visits: int = setting(16, "at most", metavar="N")
    precision: float = setting(
        0.03,
        "make visits until half the interval is this share; 0: --visits suffice",
        metavar="SHARE",
        low=0.0,
        want="a share in [0, 1)",
    )
    latency_passes: int = setting(100, "passes behind the latency percentiles; 0: none", metavar="N")
    memory: bool = setting(True, "do not measure peak memory")
    accuracy_data: str | None = setting(
        None, "test nets that have weights (best.json) on this data, in each runtime", metavar="DATA"
    )
    max_images: int | None = changed_setting(DataConfig, "max_images", group="which images of --accuracy-data")
    max_test_images: int | None = changed_setting(DataConfig, "max_test_images")
    splits: str | None = changed_setting(DataConfig, "splits")
    classes: str | None = changed_setting(DataConfig, "classes")
    annotations: str | None = changed_setting(DataConfig, "annotations")
    max_corrupt: float = changed_setting(DataConfig, "max_corrupt")
    pixel_cache: bool = changed_setting(DataConfig, "pixel_cache")
    random_seed: int = setting(0, "of what is drawn", group="results", metavar="N")
    out: str | None = setting(None, "the table as CSV", metavar="FILE")
    resume: bool = setting(False, "take over the rows of --out")
    figure: str | None = setting(None, "to draw", metavar="FILE", default_text="beside --out, .png")
    bundle: str | None = setting(
        None, "measure nothing: write ONNX files and one script for a device without torch", metavar="DIR"
    )
    quiet: bool = setting(False, "print the last line only")


@dataclass(frozen=True)
class ThroughputPlan:
    """How networks are measured. With `auto`, each network has its own batch."""

    config: ThroughputConfig
    settings: tuple[Setting, ...]
    sizes: tuple[int, ...]
    reference: Net | None
    threads: int = 1
    auto: bool = False


def parse_flags(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Parse a command line; flags that are not given are absent."""
    parser = Parser(
        prog="python -m benchmarks.throughput",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, ThroughputConfig)
    return parser.parse_args(argv)


def plan_of(given: argparse.Namespace) -> tuple[list[Net], ThroughputPlan]:
    """Return the networks and how they are measured, all flags checked. Raises InputError."""
    config = ThroughputConfig(**parsed(ThroughputConfig, vars(given)))
    check_settings(config)
    family = get_family(config.space or "tinyvit")
    threads = usable_cpus() if config.threads is None else read_threads(config.threads)
    if config.max_visits < config.visits:
        raise refuse("--max-visits", config.max_visits, f"an integer >= {config.visits}")
    if config.precision >= 1:
        raise refuse("--precision", config.precision, "a share in [0, 1)")
    if (config.space is None) != (config.sample is None):
        raise refuse("--space and --sample", "one of them", "both", "--space tinyvit --sample 200")
    sizes = tuple(dict.fromkeys(_whole("--img-size", text) for text in config.img_size))
    contexts = [Context(img_size=s, num_classes=config.num_classes) for s in sizes]
    auto = "auto" in config.batch
    if auto and len(config.batch) > 1:
        raise refuse("--batch", " ".join(config.batch), "auto alone, or numbers")
    batches = [1] if auto else [_whole("--batch", text) for text in config.batch]
    for name in config.runtime:
        find_runtime(name)
    if config.reference_runtime is not None:
        find_runtime(config.reference_runtime, "--reference-runtime")
    settings = tuple(
        Setting(device, runtime, dtype, batch)
        for device in config.device
        for runtime in config.runtime
        for dtype in config.dtype
        for batch in batches
    )
    published = [each.name for each in family.published]
    nets = find_nets(config.arch or ([] if config.sample else published), family)
    if config.sample is not None:
        seed, random_seed = family.seed(config.seed), config.random_seed
        nets += sample(family, seed, contexts[0], config.sample, band=config.band, random_seed=random_seed)
    if not nets:
        raise refuse("--arch", "nothing", "a network", "such as --arch 5M 11M 21M")
    named = config.reference or published[-1]
    reference = None if named == "none" else find_nets([named], family)[0]
    return nets, ThroughputPlan(config, settings, sizes, reference, threads, auto)


def _whole(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise refuse(name, text, "an integer >= 1" + (", or auto" if name == "--batch" else ""))
    return int(text)
