"""Selection of the timed candidates to train, and ranking of the scored ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from space.contractions import Candidate

Features = Mapping[str, Sequence[float]]
"""A candidate's place in the space, as numbers, by its key."""


def pick(
    candidates: Sequence[Candidate], features: Features, count: int, how: str, *, random_seed: int
) -> list[Candidate]:
    """Choose `count` of the timed candidates that meet the requirements, by "nearest" or "diverse".

    "nearest": in the order of the list, which a rule made nearest first; baselines come first, up to half of the
    places. "diverse": see `spread`.
    """
    if how == "diverse":
        return spread(candidates, features, count, random_seed=random_seed)
    baselines = [c for c in candidates if c.baseline is not None]
    first = baselines[: (count + 1) // 2]
    rest = [c for c in candidates if c.baseline is None]
    return [*first, *rest, *baselines[len(first) :]][:count]


def spread(candidates: Sequence[Candidate], features: Features, count: int, *, random_seed: int) -> list[Candidate]:
    """Choose `count` candidates that lie far apart, by farthest-point sampling.

    Distance is Euclidean over the moved factors (each scaled to its range among the candidates) and the logarithm of
    the throughput ratio. Baselines come first, up to half of the places, then what is farthest from all chosen (without
    baselines, from the fastest); ties are broken by a seeded order. Returns them in the order of choice. Source:
    Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.
    """
    if not candidates or count < 1:
        return []
    rng = np.random.default_rng(random_seed)
    by_key = sorted(candidates, key=lambda c: c.key)
    order = [by_key[i] for i in rng.permutation(len(by_key))]
    ratios = [1.0 if c.ratio is None else c.ratio for c in order]
    rows = [[*features[c.key], math.log(r)] for c, r in zip(order, ratios, strict=True)]
    points = np.array(rows, dtype=np.float64)
    extent = np.ptp(points, axis=0)
    points = (points - points.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    baselines = [i for i, c in enumerate(order) if c.baseline is not None]
    fastest = max(range(len(order)), key=lambda i: ratios[i])
    chosen = baselines[: (count + 1) // 2] if baselines else [fastest]
    while len(chosen) < min(count, len(order)):
        away = np.min(np.linalg.norm(points[:, None, :] - points[None, chosen, :], axis=-1), axis=1)
        away[chosen] = -1.0
        chosen.append(int(np.argmax(away)))
    return [order[i] for i in chosen]


class HasScore(Protocol):
    """A trial or an incumbent: its soft loss (nats, lower is better) and throughput ratio."""

    @property
    def key(self) -> str: ...
    @property
    def soft_loss(self) -> float | None: ...
    @property
    def ratio(self) -> float | None: ...


PairedError = Callable[[str, str], float]
"""Standard error of the mean difference in soft loss of two candidates over the same images."""


def rank(scored: Sequence[HasScore], error: PairedError) -> list[str]:
    """Order candidates from best to worst: by soft loss, ties within noise to the faster.

    A candidate ties with the best when it is behind by no more than one standard error of their difference. The tied
    ones come first, fastest first; the others follow by loss. Returns keys.
    """
    known = [(s.soft_loss, -s.ratio, s.key) for s in scored if s.soft_loss is not None and s.ratio]
    assert len(known) == len(scored), "only what was timed and trained can be ranked"
    if not known:
        return []
    known.sort()
    best_loss, _, best = known[0]
    tied = [k for k in known if k[2] == best or k[0] - best_loss <= error(k[2], best)]
    rest = [k for k in known if k not in tied]
    tied.sort(key=lambda k: (k[1], k[0], k[2]))
    return [key for _, _, key in (*tied, *rest)]


def paired_error(losses: Callable[[str], npt.NDArray[np.float64]]) -> PairedError:
    """Return the paired error from per-image losses `[n]` in the same image order."""

    def error(a: str, b: str) -> float:
        difference = losses(a) - losses(b)
        return float(np.std(difference, ddof=1) / math.sqrt(len(difference)))

    return error
