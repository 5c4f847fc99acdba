"""What a person sees while a run works: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

Tick = Callable[[float], None]
"""Called by long work with the units (images, mostly) finished since the last call."""


def no_tick(units: float) -> None:
    """Ignore progress."""


class Console:
    """Lines and one progress bar with the time left.

    On a terminal the bar stays at the bottom and lines scroll above it; piped, there are lines only; `quiet` silences
    both. `total` and `advance` are in any unit that is proportional to time; the bar's estimate follows the measured
    pace.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._done = 0.0

    def line(self, text: str = "") -> None:
        """Print one line (above the bar, where there is one)."""
        if self._quiet:
            return
        text = self._printable(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _printable(self, text: str) -> str:
        """Escape what the stream cannot show, such as a name in another alphabet."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

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
                options["desc"] = self._printable(options["desc"])
            self._bar = tqdm(file=self._stream, leave=False, **options)

    def describe(self, text: str) -> None:
        """Say beside the bar what runs now."""
        if self._bar is not None:
            self._bar.set_description_str(self._printable(text[:40]))

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
