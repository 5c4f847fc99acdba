"""Readers for values from outside: the right type and range, or an `InputError`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from space.errors import refuse


def read_int(name: str, value: object, low: int, high: int) -> int:
    """Read an integer from outside; booleans and floats are refused, even 4.0 and True."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise refuse(name, repr(value), f"an integer from {low} to {high}")
    if not low <= value <= high:
        raise refuse(name, value, f"an integer from {low} to {high}")
    return int(value)


def read_ints(name: str, value: object, length: int, low: int, high: int) -> tuple[int, ...]:
    """Read a list of `length` integers from outside."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | np.ndarray):
        raise refuse(name, repr(value), f"a list of {length} integers")
    if len(value) != length:
        raise refuse(name, list(value), f"a list of {length} integers", f"it has {len(value)}")
    return tuple(read_int(f"{name}[{i}]", v, low, high) for i, v in enumerate(value))


def read_ratio(name: str, value: object) -> float:
    """Read a finite number > 0 from outside; an integer is as good as a float, a boolean is not."""
    number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not number:
        raise refuse(name, repr(value), "a number > 0")
    try:
        ratio = float(value)  # type: ignore[arg-type]  # narrowed by `number`
    except OverflowError:
        ratio = math.inf
    if not (math.isfinite(ratio) and ratio > 0):
        raise refuse(name, value, "a finite number > 0")
    return ratio
