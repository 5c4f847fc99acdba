"""Metrics and paired comparisons of trainings from their stored per-image results.

Under a metric that weighs every class alike, so do the soft losses that rank candidates: images of rare classes weigh
more (`nas.core.metrics.image_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.core.io import load_arrays
from nas.core.metrics import image_weights, mean_se, paired, score
from space.errors import refuse


@dataclass(frozen=True)
class PerImage:
    """A split's images: soft loss `[n]` in nats, the predicted class, the true one."""

    soft_loss: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]


def per_image(folder: Path, split: str) -> PerImage:
    """Read the results of a training on a split, `holdout` or `test`; damaged ones are refused."""
    path = folder / f"{split}.safetensors"
    kept = load_arrays(path)
    missing = sorted({"soft_loss", "predicted", "truth"} - kept.keys())
    if missing:
        raise refuse(str(path), f"no {', '.join(missing)}", "what a training left per image")
    return PerImage(
        np.asarray(kept["soft_loss"], dtype=np.float64),
        np.asarray(kept["predicted"], dtype=np.int64),
        np.asarray(kept["truth"], dtype=np.int64),
    )


def losses_of(folder: Path, metric: str = "top1") -> npt.NDArray[np.float64]:
    """Return the soft losses of a scored candidate in holdout order, weighted for the metric."""
    found = per_image(folder, "holdout")
    return found.soft_loss * image_weights(metric, found.truth)


def with_metric(values: Mapping[str, Any], folder: Path, metric: str, classes: int) -> dict[str, Any]:
    """Return a training's values with the metric's own: `metric`, and `test_metric` where tested.

    The soft loss is that of `losses_of`; its standard error is over images.
    """
    found = {**values}
    found["soft_loss"], found["soft_loss_se"] = mean_se(losses_of(folder, metric))
    for split, name in (("holdout", "metric"), ("test", "test_metric")):
        if (folder / f"{split}.safetensors").exists():
            held = per_image(folder, split)
            found[name], found[f"{name}_se"] = score(metric, held.predicted, held.truth, classes)
    return found


def paired_difference(a: Path, b: Path, metric: str, classes: int) -> dict[str, float]:
    """Compare two trainings image by image on the test split, by the metric, with 95 % (`nas.core.metrics.paired`)."""
    one, other = per_image(a, "test"), per_image(b, "test")
    found = paired(metric, one.predicted, other.predicted, one.truth, classes)
    return dict(zip(("difference", "lo", "hi"), found, strict=True)) | {"n": float(len(one.truth))}
