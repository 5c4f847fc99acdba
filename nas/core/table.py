"""Tables as CSV files: the one codec between dataclasses and rows, and a writer of plain cells.

A text that a spreadsheet would run as a formula is quoted on writing and read back as it was. Only the standard library
is used: the bundle for other devices carries this module.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

from nas.core.io import write_atomic
from space.errors import refuse

T = TypeVar("T")

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_GUARDED = re.compile(r"'+[=+\-@\t\r\n]")
_WANT = {int: "an integer", float: "a number", bool: "True or False", str: "text"}


def guard(value: Any) -> Any:
    """Put a quote before text that a spreadsheet would run; numbers may be negative as they are.

    https://owasp.org/www-community/attacks/CSV_Injection; text that has quotes there already gets one more, so that
    `unguard` gives back exactly what was there.
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


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of a dataclass: its type without None, and what stands for an empty cell."""

    name: str
    kind: type
    optional: bool
    has_default: bool


def _fields(cls: type) -> tuple[_Field, ...]:
    return _cached_fields(cls)  # mypy takes type[T] for no Hashable


@functools.cache
def _cached_fields(cls: type) -> tuple[_Field, ...]:
    hints, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        optional = get_origin(hint) in (Union, UnionType)
        kinds = [k for k in get_args(hint) if k is not type(None)] if optional else [hint]
        assert len(kinds) == 1, f"{cls.__name__}.{field.name}: a union has no type in a table"
        assert kinds[0] in _WANT or dataclasses.is_dataclass(kinds[0]), f"{cls}.{field.name}"
        found.append(_Field(field.name, kinds[0], optional, field.default is not dataclasses.MISSING))
    return tuple(found)


def table_columns(cls: type) -> tuple[str, ...]:
    """Return the columns of a dataclass: its fields, and in place of a nested one that one's."""
    return tuple(
        name for field in _fields(cls) for name in ((field.name,) if field.kind in _WANT else table_columns(field.kind))
    )


def row_values(row: Any) -> tuple[Any, ...]:
    """Return the values of a dataclass instance in the order of `table_columns`."""
    values: list[Any] = []
    for field in _fields(type(row)):
        value = getattr(row, field.name)
        if field.kind in _WANT:
            values.append(value)
        else:
            empty = (None,) * len(table_columns(field.kind))
            values.extend(empty if value is None else row_values(value))
    return tuple(values)


def format_table(rows: Iterable[Any], cls: type, *, header: bool = True) -> str:
    """Return instances of the dataclass `cls` as the text of a CSV file."""
    out = io.StringIO(newline="")
    writer = Writer(out, table_columns(cls))
    if header:
        writer.writeheader()
    writer.writerows(row_values(row) for row in rows)
    return out.getvalue()


def write_table(path: Path, rows: Sequence[Any], cls: type | None = None) -> None:
    """Write instances of one dataclass atomically; `cls` names it where there may be no rows."""
    write_atomic(path, format_table(rows, cls or type(rows[0])).encode())


def parse_cell(name: str, text: str, kind: type) -> Any:
    """Return a cell as an int, float, bool or text. Raises InputError naming the cell `name`."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is not int or not re.search("[.eE]", text):
            return kind(text)
        number = float(text)  # a spreadsheet may write every number with a point
        if number.is_integer():
            return int(number)
    except (ValueError, KeyError):
        pass
    raise refuse(name, text or "nothing", _WANT[kind])


def _instance(cls: type[T], cells: Mapping[str, str], where: str) -> T:
    values: dict[str, Any] = {}
    for field in _fields(cls):
        if field.kind not in _WANT:
            filled = any(cells.get(name) for name in table_columns(field.kind))
            nested = _instance(field.kind, cells, where) if filled or not field.optional else None
            values[field.name] = nested
        elif field.name not in cells and field.has_default:
            continue
        elif field.optional and not cells.get(field.name):
            values[field.name] = None
        else:
            text = cells.get(field.name, "")
            values[field.name] = parse_cell(f"{where}: {field.name}", text, field.kind)
    try:
        return cls(**values)
    except ValueError as error:
        raise refuse(where, error, "a row as it was written") from None


def _required(cls: type) -> list[str]:
    """Return the columns that a file must have: those of neither optional nor default values."""
    found: list[str] = []
    for field in _fields(cls):
        if not (field.optional or field.has_default):
            found += [field.name] if field.kind in _WANT else _required(field.kind)
    return found


def parse_table(data: bytes, cls: type[T], name: str) -> list[T]:
    """Read the bytes of a CSV file as instances of the dataclass `cls`.

    Columns may stand in any order and further ones are ignored; a missing column is the field's default or None, an
    empty cell of an optional field None. Raises InputError saying file (`name`), line, column, got and want.
    """
    line = 1
    try:
        # Line breaks as they are: a cell may hold any of them.
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = [unguard(cell) for cell in next(lines, [])]
        required = _required(cls)
        missing = [column for column in required if column not in header]
        if missing:
            got = f"no column {', '.join(missing[:3])}" if header else "an empty file"
            raise refuse(f"{name} line 1", got, f"the columns {', '.join(required)}")
        rows = []
        for cells in lines:
            line = lines.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise refuse(f"{name} line {line}", f"{len(cells)} cells", f"{len(header)} cells")
            row = dict(zip(header, map(unguard, cells), strict=True))
            rows.append(_instance(cls, row, f"{name} line {line}"))
        return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise refuse(f"{name} line {line}", error, "a readable CSV file") from None


def read_table(path: Path, cls: type[T], name: str = "") -> list[T]:
    """Read a CSV file as instances of the dataclass `cls`; `name` stands for the path in errors."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise refuse(name or str(path), error.strerror or error, "a readable CSV file") from None
    return parse_table(data, cls, name or str(path))
