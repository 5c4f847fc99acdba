"""Digits, cuts and the pixel cache: what a data set promises, wherever it comes from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.data import Dataset, DataSpec, open_dataset, prepare
from nas.data.split import choose, content_key, cut, unique_rows
from space.errors import InputError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits(cache: Path) -> Dataset:
    return prepare(DataSpec("digits"), cache)


def sides(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {side: getattr(dataset, side).keys for side in ("train", "holdout", "test")}


def test_digits_are_all_there_once_and_every_class_is_on_every_side(digits: Dataset) -> None:
    keys = [key for side in sides(digits).values() for key in side]
    assert len(keys) == len(set(keys)) == 1797
    assert (len(digits.train), len(digits.holdout), len(digits.test)) == (1150, 288, 359)
    for split in (digits.train, digits.holdout, digits.test):
        share = np.bincount(split.labels, minlength=10) / len(split)
        assert share.min() > 0.09
        assert share.max() < 0.11
        assert list(split.keys) == sorted(split.keys)
        assert split.pixels.shape == (len(split), 48, 48, 3)
        assert split.pixels.dtype == np.uint8


def test_digits_are_the_ones_of_scikit_learn(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    table = load_digits()
    grey = np.round(table.images * (255 / 16)).astype(np.uint8)
    label_of = {content_key(g.tobytes()): t for g, t in zip(grey, table.target, strict=True)}
    for split in (digits.train, digits.holdout, digits.test):
        assert [label_of[key] for key in split.keys] == split.labels.tolist()
    image = digits.train.pixels[0].astype(int)
    original = next(g for g in grey if content_key(g.tobytes()) == digits.train.keys[0])
    small = image[:, :, 0].reshape(8, 6, 8, 6).mean((1, 3))
    assert np.abs(small - original).mean() < 20, "bicubic enlargement keeps block means"


def test_second_call_reuses_the_folder_and_another_size_or_seed_has_its_own(cache: Path, digits: Dataset) -> None:
    ticks: list[float] = []
    before = (digits.folder / "meta.json").stat().st_mtime_ns
    again = prepare(DataSpec("digits"), cache, ticks.append)
    assert (again.folder / "meta.json").stat().st_mtime_ns == before
    assert again.fingerprint == digits.fingerprint
    assert sum(ticks) == 1797
    reseeded = prepare(DataSpec("digits", random_seed=1), cache)
    assert reseeded.test.keys == digits.test.keys, "the test side does not depend on the seed"
    assert reseeded.holdout.keys != digits.holdout.keys
    larger = prepare(DataSpec("digits", img_size=64), cache)
    assert sides(larger) == sides(digits), "keys are content, not pixels at a size"
    assert len({digits.fingerprint, reseeded.fingerprint, larger.fingerprint}) == 3
    assert len({digits.folder, reseeded.folder, larger.folder}) == 3


def test_proxy_images_bound_train_and_holdout(cache: Path) -> None:
    small = prepare(DataSpec("digits", max_images=200), cache)
    assert len(small.train) + len(small.holdout) == 200
    assert set(small.train.labels) == set(small.holdout.labels) == set(range(10))


def test_the_driver_needs_no_torch_for_embedded_data() -> None:
    code = (
        "import sys, tempfile, pathlib\n"
        "from nas.data import DataSpec, prepare\n"
        "with tempfile.TemporaryDirectory() as at:\n"
        "    print(len(prepare(DataSpec('digits', max_images=60), pathlib.Path(at)).train))\n"
        "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 48


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_choices_do_not_depend_on_order_and_follow_the_classes(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ids = [f"i{at}" for at in range(len(labels))]
    count = data.draw(st.integers(0, len(ids) + 3))
    chosen = {ids[r] for r in choose(ids, labels, count, "salt")}
    order = data.draw(st.permutations(range(len(ids))))
    again = choose([ids[r] for r in order], labels[order], count, "salt")
    assert {ids[order[r]] for r in again} == chosen
    assert len(chosen) == min(count, len(ids))
    taken = np.bincount([labels[ids.index(i)] for i in chosen], minlength=len(sizes))
    if count >= len(sizes):
        assert taken.min() >= 1
    if count >= 4 * len(sizes):
        fair = np.array(sizes) * min(count, len(ids)) / len(ids)
        assert np.abs(taken - np.maximum(fair, 1)).max() <= 1 + len(sizes)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.integers(3, 25), min_size=2, max_size=6), st.integers(0, 3), st.randoms())
def test_cuts_are_a_partition_with_every_class_on_every_side(sizes: list[int], random_seed: int, rng: object) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    keys = [content_key(f"{at}".encode()) for at in range(len(labels))]
    names = [f"c{at}" for at in range(len(sizes))]
    found = cut(keys, labels, ["any"] * len(keys), names, random_seed)
    assert sorted(np.concatenate(list(found.values()))) == list(range(len(keys)))
    for rows in found.values():
        assert set(labels[rows]) == set(range(len(sizes)))
        assert [keys[r] for r in rows] == sorted(keys[r] for r in rows)
    order = list(range(len(keys)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    again = cut([keys[r] for r in order], labels[order], ["any"] * len(keys), names, random_seed)
    for side, rows in found.items():
        assert [keys[order[r]] for r in again[side]] == [keys[r] for r in rows]


def test_a_class_too_small_to_cut_is_named() -> None:
    labels = np.array([0] * 9 + [1] * 2)
    keys = [content_key(f"{at}".encode()) for at in range(11)]
    with pytest.raises(InputError, match="for the train side: 2 of 'rare'"):
        cut(keys, labels, ["any"] * 11, ["common", "rare"], 0)


def test_of_equal_contents_the_test_side_is_kept() -> None:
    keys = ["a", "b", "a", "c", "b", "c"]
    roles = ["train", "train", "test", "holdout", "any", "test"]
    assert [(keys[r], roles[r]) for r in unique_rows(keys, roles)] == [("b", "train"), ("a", "test"), ("c", "test")]


def test_a_damaged_description_and_damaged_pixels_are_refused(digits: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits.folder, folder)
    meta = folder / "meta.json"
    good = meta.read_bytes()
    for name, value in json.loads(good).items():
        meta.write_text(json.dumps({**json.loads(good), name: {"x": value}}))
        if name not in ("root", "labelled_by", "dedup", "decoding", "format", "files", "source"):
            with pytest.raises(InputError, match="delete the folder"):
                open_dataset(folder)
    meta.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError):
        open_dataset(folder)
    meta.write_bytes(good)
    table = folder / "test.npy"
    pixels = table.read_bytes()
    table.write_bytes(pixels[:-1])
    with pytest.raises(InputError, match=r"test\.npy has"):
        open_dataset(folder)
    table.write_bytes(pixels[:-1] + bytes([pixels[-1] ^ 4]))
    open_dataset(folder)
    with pytest.raises(InputError, match="checksum"):
        open_dataset(folder, verify=True)
    table.unlink()
    for gone in (folder, tmp_path / "nowhere"):
        with pytest.raises(InputError):
            open_dataset(gone)


def test_an_unwritable_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--cache-dir"):
        prepare(DataSpec("digits"), tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [{"data": " "}, {"img_size": 0}, {"img_size": 4096}, {"max_images": 0}, {"max_corrupt": 1.5}, {"random_seed": -1}],
)
def test_impossible_requests_are_refused_in_one_line(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(DataSpec("digits"), **change)  # type: ignore[arg-type]
