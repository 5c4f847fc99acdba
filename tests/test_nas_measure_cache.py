"""What was timed once is found again; what is damaged or disturbed is not trusted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_nas_measure_table import MEASUREMENT

from nas.measure.measurement_table import MeasurementCache, MeasurementRow


def row(arch: str = "a", **changes: object) -> MeasurementRow:
    of = replace(MEASUREMENT, **changes)  # type: ignore[arg-type]
    return MeasurementRow("gate", arch, f"label of {arch}", "seed", of)


def test_a_measurement_is_found_again_by_anyone(tmp_path: Path) -> None:
    """Also by an instance that looked before it was there, if it asks a fresh one."""
    first = MeasurementCache(tmp_path / "m")
    assert first.find(row().key) is None
    first.add(row())
    assert first.find(row().key) == row()
    second = MeasurementCache(tmp_path / "m")
    assert second.find(row().key) == row()
    assert second.find(row("b").key) is None
    assert second.find(replace(row().key, batch=1)) is None
    assert second.find(replace(row().key, fingerprint="f" * 12)) is None


def test_the_newest_answer_counts_and_several_writers_lose_nothing(tmp_path: Path) -> None:
    caches = [MeasurementCache(tmp_path) for _ in range(2)]
    for number in range(6):
        caches[number % 2].add(row(str(number)))
    caches[0].add(row("0", seconds=9.0))
    fresh = MeasurementCache(tmp_path)
    assert [fresh.find(row(str(n)).key) is not None for n in range(6)] == [True] * 6
    found = fresh.find(row("0").key)
    assert found is not None
    assert found.measurement.seconds == 9.0


def test_disturbed_measurements_are_not_kept(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path / "m")
    cache.add(row(disturbed="waited 40% of the time for a core"))
    assert cache.find(row().key) is None
    assert MeasurementCache(tmp_path / "m").find(row().key) is None


@pytest.mark.parametrize("damage", [b"other,columns\n", b"\xff\x00", b""])
def test_a_damaged_table_is_set_aside_and_measuring_goes_on(damage: bytes, tmp_path: Path) -> None:
    first = MeasurementCache(tmp_path)
    first.add(row())
    (path,) = tmp_path.glob("*.csv")
    path.write_bytes(damage or path.read_bytes().replace(b",12,", b",x,"))
    second = MeasurementCache(tmp_path)
    assert second.find(row().key) is None
    assert [p.suffix for p in tmp_path.iterdir() if p.suffix != ".lock"] == [".damaged"]
    second.add(row("b"))
    third = MeasurementCache(tmp_path)
    assert third.find(row("b").key) == row("b")


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = MeasurementCache(tmp_path / "file" / "m")
    cache.add(row())
    assert cache.find(row().key) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_a_folder_of_somebody_else_costs_nothing_but_time(tmp_path: Path) -> None:
    MeasurementCache(tmp_path / "m").add(row())
    (tmp_path / "m").chmod(0o500)
    try:
        cache = MeasurementCache(tmp_path / "m")
        cache.add(row("b"))
        cache.find(row().key)
    finally:
        (tmp_path / "m").chmod(0o700)
