"""What a full training sees: whole batches, cut into the parts that processes see in turn.

Whoever sees which part, and in how many turns, the whole batch is the same: part i of K takes every
K-th image from i on, as torch's DistributedSampler and DeiT's RASampler deal them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.data import Split
from nas.data.augment.spec import AugmentSpec, augmentation_codes
from nas.data.augment.stream import Inputs, stream
from nas.data.augment.views import Recipe
from nas.labels.keys import raw_keys
from nas.labels.reader import Replay, epoch_order
from nas.train.teaching import Taught
from space.errors import refuse

Rows = NDArray[np.int64]
_SALT = 0x7EAC4


@dataclass(frozen=True)
class Share:
    """Which parts of a whole batch are a process's: of `world` processes, `turns` each."""

    rank: int
    world: int
    turns: int

    @property
    def parts(self) -> int:
        """How many parts a whole batch has."""
        return self.world * self.turns

    def own(self) -> list[int]:
        """Number this process's parts, in the order of its turns."""
        return [turn * self.world + self.rank for turn in range(self.turns)]


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a whole batch: inputs float32 [n, 3, S, S], true classes int64 [n] (-1: none) or,
    of images that a store mixed, shares float32 [n, C]; stored labels where there are any, its
    `number`, and how many images the `whole` batch has."""

    inputs: Tensor
    truth: Tensor
    taught: Taught | None
    number: int
    whole: int


class Source(Protocol):
    """Where batches come from: a function of the epoch alone."""

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches an epoch has."""

    @property
    def images_per_epoch(self) -> int:
        """How many images an epoch shows, about."""

    def steps(self, epoch: int, start: int, share: Share) -> Iterator[list[Part]]:
        """Give a process's parts of each whole batch of an epoch, from step `start` on."""


def dealt(batches: Sequence[Rows], share: Share) -> list[tuple[int, int, Rows]]:
    """Deal whole batches out: (number, whole, rows) of every part of this process, in order."""
    return [(i, len(rows), rows[i :: share.parts]) for rows in batches for i in share.own()]


def check_parts(name: str, images: int, share: Share, *, even: bool) -> None:
    """Refuse batches that cannot be dealt out equally. `even`: parts of an even number of images,
    as mixing takes them."""
    unit = share.parts * (2 if even else 1)
    if images % unit or images < 2 * share.parts:
        near = max(images // unit, 1) * unit
        near += unit * (near < 2 * share.parts)
        said = f"{share.world} processes x {share.turns} turns"
        want = f"a multiple of {unit}, for {said}" + (" of pairs to mix" if even else "")
        raise refuse(name, images, want, f"{near} or {near + unit}")


def repeated(order: Rows, repeats: int) -> tuple[Rows, NDArray[np.int64]]:
    """Repeat the images of a shuffled epoch: as many draws, a `repeats`-th of the images.

    Returns rows and the number of each copy, int64 [n]. Copies follow each other, so that parts and
    processes get different ones. Source: DeiT's repeated augmentation (arXiv 2012.12877).
    """
    n = len(order)
    distinct = order[: -(-n // repeats)]
    copies = np.tile(np.arange(repeats, dtype=np.int64), len(distinct))
    return np.repeat(distinct, repeats)[:n], copies[:n]


class LiveBatches:
    """Augmented training images with their true classes; what fills no whole batch waits for
    another epoch, as in the authors' loaders."""

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
    ) -> None:
        assert not spec.mixes, "a full training mixes whole batches"
        if batch_size > len(split):
            raise refuse(
                "batch_size",
                batch_size,
                f"at most the {len(split)} training images",
                "--set batch_size=N; the rate scales with it",
            )
        self._split, self._batch, self._repeats, self._seed = (
            split,
            batch_size,
            repeats,
            random_seed,
        )
        batched = spec.engine == "batched"
        self._workers = 0 if batched else workers
        self._inputs = Inputs(split.pixels, spec, device if batched else "cpu")
        self._raw = raw_keys(split.keys)
        self._rows = np.arange(len(split))

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return len(self._split) // self._batch

    @property
    def images_per_epoch(self) -> int:
        """How many images an epoch shows."""
        return self.steps_per_epoch * self._batch

    def draws(self, epoch: int) -> tuple[Rows, NDArray[np.int64]]:
        """Give an epoch's rows in order, and which copy of its image each is."""
        order = epoch_order(self._split, self._rows, self._seed, epoch)
        rows, copies = repeated(order, self._repeats)
        return rows[: self.images_per_epoch], copies[: self.images_per_epoch]

    def steps(self, epoch: int, start: int, share: Share) -> Iterator[list[Part]]:
        """Give a process's parts of each whole batch, from step `start` on."""
        rows, copies = self.draws(epoch)
        places = np.arange(start * self._batch, len(rows))
        mine = dealt(np.split(places, len(places) // self._batch) if len(places) else [], share)
        recipes = [Recipe(rows[at], self._codes(rows[at], copies[at], epoch)) for _, _, at in mine]
        made = zip(mine, stream(self._inputs, recipes, self._workers), strict=True)
        parts = []
        for (number, whole, at), inputs in made:
            truth = torch.from_numpy(np.asarray(self._split.labels[rows[at]], dtype=np.int64))
            parts.append(Part(inputs, truth, None, number, whole))
            if len(parts) == share.turns:
                yield parts
                parts = []

    def _codes(self, rows: Rows, copies: NDArray[np.int64], epoch: int) -> NDArray[np.uint64]:
        codes = np.zeros(len(rows), dtype=np.uint64)
        for copy in np.unique(copies).tolist():
            at = copies == copy
            view = epoch * self._repeats + copy
            codes[at] = augmentation_codes(self._raw[rows[at]], view, _SALT + self._seed)
        return codes


class ReplayBatches:
    """A label store's epochs: stored views, labels and mixing; no image is left out."""

    def __init__(self, replay: Replay, share: Share) -> None:
        self._replay = replay
        least = min(len(rows) for rows in replay.batches(0))
        if least < 2 * share.parts:
            said = f"{share.world} processes x {share.turns} turns"
            raise refuse(
                "batch_size", f"batches of {least} images", f"{2 * share.parts}, for {said}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return self._replay.steps_per_epoch

    @property
    def images_per_epoch(self) -> int:
        """How many images an epoch shows, at most."""
        return self._replay.images

    def steps(self, epoch: int, start: int, share: Share) -> Iterator[list[Part]]:
        """Give a process's parts of each whole batch, from step `start` on."""
        mine = dealt(self._replay.batches(epoch)[start:], share)
        batches = self._replay.made(epoch, [rows for *_, rows in mine])
        parts = []
        for (number, whole, rows), batch in zip(mine, batches, strict=True):
            taught = Taught(index=batch.index, prob=batch.prob, tail=batch.tail)
            truth = self._replay.truth(epoch, rows)
            parts.append(Part(batch.inputs, truth, taught, number, whole))
            if len(parts) == share.turns:
                yield parts
                parts = []
