"""Mutations of valid files, and what is wrong with how a parser takes an input."""

from __future__ import annotations

import json
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz_parsers import Parser

import nas
import space
from space.errors import InputError

_OURS = tuple(str(Path(package.__path__[0])) for package in (nas, space))
_LONGEST = 1 << 16
_WORDS = (
    *(b"null", b"true", b"-1", b"0", b"0.5", b"1e999", b"1e308", b"NaN", b"-Infinity", b"1_0"),
    *(b"[]", b"{}", b'""', b'"x"', b",", b'"', b"\n", b"\r", b"\0", b"\xff", b"\\ud800"),
    *(b"=1+1", b"../x", b"18446744073709551616", b"9" * 400, b"[" * 3000),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**70, 0.5, 1e308, float("nan"), float("inf")),
    *("", "1", "x", "../x", "\ud800", "a\0b", [], {}, [None], [[[]]], {"x": {}}, [1, 2, 3, 4]),
)


def mutated(data: bytes, corpus: Sequence[bytes], rng: random.Random) -> bytes:
    """Change an input in one to four places: as bytes, as a word, or as the JSON that it is."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.5:
            data = _as_json(data, rng) or data
            continue
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(7)
        if how == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif how == 1:
            data = data[:at]
        elif how == 2:
            data = data[:at] + data[at + rng.choice((1, 1, 2, 8, 64)) :]
        elif how == 3:
            data = data[:at] + rng.choice(_WORDS) + data[at + rng.choice((0, 1, 4)) :]
        elif how == 4:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 9))) + data[at:]
        elif how == 5:
            other = rng.choice(corpus)
            cut = rng.randrange(len(other) + 1)
            data = data[:at] + other[cut:]
        else:  # a digit
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
            if digits:
                at = rng.choice(digits)
                data = data[:at] + bytes([rng.randrange(48, 58)]) + data[at + 1 :]
    return data[:_LONGEST]


def _as_json(data: bytes, rng: random.Random) -> bytes | None:
    """Replace, remove or double a value inside JSON; None where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    holders: list[Any] = []

    def walk(inner: Any) -> None:
        if isinstance(inner, (dict, list)) and inner:
            holders.append(inner)
            for each in inner.values() if isinstance(inner, dict) else inner:
                walk(each)

    walk(value)
    if not holders:
        return None
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    how = rng.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "arch", "family", f"{key}x"))] = holder[key]
    else:
        holder[key] = rng.choice((*_VALUES, holder[key]))
    return json.dumps(value).encode()


def fault_of(parser: Parser, data: bytes, limit_s: float) -> str | None:
    """Run a parser on an input; returns None, or what was wrong with how it took it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parser.read(data, Path(folder))
        except InputError as error:
            if "\n" in str(error) or not str(error):
                return "a refusal that is not one line"
        except Exception as error:
            here = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in here if frame.filename.startswith(_OURS)] or here
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            return f"{type(error).__name__} at {place}"
    if time.monotonic() - began > limit_s:
        return f"longer than {limit_s:g} s"
    return None
