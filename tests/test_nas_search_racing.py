"""Racing: the best is rarely stopped, and clear losers stop early."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from nas.search.racing import racing_decision

Floats = npt.NDArray[np.float64]


def curves_of(rng: np.random.Generator, true: Floats, rungs: int, images: int, drifts: float) -> Floats:
    """Curves [archs, rungs, images] that fall, and whose order still moves until the last rung."""
    n = len(true)
    hard = rng.exponential(size=images)
    moves = drifts / math.sqrt(2) * rng.normal(size=(n, rungs))
    moves[:, -1] = 0.0
    level = true[:, None] + moves + 1.0 / (1 + np.arange(rungs))
    own = 0.5 * rng.normal(size=(n, 1, images))  # an arch finds the same images hard at each rung
    return np.asarray(level[:, :, None] + hard + own + 0.3 * rng.normal(size=(n, rungs, images)))


def raced(curves: Floats, keep: int, alpha: float, drift_sd: float | None) -> list[set[str]]:
    """Race curves [archs, rungs, images]: which are left after each rung but the last."""
    left, found = [str(i) for i in range(len(curves))], []
    for rung in range(curves.shape[1] - 1):
        losses = {key: curves[int(key), rung] for key in left}
        decision = racing_decision(losses, keep, alpha=alpha, looks=curves.shape[1] - 1, drift_sd=drift_sd)
        left = list(decision.stay)
        found.append(set(left))
    return found


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("drifts", [0.0, 0.1])
def test_a_race_stops_the_best_at_most_alpha_of_the_time(keep: int, drifts: float) -> None:
    rng = np.random.default_rng(0)
    races, alpha, rungs, lost = 300, 0.1, 3, 0
    for _ in range(races):
        # Equals, up to a hair: the hardest case for the best of them.
        curves = curves_of(rng, np.array([0.0, *[1e-6] * 7]), rungs, 100, drifts)
        lost += "0" not in raced(curves, keep, alpha, drifts)[-1]
    assert lost / races <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / races)


def test_without_an_allowance_drift_stops_the_best() -> None:
    rng = np.random.default_rng(1)
    lost = 0
    for _ in range(100):
        curves = curves_of(rng, np.array([0.0, *[0.01] * 7]), 3, 2000, 0.3)
        lost += "0" not in raced(curves, 1, 0.05, None)[-1]
    assert lost > 30


def test_a_clear_loser_stops_at_the_first_rung() -> None:
    rng = np.random.default_rng(2)
    left = raced(curves_of(rng, np.array([0.0, 0.01, 0.02, 5.0]), 3, 200, 0.02), 2, 0.05, 0.05)
    assert left[0] == {"0", "1", "2"}


def test_decisions_follow_the_rule_spelt_out_pair_by_pair() -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    for _ in range(60):
        n, images, keep = int(rng.integers(2, 9)), int(rng.integers(5, 60)), int(rng.integers(1, 4))
        alpha, looks = float(rng.uniform(0.01, 0.4)), int(rng.integers(1, 4))
        spread = float(rng.choice([0.0, 0.1, 1.0]))
        allowance = rng.choice(np.array([0.0, 0.1]))
        base = rng.normal(size=images)
        losses = {f"k{i}": base + spread * rng.normal() + 0.3 * rng.normal(size=images) for i in range(n)}
        found = racing_decision(losses, keep, alpha=alpha, looks=looks, drift_sd=float(allowance))
        if n <= keep:
            assert set(found.stay) == set(losses)
            continue
        level = min(0.5, alpha * keep / (looks * (n - 1)))
        for key, own in losses.items():
            better = 0
            for other in losses.values():
                d = own - other
                se = math.hypot(d.std(ddof=1) / math.sqrt(images), float(allowance))
                if d.mean() > 0 and stats.t.sf(d.mean() / se, images - 1) < level:
                    better += 1
            assert (key in found.stop) == (better >= keep)
        shuffled = {k: losses[k] for k in rng.permutation(list(losses)).tolist()}
        again = racing_decision(shuffled, keep, alpha=alpha, looks=looks, drift_sd=float(allowance))
        assert (again.stay, again.stop) == (found.stay, found.stop)
        means = [float(losses[k].mean()) for k in found.stay]
        assert means == sorted(means)
        assert len(found.stay) >= min(keep, n)
        assert set(found.stay).isdisjoint(found.stop)
        assert set(found.stay) | set(found.stop) == set(losses)


def test_who_must_stay_and_who_cannot() -> None:
    rng = np.random.default_rng(4)
    losses = {f"k{i}": i + 0.01 * rng.normal(size=50) for i in range(5)}
    for keep in (5, 6, 100):
        assert not racing_decision(losses, keep, alpha=0.05, looks=1).stop
    found = racing_decision(losses, 2, alpha=0.05, looks=2)
    assert found.stay == ("k0", "k1")
    assert found.stop["k4"] == (
        "worse than 4 of 4 others by paired tests on 50 images, keeping 2; 4 nats behind the best"
    )
    ties = dict.fromkeys("abc", losses["k0"])
    assert racing_decision(ties, 1, alpha=0.05, looks=1).stay == ("a", "b", "c")
    # The same difference on every image is no accident; one image alone proves nothing.
    certain = {"a": np.zeros(9), "b": np.full(9, 0.5)}
    assert racing_decision(certain, 1, alpha=0.05, looks=1).stay == ("a",)
    assert racing_decision(certain, 1, alpha=0.05, looks=1, drift_sd=1.0).stay == ("a", "b")
    one = {"a": np.zeros(1), "b": np.full(1, 0.5)}
    assert not racing_decision(one, 1, alpha=0.05, looks=1).stop


def test_what_diverged_stops_at_once_but_never_everything() -> None:
    good, bad = np.zeros(5), np.array([0.0, 0.0, math.nan, 0.0, 0.0])
    found = racing_decision({"a": good, "b": bad, "c": np.full(5, np.inf)}, 3, alpha=0.05, looks=1)
    assert found.stay == ("a",)
    assert found.stop == {"b": "diverged", "c": "diverged"}
    assert racing_decision({"b": bad, "c": bad}, 1, alpha=0.05, looks=1).stay == ("b", "c")
    assert racing_decision({}, 1, alpha=0.05, looks=1).stay == ()
