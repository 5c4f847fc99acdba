"""The table of measurements loses nothing that was used, and trusts nothing that was damaged."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.core.table import format_table, parse_table
from nas.measure.measurement import Measurement
from nas.measure.measurement_table import (
    HEADER,
    MeasurementRow,
    MeasurementTable,
    read_measurements,
)
from space import InputError

MEASUREMENT = Measurement(
    images_per_s=100.5,
    images_per_s_lo=90.25,
    images_per_s_hi=110.0,
    ratio=2.0,
    ratio_lo=1.9,
    ratio_hi=2.1,
    reference_images_per_s=50.0,
    coverage=0.96,
    blocks=12,
    passes=3,
    seconds=1.5,
    img_size=48,
    num_classes=10,
    in_chans=3,
    batch=32,
    dtype="float32",
    runtime="eager",
    device="cpu",
    threads=2,
    fingerprint="0123456789ab",
    load=0.5,
    when="2026-01-01T00:00:00+00:00",
)


def put(table: MeasurementTable, arch: str, measurement: Measurement = MEASUREMENT) -> None:
    table.append(
        role="gate",
        arch_key=arch,
        arch_label=f"label of {arch}",
        reference_key="seed",
        measurement=measurement,
    )


def key(arch: str, **changes: Any) -> dict[str, Any]:
    of = MEASUREMENT
    return {
        "role": "gate",
        "arch_key": arch,
        "reference_key": "seed",
        "img_size": of.img_size,
        "num_classes": of.num_classes,
        "in_chans": of.in_chans,
        "batch": of.batch,
        "dtype": of.dtype,
        "runtime": of.runtime,
        "fingerprint": of.fingerprint,
        **changes,
    }


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\x00"), max_size=20
)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)


@given(TEXTS, TEXTS, TEXTS, st.tuples(POSITIVE, POSITIVE, POSITIVE), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_row_reads_back_exactly(
    arch: str, label: str, reference: str, speeds: tuple[float, float, float], alone: bool
) -> None:
    """Every float to the bit, every text, and no cell that a spreadsheet would run."""
    lo, middle, hi = sorted(speeds)
    made = replace(MEASUREMENT, images_per_s=middle, images_per_s_lo=lo, images_per_s_hi=hi)
    if alone:
        made = replace(made, ratio=None, ratio_lo=None, ratio_hi=None, load=None)
    row = MeasurementRow("gate", arch, label, reference, made)
    text = format_table([row], MeasurementRow)
    assert parse_table(text.encode(), MeasurementRow, "m.csv") == [row]


def test_appended_rows_are_found_by_key_the_newest_first(tmp_path: Path) -> None:
    path = tmp_path / "measurements.csv"
    table = MeasurementTable(path)
    assert table.rows == ()
    assert not path.exists()
    put(table, "a")
    put(table, "b")
    put(table, "a", replace(MEASUREMENT, blocks=24))
    for opened in (table, MeasurementTable(path)):
        assert [row.arch_key for row in opened.rows] == ["a", "b", "a"]
        found = opened.find(**key("a"))
        assert found is not None
        assert found.blocks == 24
        assert opened.find(**key("b")) == MEASUREMENT
    assert list(read_measurements(path)) == list(table.rows)
    assert path.read_text().splitlines()[0] == HEADER


@pytest.mark.parametrize(
    "changed",
    [
        {"role": "final"},
        {"arch_key": "z"},
        {"reference_key": ""},
        {"img_size": 64},
        {"num_classes": 11},
        {"in_chans": 1},
        {"batch": 1},
        {"dtype": "bfloat16"},
        {"runtime": "onnx"},
        {"fingerprint": "f" * 12},
    ],
)
def test_every_part_of_the_key_counts(tmp_path: Path, changed: dict[str, Any]) -> None:
    table = MeasurementTable(tmp_path / "m.csv")
    put(table, "a")
    assert table.find(**key("a")) is not None
    assert table.find(**key("a", **changed)) is None


def test_torn_anywhere_keeps_whole_rows_and_goes_on(tmp_path: Path) -> None:
    """Cut at every byte: rows before the cut survive, and the next append mends the file."""
    whole = tmp_path / "whole.csv"
    table = MeasurementTable(whole)
    for arch in "ab":
        put(table, arch)
    data = whole.read_bytes()
    path = tmp_path / "cut.csv"
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        opened = MeasurementTable(path)
        survivors = max(0, data[:cut].count(b"\n") - 1)
        assert len(opened.rows) == survivors
        if cut % 7 == 0:
            put(opened, "c")
            again = [row.arch_key for row in MeasurementTable(path).rows]
            assert again == [*"ab"[:survivors], "c"]
    path.write_bytes(data + b"x" * 5000)
    put(MeasurementTable(path), "c")
    assert [row.arch_key for row in MeasurementTable(path).rows] == [*"abc"]
    assert path.read_bytes().endswith(b"\n")
    assert path.read_bytes().count(HEADER.encode()) == 1


def test_bad_values_are_refused_naming_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    for arch in "ab":
        put(MeasurementTable(path), arch)
    text = path.read_text()
    for old, new, want in (
        (",12,3,", ",12.5,3,", "line 2: blocks"),
        (",90.25,", ",nan,", "line 2"),
        (",90.25,", ",900.0,", "line 2"),
        ("gate,", "gate,x,", "line 2: got 44 cells"),
    ):
        path.write_text(text.replace(old, new, 1))
        for read in (MeasurementTable, read_measurements):
            with pytest.raises(InputError, match=want) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    for data in (
        b"name,speed\na,1\n",
        b"\x89PNG\r\n\x1a\n",
        b"hello",
        b"\n\n",
        "ä\n".encode("latin1"),
    ):
        path.write_bytes(data)
        for read in (MeasurementTable, read_measurements):
            with pytest.raises(InputError):
                read(path)
        assert path.read_bytes() == data
    for missing in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match="--measurements"):
            read_measurements(missing)
    path.write_bytes(b"")
    assert MeasurementTable(path).rows == ()
    with pytest.raises(InputError):
        read_measurements(path)


def test_the_row_is_on_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.csv"
    synced: list[int] = []
    real = os.fsync

    def spy(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            synced.append(path.stat().st_size)
        real(handle)

    monkeypatch.setattr("nas.measure.measurement_table.os.fsync", spy)
    put(MeasurementTable(path), "a")
    assert synced == [path.stat().st_size]


def test_a_table_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    table = MeasurementTable(tmp_path / "gone" / "m.csv")
    with pytest.raises(InputError):
        put(table, "a")
    assert table.rows == ()
