"""Repeat the main job over random seeds and data, and compare with the published 5M.

`python -m benchmarks.contract` (or `make results`) runs `nas.contract --seed 21M --target-params 5M
--min-speedup 1.5` on digits and fractals over three random seeds, resuming what was cut short, and
writes `results/contract.csv` (one line a run and one pooled line a data set) and a figure for each
data set. The pooled difference is paired over images and seeds: both are resampled.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.pareto import pareto
from nas.contract import contract
from nas.contract.run import RunResult
from nas.core.io import write_atomic
from nas.core.progress import Console
from nas.core.table import Writer
from nas.report.read import read_run, read_table
from space.errors import InputError

COLUMNS = (
    *("data", "random_seed", "effort", "status", "winner", "params", "params_published"),
    *("ratio", "ratio_lo", "ratio_hi", "ratio_published", "ratio_published_lo"),
    *("ratio_published_hi", "top1", "top1_published", "difference", "lo", "hi", "test_images"),
    *("seed_images_per_s", "minutes", "fingerprint", "command"),
)


def correct_pair(folder: Path, final: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return per-image differences in correctness, winner less published [n]; 0 for a tie."""
    from nas.core.seals import load_arrays

    work = [folder / "work" / f"final-{final[s]['key']}" for s in ("winner", "published")]
    sides = [load_arrays(each / "test.safetensors")["correct"] for each in work]
    return sides[0].astype(np.float64) - sides[1].astype(np.float64)


def pooled_interval(
    differences: npt.NDArray[np.float64], *, draws: int = 10_000, random_seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of [seeds, images] and its 95 % interval, both axes resampled.

    Percentile bootstrap of the crossed design: seeds and images are drawn with replacement
    independently. With few seeds the interval is coarse; the number of seeds is in the table.
    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics, 2007.
    """
    rng = np.random.default_rng(random_seed)
    seeds, images = differences.shape
    means = np.empty(draws)
    for i in range(draws):
        rows = rng.integers(0, seeds, seeds)
        weights = np.bincount(rng.integers(0, images, images), minlength=images)
        means[i] = float((differences[rows] @ weights).mean() / images)
    lo, hi = np.quantile(means, (0.025, 0.975))
    return float(differences.mean()), float(lo), float(hi)


def _run(data: str, random_seed: int, arguments: argparse.Namespace) -> RunResult:
    folder = Path(arguments.runs) / f"{data}-{arguments.effort}-{random_seed}"
    if (folder / "run.json").exists():
        return contract(out=folder, resume=True, cache_dir=arguments.cache_dir, console=Console())
    settings = {} if arguments.proxy_images is None else {"proxy_images": arguments.proxy_images}
    return contract(
        "21M",
        "5M",
        out=folder,
        data=data,
        effort=arguments.effort,
        random_seed=random_seed,
        min_speedup=arguments.min_speedup,
        cache_dir=arguments.cache_dir,
        console=Console(),
        **settings,
    )


def _line(
    data: str, random_seed: int, effort: str, outcome: RunResult, speedup: float
) -> dict[str, Any]:
    found = read_run(outcome.folder)
    run, seed = found.run, found.seed
    assert seed is not None
    line: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    line.update(
        data=data,
        random_seed=random_seed,
        effort=effort,
        status=outcome.status,
        seed_images_per_s=seed.images_per_s,
        minutes=round(outcome.result.get("seconds", 0.0) / 60, 1),
        fingerprint=run["fingerprint"]["id"],
        command=f"python -m nas.contract --seed 21M --target-params 5M --min-speedup {speedup} "
        f"--data {data} --effort {effort} --random-seed {random_seed}"
        + (f" --proxy-images {images}" if (images := run["config"]["proxy_images"]) else ""),
    )
    final = outcome.result.get("final")
    if final:
        winner, published = final["winner"], final["published"]
        paired = final.get("paired") or {"difference": 0.0, "lo": 0.0, "hi": 0.0}
        line.update(
            winner=winner["key"],
            params=winner["params"],
            params_published=published["params"],
            ratio=winner["ratio"],
            ratio_lo=winner["ratio_lo"],
            ratio_hi=winner["ratio_hi"],
            ratio_published=published["ratio"],
            ratio_published_lo=published["ratio_lo"],
            ratio_published_hi=published["ratio_hi"],
            top1=winner["top1"],
            top1_published=published["top1"],
            difference=paired["difference"],
            lo=paired["lo"],
            hi=paired["hi"],
            test_images=winner["test_n"],
        )
    return line


def _pooled(data: str, effort: str, outcomes: Sequence[RunResult]) -> dict[str, Any] | None:
    finals = [(o.folder, o.result["final"]) for o in outcomes if o.result.get("final")]
    if len(finals) < 2:
        return None
    differences = np.stack([correct_pair(folder, final) for folder, final in finals])
    mean, lo, hi = pooled_interval(differences)
    line: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    line.update(
        data=data,
        random_seed=f"pooled over {len(finals)}",
        effort=effort,
        status=f"{len(finals)} of {len(outcomes)} reached",
        top1=float(np.mean([f["winner"]["top1"] for _, f in finals])),
        top1_published=float(np.mean([f["published"]["top1"] for _, f in finals])),
        difference=mean,
        lo=lo,
        hi=hi,
        test_images=differences.shape[1],
        command="python -m benchmarks.contract",
    )
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Run or resume all, write the table and the figures. Exit status 0, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contract", description=__doc__)
    parser.add_argument("--data", nargs="+", default=["digits", "fractals"], help="data sets")
    parser.add_argument("--random-seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--effort", default="normal", help="default: normal")
    parser.add_argument(
        "--proxy-images", type=int, default=None, metavar="N", help="default: that of the effort"
    )
    parser.add_argument("--min-speedup", type=float, default=1.5, metavar="RATIO")
    parser.add_argument("--runs", default="results/runs", metavar="DIR", help="where runs are kept")
    parser.add_argument("--out", default="results", metavar="DIR", help="where the table goes")
    parser.add_argument("--cache-dir", default=None, metavar="DIR")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    table = out / "contract.csv"
    lines: list[dict[str, Any]] = []
    if table.exists():  # what is not asked for now keeps its lines
        lines = [
            r
            for r in read_table(table)[1]
            if r["data"] not in arguments.data or r["effort"] != arguments.effort
        ]
    try:
        for data in arguments.data:
            outcomes = []
            for random_seed in arguments.random_seeds:
                print(
                    f"== {data}, random seed {random_seed}, effort {arguments.effort}", flush=True
                )
                outcome = _run(data, random_seed, arguments)
                print(outcome.message, flush=True)
                outcomes.append(outcome)
                lines.append(
                    _line(data, random_seed, arguments.effort, outcome, arguments.min_speedup)
                )
            pooled = _pooled(data, arguments.effort, outcomes)
            if pooled is not None:
                lines.append(pooled)
            pareto(
                [o.folder for o in outcomes], None, out / f"pareto-{data}-{arguments.effort}.png"
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = io.StringIO()
    writer = Writer(text, COLUMNS)
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(table, text.getvalue().encode())
    print(f"{table}\n{json.dumps({'table': str(table), 'lines': len(lines)})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
