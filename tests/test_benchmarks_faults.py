"""Some tries; `python -m benchmarks.faults` does them all."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from benchmarks.faults import __main__ as command
from benchmarks.faults.catalogue import FAULTS
from benchmarks.faults.references import References, one_line
from benchmarks.faults.tries import Fault, Try

QUICK = "kill -9 of the trainer"
LOCAL = [name for name, fault in FAULTS.items() if not fault.solo]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_training_is_survived_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(References, "train_epochs", 3)
    out = tmp_path / "faults.csv"
    words = ["--only", QUICK, "--tries", "1", "--jobs", "1"]
    assert command.main([*words, "--folder", str(tmp_path / "folder"), "--out", str(out)]) == 0
    (row,) = rows_of(out)
    assert tuple(row) == ("fault", "tried", "survived", "lost", "seconds_to_recover", "command")
    assert (row["fault"], row["tried"], row["survived"], row["lost"]) == (QUICK, "1", "1", "0")
    assert row["command"] == ("python -m benchmarks.faults --only 'kill -9 of the trainer' --tries 1 --jobs 1")
    assert math.isfinite(float(row["seconds_to_recover"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOCAL if name != QUICK])
def test_every_fault_is_survived_once(name: str, tmp_path: Path) -> None:
    out = tmp_path / "faults.csv"
    words = ["--only", name, "--tries", "1", "--jobs", "1", "--random-seed", "1"]
    assert command.main([*words, "--folder", str(tmp_path / "folder"), "--out", str(out)]) == 0
    assert rows_of(out)[0]["lost"] == "0"


def test_what_went_wrong_is_lost() -> None:
    """The counts are those of the tries; what failed does not count for the time."""
    tries = [Try([], 2.0), Try(["another winner"], 9.0), Try([], None), Try([], 4.0)]
    row = command.row_of("a fault", tries, 1.5, "a command")
    assert (row.tried, row.survived, row.lost, row.seconds_to_recover) == (4, 3, 1, 1.5)
    assert math.isnan(command.row_of("a fault", tries[1:3], 1.5, "a command").seconds_to_recover)


def test_an_error_of_ours_is_a_loss_and_other_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> Try:
        raise OSError("no disk")

    faults = {
        "rain": Fault(2, References.training, broken),
        "sun": Fault(1, References.training, lambda *_: Try([], 3.0), solo=True),
    }
    monkeypatch.setattr(command, "FAULTS", faults)
    monkeypatch.setattr(References, "of", lambda *_: ({}, 1.0))
    out = tmp_path / "faults.csv"
    words = ["--folder", str(tmp_path / "folder"), "--out", str(out)]
    assert command.main([*words, "--only", "sun"]) == 0
    assert command.main([*words, "--only", "rain"]) == 1
    found = [(r["fault"], r["tried"], r["lost"], r["seconds_to_recover"]) for r in rows_of(out)]
    assert found == [("rain", "2", "2", ""), ("sun", "1", "0", "2.0")]


def test_a_refusal_is_one_line() -> None:
    assert one_line("note\nerror: a: got b, want c\n") == []
    assert one_line("note\n") == ["0 lines of refusal"]
    assert one_line("error: a\nerror: b\n") == ["2 lines of refusal"]
    assert one_line("Traceback (most recent call last):\nerror: a\n") == ["a traceback"]


def test_a_hundred_runs_are_killed_by_default() -> None:
    killed = {name: fault.tries for name, fault in FAULTS.items() if name.startswith("kill -9")}
    assert sum(killed.values()) >= 100
    assert killed["kill -9 of the driver, TinyViT-21M"] >= 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "rain"], "--only: got rain"),
        (["--tries", "0"], "--tries: got 0"),
        (["--jobs", "0"], "--jobs: got 0"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--folder", str(tmp_path), "--out", str(tmp_path / "c.csv")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c.csv").exists()


def test_it_is_refused_when_undisturbed_runs_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references = References(tmp_path, print)
    kind = references.training()
    answers = iter([{"a": 1}, {"a": 2}])
    monkeypatch.setattr(References, "_run", lambda *_: 1.0)
    other = type(kind)(kind.name, kind.begin, kind.resume, lambda _: next(answers))
    with pytest.raises(ValueError, match="two undisturbed runs that differ"):
        references.of(other)
