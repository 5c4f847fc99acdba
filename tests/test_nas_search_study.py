"""The study keeps every decided candidate once and whole; bad databases end in one line."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from conftest import Finished
from synthetic_run import as_saved_by_a_spreadsheet
from test_damage import damaged

from benchmarks.pareto import main as pareto
from nas.contract.__main__ import main as contract
from nas.core.table import read_table
from nas.search import storage
from nas.search.storage import StudyUnavailable
from nas.search.study import STAGES, StepRow, Study, Trial, open_study, read_study
from space.errors import InputError

ARCH = {"embed_dims": [64, 128], "mlp_ratio": 4.0, "head_dim": 32}
MET = {"params": -5.0, "throughput": 0.0}
TRIALS = [
    Trial(0, "seed", "21M", "", "", 0, "", 21, 21, 10, 9.5, state="complete", soft_loss=0.5),
    Trial(1, "a", "", "seed", "x 6->5", 1, "", 10, 20, 30, reason='slow, by 3 %; "quoted", comma'),
    Trial(1, "b", "", "seed", "y 4->3", 1, "5M", 10, 20, 30, state="failed", stage="proxy"),
    Trial(1, "c", "", "seed", "both", 2, "", 9, 19, 29, 101.25, state="complete", soft_loss=0.25),
    Trial(2, "c", "", "c", "", 0, "", 9, 19, 29, violation=float("inf"), log="logs/s2-c.log"),
]
NEW = Trial(2, "d", "", "c", "", 1, "", 8, 18, 28, reason="one more")
STEP = StepRow(1, 8, 12, "1.2x", 99, 3, 1, 0, 1, 1, 1, "c", 9, None, 0.25, None, 1.5)


def fill(path: Path) -> Study:
    study = Study(path, create=True)
    for trial in TRIALS:
        study.add(trial, ARCH, MET)
    study.add_step(STEP)
    return study


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("study") / "study.db"
    fill(path).close()
    return path.read_bytes()


@pytest.fixture
def path(whole: bytes, tmp_path: Path) -> Path:
    """A study in a file."""
    (tmp_path / "study.db").write_bytes(whole)
    return tmp_path / "study.db"


def rows_of(path: Path) -> list[Trial]:
    study = Study(path, create=False)
    study.close()
    return study.rows


def test_trials_come_back_whole_in_order(path: Path) -> None:
    again = Study(path, create=False)
    assert again.rows == TRIALS
    assert again.steps == [STEP]
    assert again.arch(1, "c") == ARCH
    assert [stage for stage in STAGES if again.failed(1, "b", stage)] == ["proxy"]
    assert not any(again.failed(1, key, stage) for key in "ax" for stage in STAGES)


def test_adding_again_changes_nothing(path: Path) -> None:
    study = Study(path, create=False)
    study.add(Trial(1, "a", "", "", "", 1, "", 1, 1, 1, reason="something else"), ARCH, MET)
    study.add_step(STEP)
    assert study.rows == rows_of(path) == TRIALS
    # A write whose answer was lost is repeated by Optuna: the first one counts.
    inner = optuna.load_study(study_name="contraction", storage=f"sqlite:///{path}")
    inner.add_trial(inner.trials[1])
    assert rows_of(path) == TRIALS
    study.add(NEW, {**ARCH, "mlp_ratio": 2000.0}, MET)  # of a narrow net
    assert rows_of(path) == [*TRIALS, NEW]


def test_optuna_reads_the_study_with_states_values_and_constraints(path: Path) -> None:
    study = optuna.load_study(study_name="contraction", storage=f"sqlite:///{path}")
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE", "PRUNED"]
    assert study.best_trial.value == 0.25
    assert study.trials[0].params["embed_dims[1]"] == 128
    assert study.trials[3].constraints == MET
    study.set_user_attr("note", "looks good")  # as a dashboard does
    study._storage.set_study_system_attr(study._study_id, "dashboard:note_ver", 1)
    assert rows_of(path) == TRIALS


def test_tables_are_drawn_with_empty_cells_for_none(path: Path) -> None:
    study = Study(path, create=False)
    study.write_csv(path.parent / "trials.csv")
    study.write_steps(path.parent / "steps.csv")
    assert read_table(path.parent / "trials.csv", Trial) == TRIALS
    assert read_table(path.parent / "steps.csv", StepRow) == [STEP]
    assert "None" not in (path.parent / "trials.csv").read_text()


BAD = {
    "missing": lambda path: path.unlink(),
    "text": lambda path: path.write_text("not a database"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "zeros": lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(2000) + path.read_bytes()[6096:]),
    "foreign": lambda path: sql(path.with_name(path.unlink() or path.name), "CREATE TABLE t (x)"),
    "another study": lambda path: sql(path, "UPDATE studies SET study_name = 'other'"),
    "another trial": lambda path: sql(
        path, "UPDATE trial_user_attributes SET value_json = '{\"x\": 1}' WHERE key = 'row'"
    ),
    "text for a number": lambda path: sql(
        path, """UPDATE trial_user_attributes SET value_json = replace(value_json, ' 10,', ' "10",')"""
    ),
    "no JSON": lambda path: sql(path, "UPDATE trial_user_attributes SET value_json = '{'"),
    "another step": lambda path: sql(path, "UPDATE study_user_attributes SET value_json = '[]'"),
}


def sql(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize("how", BAD)
def test_a_bad_database_is_refused_in_one_line(path: Path, how: str) -> None:
    BAD[how](path)
    with pytest.raises(InputError) as refusal:
        Study(path, create=False)
    assert "\n" not in str(refusal.value)
    assert "study.db" in str(refusal.value)
    assert "restore" in str(refusal.value)


@pytest.mark.parametrize("kind", ["flip", "noise", "zero", "cut"])
@pytest.mark.parametrize("tries", [pytest.param(15, id="few"), pytest.param(400, marks=pytest.mark.slow, id="many")])
def test_a_damaged_region_is_no_traceback(path: Path, whole: bytes, kind: str, tries: int) -> None:
    """One line, or trials that are values of their types."""
    rng, refused = random.Random(f"{kind}-{tries}"), 0
    used = [at for at, byte in enumerate(whole) if byte]  # most of a small database is empty
    for _ in range(tries):
        path.write_bytes(damaged(whole, kind, rng.choice(used), rng.choice([1, 7, 64, 512, 4096]), rng))
        try:
            rows_of(path)
        except InputError as error:
            refused += 1
            assert "study.db" in str(error)  # noqa: PT017  # both are fine here
            assert "\n" not in str(error)  # noqa: PT017
    assert kind == "flip" or refused


def test_lost_last_trials_are_decided_again(path: Path) -> None:
    for table in ("trial_user_attributes", "trial_params", "trial_system_attributes", "trials"):
        sql(path, f"DELETE FROM {table} WHERE trial_id = 5")
    study = Study(path, create=False)
    assert study.rows == TRIALS[:-1]
    study.add(TRIALS[-1], ARCH, MET)
    study.close()
    assert rows_of(path) == TRIALS


def test_a_study_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    study = open_study(tmp_path, None)
    study.add(TRIALS[0], ARCH, MET)
    study.write_csv(tmp_path / "trials.csv")
    study.close()
    assert open_study(tmp_path, None).rows == read_study(tmp_path, {}).rows == TRIALS[:1]
    (tmp_path / "study.db").unlink()
    with pytest.raises(InputError, match=r"study\.db: got no such file"):
        open_study(tmp_path, None)


KILLED = """
import os, sqlite3, sys
c = sqlite3.connect(sys.argv[1])
c.execute("PRAGMA cache_size = 1")
c.execute("BEGIN")
c.execute("UPDATE trial_user_attributes SET value_json = hex(randomblob(5000))")
c.execute("UPDATE trials SET number = number + 1")
os._exit(9)
"""
HOLD = """
import sqlite3, sys, time
c = sqlite3.connect(sys.argv[1])
c.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_kill_in_the_middle_of_a_trial_leaves_those_before_it(path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60)
    assert path.with_name("study.db-journal").stat().st_size > 0
    assert rows_of(path) == TRIALS


def held(path: Path, seconds: float) -> subprocess.Popen[str]:
    """Lock a database from another process, which lets go in the end."""
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.slow
def test_a_lock_is_waited_for_and_one_that_stays_ends_in_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(path, 1.0):
        assert rows_of(path) == TRIALS
    monkeypatch.setattr(storage, "TRY_S", 0.1)
    study = Study(path, create=False)
    with held(path, 60.0) as holder:
        with pytest.raises(StudyUnavailable) as adding:
            study.add(NEW, ARCH, MET)
        with pytest.raises(StudyUnavailable) as opening:
            Study(path, create=False)
        holder.kill()
    for refusal in (adding, opening):
        line = str(refusal.value)
        assert "database is locked" in line
        assert "end the process that holds it or free the disk, then --resume" in line
        assert "\n" not in line
    assert study.rows == TRIALS
    study.add(NEW, ARCH, MET)
    study.close()
    assert rows_of(path) == [*TRIALS, NEW]


@pytest.mark.parametrize("name", ["a b", "50%", "what?x=1", "{SCHEMA_VERSION}", "#1", "ü"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    study = open_study(folder, None)
    study.add(TRIALS[0], ARCH, MET)
    study.close()
    assert os.listdir(folder) == ["study.db"]
    assert rows_of(folder / "study.db") == TRIALS[:1]


def test_tables_of_a_run_saved_by_a_spreadsheet_are_no_hindrance(finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / finished.folder.name
    shutil.copytree(finished.folder, run)
    for name in ("trials.csv", "steps.csv", "models.csv"):
        as_saved_by_a_spreadsheet(run / name)
    (run / "report.md").unlink()
    resume = ["--resume", str(run), "--cache-dir", str(finished.cache), "--quiet"]
    assert contract(["--status", str(run)]) == contract(resume) == 0
    report = (run / "report.md").read_text().replace(str(run), str(finished.folder))
    assert report == (finished.folder / "report.md").read_text()
    assert pareto([str(run), "--out", str(tmp_path / "pareto.png")]) == 0
