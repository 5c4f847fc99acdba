"""Bad input, whatever carries it, ends in one line that names it and exit status 2 (rule 2)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished
from filelock import FileLock
from PIL import Image

from nas.contract.__main__ import main

GOAL = ["--seed", "21M", "--target-params", "5M", "--effort", "smoke"]


def image_folder(root: Path, classes: int = 2, each: int = 20, broken: int = 0) -> Path:
    """Write a folder of small random images, the first `broken` of each class cut short."""
    rng = np.random.default_rng(0)
    for at in range(classes * each):
        path = root / f"class{at // each}" / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)
        if at % each < broken:
            path.write_bytes(path.read_bytes()[:60])
    return root


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str = "", out: Path | None = None) -> str:
    """Run and expect a refusal that leaves no `out`; return its one line."""
    flags = arguments if out is None else [*arguments, "--out", str(out)]
    try:
        code = main([*flags, "--quiet"])
    except SystemExit as leave:  # argparse
        code = int(leave.code or 0)
    error = capsys.readouterr().err
    lines = [x for x in error.splitlines() if x.strip()]
    assert code == 2, (code, error)
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert out is None or not out.exists()
    return lines[0]


FLAGS = {
    "--seed 7M --target-params 5M": "7M",
    "--target-params 5M": "--seed",
    "--seed / --target-params 5M": "--seed",
    "--seed 21M": "--target-params",
    "--seed 21M --target 5M": "--target",
    "--resume": "--resume",
    "--resume /no/such/run": "--resume",
    "--status /no/such/run": "/no/such/run",
    "--resume /a --out /b": "--resume",
}
NEW = {
    "--target-params abc": "abc",
    "--target-params 30M": "20,",
    "--target-params 1K": "parameters at 10 classes",
    "--min-speedup fast": "--min-speedup",
    "--params-tolerance 150%": "--params-tolerance",
    "--max-corrupt lots": "--max-corrupt",
    "--data /no/such/folder": "--data",
    "--data digitz": "digitz",
    "--img-size 2": "--img-size",
    "--device tpu": "tpu",
    "--family resnext": "resnext",
    "--topk 10": "--topk: got 10, want 1 to 9",
    "--max-hours -2": "--max-hours",
    "--labels x --teacher resnet18": "--labels with --teacher",
    "--target-flops 1G": "--target-flops",
    "--require speedup>=2@cpu:tensorfow": "tensorfow",
    "--require speedup>=2@cuda:tensorrt": "tensorrt",  # not installed
    "--require speedup>=2@cpu:onnxruntime-int8:bfloat16": "bfloat16",
    "--require images_per_s>=2@cuda:7:b2": "cuda:7",  # not there
    "--require speedup>=2@cpu:b16 --min-speedup 1.5": "speedup>=1.5",  # twice
    "--require macs<=1k": "macs<=1000",  # below every arch
    "--bench-runtime eagre": "eagre",
    "--bench-device tpu": "tpu",
    "--device-table /no/such.csv": "/no/such.csv",
    "--final-measurements x.csv": "--final-measurements",
    "--distill token": "--distill: got token for 21M, want a seed with a distillation token; hard learns",
    "--measurements /no/such.csv": "/no/such.csv",
}
FLAGS |= {f"{' '.join(GOAL)} {flags}": named for flags, named in NEW.items()}


@pytest.mark.parametrize("case", FLAGS)
def test_a_bad_flag_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    flags = [*case.split(), "--cache-dir", str(finished.cache)]
    refused(capsys, flags, FLAGS[case], None if {"--resume", "--status"} & set(flags) else tmp_path / "run")


def no_images(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "notes.txt").write_text("no image")
    return root


DATA: dict[str, Callable[[Path], object]] = {
    "empty": lambda root: root.mkdir(),
    "one class": lambda root: image_folder(root, classes=1),
    "no images": no_images,
    "truncated": lambda root: image_folder(root, broken=8),
    "a file": lambda root: root.write_text("not a folder"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_bad_data_folder_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DATA[case](tmp_path / "data")
    arguments = [*GOAL, "--data", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")]
    refused(capsys, arguments, out=tmp_path / "run")


def test_true_labels_that_are_not_there_cannot_be_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path, classes=1, each=60)
    flags = [*GOAL, "--data", str(tmp_path / "class0"), "--cache-dir", str(tmp_path / "cache"), "--distill"]
    for kind in ("soft", "hard", "token"):
        refused(capsys, [*flags, kind], f"--distill: got {kind} on images without ground truth", tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_unreadable_data_and_unwritable_out_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    cache = ["--cache-dir", str(tmp_path / "cache")]
    refused(capsys, [*GOAL, "--data", str(locked), *cache], out=tmp_path / "r")
    refused(capsys, [*GOAL, "--out", str(locked / "r"), *cache])


def test_folders_that_cannot_be_used_are_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    refused(capsys, [*finished.flags, "--out", str(finished.folder)], f"--resume {finished.folder}")
    (tmp_path / "thesis.tex").write_text("mine")
    refused(capsys, [*finished.flags, "--out", str(tmp_path)], "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    refused(capsys, [*finished.flags, "--out", str(tmp_path / "thesis.tex" / "run")], "--out")
    with FileLock(finished.folder / ".lock"):
        refused(capsys, ["--resume", str(finished.folder)], "another process")


@pytest.mark.parametrize("flags", ["--target-params 300K", "--random-seed 7", "--min-speedup 1.1"])
def test_a_resume_may_not_change_the_answer(flags: str, capsys: pytest.CaptureFixture[str], finished: Finished) -> None:
    line = refused(capsys, ["--resume", str(finished.folder), *flags.split()], flags.split()[0])
    assert "drop" in line


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path: Path) -> None:
    path.write_text("hello\n")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("study.db", cut), ("study.db", foreign), ("run.json", cut), ("run.json", foreign)),
        *(("measurements.csv", foreign), ("result.json", foreign)),
    ],
)
def test_a_damaged_run_is_refused_naming_the_file(
    name: str, damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    if name != "result.json":
        (folder / "result.json").unlink()
    damage(folder / name)
    before = (folder / name).read_bytes()
    refused(capsys, ["--resume", str(folder), "--cache-dir", str(finished.cache)], name)
    assert (folder / name).read_bytes() == before


def test_seed_weights_of_another_shape_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    weights = str(finished.folder / "best.safetensors")
    line = refused(capsys, [*finished.flags, "--seed-weights", weights], "error: --seed-weights", tmp_path / "run")
    assert "instead of" in line


@pytest.mark.parametrize("arch", ["not json", "[1, 2]", '{"embed_dims": [64, 64, 96, 128]}', '{"depths": [-1]}'])
def test_a_bad_seed_file_is_one_line(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seed.json").write_text(arch)
    refused(capsys, ["--seed", str(tmp_path / "seed.json"), "--target-params", "400K"], out=tmp_path / "run")


def test_a_store_of_other_data_is_refused_naming_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    store = next(p.parent for p in (finished.cache / "labels").glob("*/manifest.json"))
    arguments = [*finished.flags, "--max-images", "100", "--labels", str(store)]
    refused(capsys, arguments, "label store", tmp_path / "run")
