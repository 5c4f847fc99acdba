"""The formula-driven set: the same pixels everywhere, and every image on its own."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from nas.data import DataSpec, prepare
from nas.data.fractals import CLASSES, Wanted, all_wanted, class_systems, render
from space.errors import InputError

SAMPLE_SHA256 = "3d7491dd6300b9dd68edaadb7ead6eb7d65a7a1bd2e8313b015cde646ae4d925"
"""Of the sample's pixels; it changes only together with `nas.data.fractals.VERSION`."""
SAMPLE = [Wanted("fit", label, label % 40) for label in range(0, CLASSES, 4)] + [
    Wanted("test", label, 19) for label in range(1, CLASSES, 4)
]


def test_the_generator_makes_the_committed_pixels() -> None:
    total = hashlib.sha256()
    for pixels in render(SAMPLE):
        total.update(pixels.tobytes())
    assert total.hexdigest() == SAMPLE_SHA256


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    together = list(render(SAMPLE[:7]))
    alone = list(render(SAMPLE[3:4])) + list(render(SAMPLE[4:6][::-1]))
    assert np.array_equal(alone[0], together[3])
    assert np.array_equal(alone[1], together[5])
    assert np.array_equal(alone[2], together[4])


def test_the_set_has_four_two_and_two_thousand_images() -> None:
    wanted = all_wanted()
    count = {role: sum(one.role == role for one in wanted) for role in ("fit", "holdout", "test")}
    assert count == {"fit": 4000, "holdout": 2000, "test": 2000}
    assert len({one.name for one in wanted}) == 8000
    systems = class_systems()
    assert systems.shape == (CLASSES, 4, 6)
    linear = systems[:, :, :4].reshape(-1, 2, 2).astype(np.float64)
    assert np.linalg.norm(linear, 2, (1, 2)).max() < 1, "every map contracts"


def test_images_of_other_sizes_show_the_same_shape() -> None:
    one = [Wanted("fit", 3, 1)]
    large = next(iter(render(one, 96))).astype(float)
    assert large.shape == (96, 96, 3)
    small = next(iter(render(one, 48))).astype(float)
    shrunk = large.reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.6


def test_a_prepared_part_is_stratified_and_does_not_depend_on_the_random_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nas.data.fractals as module

    monkeypatch.setitem(module.IMAGES_PER_CLASS, "test", 1)
    first = prepare(DataSpec("fractals", max_images=300), tmp_path)
    assert (len(first.train), len(first.holdout), len(first.test)) == (200, 100, 100)
    assert set(np.bincount(first.train.labels)) == {2}
    assert set(np.bincount(first.holdout.labels)) == {1}
    assert first.num_classes == CLASSES
    for split in (first.train, first.holdout, first.test):
        labels = [int(name.split("/")[1]) for name in split.names]
        assert labels == split.labels.tolist()
    known = {one.name for one in all_wanted()}
    assert known.issuperset(first.train.names), "a name does not depend on what else was chosen"
    again = prepare(DataSpec("fractals", max_images=300, random_seed=3), tmp_path)
    assert again.folder == first.folder
    shutil.rmtree(tmp_path / "data")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-images: got 120, want at least 300"):
        prepare(DataSpec("fractals", max_images=120), tmp_path)
