"""`measurements.csv`: every measurement, on disk before it is used; importable without torch."""

from __future__ import annotations

import csv
import io
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from nas.core.table import guard, unguard
from nas.measure.measurement import Measurement
from space.errors import InputError, refuse


@dataclass(frozen=True)
class MeasurementKey:
    """What must be equal for a measurement to answer the same question.

    `role` says what for ("seed", "gate", "final", "published"); `arch_key` and `reference_key`
    are keys of archs in their context, `reference_key` empty where there was no reference.
    """

    role: str
    arch_key: str
    reference_key: str
    img_size: int
    num_classes: int
    in_chans: int
    batch: int
    dtype: str
    runtime: str
    fingerprint: str


@dataclass(frozen=True)
class MeasurementRow:
    """One line of the table: what was measured, as what, and the measurement."""

    role: str
    arch_key: str
    arch_label: str
    reference_key: str
    measurement: Measurement

    @property
    def key(self) -> MeasurementKey:
        """The question that this row answers."""
        of = self.measurement
        return MeasurementKey(
            role=self.role,
            arch_key=self.arch_key,
            reference_key=self.reference_key,
            img_size=of.img_size,
            num_classes=of.num_classes,
            in_chans=of.in_chans,
            batch=of.batch,
            dtype=of.dtype,
            runtime=of.runtime,
            fingerprint=of.fingerprint,
        )


_OWN = ("role", "arch_key", "arch_label", "reference_key")
_TYPES: dict[str, Any] = get_type_hints(Measurement)
COLUMNS = (*_OWN, *(field.name for field in fields(Measurement)), "crc32")
"""The header: what the row is, a `Measurement`'s fields, a checksum of the line up to there and of
the row before it, so that no row can be lost from the middle or moved unseen."""

HEADER = ",".join(COLUMNS)
_FIRST = f"{zlib.crc32(HEADER.encode()):08x}"
"""What stands before the first row."""


class MeasurementTable:
    """The append-only table of one run. Its driver is the only writer.

    Opening reads what is there: a last line that a crash tore is dropped (it was never used), any
    other damage is refused naming the line. `append` returns when the row is safely on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[MeasurementRow] = []
        self._newest: dict[MeasurementKey, MeasurementRow] = {}
        self._whole_bytes = 0
        self._last = _FIRST
        if path.exists():
            data = _bytes(path)
            self._whole_bytes = data.rfind(b"\n") + 1
            for row, checksum in _parse(data, path, partial_header=True):
                self._remember(row, checksum)

    @property
    def rows(self) -> tuple[MeasurementRow, ...]:
        """Every row, oldest first."""
        return tuple(self._rows)

    def find(self, **key: Any) -> Measurement | None:
        """Return the newest measurement that answers the fields of a `MeasurementKey`."""
        row = self._newest.get(MeasurementKey(**key))
        return None if row is None else row.measurement

    def append(
        self,
        *,
        role: str,
        arch_key: str,
        arch_label: str,
        reference_key: str,
        measurement: Measurement,
    ) -> MeasurementRow:
        """Add a measurement; it is safely on disk when this returns."""
        row = MeasurementRow(role, arch_key, arch_label, reference_key, measurement)
        self.append_row(row)
        return row

    def append_row(self, row: MeasurementRow) -> None:
        """Write one row durably, cutting off a torn last line first."""
        text = format_row(row, self._last)
        line = text + "\n"
        fresh = self._whole_bytes == 0
        data = ((HEADER + "\n" if fresh else "") + line).encode()
        existed = self.path.exists()
        try:
            with open(self.path, "r+b" if existed else "xb") as out:
                out.truncate(self._whole_bytes)
                out.seek(self._whole_bytes)
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            if not existed:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise refuse(str(self.path), error, "a writable file") from None
        self._whole_bytes += len(data)
        self._remember(row, _checksum_of(text))

    def _remember(self, row: MeasurementRow, checksum: str) -> None:
        self._last = checksum
        self._rows.append(row)
        self._newest[row.key] = row


def read_measurements(path: Path) -> tuple[MeasurementRow, ...]:
    """Read a table made elsewhere (`--measurements FILE`), oldest first, changing nothing.

    Refuses a missing or unreadable file, other columns and damaged rows; a torn last line is
    dropped.
    """
    if path.is_dir():
        raise refuse("--measurements", path, "a measurements.csv file", "name the file inside it")
    if not path.exists():
        raise refuse("--measurements", path, "an existing measurements.csv")
    return tuple(row for row, _ in _parse(_bytes(path), path, partial_header=False))


def format_row(row: MeasurementRow, after: str = "") -> str:
    """Write a row as its line, without the line break; `parse_row` gives an equal row back.

    `after` is the checksum of the row before it.
    """
    values = [row.role, row.arch_key, row.arch_label, row.reference_key]
    values += [_cell(value) for value in row.measurement.to_dict().values()]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([guard(value) for value in values])
    line = text.getvalue()
    assert "\n" not in line, "a cell holds a line break"
    assert "\r" not in line, "a cell holds a line break"
    return f"{line},{zlib.crc32((after + line).encode()):08x}"


def parse_row(line: str, after: str = "") -> MeasurementRow:
    """Read one line. Raises `ValueError` saying what is wrong with it."""
    body, _, checksum = line.rpartition(",")
    # Older tables have checksums of each line alone.
    if checksum not in {f"{zlib.crc32((one + body).encode()):08x}" for one in (after, "")}:
        raise ValueError("the checksum does not fit the line, or not behind the one before it")
    cells = [unguard(cell) for cell in next(csv.reader([body], strict=True))]
    if len(cells) != len(COLUMNS) - 1:
        raise ValueError(f"{len(cells) + 1} cells instead of {len(COLUMNS)}")
    values: dict[str, Any] = {}
    for name, text in zip(COLUMNS[len(_OWN) : -1], cells[len(_OWN) :], strict=True):
        values[name] = _value(name, text)
    role, arch_key, arch_label, reference_key = cells[: len(_OWN)]
    measurement = Measurement(**values)
    return MeasurementRow(role, arch_key, arch_label, reference_key, measurement)


def _checksum_of(line: str) -> str:
    return line.rpartition(",")[2]


def _parse(
    data: bytes, path: Path, *, partial_header: bool
) -> Iterable[tuple[MeasurementRow, str]]:
    # A line is whole when its line break is there: `append` writes that last.
    whole, _, torn = data.rpartition(b"\n")
    remedy = "restore the file or start a new one"
    if not whole:
        if partial_header and HEADER.encode().startswith(torn):
            return
        raise refuse(str(path), _shown(torn), "a measurements.csv with its header", remedy)
    lines = whole.split(b"\n")
    if lines[0].decode(errors="replace") != HEADER:
        raise refuse(f"{path} line 1", _shown(lines[0]), f"the columns {HEADER[:40]}...", remedy)
    last = _FIRST
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = parse_row(line.decode("utf-8"), last)
            last = _checksum_of(line.decode("utf-8"))
            yield row, last
        except InputError as error:
            raise refuse(f"{path} line {number}", error, "a measurement", remedy) from None
        except (ValueError, csv.Error) as error:
            raise refuse(f"{path} line {number}", error, "a whole row", remedy) from None


def _shown(data: bytes) -> str:
    return data[:80].decode("utf-8", errors="replace")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise refuse(str(path), error, "a readable measurements.csv") from None


def _sync_folder(folder: Path) -> None:
    # A new file's name is durable only when its folder is synced (not possible on Windows).
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cell(value: object) -> str:
    # repr of a float is the shortest text that reads back as the same float.
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _value(name: str, text: str) -> Any:
    hint = _TYPES[name]
    optional = get_origin(hint) in (Union, UnionType)
    if optional and text == "":
        return None
    kind = next(kind for kind in get_args(hint) if kind is not type(None)) if optional else hint
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None
