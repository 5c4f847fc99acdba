"""Inputs by recipe, batch after batch, here or in loader processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nas.data.augment.spec import AugmentSpec
from nas.data.augment.views import Recipe, Views, make_augmenter


class Inputs(Dataset[Tensor]):
    """Makes whole batches, here or in loader workers, which are sent nothing but recipes: what a
    worker holds does not grow with the data set."""

    def __init__(self, pixels: Any, spec: AugmentSpec, device: str) -> None:
        self._pixels, self._spec, self._device = pixels, spec, device
        self._views: Views | None = None

    def __getitem__(self, recipe: Any) -> Tensor:
        if self._views is None:
            augmenter = make_augmenter(self._spec, self._device)
            self._views = Views(self._pixels, augmenter, self._spec)
        return self._views.inputs(recipe)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_views": None}
        name = getattr(self._pixels, "filename", None)
        if name is not None and _mapped(name).shape == self._pixels.shape:
            state["_pixels"] = str(name)  # mapped pixels go by path
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["_pixels"], str):
            state["_pixels"] = _mapped(state["_pixels"])
        self.__dict__.update(state)


def _mapped(name: Any) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.load(name, mmap_mode="r", allow_pickle=False)
    return pixels


def stream(inputs: Inputs, recipes: Sequence[Recipe], workers: int) -> Iterator[Tensor]:
    """Make the inputs of recipes in turn, with `workers` loader processes ahead of them (0: here).

    Each float32 [n, 3, s, s]; the same bits for any number of workers.
    """
    if workers == 0:
        return (inputs[recipe] for recipe in recipes)
    loader: DataLoader[Tensor] = DataLoader(
        inputs,
        batch_size=None,
        sampler=cast(Any, recipes),
        num_workers=workers,
        multiprocessing_context="spawn",
        generator=torch.Generator(),  # the loader's own, so that the global one stays put
    )
    return iter(loader)
