"""What a model learnt that helps elsewhere: `python -m nas.transfer SOURCE --data DATA`.

SOURCE is what nas.export takes (a run's folder, a model's JSON, or its weights), or a folder that
it wrote. Its backbone is frozen and checked: `probe`, a linear classifier on the pooled features of
other images, with their own classes; `knn`, the nearest neighbours among them; `segment`, a small
head on its feature maps, on formula-driven images with masks (no data set is read for it). Beside
it, the same arch with fresh random weights is treated alike: the difference is what training
bought. Errors and intervals are over test images, of one training each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.cli import Parser, default_cache, guarded
from nas.core.io import write_atomic
from nas.core.progress import Console
from nas.data import Dataset, DataSpec
from nas.data.prepared import prepared
from space.errors import refuse

if TYPE_CHECKING:
    from nas.data.augment.spec import AugmentSpec
    from nas.transfer.backbone import Backbone
    from nas.transfer.probe_rows import Row
    from nas.transfer.probes import Side

CHECKS = ("probe", "knn", "segment")
_ON_DATA = ("probe", "knn")
_FIT_UNITS, _HEAD_UNITS, _FINETUNE_UNITS = 1.0, 0.3, 3.0
"""What an image costs in a linear fit, a head's epoch and a fine-tuning epoch, in forward passes:
for the bar alone."""


@dataclass(frozen=True)
class _Asked:
    """What is asked for, checked as far as that goes without reading anything."""

    source: Path
    data: str | None
    checks: tuple[str, ...]
    img_size: int | None
    random_seed: int
    device: str
    epochs: int | None
    finetune: bool
    out: Path | None

    @property
    def on_data(self) -> bool:
        """Tell whether a data set is read."""
        return any(check in self.checks for check in _ON_DATA)


def transfer(
    source: str | Path,
    data: str | None = None,
    *,
    checks: Sequence[str] = CHECKS,
    img_size: int | None = None,
    random_seed: int = 0,
    device: str = "cpu",
    epochs: int | None = None,
    finetune: bool = False,
    cache_dir: str | Path | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Check a model's backbone on other data beside the same arch with fresh weights.

    `data` as in nas.contract (None with `segment` alone); `img_size` None is the model's own;
    `epochs` are the segmentation's. Returns plain JSON: "rows" (see `nas.transfer.probe_rows.Row`,
    shares)
    and "seconds" by check. `out`: a CSV of the rows. Raises InputError.
    """
    asked = _Asked(
        Path(source).expanduser(),
        data,
        _known(checks),
        img_size,
        random_seed,
        device,
        epochs,
        finetune,
        None if out is None else Path(out).expanduser(),
    )
    _check(asked)
    cache = default_cache() if cache_dir is None else Path(cache_dir).expanduser()
    console = Console(quiet=True) if console is None else console
    with tempfile.TemporaryDirectory(prefix="transfer-") as scratch:
        from nas.transfer.backbone import open_backbone

        backbone = open_backbone(asked.source, asked.img_size, Path(scratch))
        dataset = _read(asked, backbone, cache, console)
        rows, seconds = _checked(asked, backbone, dataset, console)
    if asked.out is not None:
        _write(asked.out, rows)
    return {
        "source": str(source),
        "data": data,
        "img_size": backbone.img_size,
        "random_seed": random_seed,
        "finetune": finetune,
        "rows": [row.to_dict() for row in rows],
        "seconds": seconds,
    }


def _known(checks: Sequence[str]) -> tuple[str, ...]:
    """Put the names of checks in order, each once."""
    for name in checks:
        if name not in CHECKS:
            raise refuse("--checks", name, f"some of {', '.join(CHECKS)}, with commas between")
    if not checks:
        raise refuse("--checks", "nothing", f"some of {', '.join(CHECKS)}")
    return tuple(name for name in CHECKS if name in checks)


def _check(asked: _Asked) -> None:
    """Refuse flags that cannot be, before anything is read."""
    from nas.measure.fingerprint import take_fingerprint

    if asked.on_data and asked.data is None:
        raise refuse("--data", "nothing", "a data set for probe and knn", "or --checks segment")
    if asked.img_size is not None:
        DataSpec("any", img_size=asked.img_size)
    DataSpec("any", random_seed=asked.random_seed)
    if asked.epochs is not None and asked.epochs < 1:
        raise refuse("--epochs", asked.epochs, "an integer >= 1")
    for flag, given in (("--epochs", asked.epochs is not None), ("--finetune", asked.finetune)):
        if given and "segment" not in asked.checks:
            raise refuse(flag, f"--checks {','.join(asked.checks)}", "segment among the checks")
    if asked.out is not None:
        if asked.out.suffix != ".csv" or asked.out.is_dir():
            raise refuse("--out", asked.out, "a file that ends in .csv")
        if not asked.out.parent.is_dir():
            remedy = f"make {asked.out.parent}"
            raise refuse("--out", asked.out, "a place in a folder that exists", remedy)
    take_fingerprint(asked.device, threads=1)  # refuses a device that is not there


def _read(asked: _Asked, backbone: Backbone, cache: Path, console: Console) -> Dataset | None:
    """Read what the probes look at; it needs classes."""
    if not asked.on_data:
        return None
    assert asked.data is not None
    spec = DataSpec(asked.data, img_size=backbone.img_size, random_seed=asked.random_seed)
    dataset = prepared(spec, cache, console)
    if dataset.num_classes < 2:
        got = f"{asked.data}, {'one class' if dataset.labelled else 'images without classes'}"
        raise refuse("--data", got, "a folder a class, two at least", "or --checks segment")
    return dataset


def _checked(
    asked: _Asked, backbone: Backbone, dataset: Dataset | None, console: Console
) -> tuple[list[Row], dict[str, float]]:
    """Do the checks under one bar; returns rows and seconds by check."""
    from nas.data.augment.spec import AugmentSpec

    mean, std = ((v[0], v[1], v[2]) for v in (backbone.mean, backbone.std))
    spec = AugmentSpec(backbone.img_size, mean, std)
    rows: list[Row] = []
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    console.start(_units(asked, dataset))
    try:
        if dataset is not None:
            with timed("features"):
                sides = [
                    _sides(asked, backbone, dataset, spec, seed, console)
                    for seed in (None, asked.random_seed)
                ]
            for name in _ON_DATA:
                if name in asked.checks:
                    with timed(name):
                        rows += _probed(name, sides, dataset.num_classes, console)
        if "segment" in asked.checks:
            with timed("segment"):
                rows += _segmented(asked, backbone, spec, console)
    finally:
        console.stop()
    return rows, seconds


def _units(asked: _Asked, dataset: Dataset | None) -> float:
    """Estimate the work of both networks, in forward passes of an image."""
    total = 0.0
    if dataset is not None:
        total += sum(len(side) for side in (dataset.train, dataset.holdout, dataset.test))
        total += _FIT_UNITS * len(dataset.train) * ("probe" in asked.checks)
    if "segment" in asked.checks:
        from nas.transfer.segmentation import TEST_IMAGES, TRAIN_IMAGES, settings_of

        epochs = settings_of(asked.epochs, asked.finetune).epochs
        images = TRAIN_IMAGES * epochs + TEST_IMAGES
        total += images * (_FINETUNE_UNITS if asked.finetune else _HEAD_UNITS)
    return 2 * total


def _sides(
    asked: _Asked,
    backbone: Backbone,
    dataset: Dataset,
    spec: AugmentSpec,
    seed: int | None,
    console: Console,
) -> tuple[Side, Side, Side]:
    """Give the features of train, holdout and test."""
    import numpy as np

    from nas.transfer.features import side_of

    console.describe(f"features, {_weights(seed)} weights")
    model = backbone.classifier(seed)
    found = [
        side_of(model, split, spec, asked.device, console.advance)
        for split in (dataset.train, dataset.holdout, dataset.test)
    ]
    if not all(np.isfinite(side.features).all() for side in found):
        got = f"features of its {_weights(seed)} weights that are not finite"
        raise refuse(str(asked.source), got, "a network that works", "is it damaged?")
    return found[0], found[1], found[2]


def _weights(seed: int | None) -> str:
    return "trained" if seed is None else "random"


def _probed(
    name: str, sides: Sequence[tuple[Side, Side, Side]], classes: int, console: Console
) -> list[Row]:
    """Probe the features of both networks; returns the rows."""
    from nas.transfer.probe_metrics import paired_shares, share
    from nas.transfer.probe_rows import pair
    from nas.transfer.probes import knn_probe, linear_probe

    console.describe({"probe": "linear probe", "knn": "nearest neighbours"}[name])
    found = []
    for train, holdout, test in sides:
        if name == "probe":
            whole = _FIT_UNITS * len(train.labels)
            found.append(linear_probe(train, holdout, test, _scaled(console, whole)))
        else:
            found.append(knn_probe(train, holdout, test, classes))
    trained, random = found
    values = [share(one.right) for one in found]
    against = paired_shares(trained.right, random.right)
    return pair(name, "top1", values, len(trained.right), against, [p.chosen for p in found])


def _segmented(asked: _Asked, backbone: Backbone, spec: AugmentSpec, console: Console) -> list[Row]:
    """Train and test a segmentation on both networks; returns the rows."""
    from nas.train.loop import Diverged
    from nas.transfer.masks import KINDS
    from nas.transfer.probe_metrics import mean_iou, paired_spread, pixel_accuracy, spread
    from nas.transfer.probe_rows import pair
    from nas.transfer.segmentation import scenes, segment, settings_of

    console.describe("segment: drawing images")
    settings = settings_of(asked.epochs, asked.finetune)
    sides = scenes(backbone.img_size, asked.random_seed)
    length = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"
    how = f"{'fine-tuned' if asked.finetune else 'frozen'}, {length}"
    console.line(
        f"segment: {len(sides[0].images)} formula-driven images to train, {len(sides[1].images)} "
        f"test, {len(KINDS)} classes; backbone {how}"
    )
    tick = _scaled(console, _FINETUNE_UNITS if asked.finetune else _HEAD_UNITS)
    counts = []
    for seed in (None, asked.random_seed):
        console.describe(f"segment, {_weights(seed)} weights")
        try:
            counts.append(
                segment(
                    backbone.pyramid(seed),
                    sides,
                    spec,
                    settings,
                    finetune=asked.finetune,
                    random_seed=asked.random_seed,
                    device=asked.device,
                    tick=tick,
                )
            )
        except Diverged as error:
            got = f"segmentation on its {_weights(seed)} weights: {error}"
            raise refuse(str(asked.source), got, "a loss that stays finite") from None
    rows = []
    for metric, measure in (("mean_iou", mean_iou), ("pixel_accuracy", pixel_accuracy)):
        values = [spread(measure, each, asked.random_seed) for each in counts]
        against = paired_spread(measure, counts[0], counts[1], asked.random_seed)
        rows += pair("segment", metric, values, len(sides[1].images), against, [how, how])
    return rows


def _scaled(console: Console, factor: float) -> Callable[[float], None]:
    return lambda units: console.advance(units * factor)


def _write(out: Path, rows: Sequence[Row]) -> None:
    from nas.transfer.probe_rows import csv_text

    try:
        write_atomic(out, csv_text(rows).encode())
    except OSError as error:
        raise refuse("--out", out, "a place to write to", error.strerror or "") from error


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="python -m nas.transfer",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run's folder, a model's JSON, weights, or an export")
    add("--data", help="as in nas.contract, with classes; not needed for segment")
    add("--checks", default=",".join(CHECKS), help=f"some of them (default: {','.join(CHECKS)})")
    add("--img-size", type=int, metavar="PX", help="of all checks (default: the model's own)")
    add(
        "--random-seed",
        type=int,
        default=0,
        metavar="N",
        help="of the fresh weights, the cuts, the masks and the head (default: 0)",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add(
        "--epochs",
        type=int,
        metavar="N",
        help="of the segmentation (default: 12; 5 with --finetune)",
    )
    add("--finetune", action="store_true", help="segment: train the backbone, too")
    add("--cache-dir", metavar="DIR", help="decoded data (default: as in nas.contract)")
    add("--out", metavar="FILE.csv", help="write the rows, as shares")
    add("--quiet", action="store_true", help="print nothing but errors and --json")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and check. Returns the exit status: 0, or 2 for bad input."""

    def work() -> int:
        from nas.transfer.probe_rows import Row, table

        given = build_parser().parse_args(argv)
        # As the executor does for its workers; torch, which reads it, is not imported yet.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        console = Console(quiet=given.quiet)
        told = transfer(
            given.source,
            given.data,
            checks=[c.strip() for c in given.checks.split(",")],
            img_size=given.img_size,
            random_seed=given.random_seed,
            device=given.device,
            epochs=given.epochs,
            finetune=given.finetune,
            cache_dir=given.cache_dir,
            out=given.out,
            console=console,
        )
        for line in table([Row(**row) for row in told["rows"]]):
            console.line(line)
        took = ", ".join(f"{name} {seconds:g} s" for name, seconds in told["seconds"].items())
        console.line(f"random: the same arch, fresh weights of random seed {given.random_seed}")
        console.line(f"took: {took}")
        if given.json:
            print(json.dumps(told))
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
