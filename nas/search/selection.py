"""Selection of the timed candidates to train, and ranking of the scored ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Timed:
    """A candidate that passed the gates: its place in the space and its throughput ratio."""

    key: str
    features: tuple[float, ...]
    ratio: float
    anchor: bool


def pick(timed: Sequence[Timed], count: int, how: str, *, random_seed: int) -> list[str]:
    """Choose `count` of the listed candidates that passed: `how` is "near" or "spread".

    "near": in the order of the list, which a rule made nearest first; anchors come first, up to
    half of the places. "spread": see `spread`. Returns keys.
    """
    if how == "spread":
        return spread(timed, count, random_seed=random_seed)
    anchors = [t.key for t in timed if t.anchor]
    first = anchors[: (count + 1) // 2]
    rest = [t.key for t in timed if not t.anchor]
    return [*first, *rest, *anchors[len(first) :]][:count]


def spread(timed: Sequence[Timed], count: int, *, random_seed: int) -> list[str]:
    """Choose `count` candidates that lie far apart, by farthest-point sampling.

    Distance is Euclidean over the moved factors (each scaled to its range among the candidates)
    and the logarithm of the throughput ratio. Anchors come first, up to half of the places, then
    what is farthest from all chosen (without anchors, from the fastest); ties are broken by a
    seeded order. Returns keys in the order of choice.
    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.
    """
    if not timed or count < 1:
        return []
    rng = np.random.default_rng(random_seed)
    by_key = sorted(timed, key=lambda t: t.key)
    order = [by_key[i] for i in rng.permutation(len(by_key))]
    points = np.array([[*t.features, math.log(t.ratio)] for t in order], dtype=np.float64)
    extent = np.ptp(points, axis=0)
    points = (points - points.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    anchors = [i for i, t in enumerate(order) if t.anchor]
    fastest = max(range(len(order)), key=lambda i: order[i].ratio)
    chosen = anchors[: (count + 1) // 2] if anchors else [fastest]
    while len(chosen) < min(count, len(order)):
        away = np.min(np.linalg.norm(points[:, None, :] - points[None, chosen, :], axis=-1), axis=1)
        away[chosen] = -1.0
        chosen.append(int(np.argmax(away)))
    return [order[i].key for i in chosen]


@dataclass(frozen=True)
class Scored:
    """A trained candidate: mean soft loss on the holdout (nats, lower is better) and its ratio."""

    key: str
    soft_loss: float
    soft_loss_se: float
    ratio: float


PairedError = Callable[[str, str], float]
"""Standard error of the mean difference in soft loss of two candidates over the same images."""


def rank(scored: Sequence[Scored], error: PairedError) -> list[str]:
    """Order candidates from best to worst: by soft loss, ties within noise to the faster.

    A candidate ties with the best when it is behind by no more than one standard error of their
    difference. The tied ones come first, fastest first; the others follow by loss.
    """
    by_loss = sorted(scored, key=lambda s: (s.soft_loss, -s.ratio, s.key))
    if not by_loss:
        return []
    best = by_loss[0]
    tied = [
        s for s in by_loss if s is best or s.soft_loss - best.soft_loss <= error(s.key, best.key)
    ]
    rest = [s for s in by_loss if s not in tied]
    tied.sort(key=lambda s: (-s.ratio, s.soft_loss, s.key))
    return [s.key for s in (*tied, *rest)]


def paired_error(losses: Callable[[str], npt.NDArray[np.float64]]) -> PairedError:
    """Return the paired error from per-image losses `[n]` in the same image order."""

    def error(a: str, b: str) -> float:
        difference = losses(a) - losses(b)
        return float(np.std(difference, ddof=1) / math.sqrt(len(difference)))

    return error
