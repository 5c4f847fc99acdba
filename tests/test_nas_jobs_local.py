"""Jobs may fail, crash, hang or print; the run goes on, and a killed driver leaves no orphan."""

from __future__ import annotations

import csv
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.core.executor_config import ExecutorConfig
from nas.jobs.executor import workers_for
from nas.jobs.job import Job, JobFunction
from nas.jobs.local import LocalExecutor
from nas.jobs.queue import ATTEMPT_COLUMNS, OutOfTime
from space.errors import InputError
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


def ends(pid: int) -> bool:
    """Return whether a process ends within 20 s: the kernel takes its time."""
    until = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a forked job is a fresh one")
def test_forked_jobs_run_in_processes_of_their_own(tmp_path: Path) -> None:
    """Each in a new one with the asked threads; a killed one fails alone, and a used worker is not forked from."""
    with LocalExecutor(threads=1, log=tmp_path / "worker.log", command=WORKER) as executor:

        def run(function: Any, key: str, argument: Any, **how: bool) -> Any:
            return executor.run(Job(function, argument, key, **how))

        ticks: list[float] = []
        first = executor.run(Job(_worker.echo, {"ticks": 2}, "a", forked=True), tick=ticks.append)
        second = run(_worker.echo, "b", {}, forked=True)
        assert (first.ok, second.ok, first.values["threads"], sum(ticks)) == (True, True, 1, 2.0)
        assert first.values["pid"] != second.values["pid"]
        assert all(ends(of.values["pid"]) for of in (first, second))
        killed, ended = (run(_worker.die, f"die-{how}", {"how": how}, forked=True) for how in ("kill", "exit"))
        assert (killed.ok, killed.reason) == (False, "the process was killed by SIGKILL")
        assert (ended.ok, ended.reason) == (False, "the process ended with status 7")
        assert not run(_worker.fail, "fail", {"what": "runtime"}, forked=True).ok
        plain = run(_worker.echo, "c", {})
        after = run(_worker.echo, "d", {}, forked=True)
        assert len({of.values["pid"] for of in (first, second, plain, after)}) == 4
        assert ends(plain.values["pid"]), "its process ran a job, so that another is forked from"


def test_a_forked_job_ends_with_its_driver(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    job = Job(_worker.sleep, {"pid_file": str(pid_file), "seconds": 60}, "s", forked=True)
    with LocalExecutor(threads=1, command=WORKER) as executor, pytest.raises(OutOfTime):
        executor.run(job, deadline=time.monotonic() + 10)
    assert ends(int(pid_file.read_text()))


def test_jobs_share_a_process_with_the_asked_threads_and_may_print(executor: LocalExecutor) -> None:
    ticks: list[float] = []
    job = Job(_worker.echo, {"say": "häß\n", "ticks": 5}, "a")
    first = executor.run(job, tick=ticks.append)
    second = executor.run(Job(_worker.echo, {"say": [1, None]}, "b"))
    assert first.ok
    assert first.values["echo"] == "häß\n"
    assert first.values["threads"] == 1
    assert second.values["echo"] == [1, None]
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
        (_worker.full, {}, "/somewhere/weights: got No space left on device"),
        (pickle.dumps, {}, "ended with status 1"),  # no job function: nothing else is ever called
    ],
)
def test_a_failing_job_is_a_result_and_the_next_job_runs(
    executor: LocalExecutor, function: JobFunction, spec: dict[str, str], reason: str
) -> None:
    result = executor.run(Job(function, spec, "bad"))
    assert not result.ok
    assert reason in str(result.reason)
    assert "\n" not in str(result.reason)
    assert result.values == ({"input_error": True} if function in (_worker.refused, _worker.full) else {})
    assert executor.run(Job(_worker.echo, {"say": 1}, "after")).ok


@pytest.mark.parametrize("die", [False, True])
def test_a_child_that_holds_the_pipes_neither_hangs_a_run_nor_outlives_it(die: bool) -> None:
    executor = LocalExecutor(threads=1, command=WORKER)
    result = executor.run(Job(_worker.fork, {"die": die}, "a"))
    assert result.ok is not die
    assert not die or "ended with status 7" in str(result.reason)
    started = time.monotonic()
    executor.close()
    assert time.monotonic() - started < 20
    if not die:
        assert ends(result.values["child"])


def test_a_deadline_kills_the_job_and_leaves_the_executor_usable(executor: LocalExecutor, tmp_path: Path) -> None:
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
    assert ends(worker)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[LocalExecutor]:
    with LocalExecutor(
        threads=1,
        workers=2,
        retries=2,
        command=WORKER,
        log=tmp_path / "worker.log",
        logs=tmp_path / "logs",
        record=tmp_path / "attempts.csv",
    ) as made:
        yield made


def attempts(folder: Path) -> list[dict[str, str]]:
    with (folder / "attempts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(tuple(row) == ATTEMPT_COLUMNS for row in rows)
    return rows


def meeting(folder: Path, name: str, *others: str, **more: Any) -> Job:
    """A job that ends once the others have begun."""
    spec = {"mine": str(folder / name), "others": [str(folder / other) for other in others]}
    return Job(_worker.meet, spec, name, **more)


def test_jobs_run_side_by_side_and_results_stream_as_they_end(two: LocalExecutor, tmp_path: Path) -> None:
    jobs = [meeting(tmp_path, "a", "b"), meeting(tmp_path, "b", "a"), Job(_worker.echo, {}, "c")]
    results = {result.key: result for result in two.stream(jobs)}
    assert all(result.ok for result in results.values())
    assert results["a"].values["pid"] != results["b"].values["pid"]
    assert results["c"].values["pid"] in {results[k].values["pid"] for k in "ab"}
    assert sorted(row["job"] for row in attempts(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize("deaths", [0, 2, 3])
def test_a_job_whose_worker_died_is_tried_again_a_bounded_number_of_times(
    two: LocalExecutor, tmp_path: Path, deaths: int
) -> None:
    ticks: list[float] = []
    spec = {"counter": str(tmp_path / "counter"), "deaths": deaths}
    jobs = [Job(_worker.flaky, spec, "flaky", units=3.0), Job(_worker.echo, {"say": 1}, "other")]
    results = {result.key: result for result in two.stream(jobs, tick=lambda key, units: ticks.append(units))}
    assert results["other"].ok, "a death takes nothing else along"
    rows = [row for row in attempts(tmp_path) if row["job"] == "flaky"]
    lost = [row for row in rows if row["outcome"] == "lost"]
    assert len(lost) == min(deaths, 3)
    assert [int(row["attempt"]) for row in rows] == list(range(1, len(rows) + 1))
    if deaths <= 2:
        assert results["flaky"].values == {"lives": deaths + 1}
    else:
        reason = str(results["flaky"].reason)
        assert "killed by SIGKILL" in reason
        assert "flaky.log" in reason
        assert reason.endswith("; 3 attempts")
    assert sum(ticks) <= 3.0, "work done twice is not progress"


def test_a_job_that_hangs_is_ended_and_tried_again(tmp_path: Path) -> None:
    executor = LocalExecutor(threads=1, retries=1, limit_s=1.0, command=WORKER, record=tmp_path / "attempts.csv")
    with executor:
        pid_file = tmp_path / "pid"
        spec = {"seconds": 600, "pid_file": str(pid_file)}
        result = executor.run(Job(_worker.sleep, spec, "long"))
        assert "no end after 1 s (--job-minutes); 2 attempts" in str(result.reason)
        assert not alive(int(pid_file.read_text()))
        assert [row["outcome"] for row in attempts(tmp_path)] == ["late", "late"]
        assert executor.run(Job(_worker.echo, {}, "after")).ok


def test_nothing_runs_beside_a_timed_job(two: LocalExecutor) -> None:
    alone = {"t1", "t2"}
    jobs = [
        Job(_worker.during, {"seconds": 0.3}, key, timed=key in alone) for key in ("a", "b", "t1", "c", "t2", "d", "e")
    ]
    spans = {r.key: (r.values["began"], r.values["ended"]) for r in two.stream(jobs)}
    for one, other in itertools.combinations(spans, 2):
        if {one, other} & alone:
            (a, b), (c, d) = spans[one], spans[other]
            assert b <= c or d <= a, f"{one} and {other} overlap"


def test_what_a_job_prints_is_in_its_own_log(two: LocalExecutor, tmp_path: Path) -> None:
    jobs = [Job(_worker.noise, {"say": f"this is {key}"}, key) for key in "abcd"]
    assert all(result.ok for result in two.stream(jobs))
    for key in "abcd":
        text = (tmp_path / "logs" / f"{key}.log").read_text()
        assert f"noise {key}, attempt 1" in text
        assert f"this is {key}" in text
        assert not any(f"this is {other}" in text for other in set("abcd") - {key})


def test_a_consumer_that_stops_ends_what_runs(two: LocalExecutor, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    sleep = Job(_worker.sleep, {"seconds": 600, "pid_file": str(pid_file)}, "long")
    for result in two.stream([sleep, Job(_worker.echo, {}, "a")]):
        assert result.key == "a"
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.02)
        break
    assert ends(int(pid_file.read_text()))
    assert two.run(Job(_worker.echo, {}, "after")).ok
    ended = [row for row in attempts(tmp_path) if row["outcome"] == "cancelled"]
    assert [row["job"] for row in ended] == ["long"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_workers_have_cores_of_their_own_but_for_timing(two: LocalExecutor, tmp_path: Path) -> None:
    both = [meeting(tmp_path, "a", "b"), meeting(tmp_path, "b", "a")]  # both workers stand
    assert all(r.ok for r in two.stream(both))
    every = sorted(os.sched_getaffinity(0))
    seen = set()
    for number in range(12):
        seen.add(tuple(two.run(Job(_worker.cores, {}, f"c{number}")).values["cores"]))
    assert seen <= {(every[0],), (every[1],)}
    timed = two.run(Job(_worker.cores, {}, "timed", timed=True))
    assert timed.values["cores"] == every
    assert len(two.run(Job(_worker.cores, {}, "after")).values["cores"]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits of data are Linux's")
def test_too_much_memory_fails_that_job_only(tmp_path: Path) -> None:
    with LocalExecutor(threads=1, command=WORKER, memory_bytes=4_000_000_000) as executor:
        small = executor.run(Job(_worker.hog, {"bytes": 1e8}, "small"))
        assert small.ok, small.reason
        large = executor.run(Job(_worker.hog, {"bytes": 8e9}, "large"))
        assert "memory" in str(large.reason)
        assert executor.run(Job(_worker.echo, {}, "after")).ok


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--workers", (0, 1025)),
        ("--copy-files", (True,)),  # of the local executor
        ("--retries", (10_000, -1)),
        ("--job-minutes", (0.0, float("nan"))),
        ("--job-memory-gb", (-1.0,)),
        ("--gpu-share", (0.0, 1.5)),
        ("--executor", ("slurm",)),
        ("--ray-address", ("auto",)),
        ("--benchmark-resource", ("orin",)),
    ],
)
def test_settings_out_of_range_are_refused(flag: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(InputError, match=flag):
            ExecutorConfig(**{flag[2:].replace("-", "_"): value})


def test_each_gpu_or_share_of_one_gets_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert workers_for(ExecutorConfig(), "cuda") == (3, [2, 5, 7])
    assert workers_for(ExecutorConfig(gpu_share=0.5), "cuda") == (6, [2, 5, 7])
    assert workers_for(ExecutorConfig(workers=2), "cuda") == (2, [2, 5, 7])
    assert workers_for(ExecutorConfig(), "cuda:1") == (1, [])
    assert workers_for(ExecutorConfig(), "cpu") == (1, [])


def test_cores_are_shared_among_workers_unless_threads_are_named() -> None:
    from nas.contract.checks import make_config
    from nas.core.cli import usable_cpus

    def threads(means: ExecutorConfig, **given: object) -> int:
        return make_config({"seed": "21M", "target_params": 5_000_000, **given}, means).threads

    assert threads(ExecutorConfig()) == threads(ExecutorConfig(workers=1)) == usable_cpus()
    assert threads(ExecutorConfig(workers=1024)) == 1
    assert threads(ExecutorConfig(workers=2), threads=3) == 3
    assert threads(ExecutorConfig(executor="ray", workers=1024)) == 1
    cluster = ExecutorConfig(executor="ray", workers=2, ray_address="auto")
    assert threads(cluster) == usable_cpus()
