"""The label store: built once, kept whole, refused when anything does not fit."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nas.distill.store as module
from nas.data import Dataset, DataSpec, prepare
from nas.distill.augment import AugmentSpec, augmentation_code, default_spec, eval_batch
from nas.distill.labels import Labels, index_type, packed_keys, top_labels
from nas.distill.store import StoreSpec, build_store, default_topk, open_store, store_id
from space.errors import InputError

Teacher = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = DataSpec("digits", img_size=16, proxy_images=120)
    return prepare(spec, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    weights = torch.randn(3 * 16 * 16, 10, generator=torch.Generator().manual_seed(1)) * 0.2
    return lambda inputs: inputs.flatten(1) @ weights


def spec_of(dataset: Dataset, epochs: int = 2) -> StoreSpec:
    return StoreSpec(
        epochs=epochs,
        topk=4,
        augment=default_spec(dataset),
        salt=0,
        dataset_fingerprint=dataset.fingerprint,
        teacher_id="toy",
        teacher_hash="abc",
        num_classes=10,
        threads=1,
    )


class Counting:
    """A teacher that notes how many images it was asked, and dies when its patience ends."""

    def __init__(self, teacher: Teacher, patience: int = 1000) -> None:
        self.teacher, self.patience = teacher, patience
        self.asked: list[int] = []

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(self.asked) == self.patience:
            raise KeyboardInterrupt
        self.asked.append(len(inputs))
        return self.teacher(inputs)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_store_says_what_the_teacher_said_of_the_very_inputs(
    dataset: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    from nas.distill.augment import Augmenter

    spec = spec_of(dataset)
    ticks: list[float] = []
    store = open_store(build_store(tmp_path, spec, dataset, teacher, 32, ticks.append), spec)
    assert sum(ticks) == 2 * len(dataset.train) + len(dataset.holdout)
    assert store.spec == spec
    augmenter = Augmenter(spec.augment)
    for epoch in (0, 1):
        labels = store.epoch(epoch)
        codes = [augmentation_code(key, epoch, 0) for key in dataset.train.keys]
        assert labels.codes.tolist() == codes
        inputs = augmenter.batch(dataset.train.pixels, codes)
        check(labels, teacher(inputs), dataset.train.keys)
    check(store.holdout(), teacher(eval_batch(dataset.holdout.pixels, spec.augment)),
          dataset.holdout.keys)  # fmt: skip


def check(labels: Labels, logits: torch.Tensor, keys: tuple[str, ...]) -> None:
    want = torch.softmax(logits.double(), 1)
    prob, index = want.topk(4, dim=1)
    rows = labels.rows(keys)
    assert np.array_equal(labels.index[rows], index.numpy())
    assert np.allclose(labels.prob[rows], prob.numpy(), atol=1e-5)
    total = labels.prob[rows].sum(1, dtype=np.float64) + labels.tail[rows]
    assert np.allclose(total, 1, atol=1e-6)
    assert labels.tail.min() >= 0
    assert labels.prob.dtype == labels.tail.dtype == np.float32
    assert labels.index.dtype == np.uint8
    assert (labels.rows(("0" * 32, "f" * 32)) == -1).all()


def test_growing_a_store_changes_no_piece_and_equals_building_at_once(
    dataset: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    small, large = spec_of(dataset, 1), spec_of(dataset, 3)
    assert store_id(small) == store_id(large)
    folder = build_store(tmp_path / "grown", small, dataset, teacher, 32)
    before = files(folder)
    assert build_store(tmp_path / "grown", large, dataset, teacher, 50) == folder
    after = files(folder)
    for name in ("epoch-0000.safetensors", "holdout.safetensors"):
        assert after[name] == before[name]
    once = build_store(tmp_path / "once", large, dataset, teacher, 1000)
    assert files(once) == after, "the batch size changes no label"
    assert open_store(folder, small).epochs == 3, "more epochs than asked for are welcome"
    first = open_store(folder, None).digest
    build_store(tmp_path / "grown", large, dataset, teacher, 32)
    assert open_store(folder, None).digest == first
    with pytest.raises(InputError, match=r"3 epochs, want 4 epochs"):
        open_store(folder, spec_of(dataset, 4))


def test_a_build_killed_at_any_batch_ends_in_the_same_bytes(
    dataset: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    spec = spec_of(dataset)
    whole = files(build_store(tmp_path / "whole", spec, dataset, teacher, 32))
    calls = 2 * 2 + 1
    for kill_at in range(calls):
        root = tmp_path / f"killed{kill_at}"
        with pytest.raises(KeyboardInterrupt):
            build_store(root, spec, dataset, Counting(teacher, kill_at), 32)
        with pytest.raises(InputError):
            open_store(root / store_id(spec), spec)
        (root / store_id(spec) / ".epoch-0001.safetensors.x.tmp").write_bytes(b"half a piece")
        counting = Counting(teacher)
        folder = build_store(root, spec, dataset, counting, 32)
        assert files(folder) == whole
        if kill_at >= 3:
            assert len(counting.asked) == 2, "finished pieces are not made again"


def test_two_builders_make_every_piece_once(
    dataset: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    spec, counting = spec_of(dataset), Counting(teacher)

    def build() -> None:
        build_store(tmp_path, spec, dataset, counting, 32)

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counting.asked) == 2 * len(dataset.train) + len(dataset.holdout)
    open_store(tmp_path / store_id(spec), spec)


def test_every_mismatch_is_refused_naming_both_sides(
    dataset: Dataset, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(dataset)
    folder = build_store(tmp_path, spec, dataset, teacher, 32)
    changes: list[tuple[dict[str, object], str, str]] = [
        ({"topk": 5}, "topk 4", "topk 5"),
        ({"salt": 7}, "salt 0", "salt 7"),
        ({"dataset_fingerprint": "ffff"}, dataset.fingerprint, "ffff"),
        ({"teacher_id": "resnet"}, "toy", "resnet"),
        ({"teacher_hash": "def"}, "abc", "def"),
        ({"num_classes": 11}, "num_classes 10", "num_classes 11"),
        ({"threads": 2}, "threads 1", "threads 2"),
        ({"augment": replace(spec.augment, hflip=0.5)}, "'hflip': 0.0", "'hflip': 0.5"),
    ]
    for change, have, want in changes:
        other = replace(spec, **change)  # type: ignore[arg-type]
        assert store_id(other) != store_id(spec), "the driver builds another store"
        with pytest.raises(InputError) as caught:
            open_store(folder, other)
        assert have in str(caught.value)
        assert want in str(caught.value)
        assert "\n" not in str(caught.value)
    versions = {**module.library_versions(), "pillow": "9.9"}
    monkeypatch.setattr(module, "library_versions", lambda: versions)
    with pytest.raises(InputError, match=r"pillow.*want libraries \{'pillow': '9\.9'\}"):
        open_store(folder, spec)
    assert open_store(folder, None).spec == spec, "without an expectation anything can be read"


def test_every_flipped_bit_and_every_cut_is_found(
    dataset: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    spec = spec_of(dataset, 1)
    folder = build_store(tmp_path, spec, dataset, teacher, 32)
    rng = np.random.default_rng(0)
    for name, good in files(folder).items():
        for at in rng.integers(0, len(good), 20):
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(0, 8))
            (folder / name).write_bytes(bytes(bad))
            with pytest.raises(InputError):
                open_store(folder, None)
        (folder / name).write_bytes(good[: int(rng.integers(0, len(good)))])
        with pytest.raises(InputError):
            open_store(folder, None)
        (folder / name).unlink()
        with pytest.raises(InputError):
            open_store(folder, None)
        (folder / name).write_bytes(good)
    open_store(folder, spec)
    with pytest.raises(InputError, match="a folder made by this toolkit"):
        open_store(tmp_path / "nowhere", spec)


@pytest.mark.parametrize(
    ("classes", "kind"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16),
                          (65537, np.int32), (100_000, np.int32)]
)  # fmt: skip
def test_index_width_follows_the_class_count(classes: int, kind: type) -> None:
    assert index_type(classes) is kind
    assert np.iinfo(kind).max >= classes - 1
    assert default_topk(classes) == min(10, classes - 1)


def test_tails_are_never_negative_and_parts_sum_to_one() -> None:
    gen = torch.Generator().manual_seed(0)
    for classes, topk in ((2, 1), (10, 9), (1000, 10), (21841, 100)):
        for spread in (0.1, 3.0, 40.0, 400.0):
            logits = torch.randn(8, classes, generator=gen) * spread
            index, prob, tail = top_labels(logits, topk)
            assert tail.min() >= 0
            assert np.allclose(prob.sum(1, dtype=np.float64) + tail, 1, atol=1e-6)
            assert index.max() < classes
            assert (np.diff(prob, axis=1) <= 0).all()
    half = torch.randn(4, 100, generator=gen).half()
    assert np.array_equal(top_labels(half, 5)[1], top_labels(half.float(), 5)[1])
    with pytest.raises(InputError, match="not finite"):
        top_labels(torch.tensor([[0.0, float("nan")]]), 1)


def test_packed_keys_sort_like_their_hex() -> None:
    rng = np.random.default_rng(0)
    keys = [rng.bytes(16).hex() for _ in range(300)]
    keys += ["00" * 16, "ff" * 16, "00" * 15 + "01", "01" + "00" * 15]
    order = np.argsort(packed_keys(tuple(keys)), kind="stable")
    assert [keys[at] for at in order] == sorted(keys)


def test_impossible_stores_are_refused(dataset: Dataset, teacher: Teacher, tmp_path: Path) -> None:
    for change in ({"topk": 10}, {"topk": 0}, {"epochs": 0}):
        with pytest.raises(InputError):
            replace(spec_of(dataset), **change)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="a folder with room to write"):
        build_store(tmp_path / "file", spec_of(dataset), dataset, teacher, 32)
    assert isinstance(spec_of(dataset).augment, AugmentSpec)
    shutil.rmtree(tmp_path, ignore_errors=True)
