"""Reads stored labels and the inputs they belong to, batch by batch, without a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from nas.data import Dataset, Split
from nas.data.augment.mixing import shares
from nas.data.augment.timm_engine import eval_batch
from nas.data.augment.views import NO_PARTNER, EpochPlan, Inputs, make_plan, stream
from nas.labels.codec import SoftLabels
from nas.labels.store import LabelStore, Rows, dropped_keys, find_rows, key_array
from space.errors import refuse

OVERFLOW = ("cycle", "error")
MISSING = ("error", "skip")


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs float32 [B, 3, S, S] with labels index int64 [B, K], prob [B, K], tail [B]; `truth`
    int64 [B] is the given class (-1: none), `rows` int64 [B] are positions in the split."""

    inputs: Tensor
    index: Tensor
    prob: Tensor
    tail: Tensor
    truth: Tensor
    rows: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def batch_sizes(n: int, batch_size: int) -> list[int]:
    """Spread n images over batches that differ by at most one image, none alone (batch norm needs two).

    At most `batch_size` each (3 for batches of 2 and an odd n); no image is dropped.
    """
    count = -(-n // batch_size)
    while count > 1 and n // count < 2:
        count -= 1
    return _spread(n, count)


def _spread(n: int, count: int) -> list[int]:
    return [n // count + (at < n % count) for at in range(count)] if n else []


def epoch_order(split: Split, rows: Rows, random_seed: int, epoch: int) -> Rows:
    """Shuffle rows of a split by key: the order of the list they came in plays no part."""
    by_key = rows[np.argsort(key_array(split.keys)[rows], kind="stable")]
    # Raw draws of a bit generator never change between versions of numpy; permutations may.
    draws = np.random.PCG64(np.random.SeedSequence([random_seed, epoch])).random_raw(len(rows))
    return by_key[np.argsort(draws, kind="stable")]


class LabelReader:
    """Batches of stored labels and their inputs: the same for every training that reads them. Raises InputError.

    `split` is a train split, in any order, of which `subset` (rows) is used, or all. Images that the store dropped are
    skipped; others without a label are an error, or skipped with `missing` "skip", as is a mixed record in an epoch in
    which its partner is not in the split; `notes` and `skipped` name them. Past the stored epochs (the first `epochs`
    of them) labels and views start again in a new order (`label_overflow` "cycle") or it is an error. The order
    depends on keys, `random_seed` and epoch alone; inputs are bit-identical for any order, `batch_size` (>= 2), subset
    and `workers` (loader processes; none for the batched engine, which works on `device`).
    """

    def __init__(
        self,
        split: Split,
        store: LabelStore,
        batch_size: int,
        random_seed: int,
        workers: int = 0,
        subset: Sequence[int] | None = None,
        *,
        missing: str = "error",
        label_overflow: str = "cycle",
        epochs: int | None = None,
        device: str = "cpu",
    ) -> None:
        if epochs is not None and not 1 <= epochs <= store.epochs:
            raise refuse("label epochs", epochs, f"1 to {store.epochs}, what {store.folder} holds")
        if batch_size < 2:
            raise refuse("--batch-size", batch_size, "an integer >= 2 (batch norm needs two)")
        if missing not in MISSING:
            raise refuse("--missing-labels", missing, f"one of {', '.join(MISSING)}")
        if label_overflow not in OVERFLOW:
            raise refuse("--label-overflow", label_overflow, f"one of {', '.join(OVERFLOW)}")
        self._split, self._store, self._spec = split, store, store.spec.augment
        self._epochs = store.epochs if epochs is None else epochs
        self._batch_size, self._seed = batch_size, random_seed
        self._overflow = label_overflow
        batched = self._spec.engine == "batched"
        self._workers = 0 if batched else workers
        self._inputs = Inputs(split.pixels, self._spec, device if batched else "cpu")
        self._at = find_rows(store.keys, key_array(split.keys))
        self._table = np.full(len(store.keys), -1, dtype=np.int64)
        labelled = np.flatnonzero(self._at >= 0)
        self._table[self._at[labelled]] = labelled
        chosen = np.arange(len(split)) if subset is None else np.array(sorted(set(subset)))
        self._rows, self.notes = _usable(split, store, self._at, chosen.astype(np.int64), missing)
        if store.class_order is not None:
            self.notes = (f"the {store.spec.num_classes} classes stand in another order: matched by name", *self.notes)
        if not len(self._rows):
            raise refuse("training images", 0, "at least one with a label")
        self._plan: tuple[int, EpochPlan] | None = None
        self._steps = self._count_steps()

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch; the same for all."""
        return self._steps

    @property
    def images(self) -> int:
        """Number of images of an epoch, at most."""
        return len(self._rows)

    def skipped(self, epoch: int) -> list[str]:
        """List the keys of images that an epoch skips because their partner is gone."""
        gone = np.setdiff1d(self._rows, self.present(epoch), assume_unique=True)
        return [self._split.keys[int(row)] for row in gone]

    def batch_rows(self, epoch: int) -> list[Rows]:
        """List the rows of every batch of an epoch, in order."""
        order = epoch_order(self._split, self.present(epoch), self._seed, epoch)
        return np.split(order, np.cumsum(_spread(len(order), self._steps))[:-1])

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        return self.batches(epoch, self.batch_rows(epoch))

    def batches(self, epoch: int, rows_of: Sequence[Rows]) -> Iterator[Batch]:
        """Yield batches of the caller's choice among the rows that `present` returns."""
        labels = self._store.epoch(self._stored(epoch))
        plan = self._planned(epoch)
        recipes = [plan.of(self._at[rows]) for rows in rows_of]
        for rows, inputs in zip(rows_of, stream(self._inputs, recipes, self._workers), strict=True):
            yield _batch(inputs, labels[self._at[rows]], self._split, rows)

    def inputs(self, epoch: int, rows: Rows) -> Tensor:
        """Make the inputs of rows in an epoch: float32 [n, 3, S, S]."""
        return self._inputs[self._planned(epoch).of(self._at[rows])]

    def truth(self, epoch: int, rows: Rows) -> Tensor:
        """Return the true classes of rows in an epoch, int64 [n] (-1: none).

        Of a store that mixes images their shares, float32 [n, C], as the inputs are mixed.
        """
        own = np.asarray(self._split.labels[rows])
        recipe = self._planned(epoch).of(self._at[rows])
        if recipe.partner_rows is None or recipe.partner_codes is None or (own < 0).all():
            return torch.from_numpy(own)
        mixed = np.flatnonzero(recipe.partner_rows != NO_PARTNER)
        share = np.ones(len(rows))
        share[mixed] = shares(
            recipe.codes[mixed].tolist(),
            recipe.partner_codes[mixed].tolist(),
            (self._spec.img_size, self._spec.img_size),
            self._spec,
        )
        found = np.zeros((len(rows), self._store.spec.num_classes), dtype=np.float32)
        found[np.arange(len(rows)), own] = share
        found[mixed, self._split.labels[recipe.partner_rows[mixed]]] += 1 - share[mixed]
        return torch.from_numpy(found)

    def labels(self, epoch: int, rows: Rows) -> SoftLabels:
        """Read the labels of rows in an epoch."""
        return self._store.epoch(self._stored(epoch))[self._at[rows]]

    def _stored(self, epoch: int) -> int:
        if epoch >= self._epochs and self._overflow == "error":
            remedy = "build more epochs, or allow --label-overflow cycle"
            raise refuse(self._store.title, f"{self._epochs} epochs", f"epoch {epoch + 1}", remedy)
        return epoch % self._epochs

    def _planned(self, epoch: int) -> EpochPlan:
        stored = self._stored(epoch)
        if self._plan is None or self._plan[0] != stored:
            plan = make_plan(self._store.codes(stored), self._table, self._spec)
            self._plan = (stored, plan)
        return self._plan[1]

    def present(self, epoch: int) -> Rows:
        """Return the rows of the split that an epoch trains on: those whose mixing partner's image is there, too."""
        if not self._spec.mixes:
            return self._rows
        found = self._rows[self._planned(epoch).whole()[self._at[self._rows]]]
        if len(found) < 2:
            got = f"{len(found)} of {len(self._rows)} images whose mixing partner is in the data"
            raise refuse(self._store.title, got, "at least 2", "train on the data that the store was built on")
        return found

    def _count_steps(self) -> int:
        if not self._spec.mixes or (self._table >= 0).all():
            return len(batch_sizes(len(self._rows), self._batch_size))
        # The fullest epoch decides, so that no batch of any epoch is larger than asked.
        counts = [len(self.present(epoch)) for epoch in range(self._epochs)]
        lost = [len(self._rows) - count for count in counts]
        example = self.skipped(int(np.argmax(lost)))[:1]
        self.notes = (
            *self.notes,
            f"{min(lost)} to {max(lost)} of {len(self._rows)} records an epoch skipped, as the "
            f"image that they are mixed with is not in the data, e.g. {', '.join(example)}",
        )
        steps = len(batch_sizes(max(counts), self._batch_size))
        return max(1, min(steps, min(counts) // 2))


def _usable(split: Split, store: LabelStore, at: Rows, chosen: Rows, missing: str) -> tuple[Rows, tuple[str, ...]]:
    """Leave out the rows without a label, if that is allowed; returns rows and notes."""
    bare = chosen[at[chosen] < 0]
    if not len(bare):
        return chosen, ()
    dropped = dropped_keys(store)
    unknown = [int(row) for row in bare if split.keys[int(row)] not in dropped]
    if unknown and missing == "error":
        raise _no_label(store, split, unknown, len(chosen))
    notes = []
    if len(bare) > len(unknown):
        notes.append(f"{len(bare) - len(unknown)} of {len(chosen)} images skipped, as the store dropped them")
    if unknown:
        notes.append(
            f"{len(unknown)} of {len(chosen)} images skipped, as the store has no label for them, "
            f"e.g. {_image_name(split, unknown[0])}"
        )
    return chosen[at[chosen] >= 0], tuple(notes)


def _no_label(store: LabelStore, split: Split, rows: Sequence[int], among: int) -> Exception:
    got = f"no label for {len(rows)} of {among} images, e.g. {_image_name(split, rows[0])}"
    return refuse(store.title, got, "labels of every image", "build a store for this data set")


def _image_name(split: Split, row: int) -> str:
    """Return an image's file, if that is known, and its key."""
    key = split.keys[row]
    return f"{split.names[row]} ({key})" if len(split.names) else key


def _batch(inputs: Tensor, labels: SoftLabels, split: Split, rows: Rows) -> Batch:
    return Batch(inputs, *(torch.from_numpy(part) for part in (*labels, np.asarray(split.labels[rows]), rows)))


def holdout_batches(dataset: Dataset, store: LabelStore, batch_size: int, missing: str = "error") -> Iterator[Batch]:
    """Yield the holdout's evaluation inputs with their labels, in the split's order.

    Images without a label there are an error, or left out with `missing` "skip". Raises InputError.
    """
    split, labels = dataset.holdout, store.holdout()
    at = find_rows(store.holdout_keys, key_array(split.keys))
    every, bare = np.flatnonzero(at >= 0), np.flatnonzero(at < 0).tolist()
    if bare and (missing == "error" or not len(every)):
        raise _no_label(store, split, bare, len(split))
    for start in range(0, len(every), batch_size):
        rows = every[start : start + batch_size]
        inputs = eval_batch(split.pixels[rows], store.spec.augment)
        yield _batch(inputs, labels[at[rows]], split, rows)
