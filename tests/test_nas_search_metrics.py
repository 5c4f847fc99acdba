"""Metrics agree with scikit-learn, and their errors with what repeated sampling shows."""

from __future__ import annotations

import math
import statistics

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from nas.core.config import choices_of
from nas.core.metrics import image_weights, paired, paired_shares, score
from space.errors import InputError

Ints = npt.NDArray[np.int64]
METRICS = choices_of("metric")


def sample(rng: np.random.Generator, n: int, classes: int, right: float = 0.7) -> tuple[Ints, Ints]:
    """Predictions and truth, the classes of unequal size."""
    share = rng.dirichlet(np.full(classes, 0.7))
    truth = rng.choice(classes, n, p=share)
    guess = rng.integers(0, classes, n)
    return np.where(rng.random(n) < right, truth, guess), truth


def oracle(metric: str, predicted: Ints, truth: Ints) -> float:
    if metric == "top1":
        return float((predicted == truth).mean())
    if metric == "balanced_accuracy":
        return float(balanced_accuracy_score(truth, predicted))
    present = np.unique(truth)
    return float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.filterwarnings("ignore:y_pred contains classes", "ignore:A single label")
def test_values_are_those_of_scikit_learn(metric: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        classes = int(rng.integers(2, 12))
        predicted, truth = sample(rng, int(rng.integers(1, 80)), classes, float(rng.random()))
        value, error = score(metric, predicted, truth, classes)
        assert value == pytest.approx(oracle(metric, predicted, truth))
        assert error >= 0
        # Images of unknown class change nothing.
        more = np.append(truth, [-1, -1]), np.append(predicted, [0, 1])
        again = score(metric, more[1], more[0], classes)
        assert again == (value, error)


@pytest.mark.parametrize("metric", METRICS)
def test_errors_are_those_of_repeated_sampling(metric: str) -> None:
    rng = np.random.default_rng(1)
    classes, share = 4, np.array([0.5, 0.3, 0.15, 0.05])
    values, errors = [], []
    for _ in range(300):
        truth = rng.choice(classes, 400, p=share)
        right = rng.random(400) < np.array([0.9, 0.8, 0.6, 0.5])[truth]
        predicted = np.where(right, truth, (truth + 1) % classes)
        value, error = score(metric, predicted, truth, classes)
        values.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_top1_has_the_error_of_any_mean() -> None:
    predicted, truth = sample(np.random.default_rng(2), 90, 5)
    hits = [float(p == t) for p, t in zip(predicted, truth, strict=True)]
    error = statistics.stdev(hits) / math.sqrt(90)
    assert score("top1", predicted, truth, 5) == pytest.approx((statistics.fmean(hits), error))
    assert score("top1", [1], [1], 2) == (1.0, 0.0)


@pytest.mark.parametrize("metric", METRICS)
def test_paired_differences_cover_and_turn_their_sign(metric: str) -> None:
    rng = np.random.default_rng(3)
    classes, share = 3, np.array([0.7, 0.2, 0.1])

    def draw(n: int) -> tuple[Ints, Ints, Ints]:
        truth = rng.choice(classes, n, p=share)
        luck = rng.random(n)  # both see the same images: what is hard is hard for both
        a = np.where(luck < 0.75, truth, (truth + 1) % classes)
        b = np.where(luck < np.array([0.7, 0.8, 0.6])[truth], truth, (truth + 1) % classes)
        return a, b, truth

    a, b, truth = draw(400_000)
    asked = oracle(metric, a, truth) - oracle(metric, b, truth)
    covered = 0
    for _ in range(200):
        a, b, truth = draw(300)
        found, lo, hi = paired(metric, a, b, truth, classes)
        assert found == pytest.approx(oracle(metric, a, truth) - oracle(metric, b, truth))
        covered += lo <= asked <= hi
    assert covered / 200 >= 0.95 - 0.045
    there = paired(metric, a, b, truth, classes)
    assert paired(metric, b, a, truth, classes) == pytest.approx((-there[0], -there[2], -there[1]))
    same, lo, hi = paired(metric, a, a, truth, classes)
    assert same == 0
    assert -lo == pytest.approx(hi)  # other images may still differ
    assert 0 < hi < 0.1


@pytest.mark.parametrize("n", [100, 1000, 5000])
@pytest.mark.parametrize("discordant", [0.005, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_a_difference_of_top1_is_covered_where_few_images_differ(n: int, discordant: float, share: float) -> None:
    only = discordant * share, discordant * (1 - share)
    drawn = np.random.default_rng(0).multinomial(n, [*only, 1 - discordant], size=2000)[:, :2]
    counts, times = np.unique(drawn, axis=0, return_counts=True)
    covered = 0
    for (a, b), many in zip(counts.tolist(), times.tolist(), strict=True):
        value, lo, hi = paired_shares(a, b, n)
        assert -1 <= lo < value < hi <= 1
        assert paired_shares(b, a, n) == pytest.approx((-value, -hi, -lo))
        covered += many * (lo <= only[0] - only[1] <= hi)
    assert covered / 2000 >= 0.93


CELLS = [(n, k, share) for n in (50, 200, 1000) for k in (2, 10) for share in (0.01, 0.05, 0.2)]
CELLS += [pytest.param(n, k, share, marks=pytest.mark.slow) for n, k, share in ((5000, 10, 0.01), (5000, 100, 0.05))]
CELLS += [pytest.param(200, 100, share, marks=pytest.mark.slow) for share in (0.01, 0.05, 0.2)]


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
@pytest.mark.parametrize(("n", "classes", "discordant"), CELLS)
def test_a_difference_that_counts_classes_alike_is_covered(
    metric: str, n: int, classes: int, discordant: float
) -> None:
    """Given the images' true classes: what is right by a alone is three times as much as what is right by b alone."""
    rng, repeats, covered = np.random.default_rng(7), 150, 0
    weights = 1 / np.arange(1, classes + 1)  # the first class is the largest
    for _ in range(repeats):
        truth = rng.choice(classes, n, p=weights / weights.sum())
        luck, wrong = rng.random(n), (truth + 1 + rng.integers(0, classes - 1, (3, n))) % classes
        b = np.where(luck < 0.75 * discordant, wrong[0], truth)
        a = np.where((luck >= 0.75 * discordant) & (luck < discordant), wrong[1], truth)
        a, b = (np.where(luck > 0.9, wrong[2], said) for said in (a, b))
        size = np.bincount(truth, minlength=classes)
        rates = 0.9 - 0.25 * discordant, 0.9 - 0.75 * discordant
        if metric == "balanced_accuracy":
            asked = rates[0] - rates[1]
        else:
            called = [rate * size + (1 - rate) * (n - size) / (classes - 1) for rate in rates]
            f1 = [(2 * r * size / (size + m))[size > 0].mean() for r, m in zip(rates, called, strict=True)]
            asked = f1[0] - f1[1]
        value, lo, hi = paired(metric, a, b, truth, classes)
        assert -1 <= lo <= value <= hi <= 1
        covered += lo <= asked <= hi
    assert covered / repeats >= 0.93 - 2 * math.sqrt(0.93 * 0.07 / repeats)


def test_a_difference_of_top1_is_the_score_interval() -> None:
    """At its bounds the score statistic, with the likeliest rest of the table by search, is the normal quantile's."""
    for a, b, n in ((12, 2, 50), (0, 1, 30), (5, 5, 400), (30, 1, 90)):
        for bound in paired_shares(a, b, n)[1:]:
            q = np.linspace(max(0.0, -bound), (1 - bound) / 2, 2_000_001)[1:-1]  # right by b alone
            likely = b * np.log(q) + (n - a - b) * np.log1p(-2 * q - bound)
            likely += a * np.log(np.maximum(q + bound, 1e-300))
            best = q[likely.argmax()]
            statistic = (a - b - n * bound) ** 2 / (n * (2 * best + bound * (1 - bound)))
            assert statistic == pytest.approx(1.96**2, rel=2e-3)
    assert paired_shares(0, 0, 50)[2] == pytest.approx(1.96**2 / (50 + 1.96**2), rel=1e-3)
    assert paired_shares(7, 0, 7)[2] == 1.0


def test_weights_make_classes_alike_and_keep_the_sum() -> None:
    rng = np.random.default_rng(4)
    for _ in range(30):
        _, truth = sample(rng, int(rng.integers(1, 200)), int(rng.integers(2, 9)))
        truth = np.where(rng.random(len(truth)) < 0.1, -1, truth)
        assert (image_weights("top1", truth) == 1).all()
        for metric in METRICS[1:]:
            weights = image_weights(metric, truth)
            assert weights.sum() == pytest.approx(len(truth))
            assert (weights[truth < 0] == 1).all()
            present = np.unique(truth[truth >= 0])
            totals = [weights[truth == c].sum() for c in present]
            assert totals == pytest.approx([(truth >= 0).sum() / len(present)] * len(present))


def test_a_weighted_mean_of_hits_is_the_balanced_accuracy() -> None:
    predicted, truth = sample(np.random.default_rng(5), 150, 6)
    weights = image_weights("balanced_accuracy", truth)
    value, _ = score("balanced_accuracy", predicted, truth, 6)
    assert float((weights * (predicted == truth)).mean()) == pytest.approx(value)
    one = score("balanced_accuracy", [0, 0, 1, 1], [0, 0, 0, 1], 2)  # a class of one image adds no error
    assert one == pytest.approx(((2 / 3 + 1) / 2, math.sqrt(2 / 9 / 2) / 2))


@pytest.mark.parametrize(
    ("metric", "predicted", "truth", "want"),
    [
        ("top1", [0, 1], [0], "one per image"),
        ("top1", [2], [0], "0 to 1"),
        ("macro_f1", [0], [-1], "at least one image"),
    ],
)
def test_bad_input_is_refused(metric: str, predicted: list[int], truth: list[int], want: str) -> None:
    with pytest.raises(InputError, match=want):
        score(metric, predicted, truth, 2)
