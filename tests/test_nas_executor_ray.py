"""A Ray cluster gives the answer that this machine gives, whatever becomes of its nodes."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.catalogue import FAULTS
from benchmarks.faults.references import (
    ARCH,
    References,
    differences,
    orphans,
    run_outcome,
    start,
    store_outcome,
)
from nas.contract import contract
from nas.jobs.job import Job
from nas.jobs.means import Means
from nas.jobs.ray import RayExecutor
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


def test_a_cluster_of_this_machine_ends_as_workers_do(finished: Finished, tmp_path: Path) -> None:
    """With every file sent to the nodes, as if they saw none of ours."""
    outcome = contract(
        str(finished.folder.parent / "small.json"),
        "400K",
        out=tmp_path / "run",
        effort="smoke",
        steps=2,
        shortlist=4,
        threads=1,
        img_size=32,
        proxy_images=200,
        teacher_epochs=2,
        final_epochs=1,
        cache_dir=finished.cache,
        measurements=str(finished.folder / "measurements.csv"),
        means=Means(executor="ray", workers=2, ship=True),
    )
    assert outcome.status == "reached"
    assert run_outcome(tmp_path / "run") == run_outcome(finished.folder)
    with (tmp_path / "run" / "attempts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    far = [row["job"] for row in rows if not row["where"].startswith("worker ")]
    assert any(name.startswith("s1-") for name in far)
    assert any(name.startswith("final-") for name in far)
    log = (tmp_path / "run" / "logs" / f"{far[0]}.log").read_text()
    assert log.startswith("-- on ")


def test_a_cluster_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.jobs.ray.CONNECT_S", 3.0)
    means = Means(executor="ray", ray_address="127.0.0.1:1")
    job_of = {"reads": ("dataset",), "leaves": "out"}
    from nas.jobs.job import Needs

    (tmp_path / "data").mkdir()
    spec = {"dataset": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    with RayExecutor(means=means, threads=1) as executor, pytest.raises(InputError) as refused:
        executor.run(Job("train", "a", spec, 1.0, Needs(**job_of)))  # type: ignore[arg-type]
    assert "--ray-address: got 127.0.0.1:1" in str(refused.value)
    assert "\n" not in str(refused.value)
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
        "    '--measure-on', 'orin', '--no-measurement-cache']\n"
        "done = subprocess.run([sys.executable, '-m', *words])\n"
        "c.shutdown(); sys.exit(done.returncode)\n"
    )
    words = json.dumps(kind.begin(out, tmp_path / "cache"))
    inside = 'ip link set lo up && exec "$@"'
    subprocess.run(
        ["unshare", "-n", "sh", "-c", inside, "sh", sys.executable, "-c", code, words],
        check=True,
        timeout=600,
    )
    with (out / "attempts.csv").open(newline="") as file:
        where = {row["job"]: row["where"] for row in csv.DictReader(file)}
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
    assert differences(kind, {**truth, "ledger": truth["ledger"][1:]}, finished.folder) == [
        "ledger"
    ]
    assert differences(kind, truth, tmp_path)[0].startswith("no outcome")
    begun = start(["this"], tmp_path / "log")
    assert begun.end() == 0
    assert orphans(begun.tag, 5.0) == {}


@pytest.mark.slow
def test_a_store_made_by_a_cluster_is_that_of_one_machine(tmp_path: Path) -> None:
    """And what is there already is not made again."""
    from nas.labels.__main__ import main

    common = [
        *("build", "--data", "digits", "--proxy-images", "200", "--teacher-epochs", "1"),
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
