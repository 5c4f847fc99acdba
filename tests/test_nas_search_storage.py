"""A study in PostgreSQL: the trials of SQLite, many runs side by side, no password on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Finished
from postgres_server import DATABASE, PASSWORD, USER, Server, serving, why_not

from benchmarks.throughput.networks import _pareto_set
from nas.contract.__main__ import main
from nas.contract.replay import read_earlier
from nas.contract.run import RunResult
from nas.contract.state import Run
from nas.core.cli import recorded_command
from nas.search.storage import SharedStudy, StudyUnavailable, check_reachable, new_shared, resumed_shared
from nas.search.study import StepRow, Study, Trial, open_study, read_study
from space import get_family
from space.errors import InputError, refuse, without_passwords

ARCH = {"embed_dims": [64, 128], "mlp_ratio": 4.0, "head_dim": 32}
BOUNDS = {"params": -5.0, "throughput": 0.25}
needs_server = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def rows(count: int, tag: str = "k") -> list[Trial]:
    ends = [
        {"state": "complete", "stage": "kept", "soft_loss": 0.1 + 0.2},
        {"stage": "throughput", "reason": "zu langsam: 3 % \x00 'quoted' \U0001f600"},
        {"state": "failed", "stage": "proxy", "violation": float("inf")},
    ]
    return [Trial(n, f"{tag}{n}", "", "", "", 1, "", 10**9 + n, 2, 3, **ends[n % 3]) for n in range(count)]  # type: ignore[arg-type]


def fill(study: Study, wanted: list[Trial]) -> None:
    for row in wanted:
        study.add(row, ARCH, BOUNDS)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


@pytest.fixture(autouse=True)
def _no_passwords_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "no.pgpass"))


@needs_server
def test_rows_are_those_of_sqlite(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = new_shared(server.url(), tmp_path / "a run, ünïcode")
    kept = {"storage": json.loads(json.dumps(shared.to_json()))}
    assert PASSWORD not in str(kept)
    assert PASSWORD not in repr(shared)
    tables = []
    for where in (tmp_path / "study.db", shared):
        study = Study(where, create=True)
        fill(study, rows(7))
        fill(study, rows(7))  # again: nothing
        study.write_csv(tmp_path / "trials.csv")
        study.close()
        tables.append((tmp_path / "trials.csv").read_bytes())
    assert tables[0] == tables[1]
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    again = read_study(tmp_path / "elsewhere", kept)
    assert again.rows == rows(7)
    assert again.arch(3, "k3") == ARCH
    again.close()


TWO = """
import sys
sys.path[:0] = [sys.argv[1]]
from test_nas_search_storage import fill, rows
from nas.search.study import Study
from nas.search.storage import SharedStudy
tag, url, password = sys.argv[2:]
study = Study(SharedStudy(url, "study-" + tag, password), create=True)
fill(study, rows(12, tag))
"""


@needs_server
def test_two_runs_begin_and_write_in_an_empty_database_at_once(server: Server) -> None:
    server.sql("CREATE DATABASE empty")
    url = server.url(None, "empty")
    tests = str(Path(__file__).parent)
    both = [subprocess.Popen([sys.executable, "-c", TWO, tests, tag, url, PASSWORD]) for tag in "xy"]
    assert [process.wait(120) for process in both] == [0, 0]
    for tag in "xy":
        study = Study(SharedStudy(url, f"study-{tag}", PASSWORD), create=False)
        assert study.rows == rows(12, tag)
        study.close()
    assert len(server_studies(server, "empty")) == 2


def server_studies(server: Server, database: str = DATABASE) -> list[str]:
    if server.sql("SELECT to_regclass('studies')", database) == [(None,)]:
        return []
    found = server.sql("SELECT study_name FROM studies ORDER BY study_name", database)
    return [str(name) for (name,) in found]


@needs_server
def test_a_server_that_is_away_ends_in_one_line_and_the_study_goes_on(tmp_path: Path) -> None:
    wanted = rows(6)
    with serving() as server:
        shared = new_shared(server.url(), tmp_path)
        study = Study(shared, create=True)
        fill(study, wanted[:1])
        server.stop()
        server.start()
        fill(study, wanted[:2])  # restarted between trials: not noticed
        server.kill()
        with pytest.raises(StudyUnavailable) as adding:
            fill(study, wanted[:4])
        with pytest.raises(StudyUnavailable) as opening:
            check_reachable(shared)
        for refusal in (adding, opening):
            line = str(refusal.value)
            assert "refused" in line
            assert "--resume" in line
            assert "\n" not in line
        server.start()
        again = open_study(tmp_path, shared)
        fill(again, wanted)
        again.close()
        assert again.rows == Study(shared, create=False).rows == wanted
        assert server.sql("SELECT count(*) FROM trials") == [(6,)]
        # Deleted meanwhile, by the dashboard's button.
        Study(shared, create=False).remove()
        with pytest.raises(InputError, match="without the study"):
            fill(study, rows(7))
        with pytest.raises(InputError, match="without the study"):
            Study(shared, create=False)


@needs_server
def test_a_copy_in_a_file_serves_readers_without_the_server(tmp_path: Path) -> None:
    step = StepRow(1, 8, 12, "1.2x", 99, 3, 1, 0, 1, 1, 1, "k1", 9, None, 0.25, None, 1.5)
    with serving() as server:
        shared = new_shared(server.url(), tmp_path)
        study = Study(shared, create=True)
        fill(study, rows(4))
        study.add_step(step)
        study.export(tmp_path / "study.db")
        study.close()
    run = {"storage": shared.to_json()}
    copy = read_study(tmp_path, run)
    assert copy.rows == rows(4)
    assert copy.steps == [step]
    with pytest.raises(StudyUnavailable):
        open_study(tmp_path, shared)  # a run that goes on needs the server
    assert (tmp_path / "study.db").exists()
    (tmp_path / "study.db").unlink()
    with pytest.raises(StudyUnavailable):
        read_study(tmp_path, run)


def reach_and_begin(shared: SharedStudy) -> None:
    check_reachable(shared)
    Study(shared, create=True)


@needs_server
def test_what_the_server_refuses_is_one_line_at_once_without_the_password(server: Server, tmp_path: Path) -> None:
    server.sql("CREATE ROLE guest LOGIN PASSWORD 'guest/word'")
    server.sql("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    server.sql("CREATE DATABASE other")
    guest = server.url(None).replace(f"{USER}@", "guest:guest%2Fword@")
    for url, reason in {
        server.url("wr0ng/word"): "authentication failed",
        server.url(None): "no password supplied",
        server.url(database="nowhere"): "does not exist",
        guest.replace("/runs", "/other"): "permission denied",
        server.url() + "?sslmode=require": "SSL",
        server.url() + "?port=1&port=2": "ports",
        server.url() + "?connect_timeout=x": "connect_timeout",
    }.items():
        with pytest.raises(InputError) as refusal:
            reach_and_begin(new_shared(url, tmp_path))
        line = str(refusal.value)
        assert reason in line
        assert "PGPASSWORD" in line
        assert "\n" not in line
        assert "word" not in line.lower().replace("password", "")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("sqlite:///all.db", "own study.db"),
        ("mysql://me:pa55@host/db", "mysql://..."),
        ("postgresql+asyncpg://me:pa55@host/db", "postgresql+asyncpg"),
        ("me:pa55@host/db", "cannot be read"),
        ("postgresql://me:pa55@host:port/db", "cannot be read"),
        ("postgresql://me:pa@pa55@host/db", "more than one @"),
        ("postgresql://me:pa55@host", "without a database"),
        ("postgresql://me@host/db?sslpassword=pa55", "sslpassword"),
        ("postgresql://me@host/db?ssl%70assword=pa55", "sslpassword"),
        ("", "cannot be read"),
        *(
            (f"postgresql://me@host/db?{key}=pa55", "an option")
            for key in ("passwd", "Pass%20word", "p%2561ssword", "token")
        ),
        ("postgresql://host/db?options=-c%20password%3Dpa55", "a secret in options"),
        ("postgresql://host/db&password=pa55", "with = before its ?"),
        ("host=h user=me password=pa55", "cannot be read"),
    ],
)
def test_an_address_that_is_none_is_refused_without_repeating_it(address: str, reason: str) -> None:
    with pytest.raises(InputError) as refusal:
        new_shared(address, Path("run"))
    assert reason in str(refusal.value)
    assert "pa55" not in str(refusal.value)


def test_without_a_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install -e '.\[postgres\]'"):
        check_reachable(new_shared("postgresql://me:pa55@127.0.0.1:1/db", Path("run")))


def test_what_run_json_keeps_and_what_a_resume_may_say(tmp_path: Path) -> None:
    given = "postgres://me:p%40ss@host:5433/db?sslmode=require&password=ignored"
    shared = new_shared(given, tmp_path / "my run")
    blanks = new_shared("postgresql://me:p ss@host/db?p%61ssword=p%20ss", tmp_path)
    assert (blanks.url, blanks.password) == ("postgresql://me@host/db", "p ss")
    kept = shared.to_json()
    assert kept["url"] == "postgresql://me@host:5433/db?sslmode=require"
    assert kept["study"].startswith("my-run-")
    assert shared.password == "p@ss"
    assert new_shared(given, tmp_path / "my run").study != shared.study
    path = tmp_path / "run.json"
    assert resumed_shared(kept, None, path) == SharedStudy(kept["url"], kept["study"])
    assert resumed_shared(kept, given, path) == SharedStudy(kept["url"], kept["study"], "p@ss")
    moved = resumed_shared(kept, "postgresql://me@other/db", path)
    assert moved == SharedStudy("postgresql://me@other/db", kept["study"], begin=False)
    assert resumed_shared(None, None, path) is None
    with pytest.raises(InputError, match="drop --storage"):
        resumed_shared(None, given, path)
    for bad in ([], {"url": 1}, {"url": "x://y", "study": "z"}, "text"):
        with pytest.raises(InputError):
            resumed_shared(bad, None, path)


def test_refusals_and_records_tell_no_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--storag", "postgresql://me:pa55@host/db", "--seed", "5M"])
    assert "pa55" not in capsys.readouterr().err
    for secret in ("pa55", "pa55/w", "pa55@w", "pa55:w", "pa55?w#", "4 pa55", "p pa55@ w"):
        for text in (
            f"--storag postgresql://me:{secret}@host/db",
            f"--storage=postgresql+psycopg://me:{secret}@host:5432/db?sslmode=require",
            f"postgresql://host/db?user=me&password={secret.split('@')[0]}&x=1",
            f"postgresql://host/db?p%61ssword={secret.split('@')[0]}&x=1",
        ):
            assert "pa55" not in without_passwords(text)
            assert "pa55" not in str(refuse(text, text + " " * 200 + text, "x"))
        address = f"postgresql://host/db?pass%2577 ord={secret}"
        for words in (["--storage", address], [f"--storage={address}"]):
            assert "pa55" not in recorded_command(["contract", *words, "--seed", "5M"])
    for pairs in ("host=h password=pa55 user=me", "password = 'a pa55'", "PGPASSWORD=pa55", "api_key=pa55"):
        assert "pa55" not in without_passwords(pairs)
    for plain in (
        "--data images@home --seed 21M",
        "file:///a/b@c",
        "https://host/x:y",
        "--storage postgresql://host:5432/db --data images@home",
    ):
        assert without_passwords(plain) == plain


@needs_server
def test_the_dashboard_serves_the_studies(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    shared = new_shared(server.url(), tmp_path / "watched")
    fill(Study(shared, create=True), rows(3))
    port = server.port + 1 if server.port < 65_000 else server.port - 1
    address = shared.url.replace("://", "+psycopg://")
    flags = [address, "--host", "127.0.0.1", "--port", str(port), "--server", "wsgiref"]
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()", *flags]
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until, names = time.monotonic() + 60, ""
    try:
        while not names:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as response:
                    names = response.read().decode()
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.3)
    finally:
        process.terminate()
        process.wait(30)
    assert all(name in names for name in (shared.study, *server_studies(server)))


@pytest.mark.slow
@needs_server
def test_a_whole_run_in_a_shared_database(
    server: Server,
    tmp_path: Path,
    finished: Finished,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The password is nowhere on disk; status, resuming, reading work; refusals leave none."""
    folder, before = tmp_path / "run", server_studies(server)
    arguments = [*finished.flags, "--out", str(folder), "--storage", server.url()]
    monkeypatch.setattr(sys, "argv", ["nas.contract", *arguments])
    assert main(arguments) == 0
    assert (folder / "study.db").exists()  # a copy for readers
    (study,) = set(server_studies(server)) - set(before)
    run = json.loads((folder / "run.json").read_text())
    assert run["storage"] == {"url": server.url(None), "study": study}
    assert f"--storage {server.url(None)}" in run["command"]
    assert main(["--status", str(folder)]) == 0  # without a password
    # A resume asks the database; the password is given again, or in the environment.
    drawn = (folder / "trials.csv").read_bytes()
    resume = ["--resume", str(folder), "--cache-dir", str(finished.cache)]
    (folder / "result.json").unlink()
    assert main(resume) == 2
    assert "no password supplied" in capfd.readouterr().err
    assert main([*resume, "--storage", server.url()]) == 0
    (folder / "result.json").unlink()
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert main(resume) == 0
    assert (folder / "trials.csv").read_bytes() == drawn
    assert server_studies(server).count(study) == 1
    # A replay and a benchmark read it.
    family = get_family(run["config"]["family"])
    scored = read_earlier(folder, family, run["dataset"]["fingerprint"]).scored
    assert scored
    assert {net.arch for net in _pareto_set(folder, family) if net.found} <= {a for _, a in scored}
    monkeypatch.delenv("PGPASSWORD")
    # Refused before there was a row: neither a folder nor a study.
    refused = tmp_path / "refused"
    more = ["--out", str(refused), "--storage", server.url(), "--seed-weights", str(folder)]
    assert main([*finished.flags, *more]) == 2
    assert not refused.exists()
    assert set(server_studies(server)) == {*before, study}
    capture = capfd.readouterr()
    files = [p.read_bytes() for place in (tmp_path, finished.cache) for p in place.rglob("*") if p.is_file()]
    for secret in (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD, safe=" +")):
        assert secret not in capture.out + capture.err
        assert not any(secret.encode() in content for content in files)


@pytest.mark.slow
@needs_server
def test_an_outage_before_the_first_row_keeps_the_run(
    tmp_path: Path, finished: Finished, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained by then is worth keeping; any other refusal there leaves nothing."""
    folder = tmp_path / "run"
    resume = ["--resume", str(folder), "--cache-dir", str(finished.cache), "--quiet"]
    with serving() as server:
        begun = [*finished.flags, "--out", str(folder), "--storage", server.url(), "--quiet"]

        def first_row(run: Run, check: object, *, fresh: bool) -> RunResult:
            if fresh:
                assert len(server_studies(server)) == 1
                server.kill()
            fill(run.study, rows(1))
            return RunResult("stopped", 3, "", folder, {})

        def refused(run: Run, check: object, *, fresh: bool) -> RunResult:
            assert len(server_studies(server)) == 1
            raise refuse("--steps", 1, "another number")

        monkeypatch.setattr("nas.contract.run.execute", refused)
        assert main(begun) == 2
        assert not folder.exists()
        assert server_studies(server) == []
        capfd.readouterr()
        monkeypatch.setattr("nas.contract.run.execute", first_row)
        assert main(begun) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert "--resume" in error
        assert (folder / "run.json").exists()
        assert main([*resume, "--storage", server.url()]) == 2
        server.start()
        assert main([*resume, "--storage", server.url()]) == 3
        assert server.sql("SELECT count(*) FROM trials") == [(1,)]
