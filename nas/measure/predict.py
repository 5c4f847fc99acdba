"""From measured networks to those that were not: a predictor with the error it admits. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from space import Arch, Context, Family
from space.errors import refuse

Floats = npt.NDArray[np.float64]

LEAST_ROWS = 20
"""Fewest measured networks that a predictor is fitted to."""

FOLDS = 10


class Model(Protocol):
    """Predicts seconds an image from cost terms `[n, terms]`."""

    def fit(self, terms: Floats, seconds: Floats) -> None:
        """Learn from measured networks."""

    def predict(self, terms: Floats) -> Floats:
        """Return seconds an image, `[n]`."""


class Additive:
    """Seconds are a sum of the terms with weights that are not negative (scipy's NNLS).

    Rows are divided by their measured value, so that relative errors count alike for small and
    large networks.
    """

    def fit(self, terms: Floats, seconds: Floats) -> None:
        """Find the weights."""
        from scipy.optimize import nnls

        self._scale = np.maximum(terms.max(axis=0), 1e-12)
        weighted = terms / self._scale / seconds[:, None]
        self.weights, _ = nnls(weighted, np.ones(len(seconds)))

    def predict(self, terms: Floats) -> Floats:
        """Add up."""
        found: Floats = terms / self._scale @ self.weights
        return np.maximum(found, 1e-12)


class Boosted:
    """Gradient-boosted trees on the logarithms of the terms (scikit-learn)."""

    def fit(self, terms: Floats, seconds: Floats) -> None:
        """Grow the trees."""
        from sklearn.ensemble import GradientBoostingRegressor

        self._trees = GradientBoostingRegressor(
            n_estimators=300, max_depth=3, learning_rate=0.05, subsample=0.7, random_state=0
        )
        self._trees.fit(np.log1p(terms), np.log(seconds))

    def predict(self, terms: Floats) -> Floats:
        """Ask the trees."""
        found: Floats = np.exp(self._trees.predict(np.log1p(terms)))
        return found


MODELS: dict[str, Callable[[], Model]] = {"additive": Additive, "boosted": Boosted}


@dataclass(frozen=True)
class Prediction:
    """Images/s of a network that was not measured; `lo` and `hi` enclose 95 % of such networks."""

    images_per_s: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Predictor:
    """The model that cross-validates best, and its error on networks that it had not seen.

    `errors` are |log(predicted / measured)| of every held-out network, ascending; `scores` the
    median error of each model tried.
    """

    family: Family
    ctx: Context
    name: str
    model: Model
    errors: tuple[float, ...]
    scores: dict[str, float]

    def predict(self, archs: Sequence[Arch]) -> list[Prediction]:
        """Predict networks; the interval is that of the held-out errors, as a factor."""
        seconds = self.model.predict(terms_of(self.family, archs, self.ctx))
        factor = float(np.exp(self.error))
        return [Prediction(1 / s, 1 / s / factor, 1 / s * factor) for s in seconds.tolist()]

    @property
    def error(self) -> float:
        """The log error that 95 % of unseen networks stay below (conformal)."""
        n = len(self.errors)
        return self.errors[min(n, int(np.ceil(0.95 * (n + 1)))) - 1]

    @property
    def median_error(self) -> float:
        """The median error of unseen networks, as a share."""
        return float(np.expm1(np.median(self.errors)))


def terms_of(family: Family, archs: Sequence[Arch], ctx: Context) -> Floats:
    """Return the cost terms of archs, `[n, terms]`."""
    columns = family.cost_terms_many(family.table(archs), ctx)
    return np.stack([np.asarray(c, dtype=np.float64) for c in columns.values()], axis=1)


def held_out(make: Callable[[], Model], terms: Floats, seconds: Floats, *, random_seed: int = 0) -> Floats:
    """Predict every network by a model that has not seen it: ten folds, drawn once."""
    order = np.random.default_rng(random_seed).permutation(len(seconds))
    found = np.empty(len(seconds))
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        rest = np.setdiff1d(order, out)
        model = make()
        model.fit(terms[rest], seconds[rest])
        found[out] = model.predict(terms[out])
    return found


def fit_predictor(family: Family, ctx: Context, archs: Sequence[Arch], images_per_s: Sequence[float]) -> Predictor:
    """Fit every model, keep the one of the least median held-out error. Refuses too few rows."""
    if len(archs) < LEAST_ROWS:
        raise refuse(
            "--device-table",
            f"{len(archs)} measured networks",
            f"at least {LEAST_ROWS}",
            "measure more: python -m benchmarks.throughput --space tinyvit --sample 200",
        )
    terms = terms_of(family, archs, ctx)
    seconds = 1.0 / np.asarray(images_per_s, dtype=np.float64)
    errors, scores = {}, {}
    for name, make in MODELS.items():
        found = held_out(make, terms, seconds)
        errors[name] = np.sort(np.abs(np.log(found / seconds)))
        scores[name] = float(np.median(errors[name]))
    best = min(scores, key=lambda name: scores[name])
    model = MODELS[best]()
    model.fit(terms, seconds)
    return Predictor(family, ctx, best, model, tuple(errors[best].tolist()), scores)
