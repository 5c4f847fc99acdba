"""mixup and CutMix between two images that are paired by their codes, whatever samplers and batches do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.data import mixup as timm_mixup
from torch import Tensor

from nas.data.augment.spec import AugmentSpec, borrowed_generators, seed_all

Box = tuple[int, int, int, int]
# timm's, which have no types
_Mixup: Any = timm_mixup.Mixup
_bbox_and_lam: Any = timm_mixup.cutmix_bbox_and_lam


def partners(codes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Pair images by their codes, uint64 [n] -> int64 [n], an involution of rows; -1 for one left over."""
    order = np.argsort(codes, kind="stable")
    even = len(codes) // 2 * 2
    found = np.full(len(codes), -1, dtype=np.int64)
    found[order[0:even:2]] = order[1:even:2]
    found[order[1:even:2]] = order[0:even:2]
    return found


def mix(
    views: Tensor, partner_views: Tensor, codes: Sequence[int], partner_codes: Sequence[int], spec: AugmentSpec
) -> Tensor:
    """Mix views [n, 3, s, s] with their partners' [n, 3, s, s], each row alone, on their device.

    timm draws kind, lambda and box of a pair: mixup blends the normalised views, CutMix puts the partner's box into
    one.
    """
    mixed = views.clone()
    size = (int(views.shape[-2]), int(views.shape[-1]))
    for row, (share, box) in enumerate(draws(codes, partner_codes, size, spec)):
        if box is not None:
            top, bottom, left, right = box
            mixed[row, :, top:bottom, left:right] = partner_views[row, :, top:bottom, left:right]
        elif share != 1.0:
            mixed[row] = views[row] * share + partner_views[row] * (1.0 - share)
    return mixed


def draws(
    codes: Sequence[int], partner_codes: Sequence[int], size: tuple[int, int], spec: AugmentSpec
) -> list[tuple[float, Box | None]]:
    """Draw each pair's lambda, 1 where nothing is blended, or CutMix's box (top, bottom, left,
    right) in an image of `size` (height, width); the order of a pair plays no part."""
    with borrowed_generators():
        return [_drawn(min(pair), max(pair), size, spec) for pair in zip(codes, partner_codes, strict=True)]


def shares(
    codes: Sequence[int], partner_codes: Sequence[int], size: tuple[int, int], spec: AugmentSpec
) -> NDArray[np.float64]:
    """Return how much of each mixed input is its own image, [n]; the rest is its partner's.

    mixup's lambda, or the share of the pixels that CutMix's box leaves, by which timm mixes labels.
    """
    area = size[0] * size[1]
    return np.array(
        [
            share if box is None else 1.0 - (box[1] - box[0]) * (box[3] - box[2]) / area
            for share, box in draws(codes, partner_codes, size, spec)
        ],
        dtype=np.float64,
    )


@lru_cache(maxsize=4096)  # each pair is drawn twice, mostly in succession
def _drawn(low: int, high: int, size: tuple[int, int], spec: AugmentSpec) -> tuple[float, Box | None]:
    """Draw from the generators that `draws` has borrowed."""
    timms: Any = _Mixup(
        mixup_alpha=spec.mixup_alpha,
        cutmix_alpha=spec.cutmix_alpha,
        prob=spec.mix_prob,
        switch_prob=spec.mix_switch_prob,
        label_smoothing=0.0,
    )
    seed_all((low * 0x9E3779B97F4A7C15 + high) & 0xFFFFFFFFFFFFFFFF)
    share, cut = timms._params_per_batch()
    if not cut:
        return float(share), None
    box, _ = _bbox_and_lam((3, *size), share)
    top, bottom, left, right = (int(side) for side in box)
    return 1.0, (top, bottom, left, right)
