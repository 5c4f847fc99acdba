"""From stored pixels to a network's inputs: augmented views, mixed in pairs on request.

`Inputs` makes whole batches, `stream` makes them ahead in loader processes, and `outputs` is the
one loop of every evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nas.data import Split
from nas.data.augment.batched_engine import BatchedAugmenter
from nas.data.augment.mixing import mix, partners
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.timm_engine import TimmAugmenter, eval_batch

Rows = NDArray[np.int64]
NO_PARTNER = -1
"""The partner of an image that is not mixed."""
EVAL_BATCH = 64


@dataclass(frozen=True, eq=False)
class ViewSpec:
    """What makes n inputs: rows of the pixels int64 [n] and their codes uint64 [n].

    With mixing also the partners' rows (-1: unmixed) and codes.
    """

    rows: Rows
    codes: NDArray[np.uint64]
    partner_rows: Rows | None = None
    partner_codes: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The inputs of an epoch, one for each record of a label store's key table, in its order.

    `rows` int64 [n] are -1 for images that are not in the data.
    """

    rows: Rows
    codes: NDArray[np.uint64]
    partner: Rows | None

    def of(self, at: Rows) -> ViewSpec:
        """Select records."""
        if self.partner is None:
            return ViewSpec(self.rows[at], self.codes[at])
        other = self.partner[at]
        rows = np.where(other == NO_PARTNER, NO_PARTNER, self.rows[other])
        return ViewSpec(self.rows[at], self.codes[at], rows, self.codes[other])

    def whole(self) -> NDArray[np.bool_]:
        """Return which records have all their images in the data: bool [n]."""
        here = self.rows >= 0
        if self.partner is None:
            return here
        found: NDArray[np.bool_] = here & ((self.partner == NO_PARTNER) | here[self.partner])
        return found


def make_plan(codes: NDArray[np.uint64], rows: Rows, spec: AugmentSpec) -> EpochPlan:
    """Plan an epoch: `codes` of a store's whole key table, and the pixels' `rows` (-1: gone)."""
    return EpochPlan(rows, codes, partners(codes) if spec.mixes else None)


def make_augmenter(spec: AugmentSpec, device: str = "cpu") -> TimmAugmenter | BatchedAugmenter:
    """Make the engine of a specification: `batch(pixels, codes)` takes uint8 [n, S, S, 3] and n
    codes to float32 [n, 3, s, s], on `device` for the batched engine, else on the CPU."""
    return BatchedAugmenter(spec, device) if spec.engine == "batched" else TimmAugmenter(spec)


class Inputs(Dataset[Tensor]):
    """Makes whole batches from `pixels` uint8 [n, S, S, 3], here or in loader workers.

    Workers are sent view specifications only: what one holds does not grow with the data set.
    """

    def __init__(self, pixels: Any, spec: AugmentSpec, device: str = "cpu") -> None:
        self._pixels, self._spec, self._device = pixels, spec, device
        self._augmenter: TimmAugmenter | BatchedAugmenter | None = None

    def __getitem__(self, wanted: ViewSpec) -> Tensor:
        """Make inputs, float32 [n, 3, s, s]; a view that several of them need is made once."""
        if wanted.partner_rows is None or wanted.partner_codes is None:
            return self._views(wanted.rows, wanted.codes)
        mixed = wanted.partner_rows != NO_PARTNER
        rows = np.concatenate([wanted.rows, wanted.partner_rows[mixed]])
        codes = np.concatenate([wanted.codes, wanted.partner_codes[mixed]])
        unique, first, back = np.unique(rows, return_index=True, return_inverse=True)
        made = self._views(unique, codes[first])
        own = made[torch.from_numpy(back[: len(wanted)])]
        others = made[torch.from_numpy(back[len(wanted) :])]
        at = torch.from_numpy(np.flatnonzero(mixed))
        pairs = wanted.codes[mixed].tolist(), wanted.partner_codes[mixed].tolist()
        own[at] = mix(own[at], others, *pairs, self._spec)
        return own

    def _views(self, rows: Rows, codes: NDArray[np.uint64]) -> Tensor:
        if self._augmenter is None:
            self._augmenter = make_augmenter(self._spec, self._device)
        return self._augmenter.batch(self._pixels[rows], codes.tolist())

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_augmenter": None}
        name = getattr(self._pixels, "filename", None)
        if name is not None and _mapped(name).shape == self._pixels.shape:
            state["_pixels"] = str(name)  # mapped pixels are sent by path
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["_pixels"], str):
            state["_pixels"] = _mapped(state["_pixels"])
        self.__dict__.update(state)


def _mapped(name: Any) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.load(name, mmap_mode="r", allow_pickle=False)
    return pixels


def stream(inputs: Inputs, wanted: Sequence[ViewSpec], workers: int) -> Iterator[Tensor]:
    """Make batches in turn, with `workers` loader processes ahead of them (0: here).

    Each is float32 [n, 3, s, s], the same bits for any number of workers.
    """
    if workers == 0:
        return (inputs[one] for one in wanted)
    loader: DataLoader[Tensor] = DataLoader(
        inputs,
        batch_size=None,
        sampler=cast(Any, wanted),
        num_workers=workers,
        multiprocessing_context="spawn",
        generator=torch.Generator(),  # the loader's own, so that the global one stays put
    )
    return iter(loader)


def outputs(
    network: Callable[[Tensor], Tensor],
    split: Split,
    spec: AugmentSpec,
    *,
    device: str = "cpu",
    rows: Rows | None = None,
    batch_size: int = EVAL_BATCH,
) -> Iterator[tuple[Rows, Tensor]]:
    """Evaluate a network on evaluation inputs of a split, of all rows or of those given, without gradients.

    Yields rows int64 [n] and outputs float32 [n, ...] on its device, batch after batch. The caller sets the mode.
    """
    every = np.arange(len(split)) if rows is None else rows
    for start in range(0, len(every), batch_size):
        some = every[start : start + batch_size]
        inputs = eval_batch(split.pixels[some], spec)
        placed = inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
        with torch.no_grad():
            found = network(placed).float()
        yield some, found
