"""Metrics of hard decisions, for classes of unequal size too: values, errors, image weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from space.errors import refuse

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

Z95 = 1.959963984540054
"""The quantile of a two-sided normal interval of 95 %."""


def mean_se(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the mean over images and its standard error (0 for a single image)."""
    n, wide = len(values), values.astype(np.float64)
    return float(wide.mean()), float(wide.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def score(metric: str, predicted: npt.ArrayLike, truth: npt.ArrayLike, classes: int) -> tuple[float, float]:
    """Return a metric of predicted classes [n] and its standard error over images.

    "top1": the share that is right. "balanced_accuracy": the mean over classes of the share of their images that is
    right (recall). "macro_f1": the mean over classes of 2 TP / (2 TP + FP + FN). Classes without an image in the truth
    are left out of both means (what is wrongly called one of them counts as wrong where it belongs); so are images
    whose class is unknown (-1).

    Errors: top1 as of any mean; balanced accuracy by strata, sum of p (1 - p) / (n_c - 1) over the classes (a class of
    one image adds none); macro F1, which is no mean over images, by the influence of each image on it
    (infinitesimal jackknife). Raises InputError.
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
    value, influence = _macro_f1(said, true, classes)
    return value, _spread(influence)


def paired(
    metric: str, predicted_a: npt.ArrayLike, predicted_b: npt.ArrayLike, truth: npt.ArrayLike, classes: int
) -> tuple[float, float, float]:
    """Return the metric of a less that of b on the same images, and its 95 % interval.

    "top1" by `paired_shares`. Balanced accuracy by the same in every class, put together by the squares of the
    distances from value to bound (MOVER; Zou and Donner, Statistics in Medicine 27, 2008). Macro F1 by the influence of
    each image on the difference, but no nearer than balanced accuracy's bounds, which images that happen to agree
    leave open too. Simulated with 50 to 1,000 images, 2 to 100 classes of equal or falling sizes and 1 % or
    more of discordant images (216 cells), they cover with 92 % or more, mostly with 99 % where classes have few
    images. See `score` for the metrics.
    """
    a, b, true = _labels(classes, predicted_a, predicted_b, truth)
    if metric == "top1":
        right_a, right_b = a == true, b == true
        return paired_shares((right_a & ~right_b).sum(), (right_b & ~right_a).sum(), len(true))
    size, only_a, only_b = (
        np.bincount(true[rows], minlength=classes)
        for rows in (np.ones(len(true), dtype=bool), (a == true) & (b != true), (b == true) & (a != true))
    )
    found = np.array([paired_shares(only_a[c], only_b[c], size[c]) for c in np.flatnonzero(size)])
    value = float(found[:, 0].mean())
    below, above = (float(np.linalg.norm(found[:, 0] - found[:, at])) / len(found) for at in (1, 2))
    if metric == "macro_f1":
        (f1_a, influence_a), (f1_b, influence_b) = (_macro_f1(said, true, classes) for said in (a, b))
        value, reach = f1_a - f1_b, Z95 * _spread(influence_a - influence_b)
        below, above = max(below, reach), max(above, reach)
    return value, max(value - below, -1.0), min(value + above, 1.0)


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


def _macro_f1(said: Ints, true: Ints, classes: int) -> tuple[float, Floats]:
    """Return macro F1 and the influence of each image on it [n]: its slope by the image's weight."""
    right = said == true
    size, called, hits = (np.bincount(rows, minlength=classes) for rows in (true, said, true[right]))
    total, here = np.maximum(size + called, 1), size > 0
    f1 = np.where(here, 2 * hits / total, 0.0)
    influence = ((2 * right - f1[true]) / total[true] - f1[said] / total[said]) / here.sum()
    return float(f1.sum() / here.sum()), np.asarray(influence, dtype=np.float64)


def _spread(influence: Floats) -> float:
    """Return the standard error of what images have these influences on."""
    n = len(influence)
    return math.sqrt(float((influence**2).sum()) * n / (n - 1)) if n > 1 else 0.0


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
