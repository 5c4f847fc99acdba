"""Repeat the main job over random seeds and data, and compare with the published 5M.

`python -m benchmarks.contract` (or `make results`) runs `nas.contract --seed 21M --target-params 5M --min-speedup 1.5`
on digits and fractals over three random seeds, resumes what was cut short, and writes `results/contract.csv` (a row for
each run and a pooled one for each data set) and a figure for each data set. The pooled difference is paired over images
and seeds: both are resampled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import Floats, Row, crossed, few_discordant, run_command, write_table
from benchmarks.pareto import pareto
from nas.contract import contract
from nas.contract.run import RunResult
from nas.core.cli import Parser, shell_command
from nas.core.io import load_arrays
from nas.core.progress import Console
from nas.report.read import read_run

COLUMNS = (
    *("data", "random_seed", "effort", "status", "winner", "params", "params_published"),
    *("ratio", "ratio_lo", "ratio_hi", "ratio_published", "ratio_published_lo"),
    *("ratio_published_hi", "top1", "top1_published", "difference", "lo", "hi", "test_images"),
    *("seed_images_per_s", "minutes", "fingerprint", "command"),
)


def correctness_difference(folder: Path, final: Mapping[str, Any]) -> Floats:
    """Return per-image differences in correctness, winner less published [n]; 0 for a tie."""
    winner, published = (
        load_arrays(folder / "work" / f"final-{final[side]['key']}" / "test.safetensors")["correct"].astype(np.float64)
        for side in ("winner", "published")
    )
    return winner - published


def stem(data: str, given: argparse.Namespace) -> str:
    """Begin the names of what is kept of a data set; its own may be a path."""
    return f"{data.replace('/', '_')}-{given.effort}"


def run_or_resume(data: str, random_seed: int, given: argparse.Namespace) -> RunResult:
    """Run the main job, or resume it in its folder."""
    folder = Path(given.runs) / f"{stem(data, given)}-{random_seed}"
    common: dict[str, Any] = {"out": folder, "cache_dir": given.cache_dir, "console": Console()}
    if (folder / "run.json").exists():
        return contract(resume=True, **common)
    settings: dict[str, Any] = {"data": data, "effort": given.effort, "random_seed": random_seed}
    if given.max_images is not None:
        settings["max_images"] = given.max_images
    return contract("21M", "5M", min_speedup=given.min_speedup, **settings, **common)


def run_row(data: str, random_seed: int, given: argparse.Namespace, of: RunResult) -> Row:
    """Return the row of one run; of one without a result, its status alone."""
    found = read_run(of.folder)
    assert found.seed is not None
    images = found.run["config"]["max_images"]
    flags = {"seed": "21M", "target-params": "5M", "min-speedup": given.min_speedup, "data": data}
    flags |= {"effort": given.effort, "random-seed": random_seed} | ({"max-images": images} if images else {})
    row: Row = {
        **dict.fromkeys(COLUMNS),
        "data": data,
        "random_seed": random_seed,
        "effort": given.effort,
        "status": of.status,
        "seed_images_per_s": found.seed.images_per_s,
        "minutes": round(of.result.get("seconds", 0.0) / 60, 1),
        "fingerprint": found.run["fingerprint"]["id"],
        "command": shell_command("nas.contract", *(part for k, v in flags.items() for part in (f"--{k}", v))),
    }
    final = of.result.get("final")
    if not final:
        return row
    winner, published = final["winner"], final["published"]
    for name in ("params", "ratio", "ratio_lo", "ratio_hi", "top1"):
        stem, dash, end = name.partition("_")
        row[name], row[f"{stem}_published{dash}{end}"] = winner[name], published[name]
    paired = final.get("paired") or {"difference": 0.0, "lo": 0.0, "hi": 0.0}
    row |= {name: paired[name] for name in ("difference", "lo", "hi")}
    return row | {"winner": winner["key"], "test_images": winner["test_n"]}


def pooled_rows(data: str, given: argparse.Namespace, outcomes: Sequence[RunResult]) -> list[Row]:
    """Return the row of all runs of a data set together; none for fewer than two results."""
    finals = [(o.folder, o.result["final"]) for o in outcomes if o.result.get("final")]
    if len(finals) < 2:
        return []
    differences = np.stack([correctness_difference(folder, final) for folder, final in finals])
    mean, *bounds = crossed(differences)
    lo, hi = few_discordant(differences, *bounds)
    row: Row = {
        **dict.fromkeys(COLUMNS),
        "data": data,
        "random_seed": f"pooled over {len(finals)}",
        "effort": given.effort,
        "status": f"{len(finals)} of {len(outcomes)} reached",
        "top1": float(np.mean([f["winner"]["top1"] for _, f in finals])),
        "top1_published": float(np.mean([f["published"]["top1"] for _, f in finals])),
        "difference": mean,
        "lo": lo,
        "hi": hi,
        "test_images": differences.shape[1],
        "command": "python -m benchmarks.contract",
    }
    return [row]


def main(argv: Sequence[str] | None = None) -> int:
    """Run or resume all, write the table and the figures. Exit status 0, 2 on bad input."""
    parser = Parser("python -m benchmarks.contract", description=__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["digits", "fractals"], help="data sets")
    add("--random-seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--effort", default="normal", help="default: normal")
    add("--max-images", type=int, metavar="N", help="default: that of the effort")
    add("--min-speedup", type=float, default=1.5, metavar="RATIO")
    add("--runs", default="results/runs", metavar="DIR", help="where runs are kept")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="where the table goes")
    add("--cache-dir", metavar="DIR")

    def work(given: argparse.Namespace) -> dict[str, Any]:
        import pandas as pd

        table, rows = given.out / "contract.csv", list[Row]()
        given.out.mkdir(parents=True, exist_ok=True)
        if table.exists():  # what is not asked for now keeps its rows
            held = pd.read_csv(table, dtype=str, keep_default_na=False)
            asked = held["data"].isin(given.data) & (held["effort"] == given.effort)
            rows = held[~asked].to_dict("records")
        for data in given.data:
            outcomes = []
            for random_seed in given.random_seeds:
                print(f"== {data}, random seed {random_seed}, effort {given.effort}", flush=True)
                outcome = run_or_resume(data, random_seed, given)
                print(outcome.message, flush=True)
                outcomes.append(outcome)
                rows.append(run_row(data, random_seed, given, outcome))
            rows += pooled_rows(data, given, outcomes)
            pareto([each.folder for each in outcomes], None, given.out / f"pareto-{stem(data, given)}.png")
        write_table(table, rows)
        return {"table": str(table), "lines": len(rows)}

    return run_command(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
