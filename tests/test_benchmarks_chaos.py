"""A short campaign; `python -m benchmarks.chaos` is the long one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks._chaos_arena import Arena
from benchmarks._chaos_faults import FAULTS, Try, one_line

QUICK = "kill -9 of the trainer"
LOCAL = [name for name, fault in FAULTS.items() if not fault.solo]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_training_is_survived_and_counted(tmp_path: Path) -> None:
    out = tmp_path / "chaos.csv"
    words = ["--only", QUICK, "--tries", "1", "--jobs", "1"]
    assert chaos.main([*words, "--folder", str(tmp_path / "arena"), "--out", str(out)]) == 0
    (row,) = rows_of(out)
    assert tuple(row) == ("fault", "tried", "survived", "lost", "seconds_to_recover", "command")
    assert (row["fault"], row["tried"], row["survived"], row["lost"]) == (QUICK, "1", "1", "0")
    assert row["command"].startswith("python -m benchmarks.chaos --only")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOCAL if name != QUICK])
def test_every_fault_is_survived_once(name: str, tmp_path: Path) -> None:
    out = tmp_path / "chaos.csv"
    words = ["--only", name, "--tries", "1", "--jobs", "1", "--random-seed", "1"]
    assert chaos.main([*words, "--folder", str(tmp_path / "arena"), "--out", str(out)]) == 0
    assert rows_of(out)[0]["lost"] == "0"


def test_what_went_wrong_is_lost() -> None:
    """A campaign's counts are those of its tries."""
    tries = [Try([], 2.0), Try(["another winner"], 9.0), Try([], None), Try([], 4.0)]
    row = chaos.row_of("a fault", tries, "a command")
    assert (row.tried, row.survived, row.lost, row.seconds_to_recover) == (4, 3, 1, 4.0)


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
def test_bad_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chaos.main([*words, "--folder", str(tmp_path), "--out", str(tmp_path / "c.csv")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c.csv").exists()


def test_an_arena_knows_when_undisturbed_runs_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena(tmp_path, print)
    kind = arena.training()
    answers = iter([{"a": 1}, {"a": 2}])
    monkeypatch.setattr(Arena, "_undisturbed", lambda *_: 1.0)
    other = type(kind)(kind.name, kind.begin, kind.again, lambda _: next(answers))
    with pytest.raises(ValueError, match="two undisturbed runs that differ"):
        arena.truth(other)
