"""One process against two, on the same whole batches: `python -m benchmarks.processes`.

Trainings of `nas.train` on digits. A ViT, in which no image's result depends on others: curves and
last weights of two processes against one in two turns and one in one. A TinyViT, whose batch norms
see their own part of a batch only: the last holdout loss and top-1 over random seeds.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks._estimates import Row, in_words, seeds_of, write_rows
from nas.command import Parser, guarded
from nas.files import write_json
from nas.progress import Console
from space.errors import refuse

VIT = {
    "embed_dim": 96, "depth": 4, "head_dim": 32, "mlp_ratio": 2.0, "patch_size": 8,
    "dist_token": False,
}  # fmt: skip
TINYVIT = {
    "embed_dims": [32, 64, 96, 128], "depths": [1, 1, 2, 1], "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0, "mlp_ratio": 4.0, "head_dim": 32,
}  # fmt: skip


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.processes", description=__doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=10)
    add("--random-seeds", default="0,1,2,3,4")
    add("--folder", type=Path, default=Path("results/runs/processes"))
    add("--out", type=Path, default=Path("results/processes.csv"))
    return parser


def train(
    given: argparse.Namespace,
    name: str,
    family: str,
    *flags: str,
    seed: int = 0,
    processes: int = 1,
) -> Path:
    """Train on digits in a number of processes of one thread each, or take it over."""
    out: Path = given.folder / f"{name}-r{seed}"
    if (out / "result.json").is_file():
        return out
    given.folder.mkdir(parents=True, exist_ok=True)
    arch = given.folder / f"{family}.json"
    write_json(arch, {"family": family, "arch": VIT if family == "vit" else TINYVIT})
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [
            sys.executable, *(start if processes > 1 else []), "-m", "nas.train",
            *("--arch", str(arch), "--data", "digits", "--epochs", str(given.epochs)),
            *("--random-seed", str(seed), "--threads", "1", "--out", str(out), "--quiet", *flags),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise refuse(name, done.stderr.strip().splitlines()[-1], "a training that ends")
    return out


def column(out: Path, name: str) -> np.ndarray:
    """Read a column of a training's log: float64 [epochs]."""
    rows = csv.DictReader((out / "log.csv").read_text().splitlines())
    return np.array([float(row[name]) for row in rows])


def apart(a: Path, b: Path) -> tuple[float, float]:
    """Return how far two trainings' curves and last weights are apart, at most, relatively."""
    from safetensors.numpy import load_file

    curves = max(
        float(np.max(np.abs(column(a, name) / column(b, name) - 1)))
        for name in ("train_loss", "holdout_loss")
    )
    one, two = (load_file(out / "last.safetensors") for out in (a, b))
    largest = max(float(np.abs(v).max()) for v in two.values())
    return curves, max(float(np.abs(one[k] - two[k]).max()) for k in two) / largest


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, write. Returns the exit status."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        console = Console()
        words = argv if argv is not None else sys.argv[1:]
        command = " ".join(["python -m benchmarks.processes", *words])
        seeds = seeds_of(given.random_seeds)
        rows: list[Row] = []
        drop = ("--set", "drop_path=0.1", "--set", "mixup=0.8")
        turns = train(given, "vit-drop-turns", "vit", *drop, "--accumulate", "2")
        both = train(given, "vit-drop-two", "vit", *drop, processes=2)
        alone, two = train(given, "vit-one", "vit"), train(given, "vit-two", "vit", processes=2)
        for label, (curves, last) in (
            ("ViT, drop path and mixup, two processes against two turns", apart(both, turns)),
            ("ViT, nothing drawn, two processes against one", apart(two, alone)),
        ):
            for what, value in (("curve", curves), ("last weights", last)):
                rows.append(Row(f"largest relative difference of the {what}: {label}", value, value,
                                value, given.epochs, "epochs", "", command))  # fmt: skip
        differences: dict[str, list[float]] = {"holdout_loss": [], "holdout_top1": []}
        for seed in seeds:
            one = train(given, "tinyvit-one", "tinyvit", seed=seed)
            other = train(given, "tinyvit-two", "tinyvit", seed=seed, processes=2)
            for name, found in differences.items():
                found.append(float(column(other, name)[-1] - column(one, name)[-1]))
        from scipy import stats

        for name, found in differences.items():
            middle = float(np.mean(found))
            half = float(stats.t.ppf(0.975, len(found) - 1)) * float(np.std(found, ddof=1))
            half /= math.sqrt(len(found))
            scale, unit = (100.0, "points of top-1") if name == "holdout_top1" else (1.0, "nats")
            low, high = (scale * (middle + sign * half) for sign in (-1, 1))
            label = f"TinyViT, two processes less one, {unit}"
            note = "batch norms see half a batch; t interval"
            rows.append(
                Row(label, scale * middle, low, high, len(found), "random seeds", note, command)
            )
        for row in rows:
            console.line(in_words(row))
        write_rows(given.out, rows)
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
