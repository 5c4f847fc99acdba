"""Some tries; `python -m benchmarks.faults` does them all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.faults import __main__ as command
from benchmarks.faults.catalogue import FAULTS, Fault, Try, trainer
from benchmarks.faults.references import References, one_line

QUICK = "kill -9 of the trainer"


def run(tmp_path: Path, *words: str) -> int:
    return command.main([*words, "--folder", str(tmp_path / "folder"), "--out", str(tmp_path / "faults.csv")])


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return pd.read_csv(tmp_path / "faults.csv").to_dict("records")


@pytest.mark.slow
def test_a_killed_training_is_survived_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(References, "train_epochs", 3)
    assert run(tmp_path, "--only", QUICK, "--tries", "1", "--jobs", "1") == 0
    (row,) = rows_of(tmp_path)
    assert math.isfinite(row.pop("seconds_to_recover"))
    repeat = f"python -m benchmarks.faults --only '{QUICK}' --tries 1 --jobs 1"
    assert row == {"fault": QUICK, "tried": 1, "survived": 1, "lost": 0, "command": repeat}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.solo and name != QUICK])
def test_every_fault_is_survived_once(name: str, tmp_path: Path) -> None:
    assert run(tmp_path, "--only", name, "--tries", "1", "--jobs", "1", "--random-seed", "1") == 0
    assert rows_of(tmp_path)[0]["lost"] == 0


def test_what_went_wrong_is_lost() -> None:
    """The counts are those of the tries; what failed does not count for the time."""
    tries = [Try([], 2.0), Try(["another winner"], 9.0), Try([], None), Try([], 4.0)]
    row = command.row_of("a fault", tries, 1.5, "a command")
    assert (row.tried, row.survived, row.lost, row.seconds_to_recover) == (4, 3, 1, 1.5)
    assert math.isnan(command.row_of("a fault", tries[1:3], 1.5, "a command").seconds_to_recover)


def test_an_error_of_ours_is_a_loss_and_other_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> Try:
        raise OSError("no disk")

    faults = {"rain": Fault(2, trainer, broken), "sun": Fault(1, trainer, lambda *_: Try([], 3.0), solo=True)}
    monkeypatch.setattr(command, "FAULTS", faults)
    monkeypatch.setattr(References, "of", lambda *_: ({}, 1.0))
    assert run(tmp_path, "--only", "sun") == 0
    assert run(tmp_path, "--only", "rain") == 1
    rain, sun = rows_of(tmp_path)
    assert (rain["fault"], rain["tried"], rain["lost"]) == ("rain", 2, 2)
    assert (sun["fault"], sun["tried"], sun["lost"], sun["seconds_to_recover"]) == ("sun", 1, 0, 2.0)
    assert math.isnan(rain["seconds_to_recover"])


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        ("note\nerror: a: got b, want c\n", []),
        ("note\n", ["0 lines of refusal"]),
        ("error: a\nerror: b\n", ["2 lines of refusal"]),
        ("Traceback (most recent call last):\nerror: a\n", ["a traceback"]),
    ],
)
def test_a_refusal_is_one_line(output: str, wrong: list[str]) -> None:
    assert one_line(output) == wrong


def test_it_is_refused_when_undisturbed_runs_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references = References(tmp_path, print)
    answers = iter([{"a": 1}, {"a": 2}])
    monkeypatch.setattr(References, "_run", lambda *_: 1.0)
    with pytest.raises(ValueError, match="two undisturbed runs that differ"):
        references.of(replace(references.training(), outcome=lambda _: next(answers)))
