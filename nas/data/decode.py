"""From an image file's bytes to the pixels that are stored."""

from __future__ import annotations

import functools
import importlib
import io
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from nas.core.data_config import GREY_BITS
from nas.data.split import content_key

CROP = 0.875
"""Share of the stored side that evaluation crops (timm's default)."""
SIZES = (48, 96, 224)
_NARROWEST = 100
_NOT_READ = frozenset(("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "FITS", "IMT", "IPTC", "SPIDER"))
"""What Pillow would have Ghostscript run or cannot decode by itself, or finds in any file."""
_USUAL = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".tga", ".jp2", ".j2k"),
    *(".avif", ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Pillow's other endings, such as .rgb, .pcd, .im or .ras, name other things too: there the content decides."""
MOST_PIXELS = 89_478_485
"""Of an image, as in Pillow, which by itself only warns below twice as many."""
MOST_BYTES = 1 << 30
"""Of an image's file."""


def store_size_of(img_size: int) -> int:
    """Return which side is stored so that evaluation crops 87.5 % of it, in pixels."""
    return round(img_size / CROP)


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats that are decoded, by content: Pillow's and those of an installed pillow-heif."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NOT_READ))


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the endings of names that say what a file is: one that cannot be read is a broken image."""
    known = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known) & _USUAL


def is_image(path: Path) -> bool:
    """Return whether a file of any name is an image, by its first bytes and its header."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            head = file.read(32)
        signed = [f for f in formats() if (accept := Image.OPEN[f][1]) is not None and accept(head) is True]
        if not signed:
            return False
        with Image.open(path, formats=signed):
            return True
    except Exception:  # whatever is wrong, it is no image that could be used
        return False


def fitted(image: Image.Image, img_size: int, store_size: int) -> NDArray[np.uint8]:
    """Resize the shorter side to `store_size` (bicubic) and cut the centre: uint8 [S, S, 3].

    Stored pixels evaluate as timm evaluates the file: both share the centre of `img_size`. Raises ValueError for
    slivers.
    """
    return _window(as_rgb(image), img_size, store_size)


def _window(image: Image.Image, img_size: int, store_size: int) -> NDArray[np.uint8]:
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


def as_rgb(image: Image.Image, grey_bits: int = GREY_BITS) -> Image.Image:
    """Turn upright by EXIF and convert to RGB, of several frames the first; transparency is dropped, as in timm.

    Grey of 16 or 32 bits is scaled to 0..255: white is 2^grey_bits - 1, the same for all pictures of a data set, which
    so stay comparable; what is brighter is white. The exported snippet (`nas.export.hub`) does the same.

    Raises ValueError for numbers without a known white, and for a picture that is nothing but transparency.
    """
    image.load()  # a TIFF is turned by this, and says so afterwards
    with suppress(Exception):  # damaged EXIF raises almost anything
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white")
    if image.mode.startswith("I"):
        grey, white = np.asarray(image).astype(np.int64), 2**grey_bits - 1
        if grey.min() < 0:
            raise ValueError("negative pixels have no known black")
        image = Image.fromarray(((np.minimum(grey, white) * 255 + white // 2) // white).astype(np.uint8))
    rgb = image.convert("RGB")
    if image.has_transparency_data and _one_colour(rgb) and not _one_colour(image.convert("RGBA")):
        raise ValueError("its picture is in its transparency alone, which is dropped: flatten it")
    return rgb


def _one_colour(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool((pixels == pixels[0, 0]).all())


def deep_grey(path: Path) -> int | None:
    """Return how many bits, 8, 12, 16, ..., hold the brightest pixel of a picture of deep grey; None for any other."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with Image.open(path, formats=formats()) as image:
            if not image.mode.startswith("I"):
                return None
            refuse_bomb(image)
            brightest = int(np.asarray(image).max())
            return next(bits for bits in range(8, 33, 4) if brightest < 2**bits)
    except Exception:  # whatever is wrong is named when the image is decoded
        return None


def read_image(path: Path, img_size: int, store_size: int, grey_bits: int = GREY_BITS) -> tuple[str, NDArray[np.uint8]]:
    """Read one file: its key (a hash of its bytes) and its pixels. Raises whatever is wrong."""
    key, rgb = _opened(path, grey_bits)
    return key, _window(rgb, img_size, store_size)


def read_picture(path: Path, img_size: int, store_size: int, grey_bits: int) -> tuple[str, str, NDArray[np.uint8]]:
    """Read one file as `read_image` does: its key, a hash of all its decoded pixels, and those that are kept."""
    key, rgb = _opened(path, grey_bits)
    return key, as_rgb_key(rgb), _window(rgb, img_size, store_size)


def _opened(path: Path, grey_bits: int) -> tuple[str, Image.Image]:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, a device has no end
        raise ValueError("not a file")
    if about.st_size > MOST_BYTES:
        raise ValueError(f"{about.st_size:,} bytes are too many")
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        refuse_bomb(image)
        return content_key(data), as_rgb(image, grey_bits)


def refuse_bomb(image: Image.Image) -> None:
    """Raise ValueError for an image of too many pixels, before any of them is decoded."""
    wide, high = image.size
    if wide * high > MOST_PIXELS:
        raise ValueError(f"{wide}x{high} pixels are too many")


def why_broken(error: Exception) -> str:
    """Return in a few words why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "its pixels are too many"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:80] or type(error).__name__


def shown_name(name: str) -> str:
    """Show a file's name on one line that every terminal takes."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
        if not path.is_file():
            return None
        with Image.open(path, formats=formats()) as image:
            return image.size
    except Exception:  # whatever is wrong is named when the image is decoded
        return None


def as_rgb_key(image: Any) -> str:
    """Name an image that has no file of its own by its decoded pixels and size."""
    rgb = as_rgb(image)
    return content_key(repr(rgb.size).encode() + rgb.tobytes())
