"""Replay: the right label, the very same input, in any order, batch size, subset or process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import built, toy_for

from nas.data import Dataset, DataSpec, Split, prepare
from nas.data.augment import views as views_module
from nas.data.augment.mixing import mix, partners
from nas.data.augment.timm_engine import TimmAugmenter, eval_batch
from nas.data.augment.views import Inputs, make_plan
from nas.labels import store as store_module
from nas.labels.codec import top_labels
from nas.labels.reader import Batch, LabelReader, batch_sizes, epoch_order, holdout_batches
from nas.labels.store import LabelStore, find_rows, key_array
from space.errors import InputError

HARD = {"policy": "rand-m9-mstd0.5-inc1", "erase_prob": 0.3}
MIXED = {**HARD, "mixup": 0.8, "cutmix": 1.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = DataSpec("digits", img_size=16, max_images=150)
    return prepare(spec, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=["alone", "mixed"])
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> LabelStore:
    changes = MIXED if request.param == "mixed" else HARD
    folder = tmp_path_factory.mktemp("stores") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "MIN_RECORDS", 64)
        return built(folder, dataset, **changes, codec="plain")


def replay(dataset: Dataset, store: LabelStore, **changes: object) -> LabelReader:
    options = {"batch_size": 32, "random_seed": 0, **changes}
    return LabelReader(dataset.train, store, **options)  # type: ignore[arg-type]


def part_of(split: Split, rows: np.ndarray) -> Split:
    """A data set from which other images were removed."""
    return Split(tuple(split.keys[int(r)] for r in rows), split.labels[rows], split.pixels[rows])


def by_row(batches: list[Batch]) -> dict[int, tuple[bytes, ...]]:
    found: dict[int, tuple[bytes, ...]] = {}
    for batch in batches:
        for at, row in enumerate(batch.rows.tolist()):
            assert row not in found, "every image once"
            parts = (batch.inputs, batch.index, batch.prob, batch.tail)
            found[row] = tuple(part[at].numpy().tobytes() for part in parts)
    return found


def test_inputs_and_labels_are_what_the_teacher_saw_and_said(dataset: Dataset, store: LabelStore) -> None:
    toy, seen = toy_for(dataset), 0
    for batch in replay(dataset, store).epoch(1):
        want = top_labels(toy(batch.inputs), 3)
        assert np.array_equal(batch.index.numpy(), want.index)
        assert np.allclose(batch.prob.numpy(), want.prob, atol=1e-5)
        assert np.allclose(batch.tail.numpy(), want.tail, atol=1e-5)
        assert np.array_equal(batch.truth.numpy(), dataset.train.labels[batch.rows.numpy()])
        assert batch.index.dtype == torch.int64
        seen += len(batch.rows)
    assert seen == len(dataset.train)


def test_true_classes_are_mixed_as_the_images_are(dataset: Dataset, store: LabelStore) -> None:
    """Trained on classes of a colour each, the mean colour of an input is its target."""
    split, mixes = dataset.train, store.spec.augment.mixes
    given = replay(dataset, store)
    plan = make_plan(store.codes(1), given._table, store.spec.augment)
    for rows in given.batch_rows(1):
        found = given.truth(1, rows)
        if not mixes:
            assert torch.equal(found, torch.from_numpy(np.asarray(split.labels[rows])))
            continue
        colours = np.zeros((len(split), 16, 16, 3), dtype=np.float32)
        assert (found.dtype, found.shape) == (torch.float32, (len(rows), 10))
        assert torch.allclose(found.sum(1), torch.ones(len(rows)))
        recipe = plan.of(given._at[rows])
        assert recipe.partner_rows is not None
        assert recipe.partner_codes is not None
        for kind in range(10):
            colours[:] = (split.labels == kind)[:, None, None, None]
            views = torch.from_numpy(colours[recipe.rows]).permute(0, 3, 1, 2)
            theirs = torch.from_numpy(colours[recipe.partner_rows]).permute(0, 3, 1, 2)
            at = np.flatnonzero(recipe.partner_rows >= 0)
            views[at] = mix(
                views[at], theirs[at], recipe.codes[at].tolist(), recipe.partner_codes[at].tolist(), store.spec.augment
            )
            assert torch.allclose(views.mean((1, 2, 3)), found[:, kind], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["mixed"], indirect=True)
def test_loader_workers_change_nothing(dataset: Dataset, store: LabelStore) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    here = list(replay(dataset, store).epoch(0))
    there = list(replay(dataset, store, workers=2).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert [b.rows.tolist() for b in here] == [b.rows.tolist() for b in there]
    assert by_row(here) == by_row(there)


def test_batch_size_seed_and_subset_change_no_input(dataset: Dataset, store: LabelStore) -> None:
    want = by_row(list(replay(dataset, store).epoch(0)))
    for batch_size in (2, 7, 119, 500):
        assert by_row(list(replay(dataset, store, batch_size=batch_size).epoch(0))) == want
    assert by_row(list(replay(dataset, store, random_seed=9).epoch(0))) == want
    rng = np.random.default_rng(0)
    for share in (0.1, 0.99):
        rows = rng.permutation(len(want))[: round(share * len(want))].tolist()
        part = by_row(list(replay(dataset, store, subset=rows).epoch(0)))
        assert part == {row: want[row] for row in rows}


def test_images_that_were_removed_or_reordered_change_no_other(dataset: Dataset, store: LabelStore) -> None:
    whole = replay(dataset, store)
    want = by_row(list(whole.epoch(0)))
    rng = np.random.default_rng(2)
    n = len(dataset.train)
    for share in (0.5, 0.9, 0.99, 1.0):
        rows = rng.permutation(n)[: round(share * n)]
        less = LabelReader(part_of(dataset.train, rows), store, 8, 0)
        found = {int(rows[at]): parts for at, parts in by_row(list(less.epoch(0))).items()}
        assert found == {row: want[row] for row in found}
        skipped = less.skipped(0)
        assert len(found) + len(skipped) == len(rows)
        if not store.spec.augment.mixes:
            assert not skipped
            continue
        # An image is skipped if and only if its partner left.
        table = find_rows(store.keys, key_array(dataset.train.keys))
        other = partners(store.codes(0))
        row_of = {int(at): row for row, at in enumerate(table)}
        kept = set(rows.tolist())
        for row in rows.tolist():
            partner = int(other[table[row]])
            gone = partner >= 0 and row_of[partner] not in kept
            assert (dataset.train.keys[row] in skipped) == gone
        if share < 1:
            assert any("skipped, as the image that they are mixed with" in x for x in less.notes)
        sizes = [len(b) for epoch in range(2) for b in less.batch_rows(epoch)]
        assert max(sizes) <= 8
        assert min(sizes) >= 2
        assert all(len(less.batch_rows(epoch)) == less.steps_per_epoch for epoch in range(4))


def test_added_and_replaced_images_are_noticed(dataset: Dataset, store: LabelStore) -> None:
    split = dataset.train
    keys = [*split.keys[:3], *(f"{at:032x}" for at in range(4)), *split.keys[3:]]
    grown = Split(
        tuple(keys),
        np.concatenate([split.labels[:3], [0] * 4, split.labels[3:]]),
        np.concatenate([split.pixels[:3], split.pixels[:4], split.pixels[3:]]),
    )
    with pytest.raises(InputError, match=rf"no label for 4 of {len(grown)} images, e.g. 0{{32}}"):
        LabelReader(grown, store, 32, 0)
    skipping = LabelReader(grown, store, 32, 0, missing="skip")
    assert skipping.images == len(split)
    assert [n for n in skipping.notes if f"4 of {len(grown)} images skipped" in n]
    assert _by_key(grown, skipping, 0) == _by_key(split, replay(dataset, store), 0)


def _by_key(split: Split, source: LabelReader, epoch: int) -> dict[str, tuple[bytes, ...]]:
    return {split.keys[row]: parts for row, parts in by_row(list(source.epoch(epoch))).items()}


def test_what_the_store_dropped_is_skipped_and_told(dataset: Dataset, tmp_path: Path) -> None:
    gone = dataset.train.keys[5]
    store = built(tmp_path / "s", dataset, dropped=f"key,name\n{gone},x\n")
    found = replay(dataset, store)
    assert found.images == len(dataset.train) - 1
    assert "1 of" in found.notes[0]
    assert "dropped" in found.notes[0]


def test_what_workers_are_sent_does_not_grow_with_the_data(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    import pickle  # what a spawned loader is sent; never written to a file

    larger = prepare(DataSpec("digits", img_size=16), tmp_path)
    sizes = []
    for data in (dataset, larger):
        own = built(tmp_path / f"{len(data.train)}", data, epochs=1)
        source = LabelReader(data.train, own, 32, 0)
        sizes.append(len(pickle.dumps(source._inputs)) - len(str(data.train.pixels.filename)))
        recipe = source._planned(0).of(source._at[source.batch_rows(0)[0]])
        assert len(pickle.dumps(recipe)) < 2_000
    assert sizes[0] == sizes[1] < 2_000


def test_order_follows_keys_seed_and_epoch_only(dataset: Dataset, store: LabelStore) -> None:
    split = dataset.train
    turned = Split(split.keys[::-1], split.labels[::-1], split.pixels[::-1])
    every = np.arange(len(split))
    ours = [split.keys[r] for r in epoch_order(split, every, 5, 2)]
    theirs = [turned.keys[r] for r in epoch_order(turned, every, 5, 2)]
    assert ours == theirs
    orders = {tuple(epoch_order(split, every, s, e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    again = LabelReader(turned, store, 32, 0)
    for a, b in zip(replay(dataset, store).epoch(1), again.epoch(1), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.prob, b.prob)


def test_epochs_beyond_the_stored_ones_start_again_in_a_new_order(dataset: Dataset, store: LabelStore) -> None:
    first, third = list(replay(dataset, store).epoch(0)), list(replay(dataset, store).epoch(2))
    assert by_row(first) == by_row(third)
    assert by_row(first) != by_row(list(replay(dataset, store).epoch(1)))
    assert not torch.equal(first[0].rows, third[0].rows)
    strict = replay(dataset, store, label_overflow="error")
    assert list(strict.epoch(1))
    with pytest.raises(InputError, match="2 epochs, want epoch 3"):
        list(strict.epoch(2))
    one = replay(dataset, store, epochs=1)
    assert by_row(list(one.epoch(0))) == by_row(list(one.epoch(1)))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.integers(0, 3000), st.integers(2, 400))
def test_no_image_is_dropped_and_none_trains_alone(n: int, batch_size: int) -> None:
    sizes = batch_sizes(n, batch_size)
    assert sum(sizes) == n
    if n >= 2:
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= max(batch_size, 3)
        assert len(sizes) <= -(-n // batch_size)


def test_the_holdout_comes_in_order_and_whole(dataset: Dataset, store: LabelStore) -> None:
    batches = list(holdout_batches(dataset, store, 7))
    rows = torch.cat([batch.rows for batch in batches])
    assert rows.tolist() == list(range(len(dataset.holdout)))
    inputs = torch.cat([batch.inputs for batch in batches])
    assert torch.equal(inputs, eval_batch(dataset.holdout.pixels, store.spec.augment))
    at = find_rows(store.holdout_keys, key_array(dataset.holdout.keys))
    want = store.holdout()[at]
    assert np.array_equal(torch.cat([b.prob for b in batches]).numpy(), want.prob)


def test_what_does_not_fit_is_refused(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    other = prepare(DataSpec("digits", img_size=16), tmp_path)
    with pytest.raises(InputError, match="no label for"):
        LabelReader(other.train, store, 32, 0)
    with pytest.raises(InputError, match="no label for"):
        list(holdout_batches(other, store, 32))
    shared = list(holdout_batches(other, store, 32, "skip"))
    rows = torch.cat([batch.rows for batch in shared]).tolist()
    assert {other.holdout.keys[row] for row in rows} == set(other.holdout.keys) & set(dataset.holdout.keys)
    odd = {"batch_size": (1,), "subset": ([],), "missing": "x", "label_overflow": "x", "epochs": (3, 0)}
    for name, value in ((name, value) for name, values in odd.items() for value in values):
        with pytest.raises(InputError):
            replay(dataset, store, **{name: value})


def test_views_are_made_once_for_all_that_need_them(
    dataset: Dataset, store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0

    class Counting(TimmAugmenter):
        def batch(self, pixels: np.ndarray, codes: list[int]) -> torch.Tensor:  # type: ignore[override]
            nonlocal made
            made += len(pixels)
            return super().batch(pixels, codes)

    rows = find_rows(store.keys, key_array(dataset.train.keys))
    table = np.empty(len(rows), dtype=np.int64)
    table[rows] = np.arange(len(rows))
    plan = make_plan(store.codes(0), table, store.spec.augment)
    monkeypatch.setattr(views_module, "make_augmenter", lambda spec, device: Counting(spec))
    Inputs(dataset.train.pixels, store.spec.augment)[plan.of(np.arange(len(rows)))]
    assert made == len(rows)
