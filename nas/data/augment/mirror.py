"""Whether mirrored training images lower the score: left and right may tell classes apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nas.core.metrics import paired_shares
from nas.data import Dataset, Split
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.timm_engine import eval_batch
from nas.data.augment.views import outputs

Ints = NDArray[np.int64]

MOST_IMAGES = 2000
"""Images of a split that are looked at, the first by key: a random sample."""
LOSS = 0.05
"""A loss is told where its 95 % interval lies above this share."""
SWAPPED, ACCIDENT = 0.2, 1e-3
"""Two classes change places in the mirror where so large a share of their images does, and so rarely by accident."""
LEAST_CONFUSED, TOLD = 30, 0.8
"""Images from which on a coin can be told from a judge, and the share that must not be taken for other classes."""
SIDES, REMEDY = "warning: left and right seem to tell classes apart", "--hflip 0 never mirrors"
_SIDE, _FILTERS, _WIDTH, _CELLS, _RIDGE = 32, 32, 7, 3, 0.1


def mirror_notes(dataset: Dataset, spec: AugmentSpec) -> list[str]:
    """Return a warning where an augmentation that mirrors is likely to hide what tells classes apart, else nothing.

    Before any training, by a linear probe (ridge regression on fixed random filters of images of 32 px): it loses on
    the holdout when mirrored images join its own, or takes mirrored images of one class for another and the other way
    around. The second is seen however many other classes there are.
    """
    if not _matters(dataset, spec):
        return []
    train, held = (
        _Sample.of(each, spec, np.arange(min(len(each), MOST_IMAGES))) for each in (dataset.train, dataset.holdout)
    )
    return _probe_notes(train, held, dataset.classes)


def flip_notes(
    network: Callable[[Tensor], Tensor], dataset: Dataset, spec: AugmentSpec, *, device: str = "cpu"
) -> list[str]:
    """Return a warning where a trained network (in eval mode) shows that left and right tell classes apart.

    Either mirroring the holdout lowers its score far more than noise, as of one that never saw mirrored images. Or, as
    mirrored training leaves a network at chance either way: the two classes that it confuses most are told apart as by
    a coin, though not taken for others, and a linear probe on their images tells them apart until they are mirrored;
    where the probe cannot, the other classes must be told well, and the warning is a question.
    """
    if not _matters(dataset, spec):
        return []
    rows = np.arange(min(len(dataset.holdout), MOST_IMAGES))
    truth = np.array(dataset.holdout.labels[rows], dtype=np.int64)

    def seen(net: Callable[[Tensor], Tensor]) -> Ints:
        found = outputs(net, dataset.holdout, spec, device=device, rows=rows)
        return np.concatenate([logits.argmax(1).cpu().numpy() for _, logits in found])

    plain, mirrored = seen(network), seen(lambda images: network(images.flip(3)))
    if note := _loss_note(plain == truth, mirrored == truth, "the network", "it is mirrored"):
        return [note]
    pair = _coin_pair(plain, truth)
    if pair is None:
        return []
    train, held = (
        _Sample.of(each, spec, np.flatnonzero(np.isin(each.labels, pair))[:MOST_IMAGES])
        for each in (dataset.train, dataset.holdout)
    )
    own, others = np.isin(truth, pair), ~np.isin(truth, pair)
    share = float((plain == truth)[own].mean())
    named = " and ".join(repr(dataset.classes[number]) for number in pair)
    coin = f"the network tells {named} apart no better than a coin ({share:.0%} of {own.sum()} holdout images right)"
    if len(train) > 1 and (notes := _probe_notes(train, held, dataset.classes)):
        return [f"{notes[0]}; {coin}"]
    if others.any() and (plain == truth)[others].mean() >= TOLD:
        return [f"warning: {coin}, and the other classes well: if left and right tell these two apart, {REMEDY}"]
    return []


def _matters(dataset: Dataset, spec: AugmentSpec) -> bool:
    return spec.hflip > 0 and dataset.labelled and min(len(dataset.train), len(dataset.holdout)) > 1


@dataclass(frozen=True, eq=False)
class _Sample:
    """Features of images as they are and mirrored, float64 [n, features], and their classes int64 [n]."""

    plain: Tensor
    mirrored: Tensor
    labels: Tensor

    @staticmethod
    def of(split: Split, spec: AugmentSpec, rows: Ints) -> _Sample:
        filters = torch.randn(_FILTERS, 3, _WIDTH, _WIDTH, generator=torch.Generator().manual_seed(0))
        filters -= filters.mean(dim=(2, 3), keepdim=True)
        images = _small(split, spec, rows)
        labels = torch.from_numpy(np.array(split.labels[rows], dtype=np.int64))
        return _Sample(_features(images, filters), _features(images.flip(3), filters), labels)

    def __len__(self) -> int:
        return len(self.labels)


def _probe_notes(train: _Sample, held: _Sample, classes: Sequence[str]) -> list[str]:
    alone = _probe(train.plain, train.labels)
    both = _probe(torch.cat([train.plain, train.mirrored]), torch.cat([train.labels, train.labels]))
    truth, seen = held.labels.numpy(), alone(held.plain)
    if note := _loss_note(seen == truth, both(held.plain) == truth, "a linear probe", "mirrored images join its own"):
        return [note]
    found = _swapped_pair(seen, alone(held.mirrored), truth)
    if found is None:
        return []
    (a, b), swapped, n = found
    pair = f"{classes[a]!r} and {classes[b]!r}"
    return [f"{SIDES}: to a linear probe {swapped} of {n} images of {pair} change places when mirrored; {REMEDY}"]


def _loss_note(before: NDArray[np.bool_], after: NDArray[np.bool_], what: str, when: str) -> str:
    """Word the loss from one to the other on the same images, where it is far more than noise."""
    loss, lo, hi = paired_shares(int((before & ~after).sum()), int((after & ~before).sum()), len(before))
    if lo <= LOSS:
        return ""
    points = f"{100 * loss:.0f} points [{100 * lo:.0f}, {100 * hi:.0f}]"
    return f"{SIDES}: {what} loses {points} on the holdout when {when}; {REMEDY}"


def _swapped_pair(seen: Ints, mirrored: Ints, truth: Ints) -> tuple[tuple[int, int], int, int] | None:
    """Find the two classes whose images change places in the mirror, with how many of how many do.

    The chance is that of the sign test, times the number of pairs.
    """
    lost: Counter[tuple[int, int]] = Counter()
    for label, one, other in zip(truth.tolist(), seen.tolist(), mirrored.tolist(), strict=True):
        if label == one != other:
            lost[min(label, other), max(label, other)] += 1
        elif label == other != one:
            lost[min(label, one), max(label, one)] -= 1
    if not lost:
        return None
    pair, more = lost.most_common(1)[0]
    here = np.isin(truth, pair) & np.isin(seen, pair) & np.isin(mirrored, pair)
    changed, n = int((here & (seen != mirrored)).sum()), int(np.isin(truth, pair).sum())
    classes = len(np.unique(truth))
    chance = sum(math.comb(changed, k) for k in range((changed + more) // 2, changed + 1)) / 2**changed
    rare = chance * classes * (classes - 1) / 2 < ACCIDENT
    return (pair, (changed + more) // 2, n) if rare and more >= SWAPPED * n else None


def _coin_pair(seen: Ints, truth: Ints) -> tuple[int, int] | None:
    """Find the two classes that are confused most, if they are told from each other as by a coin, yet from others."""
    pairs = zip(truth.tolist(), seen.tolist(), strict=True)
    wrong = Counter((min(pair), max(pair)) for pair in pairs if pair[0] != pair[1])
    if not wrong:
        return None
    pair, confused = wrong.most_common(1)[0]
    own = np.isin(truth, pair)
    inside = int((own & np.isin(seen, pair)).sum())
    fair = abs(confused / max(inside, 1) - 0.5) <= 1 / math.sqrt(max(inside, 1))  # two standard errors
    return pair if inside >= LEAST_CONFUSED and inside >= TOLD * own.sum() and fair else None


def _small(split: Split, spec: AugmentSpec, rows: Ints) -> Tensor:
    """Return images of a split at 32 px, each with mean 0 and deviation 1: float32 [n, 3, 32, 32]."""
    made = [torch.zeros(0, 3, _SIDE, _SIDE)]
    for start in range(0, len(rows), 64):
        images = eval_batch(split.pixels[rows[start : start + 64]], spec)
        images = functional.adaptive_avg_pool2d(images, _SIDE)
        middle, spread = images.mean(dim=(1, 2, 3), keepdim=True), images.std(dim=(1, 2, 3), keepdim=True)
        made.append((images - middle) / (spread + 1e-3))
    return torch.cat(made)


def _features(images: Tensor, filters: Tensor) -> Tensor:
    """Return the pooled answers of the filters, of both signs: float64 [n, features]."""
    found = []
    for part in torch.split(images, 128):
        answers = functional.conv2d(part, filters, padding=_WIDTH // 2)
        pooled = [functional.adaptive_avg_pool2d(functional.relu(s * answers), _CELLS) for s in (1, -1)]
        found.append(torch.cat(pooled, dim=1).flatten(1))
    return torch.cat(found).double()


def _probe(features: Tensor, labels: Tensor) -> Callable[[Tensor], Ints]:
    """Fit a ridge regression to the classes; return what names the class of features [n, features]."""
    middle, spread = features.mean(0), features.std(0) + 1e-6
    x = torch.cat([(features - middle) / spread, torch.ones(len(features), 1)], dim=1)
    y = functional.one_hot(labels, int(labels.max()) + 1).double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * len(x))
    weights: Tensor = torch.linalg.solve(gram, x.T @ y)

    def classes_of(asked: Tensor) -> Ints:
        ones = torch.ones(len(asked), 1)
        found: Ints = (torch.cat([(asked - middle) / spread, ones], dim=1) @ weights).argmax(1).numpy()
        return found

    return classes_of
