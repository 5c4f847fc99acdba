"""Racing: who stops at a rung, by paired tests on the holdout; and races replayed from curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from space.errors import refuse

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """What a look decides: keys that go on, best mean loss first; the others with their reason."""

    stay: tuple[str, ...]
    stop: Mapping[str, str]


def survivors(
    losses: Mapping[str, npt.ArrayLike],
    keep: int,
    *,
    alpha: float,
    looks: int,
    drift_sd: float | None = None,
) -> Decision:
    """Decide who goes on, from per-image losses [n_images] (nats), the same images for all.

    A candidate stops when one-sided paired tests say that it is worse than each of at least `keep`
    others: then it is not among the best `keep`. `alpha` bounds the chance that a race of `looks`
    such decisions stops the best of its candidates. That takes `keep` of its n - 1 rivals to look
    better by chance at once, so each test has the level alpha * keep / (looks * (n - 1)), by
    Markov's inequality whatever the tests have in common.

    Images tell how well two candidates do now; `drift_sd` (nats, see `drift`) says how much their
    difference still moves until the last rung: the statistic is the mean difference divided by
    sqrt(se_images^2 + drift_sd^2). None: only the images' noise, and what alpha speaks of is
    being best now. Ties stay; the `keep` best means always do; a mean that is not finite stops as
    "diverged" unless all are. Depends on the losses and keys, not on their order. InputError.
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


def _behind(
    values: Floats, order: Sequence[str], level: float, drift_sd: float | None
) -> list[tuple[str, int]]:
    """Count for each candidate, best first, those that are better for certain."""
    images = values.shape[1]
    if images < 2:  # one image has no noise to hold a difference against
        return [(key, 0) for key in order]
    critical = -float(special.stdtrit(images - 1, level))
    allowance = 0.0 if drift_sd is None else drift_sd**2
    found = []
    for at, key in enumerate(order):
        difference = values[at] - values[:at]
        mean = difference.mean(axis=1)
        error = np.sqrt(difference.var(axis=1, ddof=1) / images + allowance)
        found.append((key, int(((mean > 0) & (mean > critical * error)).sum())))
    return found


def drift(curves: Mapping[str, tuple[float, float]]) -> float:
    """Return how far (standard deviation, nats) differences of candidates move until the end.

    `curves`: per candidate its mean loss at a rung and at the last rung. The standard deviation of
    the change of a difference of two, over all pairs: sqrt(2) times that of a candidate's change.
    Differences that only shrink count as movement too, so this errs on the safe side. Candidates
    that did not reach the last rung are missing here by selection. Raises InputError.
    """
    changes = [late - early for early, late in curves.values()]
    changes = [change for change in changes if math.isfinite(change)]
    if len(changes) < 2:
        raise refuse("curves", f"{len(changes)} candidates that reached the end", "at least 2")
    return math.sqrt(2) * float(np.std(changes, ddof=1))


def share_saved(epochs_saved: int, stay: Sequence[str]) -> dict[str, int]:
    """Share saved epochs evenly among those that remain, best first; the rest to the first ones."""
    if not stay:
        return {}
    each, rest = divmod(epochs_saved, len(stay))
    return {key: each + (at < rest) for at, key in enumerate(stay)}


@dataclass(frozen=True)
class Race:
    """A replayed race: epochs trained in all, the archs (positions) that reached the last rung, in
    order of their loss there, and whether the best by loss there is among them."""

    epochs_spent: int
    last_rung: tuple[int, ...]
    kept_true_best: bool


def simulate_race(
    curves: npt.ArrayLike,
    rung_epochs: Sequence[int],
    keep: int,
    *,
    alpha: float,
    drift_sd: Sequence[float | None] | float | None = None,
) -> Race:
    """Replay `survivors` on stored curves [archs, rungs, images], a decision after each rung.

    `rung_epochs`: epochs since the start at each rung, ascending. `drift_sd`: one value, or one for
    each rung but the last. Raises InputError.
    """
    table = np.asarray(curves, dtype=np.float64)
    epochs = _epochs(table.mean(axis=-1) if table.ndim == 3 else table[:0], rung_epochs)
    looks = len(epochs) - 1
    if drift_sd is None or isinstance(drift_sd, (int, float)):
        drift_sd = [drift_sd] * looks
    width = len(str(len(table)))
    racing = {f"{i:0{width}d}": i for i in range(len(table))}
    spent = 0
    for rung in range(looks):
        spent += len(racing) * (epochs[rung] - (epochs[rung - 1] if rung else 0))
        losses = {key: table[i, rung] for key, i in racing.items()}
        stay = survivors(losses, keep, alpha=alpha, looks=looks, drift_sd=drift_sd[rung]).stay
        racing = {key: racing[key] for key in stay}
    spent += len(racing) * (epochs[-1] - (epochs[-2] if looks else 0))
    return _raced(table.mean(axis=-1), spent, racing.values())


def successive_halving(
    curves: npt.ArrayLike, rung_epochs: Sequence[int], reduction: int, *, random_seed: int
) -> Race:
    """Replay Optuna's `SuccessiveHalvingPruner` on stored mean losses [archs, rungs].

    Archs run one after another in a seeded order, as `study.optimize` runs them, and report at each
    rung. The pruner judges asynchronously: against those that came before only, so the order
    matters; average over random seeds. Source: Li et al., arXiv 1810.05934.
    """
    import optuna

    first = int(rung_epochs[0])
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=reduction)
    return _pruned(curves, rung_epochs, pruner, random_seed)


def hyperband(
    curves: npt.ArrayLike, rung_epochs: Sequence[int], reduction: int, *, random_seed: int
) -> Race:
    """Replay Optuna's `HyperbandPruner` on stored mean losses [archs, rungs].

    As `successive_halving`, in brackets that begin to prune later and later; the random seed
    decides which arch goes into which bracket, too. Source: Li et al., arXiv 1603.06560.
    """
    import optuna

    pruner = optuna.pruners.HyperbandPruner(
        min_resource=int(rung_epochs[0]),
        max_resource=int(rung_epochs[-1]),
        reduction_factor=reduction,
    )
    return _pruned(curves, rung_epochs, pruner, random_seed)


def _pruned(curves: npt.ArrayLike, rung_epochs: Sequence[int], pruner: Any, seed: int) -> Race:
    import optuna

    table = np.asarray(curves, dtype=np.float64)
    epochs = _epochs(table, rung_epochs)
    said = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        # A bracket follows from the study's name and the trial's number: both are ours.
        study = optuna.create_study(
            study_name=f"race-{seed}",
            direction="minimize",
            pruner=pruner,
            sampler=optuna.samplers.RandomSampler(seed=seed),
        )
        spent, reached = 0, []
        for i in np.random.default_rng(seed).permutation(len(table)).tolist():
            trial = study.ask()
            for value, epoch in zip(table[i, :-1], epochs, strict=False):
                trial.report(float(value), epoch)
                if trial.should_prune():
                    spent += epoch
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    break
            else:
                spent += epochs[-1]
                trial.report(float(table[i, -1]), epochs[-1])
                trial.should_prune()  # the pruner keeps its book of the last rung, too
                reached.append(i)
                if math.isfinite(table[i, -1]):
                    study.tell(trial, float(table[i, -1]))
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    finally:
        optuna.logging.set_verbosity(said)
    return _raced(table, spent, reached)


def _raced(means: Floats, spent: int, reached: Any) -> Race:
    last = np.where(np.isfinite(means[:, -1]), means[:, -1], np.inf)
    order = sorted(reached, key=lambda i: (last[i], i))
    return Race(int(spent), tuple(order), bool(order) and bool(last[order[0]] == last.min()))


def _epochs(means: Floats, rung_epochs: Sequence[int]) -> list[int]:
    epochs = [int(e) for e in rung_epochs]
    if not epochs or epochs[0] < 1 or any(b <= a for a, b in itertools.pairwise(epochs)):
        raise refuse("rung epochs", epochs, "ascending integers >= 1")
    if means.ndim != 2 or means.shape[1] != len(epochs) or not len(means):
        want = f"losses of at least one arch at {len(epochs)} rungs"
        raise refuse("curves", f"shape {means.shape}", want)
    return epochs
