"""Stored labels and the inputs they belong to, batch by batch, with no teacher in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import nas.data
from nas.data import Split
from nas.distill.augment import Augmenter, AugmentSpec, eval_batch
from nas.distill.labels import Labels
from nas.distill.store import LabelStore
from space.errors import refuse

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs float32 [B, 3, S, S] with labels index int64 [B, K], prob [B, K], tail [B];
    `rows` int64 [B] are positions in the split."""

    inputs: Tensor
    index: Tensor
    prob: Tensor
    tail: Tensor
    rows: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device."""
        parts = (self.inputs, self.index, self.prob, self.tail, self.rows)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


def batch_sizes(n: int, batch_size: int) -> list[int]:
    """Spread n images over batches that differ by at most one image, none of them alone.

    A net with batch norm cannot train on a batch of one; no image is dropped for that. At most
    `batch_size` each (3 for batches of 2 and an odd n).
    """
    count = -(-n // batch_size)
    while count > 1 and n // count < 2:
        count -= 1
    return [n // count + (at < n % count) for at in range(count)] if n else []


def epoch_order(split: Split, rows: Rows, random_seed: int, epoch: int) -> Rows:
    """Shuffle rows of a split by key: the order of the list they came in plays no part."""
    by_key = rows[np.argsort(np.array([split.keys[r] for r in rows], dtype="S32"), kind="stable")]
    # Raw draws of a bit generator never change between versions of numpy; permutations may.
    draws = np.random.PCG64(np.random.SeedSequence([random_seed, epoch])).random_raw(len(rows))
    return by_key[np.argsort(draws, kind="stable")]


class _Inputs(Dataset[Tensor]):
    """Makes whole batches, here or in loader workers; when pickled, mapped pixels go by path."""

    def __init__(self, split: Split, codes: NDArray[np.uint64], spec: AugmentSpec) -> None:
        self._pixels = split.pixels
        self._codes, self._spec = codes, spec
        self._augmenter: Augmenter | None = None

    def __getitem__(self, rows: Any) -> Tensor:
        if self._augmenter is None:
            self._augmenter = Augmenter(self._spec)
        return self._augmenter.batch(self._pixels[rows], self._codes[rows].tolist())

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_augmenter": None}
        name = getattr(self._pixels, "filename", None)
        if name is not None and _mapped(name).shape == self._pixels.shape:
            state["_pixels"] = str(name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["_pixels"], str):
            state["_pixels"] = _mapped(state["_pixels"])
        self.__dict__.update(state)


def _mapped(name: Any) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.load(name, mmap_mode="r", allow_pickle=False)
    return pixels


class Replay:
    """The training side of a store: the same inputs and labels in every run that asks.

    `split` is a data set's train split, all of whose keys (of `subset`, rows of it, if given)
    must be in the store; `augment` must be the store's own. Batches come in a seeded order that
    depends on keys, `random_seed` and epoch alone; inputs are bit-identical for any `workers`
    (loader processes) and `batch_size` (>= 2). Raises InputError.
    """

    def __init__(
        self,
        split: Split,
        store: LabelStore,
        augment: AugmentSpec,
        batch_size: int,
        random_seed: int,
        workers: int = 0,
        subset: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 2:
            raise refuse("--batch-size", batch_size, "an integer >= 2 (batch norm needs two)")
        if augment.digest() != store.spec.augment.digest():
            raise refuse(
                f"label store {store.folder}",
                f"augmentation {store.spec.augment.digest()}",
                f"augmentation {augment.digest()}",
                "replay with the store's own",
            )
        self._split, self._store, self._augment = split, store, augment
        self._batch_size, self._seed, self._workers = batch_size, random_seed, workers
        chosen = range(len(split)) if subset is None else subset
        self._rows: Rows = np.array(sorted(set(chosen)), dtype=np.int64)
        if not len(self._rows):
            raise refuse("training images", 0, "at least one")
        self._at = _rows_of_labels(store.epoch(0), split, self._rows, store)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return len(batch_sizes(len(self._rows), self._batch_size))

    @property
    def images(self) -> int:
        """How many images an epoch has."""
        return len(self._rows)

    def batches(self, epoch: int) -> list[Rows]:
        """List the rows of every batch of an epoch, in order."""
        order = epoch_order(self._split, self._rows, self._seed, epoch)
        ends = np.cumsum(batch_sizes(len(order), self._batch_size))
        return np.split(order, ends[:-1])

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Replay one epoch. Beyond the stored epochs the labels (and views) start again from the
        first, in a new order."""
        labels = self._store.epoch(epoch % self._store.epochs)
        codes = np.zeros(len(self._split), dtype=np.uint64)
        codes[self._rows] = labels.codes[self._at[self._rows]]
        batches = self.batches(epoch)
        inputs = _Inputs(self._split, codes, self._augment)
        for rows, made in zip(batches, self._inputs(inputs, batches), strict=True):
            yield _batch(made, labels, self._at[rows], rows)

    def _inputs(self, inputs: _Inputs, batches: list[Rows]) -> Iterator[Tensor]:
        if self._workers == 0:
            return (inputs[rows] for rows in batches)
        loader: DataLoader[Tensor] = DataLoader(
            inputs,
            batch_size=None,
            sampler=cast(Any, batches),
            num_workers=self._workers,
            multiprocessing_context="spawn",
            generator=torch.Generator(),  # the loader's own, so that the global one stays put
        )
        return iter(loader)


def _rows_of_labels(labels: Labels, split: Split, rows: Rows, store: LabelStore) -> Rows:
    """Find the label of every row of a split (-1 where not asked). Raises InputError."""
    at = np.full(len(split), -1, dtype=np.int64)
    at[rows] = labels.rows(tuple(split.keys[r] for r in rows))
    missing = int((at[rows] < 0).sum())
    if missing:
        first = next(split.keys[r] for r in rows if at[r] < 0)
        raise refuse(
            f"label store {store.folder}",
            f"no label for {missing} of {len(rows)} images, e.g. {first}",
            "labels of every image",
            "build a store for this data set",
        )
    return at


def _batch(inputs: Tensor, labels: Labels, at: Rows, rows: Rows) -> Batch:
    return Batch(
        inputs=inputs,
        index=torch.from_numpy(labels.index[at].astype(np.int64)),
        prob=torch.from_numpy(labels.prob[at]),
        tail=torch.from_numpy(labels.tail[at]),
        rows=torch.from_numpy(rows),
    )


def holdout_batches(
    dataset: nas.data.Dataset, store: LabelStore, batch_size: int
) -> Iterator[Batch]:
    """Give the holdout's evaluation inputs with their labels, in the split's order. Raises
    InputError."""
    split, labels = dataset.holdout, store.holdout()
    every = np.arange(len(split), dtype=np.int64)
    at = _rows_of_labels(labels, split, every, store)
    for start in range(0, len(split), batch_size):
        rows = every[start : start + batch_size]
        inputs = eval_batch(split.pixels[rows], store.spec.augment)
        yield _batch(inputs, labels, at[rows], rows)
