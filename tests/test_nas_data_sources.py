"""Data sets read through timm: real ones made on the spot, and stand-ins for the network."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData

import nas.data.sources as readers
from nas.data import DataSpec, prepare
from space.errors import InputError

Serve = Callable[[Callable[[str], Any]], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Give what a test makes of a split's name in place of what timm opens."""
    return lambda make: monkeypatch.setattr(readers, "_create", lambda name, s, cache: make(s))


def fake(split: str, count: int = 60, classes: int = 3, side: int = 40) -> FakeData:
    offset = 0 if split == "train" else 10_000
    return FakeData(count, (3, side, side), classes, random_offset=offset)


def test_mnist_files_are_read_by_timm_and_torchvision_themselves(tmp_path: Path) -> None:
    raw = tmp_path / "downloads" / "torch" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 80), ("t10k", 30)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, head, body in (
            ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28), pixels.tobytes()),
            ("labels-idx1", struct.pack(">II", 2049, count), labels.tobytes()),
        ):
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + body)
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + body))
    dataset = prepare(DataSpec("torch/mnist"), tmp_path)
    assert (len(dataset.train), len(dataset.holdout), len(dataset.test)) == (64, 16, 30)
    assert dataset.num_classes == 10
    assert dataset.classes[3] == "3 - three"
    assert not dataset.hflip
    assert dataset.img_size == 48
    assert prepare(DataSpec("torch/mnist"), tmp_path).fingerprint == dataset.fingerprint


def test_splits_are_found_and_limits_hold(tmp_path: Path, serve: Serve) -> None:
    serve(fake)
    dataset = prepare(DataSpec("torch/fake", max_images=30), tmp_path)
    assert len(dataset.train) + len(dataset.holdout) == 30
    assert len(dataset.test) == 60
    assert dataset.classes == ("0", "1", "2")
    assert any("30 of 60 training images" in note for note in dataset.notes)


def test_without_a_test_split_one_is_cut(tmp_path: Path, serve: Serve) -> None:
    def create(split: str) -> Any:
        if split != "train":
            raise ValueError(f"Unknown split {split!r}")
        return fake(split)

    serve(create)
    dataset = prepare(DataSpec("torch/fake"), tmp_path)
    assert (len(dataset.train), len(dataset.holdout), len(dataset.test)) == (38, 10, 12)
    assert any("no split for testing" in note for note in dataset.notes)
    names = [name for side in (dataset.train, dataset.holdout, dataset.test) for name in side.names]
    assert sorted(names) == sorted(f"train[{at}]" for at in range(60))


class Stream(torch.utils.data.IterableDataset[Any]):
    """Images one after the other, as WebDataset gives them."""

    def __init__(self, count: int, breaks_at: int | None = None) -> None:
        self.count, self.breaks_at = count, breaks_at

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        rng = np.random.default_rng(self.count)
        for at in range(self.count):
            if at == self.breaks_at:
                raise OSError("connection reset")
            yield Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)), at % 3


def test_streams_are_read_once_through(tmp_path: Path, serve: Serve) -> None:
    count = {"train": 40, "validation": 12}
    serve(lambda split: Stream(count[split]))
    dataset = prepare(DataSpec("torch/stream"), tmp_path)
    assert (len(dataset.train), len(dataset.holdout), len(dataset.test)) == (32, 8, 12)
    serve(lambda split: Stream(30, 25))
    with pytest.raises(InputError, match="connection reset"):
        prepare(DataSpec("torch/other", img_size=48), tmp_path)


def test_what_cannot_be_opened_is_refused_with_the_remedy(tmp_path: Path, serve: Serve) -> None:
    for prefix, package in (("hfds", "datasets"), ("wds", "webdataset")):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(InputError, match=rf"package {package}; pip install"):
                prepare(DataSpec(f"{prefix}/some/thing"), tmp_path)

    def create(split: str) -> Any:
        raise OSError("no route\nto host")

    with pytest.raises(InputError, match="Unknown torchvision dataset nosuch"):
        prepare(DataSpec("torch/nosuch"), tmp_path)
    serve(create)
    with pytest.raises(InputError, match="no route to host"):
        prepare(DataSpec("torch/cifar100"), tmp_path)
    with pytest.raises(InputError, match="a name after torch/"):
        prepare(DataSpec("torch/"), tmp_path)


@pytest.mark.parametrize(("label", "words"), [(-1, "label -1"), ([1, 0], r"label \[1, 0\]"), (7, "label 7")])
def test_labels_that_are_no_class_are_refused(label: object, words: str, tmp_path: Path, serve: Serve) -> None:
    class Odd(FakeData):
        def __init__(self) -> None:
            super().__init__(20, (3, 40, 40), 3)
            self.classes = ["x", "y", "z"]

        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0], label

    serve(lambda split: Odd())
    with pytest.raises(InputError, match=words):
        prepare(DataSpec("torch/odd", img_size=48), tmp_path)


def test_broken_images_are_counted(tmp_path: Path, serve: Serve) -> None:
    class Holes(FakeData):
        def __getitem__(self, index: int) -> Any:
            if index in (3, 8):
                raise OSError("truncated")
            return super().__getitem__(index)

    def create(split: str) -> Any:
        offset = 0 if split == "train" else 999
        return Holes(40, (3, 40, 40), 2, random_offset=offset)

    serve(create)
    dataset = prepare(DataSpec("torch/holes", max_corrupt=0.1, img_size=48), tmp_path)
    assert dataset.broken == ("train[3]", "train[8]", "test[3]", "test[8]")
