"""Whole batches and their parts: who sees what, whatever the number of processes and turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from nas.data import Dataset
from nas.data.augment.spec import default_spec
from nas.train.batches import LiveBatches, RankShard, check_batch_size, divide, repeated
from space.errors import InputError


def live(digits: Dataset, **options: int) -> LiveBatches:
    return LiveBatches(digits.train, default_spec(digits), workers=0, device="cpu", **options)


@given(n=st.integers(1, 400), repeats=st.integers(1, 5), seed=st.integers(0, 99))
def test_repeated_augmentation_draws_as_often_from_a_part_of_the_images(n: int, repeats: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(n).astype(np.int64)
    rows, copies = repeated(order, repeats)
    assert len(rows) == len(copies) == n
    # The ten-line oracle: every image of the front so many times, cut to the epoch's length.
    wanted = [(row, copy) for row in order.tolist() for copy in range(repeats)][:n]
    assert list(zip(rows.tolist(), copies.tolist(), strict=True)) == wanted
    assert len(set(wanted)) == n  # no view twice


@pytest.mark.parametrize("world", [1, 2, 4])
def test_repeats_are_dealt_out_as_timms_sampler_does(world: int) -> None:
    n = 96
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy().astype(np.int64)
    rows, _ = repeated(order, 3)
    for rank in range(world):
        sampler = RepeatAugSampler(range(n), num_replicas=world, rank=rank, num_repeats=3, selected_round=0)
        theirs = list(sampler)
        batch = 24
        mine = divide(np.split(rows, n // batch), RankShard(rank, world, 1))
        ours = np.concatenate([part for *_, part in mine]).tolist()
        assert ours == theirs


@given(world=st.integers(1, 4), turns=st.integers(1, 4), whole=st.integers(2, 40), steps=st.integers(1, 4))
def test_parts_make_up_the_whole_batch_once(world: int, turns: int, whole: int, steps: int) -> None:
    batches = [np.arange(s * whole, (s + 1) * whole) for s in range(steps)]
    seen: dict[int, list[int]] = {s: [] for s in range(steps)}
    for rank in range(world):
        share = RankShard(rank, world, turns)
        mine = divide(batches, share)
        assert len(mine) == steps * turns
        for at, (number, size, rows) in enumerate(mine):
            assert size == whole
            assert number % world == rank
            seen[at // turns] += rows.tolist()
    for step, batch in enumerate(batches):
        assert sorted(seen[step]) == batch.tolist()


def test_two_processes_in_one_turn_see_the_parts_of_one_in_two(digits: Dataset) -> None:
    def parts(rank: int, world: int, turns: int) -> list[tuple[int, torch.Tensor]]:
        source = live(digits, batch_size=32, repeats=3, random_seed=1)
        return [
            (part.number, part.inputs) for step in source.steps(2, 0, RankShard(rank, world, turns)) for part in step
        ]

    alone = parts(0, 1, 2)
    both = [parts(rank, 2, 1) for rank in range(2)]
    together = [one for pair in zip(*both, strict=True) for one in pair]
    assert [n for n, _ in alone] == [n for n, _ in together]
    for (_, a), (_, b) in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_an_epoch_goes_on_from_any_step_and_copies_are_other_views(digits: Dataset) -> None:
    source = live(digits, batch_size=16, repeats=3, random_seed=0)
    share = RankShard(0, 1, 1)
    whole = [step[0] for step in source.steps(1, 0, share)]
    assert len(whole) == source.steps_per_epoch
    for start in (1, source.steps_per_epoch - 1, source.steps_per_epoch):
        late = [step[0] for step in source.steps(1, start, share)]
        assert len(late) == len(whole) - start
        for a, b in zip(late, whole[start:], strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.truth, b.truth)
    rows, copies = source.draws(1)
    assert len(set(rows.tolist())) == -(-len(rows) // 3)
    first = whole[0].inputs
    assert rows[0] == rows[1] == rows[2]
    assert copies[:3].tolist() == [0, 1, 2]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


@pytest.mark.parametrize(
    ("images", "share", "even", "ok"),
    [
        (32, RankShard(0, 2, 1), False, True),
        (33, RankShard(0, 2, 1), False, False),
        (2, RankShard(0, 2, 1), False, False),  # batch norm needs two of each
        (12, RankShard(0, 3, 2), True, True),
        (18, RankShard(0, 3, 2), True, False),
        (18, RankShard(0, 3, 2), False, True),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused_with_the_nearest(
    images: int, share: RankShard, even: bool, ok: bool
) -> None:
    if ok:
        check_batch_size(images, share, even=even)
        return
    with pytest.raises(InputError) as error:
        check_batch_size(images, share, even=even)
    near = [int(word) for word in str(error.value).split(";")[-1].split() if word.isdigit()]
    assert near
    for each in near:
        check_batch_size(each, share, even=even)


def test_more_than_all_images_make_no_batch(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--set batch_size=N"):
        live(digits, batch_size=10_000, repeats=1, random_seed=0)
