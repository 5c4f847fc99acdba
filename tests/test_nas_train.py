"""`nas.train`: what it leaves, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from nas import labels, train
from tests.conftest import SMALL_ARCH, Finished

VIT = {
    "embed_dim": 32, "depth": 2, "head_dim": 16, "mlp_ratio": 2.0, "patch_size": 8,
    "dist_token": False,
}  # fmt: skip
Train = Callable[..., int]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def arch_file(folder: Path, family: str = "vit", **changes: Any) -> Path:
    arch = {**(VIT if family == "vit" else SMALL_ARCH), **changes}
    path = folder / "arch.json"
    path.write_text(json.dumps({"family": family, "arch": arch}))
    return path


def flags(cache: Path, arch: Path | str, out: Path, *more: str) -> list[str]:
    return [
        *("--arch", str(arch), "--data", "digits", "--img-size", "32", "--proxy-images", "200"),
        *("--epochs", "2", "--threads", "1", "--cache-dir", str(cache), "--out", str(out)),
        *("--quiet", *more),
    ]


def run(*arguments: str, torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)] if torchrun else []
    return subprocess.run(
        [sys.executable, *start, "-m", "nas.train", *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "log.csv").read_text().splitlines()))


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return dict(load_file(out / f"{name}.safetensors"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_training_leaves_models_log_curve_and_board(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--set", "ema_decay=0.9", "--set", "ema_warmup=true", "--keep-every", "1", "--json"]
    assert train.main(flags(cache, arch_file(tmp_path), out, *more)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    told = json.loads((out / "best.json").read_text())
    model = timm.create_model(told["timm"]["model"], **told["timm"]["kwargs"])
    model.load_state_dict(load_file(out / "best.safetensors"), strict=True)
    assert told["score"]["test_top1"] == result["test_top1"]
    assert [row["epoch"] for row in rows(out)] == ["1", "2"]
    assert all(float(row["ema_holdout_top1"]) >= 0 for row in rows(out))
    for kept in ("epochs/epoch-0001", "epochs/epoch-0002", "last", "best"):
        assert (out / f"{kept}.safetensors").is_file()
        assert (out / f"{kept}.json").is_file()
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    losses = [(e.step, e.value) for e in board.Scalars("train/train_loss")]
    wanted = [(int(r["epoch"]), float(r["train_loss"])) for r in rows(out)]
    assert losses == [(step, pytest.approx(value)) for step, value in wanted]
    # A finished training has nothing to do, and says the same.
    assert train.main(["--resume", str(out), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    # Its best model, evaluated again from its files, is what was told.
    table = tmp_path / "classes.csv"
    again = ["--evaluate", str(out), "--data", "digits", "--proxy-images", "200", "--cache-dir",
             str(cache), "--out", str(table), "--quiet", "--json"]  # fmt: skip
    assert train.main(again) == 0
    tested = json.loads(capsys.readouterr().out)
    assert tested["top1"] == result["test_top1"]
    assert tested["n"] == result["test_n"]
    by_class = list(csv.DictReader(table.read_text().splitlines()))
    hits = sum(int(r["n"]) * float(r["top1"]) for r in by_class)
    assert hits / tested["n"] == pytest.approx(tested["top1"], abs=1e-5)
    assert table.read_text() == (out / "test_classes.csv").read_text()


def test_one_process_in_two_turns_and_two_processes_end_in_the_same_bits(
    cache: Path, tmp_path: Path
) -> None:
    arch = arch_file(tmp_path)
    drop = ["--set", "drop_path=0.2", "--set", "repeats=3", "--set", "mixup=0.8"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(flags(cache, arch, one, *drop, "--accumulate", "2")) == 0
    done = run(*flags(cache, arch, two, *drop), torchrun=2)
    assert done.returncode == 0, done.stderr
    assert equal(weights(one), weights(two))
    assert [r["train_loss"] for r in rows(one)] == [r["train_loss"] for r in rows(two)]
    assert [r["holdout_loss"] for r in rows(one)] == [r["holdout_loss"] for r in rows(two)]


def test_the_same_whole_batch_gives_the_same_curve(finished: Finished, tmp_path: Path) -> None:
    # TinyViT whose batch norms are frozen: nothing depends on who sees what together.
    more = ["--set", "bn=eval", "--init", str(finished.folder / "best.safetensors"),
            "--set", "layer_decay=0.8", "--set", "lr=3e-4"]  # fmt: skip
    found = []
    for turns in ("1", "2", "4"):
        out = tmp_path / turns
        arguments = flags(finished.cache, finished.folder, out, *more, "--accumulate", turns)
        assert train.main(arguments) == 0
        found.append(rows(out))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            for name in ("train_loss", "holdout_loss"):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-4), name


class Stop(Exception):
    """The power fails."""


def test_stopped_at_ten_random_steps_it_ends_in_the_same_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = arch_file(tmp_path)
    more = ["--set", "drop_path=0.2", "--set", "ema_decay=0.9", "--set", "mixup=0.8",
            "--batch-size", "16"]  # fmt: skip
    whole = tmp_path / "whole"
    assert train.main(flags(cache, arch, whole, *more)) == 0

    from nas.trainer.fit import _Loop

    take = _Loop._take
    rng = random.Random(0)
    steps = 2 * (int(float(rows(whole)[0]["images"])) // 16)
    for trial in range(10):
        out = tmp_path / f"cut{trial}"
        fatal = rng.randrange(steps)

        def failing(self: Any, *args: Any, fatal: int = fatal) -> None:
            if args[-1] == fatal:
                raise Stop
            take(self, *args)

        save = ["--save-steps", str(rng.randint(1, 4))]
        with monkeypatch.context() as patch:
            patch.setattr(_Loop, "_take", failing)
            with pytest.raises(Stop):
                train.main(flags(cache, arch, out, *more, *save))
        assert train.main(["--resume", str(out), "--cache-dir", str(cache), "--quiet"]) == 0
        for name in ("last", "best"):
            assert equal(weights(whole, name), weights(out, name)), (trial, fatal)
        timeless = [
            [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s", "peak_mem_bytes")}
             for r in rows(each)] for each in (whole, out)
        ]  # fmt: skip
        assert timeless[0] == timeless[1]


def killed_and_resumed(arguments: list[str], out: Path, cache: Path, delay: float) -> None:
    """Kill -9 some time after the first checkpoint, then go on."""
    with subprocess.Popen(
        [sys.executable, "-m", "nas.train", *arguments], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
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
    assert train.main(["--resume", str(out), "--cache-dir", str(cache), "--quiet"]) == 0


@pytest.mark.parametrize(
    "trial", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]
)
def test_killed_at_any_moment_it_ends_in_the_same_weights(
    trial: int, cache: Path, tmp_path: Path
) -> None:
    arch = arch_file(tmp_path)
    more = ["--batch-size", "8", "--save-steps", "2", "--set", "drop_path=0.1", "--epochs", "8"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train.main(flags(cache, arch, whole, *more)) == 0
    delay = random.Random(trial).uniform(0.0, 1.0)
    killed_and_resumed(flags(cache, arch, out, *more), out, cache, delay)
    assert equal(weights(whole), weights(out))
    assert equal(weights(whole, "best"), weights(out, "best"))


def test_averaged_weights_follow_the_formula(cache: Path, tmp_path: Path) -> None:
    from nas.trainer.fit import _Loop

    trace: list[dict[str, torch.Tensor]] = []
    take = _Loop._take

    def watched(self: Any, *args: Any) -> None:
        take(self, *args)
        trace.append({k: v.clone() for k, v in self._model.state_dict().items()})
        average = trace[0]
        for n, state in enumerate(trace[1:], start=2):
            # timm's warm-up (its first update copies): 1 - (1 + n)^(-2/3), at most the decay.
            decay = min(1 - (1 + (n - 1)) ** (-2 / 3), 0.6)
            average = {k: decay * average[k] + (1 - decay) * v for k, v in state.items()}
        for key, value in self._ema.module.state_dict().items():
            torch.testing.assert_close(value, average[key], rtol=1e-4, atol=1e-6)

    more = ["--set", "ema_decay=0.6", "--set", "ema_warmup=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Loop, "_take", watched)
        assert train.main(flags(cache, arch_file(tmp_path), tmp_path / "o", *more)) == 0
    assert len(trace) > 4


def test_a_divergence_stops_with_the_last_good_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.trainer.fit import _Loop

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
    good = load_file(out / "checkpoint.safetensors")
    assert all(bool(torch.isfinite(v).all()) for v in good.values() if v.is_floating_point())
    assert json.loads((out / "result.json").read_text())["status"] == "diverged"


def test_gradients_that_are_not_numbers_leave_the_good_models(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.trainer.fit import _Loop

    out, loss = tmp_path / "out", _Loop._step_loss
    last = [False]

    def poisoned(self: Any, network: Any, part: Any) -> torch.Tensor:
        found = loss(self, network, part)
        if last[0]:  # the loss is fine, its gradients are not
            found.register_hook(lambda g: g * float("nan"))
        return found

    take = _Loop._take

    def late(self: Any, *args: Any) -> None:
        last[0] = args[-1] == 2 * self._c.source.steps_per_epoch - 1
        take(self, *args)

    monkeypatch.setattr(_Loop, "_step_loss", poisoned)
    monkeypatch.setattr(_Loop, "_take", late)
    more = ["--set", "clip_norm=none", "--epochs", "3"]
    assert train.main(flags(cache, arch_file(tmp_path), out, *more)) == 3
    assert "(epoch 2)" in capsys.readouterr().err
    for name in ("best", "checkpoint"):
        kept = load_file(out / f"{name}.safetensors")
        assert all(bool(torch.isfinite(v).all()) for v in kept.values() if v.is_floating_point())
    assert json.loads((out / "best.json").read_text())["score"]["epoch"] == 1


def test_what_is_not_a_number_is_wrong_and_ties_are_not(cache: Path) -> None:
    from nas.data import DataSpec, prepare
    from nas.distill.augment import default_spec
    from nas.trainer.evaluation import evaluate

    digits = prepare(DataSpec("digits", 32, 200), cache, lambda _: None)

    def constant(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda inputs: torch.full((len(inputs), 10), value)

    spec = default_spec(digits)
    for value, top1 in ((float("nan"), 0.0), (0.0, 1.0)):
        found = evaluate(constant(value), digits.test, spec, num_classes=10)
        assert found.top(1)[0] == top1


def test_sums_over_processes_are_taken_on_ones_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    from nas.trainer.ranks import Ranks

    seen = []
    monkeypatch.setattr(distributed, "all_reduce", lambda t: seen.append(t.device.type))
    assert Ranks(0, 2, "meta").sum(torch.tensor(1.0)).device.type == "meta"  # a GPU's stand-in
    assert seen == ["meta"]


def test_less_memory_and_mixed_precision_change_no_more_than_they_must(
    cache: Path, tmp_path: Path
) -> None:
    arch = arch_file(tmp_path)
    plain, light, half = (tmp_path / n for n in ("plain", "light", "half"))
    assert train.main(flags(cache, arch, plain)) == 0
    assert train.main(flags(cache, arch, light, "--grad-checkpointing")) == 0
    assert train.main(flags(cache, arch, half, "--amp", "bf16")) == 0
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(light)[key], value, rtol=1e-4, atol=1e-5)
    assert weights(half)["head.weight"].dtype == torch.float32
    for a, b in zip(rows(plain), rows(half), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=0.02)
        assert a["train_loss"] != b["train_loss"]


@pytest.mark.slow
def test_a_compiled_net_learns_alike_and_leaves_plain_weights(cache: Path, tmp_path: Path) -> None:
    arch = arch_file(tmp_path)
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    assert train.main(flags(cache, arch, plain)) == 0
    assert train.main(flags(cache, arch, fast, "--compile")) == 0
    assert weights(fast).keys() == weights(plain).keys()
    for a, b in zip(rows(plain), rows(fast), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)


@pytest.mark.parametrize("how", ["own", "published", "timm"])
def test_weights_of_another_size_and_other_classes_are_taken_over(
    how: str, cache: Path, tmp_path: Path
) -> None:
    arch = arch_file(tmp_path)
    first, out = tmp_path / "first", tmp_path / "out"
    assert train.main(flags(cache, arch, first, "--epochs", "1")) == 0
    (tmp_path / "map.txt").write_text("\n".join(str(n) for n in [9, 8, 7, 6, 5, 4, 3, 2, 1, -1]))
    more = ["--img-size", "48", "--init", str(first / "best.safetensors"), "--resize", how,
            "--head-map", str(tmp_path / "map.txt"), "--set", "lr=0", "--set", "min_lr=0",
            "--set", "warmup_lr=0", "--set", "weight_decay=0"]  # fmt: skip
    assert train.main(flags(cache, arch, out, *more)) == 0
    old, new = weights(first, "best"), weights(out)
    assert torch.equal(new["blocks.0.attn.qkv.weight"], old["blocks.0.attn.qkv.weight"])
    assert new["pos_embed"].shape[1] == 37
    assert torch.equal(new["pos_embed"][:, 0], old["pos_embed"][:, 0])
    assert torch.equal(new["head.weight"][0], old["head.weight"][9])
    mean = old["head.weight"][1:].mean(0)
    torch.testing.assert_close(new["head.weight"][9], mean)


@pytest.mark.parametrize("kind", ["sparse", "soft", "hard", "token"])
def test_every_kind_of_distillation_trains_from_a_store_and_from_a_teacher(
    kind: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = arch_file(tmp_path, dist_token=kind == "token")
    store = cache / "store"
    if not store.exists():
        labels.build(
            "digits", epochs=2, out=store, teacher_epochs=1, img_size=32, proxy_images=200,
            threads=1, cache_dir=cache,
        )  # fmt: skip
    for name, source in (("store", ["--labels", str(store)]),
                         ("online", ["--teacher", "auto", "--teacher-epochs", "1"])):  # fmt: skip
        out = tmp_path / name
        assert train.main(flags(cache, arch, out, *source, "--distill", kind)) == 0, name
        assert float(rows(out)[-1]["train_loss"]) < 5
        if kind == "token":
            assert {"dist_token", "head_dist.weight"} <= weights(out).keys()
    capsys.readouterr()
    losses = []
    for how in ("logits", "softmax"):  # of one head both are the same
        again = ["--evaluate", str(tmp_path / "store"), "--data", "digits", "--proxy-images", "200",
                 "--cache-dir", str(cache), "--fusion", how, "--quiet", "--json"]  # fmt: skip
        assert train.main(again) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert (losses[0] == losses[1]) == (kind != "token")


def test_labels_of_mixed_images_teach_with_true_labels_mixed_alike(
    cache: Path, tmp_path: Path
) -> None:
    store = tmp_path / "mixed"
    labels.build(
        "digits", epochs=1, out=store, teacher_epochs=1, img_size=32, proxy_images=200, threads=1,
        cache_dir=cache, changes={"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    )  # fmt: skip
    found = []
    for alpha in ("0", "1"):
        out = tmp_path / alpha
        more = ["--labels", str(store), "--distill", "hard", "--set", f"distill_alpha={alpha}"]
        assert train.main(flags(cache, arch_file(tmp_path), out, *more)) == 0
        found.append(float(rows(out)[0]["train_loss"]))
    assert found[0] != found[1]


def test_a_resume_takes_machine_flags_only_and_needs_no_first_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.trainer.fit import _Loop

    arch, first, out = arch_file(tmp_path), tmp_path / "first", tmp_path / "out"
    assert train.main(flags(cache, arch, first, "--epochs", "1")) == 0
    take = _Loop._take

    def failing(self: Any, *args: Any) -> None:
        if args[-1] == 5:
            raise Stop
        take(self, *args)

    more = ["--init", str(first / "best.safetensors"), "--amp", "bf16", "--save-steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "_take", failing)
        with pytest.raises(Stop):
            train.main(flags(cache, arch, out, *more))
    (first / "best.safetensors").unlink()
    resume = ["--resume", str(out), "--cache-dir", str(cache), "--quiet"]
    for flag in (
        ["--epochs", "9"],
        ["--set", "lr=1"],
        ["--data", "fractals"],
        ["--no-pixel-cache"],
    ):
        assert train.main([*resume, *flag]) == 2
        assert "beside --resume" in capsys.readouterr().err
    assert json.loads((out / "train.json").read_text())["machine"]["amp"] == "bf16"
    assert train.main([*resume, "--amp", "none", "--accumulate", "2"]) == 0
    told = json.loads((out / "train.json").read_text())["machine"]
    assert (told["amp"], told["turns"], told["save_steps"]) == ("none", 2, 1)
    assert train.find_recipe(str(out / "train.json"), 1).epochs == 2


def test_two_processes_do_not_write_one_folder(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.trainer.folder import Folder

    out = tmp_path / "out"
    with Folder(out).held():
        assert train.main(flags(cache, arch_file(tmp_path), out)) == 2
    err = capsys.readouterr().err
    assert "no other process" in err
    assert err.count("\n") == 1
    assert train.main(flags(cache, arch_file(tmp_path), out)) == 0


@pytest.mark.parametrize(
    "damage",
    [
        {}, {"config": {}, "machine": {}}, {"config": {"recipe": {}}, "machine": {}},
        {"config": 3, "machine": {}},
    ],
)  # fmt: skip
def test_a_damaged_account_is_one_line(
    damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.json").write_text(json.dumps(damage))
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_is_evaluated_on_its_own_classes_and_size_only(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--evaluate", str(finished.folder), "--cache-dir", str(finished.cache), "--quiet"]
    assert train.main([*start, "--data", "digits", "--img-size", "48"]) == 2
    assert "the model's own 32" in capsys.readouterr().err
    assert train.main([*start, "--data", "fractals", "--proxy-images", "300"]) == 2
    assert "classes" in capsys.readouterr().err
    assert train.main(start) == 2
    assert "--data" in capsys.readouterr().err


def test_python_users_get_what_the_command_does(cache: Path, tmp_path: Path) -> None:
    result = train.train(
        str(arch_file(tmp_path)), "digits", tmp_path / "out", img_size=32, proxy_images=200,
        epochs=1, threads=1, cache_dir=cache, set=["lr=1e-4", "erase_prob=none"],
    )  # fmt: skip
    assert result["status"] == "finished"
    told = json.loads((tmp_path / "out" / "train.json").read_text())
    assert told["config"]["recipe"]["lr"] == 1e-4
    assert told["augment"]["erase_prob"] == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_in_half_precision_and_goes_on(cache: Path, tmp_path: Path) -> None:
    arch, out = arch_file(tmp_path), tmp_path / "out"
    more = ["--device", "cuda", "--amp", "fp16", "--save-steps", "2", "--set", "ema_decay=0.9"]
    assert train.main(flags(cache, arch, out, *more)) == 0
    (out / "result.json").unlink()
    assert train.main(["--resume", str(out), "--cache-dir", str(cache), "--quiet"]) == 0
    assert json.loads((out / "train.json").read_text())["machine"]["device"] == "cuda"


BAD: list[tuple[list[str], str]] = [
    (["--set", "weigth_decay=0.1"], "did you mean weight_decay?"),
    (["--recipe", "tinyvit-2k"], "did you mean tinyvit-1k?"),
    (["--recipe", "tinyvit-22k-distill"], "--labels STORE or --teacher NET"),
    (["--batch-size", "33", "--accumulate", "2"], "multiple of 2"),
    (["--resize", "bicubic"], "one of own, published, timm"),
    (["--amp", "fp16"], "a GPU"),
    (["--device", "tpu"], "cpu, cuda or cuda:N"),
    (["--workers", "-1"], "an integer >= 0"),
    (["--arch", "9B"], "--arch: got 9B"),
    (["--init", "nowhere.safetensors"], "an existing file"),
    (["--labels", "nowhere"], "nowhere"),
    (
        ["--distill", "token", "--teacher", "auto", "--teacher-epochs", "1"],
        "--distill: got token for a net without",
    ),
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


def test_weights_of_another_arch_and_labels_of_other_classes_are_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    assert train.main(flags(cache, arch_file(tmp_path), first, "--epochs", "1")) == 0
    wide = arch_file(tmp_path, embed_dim=64)
    more = ["--init", str(first / "best.safetensors")]
    assert train.main(flags(cache, wide, tmp_path / "a", *more)) == 2
    assert "weights of D64" in capsys.readouterr().err
    store = tmp_path / "store"
    labels.build(
        "fractals", epochs=1, out=store, teacher_epochs=1, img_size=32, proxy_images=300,
        threads=1, cache_dir=cache,
    )  # fmt: skip
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
    assert "a multiple of 3, for 3 processes x 1 turns; 30 or 33" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    assert train.main(flags(cache, arch, tmp_path / "o")) == 2
    assert "start with torchrun" in capsys.readouterr().err


def test_data_that_changed_under_a_training_is_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train.main(flags(cache, arch_file(tmp_path), out, "--save-steps", "1")) == 0
    (out / "result.json").unlink()
    told = json.loads((out / "train.json").read_text())
    told["config"]["proxy_images"] = 150
    (out / "train.json").write_text(json.dumps(told))
    assert train.main(["--resume", str(out), "--cache-dir", str(cache), "--quiet"]) == 2
    assert "of other settings (data" in capsys.readouterr().err


def test_a_plan_prints_every_value_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--arch", "21M", "--data", "digits", "--recipe", "tinyvit-1k", "--plan"]
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    assert "drop_path=0.2" in said
    assert "peak 0.001, least 1e-05, first 1e-06" in said
    assert os.listdir(tmp_path) == []


def test_a_runs_winner_trained_on_is_exported_and_read_back(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas import export

    out = tmp_path / "out"
    init = ["--init", str(finished.folder / "best.safetensors")]
    assert train.main(flags(finished.cache, finished.folder, out, *init)) == 0
    assert export.main([str(out), "--to", "timm", "--out", str(tmp_path / "hub"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["difference"] == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Trained on `digits`" in card
    assert "recipe small" in card
    # The run itself names a training that its flags allow.
    from nas.report import next_commands

    said = next(c for c in next_commands(finished.folder) if "nas.train" in c).split()[3:]
    planned = train.make_config(train.build_parser().parse_args(said))
    assert planned.init == str(finished.folder / "best.safetensors")
    # What was exported teaches.
    taught = tmp_path / "taught"
    more = ["--teacher", str(tmp_path / "hub"), "--distill", "hard"]
    assert train.main(flags(finished.cache, arch_file(tmp_path), taught, *more)) == 0
