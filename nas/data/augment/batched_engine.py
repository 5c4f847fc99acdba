"""Augmentation of whole batches with torch, on the device that trains.

Every random number of an image is a hash of its code and a position (splitmix64): an image looks the same in any batch.
Crop, resize and flip are two passes with Pillow's bicubic, antialiased weights, in floats, as sums tap by tap: in a
matrix product the last bits would depend on the batch and on TF32. Colours follow (brightness, contrast, saturation, on
[0, 255]), then erasing with normal noise, as in timm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.data.augment.spec import AugmentSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Boxes = tuple[Ints, Ints, Ints, Ints]

_ATTEMPTS = 10  # as torchvision's crop and timm's erasing have
_CROP, _PLACE, _FLIP, _COLOR, _ERASE, _BOX, _NOISE = 0, 20, 22, 23, 26, 27, 64
"""Positions of the hash: what is drawn from where."""
_ERASE_AREA, _ERASE_ASPECT = (0.02, 1 / 3), 0.3
_TABLED = 64  # a side in pixels: up to it the weights of all stretches are computed once, 3 MB
_GROUP_PIXELS = 1 << 17  # at a time on a CPU, so that they stay in its cache
_GROUP = 512  # images at a time on other devices
_GREY = (0.299, 0.587, 0.114)


def uniforms(codes: NDArray[np.uint64], positions: NDArray[np.uint64]) -> Floats:
    """Hash codes [n] at positions [m] to numbers in [0, 1): float64 [n, m].

    splitmix64 (Steele, Lea and Flood, 2014) of the code, started anew for each position.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        z = codes[:, None] + (positions[None] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    found: Floats = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


class BatchedAugmenter:
    """Applies a specification of engine "batched" to stored pixels, on `device`."""

    def __init__(self, spec: AugmentSpec, device: str = "cpu") -> None:
        assert spec.engine == "batched"
        self.spec, self.device = spec, device
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def batch(self, pixels: NDArray[np.uint8], codes: Sequence[int]) -> Tensor:
        """Augment images, uint8 [n, S, S, 3] -> float32 [n, 3, img_size, img_size]."""
        drawn = np.array([int(code) for code in codes], dtype=np.uint64)
        size = self.spec.img_size
        cpu = torch.device(self.device).type == "cpu"
        group = max(1, _GROUP_PIXELS // pixels.shape[1] ** 2) if cpu else _GROUP
        images = torch.empty(len(pixels), 3, size, size, device=self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for at in range(0, len(pixels), group):
                rows = slice(at, at + group)
                images[rows] = self._made(pixels[rows], drawn[rows])
        return images

    def _made(self, pixels: NDArray[np.uint8], codes: NDArray[np.uint64]) -> Tensor:
        u = uniforms(codes, np.arange(_NOISE, dtype=np.uint64))
        images = self._coloured(self._resized(pixels, u), u)
        images = images.div_(255.0).sub_(self._mean).div_(self._std)
        self._erase(images, u, codes)
        return images

    def _resized(self, pixels: NDArray[np.uint8], u: Floats) -> Tensor:
        n, side, size = len(pixels), pixels.shape[1], self.spec.img_size
        top, left, high, wide = _crops(u, side, self.spec)
        lines = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        images = _pass(lines.view(n, side, side * 3), *_weights(top, high, side, size))
        images = images.view(n, size, side, 3).permute(0, 2, 3, 1).reshape(n, side, 3 * size)
        first, taps = _weights(left, wide, side, size)
        flip = u[:, _FLIP] < self.spec.hflip
        first[flip], taps[flip] = first[flip, ::-1], taps[flip, ::-1]
        images = _pass(images, first, taps).view(n, size, 3, size).permute(0, 2, 3, 1)
        return images.contiguous().clamp_(0.0, 255.0)

    def _coloured(self, images: Tensor, u: Floats) -> Tensor:
        strength = self.spec.color_jitter
        if not strength:
            return images
        low = max(0.0, 1.0 - strength)
        factors = low + u[:, _COLOR : _COLOR + 3] * (1.0 + strength - low)
        bright, contrast, saturation = (
            torch.from_numpy(factors[:, at].astype(np.float32)).view(-1, 1, 1, 1).to(self.device) for at in range(3)
        )
        images = (images * bright).clamp_(0.0, 255.0)
        # Whole numbers: their sum does not depend on the order in which a batch is summed.
        grey = (_grey(images) * 256.0).round_().to(torch.int64).sum(dim=(1, 2, 3))
        middle = (grey.float() / (256.0 * self.spec.img_size**2)).view(-1, 1, 1, 1)
        images = ((images - middle) * contrast + middle).clamp_(0.0, 255.0)
        grey_image = _grey(images)
        return ((images - grey_image) * saturation + grey_image).clamp_(0.0, 255.0)

    def _erase(self, images: Tensor, u: Floats, codes: NDArray[np.uint64]) -> None:
        size = self.spec.img_size
        for row in np.flatnonzero(u[:, _ERASE] < self.spec.erase_prob):
            box = _erased(u[row], size)
            if box is None:
                continue
            top, left, high, wide = box
            noise = _normal(codes[row : row + 1], 3 * high * wide).reshape(3, high, wide)
            images[row, :, top : top + high, left : left + wide] = torch.from_numpy(noise).to(self.device)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (red * _GREY[0] + green * _GREY[1] + blue * _GREY[2])[:, None]


def _crops(u: Floats, side: int, spec: AugmentSpec) -> Boxes:
    """Choose a box an image as torchvision's RandomResizedCrop does: the first of ten attempts that
    fits, or the middle. Returns top, left, height, width: int64 [n] each."""
    area = side * side * (spec.scale[0] + u[:, _CROP : _CROP + 10] * (spec.scale[1] - spec.scale[0]))
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    aspect = np.exp(low + u[:, _CROP + 10 : _CROP + 20] * (high - low))
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths >= 1) & (widths <= side) & (heights >= 1) & (heights <= side)
    first, any_ = fits.argmax(1), fits.any(1)
    rows = np.arange(len(u))
    wide, tall = widths[rows, first], heights[rows, first]
    # A square image whose ratio is out of bounds: the widest or highest box of the nearest ratio.
    nearest = min(max(1.0, spec.ratio[0]), spec.ratio[1])
    wide = np.where(any_, wide, max(1.0, round(side * min(nearest, 1.0))))
    tall = np.where(any_, tall, max(1.0, round(side / max(nearest, 1.0))))
    top = np.where(any_, np.floor(u[:, _PLACE] * (side - tall + 1)), (side - tall) // 2)
    left = np.where(any_, np.floor(u[:, _PLACE + 1] * (side - wide + 1)), (side - wide) // 2)
    boxes = (part.astype(np.int64) for part in (top, left, tall, wide))
    return next(boxes), next(boxes), next(boxes), next(boxes)


def _pass(lines: Tensor, first: Ints, taps: NDArray[np.float32]) -> Tensor:
    """Weigh lines [n, S, k] tap by tap, in a fixed order: float32 [n, s, k]."""
    n, side, length = lines.shape
    at = torch.from_numpy(first + np.arange(n)[:, None] * side).flatten().to(lines.device)
    weights = torch.from_numpy(taps).to(lines.device)
    flat = lines.reshape(n * side, length).float()
    total = torch.zeros((), device=lines.device)
    for tap in range(taps.shape[-1]):
        part = flat.index_select(0, at + tap).view(n, -1, length)
        total = part.mul_(weights[:, :, tap, None]).add_(total)
    return total


def _weights(start: Ints, length: Ints, side: int, size: int) -> tuple[Ints, NDArray[np.float32]]:
    """Weights of a resize of stretches [start, start + length) of `side` pixels to `size`: the
    first pixel int64 [n, size] that each looks at, and the weights from there on, float32
    [n, size, taps], bicubic (a = -0.5) and antialiased as Pillow's."""
    if side > _TABLED:
        return _computed(start, length, side, size)
    first, taps = _table(side, size)
    at = start * side - start * (start - 1) // 2 + length - 1
    return first[at], taps[at]


@lru_cache(maxsize=4)
def _table(side: int, size: int) -> tuple[Ints, NDArray[np.float32]]:
    """Compute the weights of every stretch of a short side, by start and then by length."""
    pairs = [(first, count) for first in range(side) for count in range(1, side - first + 1)]
    start, length = np.array(pairs).T
    return _computed(start, length, side, size)


def _computed(start: Ints, length: Ints, side: int, size: int) -> tuple[Ints, NDArray[np.float32]]:
    step = (length / size)[:, None]
    wider = np.maximum(step, 1.0)
    centre = start[:, None] + (np.arange(size)[None] + 0.5) * step
    # As many as the longest stretch needs, so that sums do not depend on a batch's other images.
    count = min(side, math.ceil(4 * max(side / size, 1.0)))
    first = np.floor(centre - 2.0 * wider + 0.5).clip(0, side - count).astype(np.int64)
    pixel = first[..., None] + np.arange(count)
    x = np.abs((pixel + 0.5 - centre[..., None]) / wider[..., None])
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    kernel = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    kernel = np.where(inside, kernel, 0.0)
    return first, (kernel / kernel.sum(-1, keepdims=True)).astype(np.float32)


def _erased(u: Floats, size: int) -> tuple[int, int, int, int] | None:
    """Choose the box to erase as timm does: the first of ten attempts that is smaller than the
    image. Returns top, left, height, width."""
    for attempt in range(_ATTEMPTS):
        draw = u[_BOX + 2 * attempt : _BOX + 2 * attempt + 2]
        area = size * size * (_ERASE_AREA[0] + draw[0] * (_ERASE_AREA[1] - _ERASE_AREA[0]))
        aspect = math.exp(math.log(_ERASE_ASPECT) * (1.0 - 2.0 * float(draw[1])))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < high < size and 0 < wide < size:
            place = u[_BOX + 2 * _ATTEMPTS : _BOX + 2 * _ATTEMPTS + 2]
            top = int(place[0] * (size - high + 1))
            return top, int(place[1] * (size - wide + 1)), high, wide
    return None


def _normal(code: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """Hash a code to `count` normal numbers (Box and Muller, 1958): float32 [count]."""
    pairs = -(-count // 2)
    positions = np.arange(_NOISE, _NOISE + 2 * pairs, dtype=np.uint64)
    u = uniforms(code, positions)[0]
    radius = np.sqrt(-2.0 * np.log1p(-u[:pairs]))
    angle = 2.0 * math.pi * u[pairs:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    noise: NDArray[np.float32] = both[:count].astype(np.float32)
    return noise
