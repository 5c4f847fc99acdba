"""Ways of learning from a teacher, side by side: `python -m benchmarks.distill --data digits`.

The same student, images, epochs and rate, over random seeds: from true labels alone, softly, hardly
and through a distillation token with a teacher that is asked while training, and by sparse replay
of labels that were stored once (the shape of DeiT's Table 3). Then a convolutional against a
transformer teacher of about equal accuracy, and how far the student's errors follow each (its
Tables 2 and 4). Trainings are those of `nas.train`, kept in --folder and gone on with.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks._estimates import Row, crossed, in_words, seeds_of, share, write_rows
from nas.command import Parser, default_cache, guarded
from nas.data import Dataset, DataSpec, prepare
from nas.files import read_json, write_json
from nas.label_tool import build as build_labels
from nas.progress import Console
from space.checks import read_int
from space.errors import refuse

STUDENT = {
    "embed_dim": 96, "depth": 4, "head_dim": 32, "mlp_ratio": 2.0, "patch_size": 8,
    "dist_token": False,
}  # fmt: skip
TRANSFORMER = {**STUDENT, "embed_dim": 160, "depth": 8}
HEADS = ("class", "distillation", "both")
CONV_EPOCHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)
"""Lengths of the convolutional teacher's training among which one of equal accuracy is sought."""

TIMED_EPOCHS = 4

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Method:
    """A way of learning: its name in tables, the flags of nas.train, whether it takes a token."""

    name: str
    flags: tuple[str, ...]
    token: bool = False


def methods(store: Path, epochs: int) -> list[Method]:
    """List the ways of learning; soft distillation is the paper's usual one, 0.1 at T = 3."""
    online = ("--teacher", "auto", "--teacher-epochs", str(epochs))
    usual = ("--set", "distill_alpha=0.1", "--set", "temperature=3")
    return [
        Method("none", ()),
        Method("soft", (*online, "--distill", "soft", *usual)),
        Method("hard", (*online, "--distill", "hard")),
        Method("token", (*online, "--distill", "token"), token=True),
        Method("sparse replay", ("--labels", str(store), "--distill", "sparse")),
    ]


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.distill", description=__doc__)
    add = parser.add_argument
    add("--data", default="digits")
    add("--img-size", type=int, default=48, metavar="PX")
    add("--proxy-images", type=int, metavar="N", help="images read (default: all)")
    add("--epochs", type=int, default=30)
    add("--teacher-epochs", type=int, default=15)
    add("--transformer-epochs", type=int, default=60)
    add("--random-seeds", default="0,1,2")
    add("--jobs", type=int, default=2, help="trainings at a time, of one thread each (2)")
    add("--rounds", type=int, default=5, help="of timing (5)")
    add("--no-teachers", dest="teachers", action="store_false", help="leave the second part out")
    add("--folder", type=Path, help="where trainings go (default: results/runs/distill-DATA)")
    add("--out", type=Path, help="default: results/distill_DATA.csv")
    return parser


class Bench:
    """The trainings of one data set, done or taken over, and what they say of its test images."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.seeds = seeds_of(given.random_seeds)
        read_int("--jobs", given.jobs, 1, 64)
        read_int("--rounds", given.rounds, 1, 1000)
        name = Path(given.data).name
        self.folder: Path = given.folder or Path(f"results/runs/distill-{name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = DataSpec(given.data, given.img_size, given.proxy_images or 10**9)
        self.dataset: Dataset = prepare(spec, default_cache(), lambda _: None)
        self.truth: Ints = np.asarray(self.dataset.test.labels, dtype=np.int64)
        for token in (False, True):
            arch = {**STUDENT, "dist_token": token}
            write_json(self.arch(token), {"family": "vit", "arch": arch})
        write_json(self.folder / "transformer.json", {"family": "vit", "arch": TRANSFORMER})

    def arch(self, token: bool) -> Path:
        """Say where the student's arch is written."""
        return self.folder / f"student{'-token' if token else ''}.json"

    def store(self) -> tuple[Path, float]:
        """Make the labels that are replayed; returns the store and the seconds it took."""
        path = self.folder / "labels"
        told = self.folder / "labels.json"
        if not told.is_file():
            self.teacher("auto", self.given.teacher_epochs)  # one for all, so not part of the time
            began = time.monotonic()
            build_labels(
                self.given.data, epochs=self.given.epochs, out=path, threads=1,
                teacher_epochs=self.given.teacher_epochs, img_size=self.given.img_size,
                proxy_images=self.given.proxy_images or 10**9,
            )  # fmt: skip
            write_json(told, {"seconds": time.monotonic() - began})
        return path, float(read_json(told, "the time of a store")["seconds"])

    def train(self, name: str, arch: Path, seed: int, epochs: int, flags: Sequence[str]) -> Path:
        """Do a training, go on with it, or take it over."""
        out = self.folder / name
        given = self.given
        images = ["--proxy-images", str(given.proxy_images)] if given.proxy_images else []
        asked = [
            *("--arch", str(arch), "--data", given.data, "--img-size", str(given.img_size)),
            *("--epochs", str(epochs), "--random-seed", str(seed), "--threads", "1"),
            *("--out", str(out), *images, *flags),
        ]
        told = out.with_name(f"{out.name}.flags.json")
        if told.is_file() and read_json(told, "the flags of a training") != asked:
            raise refuse(
                str(out), "a training with other flags", "the same", "name another --folder"
            )
        write_json(told, asked)
        if (out / "result.json").is_file():
            return out
        start = ["--resume", str(out)] if (out / "train.json").is_file() else asked
        done = subprocess.run(
            [sys.executable, "-m", "nas.train", *start, "--quiet"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            (out / "result.json").unlink(missing_ok=True)
            raise refuse(name, said[-1], "a training that ends")
        return out

    def heads(self, out: Path) -> dict[str, Ints]:
        """Say what each head of a training's best model predicts on the test split."""
        import torch

        from nas.distill.presets import preset_spec
        from nas.distill.teaching import both_heads, fuse, has_token
        from nas.exporting.model import left_by
        from nas.trainer.evaluation import evaluate

        model = left_by(out).build()
        spec = preset_spec("default", self.dataset)
        classes = self.dataset.num_classes
        if not has_token(model):
            found = evaluate(model, self.dataset.test, spec, num_classes=classes)
            return {"class": found.predicted}

        def head(which: str) -> Any:
            def network(inputs: torch.Tensor) -> torch.Tensor:
                pair = both_heads(model, inputs)
                return fuse(pair, "logits") if which == "both" else pair[HEADS.index(which)]

            return network

        return {
            which: evaluate(head(which), self.dataset.test, spec, num_classes=classes).predicted
            for which in HEADS
        }

    def teacher(self, spec: str, epochs: int) -> tuple[float, Ints]:
        """Make a teacher or take it over: its accuracy on the holdout, what it predicts on test."""
        import torch

        from nas.distill.augment import default_spec
        from nas.distill.teacher import load_teacher, make_teacher, parse_teacher
        from nas.trainer.evaluation import evaluate

        torch.set_num_threads(1)
        info = make_teacher(
            parse_teacher(spec), self.dataset, default_cache(), random_seed=0, epochs=epochs,
            device="cpu", threads=1,
        )  # fmt: skip
        found = evaluate(
            load_teacher(info), self.dataset.test, default_spec(self.dataset),
            num_classes=self.dataset.num_classes,
        )  # fmt: skip
        return info.holdout_top1, found.predicted

    def transformer(self) -> tuple[str, float, Ints]:
        """Train the transformer teacher and export it: where it lies, holdout top-1, test."""
        from nas import export

        out = self.train(
            "transformer", self.folder / "transformer.json", 0, self.given.transformer_epochs, ()
        )
        hub = self.folder / "transformer-hub"
        if not hub.is_dir():
            parser = export.build_parser()
            export.export(parser.parse_args([str(out), "--to", "timm", "--out", str(hub)]))
        top1, predicted = self.teacher(str(hub), 1)
        return str(hub), top1, predicted


def _percent(label: str, table: npt.ArrayLike, note: str, command: str) -> Row:
    """Make a row of a mean in %, of [random seeds, images], either drawn anew for its interval."""
    values = np.asarray(table, dtype=np.float64)
    estimate, lo, hi = (100 * x for x in crossed(values, random_seed=0))
    return Row(label, estimate, lo, hi, len(values), "random seeds", note, command)


def _ratio(label: str, ratios: Sequence[float], note: str, command: str) -> Row:
    """Make a row of a median with its range."""
    middle = float(np.median(ratios))
    return Row(label, middle, min(ratios), max(ratios), len(ratios), "rounds", note, command)


def together(
    bench: Bench, tasks: Sequence[tuple[str, Method, int]]
) -> list[tuple[str, Method, Path]]:
    """Do trainings, --jobs at a time; a task is (name of its folder, way of learning, seed)."""

    def work(task: tuple[str, Method, int]) -> tuple[str, Method, Path]:
        name, method, seed = task
        arch = bench.arch(method.token)
        folder = f"{name}-r{seed}".replace(" ", "-")
        return name, method, bench.train(folder, arch, seed, bench.given.epochs, method.flags)

    with ThreadPoolExecutor(bench.given.jobs) as pool:
        return list(pool.map(work, tasks))


def costs_of(bench: Bench, store: Path, seconds: float, command: str) -> list[Row]:
    """Time an epoch of every method, one training at a time, in turns: ratios within a round."""
    every = methods(store, bench.given.teacher_epochs)
    spent: dict[str, list[tuple[float, float]]] = {}
    for turn in range(bench.given.rounds):
        for method in every if turn % 2 == 0 else reversed(every):
            name = f"time-{method.name}-{turn}".replace(" ", "-")
            out = bench.train(name, bench.arch(method.token), 0, TIMED_EPOCHS, method.flags)
            log = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
            # The first epoch warms up.
            quickest = min(float(row["seconds"]) for row in log[1:])
            spent.setdefault(method.name, []).append(
                (quickest, float(log[-1]["peak_mem_bytes"]) / 1e6)
            )
    rows = []
    for name, costs in spent.items():
        pairs = list(zip(costs, spent["none"], strict=True))
        note = f"median and range; {np.median([c[0] for c in costs]):.2f} s"
        if name == "sparse replay":
            note += f", and {seconds:.0f} s once for the labels of {bench.given.epochs} epochs"
        rows.append(
            _ratio(f"an epoch, x none: {name}", [a[0] / b[0] for a, b in pairs], note, command)
        )
        rows.append(
            _ratio(
                f"peak memory less none's, MB: {name}", [a[1] - b[1] for a, b in pairs],
                f"of the process; median and range; {np.median([c[1] for c in costs]):.0f} MB",
                command,
            )
        )  # fmt: skip
    return rows


def table_of(bench: Bench, store: Path, command: str) -> tuple[list[Row], list[Ints]]:
    """Train every method with every random seed, and tell (DeiT's Table 3); returns rows and what
    the students of no teacher predict."""
    given = bench.given
    bench.teacher("auto", given.teacher_epochs)  # once, before trainings ask for it side by side
    # Seed by seed, so that what the machine does in between meets all methods alike.
    every = methods(store, given.teacher_epochs)
    done = together(bench, [(m.name, m, seed) for seed in bench.seeds for m in every])
    said: dict[tuple[str, str], list[Ints]] = {}
    for name, _, out in done:
        for head, predicted in bench.heads(out).items():
            said.setdefault((name, head), []).append(predicted)
    right = {of: np.array(each) == bench.truth for of, each in said.items()}
    plain = right["none", "class"].astype(np.float64)
    rows = []
    for (name, head), hits in right.items():
        label = f"{name}, {head} head" if name == "token" else name
        by_seed = " ".join(f"{100 * x:.1f}" for x in hits.mean(1))
        rows.append(_percent(f"top-1 %: {label}", hits, f"by seed {by_seed}", command))
        if name != "none":
            note = "paired over seeds and images"
            rows.append(_percent(f"points over none: {label}", hits - plain, note, command))
    return rows, said["none", "class"]


def teachers_of(bench: Bench, untaught: list[Ints], command: str) -> list[Row]:
    """Compare two teachers of about equal accuracy (DeiT's Tables 2 and 4)."""
    truth = bench.truth
    place, wanted, transformer = bench.transformer()
    tried = {epochs: bench.teacher("auto", epochs) for epochs in CONV_EPOCHS}
    epochs = min(tried, key=lambda e: abs(tried[e][0] - wanted))
    flags = {
        "convolutional": ("--teacher", "auto", "--teacher-epochs", str(epochs)),
        "transformer": ("--teacher", place),
    }
    found = {"convolutional": tried[epochs], "transformer": (wanted, transformer)}
    rows = []
    note_of_one = "paired over seeds and images; one teacher of each kind"
    for kind, (top1, predicted) in found.items():
        estimate, lo, hi = (100 * x for x in share(int((predicted == truth).sum()), len(truth)))
        note = f"{100 * top1:.1f} on the holdout, by which it was chosen"
        rows.append(Row(f"teacher's top-1 %: {kind}", estimate, lo, hi, len(truth), "test images",
                        note, command))  # fmt: skip
    ways = [
        Method(f"{kind} {way}", (*flags[kind], "--distill", way), token=way == "token")
        for way in ("hard", "token") for kind in found
    ]  # fmt: skip
    done = together(bench, [(m.name, m, seed) for seed in bench.seeds for m in ways])
    students: dict[str, list[Ints]] = {"no teacher": untaught}
    for name, method, out in done:
        heads = bench.heads(out)
        students.setdefault(name, []).append(heads["both" if method.token else "class"])
    right = {name: (np.array(each) == truth).astype(np.float64) for name, each in students.items()}
    for way in ("hard", "token"):
        for kind in found:
            label = f"top-1 %: {way}, {kind} teacher"
            rows.append(_percent(label, right[f"{kind} {way}"], "", command))
        apart = right[f"convolutional {way}"] - right[f"transformer {way}"]
        note = "paired over seeds and images"
        rows.append(
            _percent(f"points, convolutional less transformer: {way}", apart, note, command)
        )
    for way in ("hard", "token"):
        for other, (_, predicted) in found.items():
            own, rival = (
                (np.array(students[f"{kind} {way}"]) == predicted).astype(np.float64)
                for kind in (other, next(k for k in found if k != other))
            )
            label = (
                f"points of agreement with the {other} teacher, its own students less the other's"
            )
            rows.append(_percent(f"{label}: {way}", own - rival, note_of_one, command))
    for name, several in students.items():
        for other, (_, predicted) in found.items():
            alike = np.array(several) == predicted
            label = f"agreement % with the {other} teacher: {name}"
            rows.append(_percent(label, alike, "share of test images of the same class", command))
            wrong = predicted != truth
            if wrong.any():
                note = f"on the {int(wrong.sum())} images that it gets wrong"
                label = f"same error % as the {other} teacher: {name}"
                rows.append(_percent(label, alike[:, wrong], note, command))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, write. Returns the exit status: 0, or 2 for bad input."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        console = Console()
        name = Path(given.data).name
        out: Path = given.out or Path(f"results/distill_{name}.csv")
        command = "python -m benchmarks.distill " + " ".join(
            argv if argv is not None else sys.argv[1:]
        )
        bench = Bench(given)
        store, seconds = bench.store()
        rows, untaught = table_of(bench, store, command)
        rows += costs_of(bench, store, seconds, command)
        if given.teachers:
            rows += teachers_of(bench, untaught, command)
        for row in rows:
            console.line(in_words(row))
        write_rows(out, rows)
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
