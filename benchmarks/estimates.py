"""Estimates with 95 % intervals, and the tables, figures and command lines that benchmarks share."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.core.cli import Parser, exit_status
from nas.core.io import write_atomic
from nas.core.metrics import paired_shares
from nas.core.table import Writer
from space.errors import refuse

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
Interval = tuple[float, float, float]
"""An estimate and the bounds of its interval."""

COVERAGE = 0.95
RESAMPLES = 2000
POWER = 0.8
"""Probability with which a difference of `PairedDifference.detectable` excludes 0."""
LEAST_DISCORDANT = 25
"""Images on which two nets differ, from which on the normal interval of their difference holds."""
MARGIN = 0.015
"""Difference in top-1 that "not worse" allows for."""


@dataclass(frozen=True)
class EstimateRow:
    """One estimate with its interval, from `n` of what `of` names; `note`: how to read it."""

    name: str
    estimate: float
    lo: float
    hi: float
    n: int
    of: str
    note: str
    command: str

    def __str__(self) -> str:
        note = f"  ({self.note})" if self.note else ""
        return f"{self.name:<52} {self.estimate:.4g} [{self.lo:.4g}, {self.hi:.4g}]  {self.n} {self.of}{note}"


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference of two archs over images, with its two-sided 95 % interval.

    `lower` is the one-sided 95 % bound. `image_se` and `seed_se` are the parts of the standard error that images and
    random seeds bring; `detectable` is the smallest true difference that excludes 0 with 80 % power.
    """

    value: float
    lo: float
    hi: float
    lower: float
    image_se: float
    seed_se: float
    detectable: float
    seeds: int
    images: int


def bootstrap(values: npt.ArrayLike, statistic: Callable[[Floats], float]) -> Interval:
    """Return a statistic of values [k, ...] with the percentile interval of k drawn again.

    Percentiles are values that occurred, so infinite ones do no harm.
    """
    table = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    drawn = [statistic(table[rng.integers(0, len(table), len(table))]) for _ in range(RESAMPLES)]
    return statistic(table), *_percentiles(np.array(drawn))


def crossed(table: npt.ArrayLike) -> Interval:
    """Return the mean of [archs or seeds, images], with an interval over both axes.

    Rows and columns are drawn again independently. Errs on the wide side; coarse for few rows.
    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007.
    """
    values = np.asarray(table, dtype=np.float64)
    rng = np.random.default_rng(0)
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in values.shape)
    return float(values.mean()), *_percentiles(np.einsum("ri,ri->r", rows @ values, columns))


def few_discordant(difference: Floats, lo: float, hi: float) -> tuple[float, float]:
    """Widen the bounds of a mean difference in correctness [seeds, images] where few images differ.

    Below `LEAST_DISCORDANT` neither a normal interval nor resamples hold: the bounds are at least those of the score
    interval of the mean counts.
    """
    above, below = ((side > 0).sum() / len(difference) for side in (difference, -difference))
    if above + below >= LEAST_DISCORDANT:
        return lo, hi
    _, least, most = paired_shares(float(above), float(below), difference.shape[1])
    return min(lo, least), max(hi, most)


def _percentiles(drawn: Floats) -> tuple[float, float]:
    tail = 50 * (1 - COVERAGE)
    lo, hi = np.percentile(drawn, [tail, 100 - tail], method="closest_observation")
    return float(lo), float(hi)


def share(hits: int, n: int) -> Interval:
    """Return a share with its exact interval (Clopper and Pearson, Biometrika 26, 1934)."""
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(COVERAGE, method="exact")
    return hits / n, float(found.low), float(found.high)


def paired_interval(a: npt.ArrayLike, b: npt.ArrayLike) -> PairedDifference:
    """Compare two archs by [random seeds, images] of correctness or loss, paired in both. Raises InputError.

    Images and random seeds are crossed random effects. The image part V_I is the variance of the per-image differences
    averaged over seeds, by the images; the seed part V_S that of the seeds' mean differences, by the seeds, less what
    single images explain of it. With three seeds V_S has two degrees of freedom, so each part has its own t quantile:
    half width = sqrt(t_I^2 V_I + t_S^2 V_S) (Howe, JASA 69, 1974). Simulated coverage with 3 seeds: 94.4-96.6 % for
    every mix of the parts (Satterthwaite: down to 90.5 %). With one random seed there are the images alone.
    """
    from scipy import special

    left, right = (np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in (a, b))
    if left.shape != right.shape or left.ndim != 2 or left.shape[1] < 2:
        want = "[random seeds, images] of one shape, 2 images or more"
        raise refuse("paired", f"shapes {left.shape} and {right.shape}", want)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise refuse("paired", "values that are not finite", "finite numbers")
    difference = left - right
    seeds, images = difference.shape
    value = float(difference.mean())
    by_image, by_seed = difference.mean(axis=0), difference.mean(axis=1)
    image_part = float(by_image.var(ddof=1)) / images
    seed_part = 0.0
    if seeds > 1:
        rest = difference - by_image[None, :] - by_seed[:, None] + value
        residual = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
        seed_part = max(0.0, float(by_seed.var(ddof=1)) / seeds - residual / (seeds * images))

    def half(quantile: float) -> float:
        of_images = float(special.stdtrit(images - 1, quantile))
        of_seeds = float(special.stdtrit(seeds - 1, quantile)) if seeds > 1 else 0.0
        return math.sqrt(of_images**2 * image_part + of_seeds**2 * seed_part)

    wide = half(1 - (1 - COVERAGE) / 2)
    detectable = wide + float(special.ndtri(POWER)) * math.sqrt(image_part + seed_part)
    errors = math.sqrt(image_part), math.sqrt(seed_part)
    lo, hi, lower = value - wide, value + wide, value - half(COVERAGE)
    if np.isin([left, right], (0.0, 1.0)).all():
        lo, hi = few_discordant(difference, lo, hi)
        lower = min(lower, lo) if lo < value - wide else lower
    return PairedDifference(value, lo, hi, lower, *errors, detectable, seeds, images)


def verdict(found: PairedDifference) -> str:
    """Describe a difference (higher is better): better or worse only if the interval excludes 0."""
    close = found.lower > -MARGIN
    if found.lo > 0:
        return "better"
    if found.hi < 0:
        return "worse (by less than the margin)" if close else "worse"
    return f"{'not worse' if close else 'undecided: may be worse'} by {100 * MARGIN:g} points"


def write_table(path: Path, rows: Sequence[Any], **more: Any) -> None:
    """Write dataclasses or mappings of one kind as CSV, with `more` in every row.

    None and NaN are empty cells. Raises InputError where the file cannot be written.
    """
    found = [dict(r) if isinstance(r, Mapping) else dataclasses.asdict(r) for r in rows]
    out = io.StringIO()
    writer = Writer(out, [*found[0], *more])
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in (row | more).items()} for row in found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, out.getvalue().encode())
    except OSError as error:
        raise refuse("--out", path, "a file that can be written", error.strerror or "") from None


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value


@contextmanager
def new_figure(path: Path, width: float, height: float, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """Give a figure of so many inches and its axes, side by side; it is written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), sharey=True, layout="constrained")
    yield figure, axes
    out = io.BytesIO()
    figure.savefig(out, format=path.suffix[1:].lower(), dpi=150)
    pyplot.close(figure)
    write_atomic(path, out.getvalue())


def draw_intervals(
    path: Path, rows: Sequence[tuple[str, Interval]], label: str, *, lines: Mapping[str, float] | None = None
) -> None:
    """Draw named estimates with their intervals below each other; `lines`: named values of x."""
    shown = [(name, found) for name, found in rows if np.isfinite(found).all()][::-1]
    with new_figure(path, 7.5, 0.32 * len(shown) + 1.4) as (_, ax):
        for y, (_, (x, lo, hi)) in enumerate(shown):
            xerr = [[max(0.0, x - lo)], [max(0.0, hi - x)]]
            ax.errorbar([x], [y], xerr=xerr, fmt="o", ms=4, lw=1, color="tab:blue")
        ax.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
        ax.axvline(0, color="black", lw=0.5)
        for (name, x), colour in zip((lines or {}).items(), ("red", "gray", "olive"), strict=False):
            ax.axvline(x, color=f"tab:{colour}", lw=1, ls="--", label=name)
        ax.set_xlabel(f"{label}, 95 %", fontsize=8)
        if lines:
            ax.legend(fontsize=7, loc="lower right")


def run_command(parser: Parser, work: Callable[[argparse.Namespace], Any], argv: Sequence[str] | None) -> int:
    """Parse, do the work, and print what it returns as the last line, in JSON.

    `given.command` repeats the call. Returns the exit status: 2 on bad input, else `given.status`, which is 0 unless
    the work sets it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(words)
    given.command, given.status = f"{parser.prog} {shlex.join(words)}".rstrip(), 0

    def do() -> int:
        print(json.dumps(work(given)))
        return int(given.status)

    return exit_status(do)


def check_at_least(given: argparse.Namespace, **least: float) -> None:
    """Refuse flags below their least value; one that is None is not checked."""
    for name, value in least.items():
        got = getattr(given, name)
        if got is not None and not got >= value:
            raise refuse(f"--{name.replace('_', '-')}", got, f"a number >= {value:g}")
