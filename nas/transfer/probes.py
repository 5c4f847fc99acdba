"""Two probes of a frozen network's pooled features: logistic regression, and nearest neighbours.

Each has one number to choose. It is chosen by top-1 on the holdout, never on the test split.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nas.core.progress import Tick, no_tick
from nas.data import Split
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.views import outputs
from nas.export.weights import place

Features = NDArray[np.float32]
Labels = NDArray[np.int64]

FEATURE_BATCH = 32  # larger ones leave a CPU's caches: 20 to 30 % slower at 48 px
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the L2 penalty (scikit-learn's C), the strongest penalty first."""
MOST_ITERATIONS = 300
SMALL_FIT = 1e9
"""Images x features x classes up to which a fit has one thread: products so small gain little from more, and where
other processes use the cores the threads' waiting makes it 15 times slower."""
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features [n, D] and classes [n] of one split."""

    features: Features
    labels: Labels


@dataclass(frozen=True, eq=False)
class Probed:
    """Which test images [n] a probe classified right, and what the holdout chose."""

    right: NDArray[np.bool_]
    chosen: str


def pooled(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what the classifier sees: [B, 3, S, S] -> float32 [B, D]; any timm network."""
    net: Any = model
    found: torch.Tensor = net.forward_head(net.forward_features(images), pre_logits=True)
    return found.flatten(1).float()


def features_of(model: nn.Module, split: Split, spec: AugmentSpec, device: str, tick: Tick = no_tick) -> FeatureSet:
    """Compute the pooled features of a split's evaluation inputs with a model in eval mode; `tick` counts images."""
    place(model, device)
    rows = []
    batches = outputs(lambda images: pooled(model, images), split, spec, device=device, batch_size=FEATURE_BATCH)
    for at, found in batches:
        rows.append(found.cpu().numpy())
        tick(float(len(at)))
    return FeatureSet(np.concatenate(rows), np.asarray(split.labels))


def linear_probe(train: FeatureSet, holdout: FeatureSet, test: FeatureSet) -> Probed:
    """Fit multinomial logistic regression on standardised features, for every strength.

    Of equal ones the one of least cross-entropy on the holdout is taken.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.features)
    fit_on, chosen_on, tested_on = (scaler.transform(side.features) for side in (train, holdout, test))
    # Each fit begins where the last one, under a stronger penalty, has ended.
    model = LogisticRegression(max_iter=MOST_ITERATIONS, tol=1e-3, warm_start=True)
    best, right, chosen = (-1.0, 0.0), np.zeros(len(test.labels), dtype=bool), ""
    pools: Any = importlib.import_module("threadpoolctl")  # scikit-learn's own; has no types
    work = train.features.size * len(np.unique(train.labels))
    threads = 1 if work <= SMALL_FIT else None
    for strength in STRENGTHS:
        model.set_params(C=strength)
        with warnings.catch_warnings(), pools.threadpool_limits(threads, user_api="blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)  # `chosen` reports it
            model.fit(fit_on, train.labels)
        likely = model.predict_proba(chosen_on)
        of_truth = likely[np.arange(len(likely)), np.searchsorted(model.classes_, holdout.labels)]
        top1 = float((model.classes_[likely.argmax(1)] == holdout.labels).mean())
        score = top1, float(np.log(np.maximum(of_truth, 1e-30)).mean())
        if score > best:
            best = score
            right = np.asarray(model.predict(tested_on) == test.labels)
            ended = int(np.max(model.n_iter_)) < MOST_ITERATIONS
            chosen = f"C={strength:g}" + ("" if ended else f", stopped at {MOST_ITERATIONS}")
    return Probed(right, chosen)


def knn_probe(train: FeatureSet, holdout: FeatureSet, test: FeatureSet, classes: int) -> Probed:
    """Let the most alike train images vote, for every number of them; of equal ones the fewest.

    Numbers beyond the train images are left out.
    """
    numbers = [k for k in NEIGHBOURS if k <= len(train.labels)]
    on_holdout = neighbour_classes(train, holdout.features, numbers, classes)
    best = numbers[int((on_holdout == holdout.labels).mean(1).argmax())]
    predicted = neighbour_classes(train, test.features, [best], classes)[0]
    return Probed(predicted == test.labels, f"k={best}")


def neighbour_classes(train: FeatureSet, queries: Features, numbers: Sequence[int], classes: int) -> NDArray[np.int64]:
    """Classify queries [q, D] by their k most alike train images, for each k: int64 [ks, q].

    Alikeness is the cosine s; a neighbour's vote weighs exp(s / 0.07). Equally alike ones stand in the order of the
    train side, equal votes fall to the first class (scikit-learn's classifier leaves both orders open). Source: Wu et
    al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018).
    """
    bank, most = _unit(train.features), max(numbers)
    predicted = np.empty((len(numbers), len(queries)), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        alike = _unit(queries[start : start + _BLOCK]) @ bank.T
        near = np.argsort(-alike, axis=1, kind="stable")[:, :most]
        weights = np.exp(np.take_along_axis(alike, near, 1) / TEMPERATURE)
        cells = np.arange(len(near))[:, None] * classes + train.labels[near]
        for at, k in enumerate(numbers):
            votes = np.bincount(cells[:, :k].ravel(), weights[:, :k].ravel(), minlength=len(near) * classes)
            predicted[at, start : start + _BLOCK] = votes.reshape(-1, classes).argmax(1)
    return predicted


def _unit(features: Features) -> NDArray[np.float64]:
    """Scale rows to length 1; rows of zeros stay."""
    wide = features.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(length > 0, length, 1))
