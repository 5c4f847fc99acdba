"""`nas.train`: what it refuses, in one line, and that nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from label_cases import built

from nas.core.io import read_json, write_json
from nas.data import DataSpec, prepare
from nas.train import __main__ as train
from tests.train_cases import arch_file, flags, resume, trained


@pytest.mark.parametrize(
    "damage",
    [{}, {"config": {}, "machine": {}}, {"config": {"recipe": {}}, "machine": {}}, {"config": 3, "machine": {}}],
)
def test_a_damaged_account_is_one_line(damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.json").write_text(json.dumps(damage))
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


BAD: list[tuple[list[str], str]] = [
    (["--recipe", "tinyvit-2k"], "did you mean tinyvit-1k?"),
    (["--recipe", "tinyvit-22k-distill"], "--labels STORE or --teacher NET"),
    (["--batch-size", "33", "--accumulate", "2"], "multiple of 2"),
    (["--resize", "bicubic"], "one of own, published, timm"),
    (["--amp", "fp16"], "a GPU"),
    (["--device", "tpu"], "cpu, cuda or cuda:N"),
    (["--workers", "-1"], "an integer from 0 to 1024"),
    (["--workers", "2000"], "an integer from 0 to 1024"),
    (["--threads", "0"], "--threads: got 0"),
    (["--threads", "100000"], "--threads: got 100000"),
    (["--arch", "9B"], "--arch: got 9B"),
    (["--init", "nowhere.safetensors"], "an existing file"),
    (["--labels", "nowhere"], "nowhere"),
    (["--distill", "token", "--teacher", "auto", "--teacher-epochs", "1"], "--distill: got token for a net without"),
    (["--head-map", "map.txt"], "--init FILE"),
]


@pytest.mark.parametrize(("more", "said"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    more: list[str], said: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train.main(flags(cache, arch_file(tmp_path), out, *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not out.exists()


def test_weights_of_another_arch_and_labels_of_other_images_are_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trained(cache, tmp_path / "first", "--epochs", "1")
    wide = arch_file(tmp_path, embed_dim=64)
    more = ["--init", str(first / "best.safetensors")]
    assert train.main(flags(cache, wide, tmp_path / "a", *more)) == 2
    assert "weights of D64" in capsys.readouterr().err
    other = prepare(DataSpec("digits", img_size=48, max_images=60), cache)
    store = built(tmp_path / "store", other).folder
    assert train.main(flags(cache, wide, tmp_path / "b", "--labels", str(store))) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "label store" in err


def test_a_folder_of_something_else_and_processes_that_do_not_divide_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = arch_file(tmp_path)
    assert train.main(flags(cache, arch, tmp_path)) == 2  # holds arch.json
    assert "new or empty" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path / "nothing")]) == 2
    assert "train.json" in capsys.readouterr().err
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert train.main(flags(cache, arch, tmp_path / "o")) == 2
    assert "a multiple of 3, for 3 processes x 1 accumulation steps; 30 or 33" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    assert train.main(flags(cache, arch, tmp_path / "o")) == 2
    assert "start with torchrun" in capsys.readouterr().err


def test_data_that_changed_under_a_training_is_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(cache, tmp_path / "out", "--save-steps", "1")
    (out / "result.json").unlink()
    told = read_json(out / "train.json", "a training")
    told["config"]["max_images"] = 150
    write_json(out / "train.json", told)
    assert resume(cache, out) == 2
    assert "of other settings (data" in capsys.readouterr().err
