"""What a person sees while a run works: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

Tick = Callable[[float], None]
"""Called by long work with the units (images, mostly) finished since the last call."""


WARNING = re.compile(r"(\w+: )?warning: ")
"""Begins lines that `--quiet` does not silence."""


def no_tick(units: float) -> None:
    """Ignore progress."""


def printable(text: str, stream: TextIO) -> str:
    """Escape what a stream cannot show, such as a name in another alphabet."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Console:
    """Lines and one progress bar with the time left.

    On a terminal the bar stays at the bottom and lines scroll above it; piped, there are lines only; `quiet` silences
    both, but warnings, which then go to standard error unless `warns` is off. `total` and `advance` are in any unit
    that is proportional to time; the bar's estimate follows the measured pace.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, warns: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._quiet, self._warns = quiet, warns
        self._bar: tqdm[Any] | None = None
        self._done = 0.0

    def line(self, text: str = "") -> None:
        """Print one line (above the bar, where there is one); a warning begins as `WARNING` has it."""
        if self._quiet:
            if self._warns and WARNING.match(text):
                print(printable(text, sys.stderr), file=sys.stderr)
            return
        text = printable(text, self._stream)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def start(self, total: float, unit: str | None = None) -> None:
        """Show the bar, on a terminal; with the pace where `total` is in a `unit` of its own."""
        pace = "" if unit is None else "{rate_fmt}, "
        self._show(
            total=max(total, 1.0),
            bar_format="{desc} {percentage:3.0f}%|{bar}| " + pace + "{elapsed}, about {remaining} left",
            unit="" if unit is None else f" {unit}",
            dynamic_ncols=True,
            smoothing=0.02 if unit is None else 0.1,  # a start-up counts for less in a pace
        )

    def count(self, what: str) -> None:
        """Show a bar for work of unknown length, on a terminal: how many, how fast."""
        self._show(desc=what, bar_format="{desc}: {n:.0f}, {rate_fmt}, {elapsed}", unit=" images")

    def _show(self, **options: Any) -> None:
        self._done = 0.0
        if not self._quiet and self._stream.isatty():
            if "desc" in options:
                options["desc"] = printable(options["desc"], self._stream)
            self._bar = tqdm(file=self._stream, leave=False, **options)

    def describe(self, text: str) -> None:
        """Say beside the bar what runs now."""
        if self._bar is not None:
            self._bar.set_description_str(printable(text[:40], self._stream))

    @contextmanager
    def bar(self, total: float, unit: str | None = None) -> Iterator[None]:
        """Show the bar while a block runs."""
        self.start(total, unit)
        try:
            yield
        finally:
            self.stop()

    def advance(self, units: float) -> None:
        """Move the bar on; never past its end."""
        self._done += units
        if self._bar is None:
            return
        total = self._bar.total
        done = self._done if total is None else min(self._done, total)
        self._bar.update(max(0.0, done - self._bar.n))

    def extend(self, units: float) -> None:
        """Add work that the first estimate did not hold."""
        if self._bar is not None:
            self._bar.total = (self._bar.total or 0.0) + units

    def refresh(self) -> None:
        """Let the clock of the bar move while nothing finishes."""
        if self._bar is not None:
            self._bar.refresh()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
