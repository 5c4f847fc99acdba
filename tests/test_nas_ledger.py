"""The study holds every decided candidate once and whole; bad databases end in one line."""

from __future__ import annotations

import csv
import dataclasses
import sqlite3
from pathlib import Path

import optuna
import pytest

from nas.search.study import COLUMNS, STAGES, Ledger, Trial
from space.errors import InputError

ARCH = {"embed_dims": [64, 128], "mlp_ratio": 4.0, "head_dim": 32}
MET = {"params": -5.0, "throughput": 0.0}


def row(step: int, key: str, **changes: object) -> Trial:
    base = Trial(step, key, key.upper(), "seed", "a 2->1", 1, "", 10, 20, 30)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


ROWS = [
    row(0, "seed", state="complete", stage="kept", soft_loss=0.5, soft_loss_se=0.1, top1=0.9),
    row(1, "a", stage="throughput", reason='too slow, by 3 %; "quoted", comma'),
    row(1, "b", stage="proxy", state="failed", reason="out of memory"),
    row(1, "c", stage="kept", state="complete", soft_loss=0.25, images_per_s=101.25),
]


def fill(path: Path) -> Ledger:
    ledger = Ledger(path, create=True)
    for r in ROWS:
        ledger.add(r, ARCH, MET)
    return ledger


def test_rows_come_back_whole_in_order_from_another_process_view(tmp_path: Path) -> None:
    fill(tmp_path / "study.db").close()
    again = Ledger(tmp_path / "study.db", create=False)
    assert again.rows == ROWS
    assert again.arch(1, "c") == ARCH
    stage = next(r.stage for r in again.rows if r.key == "b")
    assert again.failed(1, "b", stage)
    assert not any(again.failed(1, "b", other) for other in STAGES if other != stage)
    assert not again.failed(1, "c", stage)


def test_adding_a_row_twice_changes_nothing(tmp_path: Path) -> None:
    ledger = fill(tmp_path / "study.db")
    ledger.add(row(1, "a", reason="something else"), ARCH, MET)
    assert ledger.rows == ROWS
    assert Ledger(tmp_path / "study.db", create=False).rows == ROWS


def test_optuna_reads_the_study_with_states_values_and_constraints(tmp_path: Path) -> None:
    fill(tmp_path / "study.db").close()
    study = optuna.load_study(study_name="contraction", storage=f"sqlite:///{tmp_path}/study.db")
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE"]
    assert study.best_trial.value == 0.25
    assert study.trials[0].params["embed_dims[1]"] == 128
    assert study.trials[3].constraints == MET


def test_ledger_csv_has_one_line_a_candidate_and_empty_cells_for_none(tmp_path: Path) -> None:
    fill(tmp_path / "study.db").write_csv(tmp_path / "ledger.csv")
    with open(tmp_path / "ledger.csv", newline="") as lines:
        read = list(csv.DictReader(lines))
    assert tuple(read[0]) == COLUMNS
    assert [r["key"] for r in read] == ["seed", "a", "b", "c"]
    assert read[1]["reason"] == ROWS[1].reason
    assert read[1]["soft_loss"] == ""
    assert float(read[3]["images_per_s"]) == 101.25


def damaged(path: Path, how: str) -> None:
    if how == "text":
        path.write_text("not a database")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        fill(path).close()
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "flipped":
        fill(path).close()
        data = bytearray(path.read_bytes())
        data[4096 : 4096 + 2000] = bytes(2000)
        path.write_bytes(bytes(data))
    elif how == "foreign":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE birds (name TEXT)")
        connection.commit()
        connection.close()
    elif how == "other study":
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        optuna.create_study(study_name="other", storage=storage)
    elif how == "other rows":
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        study = optuna.create_study(study_name="contraction", storage=storage)
        study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"row": {"x": 1}}))


@pytest.mark.parametrize(
    "how", ["missing", "text", "empty", "cut", "flipped", "foreign", "other study", "other rows"]
)
def test_a_bad_database_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    path = tmp_path / "study.db"
    damaged(path, how)
    with pytest.raises(InputError) as refusal:
        Ledger(path, create=False)
    assert "\n" not in str(refusal.value)
    assert "study.db" in str(refusal.value)
