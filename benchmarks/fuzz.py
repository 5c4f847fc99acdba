"""Coverage-guided fuzzing of every parser that reads a user's file: `python -m benchmarks.fuzz`.

Inputs are valid files, mutated; those that reach lines of ours which no other did are mutated on.
A parser may give a value or raise InputError in one line, within `--limit` seconds; anything else
is a crash, kept in results/runs/fuzz/ as hex. Deterministic by `--random-seed`, but for how far it
gets in its time (`--executions` counts instead). atheris would do as well; it comes for few
platforms, and ends at the first crash.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import nas
import space
from benchmarks._parser import Parser
from benchmarks._parsers import PARSERS
from nas.command import guarded
from nas.files import write_atomic
from space.errors import InputError, refuse

CRASHES = Path("results/runs/fuzz")
_OURS = tuple(str(Path(package.__path__[0])) for package in (nas, space))
_LONGEST = 1 << 16
_WORDS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"[]", b"{}", b'""', b'"x"',
    b"9" * 400, b"0.5", b"\\ud800", b"\xff", b"\0", b",", b'"', b"\n", b"\r", b"=1+1", b"../x",
    b"1e308", b"18446744073709551616", b"[" * 3000, b"1_0",
)  # fmt: skip


@dataclass
class Found:
    """What the fuzzing of one parser came to; `crashes` are (kind and place, input)."""

    parser: str
    executions: int = 0
    corpus: int = 0
    lines: set[tuple[str, int]] = field(default_factory=set)
    crashes: dict[str, bytes] = field(default_factory=dict)


class Watcher:
    """The lines of our own modules that a call runs."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()

    def __call__(self, work: Callable[[], object]) -> object:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            return work()
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_OURS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


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
        holder[rng.choice(("x", "", "seal", "arch", "family", f"{key}x"))] = holder[key]
    else:
        holder[key] = rng.choice(
            (None, True, -1, 0, 1, 2**70, 1e308, float("nan"), float("inf"), 0.5, "", "x", "../x",
             "\ud800", "a\0b", [], {}, [None], [[[]]], {"x": {}}, [1, 2, 3, 4], holder[key], "1")
        )  # fmt: skip
    return json.dumps(value).encode()


def judged(parser: Parser, data: bytes, limit_s: float, watch: Watcher | None = None) -> str | None:
    """Run a parser on an input; returns None, or what was wrong with how it took it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def work() -> object:
            return parser.read(data, Path(folder))

        try:
            work() if watch is None else watch(work)
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


def fuzz(
    parser: Parser, *, seconds: float, random_seed: int, limit_s: float = 5.0,
    executions: int | None = None,
) -> Found:  # fmt: skip
    """Fuzz one parser for a time, or for a number of executions."""
    rng = random.Random(f"{random_seed}/{parser.name}")
    found, corpus = Found(parser.name), list(parser.seeds())
    for data in corpus:  # what is imported on first use costs no execution its time
        judged(parser, data, limit_s)
    queue, ends = list(corpus), time.monotonic() + seconds
    while True:
        data = queue.pop(0) if queue else mutated(rng.choice(corpus), corpus, rng)
        watch = Watcher()
        wrong = judged(parser, data, limit_s, watch)
        found.executions += 1
        if wrong is not None:
            found.crashes.setdefault(wrong, data)
        if not watch.lines <= found.lines:
            found.lines |= watch.lines
            corpus.append(data)
        done = found.executions >= executions if executions else time.monotonic() >= ends
        if done and not queue:
            found.corpus = len(corpus)
            return found


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, print a line a parser and a last one of JSON; 1 where something crashed, 2: bad."""
    names = ", ".join(parser.name for parser in PARSERS)
    arguments = argparse.ArgumentParser("python -m benchmarks.fuzz", description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60.0, help="for all parsers together")
    arguments.add_argument("--executions", type=int, help="of each parser, in place of a time")
    arguments.add_argument("--parser", metavar="NAME", help=f"one of {names} (default: all)")
    arguments.add_argument("--random-seed", type=int, default=0)
    arguments.add_argument("--limit", type=float, default=5.0, help="seconds of one execution")
    arguments.add_argument("--out", type=Path, default=CRASHES, help="where crashes are kept")
    given = arguments.parse_args(argv)
    return guarded(lambda: _main(given, names))


def _main(given: argparse.Namespace, names: str) -> int:
    chosen = [p for p in PARSERS if given.parser in (None, p.name)]
    if not chosen:
        raise refuse("--parser", given.parser, f"one of {names}")
    if given.seconds <= 0 or (given.executions is not None and given.executions < 1):
        raise refuse("--seconds, --executions", f"{given.seconds}, {given.executions}", "above 0")
    crashes = executions = 0
    for parser in chosen:
        found = fuzz(
            parser, seconds=given.seconds / len(chosen), random_seed=given.random_seed,
            limit_s=given.limit, executions=given.executions,
        )  # fmt: skip
        print(
            f"{found.parser:16} {found.executions:7,} executions, {len(found.lines):5,} lines, "
            f"{found.corpus:4} inputs kept, {len(found.crashes)} crashes", flush=True,
        )  # fmt: skip
        executions += found.executions
        for number, (what, data) in enumerate(sorted(found.crashes.items())):
            crashes += 1
            given.out.mkdir(parents=True, exist_ok=True)
            kept = given.out / f"{parser.name}-{number}.hex"
            write_atomic(kept, data.hex().encode() + b"\n")
            print(f"  {what}: {kept}")
    print(json.dumps({"parsers": len(chosen), "executions": executions, "crashes": crashes}))
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
