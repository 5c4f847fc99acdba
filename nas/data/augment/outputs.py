"""What a network says of a split's images, as evaluated: the one loop of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.data import Split
from nas.data.augment.spec import AugmentSpec, eval_batch

EVAL_BATCH = 64


def outputs(
    network: Callable[[Tensor], Tensor],
    split: Split,
    spec: AugmentSpec,
    *,
    device: str = "cpu",
    rows: NDArray[np.int64] | None = None,
    batch_size: int = EVAL_BATCH,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Give rows int64 [n] with what a network says of their images, float32 [n, ...] on its device.

    Evaluation inputs, without gradients, of all rows or of those given. A module's mode is the
    caller's affair.
    """
    every = np.arange(len(split)) if rows is None else rows
    for start in range(0, len(every), batch_size):
        some = every[start : start + batch_size]
        inputs = eval_batch(split.pixels[some], spec)
        placed = inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
        with torch.no_grad():
            said = network(placed).float()
        yield some, said
