"""The label store: the teacher's labels, whole or refused, the same however it is built."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import begun, built, contents, toy_for

from nas.data import Dataset, DataSpec, Split, prepare
from nas.data.augment.spec import augmentation_code
from nas.data.augment.timm_engine import TimmAugmenter, eval_batch
from nas.labels import build as build_module
from nas.labels import store as store_module
from nas.labels.build import build_shards, build_status, merge_stores
from nas.labels.codec import top_labels
from nas.labels.request import default_topk
from nas.labels.store import TEACHER_BATCH, find_rows, key_array, key_bytes, open_store, records_per_shard, shards_of
from nas.labels.verify import compare_with_teacher, find_problems
from space.errors import InputError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = DataSpec("digits", img_size=16, max_images=420)
    return prepare(spec, tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MIN_RECORDS", 64)


def test_labels_are_the_teachers_of_the_augmented_inputs(dataset: Dataset, tmp_path: Path) -> None:
    store = built(tmp_path / "s", dataset, codec="plain", topk=4)
    split, toy = dataset.train, toy_for(dataset)
    assert [row.tobytes().hex() for row in key_bytes(store.keys)] == sorted(split.keys)
    at = find_rows(store.keys, key_array(split.keys))
    held_out = find_rows(store.holdout_keys, key_array(dataset.holdout.keys))
    cases = [(store.holdout()[held_out], eval_batch(dataset.holdout.pixels[:], store.spec.augment))]
    for epoch in range(2):
        codes = store.codes(epoch, at)
        assert codes.tolist() == [augmentation_code(key, epoch, 0) for key in split.keys]
        inputs = TimmAugmenter(store.spec.augment).batch(split.pixels[:], codes.tolist())
        cases.append((store.epoch(epoch)[at], inputs))
    for found, inputs in cases:
        want = top_labels(toy(inputs), 4)
        assert np.array_equal(found.index, want.index)
        assert np.allclose(found.prob, want.prob, atol=1e-6)  # another batch, other last bits
        assert np.allclose(found.tail, want.tail, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_parts_in_any_order_make_the_same_bytes(dataset: Dataset, tmp_path: Path, parts: int, mixup: float) -> None:
    changes = {"mixup": mixup, "cutmix": mixup}
    whole = built(tmp_path / "whole", dataset, **changes)
    assert len(whole.all_shards()) >= 9
    store = begun(tmp_path / "parts", dataset, **changes)
    for at in reversed(range(1, parts + 1)):
        build_shards(store, dataset, toy_for(dataset), part=(at, parts))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert list(find_problems(tmp_path / "parts")) == []


def test_machines_that_share_nothing_merge(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "whole", dataset)
    for at in (1, 2):
        part = begun(tmp_path / f"m{at}", dataset)
        build_shards(part, dataset, toy_for(dataset), part=(at, 2))
        assert any("is missing" in line for line in find_problems(tmp_path / f"m{at}"))
        with pytest.raises(InputError, match="no shard"):
            open_store(tmp_path / f"m{at}")
    half = merge_stores(tmp_path / "all", [tmp_path / "m1"])
    assert build_status(half).shards > 0
    merged = merge_stores(tmp_path / "all", [tmp_path / "m2", tmp_path / "m1"])
    assert build_status(merged).shards == 0
    assert contents(tmp_path / "all") == contents(tmp_path / "whole")
    begun(tmp_path / "other", dataset, salt=5)
    with pytest.raises(InputError, match="salt 0, want salt 5"):
        merge_stores(tmp_path / "all", [tmp_path / "other"])
    victim = next((tmp_path / "m1").glob("epoch-*/*.bin"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="as they were written"):
        merge_stores(tmp_path / "new", [tmp_path / "m1"])


def test_an_interrupted_build_goes_on_without_redoing_finished_shards(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "whole", dataset)
    total = len(dataset.train) * 2 + len(dataset.holdout)
    store = begun(tmp_path / "s", dataset)
    shown = 0
    for stop in (1, 70, 130, 200):
        toy = toy_for(dataset, fail_after=stop)
        with pytest.raises(KeyboardInterrupt):
            build_shards(store, dataset, toy)
        shown += toy.images
    toy = toy_for(dataset)
    ticks: list[float] = []
    build_shards(store, dataset, toy, tick=ticks.append)
    assert sum(ticks) == total
    assert shown + toy.images <= total + 4 * store.shard_records, "a shard at most is lost a kill"
    assert toy.images < total
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    again = toy_for(dataset)
    build_shards(store, dataset, again)
    assert again.images == 0


def test_a_store_grows_by_epochs_and_keeps_what_it_has(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "s", dataset, epochs=1)
    before = contents(tmp_path / "s")
    grown = built(tmp_path / "s", dataset, epochs=3)
    after = contents(tmp_path / "s")
    assert grown.epochs == 3
    assert all(after[k] == v for k, v in before.items() if k != "manifest.json")
    assert built(tmp_path / "s", dataset, epochs=2).epochs == 3, "asking for less takes nothing"
    assert after == contents(tmp_path / "s")
    built(tmp_path / "fresh", dataset, epochs=3)
    assert contents(tmp_path / "fresh") == after


CHANGES: list[tuple[dict[str, Any], str, str]] = [
    ({"topk": 4}, "topk 3", "topk 4"),
    ({"salt": 7}, "salt 0", "salt 7"),
    ({"codec": "plain"}, "codec packed", "codec plain"),
    ({"threads": 2}, "threads 1", "threads 2"),
    ({"limit": 100}, "train_images 3", "train_images 100"),
    ({"erase_prob": 0.5}, "'erase_prob': 0.0", "'erase_prob': 0.5"),
    ({"mixup": 0.5}, "'mixup_alpha': 0.0", "'mixup_alpha': 0.5"),
    ({"classes": 12}, "classes 10", "classes 12, number 10 '10'"),
]


def test_every_mismatch_names_both_sides(dataset: Dataset, tmp_path: Path) -> None:
    begun(tmp_path / "s", dataset)
    before = contents(tmp_path / "s")
    for change, have, want in CHANGES:
        with pytest.raises(InputError, match=f"{re.escape(have)}.*{re.escape(want)}"):
            begun(tmp_path / "s", dataset, **change)
        assert contents(tmp_path / "s") == before


def test_a_use_must_fit_in_all_that_makes_inputs_and_labels_right(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = built(tmp_path / "s", dataset)
    open_store(tmp_path / "s", use=dataset, epochs=2)
    for change, have, want in (
        ({"preparation": "x"}, f"preparation {dataset.preparation}", "preparation x"),
        ({"img_size": 20}, "resolution 16", "resolution 20"),
        ({"classes": tuple("abc")}, "10 classes, class 0 '0'", "3 classes of the data, class 0 'a'"),
        ({"mean": (0.0, 0.0, 0.0)}, "mean [0.485", "mean [0.0"),
    ):
        other: Dataset = replace(dataset, **change)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"{re.escape(have)}.*{re.escape(want)}"):
            open_store(tmp_path / "s", use=other)
    with pytest.raises(InputError, match="2 epochs, want 5 epochs"):
        open_store(tmp_path / "s", epochs=5)
    versions = {**store_module.library_versions(), "pillow": "9.9"}
    monkeypatch.setattr(store_module, "library_versions", lambda: versions)
    with pytest.raises(InputError, match=r"pillow.*want libraries \{'pillow': '9\.9'\}"):
        open_store(tmp_path / "s", use=dataset)
    assert open_store(tmp_path / "s").spec == store.spec, "without a use anything can be read"


@pytest.mark.parametrize("times", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_and_every_cut_is_found(dataset: Dataset, tmp_path: Path, times: int) -> None:
    """In keys and labels; of the manifest, what its schema and its id cover."""
    built(tmp_path / "s", dataset, epochs=1)
    good, rng = contents(tmp_path / "s"), np.random.default_rng(0)
    names = sorted(good.keys() - {"manifest.json"})
    for turn in range(times):
        name = names[turn % len(names)]
        data = bytearray(good[name])
        if turn % 5 == 4:
            data = data[: int(rng.integers(0, len(data)))]
        else:
            data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "s" / name).write_bytes(bytes(data))
        (line,) = find_problems(tmp_path / "s")
        assert name in line
        assert "\n" not in line
        (tmp_path / "s" / name).write_bytes(good[name])
    assert list(find_problems(tmp_path / "s")) == []


def test_damage_is_found_where_it_is_read_too(dataset: Dataset, tmp_path: Path) -> None:
    store = built(tmp_path / "s", dataset)
    path = tmp_path / "s" / "epoch-0001" / "00001.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 4]))
    store.epoch(0)
    with pytest.raises(InputError, match=r"epoch-0001/00001.bin"):
        store.epoch(1)


def test_missing_stale_and_foreign_files_are_named(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    built(folder, dataset)
    built(tmp_path / "other", dataset, salt=3)
    first = folder / "epoch-0000" / "00000.bin"
    keep = first.read_bytes()
    for other in (
        tmp_path / "other" / "epoch-0000" / "00000.bin",
        folder / "epoch-0000" / "00001.bin",
        folder / "epoch-0001" / "00000.bin",
    ):
        first.write_bytes(other.read_bytes())
        (line,) = find_problems(folder)
        assert "epoch-0000/00000.bin: does not fit its checksum" in line
    first.unlink()
    assert list(find_problems(folder)) == ["epoch-0000/00000.bin: is missing"]
    with pytest.raises(InputError, match="no shard epoch-0000/00000"):
        open_store(folder)
    first.write_bytes(keep)
    (folder / "epoch-0000" / "00099.bin").write_bytes(keep)
    assert list(find_problems(folder)) == ["epoch-0000/00099.bin: is no shard of this store"]
    with pytest.raises(InputError, match="a folder made by this toolkit"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize("codec", ["plain", "packed"])
def test_a_teacher_with_other_labels_is_found(dataset: Dataset, tmp_path: Path, codec: str) -> None:
    store = built(tmp_path / codec, dataset, codec=codec, cutmix=1.0)
    toy = toy_for(dataset)
    found = compare_with_teacher(store, dataset, toy, 50, 0)
    assert found.good
    assert found.records == 50
    toy.weights = toy.weights + 0.02 * torch.randn(toy.weights.shape)
    assert not compare_with_teacher(store, dataset, toy, 50, 0).good


def test_what_will_not_fit_is_refused_before_it_begins(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(tmp_path / "s", dataset)
    usage = shutil.disk_usage(tmp_path)._replace(free=70_000_000)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: usage)
    toy = toy_for(dataset)
    build_shards(store, dataset, toy, part=(1, 9))
    usage = usage._replace(free=60_000_000)
    with pytest.raises(InputError, match=r"0.06 GB free on its disk, want 0.07 GB"):
        build_shards(store, dataset, toy)


def test_a_disk_that_fills_up_ends_in_a_line_and_loses_nothing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path / "whole", dataset)
    store = begun(tmp_path / "s", dataset)
    real, left = build_module.write_atomic, [3]

    def full(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_atomic", full)
        with pytest.raises(InputError, match="No space left on device"):
            build_shards(store, dataset, toy_for(dataset))
    assert len(list((tmp_path / "s").rglob("*.bin"))) == 3 + 2  # shards, and the tables of keys
    build_shards(store, dataset, toy_for(dataset))
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_the_status_counts_every_byte(dataset: Dataset, tmp_path: Path) -> None:
    store = begun(tmp_path / "s", dataset)
    before = build_status(store)
    build_shards(store, dataset, toy_for(dataset))
    sizes = {name: len(data) for name, data in contents(tmp_path / "s").items()}
    assert before.bytes == sum(size for name, size in sizes.items() if "/" in name)
    assert before.total_bytes == sum(sizes.values()) - sizes["manifest.json"]
    assert before.records == 2 * len(dataset.train) + len(dataset.holdout)
    assert build_status(store).bytes == 0


def test_impossible_requests_are_refused_and_leave_nothing(dataset: Dataset, tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        *({"topk": 10}, {"topk": 0}, {"epochs": 0}, {"codec": "zip"}, {"augment": "2k"}),
        *({"limit": 1}, {"clean": 2.0}, {"precision": "float16"}, {"mixup": float("inf")}),
        *({"mixup": -1.0}, {"policy": "no-such-policy"}),
    ]
    for request in bad:
        with pytest.raises(InputError):
            begun(tmp_path / "s", dataset, **request)
        assert not (tmp_path / "s").exists(), request
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="a folder with room to write"):
        begun(tmp_path / "file", dataset)
    for part in ((0, 2), (3, 2)):
        with pytest.raises(InputError, match="--part"):
            build_shards(begun(tmp_path / "t", dataset), dataset, toy_for(dataset), part=part)
    split = dataset.train
    fewer = Split(split.keys[3:], split.labels[3:], split.pixels[3:])
    other = replace(dataset, train=fewer)
    store = begun(tmp_path / "t", dataset)
    with pytest.raises(InputError, match="3 images that are not in the data"):
        build_shards(store, other, toy_for(dataset))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 40_000_000))
def test_shards_cover_an_epoch_and_never_share_a_teachers_batch(images: int) -> None:
    size = records_per_shard(images)
    assert size % TEACHER_BATCH == 0
    assert 64 <= size <= 65_536
    shards = shards_of(0, images, size)
    assert [p.start for p in shards] == list(range(0, images, size))
    assert sum(p.count for p in shards) == images
    assert len({p.name for p in shards}) == len(shards)


def test_keys_are_found_whatever_bytes_they_share() -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (500, 16), dtype=np.uint8)
    raw[100:200, :8] = raw[0, :8]
    raw[200:214] = 0  # with zeros at the end, which text types of numpy drop
    raw[200:210, 14] = np.arange(10)
    raw[210:214] = 255
    raw[210:214, 15] -= np.arange(4, dtype=np.uint8)
    raw = np.unique(raw, axis=0)
    hexes = [row.tobytes().hex() for row in raw[rng.permutation(len(raw))]]
    keys = np.sort(key_array(hexes))
    assert [row.tobytes().hex() for row in key_bytes(keys)] == sorted(hexes)
    strange = raw.copy()
    strange[:, 14] ^= 1
    asked = [*hexes[:200], *(row.tobytes().hex() for row in strange)]
    places = {key: place for place, key in enumerate(sorted(hexes))}
    assert find_rows(keys, key_array(asked)).tolist() == [places.get(key, -1) for key in asked]
    assert find_rows(keys[:0], keys[:3]).tolist() == [-1] * 3


def test_tails_are_never_negative_and_parts_sum_to_one() -> None:
    gen = torch.Generator().manual_seed(0)
    for classes, topk in ((2, 1), (10, 9), (1000, 10), (21841, 100)):
        assert default_topk(classes) == min(100 if classes > 10_000 else 10, classes - 1)
        for spread in (0.1, 3.0, 40.0, 400.0):
            logits = torch.randn(8, classes, generator=gen) * spread
            found = top_labels(logits, topk)
            assert found.tail.min() >= 0
            assert np.allclose(found.prob.sum(1, dtype=np.float64) + found.tail, 1, atol=1e-6)
            assert found.index.max() < classes
            assert (np.diff(found.prob, axis=1) <= 0).all()
            for keep in {1, topk // 2 or 1, topk}:
                less, want = found.best(keep), top_labels(logits, keep)
                assert np.array_equal(np.sort(less.prob), np.sort(want.prob))
                assert np.allclose(less.tail, want.tail, atol=1e-6)
    half = torch.randn(4, 100, generator=gen).half()
    assert np.array_equal(top_labels(half, 5).prob, top_labels(half.float(), 5).prob)
    with pytest.raises(InputError, match="not finite"):
        top_labels(torch.tensor([[0.0, float("nan")]]), 1)
