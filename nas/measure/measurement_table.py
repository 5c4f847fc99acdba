"""`measurements.csv`: every visit of a run, and the cache of visits between runs.

A row is on disk before it is used. Importable without torch.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path

from filelock import FileLock

from nas.core.table import format_table, parse_table, table_columns
from nas.measure.measurement import Measurement
from space.errors import InputError, refuse

MAX_AGE = timedelta(days=7)
"""Age from which a visit of an earlier run no longer counts: drivers, clocks and neighbours change."""

MOST_VISITS = 16
"""Most visits of earlier runs that a run takes over for one arch."""


@dataclass(frozen=True)
class MeasurementKey:
    """What is equal for two measurements of the same thing.

    `role` is its purpose ("seed", "gate", "final", "published"); `arch_key` and `reference_key` are keys of archs in
    their context, `reference_key` empty where there was no reference.
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
    """One line of the table: what was timed, as what, and what one visit found."""

    role: str
    arch_key: str
    arch_label: str
    reference_key: str
    measurement: Measurement

    @property
    def key(self) -> MeasurementKey:
        """What the row is found by."""
        names = [field.name for field in fields(MeasurementKey)]
        under = {name: getattr(self.measurement, name) for name in names[3:]}
        return MeasurementKey(self.role, self.arch_key, self.reference_key, **under)


HEADER = ",".join(table_columns(MeasurementRow))


class MeasurementTable:
    """The append-only table of one run, whose driver is the only writer.

    Opening reads what is there: a last line that a crash tore is dropped (it was never used), a bad row is refused by
    its line number. `append` returns when the row is safely on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[MeasurementRow] = []
        self._of: dict[MeasurementKey, list[MeasurementRow]] = {}
        self._whole_bytes = 0
        data = _read_bytes(path) if path.exists() else b""
        if not HEADER.encode().startswith(data):
            self._whole_bytes = data.rfind(b"\n") + 1
            for row in _parse(data, path):
                self._remember(row)

    @property
    def rows(self) -> tuple[MeasurementRow, ...]:
        """Every row, oldest first."""
        return tuple(self._rows)

    def find(self, key: MeasurementKey) -> list[MeasurementRow]:
        """Return the visits of a key, oldest first."""
        return list(self._of.get(key, ()))

    def append(self, row: MeasurementRow) -> None:
        """Add a row, cutting off a torn last line first; it is safely on disk on return."""
        text = format_table([row], MeasurementRow, header=self._whole_bytes == 0)
        assert text.count("\n") == 1 + (self._whole_bytes == 0), "a cell holds a line break"
        data, existed = text.encode(), self.path.exists()
        try:
            with open(self.path, "r+b" if existed else "xb") as out:
                out.truncate(self._whole_bytes)
                out.seek(self._whole_bytes)
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            if not existed and os.name == "posix":  # a new file's name is durable only when its folder is synced
                handle = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        except OSError as error:
            raise refuse(str(self.path), error, "a writable file") from None
        self._whole_bytes += len(data)
        self._remember(row)

    def _remember(self, row: MeasurementRow) -> None:
        self._rows.append(row)
        self._of.setdefault(row.key, []).append(row)


def read_measurements(path: Path) -> tuple[MeasurementRow, ...]:
    """Read a table made elsewhere (`--measurements FILE`), oldest first, changing nothing.

    Refuses a missing or unreadable file and bad rows; a torn last line is dropped.
    """
    if path.is_dir():
        raise refuse("--measurements", path, "a measurements.csv file", "name the file inside it")
    if not path.exists():
        raise refuse("--measurements", path, "an existing measurements.csv")
    return tuple(_parse(_read_bytes(path), path))


def _parse(data: bytes, path: Path) -> list[MeasurementRow]:
    # A line is whole when its line break is there: `append` writes that last.
    return parse_table(data[: data.rfind(b"\n") + 1] or data, MeasurementRow, str(path))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise refuse(str(path), error, "a readable measurements.csv") from None


class MeasurementCache:
    """`<cache>/measurements/<fingerprint>.csv`, one table for each device and setting.

    Several runs may read and write at once. A damaged table is set aside, not trusted: it costs measuring again. What
    was disturbed while it was measured is not kept, and what is older than `MAX_AGE` is not found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, MeasurementTable] = {}

    def find(self, key: MeasurementKey) -> list[MeasurementRow]:
        """Return the visits of a key that are young enough, oldest first; the latest `MOST_VISITS` of them."""
        if key.fingerprint not in self._tables:
            self._tables[key.fingerprint] = self._read(key.fingerprint)
        found = self._tables[key.fingerprint].find(key)
        return [row for row in found if _age(row.measurement.when) < MAX_AGE][-MOST_VISITS:]

    def _read(self, fingerprint: str) -> MeasurementTable:
        path = self.folder / f"{fingerprint}.csv"
        if not path.exists():
            return MeasurementTable(path)
        with FileLock(f"{path}.lock"):
            try:
                return MeasurementTable(path)
            except InputError:
                path.replace(path.with_suffix(".damaged"))
                return MeasurementTable(path)

    def add(self, row: MeasurementRow) -> None:
        """Keep a visit; nothing happens where the cache cannot be written."""
        if row.measurement.disturbed:
            return
        path = self.folder / f"{row.measurement.fingerprint}.csv"
        with contextlib.suppress(OSError, InputError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                MeasurementTable(path).append(row)


def _age(when: str) -> timedelta:
    """Return the age of a row; one without a time is as old as can be."""
    try:
        return datetime.now(timezone.utc) - datetime.fromisoformat(when)
    except (ValueError, TypeError):
        return timedelta.max
