"""How fast the space counts: archs per second of closed-form parameters and MACs, on one core.

    python -m benchmarks.counts [--archs N] [--out CSV]

Two ways of counting: a flat table of random archs, and the open grid of every contraction of the
largest seed. Prints a table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.cells import Writer
from space import Context, Family, InputError, get_family
from space.errors import refuse
from space.family import Array
from space.neighbours import Band, count_contractions

COLUMNS = ("what", "archs", "repeats", "archs_per_s", "slowest", "fastest")


def random_table(family: Family, number: int, rng: np.random.Generator) -> dict[str, Array]:
    """Draw archs uniformly from the moves of the largest published one, factor by factor."""
    largest = max(family.published, key=lambda p: family.count_params(p.arch, Context(224, 1000)))
    moves = family.moves(largest.arch)
    return {field: v[rng.integers(len(v), size=number)] for field, v in moves.items()}


def _rates(work: Callable[[], object], archs: int, repeats: int) -> list[float]:
    """Time `work` by processor seconds of this process: other load does not count."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        rates.append(archs / max(time.process_time() - start, 1e-9))
    return rates


def measure(family: Family, ctx: Context, number: int, repeats: int = 5) -> list[dict[str, Any]]:
    """Measure every way of counting; one row each, see COLUMNS."""
    table = random_table(family, number, np.random.default_rng(0))
    seed = max((p.arch for p in family.published), key=lambda a: family.count_params(a, ctx))
    grid = 1
    for values in family.moves(seed).values():
        grid *= len(values)
    everything = Band(0, 2**62)
    ways: list[tuple[str, int, Callable[[], object]]] = [
        ("params, flat table", number, lambda: family.count_params_many(table, ctx)),
        ("macs, flat table", number, lambda: family.count_macs_many(table, ctx)),
        ("params, open grid", grid, lambda: count_contractions(family, seed, ctx, everything)),
    ]
    rows = []
    for what, archs, work in ways:
        rates = _rates(work, archs, repeats)
        numbers = (statistics.median(rates), min(rates), max(rates))
        rows.append(dict(zip(COLUMNS, (what, archs, repeats, *map(round, numbers)), strict=True)))
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows aside, then rename."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = Writer(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise refuse("--out", path, "a file that can be written", e.strerror or "") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; 0 when a million archs a second are reached, else 1; 2: bad input."""
    parser = argparse.ArgumentParser("python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--archs", type=int, default=1_000_000, help="archs in the flat table")
    parser.add_argument("--family", default="tinyvit", help="model family (default tinyvit)")
    parser.add_argument("--img-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--out", type=Path, help="also write the table to this CSV file")
    args = parser.parse_args(argv)
    try:
        if args.archs < 1:
            raise refuse("--archs", args.archs, "an integer >= 1")
        family, ctx = get_family(args.family), Context(args.img_size, 1000)
        rows = measure(family, ctx, args.archs)
        if args.out:
            write_csv(args.out, rows)
    except InputError as e:
        print(e, file=sys.stderr)
        return 2
    for row in rows:
        print(f"{row['what']:20} {row['archs']:>11,} archs {row['archs_per_s']:>13,} archs/s")
    least = min(row["archs_per_s"] for row in rows)
    conditions = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": 1,
    }
    said = {"family": family.name, "img_size": ctx.img_size, **conditions, "rows": rows}
    print(json.dumps(said))
    return 0 if least >= 1_000_000 else 1


if __name__ == "__main__":
    raise SystemExit(main())
