"""From stored pixels to inputs: each image's own view, mixed with its partner's where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.data.augment.batched_engine import BatchedAugmenter
from nas.data.augment.mixing import mix, partners
from nas.data.augment.spec import Augmenter, AugmentSpec

Rows = NDArray[np.int64]
NOBODY = -1
"""The partner of an image that is mixed with none."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """What makes n inputs: rows of the pixels int64 [n] and their codes uint64 [n]; with mixing the
    partners' (row -1: unmixed)."""

    rows: Rows
    codes: NDArray[np.uint64]
    partner_rows: Rows | None = None
    partner_codes: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Plan:
    """An epoch's recipe of every record of a store's key table, in its order.

    `rows` int64 [n] are -1 for images that are not in the data.
    """

    rows: Rows
    codes: NDArray[np.uint64]
    partner: Rows | None

    def of(self, at: Rows) -> Recipe:
        """Give the recipes of records."""
        if self.partner is None:
            return Recipe(self.rows[at], self.codes[at])
        other = self.partner[at]
        alone = other == NOBODY
        rows = np.where(alone, NOBODY, self.rows[other])
        return Recipe(self.rows[at], self.codes[at], rows, self.codes[other])

    def whole(self) -> NDArray[np.bool_]:
        """Tell which records have all their images in the data: bool [n]."""
        here = self.rows >= 0
        if self.partner is None:
            return here
        found: NDArray[np.bool_] = here & ((self.partner == NOBODY) | here[self.partner])
        return found


def make_plan(codes: NDArray[np.uint64], rows: Rows, spec: AugmentSpec) -> Plan:
    """Plan an epoch: `codes` of a store's whole key table, and the pixels' `rows` (-1: gone)."""
    return Plan(rows, codes, partners(codes) if spec.mixes else None)


def make_augmenter(spec: AugmentSpec, device: str = "cpu") -> Augmenter | BatchedAugmenter:
    """Give what makes views of a specification: `batch(pixels, codes)` takes uint8 [n, S, S, 3] and
    n codes to float32 [n, 3, s, s], on `device` for the batched engine, else on the CPU."""
    return BatchedAugmenter(spec, device) if spec.engine == "batched" else Augmenter(spec)


class Views:
    """Makes inputs by recipe from `pixels` uint8 [n, S, S, 3], with what `make_augmenter` gives."""

    def __init__(self, pixels: Any, augmenter: Any, spec: AugmentSpec) -> None:
        self._pixels, self._augmenter, self._spec = pixels, augmenter, spec

    def inputs(self, recipe: Recipe) -> Tensor:
        """Make inputs, float32 [n, 3, s, s]; a view that several of them need is made once."""
        if recipe.partner_rows is None or recipe.partner_codes is None:
            return self._views(recipe.rows, recipe.codes)
        mixed = recipe.partner_rows != NOBODY
        rows = np.concatenate([recipe.rows, recipe.partner_rows[mixed]])
        codes = np.concatenate([recipe.codes, recipe.partner_codes[mixed]])
        unique, first, back = np.unique(rows, return_index=True, return_inverse=True)
        made = self._views(unique, codes[first])
        own = made[torch.from_numpy(back[: len(recipe)])]
        others = made[torch.from_numpy(back[len(recipe) :])]
        at = torch.from_numpy(np.flatnonzero(mixed))
        own[at] = mix(
            own[at],
            others,
            _ints(recipe.codes[mixed]),
            _ints(recipe.partner_codes[mixed]),
            self._spec,
        )
        return own

    def _views(self, rows: Rows, codes: NDArray[np.uint64]) -> Tensor:
        views: Tensor = self._augmenter.batch(self._pixels[rows], _ints(codes))
        return views


def _ints(codes: NDArray[np.uint64]) -> Sequence[int]:
    listed: list[int] = codes.tolist()
    return listed
