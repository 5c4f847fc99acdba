"""Augmentation image by image with timm's own transforms, and the evaluation input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nas.data.augment.spec import AugmentSpec, borrowed_generators, seed_all, timm_transforms


class TimmAugmenter:
    """Applies a specification to stored pixels; the code decides every random choice."""

    def __init__(self, spec: AugmentSpec) -> None:
        assert spec.engine == "timm", "the batched engine has an augmenter of its own"
        self.spec = spec
        geometry, policy, final = timm_transforms(spec)
        self._on_image: Sequence[Callable[[Any], Any]] = (*geometry.transforms, *policy.transforms)
        # The last one erases; turning into a tensor and normalising is done batch by batch here.
        self._erase: Callable[[Any], Any] | None = final.transforms[-1] if spec.erase_prob > 0 else None

    def batch(self, pixels: NDArray[np.uint8], codes: Sequence[int]) -> torch.Tensor:
        """Augment images one by one, uint8 [n, S, S, 3] -> float32 [n, 3, img_size, img_size]."""
        views = np.empty((len(pixels), self.spec.img_size, self.spec.img_size, 3), dtype=np.uint8)
        erased: list[torch.Tensor] = []
        with borrowed_generators():
            for row, code in enumerate(codes):
                seed_all(int(code))
                image: Any = Image.fromarray(pixels[row])
                for transform in self._on_image:
                    image = transform(image)
                views[row] = image
                if self._erase is not None:  # draws from where this image's transforms stopped
                    erased.append(self._erase(_normalised(views[row : row + 1], self.spec)[0]))
        return torch.stack(erased) if erased else _normalised(views, self.spec)


def _normalised(pixels: NDArray[np.uint8], spec: AugmentSpec) -> torch.Tensor:
    """Scale and normalise like torchvision, uint8 [n, H, W, 3] -> float32 [n, 3, H, W]."""
    inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    mean = torch.tensor(spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(spec.std).view(1, 3, 1, 1)
    return inputs.to(torch.float32).div_(255).sub_(mean).div_(std)


def eval_batch(pixels: NDArray[np.uint8], spec: AugmentSpec) -> torch.Tensor:
    """Take the centre and normalise, as timm evaluates.

    uint8 [n, S, S, 3] -> float32 [n, 3, img_size, img_size].
    """
    side = pixels.shape[1]
    start = round((side - spec.img_size) / 2.0)
    end = start + spec.img_size
    return _normalised(pixels[:, start:end, start:end], spec)
