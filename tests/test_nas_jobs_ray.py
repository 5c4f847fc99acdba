"""A Ray cluster gives the answer that this machine gives, whatever becomes of its nodes."""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.faults.catalogue import FAULTS
from benchmarks.faults.references import ARCH, References, differences, orphans, run_outcome, start, store_outcome
from nas.contract import contract
from nas.core.executor_config import ExecutorConfig
from nas.core.progress import Tick
from nas.jobs.executor import make_executor
from nas.jobs.job import READS, WRITES, Job, Values
from nas.jobs.transfer_files import Bundle, fetch, file_states, read_files, write_files
from space.errors import InputError
from tests.conftest import SMALL_ARCH, Finished

ray = pytest.importorskip("ray")


def own_network() -> bool:
    """Whether a process may have a network of its own, with loopback only."""
    command = ["unshare", "-n", "ip", "link", "set", "lo", "up"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def places(out: Path) -> dict[str, str]:
    """Where each job of a run was done at last."""
    with (out / "attempts.csv").open(newline="") as file:
        return {row["job"]: row["where"] for row in csv.DictReader(file)}


def test_a_cluster_of_this_machine_ends_as_workers_do(finished: Finished, tmp_path: Path) -> None:
    """With every file sent to the nodes, as if they saw none of ours."""
    asked = {"effort": "smoke", "steps": 2, "candidates_per_step": 4, "threads": 1, "img_size": 32, "max_images": 200}
    outcome = contract(
        str(finished.folder.parent / "small.json"),
        "400K",
        **{**asked, "teacher_epochs": 2, "final_epochs": 1, "cache_dir": finished.cache, "out": tmp_path / "run"},
        measurements=str(finished.folder / "measurements.csv"),
        executor_config=ExecutorConfig(executor="ray", workers=2, copy_files=True),
    )
    assert outcome.status == "reached"
    assert run_outcome(tmp_path / "run") == run_outcome(finished.folder)
    far = [job for job, where in places(tmp_path / "run").items() if not where.startswith("worker ")]
    assert any(name.startswith("s1-") for name in far)
    assert any(name.startswith("final-") for name in far)
    log = (tmp_path / "run" / "logs" / f"{far[0]}.log").read_text()
    assert log.startswith("-- on ")


@dataclass(frozen=True)
class CopyJob:
    """A folder to copy."""

    source: Path = field(metadata=READS)
    out: Path = field(metadata=WRITES)


def copy(job: CopyJob, tick: Tick) -> Values:
    """A job function of tests."""
    shutil.copytree(job.source, job.out)
    return {}


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    config = ExecutorConfig(executor="ray", ray_address="127.0.0.1:1")
    (tmp_path / "data").mkdir()
    job = CopyJob(source=tmp_path / "data", out=tmp_path / "out")
    with make_executor(config, threads=1) as executor, pytest.raises(InputError) as refused:
        executor.run(Job(copy, job, "a"))
    assert "--ray-address: got 127.0.0.1:1" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


NAMES = st.text("abc.", min_size=1, max_size=3).filter(lambda name: not name.startswith("."))
TREES = st.dictionaries(st.lists(NAMES, min_size=1, max_size=2).map("/".join), st.binary())


def tree(data: st.DataObject) -> dict[str, bytes]:
    """Draw files by name, none of which is another one's folder."""
    files = data.draw(TREES)
    return {n: v for n, v in files.items() if not any(m.startswith(f"{n}/") for m in files)}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_folder_arrives_as_it_was_sent_and_changes_come_back(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder, place = Path(base, "sent"), Path(base, "place")
        folder.mkdir()
        place.mkdir()
        files, more = tree(data), tree(data)
        write_files(folder, files)
        (folder / ".lock").write_bytes(b"")
        loads: list[int] = []

        def load(reference: dict[str, bytes]) -> dict[str, bytes]:
            loads.append(1)
            return reference

        bundle = Bundle("name", "", read_files(folder))
        there = fetch(bundle, place, load)
        assert fetch(bundle, place, load) == there
        assert read_files(there) == files
        assert len(loads) == 1
        before = file_states(there)
        new = {f"new-{name}": content for name, content in more.items()}
        write_files(there, new)
        assert read_files(there, before=before) == new
        top = {name: content for name, content in files.items() if "/" not in name}
        assert read_files(folder, top_only=True) == top


def test_a_file_arrives_under_its_own_name_and_a_broken_journey_leaves_nothing(tmp_path: Path) -> None:
    file, place = tmp_path / "w.bin", tmp_path / "place"
    file.write_bytes(b"x")
    place.mkdir()
    bundle = Bundle("name", "w.bin", None)

    def broken(_: object) -> dict[str, bytes]:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fetch(bundle, place, broken)
    assert [p.suffix for p in place.iterdir()] == [".lock"]
    there = fetch(bundle, place, lambda _: read_files(file))
    assert (there.name, there.read_bytes()) == ("w.bin", b"x")
    with pytest.raises(FileNotFoundError):
        file_states(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_nothing_is_placed_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError):
        write_files(tmp_path / "out", {name: b""})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not own_network(), reason="needs a network of its own (root)")
@pytest.mark.parametrize("act", ["node removed in every step", "driver killed", "head lost"])
def test_whatever_happens_to_a_cluster_the_run_ends_the_same(act: str, tmp_path: Path) -> None:
    references = References(tmp_path / "references", print)
    name = next(n for n in FAULTS if n.startswith("Ray: ") and n.endswith(act))
    folder = tmp_path / "try"
    folder.mkdir()
    assert FAULTS[name].do(references, folder, random.Random(0)).wrong == []


@pytest.mark.slow
@pytest.mark.skipif(not own_network(), reason="needs a network of its own (root)")
def test_what_is_timed_runs_on_the_node_that_has_the_device(tmp_path: Path) -> None:
    references = References(tmp_path / "references", print)
    kind = references.contract()
    out = tmp_path / "out"
    code = (
        "import json, sys, subprocess\n"
        "from ray.cluster_utils import Cluster\n"
        "c = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})\n"
        "c.add_node(num_cpus=1, resources={'orin': 1})\n"
        "words = json.loads(sys.argv[1]) + ['--executor', 'ray', '--ray-address', c.address,\n"
        "    '--benchmark-resource', 'orin', '--no-measurement-cache']\n"
        "done = subprocess.run([sys.executable, '-m', *words])\n"
        "c.shutdown(); sys.exit(done.returncode)\n"
    )
    words = json.dumps(kind.begin(tmp_path))
    inside = 'ip link set lo up && exec "$@"'
    subprocess.run(
        ["unshare", "-n", "sh", "-c", inside, "sh", sys.executable, "-c", code, words], check=True, timeout=600
    )
    where = places(out)
    timed = [job for job in where if job.startswith(("seed-", "gate-", "final-s", "hello"))]
    assert any(job.startswith("gate-") for job in timed)
    assert not [job for job in timed if where[job].startswith("worker ")]


def test_what_a_campaign_compares(finished: Finished, tmp_path: Path) -> None:
    """A campaign that could not see a difference would find none."""
    assert ARCH == SMALL_ARCH
    kind = References(tmp_path / "references", print).contract()
    truth = run_outcome(finished.folder)
    assert differences(kind, truth, finished.folder) == []
    assert differences(kind, {**truth, "winner": "x"}, finished.folder) == ["winner"]
    assert differences(kind, {**truth, "weights": "x"}, finished.folder) == ["weights"]
    fewer = {**truth, "trials": truth["trials"][1:]}
    assert differences(kind, fewer, finished.folder) == ["trials"]
    assert differences(kind, truth, tmp_path)[0].startswith("no outcome")
    begun = start(["this"], tmp_path / "log")
    assert begun.end() == 0
    assert orphans(begun.tag, 5.0) == []


@pytest.mark.slow
def test_a_store_made_by_a_cluster_is_that_of_one_machine(tmp_path: Path) -> None:
    """And what is there already is not made again."""
    from nas.labels.__main__ import main

    common = [
        *("build", "--data", "digits", "--max-images", "200", "--teacher-epochs", "1"),
        *("--epochs", "6", "--img-size", "32", "--threads", "1", "--quiet"),
        *("--cache-dir", str(tmp_path / "cache")),
    ]
    far = ["--executor", "ray", "--processes", "2"]
    assert main([*common, "--out", str(tmp_path / "here")]) == 0
    assert main([*common, *far, "--out", str(tmp_path / "there")]) == 0
    assert store_outcome(tmp_path / "there") == store_outcome(tmp_path / "here")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("*.bin")}
    victim = sorted(p for p in times if p.parent.name.startswith("epoch-"))[0]
    victim.unlink()
    assert main([*common, *far, "--out", str(tmp_path / "there")]) == 0
    assert store_outcome(tmp_path / "there") == store_outcome(tmp_path / "here")
