"""Racing: decide which candidates stop at a rung, by paired tests on the holdout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from space.errors import refuse

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """The decision at a rung: keys that stay, best mean loss first; the others with a reason."""

    stay: tuple[str, ...]
    stop: Mapping[str, str]


def racing_decision(
    losses: Mapping[str, npt.ArrayLike], keep: int, *, alpha: float, looks: int, drift_sd: float | None = None
) -> Decision:
    """Decide which candidates stay, from per-image losses [n_images] (nats) of the same images.

    A candidate stops when one-sided paired tests say that it is worse than each of at least `keep` others: then it is
    not among the best `keep`. `alpha` bounds the chance that a race of `looks` such decisions stops the best of its
    candidates. That takes `keep` of its n - 1 rivals to look better by chance at once, so each test has the level alpha
    * keep / (looks * (n - 1)), by Markov's inequality whatever the tests have in common.

    Images measure how well two candidates do now; `drift_sd` (nats) is how much their difference still moves until the
    last rung, as a standard deviation: the statistic is the mean difference divided by sqrt(se_images^2 + drift_sd^2).
    None: only the images' noise, and alpha is about being best now. Ties stay; the `keep` best means always do; a mean
    that is not finite stops as "diverged" unless all are. Depends on the losses and keys, not on their order.
    InputError.
    """
    if keep < 1 or looks < 1 or not 0 < alpha < 1:
        got = f"keep {keep}, looks {looks}, alpha {alpha}"
        raise refuse("a race", got, "keep >= 1, looks >= 1 and alpha between 0 and 1")
    if drift_sd is not None and not (math.isfinite(drift_sd) and drift_sd >= 0):
        raise refuse("drift_sd", drift_sd, "a number of nats >= 0, or None")
    table = {key: np.asarray(losses[key], dtype=np.float64) for key in sorted(losses)}
    if len({values.shape for values in table.values()}) > 1 or any(
        values.ndim != 1 or not len(values) for values in table.values()
    ):
        shapes = ", ".join(sorted({str(v.shape) for v in table.values()}))
        raise refuse("losses", shapes, "one loss per image, the same images for every candidate")
    means = {key: float(values.mean()) for key, values in table.items()}
    order = sorted((k for k in table if math.isfinite(means[k])), key=lambda k: (means[k], k))
    if not order:
        return Decision(tuple(table), {})
    stop = {key: "diverged" for key in table if key not in order}
    if len(order) > keep:
        level = min(0.5, alpha * keep / (looks * (len(order) - 1)))
        for key, behind in _behind(np.array([table[k] for k in order]), order, level, drift_sd):
            if behind >= keep:
                images, worse = len(table[key]), means[key] - means[order[0]]
                stop[key] = (
                    f"worse than {behind} of {len(order) - 1} others by paired tests on "
                    f"{images:,} images, keeping {keep}; {worse:.3g} nats behind the best"
                )
    return Decision(tuple(k for k in order if k not in stop), stop)


def _behind(values: Floats, order: Sequence[str], level: float, drift_sd: float | None) -> list[tuple[str, int]]:
    """Count for each candidate, best first, those that are better for certain."""
    images = values.shape[1]
    if images < 2:  # one image has no noise to hold a difference against
        return [(key, 0) for key in order]
    from scipy import special  # takes a third of a second to import

    critical = -float(special.stdtrit(images - 1, level))
    allowance = 0.0 if drift_sd is None else drift_sd**2
    found = []
    for at, key in enumerate(order):
        difference = values[at] - values[:at]
        mean = difference.mean(axis=1)
        error = np.sqrt(difference.var(axis=1, ddof=1) / images + allowance)
        found.append((key, int(((mean > 0) & (mean > critical * error)).sum())))
    return found
