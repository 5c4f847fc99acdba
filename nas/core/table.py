"""Cells of CSV tables that no spreadsheet takes for a formula, and that read back as they were."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_GUARDED = re.compile(r"'+[=+\-@\t\r\n]")


def guard(value: Any) -> Any:
    """Put a quote before text that a spreadsheet would run; numbers may be negative as they are.

    https://owasp.org/www-community/attacks/CSV_Injection; text that has quotes there already gets
    one more, so that `unguard` gives back exactly what was there.
    """
    return "'" + value if isinstance(value, str) and _FORMULA.match(value) else value


def unguard(text: str) -> str:
    """Take off what `guard` put before a text."""
    return text[1:] if _GUARDED.match(text) else text


class Writer:
    """Writes a table line by line, as `csv.writer` does, every text guarded.

    A row is its cells, or a mapping of which the `columns` are taken; None, and what a mapping
    lacks, is an empty cell. Lines end in "\\n".
    """

    def __init__(self, out: TextIO, columns: Sequence[str] = ()) -> None:
        self._columns = tuple(columns)
        self._plain = csv.writer(out, lineterminator="\n")
        # Python's csv leaves a lone carriage return bare, which its reader takes for a line's end.
        self._quoting = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def writeheader(self) -> None:
        """Write the names of the columns."""
        self.writerow(self._columns)

    def writerow(self, row: Sequence[Any] | Mapping[str, Any]) -> None:
        """Write one row."""
        held = [row.get(name) for name in self._columns] if isinstance(row, Mapping) else row
        cells = ["" if value is None else guard(value) for value in held]
        returns = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (self._quoting if returns else self._plain).writerow(cells)

    def writerows(self, rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> None:
        """Write rows."""
        for row in rows:
            self.writerow(row)
