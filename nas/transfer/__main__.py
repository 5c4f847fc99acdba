"""Check a model's backbone on other tasks: `python -m nas.transfer SOURCE --data DATA`.

SOURCE is what nas.export takes (a run's folder, a model's JSON, or its weights), or a folder that it wrote. Its
backbone is frozen and checked: `probe`, a linear classifier on the pooled features of other images, with their own
classes; `knn`, the nearest neighbours among them; `segment`, a small head on its feature maps, on formula-driven images
with masks (no data set is read for it). Beside it, the same arch with fresh random weights is treated alike: the
difference is what training bought. Errors and intervals are over test images, of one training each.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.cli import Parser, default_cache, exit_status
from nas.core.data_config import DataConfig
from nas.core.metrics import mean_se
from nas.core.progress import Console
from nas.core.settings import add_settings, changed_setting, check_settings, parsed, setting, settings_of
from nas.core.table import write_table
from nas.data import Dataset, DataSpec
from nas.data.prepare import prepared
from nas.data.sources import DataSource
from space.errors import refuse

if TYPE_CHECKING:
    from nas.data.augment.spec import AugmentSpec
    from nas.transfer.backbone import Backbone
    from nas.transfer.probes import FeatureSet
    from nas.transfer.rows import TransferRow

CHECKS = ("probe", "knn", "segment")


def _names(flag: str, given: Any) -> tuple[str, ...]:
    return tuple(name.strip() for text in given for name in text.split(","))


@dataclass(frozen=True)
class TransferConfig:
    """What to check; `img_size` None is the model's own. Raises InputError."""

    source: Path
    data: str | None = setting(None, "as in nas.contract, with classes; not needed for segment")
    checks: tuple[str, ...] = setting(CHECKS, "some of them", parse=_names, repeats=True, default_text=",".join(CHECKS))
    img_size: int | None = setting(
        None, "of all checks", metavar="PX", low=16, high=1024, default_text="the model's own"
    )
    random_seed: int = setting(0, "of the fresh weights, the cuts, the masks and the head", metavar="N")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    epochs: int | None = setting(None, "of the segmentation", metavar="N", low=1, default_text="12; 5 with --finetune")
    finetune: bool = setting(False, "segment: train the backbone, too")
    out: str | None = setting(None, "write the rows, as shares", metavar="FILE.csv")
    max_images: int | None = changed_setting(DataConfig, "max_images", group="which images of --data")
    max_test_images: int | None = changed_setting(DataConfig, "max_test_images")
    splits: str | None = changed_setting(DataConfig, "splits")
    classes: str | None = changed_setting(DataConfig, "classes")
    annotations: str | None = changed_setting(DataConfig, "annotations")
    max_corrupt: float = changed_setting(DataConfig, "max_corrupt")
    pixel_cache: bool = changed_setting(DataConfig, "pixel_cache")

    def __post_init__(self) -> None:
        from nas.measure.fingerprint import take_fingerprint

        check_settings(self)
        for name in self.checks or ("nothing",):
            if name not in CHECKS:
                raise refuse("--checks", name, f"some of {', '.join(CHECKS)}, with commas between")
        if self.on_data and self.data is None:
            raise refuse("--data", "nothing", "a data set for probe and knn", "or --checks segment")
        for flag, given in (("--epochs", self.epochs is not None), ("--finetune", self.finetune)):
            if given and "segment" not in self.checks:
                raise refuse(flag, f"--checks {','.join(self.checks)}", "segment among the checks")
        if self.out is not None:
            out = Path(self.out).expanduser()
            if out.suffix != ".csv" or out.is_dir():
                raise refuse("--out", out, "a file that ends in .csv")
            if not out.parent.is_dir():
                raise refuse("--out", out, "a place in a folder that exists", f"make {out.parent}")
        take_fingerprint(self.device, threads=1)  # refuses a device that is not there

    @property
    def on_data(self) -> bool:
        """Whether a data set is read."""
        return set(self.checks) != {"segment"}


def transfer(config: TransferConfig, cache_dir: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Check a model's backbone on other data beside the same arch with fresh weights.

    Returns plain JSON: "rows" (`nas.transfer.rows.TransferRow`, shares) and "seconds" by check. Raises InputError.
    """
    from nas.data.augment.spec import AugmentSpec
    from nas.transfer.backbone import open_backbone

    console = Console(quiet=True) if console is None else console
    rows: list[TransferRow] = []
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    with tempfile.TemporaryDirectory(prefix="transfer-") as scratch:
        backbone = open_backbone(config.source, config.img_size, Path(scratch))
        for note in backbone.notes:
            console.line(note)
        mean, std = ((v[0], v[1], v[2]) for v in (backbone.mean, backbone.std))
        spec = AugmentSpec(backbone.img_size, mean, std)
        dataset = _read(config, backbone, cache_dir or default_cache(), console) if config.on_data else None
        with console.bar(_units(config, dataset)):
            if dataset is not None:
                with timed("features"):
                    features = [
                        _features(config, backbone, dataset, spec, seed, console) for seed in (None, config.random_seed)
                    ]
                for name in ("probe", "knn"):
                    if name in config.checks:
                        with timed(name):
                            rows += _probed(name, features, dataset.num_classes, console)
            if "segment" in config.checks:
                with timed("segment"):
                    rows += _segmented(config, backbone, spec, console)
    if config.out is not None:
        try:
            write_table(Path(config.out).expanduser(), rows)
        except OSError as error:
            raise refuse("--out", config.out, "a place to write to", error.strerror or "") from error
    return {
        "source": str(config.source),
        "data": config.data,
        "img_size": backbone.img_size,
        "random_seed": config.random_seed,
        "finetune": config.finetune,
        "rows": [asdict(row) for row in rows],
        "seconds": seconds,
    }


def _read(config: TransferConfig, backbone: Backbone, cache: Path, console: Console) -> Dataset:
    """Read the data set of the probes; it needs classes."""
    assert config.data is not None

    def check(source: DataSource) -> None:
        if len(source.classes) < 2:
            got = f"{config.data}, {'one class' if source.classes else 'images without classes'}"
            raise refuse("--data", got, "a folder a class, two at least", "or --checks segment")

    return prepared(DataSpec.of(config, config.random_seed, img_size=backbone.img_size), cache, console, check)


def _units(config: TransferConfig, dataset: Dataset | None) -> float:
    """Count the images that pass through both networks, for the progress bar."""
    total = 0.0
    if dataset is not None:
        total += sum(len(side) for side in (dataset.train, dataset.holdout, dataset.test))
    if "segment" in config.checks:
        from nas.transfer.segmentation import TEST_IMAGES, TRAIN_IMAGES, settings_of

        epochs = settings_of(config.epochs, config.finetune).epochs
        total += TRAIN_IMAGES * epochs + TEST_IMAGES
    return 2 * total


def _features(
    config: TransferConfig, backbone: Backbone, dataset: Dataset, spec: AugmentSpec, seed: int | None, console: Console
) -> tuple[FeatureSet, ...]:
    """Compute the features of train, holdout and test, of trained (None) or fresh weights."""
    import numpy as np

    from nas.transfer.probes import features_of

    console.describe(f"features, {_weights(seed)} weights")
    model = backbone.classifier(seed)
    found = tuple(
        features_of(model, split, spec, config.device, console.advance)
        for split in (dataset.train, dataset.holdout, dataset.test)
    )
    if not all(np.isfinite(side.features).all() for side in found):
        got = f"features of its {_weights(seed)} weights that are not finite"
        raise refuse(str(config.source), got, "a network that works", "is it damaged?")
    return found


def _weights(seed: int | None) -> str:
    return "trained" if seed is None else "random"


def _probed(name: str, features: Sequence[tuple[FeatureSet, ...]], classes: int, console: Console) -> list[TransferRow]:
    """Probe the features of both networks."""
    from nas.core.metrics import paired_shares
    from nas.transfer.probes import knn_probe, linear_probe
    from nas.transfer.rows import pair

    if name == "probe":
        console.describe("linear probe")
        found = [linear_probe(train, holdout, test) for train, holdout, test in features]
    else:
        console.describe("nearest neighbours")
        found = [knn_probe(train, holdout, test, classes) for train, holdout, test in features]
    trained, random = found
    values = [mean_se(one.right) for one in found]
    only_trained, only_random = trained.right & ~random.right, random.right & ~trained.right
    difference = paired_shares(int(only_trained.sum()), int(only_random.sum()), len(random.right))
    return pair(name, "top1", values, len(trained.right), difference, [p.chosen for p in found])


def _segmented(config: TransferConfig, backbone: Backbone, spec: AugmentSpec, console: Console) -> list[TransferRow]:
    """Train and test a segmentation on both networks."""
    from nas.train.loop import Diverged
    from nas.transfer.rows import bootstrapped, mean_iou, pair, paired_bootstrap, pixel_accuracy
    from nas.transfer.segmentation import KINDS, scenes, segment, settings_of

    console.describe("segment: drawing images")
    settings, random_seed = settings_of(config.epochs, config.finetune), config.random_seed
    sides = scenes(backbone.img_size, random_seed)
    fit, test = (len(side.images) for side in sides)
    length = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"
    how = f"{'fine-tuned' if config.finetune else 'frozen'}, {length}"
    console.line(f"segment: {fit} formula-driven images to train, {test} test, {len(KINDS)} classes; backbone {how}")
    counts = []
    for seed in (None, random_seed):
        console.describe(f"segment, {_weights(seed)} weights")
        try:
            counts.append(
                segment(
                    backbone.pyramid(seed),
                    sides,
                    spec,
                    settings,
                    finetune=config.finetune,
                    random_seed=random_seed,
                    device=config.device,
                    tick=console.advance,
                )
            )
        except Diverged as error:
            got = f"segmentation on its {_weights(seed)} weights: {error}"
            raise refuse(str(config.source), got, "a loss that stays finite") from None
    rows = []
    for name, metric in (("mean_iou", mean_iou), ("pixel_accuracy", pixel_accuracy)):
        values = [bootstrapped(metric, each, random_seed) for each in counts]
        difference = paired_bootstrap(metric, counts[0], counts[1], random_seed)
        rows += pair("segment", name, values, test, difference, [how, how])
    return rows


@dataclass(frozen=True)
class _Process:
    """What one process does; changes no answer."""

    cache_dir: str | None = setting(None, "decoded data", metavar="DIR", default_text="as in nas.contract")
    quiet: bool = setting(False, "print nothing but errors, warnings and --json")
    json: bool = setting(False, "end with one line of JSON")


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser("python -m nas.transfer", description=__doc__)
    source = "a run's folder, a model's JSON, weights, or an export"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=source)
    add_settings(parser, TransferConfig)
    add_settings(parser, _Process)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and check. Returns the exit status: 0, or 2 for bad input."""

    def work() -> int:
        given = vars(build_parser().parse_args(argv))
        # As the executor does for its workers; torch, which reads it, is not imported yet.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        from nas.report.tables import plain
        from nas.transfer.rows import HEADER, TransferRow, cells

        names = [f.name for f in settings_of(TransferConfig) if given[f.name] is not None]
        options = parsed(TransferConfig, {name: given[name] for name in names})
        console = Console(quiet=given["quiet"])
        config = TransferConfig(given["source"].expanduser(), **options)
        cache = default_cache() if given["cache_dir"] is None else Path(given["cache_dir"])
        found = transfer(config, cache.expanduser(), console)
        for line in plain(HEADER, [cells(TransferRow(**row)) for row in found["rows"]]).split("\n"):
            console.line(line)
        took = ", ".join(f"{name} {seconds:g} s" for name, seconds in found["seconds"].items())
        console.line(f"random: the same arch, fresh weights of random seed {config.random_seed}")
        console.line(f"took: {took}")
        if given["json"]:
            print(json.dumps(found))
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
