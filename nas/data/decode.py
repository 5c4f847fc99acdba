"""From an image file's bytes to the pixels that are stored."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.data.cuts import content_key

CROP = 0.875
"""Share of the stored side that evaluation looks at (timm's default)."""
SIZES = (48, 96, 224)
_NARROWEST = 100


def store_size_of(img_size: int) -> int:
    """Say which side is stored so that evaluation crops 87.5 % of it, in pixels."""
    return round(img_size / CROP)


def fitted(image: Image.Image, img_size: int, store_size: int) -> NDArray[np.uint8]:
    """Resize the shorter side to `store_size` (bicubic) and cut the centre: uint8 [S, S, 3].

    The centre of `img_size` of it is the centre of `img_size` of the resized image, so stored
    pixels evaluate as timm evaluates the file. Raises ValueError for slivers.
    """
    image = image.convert("RGB")  # like timm and torchvision, which do not turn by EXIF either
    wide, high = image.size
    short, long = min(wide, high), max(wide, high)
    if long > _NARROWEST * short:
        raise ValueError(f"{wide}x{high} pixels are a sliver")
    other = int(store_size * long / short)
    size = (store_size, other) if wide <= high else (other, store_size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (_start(side, img_size, store_size) for side in image.size)
    return np.asarray(image.crop((left, top, left + store_size, top + store_size)))


def _start(side: int, img_size: int, store_size: int) -> int:
    """Place the stored window so that the centre of the centre is the centre, rounding and all."""
    start = round((side - img_size) / 2.0) - round((store_size - img_size) / 2.0)
    return min(max(start, 0), side - store_size)


def read_image(path: Path, img_size: int, store_size: int) -> tuple[str, NDArray[np.uint8]]:
    """Read one file: its key (a hash of its bytes) and its pixels. Raises whatever is wrong."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        _refuse_bomb(image)
        return content_key(data), fitted(image, img_size, store_size)


def _refuse_bomb(image: Image.Image) -> None:
    """Pillow only warns below twice its limit, which is memory enough to end a run."""
    wide, high = image.size
    if Image.MAX_IMAGE_PIXELS is not None and wide * high > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{wide}x{high} pixels are too many")


def chosen_img_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, str]:
    """Choose the largest of 48, 96 and 224 that the median image's shorter side fills.

    Returns it with a line for the user.
    """
    shorter = sorted(min(size) for size in sizes)
    if not shorter:
        return SIZES[0], f"image size {SIZES[0]} px (no image could be looked at)"
    median = shorter[len(shorter) // 2]
    fits = max([size for size in SIZES if size <= median], default=SIZES[0])
    return fits, f"image size {fits} px, since the median image's shorter side has {median} px"


def header_size(path: Path) -> tuple[int, int] | None:
    """Read an image's width and height from its header; None if there is none."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # whatever is wrong is named when the image is decoded
        return None


def as_rgb_key(image: Any) -> str:
    """Name an image that has no file of its own by its decoded pixels and size."""
    rgb = image.convert("RGB")
    return content_key(repr(rgb.size).encode() + rgb.tobytes())
