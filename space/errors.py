"""The error for bad input, and readers of integers and ratios that raise it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

import numpy as np


class InputError(ValueError):
    """Bad input from outside: one line with name, got, want and remedy.

    Entry points print the line and end with exit status 2; library code only raises it. Anything else that is raised is
    a defect of the toolkit and keeps its traceback.
    """


def refuse(name: str, got: object, want: str, remedy: str = "") -> InputError:
    """Make the `InputError` for one value, e.g. `raise refuse("--steps", 0, "an integer >= 1")`.

    Returns "NAME: got GOT, want WANT; REMEDY" on one line (line breaks in `got` are folded).
    """
    shown = without_passwords(" ".join(str(got).split())) if str(got).strip() else repr(got)
    if len(shown) > 200:
        shown = shown[:197] + "..."
    line = f"{name}: got {shown}, want {want}"
    return InputError(without_passwords(f"{line}; {remedy}" if remedy else line))


_USER = re.compile(r"(\b[\w.+-]+://[^\s:/?#@]*):(?:(?!\d+(?:[/?]|$)).*|\S*)@", re.DOTALL)
_KEY = re.compile(r"[?&]([^=?&@]+)=(?!\.\.\.)")
_SECRET = r"passw|passphrase|pwd|secret|token|api_?key"
_PAIR = re.compile(rf"(?<![-\w?&])(\w*(?:{_SECRET})\w*\s*=\s*)(?!\.\.\.)('[^']*'|\"[^\"]*\"|[^\s'\"]+)", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """Return a text with the passwords of its addresses taken out: `postgresql://me:x@host/db`.

    A password may hold blanks, so everything up to the last @ goes, and a secret in a query up to the next &; so does
    what follows `password=` in a text of pairs.
    """
    text = _USER.sub(r"\1@", text)
    for match in reversed(list(_KEY.finditer(text))):
        if re.search(_SECRET, _decoded(match[1]), re.IGNORECASE):
            end = text.find("&", match.end())
            text = text[: match.end()] + "..." + (text[end:] if end >= 0 else "")
    return _PAIR.sub(r"\1...", text)


def _decoded(key: str) -> str:
    """Undo percent signs, however often they were applied, and drop blanks."""
    while (plain := unquote(key)) != key:
        key = plain
    return re.sub(r"[\s+]", "", key)


def refuse_multiple(name: str, got: int, unit: int, unit_name: str = "") -> InputError:
    """Make the `InputError` for a positive integer that is not a multiple of `unit`.

    Returns e.g. "embed_dims[2]=150 is not a multiple of head_dim=32; nearest: 128, 160".
    """
    below = got // unit * unit
    nearest = ", ".join(str(v) for v in (below, below + unit) if v > 0)
    of = f"{unit_name}={unit}" if unit_name else str(unit)
    return InputError(f"{name}={got} is not a multiple of {of}; nearest: {nearest}")


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
