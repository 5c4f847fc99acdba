"""The pooled comparison resamples images and seeds: its interval knows both kinds of luck."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.contract import main, pooled_interval


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seeds=st.integers(1, 5), images=st.integers(2, 60), seed=st.integers(0, 99))
def test_the_interval_encloses_the_mean_and_repeats(seeds: int, images: int, seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-1, 2, (seeds, images)).astype(float)
    mean, lo, hi = pooled_interval(differences, draws=400)
    assert mean == pytest.approx(differences.mean())
    assert lo <= mean <= hi
    assert pooled_interval(differences, draws=400) == (mean, lo, hi)


def test_no_difference_anywhere_is_no_width() -> None:
    assert pooled_interval(np.zeros((3, 50)), draws=100) == (0.0, 0.0, 0.0)


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(-1, 2, 400).astype(float)
    alike = np.stack([images] * 3)
    disagreeing = alike + np.array([[-0.2], [0.0], [0.2]])
    widths = [hi - lo for _, lo, hi in (pooled_interval(alike), pooled_interval(disagreeing))]
    assert widths[1] > 2 * widths[0]


def test_coverage_is_near_95_percent_when_images_are_the_only_luck() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        sample = np.stack([rng.normal(0.1, 1.0, 80)] * 2)
        _, lo, hi = pooled_interval(sample, draws=300)
        hits += lo <= 0.1 <= hi
    # Binomial(200, 0.95) lies within [178, 199] with 99.9 %; percentile intervals run a bit short.
    assert 174 <= hits <= 200


@pytest.mark.parametrize("arguments", [["--data", "no-such-data"], ["--effort", "extreme"]])
def test_bad_input_is_one_line(
    arguments: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path_factory.mktemp("results")
    folders = ["--runs", str(base / "runs"), "--out", str(base / "out")]
    assert main([*arguments, *folders, "--cache-dir", str(base / "cache")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
