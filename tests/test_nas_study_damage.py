"""Whatever becomes of a study.db: it is refused in one line, or it gives the same answer."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nas.search.storage import StudyAway
from nas.search.study import CHECKSUM, Ledger, Trial, ledger_of
from space.errors import InputError

ARCH = {"embed_dims": [64, 128], "mlp_ratio": 4.0, "head_dim": 32}
SCORED: dict[str, object] = {"state": "complete", "stage": "kept", "soft_loss": 0.4375}
ROWS = [
    Trial(0, "seed", "21M", "", "", 0, "", 21_198_568, 21_198_568, 10, **SCORED),  # type: ignore[arg-type]
    Trial(1, "a", "", "seed", "depths[2] 6->5", 1, "", 10, 20, 30, reason='"slow", by 3 %\n'),
    Trial(1, "b", "", "seed", "mlp_ratio 4->3", 1, "5M", 10, 20, 30, state="failed", stage="proxy"),
    Trial(1, "c", "", "seed", "both", 2, "", 9, 19, 29, 101.25, 100.5, 102.0, **SCORED),  # type: ignore[arg-type]
    Trial(2, "c", "", "c", "", 0, "", 9, 19, 29, violation=0.0625, log="logs/s2-c.log"),
]
NEW = Trial(2, "d", "", "c", "", 1, "", 8, 18, 28, reason="one more")
CONSTRAINTS = {"params": -5.0, "throughput": 0.25}


def write(path: Path) -> None:
    ledger = Ledger(path, create=True)
    for number, row in enumerate(ROWS):
        ledger.add(row, {**ARCH, "head_dim": 32 + number}, CONSTRAINTS)
    ledger.close()


def archs(ledger: Ledger) -> list[object]:
    return [ledger.arch(row.step, row.key) for row in ledger.rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("study") / "study.db"
    write(path)
    return path.read_bytes()


def outcome(path: Path, *, go_on: bool = True) -> str:
    """Open a study as a resumed run does, and let it go on; anything but the truth is a line."""
    try:
        ledger = Ledger(path, create=False, wait_s=0.5)
        try:
            assert ledger.rows == ROWS
            assert archs(ledger) == [{**ARCH, "head_dim": 32 + n} for n in range(len(ROWS))]
            if go_on:
                ledger.add(NEW, ARCH, CONSTRAINTS)
        finally:
            ledger.close()
        if go_on:
            again = Ledger(path, create=False, wait_s=0.5)
            again.close()
            assert again.rows == [*ROWS, NEW]
    except InputError as error:
        line = str(error)
    else:
        return "harmless"
    assert "\n" not in line
    assert "study.db" in line
    return "refused"


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, float, int, bytes]:
    """A kind of damage, where (as a share of the file), how many bytes, and what with."""
    kind = draw(st.sampled_from(["bit", "bytes", "zeros", "cut", "moved"]))
    size = draw(st.sampled_from([1, 2, 7, 64, 512, 4096]))
    return (
        kind,
        draw(st.floats(0, 1, exclude_max=True)),
        size,
        draw(st.binary(min_size=1, max_size=8)),
    )


def damage(data: bytes, kind: str, at: int, size: int, fill: bytes) -> bytes:
    region = data[at : at + size]
    if kind == "bit":
        region = bytes([region[0] ^ (1 << fill[0] % 8)]) + region[1:]
    elif kind == "bytes":
        region = (fill * size)[: len(region)]
    elif kind == "zeros":
        region = bytes(len(region))
    elif kind == "cut":
        return data[:at]
    elif kind == "moved":  # a page's worth from elsewhere, as a bad disk may give it
        there = fill[0] * 4096 % len(data)
        region = (data[there:] + data)[: len(region)]
    return data[:at] + region + data[at + len(region) :]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(how=damages())
def test_a_damaged_region_is_refused_or_harmless(
    tmp_path: Path, whole: bytes, how: tuple[str, float, int, bytes]
) -> None:
    kind, share, size, fill = how
    path = tmp_path / "study.db"
    for leftover in tmp_path.iterdir():
        leftover.unlink()
    used = [at for at, byte in enumerate(whole) if byte]  # most of a small database is empty
    path.write_bytes(damage(whole, kind, used[int(share * len(used))], size, fill))
    outcome(path)


def text_places(data: bytes, text: bytes) -> Iterator[int]:
    at = data.find(text)
    while at >= 0:
        yield at
        at = data.find(text, at + 1)


def test_a_flipped_digit_of_a_trial_is_refused(tmp_path: Path, whole: bytes) -> None:
    """SQLite finds nothing wrong with any of these."""
    path = tmp_path / "study.db"
    found = 0
    for text, other in (
        (b"21198568", b"21198569"),
        (b"0.4375", b"0.4374"),
        (b"101.25", b"101.35"),
        (b"by 3 %", b"by 2 %"),
        (b'"head_dim": 34', b'"head_dim": 32'),
        (b'"key": "a"', b'"key": "e"'),
        (b"0.0625", b"0.0125"),
        (b'"params": -5.0', b'"params": -4.0'),
        (b"PRUNED", b"FAILED"),
        (b'"log": "', b'"lag": "'),
        (b"mlp_ratio 4->3", b"mlp_ratio 4->2"),
    ):
        for at in text_places(whole, text):
            path.write_bytes(whole[:at] + other + whole[at + len(text) :])
            assert outcome(path, go_on=False) == "refused", (text, at)
            found += 1
    assert found >= 15


STATEMENTS = [
    "DELETE FROM trials WHERE number = 1",
    "DELETE FROM trial_user_attributes WHERE trial_id = 2",
    "DELETE FROM trial_values",
    "DELETE FROM trial_params WHERE trial_id = 3",
    "DELETE FROM trial_system_attributes WHERE trial_id = 3",
    "UPDATE trials SET number = 4 - number",
    "UPDATE trials SET trial_id = 100 + trial_id WHERE trial_id = 2",
    "UPDATE trials SET state = 'COMPLETE' WHERE number = 1",
    "UPDATE trials SET state = 'RUNNING' WHERE number = 4",
    "UPDATE trials SET study_id = 7 WHERE number = 4",
    "UPDATE trial_values SET value = 0.0",
    "UPDATE trial_params SET param_value = param_value + 1",
    f"UPDATE trial_user_attributes SET key = 'x' WHERE key = '{CHECKSUM}' AND trial_id = 5",
    f"UPDATE trial_user_attributes SET key = 'x' WHERE key = '{CHECKSUM}' AND trial_id = 1",
    "UPDATE studies SET study_name = 'other'",
    "UPDATE study_directions SET direction = 'MAXIMIZE'",
    # Row 1 out, the others moved up: whole rows in a sound database.
    "DELETE FROM trial_user_attributes WHERE trial_id = 2;"
    "DELETE FROM trial_params WHERE trial_id = 2;"
    "DELETE FROM trial_system_attributes WHERE trial_id = 2;"
    "DELETE FROM trials WHERE trial_id = 2;"
    "UPDATE trials SET number = number - 1 WHERE number > 1",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_sound_database_with_other_rows_is_refused(
    tmp_path: Path, whole: bytes, statement: str
) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(whole)
    connection = sqlite3.connect(path)
    connection.executescript(statement)
    connection.close()
    assert outcome(path, go_on=False) == "refused"


def test_lost_last_rows_are_decided_again(tmp_path: Path, whole: bytes) -> None:
    """As after a kill: what a resumed run repeats is written once more, in the same place."""
    path = tmp_path / "study.db"
    path.write_bytes(whole)
    connection = sqlite3.connect(path)
    for table in ("trial_user_attributes", "trial_params", "trial_system_attributes", "trials"):
        connection.execute(f"DELETE FROM {table} WHERE trial_id = 5")
    connection.commit()
    connection.close()
    ledger = Ledger(path, create=False)
    assert ledger.rows == ROWS[:-1]
    ledger.add(ROWS[-1], {**ARCH, "head_dim": 36}, CONSTRAINTS)
    ledger.close()
    assert outcome(path) == "harmless"


def test_rows_of_earlier_versions_are_read_and_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    write(path)
    connection = sqlite3.connect(path)
    connection.execute(f"DELETE FROM trial_user_attributes WHERE key = '{CHECKSUM}'")
    connection.execute(
        "UPDATE trial_user_attributes SET value_json = json_remove(value_json, '$.log') "
        "WHERE key = 'row' AND trial_id < 5"
    )
    connection.commit()
    connection.close()
    assert outcome(path) == "harmless"
    connection = sqlite3.connect(path)
    connection.execute(
        "UPDATE trial_user_attributes SET value_json = replace(value_json, 'one', 'two')"
    )
    connection.commit()
    connection.close()
    with pytest.raises(InputError, match="trial 5"):
        Ledger(path, create=False)


def test_what_a_dashboard_adds_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    write(path)
    study = optuna.load_study(study_name="contraction", storage=f"sqlite:///{path}")
    study.set_user_attr("note", "looks good")
    study._storage.set_study_system_attr(study._study_id, "dashboard:note_ver", 1)
    assert outcome(path) == "harmless"


def test_a_study_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, None)
    ledger.add(ROWS[0], ARCH, CONSTRAINTS)
    ledger.write_csv(tmp_path / "ledger.csv")
    ledger.close()
    ledger_of(tmp_path, None).close()
    (tmp_path / "study.db").unlink()
    with pytest.raises(InputError, match=r"study\.db: got no such file"):
        ledger_of(tmp_path, None)


def test_a_kill_in_the_middle_of_a_row_leaves_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    write(path)
    script = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1])\n"
        "c.execute('PRAGMA cache_size = 1')\n"
        "c.execute('BEGIN')\n"
        "c.execute('UPDATE trial_user_attributes SET value_json = hex(randomblob(5000))')\n"
        "c.execute('UPDATE trials SET number = number + 1')\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=60)
    assert (tmp_path / "study.db-journal").stat().st_size > 0
    assert outcome(path) == "harmless"


HOLD = (
    "import sqlite3, sys, time\n"
    "c = sqlite3.connect(sys.argv[1])\n"
    "c.execute('BEGIN EXCLUSIVE')\n"
    "print('held', flush=True)\n"
    "time.sleep(float(sys.argv[2]))\n"
)


def held(path: Path, seconds: float) -> subprocess.Popen[str]:
    """Lock a database from another process, which lets go in the end."""
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_lock_of_another_process_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    write(path)
    ledger = Ledger(path, create=False, wait_s=20)
    with held(path, 1.0):
        ledger.add(NEW, ARCH, CONSTRAINTS)
    with held(path, 1.0):
        assert Ledger(path, create=False, wait_s=20).rows == [*ROWS, NEW]


def test_a_lock_that_stays_ends_in_one_line_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    write(path)
    ledger = Ledger(path, create=False, wait_s=0.5)
    with held(path, 60.0) as holder:
        started = time.monotonic()
        with pytest.raises(StudyAway) as adding:
            ledger.add(NEW, ARCH, CONSTRAINTS)
        with pytest.raises(StudyAway) as opening:
            Ledger(path, create=False, wait_s=0.5)
        assert time.monotonic() - started < 30  # Optuna pauses up to 2 s between its tries
        holder.kill()
    for refusal in (adding, opening):
        line = str(refusal.value)
        assert "study.db: got database is locked" in line
        assert "end the process that holds it, then --resume" in line
        assert "\n" not in line
    assert ledger.rows == ROWS
    ledger.add(NEW, ARCH, CONSTRAINTS)
    ledger.close()
    assert Ledger(path, create=False).rows == [*ROWS, NEW]


def test_a_copy_that_writes_too_is_found_out(tmp_path: Path) -> None:
    """Two processes on one study, as two copies of a run's folder in one database would be."""
    path = tmp_path / "study.db"
    write(path)
    ours, other = Ledger(path, create=False), Ledger(path, create=False)
    other.add(NEW, ARCH, CONSTRAINTS)
    with pytest.raises(InputError, match="another process"):
        ours.add(Trial(3, "x", "", "", "", 1, "", 1, 1, 1), ARCH, CONSTRAINTS)
    ours.add(NEW, ARCH, CONSTRAINTS)  # the same row: as if the answer to it had been lost
    ours.close()
    other.close()
    assert outcome_rows(path) == [*ROWS, NEW]


def outcome_rows(path: Path) -> list[Trial]:
    ledger = Ledger(path, create=False)
    ledger.close()
    return ledger.rows


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    for name in ("a b", "50%", "what?x=1", "{SCHEMA_VERSION}", "#1", "ü"):
        folder = tmp_path / name
        folder.mkdir()
        ledger = ledger_of(folder, None)
        ledger.add(ROWS[0], ARCH, CONSTRAINTS)
        ledger.close()
        assert os.listdir(folder) == ["study.db"]
        assert outcome_rows(folder / "study.db") == ROWS[:1]


@pytest.mark.slow
def test_every_region_is_refused_or_harmless(tmp_path: Path, whole: bytes) -> None:
    """Each 64 bytes of the file with a bit flipped, overwritten and zeroed; cut at each 512."""
    path = tmp_path / "study.db"
    rng = random.Random(0)
    told = {"refused": 0, "harmless": 0}
    work = []
    kinds = ("bit", "bytes", "zeros")
    for at in range(0, len(whole), 64):
        empty = not any(whole[at : at + 64])
        work += [(kind, at) for kind in kinds if not empty or at % 1024 == 0]
    work += [("cut", at) for at in range(0, len(whole), 512)]
    for kind, at in work:
        place = at + rng.randrange(64) if kind == "bit" else at
        made = damage(whole, kind, place, 64, rng.randbytes(8))
        if made == whole:
            continue
        path.write_bytes(made)
        path.with_name("study.db-journal").unlink(missing_ok=True)
        told[outcome(path)] += 1
    assert min(told.values()) > 100
    shutil.rmtree(tmp_path)
