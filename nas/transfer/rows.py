"""What a transfer check finds: metrics with errors and intervals, as rows.

Every error is over the test images of one training: another random seed's is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Interval = tuple[float, float, float]
"""A difference of two values on the same images, and its 95 % interval."""

RESAMPLES = 1000


@dataclass(frozen=True)
class TransferRow:
    """One metric of one network on a check's test images.

    `model` is "trained" or "random"; `value` and its standard error `se` are shares, over `n` test images;
    `difference` (with a 95 % interval) is that to the random weights, None on their own row; `chosen` is what the
    holdout chose, or how the network was trained.
    """

    check: str
    model: str
    metric: str
    value: float
    se: float
    n: int
    difference: float | None
    difference_lo: float | None
    difference_hi: float | None
    chosen: str


def pair(
    check: str, metric: str, values: Sequence[tuple[float, float]], n: int, difference: Interval, chosen: Sequence[str]
) -> list[TransferRow]:
    """Make the two rows of a metric: (value, se) and `chosen` of the trained, then the random."""
    (trained, trained_se), (random, random_se) = values
    return [
        TransferRow(check, "trained", metric, trained, trained_se, n, *difference, chosen[0]),
        TransferRow(check, "random", metric, random, random_se, n, None, None, None, chosen[1]),
    ]


HEADER = ("check", "model", "metric", "value +- se", "difference to random [95 %]", "n", "chosen")


def cells(row: TransferRow) -> tuple[str, ...]:
    """Format a row under `HEADER`, values in percent."""
    difference = ""
    if row.difference is not None:
        shown = (f"{100 * (v or 0.0):+.1f}" for v in (row.difference_lo, row.difference_hi))
        difference = f"{100 * row.difference:+.1f} [{', '.join(shown)}]"
    value = f"{100 * row.value:.1f} +- {100 * row.se:.1f} %"
    return row.check, row.model, row.metric, value, difference, str(row.n), row.chosen


def confusion(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> Ints:
    """Count pixels by true and predicted class, image by image: [n, ...] -> int64 [n, C, C]."""
    n = len(truth)
    cell = truth.reshape(n, -1).astype(np.int64) * classes + predicted.reshape(n, -1)
    cell += np.arange(n)[:, None] * classes**2
    return np.bincount(cell.ravel(), minlength=n * classes**2).reshape(n, classes, classes)


def mean_iou(counts: Ints | Floats) -> Floats:
    """Return the mean over classes of intersection over union: counts [..., C, C] (truth, predicted) -> [...].

    A class that is neither there nor predicted is left out of the mean; one that is predicted without being there
    counts as 0. Without any pixel: NaN.
    """
    both = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(-1) + counts.sum(-2) - both
    known = union > 0
    overlap = np.where(known, both / np.where(known, union, 1), 0.0)
    number = known.sum(-1)
    return np.where(number > 0, overlap.sum(-1) / np.maximum(number, 1), np.nan)


def pixel_accuracy(counts: Ints | Floats) -> Floats:
    """Return the share of pixels that are right: counts [..., C, C] -> [...]."""
    right = np.diagonal(counts, axis1=-2, axis2=-1).sum(-1)
    return np.asarray(right / counts.sum((-2, -1)), dtype=np.float64)


def bootstrapped(metric: Callable[[Floats], Floats], counts: Ints, random_seed: int = 0) -> tuple[float, float]:
    """Return a metric of all images' counts [n, C, C] together, and its standard error.

    The error is the spread of a seeded bootstrap over images: the metric is no mean of theirs.
    """
    drawn = metric(_resampled(counts, random_seed))
    return float(metric(counts.sum(0).astype(np.float64))), float(drawn.std(ddof=1))


def paired_bootstrap(metric: Callable[[Floats], Floats], a: Ints, b: Ints, random_seed: int = 0) -> Interval:
    """Compare a metric on the same images: that of a less that of b, both on each resample."""
    drawn = metric(_resampled(a, random_seed)) - metric(_resampled(b, random_seed))
    lo, hi = np.percentile(drawn, [2.5, 97.5])
    whole = metric(a.sum(0).astype(np.float64)) - metric(b.sum(0).astype(np.float64))
    return float(whole), float(lo), float(hi)


def _resampled(counts: Ints, random_seed: int) -> Floats:
    """Sum counts over as many images drawn with replacement, the same for an equal number: [RESAMPLES, C, C]."""
    n = len(counts)
    times = np.random.default_rng(random_seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    summed = times.astype(np.float64) @ counts.reshape(n, -1).astype(np.float64)
    return np.asarray(summed.reshape(RESAMPLES, *counts.shape[1:]))
