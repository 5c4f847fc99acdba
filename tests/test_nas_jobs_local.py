"""A job may fail, crash, hang or print; the run goes on, and a dead driver leaves no orphan."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.jobs.job import Job, JobFunction
from nas.jobs.local import LocalExecutor
from nas.jobs.queue import OutOfTime
from tests import _worker

WORKER = [sys.executable, "-m", "tests._worker"]


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
    job = Job(_worker.echo, {"say": "häß\n", "ticks": 5}, "a")
    first = executor.run(job, tick=ticks.append)
    second = executor.run(Job(_worker.echo, {"say": [1, None]}, "b"))
    assert first.ok
    assert first.values["said"] == "häß\n"
    assert first.values["threads"] == 1
    assert second.values["said"] == [1, None]
    assert first.values["pid"] == second.values["pid"] != os.getpid()
    assert sum(ticks) == 5.0


@pytest.mark.parametrize(
    ("function", "spec", "reason"),
    [
        (_worker.fail, {"what": "runtime"}, "RuntimeError: two lines"),
        (_worker.fail, {"what": "memory"}, "out of memory"),
        (_worker.die, {"how": "exit"}, "ended with status 7"),
        (_worker.die, {"how": "kill"}, "killed by SIGKILL; out of memory?"),
        (_worker.refused, {}, "--teacher: got x, want y"),
        (pickle.dumps, {}, "ended with status 1"),  # no job function: nothing else is ever called
    ],
)
def test_a_failing_job_is_a_result_and_the_next_job_runs(
    executor: LocalExecutor, function: JobFunction, spec: dict[str, str], reason: str
) -> None:
    result = executor.run(Job(function, spec, "bad"))
    assert not result.ok
    assert result.reason is not None
    assert reason in result.reason
    assert "\n" not in result.reason
    assert result.values == ({"input_error": True} if function is _worker.refused else {})
    assert executor.run(Job(_worker.echo, {"say": 1}, "after")).ok


@pytest.mark.parametrize("die", [False, True])
def test_a_child_that_holds_the_pipes_neither_hangs_a_run_nor_outlives_it(die: bool) -> None:
    """Such as the one that a library forks to send its usage data."""
    executor = LocalExecutor(threads=1, command=WORKER)
    result = executor.run(Job(_worker.fork, {"die": die}, "a"))
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


def test_a_deadline_kills_the_job_and_leaves_the_executor_usable(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    executor.run(Job(_worker.echo, {}, "warm"))
    pid_file = tmp_path / "pid"
    job = Job(_worker.sleep, {"seconds": 600, "pid_file": str(pid_file)}, "long")
    with pytest.raises(OutOfTime):
        executor.run(job, deadline=time.monotonic() + 1.0)
    assert not alive(int(pid_file.read_text()))
    assert executor.run(Job(_worker.echo, {"say": 2}, "after")).ok


def test_a_killed_driver_leaves_no_worker_behind(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "from nas.jobs.local import LocalExecutor; from nas.jobs.job import Job\n"
        "from tests import _worker\n"
        f"job = Job(_worker.sleep, {{'seconds': 600, 'pid_file': {str(pid_file)!r}}}, 'x')\n"
        f"LocalExecutor(threads=1, command={WORKER!r}).run(job)"
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
