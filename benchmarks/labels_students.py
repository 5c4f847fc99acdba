"""What stored labels teach: how many classes to keep, what pretraining with them is worth, and
whether the truth is needed at all.

    python -m benchmarks.labels_students [--seeds 2] [--epochs 16] [--images 4000] [--threads N]
                                         [--cache-dir DIR] [--out CSV] [--figure PNG]

The formula-driven images (100 classes, 48 px) with the auto teacher, whose 99 best classes are
stored: with the one that is left that is the dense label. Every student of a random seed starts
alike and sees the same inputs in the same order.

1. topk: a small student trained on the best K of the stored classes, and tested on the holdout
   against the dense labels: soft loss in nats, top-1, and the bytes a record of that K takes.
2. truth: the same with soft labels alone (no ground truth), with hard labels alone, and with half
   of each.
3. pretraining: a small and a large student are trained for a few epochs on the hard labels of 600
   of the images - from fresh weights, or from those that training on all images left, with hard or
   with soft labels - and tested on the test set.

Prints tables and, as its last line, JSON; the figure shows part 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.labels_stock import SMALL
from nas.core.io import write_atomic
from nas.core.progress import Console
from nas.core.table import Writer
from nas.data import Dataset, DataSpec, prepare
from nas.data.augment.spec import default_spec
from nas.distill.student import Evaluation, evaluate_test, proxy_settings, train_and_score
from nas.labels import api as label_tool
from nas.labels.codec import make_codec
from nas.labels.store import LabelStore, open_store
from nas.measure.fingerprint import take_fingerprint
from nas.train.losses import SoftLoss
from nas.train.rates import SCRATCH_LR
from space import Context, InputError, get_family
from space.errors import refuse
from space.family import Arch

FAMILY = get_family("tinyvit")
KEPT = (1, 5, 10, 50, 99)
IMG_SIZE = 48
TUNE_IMAGES, TUNE_EPOCHS = 600, 6
TRUTHS: Mapping[str, SoftLoss] = {
    "soft labels only": SoftLoss(),
    "hard labels only": SoftLoss(hard_weight=1.0),
    "half of each": SoftLoss(hard_weight=0.5),
}
COLUMNS = (
    "part",
    "student",
    "way",
    "random_seed",
    "topk",
    "bytes_a_record",
    "soft_loss",
    "soft_loss_se",
    "top1",
    "top1_se",
    "images",
    "epochs",
    "seconds",
    "fingerprint",
)
Row = dict[str, Any]


def arch_of(student: str) -> Arch:
    """The small student is about a tenth of the 21M, the large one the published 5M."""
    return FAMILY.arch(SMALL) if student == "small" else FAMILY.seed("5M")


class Study:
    """The data, the labels, and one training after another."""

    def __init__(self, cache: Path, images: int, epochs: int, threads: int) -> None:
        self.cache, self.epochs, self.threads = cache, epochs, threads
        self.console = Console()
        self.data, self.store = self._stored(
            "fractals", images, epochs, topk=99, codec="plain", teacher_epochs=15
        )
        self.weights = cache / "weights"
        self.weights.mkdir(exist_ok=True)

    def _stored(
        self, name: str, images: int, epochs: int, **options: Any
    ) -> tuple[Dataset, LabelStore]:
        spec = DataSpec(name, img_size=IMG_SIZE, proxy_images=images)
        made = label_tool.build(
            name,
            img_size=IMG_SIZE,
            proxy_images=images,
            epochs=epochs,
            threads=self.threads,
            cache_dir=self.cache,
            console=self.console,
            **options,
        )
        return prepare(spec, self.cache), open_store(Path(made["folder"]))

    def train(self, student: str, random_seed: int, way: str, loss: SoftLoss, topk: int) -> Row:
        """Train from fresh weights on the images; weights and score stay for later parts."""
        kept = self.weights / f"{student}-{random_seed}-{way.replace(' ', '-')}-{topk}.safetensors"
        told = kept.with_suffix(".json")
        if not told.exists():
            score = train_and_score(
                FAMILY,
                arch_of(student),
                self.context(self.data),
                store=self.store,
                dataset=self.data,
                settings=proxy_settings(self.epochs, SCRATCH_LR),
                init="scratch",
                random_seed=random_seed,
                device="cpu",
                loss=loss,
                topk=topk,
                out_weights=kept,
            )
            write_atomic(told, json.dumps(score.to_dict()).encode())
        row = _row(json.loads(told.read_bytes()), student, way, random_seed)
        codec = make_codec("packed", topk, self.data.num_classes)
        row.update(topk=topk, bytes_a_record=codec.record_bytes)
        self.console.line(
            f"{student} seed {random_seed} {way} K={topk}: soft loss {row['soft_loss']:.4f}, "
            f"top-1 {row['top1']:.1%}"
        )
        return row

    def context(self, dataset: Dataset) -> Context:
        """Where a student is built."""
        return Context(dataset.img_size, dataset.num_classes)

    def tune(self, student: str, random_seed: int, way: str) -> Row:
        """Train on the hard labels of few images; top-1 is the test set's."""
        arch, ctx = arch_of(student), self.context(self.data)
        parent: dict[str, Any] = {"init": "scratch"}
        if way != "none":
            names = {"hard": "hard-labels-only", "distilled": "soft-labels-only"}
            kept = self.weights / f"{student}-{random_seed}-{names[way]}-10.safetensors"
            parent = {"init": "inherit", "parent_arch": arch, "parent_weights": kept}
        settings = proxy_settings(TUNE_EPOCHS, SCRATCH_LR)  # the same recipe for all
        out = self.weights / "tuned.safetensors"
        score = train_and_score(
            FAMILY,
            arch,
            ctx,
            store=self.store,
            dataset=self.data,
            settings=settings,
            random_seed=random_seed,
            device="cpu",
            loss=SoftLoss(hard_weight=1.0),
            out_weights=out,
            images_per_epoch=TUNE_IMAGES,
            **parent,
        )
        tested: Evaluation = evaluate_test(
            FAMILY, arch, ctx, out, self.data, default_spec(self.data), device="cpu"
        )
        row = _row(score.to_dict(), student, way, random_seed)
        top1 = float(np.mean(tested.correct))
        error = (top1 * (1 - top1) / len(tested.correct)) ** 0.5
        row.update(top1=round(top1, 4), top1_se=round(error, 4))
        self.console.line(f"{student} seed {random_seed} after {way}: test top-1 {top1:.1%}")
        return row


def _row(score: Mapping[str, Any], student: str, way: str, random_seed: int) -> Row:
    return {
        "student": student,
        "way": way,
        "random_seed": random_seed,
        "topk": "",
        "bytes_a_record": "",
        **{k: round(score[k], 5) for k in ("soft_loss", "soft_loss_se", "top1", "top1_se")},
        "images": score["images"] // score["epochs"],
        "epochs": score["epochs"],
        "seconds": round(score["seconds"], 1),
    }


def measure(study: Study, seeds: int, large_seeds: int) -> list[Row]:
    """Do all three parts; one row a training."""
    rows: list[Row] = []
    for seed in range(seeds):
        for topk in KEPT:
            way = "soft labels only"
            rows.append({"part": "topk", **study.train("small", seed, way, TRUTHS[way], topk)})
        for way, loss in TRUTHS.items():
            rows.append({"part": "truth", **study.train("small", seed, way, loss, 10)})
        students = ["small", "large"] if seed < large_seeds else ["small"]
        for way in ("soft labels only", "hard labels only") if "large" in students else ():
            study.train("large", seed, way, TRUTHS[way], 10)
        for student in students:
            for way in ("none", "hard", "distilled"):
                rows.append({"part": "pretraining", **study.tune(student, seed, way)})
    return rows


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean over random seeds, and their range."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["part"], row["student"], row["way"], row["topk"]), []).append(row)
    lines = []
    for (part, student, way, topk), same in found.items():
        loss, top1 = ([row[k] for row in same] for k in ("soft_loss", "top1"))
        lines.append(
            {
                "part": part,
                "student": student,
                "way": way,
                "topk": topk,
                "seeds": len(same),
                "bytes_a_record": same[0]["bytes_a_record"],
                "soft_loss": round(float(np.mean(loss)), 4),
                "soft_loss_lo": min(loss),
                "soft_loss_hi": max(loss),
                "top1": round(float(np.mean(top1)), 4),
                "top1_lo": min(top1),
                "top1_hi": max(top1),
            }
        )
    return lines


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw part 1: holdout loss and top-1 against K, with the range over random seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = [line for line in lines if line["part"] == "topk"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    x = [line["topk"] for line in kept]
    for axis, name, said, scale in (
        (axes[0], "soft_loss", "soft loss on the holdout against dense labels, nats", 1.0),
        (axes[1], "top1", "top-1 on the holdout, %", 100.0),
    ):
        y = np.array([line[name] for line in kept]) * scale
        # A mean that was rounded may lie outside its range by as much.
        lo = np.minimum(np.array([line[f"{name}_lo"] for line in kept]) * scale, y)
        hi = np.maximum(np.array([line[f"{name}_hi"] for line in kept]) * scale, y)
        axis.errorbar(x, y, yerr=[y - lo, hi - y], marker="o", capsize=3, color="#1f5fa8")
        for line, at, top in zip(kept, x, hi, strict=True):
            axis.annotate(
                f"{line['bytes_a_record']} B",
                (at, top),
                textcoords="offset points",
                xytext=(0, 5),
                ha="center",
                fontsize=8,
                color="#555555",
            )
        axis.set_xscale("log")
        axis.set_xticks(x, [str(k) if k < 99 else "dense" for k in x])
        axis.minorticks_off()
        axis.margins(y=0.2)
        axis.set_xlabel("classes kept of a label (of 100); bytes a packed record")
        axis.set_title(said, fontsize=10)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw; 0, or 2 for bad input. The last line is JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.labels_students", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument(
        "--large-seeds", type=int, metavar="N", help="of the large student (default: --seeds)"
    )
    parser.add_argument("--epochs", type=int, default=16, metavar="N")
    parser.add_argument("--images", type=int, default=4000, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--cache-dir", type=Path, help="goes on there (default: a fresh folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args(argv)
    try:
        for name in ("seeds", "epochs", "threads"):
            if getattr(arguments, name) < 1:
                raise refuse(f"--{name}", getattr(arguments, name), "an integer >= 1")
        if arguments.images < 400:
            raise refuse("--images", arguments.images, "an integer >= 400")
        if arguments.cache_dir is not None:
            return _report(arguments, arguments.cache_dir)
        with tempfile.TemporaryDirectory() as folder:
            return _report(arguments, Path(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _report(arguments: argparse.Namespace, cache: Path) -> int:
    torch.set_num_threads(arguments.threads)
    where = take_fingerprint("cpu", arguments.threads)
    study = Study(cache, arguments.images, arguments.epochs, arguments.threads)
    few = arguments.seeds if arguments.large_seeds is None else arguments.large_seeds
    rows = measure(study, arguments.seeds, few)
    lines = summary(rows)
    text = io.StringIO()
    writer = Writer(text, COLUMNS)
    writer.writeheader()
    writer.writerows({**row, "fingerprint": where.id} for row in rows)
    if arguments.out:
        write_atomic(arguments.out, text.getvalue().encode())
    if arguments.figure:
        draw(lines, arguments.figure)
    for line in lines:
        print(
            f"{line['part']:12} {line['student']:6} {line['way']:18} K={line['topk'] or '-':<3} "
            f"loss {line['soft_loss']:.4f} [{line['soft_loss_lo']:.4f}, {line['soft_loss_hi']:.4f}]"
            f"  top-1 {line['top1']:.1%} [{line['top1_lo']:.1%}, {line['top1_hi']:.1%}]"
        )
    print(json.dumps({"summary": lines, "device": where.describe()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
