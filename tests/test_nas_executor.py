"""A job may fail, crash, hang or print; the run goes on, and a dead driver leaves no orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.jobs.executor import LocalExecutor, OutOfTime
from nas.jobs.job import Job

WORKER = [sys.executable, str(Path(__file__).with_name("_worker.py"))]


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalExecutor]:
    log = tmp_path_factory.mktemp("log") / "worker.log"
    with LocalExecutor(threads=1, log=log, command=WORKER) as made:
        yield made


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_jobs_share_a_process_with_the_asked_threads_and_may_print(executor: LocalExecutor) -> None:
    ticks: list[float] = []
    job = Job("echo", "a", {"say": "häß\n", "ticks": 5})
    first = executor.run(job, tick=ticks.append)
    second = executor.run(Job("echo", "b", {"say": [1, None]}))
    assert first.ok
    assert first.values["said"] == "häß\n"
    assert first.values["threads"] == 1
    assert second.values["said"] == [1, None]
    assert first.values["pid"] == second.values["pid"] != os.getpid()
    assert sum(ticks) == 5.0


@pytest.mark.parametrize(
    ("kind", "spec", "reason"),
    [
        ("raise", {"what": "runtime"}, "RuntimeError: two lines"),
        ("raise", {"what": "memory"}, "out of memory"),
        ("die", {"how": "exit"}, "ended with status 7"),
        ("die", {"how": "kill"}, "killed by SIGKILL; out of memory?"),
        ("no such kind", {}, "KeyError"),
    ],
)
def test_a_failing_job_is_a_result_and_the_next_job_runs(
    executor: LocalExecutor, kind: str, spec: dict[str, str], reason: str
) -> None:
    result = executor.run(Job(kind, "bad", spec))
    assert not result.ok
    assert result.reason is not None
    assert reason in result.reason
    assert "\n" not in result.reason
    assert executor.run(Job("echo", "after", {"say": 1})).ok


@pytest.mark.parametrize("die", [False, True])
def test_a_child_that_holds_the_pipes_neither_hangs_a_run_nor_outlives_it(die: bool) -> None:
    """Such as the one that a library forks to send its usage data."""
    executor = LocalExecutor(threads=1, command=WORKER)
    result = executor.run(Job("fork", "a", {"die": die}))
    assert result.ok is not die
    if die:
        assert result.reason is not None
        assert "ended with status 7" in result.reason
    started = time.monotonic()
    executor.close()
    assert time.monotonic() - started < 20
    if not die:
        until = time.monotonic() + 20  # the kernel ends a killed process when it gets to it
        while alive(result.values["child"]) and time.monotonic() < until:
            time.sleep(0.02)
        assert not alive(result.values["child"])


def test_bad_input_is_marked_as_such(executor: LocalExecutor) -> None:
    result = executor.run(Job("refuse", "bad", {}))
    assert result.values == {"input_error": True}
    assert result.reason == "--teacher: got x, want y"


def test_a_deadline_kills_the_job_and_leaves_the_executor_usable(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    executor.run(Job("echo", "warm", {}))
    pid_file = tmp_path / "pid"
    job = Job("sleep", "long", {"seconds": 600, "pid_file": str(pid_file)})
    with pytest.raises(OutOfTime):
        executor.run(job, deadline=time.monotonic() + 1.0)
    assert not alive(int(pid_file.read_text()))
    assert executor.run(Job("echo", "after", {"say": 2})).ok


def test_a_killed_driver_leaves_no_worker_behind(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import sys; from nas.jobs.executor import LocalExecutor; from nas.jobs.job import Job\n"
        f"LocalExecutor(threads=1, command={WORKER!r}).run("
        f"Job('sleep', 'x', {{'seconds': 600, 'pid_file': {str(pid_file)!r}}}))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        worker = int(pid_file.read_text())
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    until = time.monotonic() + 10
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)
