"""The counting benchmark: its table, its JSON line, its refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks.counts import COLUMNS, main


def test_table_json_and_csv_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "counts.csv"
    assert main(["--archs", "100000", "--out", str(out)]) in (0, 1)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(r) for r in rows] == [list(COLUMNS)] * len(rows)
    assert [{k: str(v) for k, v in r.items()} for r in last["rows"]] == rows
    assert [p.name for p in tmp_path.iterdir()] == ["counts.csv"]
    # A tenth of what is promised: a loaded machine must not fail the tests.
    assert all(r["fastest"] > 100_000 for r in last["rows"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--archs", "0"], "--archs: got 0"),
        (["--family", "resnet"], "--family: got resnet"),
        (["--img-size", "1"], "img_size: got 1"),
        (["--archs", "10", "--out", "/no/such/folder/counts.csv"], "--out: got /no/such"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(words)
    assert said.err.count("\n") == 1
