"""scikit-learn's 1,797 handwritten digits, 8x8 pixels, enlarged to the size asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from nas.core.progress import Tick
from nas.data.dataset import DataSpec
from nas.data.pixels import Pool, Source
from nas.data.split import choose, content_key

DEFAULT_IMG_SIZE = 48
VERSION = 1
"""Of the scaling below: another one is another data set."""
IMAGES = 1797


def digits(spec: DataSpec) -> Source:
    """Describe the set: ten classes, grey levels 0..16 scaled to 0..255, bicubic, RGB by copy."""
    size = spec.img_size or DEFAULT_IMG_SIZE

    def fill(pool: Pool, tick: Tick) -> None:
        # Only the building process needs scikit-learn, and only once.
        from sklearn.datasets import load_digits

        table = load_digits()
        grey = np.round(table.images * (255.0 / 16.0)).astype(np.uint8)
        labels = np.asarray(table.target, dtype=np.int64)
        keys = [content_key(image.tobytes()) for image in grey]
        for row in _wanted(keys, labels, spec.proxy_images):
            image = Image.fromarray(grey[row]).resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.repeat(np.asarray(image)[:, :, None], 3, axis=2)
            pool.add(keys[row], int(labels[row]), "any", pixels, f"digit {row}")
            tick(1.0)

    return Source(
        name="digits",
        classes=tuple("0123456789"),
        img_size=size,
        store_size=size,
        hflip=False,
        identity={"digits": VERSION, "proxy_images": spec.proxy_images},
        decoding=f"digits {VERSION}",
        count=IMAGES,
        fill=fill,
    )


def _wanted(keys: Sequence[str], labels: np.ndarray, proxy_images: int | None) -> Sequence[int]:
    """Choose rows so that train and holdout hold at most `proxy_images` (test comes on top)."""
    if proxy_images is None:
        return range(len(keys))
    rows = choose(keys, labels, round(proxy_images / 0.8), "proxy", at_least=3)
    return [int(row) for row in rows]
