"""The label store: the teacher's words, whole or refused, the same however it is made."""

from __future__ import annotations

import itertools
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
from nas.data.augment.spec import Augmenter, augmentation_code, eval_batch
from nas.labels import build as build_module
from nas.labels import shards as pieces_module
from nas.labels import store_spec as spec_module
from nas.labels.build import all_pieces, build_pieces, merge_stores, need
from nas.labels.keys import StoredKeys, find_rows, hex_keys, keys_digest, raw_keys, sorted_planes
from nas.labels.shards import piece_records, pieces_of
from nas.labels.soft_labels import index_type, top_labels
from nas.labels.store import open_store, read_manifest
from nas.labels.store_spec import TEACHER_BATCH, default_topk
from nas.labels.verify import ask_teacher, problems
from space.errors import InputError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = DataSpec("digits", img_size=16, proxy_images=420)
    return prepare(spec, tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "MIN_RECORDS", 64)


def test_labels_are_what_the_teacher_says_of_the_replayed_inputs(
    dataset: Dataset, tmp_path: Path
) -> None:
    store = built(tmp_path / "s", dataset, codec="plain", topk=4)
    split, toy = dataset.train, toy_for(dataset)
    assert hex_keys(store.keys.raw(slice(None))) == sorted(split.keys)
    for epoch in range(2):
        at = store.keys.rows(raw_keys(split.keys))
        codes = store.codes(epoch, at)
        assert codes.tolist() == [augmentation_code(key, epoch, 0) for key in split.keys]
        inputs = Augmenter(store.spec.augment).batch(split.pixels[:], codes.tolist())
        want = top_labels(toy(inputs), 4)
        found = store.epoch(epoch)[at]
        assert np.array_equal(found.index, want.index)
        assert np.allclose(found.prob, want.prob, atol=1e-6)  # another batch, other last bits
        assert np.allclose(found.tail, want.tail, atol=1e-6)
    holdout = store.holdout()[store.holdout_keys.rows(raw_keys(dataset.holdout.keys))]
    want = top_labels(toy(eval_batch(dataset.holdout.pixels[:], store.spec.augment)), 4)
    assert np.array_equal(holdout.index, want.index)
    assert np.allclose(holdout.prob, want.prob, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_parts_in_any_order_make_the_same_bytes(
    dataset: Dataset, tmp_path: Path, parts: int, mixup: float
) -> None:
    changes = {"mixup_alpha": mixup, "cutmix_alpha": mixup}
    whole = built(tmp_path / "whole", dataset, changes=changes)
    assert len(all_pieces(whole)) >= 9
    store = begun(tmp_path / "parts", dataset, changes=changes)
    for at in reversed(range(1, parts + 1)):
        build_pieces(store, dataset, toy_for(dataset), part=(at, parts), batch_size=200)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert list(problems(tmp_path / "parts")) == []


def test_machines_that_share_nothing_merge(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "whole", dataset)
    for at in (1, 2):
        part = begun(tmp_path / f"m{at}", dataset)
        build_pieces(part, dataset, toy_for(dataset), part=(at, 2))
        assert any("is missing" in line for line in problems(tmp_path / f"m{at}"))
        with pytest.raises(InputError, match="no piece"):
            open_store(tmp_path / f"m{at}")
    half = merge_stores(tmp_path / "all", [tmp_path / "m1"])
    assert need(half).pieces > 0
    merged = merge_stores(tmp_path / "all", [tmp_path / "m2", tmp_path / "m1"])
    assert need(merged).pieces == 0
    assert contents(tmp_path / "all") == contents(tmp_path / "whole")
    begun(tmp_path / "other", dataset, salt=5)
    with pytest.raises(InputError, match="salt 0, want salt 5"):
        merge_stores(tmp_path / "all", [tmp_path / "other"])
    spoilt = tmp_path / "m1" / "epoch-0000" / "00000.bin"
    victim = next(p for p in (tmp_path / "m1").rglob("*.bin") if p.parent.name.startswith("epoch"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="as they were written"):
        merge_stores(tmp_path / "new", [tmp_path / "m1"])
    assert spoilt.parent.exists()


def test_an_interrupted_build_goes_on_without_redoing_finished_pieces(
    dataset: Dataset, tmp_path: Path
) -> None:
    built(tmp_path / "whole", dataset)
    total = len(dataset.train) * 2 + len(dataset.holdout)
    store = begun(tmp_path / "s", dataset)
    shown = 0
    for stop in (1, 70, 130, 200):
        toy = toy_for(dataset, fail_after=stop)
        with pytest.raises(KeyboardInterrupt):
            build_pieces(store, dataset, toy)
        shown += toy.images
    toy = toy_for(dataset)
    ticks: list[float] = []
    build_pieces(store, dataset, toy, tick=ticks.append)
    assert sum(ticks) == total
    assert shown + toy.images <= total + 4 * store.piece_records, "a piece at most is lost a kill"
    assert toy.images < total
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    again = toy_for(dataset)
    build_pieces(store, dataset, again)
    assert again.images == 0


def test_a_store_grows_by_epochs_and_keeps_what_it_has(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "s", dataset, epochs=1)
    before = contents(tmp_path / "s")
    grown = built(tmp_path / "s", dataset, epochs=3)
    after = contents(tmp_path / "s")
    assert grown.epochs == 3
    assert {k: v for k, v in after.items() if k in before and k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }
    assert built(tmp_path / "s", dataset, epochs=2).epochs == 3, "asking for less takes nothing"
    assert after == contents(tmp_path / "s")
    assert grown.id == read_manifest(tmp_path / "s")["id"]
    built(tmp_path / "fresh", dataset, epochs=3)
    assert contents(tmp_path / "fresh") == after


CHANGES: list[tuple[dict[str, Any], str, str]] = [
    ({"topk": 4}, "topk 3", "topk 4"),
    ({"salt": 7}, "salt 0", "salt 7"),
    ({"codec": "plain"}, "codec packed", "codec plain"),
    ({"threads": 2}, "threads 1", "threads 2"),
    ({"limit": 100}, "train_images 3", "train_images 100"),
    ({"changes": {"erase_prob": 0.5}}, "'erase_prob': 0.0", "'erase_prob': 0.5"),
    ({"changes": {"mixup_alpha": 0.5}}, "'mixup_alpha': 0.0", "'mixup_alpha': 0.5"),
    ({"classes": 12}, "num_classes 10", "num_classes 12"),
]


@pytest.mark.parametrize(("change", "have", "want"), CHANGES)
def test_every_mismatch_names_both_sides(
    dataset: Dataset, tmp_path: Path, change: dict[str, Any], have: str, want: str
) -> None:
    begun(tmp_path / "s", dataset)
    before = contents(tmp_path / "s")
    with pytest.raises(InputError) as caught:
        begun(tmp_path / "s", dataset, **change)
    assert have in str(caught.value)
    assert want in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "s") == before


def test_a_use_must_fit_in_all_that_makes_inputs_and_labels_right(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = built(tmp_path / "s", dataset)
    open_store(tmp_path / "s", expect=store.spec, use=dataset, epochs=2)
    for change, have, want in (
        ({"preparation": "x"}, f"preparation {dataset.preparation}", "preparation x"),
        ({"img_size": 20}, "resolution 16", "resolution 20"),
        ({"classes": tuple("abc")}, "num_classes 10", "num_classes 3"),
        ({"mean": (0.0, 0.0, 0.0)}, "mean [0.485", "mean [0.0"),
    ):
        other: Dataset = replace(dataset, **change)  # type: ignore[arg-type]
        with pytest.raises(InputError) as caught:
            open_store(tmp_path / "s", use=other)
        assert have in str(caught.value)
        assert want in str(caught.value)
    with pytest.raises(InputError, match="2 epochs, want 5 epochs"):
        open_store(tmp_path / "s", epochs=5)
    for change in ({"teacher_hash": "other"}, {"teacher_id": "x"}, {"train_keys": "0" * 32}):
        with pytest.raises(InputError, match=f"{next(iter(change))} "):
            open_store(tmp_path / "s", expect=replace(store.spec, **change))
    versions = {**spec_module.library_versions(), "pillow": "9.9"}
    monkeypatch.setattr(spec_module, "library_versions", lambda: versions)
    with pytest.raises(InputError, match=r"pillow.*want libraries \{'pillow': '9\.9'\}"):
        open_store(tmp_path / "s", use=dataset)
    assert open_store(tmp_path / "s").spec == store.spec, "without a use anything can be read"


def damage(folder: Path, rng: np.random.Generator, times: int) -> None:
    """Flip bits and cut files one after another; each must be found, and be found to be mended."""
    good = contents(folder)
    names = sorted(good)
    for turn in range(times):
        name = names[turn % len(names)]
        data = bytearray(good[name])
        if turn % 5 == 4:
            data = data[: int(rng.integers(0, len(data)))]
        else:
            data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        (folder / name).write_bytes(bytes(data))
        lines = list(problems(folder))
        assert lines, (name, turn)
        assert all("\n" not in line for line in lines)
        (folder / name).write_bytes(good[name])
    assert list(problems(folder)) == []


def test_every_flipped_bit_and_every_cut_is_found(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "s", dataset, epochs=1)
    damage(tmp_path / "s", np.random.default_rng(0), 150)


@pytest.mark.slow
def test_a_thousand_flips_and_cuts_are_found(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "s", dataset, epochs=2)
    damage(tmp_path / "s", np.random.default_rng(1), 1000)


def test_damage_is_found_where_it_is_read_too(dataset: Dataset, tmp_path: Path) -> None:
    store = built(tmp_path / "s", dataset)
    path = tmp_path / "s" / "epoch-0001" / "00001.bin"
    good = path.read_bytes()
    for at in (0, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 4
        path.write_bytes(bytes(bad))
        store.epoch(0)
        with pytest.raises(InputError, match=r"epoch-0001/00001.bin"):
            store.epoch(1)
    path.write_bytes(good)
    store.epoch(1)


def test_missing_stale_and_foreign_files_are_named(dataset: Dataset, tmp_path: Path) -> None:
    built(tmp_path / "s", dataset)
    built(tmp_path / "other", dataset, salt=3)
    first, second = (tmp_path / "s" / "epoch-0000" / f"0000{n}.bin" for n in (0, 1))
    keep = first.read_bytes()
    shutil.copy(tmp_path / "other" / "epoch-0000" / "00000.bin", first)
    assert [x for x in problems(tmp_path / "s") if "stale piece of the store" in x]
    first.write_bytes(second.read_bytes())
    assert [x for x in problems(tmp_path / "s") if "is the piece of epoch 0, number 1" in x]
    first.write_bytes((tmp_path / "s" / "epoch-0001" / "00000.bin").read_bytes())
    assert [x for x in problems(tmp_path / "s") if "is the piece of epoch 1" in x]
    first.unlink()
    assert list(problems(tmp_path / "s")) == ["epoch-0000/00000.bin: is missing"]
    with pytest.raises(InputError, match="no piece epoch-0000/00000"):
        open_store(tmp_path / "s")
    first.write_bytes(keep)
    (tmp_path / "s" / "epoch-0000" / "00099.bin").write_bytes(keep)
    assert list(problems(tmp_path / "s")) == ["epoch-0000/00099.bin: is no piece of this store"]
    with pytest.raises(InputError, match="a folder made by this toolkit"):
        open_store(tmp_path / "nowhere")


def test_a_teacher_that_says_something_else_is_found(dataset: Dataset, tmp_path: Path) -> None:
    for codec in ("plain", "packed"):
        store = built(tmp_path / codec, dataset, codec=codec, changes={"cutmix_alpha": 1.0})
        toy = toy_for(dataset)
        found = ask_teacher(store, dataset, toy, 50, 0)
        assert found.good
        assert 30 <= found.records <= 50
        toy.weights = toy.weights + 0.02 * torch.randn(toy.weights.shape)
        assert not ask_teacher(store, dataset, toy, 50, 0).good


def test_what_will_not_fit_is_refused_before_it_begins(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(tmp_path / "s", dataset)
    usage = shutil.disk_usage(tmp_path)._replace(free=70_000_000)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: usage)
    toy = toy_for(dataset)
    build_pieces(store, dataset, toy, part=(1, 9))
    usage = usage._replace(free=60_000_000)
    with pytest.raises(InputError, match=r"0.06 GB free on its disk, want 0.07 GB"):
        build_pieces(store, dataset, toy)


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
            build_pieces(store, dataset, toy_for(dataset))
    assert len(list((tmp_path / "s").rglob("*.bin"))) == 3 + 2  # pieces, and the tables of keys
    build_pieces(store, dataset, toy_for(dataset))
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_need_counts_every_byte(dataset: Dataset, tmp_path: Path) -> None:
    store = begun(tmp_path / "s", dataset)
    before = need(store)
    build_pieces(store, dataset, toy_for(dataset))
    made = contents(tmp_path / "s")
    size = sum(len(data) for name, data in made.items() if name.count("/"))
    assert before.bytes == size
    assert before.total_bytes == sum(
        len(data) for name, data in made.items() if name != "manifest.json"
    )
    assert before.records == 2 * len(dataset.train) + len(dataset.holdout)
    assert need(store).bytes == 0


def test_impossible_requests_are_refused_and_leave_nothing(
    dataset: Dataset, tmp_path: Path
) -> None:
    bad: list[dict[str, Any]] = [
        {"topk": 10},
        {"topk": 0},
        {"epochs": 0},
        {"codec": "zip"},
        {"preset": "2k"},
        {"limit": 1},
        {"clean": 2.0},
        {"changes": {"mixup": 1.0}},
        {"precision": "float16"},
        {"changes": {"mixup_alpha": -1.0}},
        {"changes": {"policy": "no-such-policy"}},
    ]
    for request in bad:
        with pytest.raises(InputError) as caught:
            begun(tmp_path / "s", dataset, **request)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "s").exists(), request
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="a folder with room to write"):
        begun(tmp_path / "file", dataset)
    for part in ((0, 2), (3, 2)):
        with pytest.raises(InputError, match="--part"):
            build_pieces(begun(tmp_path / "t", dataset), dataset, toy_for(dataset), part=part)


def test_images_that_left_while_building_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    store = begun(tmp_path / "s", dataset)
    split = dataset.train
    fewer = Split(split.keys[3:], split.labels[3:], split.pixels[3:])
    with pytest.raises(InputError, match="3 images that are not in the data"):
        build_pieces(store, replace(dataset, train=fewer), toy_for(dataset))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 40_000_000))
def test_pieces_cover_an_epoch_and_never_share_a_teachers_batch(images: int) -> None:
    size = piece_records(images)
    assert size % TEACHER_BATCH == 0
    assert 64 <= size <= 65_536
    pieces = pieces_of(0, images, size)
    assert [p.start for p in pieces] == list(range(0, images, size))
    assert sum(p.count for p in pieces) == images
    assert len({p.name for p in pieces}) == len(pieces)


def test_stored_keys_are_found_whatever_they_share(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (500, 16), dtype=np.uint8)
    raw[100:200, :8] = raw[0, :8]  # the first half in common
    raw[200:210] = 0
    raw[200:210, 15] = np.arange(10)
    raw[210:214] = 255
    raw[210:214, 15] -= np.arange(4, dtype=np.uint8)
    raw = np.unique(raw, axis=0)
    keys = StoredKeys(sorted_planes(raw[rng.permutation(len(raw))]))
    assert hex_keys(keys.raw(slice(None))) == sorted(hex_keys(raw))
    some = rng.permutation(len(raw))[:200]
    assert np.array_equal(keys.raw(keys.rows(raw[some])), raw[some])
    strange = raw.copy()
    strange[:, 14] ^= 1
    known = set(hex_keys(raw))
    for row, key in zip(keys.rows(strange), hex_keys(strange), strict=True):
        assert (row >= 0) == (key in known)
    shuffled = raw[rng.permutation(len(raw))]
    assert np.array_equal(shuffled[find_rows(shuffled, raw[some])], raw[some])
    assert keys_digest(sorted_planes(raw)) == keys_digest(sorted_planes(shuffled))
    assert StoredKeys(sorted_planes(raw[:0])).rows(raw[:3]).tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("classes", "kind"),
    [
        (2, np.uint8),
        (256, np.uint8),
        (257, np.uint16),
        (65536, np.uint16),
        (65537, np.int32),
        (100_000, np.int32),
    ],
)
def test_index_width_follows_the_class_count(classes: int, kind: type) -> None:
    assert index_type(classes) is kind
    assert np.iinfo(kind).max >= classes - 1
    assert default_topk(classes) == min(100 if classes > 10_000 else 10, classes - 1)


def test_tails_are_never_negative_and_parts_sum_to_one() -> None:
    gen = torch.Generator().manual_seed(0)
    for classes, topk in ((2, 1), (10, 9), (1000, 10), (21841, 100)):
        for spread in (0.1, 3.0, 40.0, 400.0):
            logits = torch.randn(8, classes, generator=gen) * spread
            said = top_labels(logits, topk)
            assert said.tail.min() >= 0
            assert np.allclose(said.prob.sum(1, dtype=np.float64) + said.tail, 1, atol=1e-6)
            assert said.index.max() < classes
            assert (np.diff(said.prob, axis=1) <= 0).all()
            for fewer, keep in itertools.product((said,), {1, topk // 2 or 1, topk}):
                less = fewer.best(keep)
                want = top_labels(logits, keep)
                assert np.array_equal(np.sort(less.prob), np.sort(want.prob))
                assert np.allclose(less.tail, want.tail, atol=1e-6)
    half = torch.randn(4, 100, generator=gen).half()
    assert np.array_equal(top_labels(half, 5).prob, top_labels(half.float(), 5).prob)
    with pytest.raises(InputError, match="not finite"):
        top_labels(torch.tensor([[0.0, float("nan")]]), 1)
