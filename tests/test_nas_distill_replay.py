"""Replay: the right label, the very same input, in any order, batch size, subset or process."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.data import Dataset, DataSpec, Split, prepare
from nas.distill.augment import Augmenter, default_spec, eval_batch
from nas.distill.replay import Batch, Replay, batch_sizes, epoch_order, holdout_batches
from nas.distill.store import LabelStore, StoreSpec, build_store, open_store
from space.errors import InputError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = DataSpec("digits", img_size=16, proxy_images=150)
    return prepare(spec, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    weights = torch.randn(3 * 16 * 16, 10, generator=torch.Generator().manual_seed(1)) * 0.2
    augment = replace(default_spec(dataset), policy="rand-m9-mstd0.5-inc1", erase_prob=0.3)
    spec = StoreSpec(2, 3, augment, 0, dataset.fingerprint, "toy", "abc", 10, 1)
    root = tmp_path_factory.mktemp("stores")
    folder = build_store(root, spec, dataset, lambda x: x.flatten(1) @ weights, 32)
    return open_store(folder, spec)


def replay(dataset: Dataset, store: LabelStore, **changes: object) -> Replay:
    options = {"batch_size": 32, "random_seed": 0, **changes}
    return Replay(dataset.train, store, store.spec.augment, **options)  # type: ignore[arg-type]


def by_row(batches: list[Batch]) -> dict[int, tuple[bytes, ...]]:
    found: dict[int, tuple[bytes, ...]] = {}
    for batch in batches:
        for at, row in enumerate(batch.rows.tolist()):
            assert row not in found, "every image once"
            parts = (batch.inputs, batch.index, batch.prob, batch.tail)
            found[row] = tuple(part[at].numpy().tobytes() for part in parts)
    return found


def test_inputs_and_labels_are_the_stored_ones(dataset: Dataset, store: LabelStore) -> None:
    labels = store.epoch(1)
    augmenter = Augmenter(store.spec.augment)
    seen = 0
    for batch in replay(dataset, store).epoch(1):
        rows = batch.rows.numpy()
        at = labels.rows(tuple(dataset.train.keys[r] for r in rows))
        want = augmenter.batch(dataset.train.pixels[rows], labels.codes[at].tolist())
        assert torch.equal(batch.inputs, want)
        assert np.array_equal(batch.index.numpy(), labels.index[at])
        assert np.array_equal(batch.prob.numpy(), labels.prob[at])
        assert np.array_equal(batch.tail.numpy(), labels.tail[at])
        assert batch.index.dtype == torch.int64
        seen += len(rows)
    assert seen == len(dataset.train)


def test_loader_workers_change_nothing(dataset: Dataset, store: LabelStore) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    here = list(replay(dataset, store).epoch(0))
    there = list(replay(dataset, store, workers=2).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(here) == len(there)
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.inputs, theirs.inputs)


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


def test_order_follows_keys_seed_and_epoch_only(dataset: Dataset, store: LabelStore) -> None:
    split = dataset.train
    turned = Split(split.keys[::-1], split.labels[::-1], split.pixels[::-1])
    every = np.arange(len(split))
    ours = [split.keys[r] for r in epoch_order(split, every, 5, 2)]
    theirs = [turned.keys[r] for r in epoch_order(turned, every, 5, 2)]
    assert ours == theirs
    orders = {tuple(epoch_order(split, every, s, e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    again = Replay(turned, store, store.spec.augment, 32, 0)
    for a, b in zip(replay(dataset, store).epoch(1), again.epoch(1), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.prob, b.prob)


def test_epochs_beyond_the_stored_ones_start_again_in_a_new_order(
    dataset: Dataset, store: LabelStore
) -> None:
    first, third = list(replay(dataset, store).epoch(0)), list(replay(dataset, store).epoch(2))
    assert by_row(first) == by_row(third)
    assert by_row(first) != by_row(list(replay(dataset, store).epoch(1)))
    assert not torch.equal(first[0].rows, third[0].rows)


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
    labels = store.holdout()
    at = labels.rows(dataset.holdout.keys)
    assert np.array_equal(torch.cat([b.prob for b in batches]).numpy(), labels.prob[at])


def test_what_does_not_fit_is_refused(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    other = prepare(DataSpec("digits", img_size=16), tmp_path)
    with pytest.raises(InputError, match="no label for"):
        Replay(other.train, store, store.spec.augment, 32, 0)
    with pytest.raises(InputError, match="no label for"):
        list(holdout_batches(other, store, 32))
    with pytest.raises(InputError, match="augmentation"):
        Replay(dataset.train, store, default_spec(dataset), 32, 0)
    with pytest.raises(InputError, match="--batch-size: got 1"):
        replay(dataset, store, batch_size=1)
    with pytest.raises(InputError, match="training images"):
        replay(dataset, store, subset=[])


def test_batches_have_the_promised_number_and_sizes(dataset: Dataset, store: LabelStore) -> None:
    again = replay(dataset, store, batch_size=17)
    sizes = Counter(len(batch.rows) for batch in again.epoch(0))
    assert sum(sizes.values()) == again.steps_per_epoch
    assert again.images == len(dataset.train)
