"""How a square table of positions is resized: weights over the parent's values, as torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from space.slicing import Blend, Index

CUBIC, SMOOTH_CUBIC = -0.75, -0.5
"""The constants of torch's bicubic interpolation: without, and with antialiasing (Pillow's)."""

Line = Callable[[int, int], Blend]
"""From the sizes of a child's and a parent's line: the weights [child, parent] between them."""


def _cubic(away: Blend, constant: float) -> Blend:
    """Give Keys's cubic convolution kernel at distances >= 0; nothing from 2 on."""
    near = ((constant + 2) * away - (constant + 3)) * away**2 + 1
    far = constant * (((away - 5) * away + 8) * away - 4)
    return np.where(away <= 1, near, np.where(away < 2, far, 0.0))


def bicubic(child: int, parent: int) -> Blend:
    """Give the weights [child, parent] that resize a line as torch does, without antialiasing.

    `F.interpolate(..., mode="bicubic", align_corners=False)`; beyond its ends a line goes on as it
    ends.
    """
    at = (np.arange(child) + 0.5) * parent / child - 0.5
    low = np.floor(at).astype(np.int64)
    weights = np.zeros((child, parent), dtype=np.float64)
    for tap in (-1, 0, 1, 2):
        source = np.clip(low + tap, 0, parent - 1)
        np.add.at(weights, (np.arange(child), source), _cubic(np.abs(at - (low + tap)), CUBIC))
    return weights


def antialiased(child: int, parent: int) -> Blend:
    """Give the weights [child, parent] that resize a line as torch does, with antialiasing.

    `F.interpolate(..., mode="bicubic", antialias=True)`, which is Pillow's: another constant than
    `bicubic`, so that larger lines differ too; the kernel is as wide as the child's step; beyond
    its ends a line is not there, and what is left of the weights sums to one.
    """
    step = parent / child
    centre = (np.arange(child) + 0.5) * step
    away = np.abs(np.arange(parent)[None, :] + 0.5 - centre[:, None]) / max(step, 1.0)
    weights = _cubic(away, SMOOTH_CUBIC)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


LINES: Mapping[str, Line] = {"published": bicubic, "timm": antialiased}
"""Ways of resizing that are told apart by their lines alone, by the name a user says."""


def square(child: int, parent: int, line: Line) -> tuple[Index, Blend | None]:
    """Map a table [child * child], row by row, onto one of [parent * parent].

    Returns the nearest positions and the weights over all of them; of equal sizes there are none.
    """
    near = ((np.arange(child) + 0.5) * parent / child).astype(np.int64)
    near = np.minimum(near, parent - 1)
    index = (near[:, None] * parent + near[None, :]).reshape(-1)
    if child == parent:
        return index, None
    along = line(child, parent)
    return index, np.asarray(np.kron(along, along), dtype=np.float64)
