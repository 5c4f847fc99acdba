"""`nas.train`: it goes on where it stopped, whoever trains, and ends alike."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nas.train import __main__ as train
from nas.train.fit import _Loop
from nas.train.recipe import find_recipe
from tests.train_cases import Stop, arch_file, equal, flags, resume, rows, run, sets, stop_at, trained, weights


def good(path: Path) -> bool:
    """Whether all numbers of a file of weights are finite."""
    return all(bool(torch.isfinite(v).all()) for v in load_file(path).values() if v.is_floating_point())


@pytest.mark.slow
def test_one_process_in_two_turns_and_two_processes_end_in_the_same_bits(cache: Path, tmp_path: Path) -> None:
    arch = arch_file(tmp_path)
    drop = sets(drop_path=0.2, repeats=3, mixup=0.8)
    one, two = trained(cache, tmp_path / "one", *drop, "--accumulate", "2"), tmp_path / "two"
    done = run(*flags(cache, arch, two, *drop), torchrun=2)
    assert done.returncode == 0, done.stderr
    assert equal(weights(one), weights(two))
    assert [r["train_loss"] for r in rows(one)] == [r["train_loss"] for r in rows(two)]
    assert [r["holdout_loss"] for r in rows(one)] == [r["holdout_loss"] for r in rows(two)]


def test_stopped_at_random_steps_it_ends_in_the_same_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*sets(drop_path=0.2, ema_decay=0.9, mixup=0.8), "--batch-size", "16"]
    whole = trained(cache, tmp_path / "whole", *more)
    rng = random.Random(0)
    steps = 2 * (int(float(rows(whole)[0]["images"])) // 16)
    for trial in range(6):
        out = tmp_path / f"cut{trial}"
        fatal = rng.randrange(steps)
        save = ["--save-steps", str(rng.randint(1, 4))]
        with monkeypatch.context() as patch:
            stop_at(patch, fatal)
            with pytest.raises(Stop):
                trained(cache, out, *more, *save)
        assert resume(cache, out) == 0
        for name in ("last", "best"):
            assert equal(weights(whole, name), weights(out, name)), (trial, fatal)
        passing = ("seconds", "images_per_s", "peak_mem_bytes")
        whole_log, log = (
            [{k: v for k, v in row.items() if k not in passing} for row in rows(each)] for each in (whole, out)
        )
        assert whole_log == log


def test_a_finished_training_is_extended_and_a_kill_does_not_matter(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = trained(cache, tmp_path / "whole"), trained(cache, tmp_path / "out")
    before, epochs = weights(whole, "last"), len(rows(whole))
    assert resume(cache, whole, "--extend", "2") == 0
    assert len(rows(whole)) == epochs + 2
    result = json.loads((whole / "result.json").read_text())
    assert (result["status"], result["epochs"]) == ("finished", epochs + 2)
    assert not equal(before, weights(whole, "last"))
    assert float(rows(whole)[-1]["lr"]) == pytest.approx(float(rows(whole)[-2]["lr"]))
    with monkeypatch.context() as patch:  # in the middle of the epochs added
        stop_at(patch, epochs * (int(float(rows(out)[0]["images"])) // 32) + 2)
        with pytest.raises(Stop):
            resume(cache, out, "--extend", "2")
    assert resume(cache, out, "--extend", "2") == 2
    assert "has not ended" in capsys.readouterr().err
    assert resume(cache, out) == 0
    assert equal(weights(whole, "last"), weights(out, "last"))
    assert train.main(flags(cache, arch_file(tmp_path), tmp_path / "new", "--extend", "2")) == 2
    assert "a new training" in capsys.readouterr().err


def killed_and_resumed(arguments: list[str], out: Path, cache: Path, delay: float) -> None:
    """Kill -9 some time after the first checkpoint, then go on."""
    with subprocess.Popen(
        [sys.executable, "-m", "nas.train", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        waited = time.monotonic()
        while not (out / "checkpoint.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() - waited < 120
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None, "it was to be killed while it trains"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "result.json").exists()
    assert resume(cache, out) == 0


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_killed_at_any_moment_it_ends_in_the_same_weights(trial: int, cache: Path, tmp_path: Path) -> None:
    more = ["--batch-size", "8", "--save-steps", "2", "--set", "drop_path=0.1", "--epochs", "8"]
    whole, out = trained(cache, tmp_path / "whole", *more), tmp_path / "out"
    delay = random.Random(trial).uniform(0.0, 1.0)
    killed_and_resumed(flags(cache, arch_file(tmp_path), out, *more), out, cache, delay)
    assert equal(weights(whole), weights(out))
    assert equal(weights(whole, "best"), weights(out, "best"))


def test_a_divergence_stops_with_the_last_good_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, loss = tmp_path / "out", _Loop._step_loss
    calls = 0

    def poisoned(self: Any, network: Any, part: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found = loss(self, network, part)
        return found * float("nan") if calls == 7 else found

    monkeypatch.setattr(_Loop, "_step_loss", poisoned)
    arguments = flags(cache, arch_file(tmp_path), out, "--save-steps", "1", "--batch-size", "16")
    assert train.main(arguments) == 3
    said = capsys.readouterr().err
    assert said.startswith("diverged: the loss became nan by step 6 ")
    assert said.count("\n") == 1
    assert "checkpoint.safetensors" in said
    assert good(out / "checkpoint.safetensors")
    assert json.loads((out / "result.json").read_text())["status"] == "diverged"


def test_gradients_that_are_not_numbers_leave_the_good_models(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, loss = tmp_path / "out", _Loop._step_loss
    last = [False]

    def poisoned(self: Any, network: Any, part: Any) -> torch.Tensor:
        found = loss(self, network, part)
        if last[0]:  # the loss is fine, its gradients are not
            found.register_hook(lambda g: g * float("nan"))
        return found

    take = _Loop._take

    def late(self: Any, *args: Any) -> None:
        last[0] = args[-1] == 2 * self._args.source.steps_per_epoch - 1
        take(self, *args)

    monkeypatch.setattr(_Loop, "_step_loss", poisoned)
    monkeypatch.setattr(_Loop, "_take", late)
    more = ["--set", "clip_norm=none", "--epochs", "3"]
    assert train.main(flags(cache, arch_file(tmp_path), out, *more)) == 3
    assert "(epoch 2)" in capsys.readouterr().err
    assert good(out / "best.safetensors")
    assert good(out / "checkpoint.safetensors")
    assert json.loads((out / "best.json").read_text())["score"]["epoch"] == 1


def test_sums_over_processes_are_taken_on_ones_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    from nas.train.distributed import Ranks

    seen = []
    monkeypatch.setattr(distributed, "all_reduce", lambda t: seen.append(t.device.type))
    assert Ranks(0, 2, "meta").sum(torch.tensor(1.0)).device.type == "meta"  # a GPU's stand-in
    assert seen == ["meta"]


def test_a_resume_takes_machine_flags_only_and_needs_no_first_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = trained(cache, tmp_path / "first", "--epochs", "1"), tmp_path / "out"
    more = ["--init", str(first / "best.safetensors"), "--amp", "bf16", "--save-steps", "1"]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stop):
            trained(cache, out, *more)
    (first / "best.safetensors").unlink()
    for flag in ("--epochs 9", "--set lr=1", "--data fractals", "--no-pixel-cache"):
        assert resume(cache, out, *flag.split()) == 2
        assert "beside --resume" in capsys.readouterr().err
    assert json.loads((out / "train.json").read_text())["machine"]["amp"] == "bf16"
    assert resume(cache, out, "--amp", "none", "--accumulate", "2") == 0
    told = json.loads((out / "train.json").read_text())["machine"]
    assert (told["amp"], told["accumulation_steps"], told["save_steps"]) == ("none", 2, 1)
    assert find_recipe(str(out / "train.json"), 1).epochs == 2


def test_two_processes_do_not_write_one_folder(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nas.train.folder import TrainFolder

    out = tmp_path / "out"
    with TrainFolder(out).lock():
        assert train.main(flags(cache, arch_file(tmp_path), out)) == 2
    err = capsys.readouterr().err
    assert "no other process" in err
    assert err.count("\n") == 1
    trained(cache, out)
