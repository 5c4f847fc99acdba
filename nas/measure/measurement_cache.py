"""Measurements kept between runs, by device: what was timed once is not timed again. No torch."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from nas.measure.measurement_table import MeasurementKey, MeasurementRow, MeasurementTable
from space.errors import InputError


class MeasurementCache:
    """`<cache>/measurements/<fingerprint>.csv`, one table for each device and setting.

    Several runs may read and write at once. A damaged table is set aside, not trusted: it costs
    measuring again. What was disturbed while it was measured is not kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, dict[MeasurementKey, MeasurementRow]] = {}

    def find(self, key: MeasurementKey) -> MeasurementRow | None:
        """Return the newest measurement that answers the same question."""
        if key.fingerprint not in self._tables:
            self._tables[key.fingerprint] = {r.key: r for r in self._read(key.fingerprint)}
        return self._tables[key.fingerprint].get(key)

    def _path(self, fingerprint: str) -> Path:
        return self.folder / f"{fingerprint}.csv"

    def _read(self, fingerprint: str) -> tuple[MeasurementRow, ...]:
        path = self._path(fingerprint)
        if not path.exists():
            return ()
        with FileLock(f"{path}.lock"):
            try:
                return MeasurementTable(path).rows
            except InputError:
                path.replace(path.with_suffix(".damaged"))
                return ()

    def add(self, row: MeasurementRow) -> None:
        """Keep a measurement; nothing happens where the cache cannot be written."""
        if row.measurement.disturbed:
            return
        fingerprint = row.measurement.fingerprint
        path = self._path(fingerprint)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                MeasurementTable(path).append_row(row)
        except (OSError, InputError):
            return
        self._tables.setdefault(fingerprint, {})[row.key] = row
