"""Whether mirrored training images lower the score: left and right may tell classes apart."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nas.data import Dataset, Split
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.timm_engine import eval_batch

MOST_IMAGES = 2000
"""Images of a split that are looked at, the first by key: a random sample."""
LOSS, ERRORS = 0.05, 3.0
"""A loss is told where it is above this share by so many standard errors."""
_SIDE, _FILTERS, _WIDTH, _CELLS, _RIDGE = 32, 32, 7, 3, 0.1


def mirror_loss(dataset: Dataset, spec: AugmentSpec) -> tuple[float, float]:
    """Measure how much holdout accuracy a linear probe loses when mirrored images join its training images.

    Both probes are ridge regressions on fixed random filters of images of 32 px, and are paired on the same holdout
    images. Returns the lost share and its standard error, by McNemar's counts. The images need classes.
    """
    train, holdout = (_small(split, spec) for split in (dataset.train, dataset.holdout))
    labels = torch.from_numpy(np.array(dataset.train.labels[: len(train)], dtype=np.int64))
    truth = torch.from_numpy(np.array(dataset.holdout.labels[: len(holdout)], dtype=np.int64))
    filters = torch.randn(_FILTERS, 3, _WIDTH, _WIDTH, generator=torch.Generator().manual_seed(0))
    filters -= filters.mean(dim=(2, 3), keepdim=True)
    own, mirrored, asked = (_features(images, filters) for images in (train, train.flip(3), holdout))
    plain = _probe(own, labels, asked) == truth
    both = _probe(torch.cat([own, mirrored]), torch.cat([labels, labels]), asked) == truth
    n, lost, won = len(truth), int((plain & ~both).sum()), int((both & ~plain).sum())
    return (lost - won) / n, math.sqrt(lost + won - (lost - won) ** 2 / n) / n


def mirror_notes(dataset: Dataset, spec: AugmentSpec) -> list[str]:
    """Return a warning where an augmentation that mirrors is likely to hide what tells classes apart, else nothing."""
    if spec.hflip == 0 or not dataset.labelled or min(len(dataset.train), len(dataset.holdout)) < 2:
        return []
    loss, error = mirror_loss(dataset, spec)
    if loss - ERRORS * error <= LOSS:
        return []
    return [
        f"warning: left and right seem to tell classes apart: a linear probe loses {100 * loss:.0f} +- "
        f"{100 * error:.0f} points on the holdout when its training images are mirrored too; --hflip 0 never mirrors"
    ]


def _small(split: Split, spec: AugmentSpec) -> Tensor:
    """Return a split's first images at 32 px, each with mean 0 and deviation 1: float32 [n, 3, 32, 32]."""
    made = []
    for start in range(0, min(len(split), MOST_IMAGES), 64):
        images = eval_batch(split.pixels[start : min(start + 64, MOST_IMAGES)], spec)
        images = functional.adaptive_avg_pool2d(images, _SIDE)
        middle, spread = images.mean(dim=(1, 2, 3), keepdim=True), images.std(dim=(1, 2, 3), keepdim=True)
        made.append((images - middle) / (spread + 1e-3))
    return torch.cat(made)


def _features(images: Tensor, filters: Tensor) -> Tensor:
    """Return the pooled answers of the filters, of both signs: float64 [n, features]."""
    found = []
    for part in torch.split(images, 128):
        answers = functional.conv2d(part, filters, padding=_WIDTH // 2)
        pooled = [functional.adaptive_avg_pool2d(functional.relu(s * answers), _CELLS) for s in (1, -1)]
        found.append(torch.cat(pooled, dim=1).flatten(1))
    return torch.cat(found).double()


def _probe(features: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Fit a ridge regression to the classes and return those of `asked`, int64 [m]."""
    middle, spread = features.mean(0), features.std(0) + 1e-6
    x = torch.cat([(features - middle) / spread, torch.ones(len(features), 1)], dim=1)
    y = functional.one_hot(labels, int(labels.max()) + 1).double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * len(x))
    weights: Tensor = torch.linalg.solve(gram, x.T @ y)
    return (torch.cat([(asked - middle) / spread, torch.ones(len(asked), 1)], dim=1) @ weights).argmax(1)
