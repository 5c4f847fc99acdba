"""Measurements: verdicts, the table of a run, and the cache that earlier runs filled."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from nas.core.requirement import parse_requirement
from nas.measure.intervals import visit_interval
from nas.measure.measurement import Measurement, calmest, combined, visits_needed
from nas.measure.measurement_table import (
    HEADER,
    MOST_VISITS,
    MeasurementCache,
    MeasurementRow,
    MeasurementTable,
    read_measurements,
)
from space import InputError

MEASUREMENT = Measurement(
    **{"images_per_s": 100.5, "images_per_s_lo": 90.25, "images_per_s_hi": 110.0, "reference_images_per_s": 50.0},
    **{"ratio": 2.0, "ratio_lo": 1.9, "ratio_hi": 2.1, "coverage": 0.96, "seconds": 1.5, "load": 0.5},
    **{"blocks": 12, "passes": 3, "img_size": 48, "num_classes": 10, "in_chans": 3, "batch": 32, "threads": 2},
    **{"dtype": "float32", "runtime": "eager", "device": "cpu", "fingerprint": "0123456789ab"},
    when="2026-01-01T00:00:00+00:00",
)
ALONE = replace(MEASUREMENT, ratio=None, ratio_lo=None, ratio_hi=None, load=None)
LATENCY = {"latency_ms_p50": 8.0, "latency_ms_p50_lo": 7.0, "latency_ms_p50_hi": 9.0}


def row(arch: str = "a", **changes: Any) -> MeasurementRow:
    of = replace(MEASUREMENT, **changes)
    return MeasurementRow("gate", arch, f"label of {arch}", "seed", of)


def test_appended_rows_are_found_by_key_the_oldest_first(tmp_path: Path) -> None:
    path = tmp_path / "measurements.csv"
    table = MeasurementTable(path)
    assert (table.rows, path.exists()) == ((), False)
    for each in (row("a"), row("b"), row("a", blocks=24)):
        table.append(each)
    for opened in (table, MeasurementTable(path)):
        assert [each.arch_key for each in opened.rows] == ["a", "b", "a"]
        assert opened.find(row("a").key) == [row("a"), row("a", blocks=24)]
        assert opened.find(row("b").key) == [row("b")]
    assert read_measurements(path) == table.rows
    assert path.read_text().splitlines()[0] == HEADER


def test_every_part_of_the_key_counts(tmp_path: Path) -> None:
    table = MeasurementTable(tmp_path / "m.csv")
    table.append(row("a"))
    assert table.find(row("a").key)
    for name, value in vars(row("a").key).items():
        other = value + 1 if isinstance(value, int) else f"{value}x"
        assert table.find(replace(row("a").key, **{name: other})) == [], name


def test_torn_anywhere_keeps_whole_rows_and_goes_on(tmp_path: Path) -> None:
    """Cut at every byte: rows before the cut survive, and the next append mends the file."""
    whole = tmp_path / "whole.csv"
    table = MeasurementTable(whole)
    for arch in "ab":
        table.append(row(arch))
    data = whole.read_bytes()
    path = tmp_path / "cut.csv"
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        opened = MeasurementTable(path)
        survivors = max(0, data[:cut].count(b"\n") - 1)
        assert len(opened.rows) == survivors
        if cut % 7 == 0:
            opened.append(row("c"))
            again = [each.arch_key for each in MeasurementTable(path).rows]
            assert again == [*"ab"[:survivors], "c"]
    path.write_bytes(data + b"x" * 5000)
    MeasurementTable(path).append(row("c"))
    assert [each.arch_key for each in MeasurementTable(path).rows] == [*"abc"]
    assert path.read_bytes().endswith(b"\n")
    assert path.read_bytes().count(HEADER.encode()) == 1


def test_bad_values_are_refused_naming_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    for arch in "ab":
        MeasurementTable(path).append(row(arch))
    text = path.read_text()
    for old, new, want in (
        (",12,3,", ",12.5,3,", "line 2: blocks"),
        (",90.25,", ",nan,", "line 2"),
        (",90.25,", ",900.0,", "line 2"),
        ("gate,", "gate,x,", "line 2: got 45 cells"),
    ):
        path.write_text(text.replace(old, new, 1))
        for read in (MeasurementTable, read_measurements):
            with pytest.raises(InputError, match=want) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    for data in (b"name,speed\na,1\n", b"\x89PNG\r\n\x1a\n", b"hello", b"\n\n", "ä\n".encode("latin1")):
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


def test_the_row_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.csv"
    synced: list[int] = []
    real = os.fsync

    def spy(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            synced.append(path.stat().st_size)
        real(handle)

    monkeypatch.setattr("nas.measure.measurement_table.os.fsync", spy)
    MeasurementTable(path).append(row("a"))
    assert synced == [path.stat().st_size]


def test_a_table_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    table = MeasurementTable(tmp_path / "gone" / "m.csv")
    with pytest.raises(InputError):
        table.append(row("a"))
    assert table.rows == ()


# The cache of earlier runs.


def now(**changes: Any) -> str:
    return (datetime.now(timezone.utc) - timedelta(**changes)).isoformat(timespec="seconds")


def young(arch: str = "a", **changes: Any) -> MeasurementRow:
    return row(arch, **{"when": now(), **changes})


def test_a_visit_is_found_again_by_anyone(tmp_path: Path) -> None:
    first, kept = MeasurementCache(tmp_path / "m"), young()
    assert MeasurementCache(tmp_path / "m").find(kept.key) == []
    first.add(kept)
    second = MeasurementCache(tmp_path / "m")
    assert first.find(kept.key) == second.find(kept.key) == [kept]
    assert second.find(young("b").key) == []
    assert second.find(replace(kept.key, fingerprint="f" * 12)) == []


def test_only_young_visits_count_and_not_too_many(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path)
    rows = [young(seconds=float(n)) for n in range(MOST_VISITS + 4)]
    for each in (young(when=now(days=8)), young(when=""), young(when=now(days=6)), *rows):
        cache.add(each)
    assert MeasurementCache(tmp_path).find(rows[0].key) == rows[-MOST_VISITS:]
    other = MeasurementCache(tmp_path / "old")
    other.add(young(when=now(days=8)))
    assert other.find(rows[0].key) == []


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    caches = [MeasurementCache(tmp_path) for _ in range(2)]
    for number in range(6):
        caches[number % 2].add(young(str(number)))
    caches[0].add(young("0", seconds=9.0))
    fresh = MeasurementCache(tmp_path)
    assert [len(fresh.find(young(str(n)).key)) for n in range(6)] == [2, 1, 1, 1, 1, 1]


def test_disturbed_measurements_are_not_kept(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path / "m")
    cache.add(young(disturbed="waited 40% of the time for a core"))
    assert cache.find(young().key) == []
    assert MeasurementCache(tmp_path / "m").find(young().key) == []


@pytest.mark.parametrize("damage", [b"other,columns\n", b"\xff\x00", b""])
def test_a_damaged_table_is_set_aside_and_measuring_goes_on(damage: bytes, tmp_path: Path) -> None:
    MeasurementCache(tmp_path).add(young())
    (path,) = tmp_path.glob("*.csv")
    path.write_bytes(damage or path.read_bytes().replace(b",12,", b",x,"))
    second = MeasurementCache(tmp_path)
    assert second.find(young().key) == []
    assert [p.suffix for p in tmp_path.iterdir() if p.suffix != ".lock"] == [".damaged"]
    kept = young("b")
    second.add(kept)
    assert MeasurementCache(tmp_path).find(kept.key) == [kept]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = MeasurementCache(tmp_path / "file" / "m")
    cache.add(young())
    assert cache.find(young().key) == []
    if os.geteuid() != 0:  # root writes everywhere
        MeasurementCache(tmp_path / "m").add(young())
        (tmp_path / "m").chmod(0o500)
        cache = MeasurementCache(tmp_path / "m")
        cache.add(young("b"))
        cache.find(young().key)
        (tmp_path / "m").chmod(0o700)


# Visits.


def visit(ratio: float, **changes: Any) -> Measurement:
    single = dict.fromkeys(("images_per_s_lo", "images_per_s_hi", "ratio_lo", "ratio_hi"))
    return replace(MEASUREMENT, **single, **{"images_per_s": 50 * ratio, "ratio": ratio, "visits": 1, **changes})


def test_visits_combine_to_an_interval_over_visits() -> None:
    visits = [visit(x, when=str(n)) for n, x in enumerate((2.0, 2.1, 1.9, 2.05))]
    found = combined(visits)
    of = visit_interval([each.ratio for each in visits if each.ratio is not None])
    assert (found.ratio, found.ratio_lo, found.ratio_hi) == (of.median, of.lo, of.hi)
    assert (found.visits, found.blocks, found.passes, found.seconds) == (4, 48, 12, 6.0)
    assert (found.when, found.coverage) == ("3", 0.95)
    wider = combined(visits, looks=3)
    assert wider.half_width > found.half_width, "several looks share what may go wrong"
    few = combined(visits[:3])
    assert (few.ratio_lo, few.coverage, few.half_width) == (None, 0.0, math.inf)
    assert few.verdict_of(parse_requirement("speedup>=1@cpu", dtype="float32", batch=32)) == "undecided"


def test_a_percentile_has_an_interval_where_there_were_passes_enough() -> None:
    visits = [visit(2.0, latency_ms_p50=5.0 + n, latency_ms_p90=9.0, latency_ms_p99=9.9, passes=20) for n in range(4)]
    found = combined(visits)
    assert None not in (found.latency_ms_p50_lo, found.latency_ms_p90_lo)
    assert (found.latency_ms_p99, found.latency_ms_p99_lo) == (pytest.approx(9.9), None)


def test_disturbed_visits_count_only_where_there_are_no_others() -> None:
    calm, loud = [visit(2.0)] * 4, [visit(9.0, disturbed="waited")] * 3
    assert calmest([*loud, *calm], 4) == calm
    assert calmest([*loud, *calm[:3]], 4) == [*loud, *calm[:3]]


def test_the_visits_that_would_decide_are_told() -> None:
    required = parse_requirement("speedup>=1.99@cpu", dtype="float32", batch=32)
    visits = [visit(x) for x in (2.0, 2.1, 1.9, 2.05)]
    found = combined(visits)
    assert found.verdict_of(required) == "undecided"
    needed = visits_needed(found, required)
    assert needed is not None
    assert needed > 4
    assert visits_needed(combined([visit(1.99), visit(1.99), visit(1.98), visit(2.0)]), required) is None


# Verdicts.


@pytest.mark.parametrize(
    ("required", "wanted"),
    [
        ([], "pass"),
        *(([f"speedup>={x}"], v) for x, v in ((1.9, "pass"), (1.95, "undecided"), (2.1, "undecided"), (2.2, "fail"))),
        (["images_per_s>=111"], "fail"),
        (["speedup>=1.5", "images_per_s>=100"], "undecided"),
        (["images_per_s>=100", "speedup>=2.2"], "fail"),
        (["speedup>=1.9", "images_per_s>=90"], "pass"),
        *(([f"latency_ms<={x}"], v) for x, v in ((9, "pass"), (8, "undecided"), (7, "undecided"), (6.9, "fail"))),
        *(([f"peak_mem_mb<={x}"], v) for x, v in ((50, "pass"), (49.9, "fail"))),
    ],
)
def test_verdicts_by_interval_ends(required: list[str], wanted: str) -> None:
    read = [parse_requirement(f"{r}@cpu", dtype="float32", batch=32) for r in required]
    measured = replace(MEASUREMENT, **LATENCY, peak_mem_bytes=50_000_000)
    assert measured.meets(read) == wanted


def test_measurement_round_trip_and_nonsense() -> None:
    for found in (MEASUREMENT, ALONE):
        assert Measurement.from_dict(found.to_dict()) == found
    with pytest.raises(InputError, match="ratio_lo"):
        Measurement.from_dict({k: v for k, v in MEASUREMENT.to_dict().items() if k != "ratio_lo"})
    wrong: tuple[dict[str, Any], ...] = (
        {"images_per_s": float("nan")},
        {"images_per_s_lo": 101.0},
        {"ratio_lo": None},
        {"ratio": None},
        {"ratio": -1.0},
        {"blocks": 0},
        {"visits": 0},
        {"batch": 0},
        {**LATENCY, "latency_ms_p50_hi": 7.5},
    )
    for bad in wrong:
        with pytest.raises(InputError):
            replace(MEASUREMENT, **bad)
