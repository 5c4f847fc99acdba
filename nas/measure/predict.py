"""From measured networks to those that were not: a predictor with the error it admits. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from space import Arch, Context, Family
from space.errors import refuse

Floats = npt.NDArray[np.float64]

LEAST_ROWS = 20
"""Fewest measured networks that a predictor is fitted to."""

FOLDS = 10


Model = Callable[[Floats], Floats]
"""From cost terms `[n, terms]` to seconds an image `[n]`."""


def fit_additive(terms: Floats, seconds: Floats) -> Model:
    """Fit seconds as a sum of the terms with weights that are not negative (scipy's NNLS).

    Rows are divided by their measured value, so that relative errors count alike for small and large networks.
    """
    from scipy.optimize import nnls

    scale = np.maximum(terms.max(axis=0), 1e-12)
    weights, _ = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))
    return lambda of: np.maximum(of / scale @ weights, 1e-12)


def fit_boosted(terms: Floats, seconds: Floats) -> Model:
    """Fit gradient-boosted trees on the logarithms of the terms (scikit-learn)."""
    from sklearn.ensemble import GradientBoostingRegressor

    trees = GradientBoostingRegressor(n_estimators=300, max_depth=3, learning_rate=0.05, subsample=0.7, random_state=0)
    trees.fit(np.log1p(terms), np.log(seconds))
    return lambda of: np.asarray(np.exp(trees.predict(np.log1p(of))))


Fit = Callable[[Floats, Floats], Model]
MODELS: dict[str, Fit] = {"additive": fit_additive, "boosted": fit_boosted}


@dataclass(frozen=True)
class Prediction:
    """Images/s of a network that was not measured; `lo` and `hi` enclose 95 % of such networks."""

    images_per_s: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Predictor:
    """The model that cross-validates best, and its error on networks that it had not seen.

    `errors` are |log(predicted / measured)| of every held-out network, ascending; `scores` the median error of each
    model tried.
    """

    family: Family
    ctx: Context
    name: str
    model: Model
    errors: tuple[float, ...]
    scores: dict[str, float]

    def predict(self, archs: Sequence[Arch]) -> list[Prediction]:
        """Predict networks; the interval is that of the held-out errors, as a factor."""
        seconds = self.model(terms_of(self.family, archs, self.ctx))
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


def held_out(fit: Fit, terms: Floats, seconds: Floats) -> Floats:
    """Predict every network by a model that has not seen it: ten folds, drawn once."""
    order = np.random.default_rng(0).permutation(len(seconds))
    found = np.empty(len(seconds))
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        rest = np.setdiff1d(order, out)
        found[out] = fit(terms[rest], seconds[rest])(terms[out])
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
    for name, fit in MODELS.items():
        found = held_out(fit, terms, seconds)
        errors[name] = np.sort(np.abs(np.log(found / seconds)))
        scores[name] = float(np.median(errors[name]))
    best = min(scores, key=lambda name: scores[name])
    return Predictor(family, ctx, best, MODELS[best](terms, seconds), tuple(errors[best].tolist()), scores)
