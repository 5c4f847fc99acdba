"""Ratios of hidden channels: equal nets get equal text, proposed ones build different nets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from space.errors import read_ratio, refuse
from space.family import Array

MAX_HIDDEN = 262_144  # far beyond what fits in memory


def shortest_ratio(ratio: float, widths: tuple[int, ...]) -> str:
    """Write the shortest decimal that builds the same hidden widths int(width * ratio).

    Ratios that build equal nets get equal text: it depends on the hidden widths alone.
    """
    hidden = [int(w * ratio) for w in widths]
    low = max(Fraction(h, w) for h, w in zip(hidden, widths, strict=True))
    for digits in range(18):
        scaled = math.ceil(low * 10**digits)
        for numerator in (scaled, scaled + 1):  # a float product may fall just short
            value = numerator / 10**digits
            if [int(w * value) for w in widths] == hidden:
                return f"{value:.{digits}f}"
    return "h" + "-".join(map(str, hidden))


def read_hidden_ratio(field: str, value: object, widths: Sequence[int]) -> float:
    """Read a ratio from outside that makes 1 to `MAX_HIDDEN` hidden channels of every width."""
    ratio, low, high = read_ratio(field, value), min(widths), max(widths)
    if ratio * low < 1 or ratio * high >= MAX_HIDDEN + 1:
        remedy = f"at widths {low} to {high} it makes {ratio * low:g} to {ratio * high:g}"
        raise refuse(field, ratio, f"1 to {MAX_HIDDEN} hidden channels", remedy)
    return ratio


def apart(ratio: float, proposed: Array, narrowest: int) -> Array:
    """Keep the proposed ratios that build other hidden widths than `ratio`, whatever the width.

    Below a ratio off the grid, a grid value so close that a net of width `narrowest` or more could come out the same is
    left out; the ratio itself stays.
    """
    gap = ratio - proposed
    return np.asarray(proposed[(gap == 0) | (gap * narrowest >= 1)])
