"""Bad input, whatever carries it, ends in one line that names it and exit status 2 (rule 2)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished
from PIL import Image

from nas.contract.__main__ import main

GOAL = ["--seed", "21M", "--target-params", "5M", "--effort", "smoke"]


def image_folder(root: Path, classes: int = 2, each: int = 20, broken: int = 0) -> Path:
    """Write a folder of small random images, the first `broken` of each class cut short."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        folder = root / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(each):
            path = folder / f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)
            if i < broken:
                path.write_bytes(path.read_bytes()[:60])
    return root


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run and expect a refusal; return its one line."""
    try:
        code = main(arguments)
    except SystemExit as leave:  # argparse
        code = int(leave.code or 0)
    error = capsys.readouterr().err
    lines = [x for x in error.splitlines() if x.strip()]
    assert code == 2, (code, error)
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    assert "Traceback" not in error
    return lines[0]


FLAGS: dict[str, tuple[list[str], str]] = {
    "seed unknown": (["--seed", "7M", "--target-params", "5M"], "7M"),
    "seed missing": (["--target-params", "5M"], "--seed"),
    "seed is a folder": (["--seed", "/", "--target-params", "5M"], "--seed"),
    "target missing": (["--seed", "21M"], "--target-params"),
    "target zero": ([*GOAL, "--target-params", "0"], "--target-params"),
    "target a word": ([*GOAL, "--target-params", "abc"], "abc"),
    "target above the seed": ([*GOAL, "--target-params", "30M"], "20,"),
    "target below the floor": ([*GOAL, "--target-params", "1K"], "parameters at 10 classes"),
    "speedup negative": ([*GOAL, "--min-speedup", "-1"], "--min-speedup"),
    "speedup a word": ([*GOAL, "--min-speedup", "fast"], "--min-speedup"),
    "speedup not a number": ([*GOAL, "--min-speedup", "nan"], "--min-speedup"),
    "throughput zero": ([*GOAL, "--min-throughput", "0"], "--min-throughput"),
    "tolerance": ([*GOAL, "--params-tolerance", "150%"], "--params-tolerance"),
    "max broken": ([*GOAL, "--max-corrupt", "lots"], "--max-corrupt"),
    "data missing": ([*GOAL, "--data", "/no/such/folder"], "--data"),
    "data unknown": ([*GOAL, "--data", "digitz"], "digitz"),
    "image size": ([*GOAL, "--img-size", "2"], "--img-size"),
    "device unknown": ([*GOAL, "--device", "tpu"], "tpu"),
    "device malformed": ([*GOAL, "--device", "cuda:one"], "cuda:one"),
    "effort": ([*GOAL, "--effort", "extreme"], "extreme"),
    "family": ([*GOAL, "--family", "resnext"], "resnext"),
    "train_per_step above shortlist": ([*GOAL, "--train-per-step", "50"], "--train-per-step"),
    "steps": ([*GOAL, "--steps", "0"], "--steps"),
    "a label of every class": ([*GOAL, "--topk", "10"], "--topk: got 10, want 1 to 9"),
    "hours": ([*GOAL, "--max-hours", "-2"], "--max-hours"),
    "conflict": ([*GOAL, "--labels", "x", "--teacher", "resnet18"], "--labels with --teacher"),
    "unknown flag": ([*GOAL, "--target-flops", "1G"], "--target-flops"),
    "abbreviated flag": (["--seed", "21M", "--target", "5M"], "--target"),
    "resume without a folder": (["--resume"], "--resume"),
    "resume of nothing": (["--resume", "/no/such/run"], "--resume"),
    "status of nothing": (["--status", "/no/such/run"], "/no/such/run"),
    "two folders": (["--resume", "/a", "--out", "/b"], "--resume"),
    "requirement malformed": ([*GOAL, "--require", "fast"], "fast"),
    "requirement without a device": ([*GOAL, "--require", "speedup>=2"], "speedup>=2"),
    "requirement of a wrong sense": ([*GOAL, "--require", "latency_ms>=2@cpu"], "latency_ms>=2"),
    "requirement of an unknown metric": ([*GOAL, "--require", "watts<=2@cpu"], "watts"),
    "requirement of no number": ([*GOAL, "--require", "speedup>=two@cpu"], "two"),
    "requirement of batch zero": ([*GOAL, "--require", "speedup>=2@cpu:b0"], "--batch"),
    "requirement of two batches": ([*GOAL, "--require", "speedup>=2@cpu:b1:b2"], "b2"),
    "requirement of an unknown runtime": ([*GOAL, "--require", "speedup>=2@cpu:tensorfow"], "tensorfow"),
    "requirement of a runtime not installed": ([*GOAL, "--require", "speedup>=2@cuda:tensorrt"], "tensorrt"),
    "requirement of a dtype a runtime lacks": (
        [*GOAL, "--require", "speedup>=2@cpu:onnxruntime-int8:bfloat16"],
        "bfloat16",
    ),
    "requirement of a device that is not there": ([*GOAL, "--require", "images_per_s>=2@cuda:7:b2"], "cuda:7"),
    "requirement twice": ([*GOAL, "--require", "speedup>=2@cpu:b16", "--min-speedup", "1.5"], "speedup>=1.5"),
    "requirement below every arch": ([*GOAL, "--require", "macs<=1k"], "macs<=1000"),
    "bench runtime unknown": ([*GOAL, "--bench-runtime", "eagre"], "eagre"),
    "bench device unknown": ([*GOAL, "--bench-device", "tpu"], "tpu"),
    "device table missing": ([*GOAL, "--device-table", "/no/such.csv"], "/no/such.csv"),
    "finalists of a new run": ([*GOAL, "--final-measurements", "x.csv"], "--final-measurements"),
    "distillation unknown": ([*GOAL, "--distill", "warm"], "--distill: got warm, want one of sparse"),
    "a token that the seed has not": (
        [*GOAL, "--distill", "token"],
        "--distill: got token for 21M, want a seed with a distillation token; hard learns",
    ),
    "measurements missing": ([*GOAL, "--measurements", "/no/such.csv"], "/no/such.csv"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_bad_flag_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    flags, named = FLAGS[case]
    out = tmp_path / "run"
    extra = [] if {"--resume", "--status"} & set(flags) else ["--out", str(out)]
    line = refused(capsys, [*flags, *extra, "--cache-dir", str(finished.cache), "--quiet"])
    assert named in line
    assert not out.exists()


def empty(root: Path) -> Path:
    (root / "data").mkdir()
    return root / "data"


def one_class(root: Path) -> Path:
    return image_folder(root / "data", classes=1)


def no_images(root: Path) -> Path:
    for name in ("a", "b"):
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / "notes.txt").write_text("no image")
    return root / "data"


def truncated(root: Path) -> Path:
    return image_folder(root / "data", broken=8)


def a_file(root: Path) -> Path:
    (root / "data").write_text("not a folder")
    return root / "data"


@pytest.mark.parametrize("make", [empty, one_class, no_images, truncated, a_file])
def test_a_bad_data_folder_is_one_line(
    make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(tmp_path)
    out = tmp_path / "run"
    arguments = [*GOAL, "--data", str(data), "--out", str(out), "--quiet"]
    refused(capsys, [*arguments, "--cache-dir", str(tmp_path / "cache")])
    assert not out.exists()


@pytest.mark.parametrize("kind", ["soft", "hard", "token"])
def test_true_labels_that_are_not_there_cannot_be_learnt(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "sorted", classes=1, each=60)
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "sorted").rglob("*.png"):
        path.rename(tmp_path / "data" / path.name)
    flags = [*GOAL, "--data", str(tmp_path / "data"), "--distill", kind, "--quiet"]
    out = tmp_path / "run"
    line = refused(capsys, [*flags, "--out", str(out), "--cache-dir", str(tmp_path / "cache")])
    assert f"--distill: got {kind} on images without ground truth" in line
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_unreadable_data_and_unwritable_out_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    cache = ["--cache-dir", str(tmp_path / "cache"), "--quiet"]
    refused(capsys, [*GOAL, "--data", str(locked), "--out", str(tmp_path / "r"), *cache])
    refused(capsys, [*GOAL, "--out", str(locked / "r"), *cache])


def test_an_out_below_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    line = refused(capsys, [*finished.flags, "--out", str(out), "--quiet"])
    assert "--out" in line


def test_used_folders_are_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    line = refused(capsys, [*finished.flags, "--out", str(finished.folder)])
    assert f"--resume {finished.folder}" in line
    (tmp_path / "thesis.tex").write_text("mine")
    line = refused(capsys, [*finished.flags, "--out", str(tmp_path), "--quiet"])
    assert "thesis.tex" in line
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_two_processes_on_one_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    from filelock import FileLock

    with FileLock(finished.folder / ".lock"):
        line = refused(capsys, ["--resume", str(finished.folder)])
    assert "another process" in line


@pytest.mark.parametrize(
    ("flag", "value"), [("--target-params", "300K"), ("--random-seed", "7"), ("--min-speedup", "1.1")]
)
def test_a_resume_may_not_change_the_answer(
    flag: str, value: str, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    line = refused(capsys, ["--resume", str(finished.folder), flag, value])
    assert flag in line
    assert "drop" in line


def interrupted(finished: Finished, folder: Path) -> Path:
    """Copy a finished run as it was before its result."""
    shutil.copytree(finished.folder, folder)
    (folder / "result.json").unlink()
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path: Path) -> None:
    path.write_text("hello\n")


@pytest.mark.parametrize(
    ("name", "damage"),
    [("study.db", cut), ("study.db", foreign), ("run.json", cut), ("run.json", foreign), ("measurements.csv", foreign)],
)
def test_a_damaged_run_is_refused_naming_the_file(
    name: str, damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    folder = interrupted(finished, tmp_path / "run")
    damage(folder / name)
    before = (folder / name).read_bytes()
    arguments = ["--resume", str(folder), "--cache-dir", str(finished.cache), "--quiet"]
    line = refused(capsys, arguments)
    assert name in line
    assert (folder / name).read_bytes() == before


def test_a_damaged_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    foreign(tmp_path / "run" / "result.json")
    assert "result.json" in refused(capsys, ["--resume", str(tmp_path / "run")])


def test_seed_weights_of_another_shape_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    weights = finished.folder / "best.safetensors"
    out = tmp_path / "run"
    arguments = [*finished.flags, "--seed-weights", str(weights), "--out", str(out), "--quiet"]
    line = refused(capsys, arguments)
    assert line.startswith("error: --seed-weights")
    assert "instead of" in line
    assert not out.exists()


@pytest.mark.parametrize(
    "arch",
    [
        "not json",
        json.dumps([1, 2]),
        json.dumps({"embed_dims": [64, 64, 96, 128]}),
        json.dumps({"depths": [1, 1, 1, -1]}),
    ],
)
def test_a_bad_seed_file_is_one_line(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seed.json").write_text(arch)
    arguments = ["--seed", str(tmp_path / "seed.json"), "--target-params", "400K"]
    refused(capsys, [*arguments, "--out", str(tmp_path / "run"), "--quiet"])


def test_a_store_of_other_data_is_refused_naming_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    stores = [p for p in (finished.cache / "labels").iterdir() if (p / "manifest.json").exists()]
    out = tmp_path / "run"
    arguments = [*finished.flags, "--max-images", "100", "--labels", str(stores[0])]
    line = refused(capsys, [*arguments, "--out", str(out), "--quiet"])
    assert "label store" in line
    assert not out.exists()
