"""Batch-norm statistics of a child, estimated anew where its net differs from its parent's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas.inherit.slice import is_whole
from nas.labels.reader import LabelReader
from nas.train.norms import estimate
from space.family import Slice

BATCHES = 8
"""How many batches the statistics are averaged over."""


def recalibrate(
    model: nn.Module,
    parent_state: Mapping[str, torch.Tensor],
    slicing: Mapping[str, Slice],
    batches: Iterable[torch.Tensor],
    device: str,
    *,
    new_input: bool = False,
) -> int:
    """Estimate batch-norm statistics anew behind the first change; returns of how many norms.

    `model` holds what `slicing` took from `parent_state` (only its shapes are read). `batches`: inputs float32 [B, C,
    S, S]; none is drawn where nothing changed, and then the model is left alone. `new_input` (images of another size,
    say) counts as a change before the first layer. `nas.train.norms.estimate` does the rest. Modules must be declared
    in the order of the forward pass, as in `first_change`.
    """
    keys = list(model.state_dict())
    start = 0 if new_input else first_change(model.state_dict(), parent_state, slicing)
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and keys.index(f"{name}.running_mean" if name else "running_mean") >= start
    ]
    if not norms:
        return 0
    estimate(model, norms, batches, device)
    return len(norms)


def first_change(
    state: Mapping[str, torch.Tensor], parent_state: Mapping[str, torch.Tensor], slicing: Mapping[str, Slice]
) -> int:
    """Find the first tensor of a child's state dict that differs from the parent's; n if none.

    That is the first without a whole copy of the parent's tensor of the same name, or the place at which one of the
    parent's has no part in the child. All batch norms that a change can reach lie behind it, as long as modules are
    declared in the order of the forward pass.
    """
    keys = list(state)
    shapes = {key: tuple(tensor.shape) for key, tensor in parent_state.items()}
    changed = (i for i, key in enumerate(keys) if not is_whole(key, slicing.get(key), tuple(state[key].shape), shapes))
    used = {one.source for one in slicing.values()}
    dropped = (_place(key, keys) for key in parent_state if key not in used)
    return min([*islice(changed, 1), *dropped], default=len(keys))


def _place(dropped: str, keys: Sequence[str]) -> int:
    """Find where a tensor that only the parent has would stand among the child's.

    By the longest path that they share: behind its lower numbers, before anything else there.
    """
    parts = dropped.split(".")
    for length in range(len(parts) - 1, -1, -1):
        inside = [i for i, key in enumerate(keys) if key.split(".")[:length] == parts[:length]]
        if not inside:
            continue
        at, number = inside[0], parts[length]
        if number.isdecimal():
            for i in inside:
                name = keys[i].split(".")[length]
                if name.isdecimal() and int(name) < int(number):
                    at = i + 1
        return at
    return 0


def first_inputs(reader: LabelReader, epoch: int, count: int = BATCHES) -> Iterator[torch.Tensor]:
    """Yield the inputs of an epoch's first batches, without labels or loaders."""
    for rows in reader.batch_rows(epoch)[:count]:
        yield reader.inputs(epoch, rows)
