"""A bundle measures on a board without torch, and its table is read like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.throughput.bundle import CARRIED, SCRIPT, write_bundle
from benchmarks.throughput.flags import ThroughputConfig, ThroughputPlan
from benchmarks.throughput.networks import Net, find_nets
from nas.core.progress import Console
from nas.core.requirement import Setting
from nas.measure.bundle import main
from nas.measure.device_table import FAILED, OK, read_rows, write_rows
from space import InputError
from tests.test_benchmarks_throughput import FACTORS, FAMILY, SMALL, check_row

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LARGE = json.dumps({**FACTORS, "embed_dims": [32, 32, 32, 64]})
PLAN = ThroughputPlan(
    ThroughputConfig(num_classes=4, visits=4, max_visits=4, precision=0.0),
    settings=(Setting(runtime="onnxruntime", batch=1),),
    sizes=(32,),
    reference=None,
)
QUICK = ["--visits", "4", "--max-visits", "4", "--precision", "0", "--threads", "1"]


def nets(*names: str) -> list[Net]:
    return find_nets(list(names), FAMILY)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, one of them the reference."""
    folder = tmp_path_factory.mktemp("board") / "bundle"
    both = nets(SMALL, LARGE)
    said = write_bundle(folder, both, replace(PLAN, reference=both[1]), Console(quiet=True))
    assert said["networks"] == 2
    assert said["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    return folder


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which whatever a board lacks raises when it is imported."""
    folder = tmp_path_factory.mktemp("lacking")
    for name in ("torch", "timm", "pandas", "scipy", "sklearn", "optuna", "filelock", "onnx"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('no {name} here')\n")
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def measure(bundle: Path, board: dict[str, str], flags: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle / SCRIPT), *flags]
    return subprocess.run(command, cwd=cwd, env=board, capture_output=True, text=True, timeout=120, check=False)


def test_a_bundle_measures_without_torch(bundle: Path, board: dict[str, str], tmp_path: Path) -> None:
    """One row a network, in the list's order, each beside the reference; resumed rows stay."""
    out = tmp_path / "device.csv"
    ran = measure(bundle, board, ["--out", str(out), *QUICK], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert json.loads(ran.stdout.splitlines()[-1]) == {"rows": 2, "failed": 0, "out": str(out)}
    rows = read_rows(out, "--x")
    assert [r.arch for r in rows] == [SMALL, LARGE]
    for row, text in zip(rows, (SMALL, LARGE), strict=True):
        check_row(row, text, f"{LARGE}@cpu:onnxruntime:float32:b1")
        assert row.setting == Setting(runtime="onnxruntime", batch=1)
        assert 0 < (row.measured.latency_ms_p50 or 0) < 2e3 / row.measured.images_per_s
        assert row.on_runtime_version.startswith("onnxruntime ")
    assert rows[0].fingerprint == rows[1].fingerprint
    # One row is there already, and it is a telling one: it is taken over, the other is measured.
    kept = replace(rows[1], throughput=replace(rows[1].measured, when="a sentinel"))
    write_rows(out, [kept])
    again = measure(bundle, board, ["--out", str(out), *QUICK, "--resume"], tmp_path)
    assert again.returncode == 0, again.stderr
    resumed = read_rows(out, "--x")
    assert resumed[1] == kept
    assert resumed[0].conditions == rows[0].conditions
    assert resumed[0].measured.when != "a sentinel"


def test_bad_input_is_one_line_and_status_2(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused before anything is measured, and nothing is overwritten."""
    there, damaged, empty = tmp_path / "there.csv", tmp_path / "damaged.csv", tmp_path / "empty"
    there.write_text("x")
    damaged.write_text("arch,images_per_s,fingerprint\n")
    empty.mkdir()
    whole = json.loads((bundle / "networks.json").read_text())
    lone = {"networks": [n for n in whole["networks"] if not n["reference"]]}
    lists = ["[]", "{", '{"networks": [{"batch": 1}]}', '{"networks": []}', json.dumps(lone)]
    for number, text in enumerate([*lists, json.dumps(whole)]):
        (tmp_path / f"list{number}").mkdir()
        (tmp_path / f"list{number}" / "networks.json").write_text(text)
    out = ["--out", str(tmp_path / "new.csv")]
    cases = [
        (["--out", str(there)], "--resume"),
        (["--out", str(damaged), "--resume"], "--out"),
        (["--out", str(tmp_path)], "--out"),
        (["--out", str(tmp_path / "none" / "new.csv")], "--out"),
        ([*out, "--networks", str(empty)], "networks.json"),
        *[([*out, "--networks", str(tmp_path / f"list{n}")], "networks.json") for n in range(5)],
        ([*out, "--networks", str(tmp_path / "list5")], "no such file"),
        ([*out, "--visits", "3"], "--visits"),
        ([*out, "--visits", "9", "--max-visits", "8"], "--visits"),
        ([*out, "--precision", "-1"], "--precision"),
        ([*out, "--device", "tpu"], "--device"),
        ([*out, "--threads", "-1"], "--threads"),
        ([*out, "--threads", "0"], "--threads"),
    ]
    for flags, says in cases:
        capsys.readouterr()
        assert main(["--networks", str(bundle), *flags]) == 2, flags
        said = capsys.readouterr()
        assert says in said.err, (flags, said.err)
        assert said.err.count("\n") == 1, (flags, said.err)
        assert said.out == ""
    assert there.read_text() == "x"
    assert not (tmp_path / "new.csv").exists()


def test_a_damaged_network_is_a_row(bundle: Path, tmp_path: Path) -> None:
    """Whatever the runtime raises is the reason; the other networks are measured."""
    for path in bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    listed = json.loads((bundle / "networks.json").read_text())["networks"]
    (tmp_path / listed[0]["file"]).unlink()
    (tmp_path / listed[0]["file"]).write_bytes(b"no network")
    out = tmp_path / "t.csv"
    assert main(["--networks", str(tmp_path), "--out", str(out), *QUICK]) == 0
    rows = read_rows(out, "--x")
    assert [r.state for r in rows] == [FAILED, OK]
    assert rows[0].reason
    assert "\n" not in rows[0].reason


def test_an_interrupted_bundle_goes_on_with_what_is_missing(bundle: Path) -> None:
    both = nets(SMALL, LARGE)
    files = sorted(bundle.glob("*.onnx"))
    assert len(files) == 2
    kept = files[1].stat().st_mtime_ns
    before = (bundle / "networks.json").read_text()
    files[0].unlink()
    write_bundle(bundle, both, replace(PLAN, reference=both[1]), Console(quiet=True))
    assert sorted(bundle.glob("*.onnx")) == files
    assert files[1].stat().st_mtime_ns == kept
    assert (bundle / "networks.json").read_text() == before


def test_a_bundle_holds_its_networks_and_a_script_with_what_it_imports(bundle: Path) -> None:
    with zipfile.ZipFile(bundle / SCRIPT) as packed:
        names = set(packed.namelist())
    assert {f"nas/{name}" for name in CARRIED} <= names
    assert not [n for n in names if n.endswith(".pyc")]
    listed = json.loads((bundle / "networks.json").read_text())["networks"]
    assert [n["reference"] for n in listed] == [False, True]
    named = {n["file"] for n in listed} | {"networks.json", SCRIPT}
    assert {p.name for p in bundle.iterdir()} == named


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"auto": True}, "auto"),
        ({"settings": (Setting(),)}, "onnxruntime"),
        ({"settings": (Setting(runtime="onnxruntime", dtype="float16"),)}, "float16"),
        ({"reference": None}, "--reference"),
    ],
)
def test_what_a_board_cannot_run_is_refused(change: dict[str, object], says: str, tmp_path: Path) -> None:
    both = nets(SMALL, LARGE)
    plan = replace(PLAN, **{"reference": both[1], **change})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says) as caught:
        write_bundle(tmp_path / "bundle", both, plan, Console(quiet=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--bundle"):
        write_bundle(tmp_path / "file", both, replace(PLAN, reference=both[1]), Console(quiet=True))
