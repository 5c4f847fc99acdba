"""The command that is run once on a machine with a GPU: it ends in time, goes on, and can be rehearsed without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import FULL, PUBLISHED, TINY, GpuPart, memory_result, parts_of, ratio_rows, run_part, run_parts
from nas.core.requirement import Setting
from nas.measure.device_table import OK, DeviceRow, fingerprint_columns
from nas.measure.fingerprint import Fingerprint
from nas.measure.measurement import Throughput
from tests._inline import InlineExecutor

MACHINE: dict[str, Any] = {
    **{"device": "cuda", "device_name": "GPU", "threads": 4, "torch": "2", "timm": "1", "python": "3.11"},
    **{"physical_cores": 4, "logical_cores": 4, "usable_cpus": 4.0, "nominal_mhz": 1980.0},
    **{"driver": "550", "cuda": "12", "cudnn": "9", "os": "Linux", "arch": "x86_64"},
}


def row(arch: str, ratio: float, batch: int = 256, runtime: str = "eager") -> DeviceRow:
    """A measured network beside the 21M, its interval 2 % to either side."""
    setting = Setting("cuda", runtime, "bfloat16", batch)
    ends = {f"{name}{end}": value * by for name, value in (("images_per_s", 1e4), ("ratio", ratio)) for end, by in ENDS}
    timed = Throughput(**ends, coverage=0.97, blocks=12, passes=3, seconds=1.0, when="now", peak_mem_bytes=10**9)
    return DeviceRow(
        **{"arch": arch, "family": "timm", "key": arch, "spec": "", "img_size": 224, "num_classes": 1000},
        **{"setting": setting, "threads": 4, "state": OK, "throughput": timed, "reference": f"21M@{setting.text}"},
        **fingerprint_columns(Fingerprint(**MACHINE).under(setting, "torch 2", 224)),
    )


ENDS = (("", 1.0), ("_lo", 0.98), ("_hi", 1.02))


def code(text: str, name: str = "part", share: float = 1.0) -> GpuPart:
    """A part that runs a line of Python."""
    return GpuPart(name, share, ("timeit", "-n", "1", "-r", "1", text))


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    spawned = f"open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    found = run_part(code(f"import subprocess, time; {spawned}; time.sleep(60)"), tmp_path / "log", 0.8)
    assert (found.state, found.reason) == ("out of time", "its share of the minutes was over")
    assert found.seconds < 3.0
    state = Path("/proc", child.read_text(), "stat")
    until = time.monotonic() + 10
    while (going := state.exists() and state.read_text().split()[2] != "Z") and time.monotonic() < until:
        time.sleep(0.05)  # the kernel takes its time
    assert not going


def test_what_fails_is_explained_and_the_next_part_goes_on(tmp_path: Path) -> None:
    """By exit status, and by the rows that a table's summary counts; a part's last JSON line is kept."""
    for name, failed in (("some", 1), ("none", 0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": 2, "failed": failed}))
    shown = [
        GpuPart(name, 1.0, ("json.tool", "--compact", str(tmp_path / f"{name}.json"))) for name in ("some", "none")
    ]
    found = list(run_parts([code("1/0"), *shown, GpuPart("lost", 1.0, ("no_such",))], 1.0, tmp_path))
    assert [each.state for each in found] == ["failed", "failed", "ok", "failed"]
    assert found[0].reason.startswith("exit status 1: ")
    assert "ZeroDivisionError" in found[0].reason
    assert found[1].reason == "1 of 2 rows failed"
    assert found[2].found == {"rows": 2, "failed": 0}
    assert "No module named no_such" in found[3].reason
    assert "no_such" in (tmp_path / "lost.log").read_text()


def test_on_a_gpu_its_tests_must_run() -> None:
    part = GpuPart("tests", 1.0, ("pytest",))
    assert gpu.failure(part, 0, ["2 skipped in 1.00s"], None, "cuda") == "no test ran"
    assert not gpu.failure(part, 0, ["2 skipped in 1.00s"], None, "cpu")
    assert not gpu.failure(part, 0, ["2 passed in 1.00s"], None, "cuda")


def test_parts_that_hang_do_not_take_more_than_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one leaves is for the others; all together end in time."""
    monkeypatch.setattr(gpu, "GRACE_S", 0.1)
    hang = "import time; time.sleep(60)"
    parts = [code("pass", "quick", 8.0), code(hang, "long", 3.0), code(hang, "short", 1.0)]
    started = time.monotonic()
    found = {each.name: each for each in run_parts(parts, 1.8 / 60, tmp_path)}
    assert time.monotonic() - started < 2.5
    assert [each.state for each in found.values()] == ["ok", "out of time", "out of time"]
    assert found["long"].limit_s > 1.8 * 3 / 12
    assert found["long"].limit_s > 1.5 * found["short"].limit_s


def test_every_part_is_a_command_of_its_own_at_either_size(tmp_path: Path) -> None:
    for size in (FULL, TINY):
        parts = parts_of(size, "cuda:1", tmp_path)
        assert len({part.name for part in parts}) == len(parts)
        assert sum(part.share for part in parts) == pytest.approx(1.0)
        words = [" ".join(part.words) for part in parts]
        assert all("--device cuda:1 " in each for each in words[1:])
        for batch in size.batches:
            for runtime in ("eager", "compile"):
                assert any(f"--runtime {runtime} --dtype bfloat16 --batch {batch} " in each for each in words)
        tests = [word for word in parts[0].words if word.endswith(".py")]
        assert len(tests) >= 3
        assert Path(__file__).name not in {Path(name).name for name in tests}
        assert {name for pair in size.pairs for name in pair} <= set(size.archs)


def test_ratios_stand_beside_those_that_were_published() -> None:
    """Worked by hand; at batch 1 nobody published any, and a pair needs both nets unless one is the reference."""
    small, base = "deit_small_patch16_224", "deit_base_patch16_224"
    found = ratio_rows([row("5M", 2.0), row(small, 1.5), row(base, 0.5), row("11M", 1.6, batch=1)], FULL)
    by = {(each.arch, each.published_gpu): each for each in found}
    assert by["5M", "NVIDIA V100"].published == pytest.approx(3060 / 1571)
    timm = by["5M", "NVIDIA RTX PRO 6000 Max-Q"]
    assert (timm.ratio, timm.lo, timm.hi) == pytest.approx((2.0, 1.96, 2.04))
    assert timm.published == pytest.approx(9385.29 / 4949.95)
    pair = by[small, "NVIDIA RTX PRO 6000 Max-Q"]
    assert (pair.over, pair.ratio) == (base, pytest.approx(3.0))
    assert (pair.lo, pair.hi) == pytest.approx((3.0 * 0.98 / 1.02, 3.0 * 1.02 / 0.98))
    assert by["11M", ""].published is None
    assert len(found) == 4
    assert "2.00 [1.96, 2.04]; 1.95 on NVIDIA V100" in str(by["5M", "NVIDIA V100"])
    compiled = ratio_rows([row("5M", 2.0, runtime="compile")], FULL)
    assert [each.published for each in compiled] == [pytest.approx(17091.83 / 8696.6)]
    assert not ratio_rows([row(small, 1.5)], FULL)


def test_every_published_number_is_of_a_pair() -> None:
    named = {name for size in (FULL, TINY) for pair in size.pairs for name in pair}
    assert {name for each in PUBLISHED for name in each.images_per_s} == named


def test_peak_memory_is_that_of_every_row() -> None:
    found = memory_result([row("5M", 2.0)])
    assert (found.state, found.found) == ("ok", {"5M@cuda:eager:bfloat16:b256": 10**9})
    lacking = row("11M", 2.0)
    lacking = replace(lacking, throughput=replace(lacking.measured, peak_mem_bytes=None))
    assert memory_result([lacking]).reason == "not measured: 11M@cuda:eager:bfloat16:b256"
    assert memory_result([]).state == "failed"


def test_results_are_on_disk_after_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 3 and the reason at the end where one failed; a folder with results is not written over."""
    out = tmp_path / "out"
    parts = [code("pass", "good"), code("import os; os.stat('results.json')", "bad")]
    monkeypatch.setattr(gpu, "LocalExecutor", lambda threads: InlineExecutor())
    monkeypatch.setattr(gpu, "parts_of", lambda *_: parts)
    given = ["--device", "cpu", "--tiny", "--minutes", "0.5", "--out", str(out)]
    assert gpu.main(given) == 3
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1])["parts"] == {"good": "ok", "bad": "failed"}
    assert said[-2].startswith("failed: bad: exit status 1: ")
    written = json.loads((out / "results.json").read_text())
    assert written["fingerprint"]["device"] == "cpu"
    assert [each["state"] for each in written["parts"]] == ["ok", "failed"]
    assert gpu.main(given) == 2
    assert "--out: got" in capsys.readouterr().err
    assert gpu.main([*given[:-1], str(tmp_path / "one"), "--only", "good"]) == 0


def test_without_a_gpu_one_line_names_the_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu, "LocalExecutor", lambda threads: InlineExecutor())
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device: got cuda")
    assert "--device cpu --tiny" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


REHEARSED = (
    ("tests", "labels", "contract"),
    ("epoch",),
    *(tuple(f"{runtime}-{batch}" for batch in TINY.batches) for runtime in ("eager", "compile")),
)


def test_every_part_is_rehearsed(tmp_path: Path) -> None:
    assert sorted(name for names in REHEARSED for name in names) == sorted(
        part.name for part in parts_of(TINY, "cpu", tmp_path)
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", REHEARSED, ids=" ".join)
def test_the_rehearsal_runs_every_part(names: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--minutes", "8", "--out", str(out)]
    command += ["--only", *names]
    root = Path(gpu.__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "results.json").read_text())
    timed = [name.partition("-")[0] for name in names if name.startswith(("eager", "compile"))]
    assert {part["name"]: part["state"] for part in found["parts"]} == dict.fromkeys(
        [*names, *(["memory"] if timed else [])], "ok"
    )
    settings = [(each["runtime"], each["batch"], each["published"] is None) for each in found["ratios"]]
    assert sorted(settings) == [
        (runtime, batch, batch == 1) for runtime, batch in zip(timed, TINY.batches, strict=False)
    ]
    assert not timed or (out / "ratios.csv").read_text().count("\n") == 1 + len(timed)
    assert "epoch" not in names or (out / "epoch.csv").is_file()
