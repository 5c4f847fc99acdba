"""Batches of a full training, divided over processes and gradient accumulation.

The global batch does not depend on how it is divided: micro-batch i of K takes every K-th image
from i on, as torch's DistributedSampler and DeiT's RASampler do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.data import Split
from nas.data.augment.spec import AugmentSpec, augmentation_codes
from nas.data.augment.views import Inputs, ViewSpec, stream
from nas.labels.reader import LabelReader, batch_sizes, epoch_order
from nas.labels.store import key_array, key_bytes
from nas.train.losses import TeacherTargets
from space.errors import refuse

Rows = NDArray[np.int64]
_SALT = 0x7EAC4


@dataclass(frozen=True)
class RankShard:
    """The micro-batches of one process among `world`, each with `accumulation_steps` a step."""

    rank: int
    world: int
    accumulation_steps: int

    @property
    def micro_batches(self) -> int:
        """How many micro-batches make a global batch."""
        return self.world * self.accumulation_steps

    def numbers(self) -> list[int]:
        """Return the numbers of this process's micro-batches, in order."""
        return [at * self.world + self.rank for at in range(self.accumulation_steps)]

    def __str__(self) -> str:
        return f"{self.world} processes x {self.accumulation_steps} accumulation steps"


ALONE = RankShard(0, 1, 1)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One part of a global batch.

    `inputs` float32 [n, 3, S, S]; `truth` classes int64 [n] (-1: none) or, of images that a store mixed, shares
    float32 [n, C]; stored labels as `targets`, if any; `number` of all micro-batches of the step, and the images of
    the global batch.
    """

    inputs: Tensor
    truth: Tensor
    targets: TeacherTargets | None
    number: int
    global_batch: int


def divide(batches: Sequence[Rows], shard: RankShard) -> list[tuple[int, int, Rows]]:
    """Return (number, global batch, rows) of each micro-batch of this process, in order."""
    count = shard.micro_batches
    return [(i, len(rows), rows[i::count]) for rows in batches for i in shard.numbers()]


def check_batch_size(images: int, shard: RankShard, *, even: bool) -> None:
    """Refuse a batch that cannot be divided equally; `even`: into pairs, as mixing takes them."""
    count = shard.micro_batches
    unit = count * (2 if even else 1)
    if images % unit or images < 2 * count:
        near = max(images // unit, 1) * unit
        near += unit * (near < 2 * count)
        want = f"a multiple of {unit}, for {shard}" + (" of pairs to mix" if even else "")
        raise refuse("batch_size", images, want, f"{near} or {near + unit}")


def repeated(order: Rows, repeats: int) -> tuple[Rows, NDArray[np.int64]]:
    """Return a shuffled epoch of as many draws in which each image comes `repeats` times.

    Returns rows and the number of each copy, int64 [n]. Copies follow each other, so that processes get different
    ones. Source: DeiT's repeated augmentation (arXiv 2012.12877).
    """
    n = len(order)
    distinct = order[: -(-n // repeats)]
    copies = np.tile(np.arange(repeats, dtype=np.int64), len(distinct))
    return np.repeat(distinct, repeats)[:n], copies[:n]


class LiveBatches:
    """Augmented training images with their true classes, all of them in each epoch.

    Batches differ by one image at most. With `mixing` each of the `shard`'s micro-batches is made of pairs: batches
    differ by a pair for each, and fewer images than that are left over.
    """

    def __init__(
        self,
        split: Split,
        spec: AugmentSpec,
        *,
        batch_size: int,
        repeats: int,
        random_seed: int,
        workers: int,
        device: str,
        shard: RankShard = ALONE,
        mixing: bool = False,
    ) -> None:
        assert not spec.mixes, "a full training mixes micro-batches itself"
        if batch_size > len(split):
            want = f"at most the {len(split)} training images"
            raise refuse("batch_size", batch_size, want, "--set batch_size=N; the rate scales with it")
        self._split = split
        self._repeats, self._seed = repeats, random_seed
        batched = spec.engine == "batched"
        self._workers = 0 if batched else workers
        self._inputs = Inputs(split.pixels, spec, device if batched else "cpu")
        self._raw = key_bytes(key_array(split.keys))
        self._rows = np.arange(len(split))
        unit = 2 * shard.micro_batches if mixing else 1
        self._ends = np.cumsum(batch_sizes(len(split) // unit, batch_size // unit)) * unit
        self.steps_per_epoch, self.images_per_epoch = len(self._ends), int(self._ends[-1])
        _check_least(int(np.diff(self._ends, prepend=0).min()), shard)

    def draws(self, epoch: int) -> tuple[Rows, NDArray[np.int64]]:
        """Return an epoch's rows in order, and the number of each row's copy."""
        order = epoch_order(self._split, self._rows, self._seed, epoch)
        rows, copies = repeated(order, self._repeats)
        return rows[: self.images_per_epoch], copies[: self.images_per_epoch]

    def steps(self, epoch: int, start: int, shard: RankShard) -> Iterator[list[MicroBatch]]:
        """Return a process's micro-batches of each step, from step `start` on."""
        rows, copies = self.draws(epoch)
        mine = divide(np.split(np.arange(len(rows)), self._ends[:-1])[start:], shard)
        recipes = [ViewSpec(rows[at], self._codes(rows[at], copies[at], epoch)) for _, _, at in mine]
        made = zip(mine, stream(self._inputs, recipes, self._workers), strict=True)
        labels = np.asarray(self._split.labels, dtype=np.int64)[rows]
        parts = (MicroBatch(inputs, torch.from_numpy(labels[at]), None, i, whole) for (i, whole, at), inputs in made)
        return _by_step(parts, shard)

    def _codes(self, rows: Rows, copies: NDArray[np.int64], epoch: int) -> NDArray[np.uint64]:
        codes = np.zeros(len(rows), dtype=np.uint64)
        for copy in np.unique(copies).tolist():
            at = copies == copy
            view = epoch * self._repeats + copy
            codes[at] = augmentation_codes(self._raw[rows[at]], view, _SALT + self._seed)
        return codes


class ReplayBatches:
    """The epochs of a label store: stored views, labels and mixing; no image is dropped."""

    def __init__(self, reader: LabelReader, shard: RankShard) -> None:
        self._reader = reader
        self.steps_per_epoch, self.images_per_epoch = reader.steps_per_epoch, reader.images
        _check_least(min(len(rows) for rows in reader.batch_rows(0)), shard)

    def steps(self, epoch: int, start: int, shard: RankShard) -> Iterator[list[MicroBatch]]:
        """Return a process's micro-batches of each step, from step `start` on."""
        mine = divide(self._reader.batch_rows(epoch)[start:], shard)
        batches = self._reader.batches(epoch, [rows for *_, rows in mine])

        def parts() -> Iterator[MicroBatch]:
            for (number, whole, rows), batch in zip(mine, batches, strict=True):
                targets = TeacherTargets(index=batch.index, prob=batch.prob, tail=batch.tail)
                yield MicroBatch(batch.inputs, self._reader.truth(epoch, rows), targets, number, whole)

        return _by_step(parts(), shard)


def _check_least(images: int, shard: RankShard) -> None:
    """Refuse batches of which a micro-batch has one image: batch norm needs two."""
    want = 2 * shard.micro_batches
    if images < want:
        raise refuse("batch_size", f"batches of {images} images", f"{want}, for {shard}")


def _by_step(found: Iterator[MicroBatch], shard: RankShard) -> Iterator[list[MicroBatch]]:
    while step := list(itertools.islice(found, shard.accumulation_steps)):
        yield step
