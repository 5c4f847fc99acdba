"""How good a model is on a split: top-1, top-5 and by class, each with a standard error."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from nas.core.progress import Tick, no_tick
from nas.core.table import Writer
from nas.data import Split
from nas.data.augment.outputs import outputs
from nas.data.augment.spec import AugmentSpec
from nas.train.distributed import Ranks

CLASS_COLUMNS = ("class", "n", "top1", "top1_se", "top5", "top5_se", "most_taken_for")
ALONE = Ranks(0, 1, "cpu")


@dataclass(frozen=True, eq=False)
class Outcome:
    """Per image of a split, in its order: the cross-entropy float32 [n] in nats, how many classes
    came before the true one, the class that came first and the true one, int64 [n]."""

    loss: NDArray[np.float32]
    place: NDArray[np.int64]
    predicted: NDArray[np.int64]
    truth: NDArray[np.int64]

    def top(self, k: int) -> tuple[float, float]:
        """Return the share of images whose class is among the k first, and its standard error."""
        return share_se(self.place < k)

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.loss.mean(dtype=np.float64))

    def by_class(self, classes: Sequence[str]) -> str:
        """Draw a table by class, as CSV with `CLASS_COLUMNS`."""
        out = io.StringIO()
        writer = Writer(out)
        writer.writerow(CLASS_COLUMNS)
        for number, name in enumerate(classes):
            at = self.truth == number
            wrong = self.predicted[at & (self.predicted != number)]
            most = classes[int(np.bincount(wrong).argmax())] if len(wrong) else ""
            tops = [f"{x:.6f}" for k in (1, 5) for x in share_se(self.place[at] < k)]
            writer.writerow([name, int(at.sum()), *(tops if at.any() else [""] * 4), most])
        return out.getvalue()


def share_se(hits: NDArray[np.bool_]) -> tuple[float, float]:
    """Return a share and its binomial standard error; 0 and 0 of nothing."""
    n = len(hits)
    share = float(hits.mean()) if n else 0.0
    return share, math.sqrt(share * (1 - share) / n) if n else 0.0


def evaluate(
    network: Callable[[torch.Tensor], torch.Tensor],
    split: Split,
    spec: AugmentSpec,
    *,
    num_classes: int,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    tick: Tick = no_tick,
) -> Outcome:
    """Evaluate on a labelled split, each process on its share of the images; all get the whole.

    A module is put through train() into eval mode, which drops what it may have cached of older
    weights, and stays there. Float32. A class that ties with the true one does not come before it;
    outputs that are not numbers are wrong.
    """
    if isinstance(network, nn.Module):
        network.train().eval()
    n = len(split)
    # One table for all processes to add up: each row is filled by one of them.
    table = torch.zeros((n, 3), dtype=torch.float64, device=device)
    mine = np.arange(ranks.rank, n, ranks.world)
    labels = torch.from_numpy(np.array(split.labels, dtype=np.int64))
    for rows, logits in outputs(network, split, spec, device=device, rows=mine):
        truth = labels[torch.from_numpy(rows)].to(device)
        assert logits.shape[1] == num_classes, (logits.shape, num_classes)
        theirs = logits.gather(1, truth[:, None])
        found = torch.stack(
            [
                functional.cross_entropy(logits, truth, reduction="none").double(),
                (~(logits <= theirs)).sum(1).double(),  # what is not a number comes before all
                logits.argmax(1).double(),
            ],
            dim=1,
        )
        table[torch.from_numpy(rows).to(device)] = found
        tick(float(len(rows)))
    whole = ranks.sum(table).cpu().numpy()
    return Outcome(
        whole[:, 0].astype(np.float32),
        whole[:, 1].astype(np.int64),
        whole[:, 2].astype(np.int64),
        np.asarray(split.labels, dtype=np.int64),
    )
