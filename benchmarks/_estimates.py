"""Estimates with their 95 % intervals, and the tables that benchmarks leave them in."""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from nas.core.io import write_atomic
from nas.core.table import Writer
from space.errors import refuse

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float, float]
"""An estimate and the bounds of its interval."""

COVERAGE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One estimate with its interval, from `n` of what `of` names; `note`: how to read it."""

    name: str
    estimate: float
    lo: float
    hi: float
    n: int
    of: str
    note: str
    command: str


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write rows, dataclasses of one kind, as CSV; None and NaN are empty cells."""
    out = io.StringIO()
    writer = Writer(out)
    writer.writerow([f.name for f in dataclasses.fields(rows[0])])
    for row in rows:
        writer.writerow([_cell(v) for v in dataclasses.astuple(row)])
    write_atomic(path, out.getvalue().encode())


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else round(value, 6)
    return "" if value is None else value


def in_words(row: Row) -> str:
    """Say a row in one line."""
    note = f"  ({row.note})" if row.note else ""
    bounds = f"[{row.lo:.4g}, {row.hi:.4g}]"
    return f"{row.name:<52} {row.estimate:.4g} {bounds}  {row.n} {row.of}{note}"


def bootstrap(
    values: npt.ArrayLike,
    statistic: Callable[[Floats], float],
    *,
    random_seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return a statistic of values [k, ...] with the percentile interval of k drawn again.

    What belongs to one of the k (its random seeds, say) is drawn together with it. Percentiles are
    values that occurred, so infinite ones do no harm.
    """
    table = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(random_seed)
    drawn = [statistic(table[rng.integers(0, len(table), len(table))]) for _ in range(resamples)]
    return statistic(table), *_percentiles(np.array(drawn))


def crossed(table: npt.ArrayLike, *, random_seed: int, resamples: int = RESAMPLES) -> Interval:
    """Return the mean of [archs, images] with an interval for other archs and other images.

    Rows and columns are drawn again independently. Errs on the wide side.
    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007.
    """
    values = np.asarray(table, dtype=np.float64)
    rng = np.random.default_rng(random_seed)
    rows, columns = (
        rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in values.shape
    )
    means = np.einsum("ri,ri->r", rows @ values, columns)
    return float(values.mean()), *_percentiles(means)


def share(hits: int, n: int) -> Interval:
    """Return a share with its exact interval (Clopper and Pearson, Biometrika 26, 1934)."""
    tail = (1 - COVERAGE) / 2
    lo = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, n - hits + 1))
    hi = 1.0 if hits == n else float(stats.beta.ppf(1 - tail, hits + 1, n - hits))
    return hits / n, lo, hi


def seeds_of(text: str) -> list[int]:
    """Read what --random-seeds says. Raises InputError."""
    parts = text.split(",")
    if len(set(parts)) < 2 or not all(part.strip().isdecimal() for part in parts):
        raise refuse("--random-seeds", text, "two or more different integers, such as 0,1,2")
    return [int(part) for part in parts]


def integers(text: str) -> tuple[int, ...]:
    """Read a list of positive integers, as a parser's `type`. Raises ArgumentTypeError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a list of integers >= 1 such as 4,8")
    return found


def _percentiles(drawn: Floats) -> tuple[float, float]:
    tail = 50 * (1 - COVERAGE)
    lo, hi = np.percentile(drawn, [tail, 100 - tail], method="closest_observation")
    return float(lo), float(hi)
