"""Metrics of hard decisions, for classes of unequal size too: values, errors, image weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.core.stats import COVERAGE
from space.errors import refuse

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
Z95 = 1.959963984540054
"""The quantile of a two-sided normal interval of 95 %."""


def mean_se(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the mean over images and its standard error (0 for a single image)."""
    n, wide = len(values), values.astype(np.float64)
    return float(wide.mean()), float(wide.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def score(
    metric: str,
    predicted: npt.ArrayLike,
    truth: npt.ArrayLike,
    classes: int,
    *,
    resamples: int = RESAMPLES,
    random_seed: int = 0,
) -> tuple[float, float]:
    """Return a metric of predicted classes [n] and its standard error over images.

    "top1": the share that is right. "balanced_accuracy": the mean over classes of the share of their images that is
    right (recall). "macro_f1": the mean over classes of 2 TP / (2 TP + FP + FN). Classes without an image in the truth
    are left out of both means (what is wrongly called one of them counts as wrong where it belongs); so are images
    whose class is unknown (-1).

    Errors: top1 as of any mean; balanced accuracy by strata, sum of p (1 - p) / (n_c - 1) over the classes (a class of
    one image adds none); macro F1, which is no mean over images, as the spread of a seeded bootstrap over images.
    Raises InputError.
    """
    said, true = _labels(classes, predicted, truth)
    right = (said == true).astype(np.float64)
    if metric == "top1":
        return mean_se(right)
    if metric == "balanced_accuracy":
        size = np.bincount(true, minlength=classes)
        hits = np.bincount(true, weights=right, minlength=classes)
        size, hits = size[size > 0], hits[size > 0]
        recall = hits / size
        variance = np.where(size > 1, recall * (1 - recall) / np.maximum(size - 1, 1), 0.0)
        return float(recall.mean()), math.sqrt(float(variance.sum())) / len(size)
    counts, (true, said) = _cells(true, said)
    drawn = _draws(counts, resamples, random_seed)
    value = _macro_f1(counts[None, :], true, said, classes)[0]
    return float(value), float(_macro_f1(drawn, true, said, classes).std(ddof=1))


def paired(
    metric: str,
    predicted_a: npt.ArrayLike,
    predicted_b: npt.ArrayLike,
    truth: npt.ArrayLike,
    classes: int,
    *,
    resamples: int = RESAMPLES,
    random_seed: int = 0,
) -> tuple[float, float, float]:
    """Return the metric of a less that of b on the same images, and its 95 % interval.

    "top1" by `paired_shares`; the others by percentile bootstrap over images, both computed on each resample. See
    `score` for the metrics.
    """
    a, b, true = _labels(classes, predicted_a, predicted_b, truth)
    if metric == "top1":
        right_a, right_b = a == true, b == true
        return paired_shares((right_a & ~right_b).sum(), (right_b & ~right_a).sum(), len(true))
    counts, (true, a, b) = _cells(true, a, b)
    measure = partial(_mean_share, f1=metric == "macro_f1")

    def difference(counts: Floats) -> Floats:
        return measure(counts, true, a, classes) - measure(counts, true, b, classes)

    tail = 50 * (1 - COVERAGE)
    drawn = difference(_draws(counts, resamples, random_seed))
    lo, hi = (float(v) for v in np.percentile(drawn, [tail, 100 - tail]))
    return float(difference(counts[None, :])[0]), lo, hi


def paired_shares(only_a: float, only_b: float, n: int) -> tuple[float, float, float]:
    """Return the share that is right by a less that by b, on the same n images, and its 95 % score interval.

    `only_a` images are right by a alone, `only_b` by b alone. The interval holds the differences that a score test does
    not reject, with the rest of the table at its likeliest: it covers with 94 % or more from 100 images and 0.5 % of
    discordant images on (the normal interval: 39 %), and images that all agree leave +-3.8/n. Source: Tango,
    Statistics in Medicine 17, 1998.
    """
    value = (only_a - only_b) / n

    def accepted(difference: float) -> bool:
        linear = (2 * n - only_a + only_b) * difference - only_a - only_b
        square = linear * linear + 8 * n * only_b * difference * (1 - difference)
        rest = (math.sqrt(max(square, 0.0)) - linear) / (4 * n)
        variance = n * (2 * rest + difference * (1 - difference))
        return (n * (value - difference)) ** 2 <= Z95**2 * max(variance, 0.0)

    bounds = []
    for far in (-1.0, 1.0):
        near = value
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (middle, far) if accepted(middle) else (near, middle)
        bounds.append(near)
    return value, bounds[0], bounds[1]


def image_weights(metric: str, truth: npt.ArrayLike) -> Floats:
    """Return weights [n] of images, summing to n, under which a mean loss suits the metric.

    Ones for top1; otherwise each class that occurs weighs alike, n / (classes * n_c) per image. Images whose class is
    unknown (-1) keep the weight 1.
    """
    true = np.asarray(truth, dtype=np.int64)
    weights = np.ones(len(true), dtype=np.float64)
    known = true >= 0
    if metric == "top1" or not known.any():
        return weights
    _, at, sizes = np.unique(true[known], return_inverse=True, return_counts=True)
    weights[known] = known.sum() / (len(sizes) * sizes[at])
    return weights


def _cells(truth: Ints, *predicted: Ints) -> tuple[Floats, tuple[Ints, ...]]:
    """Return how many images have each combination of classes, and the combinations."""
    rows, counts = np.unique(np.stack([truth, *predicted]), axis=1, return_counts=True)
    return counts.astype(np.float64), tuple(rows)


def _draws(counts: Floats, resamples: int, random_seed: int) -> Floats:
    """Draw as many images with replacement, by cell: [resamples, cells]."""
    n = int(counts.sum())
    rng = np.random.default_rng(random_seed)
    return rng.multinomial(n, counts / n, size=resamples).astype(np.float64)


def _by_class(counts: Floats, where: Ints, classes: int) -> Floats:
    """Add up cells [r, cells] by class: [r, classes]."""
    found = np.zeros((classes, len(counts)))
    np.add.at(found, where, counts.T)
    return found.T


def _mean_share(counts: Floats, truth: Ints, said: Ints, classes: int, *, f1: bool) -> Floats:
    """Return the mean over the classes of the truth of recall, or of F1."""
    right = truth == said
    size = _by_class(counts, truth, classes)
    hits = _by_class(counts[:, right], truth[right], classes)
    above, below = (2 * hits, size + _by_class(counts, said, classes)) if f1 else (hits, size)
    shares = np.where(size > 0, above / np.where(size > 0, below, 1.0), 0.0)
    return np.asarray(shares.sum(axis=1) / (size > 0).sum(axis=1), dtype=np.float64)


_macro_f1 = partial(_mean_share, f1=True)


def _labels(classes: int, *series: npt.ArrayLike) -> list[Ints]:
    """Check predictions and, last, the truth; leaves out images of unknown class."""
    *said, truth = (np.asarray(one, dtype=np.int64) for one in series)
    if any(one.shape != truth.shape or one.ndim != 1 for one in said):
        shapes = ", ".join(str(one.shape) for one in (*said, truth))
        raise refuse("predicted classes", shapes, "one per image, as many as true classes")
    known = truth >= 0
    if not known.any():
        raise refuse("true classes", 0, "at least one image whose class is known")
    found = [one[known] for one in (*said, truth)]
    for one in found:
        if one.min() < 0 or one.max() >= classes:
            raise refuse("classes", f"{one.min()} to {one.max()}", f"0 to {classes - 1}")
    return found
