"""`nas.train`: what it leaves, how it learns, and from whom."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from nas.core.io import read_json
from nas.data import Dataset
from nas.train import __main__ as train
from nas.train.train_flags import make_config, read_flags, read_values
from space.errors import InputError
from tests.conftest import Finished
from tests.train_cases import arch_file, evaluation, flags, resume, rows, sets, toy_store, trained, weights


def test_a_training_leaves_models_log_curve_and_board(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = [*sets(ema_decay=0.9, ema_warmup="true"), "--keep-every", "1", "--json"]
    assert train.main(flags(cache, arch_file(tmp_path), out, *more)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == read_json(out / "result.json", "a training's result")
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
    assert resume(cache, out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == result
    # Its best model, evaluated again from its files, is what was told.
    table = tmp_path / "classes.csv"
    assert train.main(evaluation(out, cache, "--out", str(table))) == 0
    tested = json.loads(capsys.readouterr().out)
    assert tested["top1"] == result["test_top1"]
    assert tested["n"] == result["test_n"]
    by_class = list(csv.DictReader(table.read_text().splitlines()))
    hits = sum(int(r["n"]) * float(r["top1"]) for r in by_class)
    assert hits / tested["n"] == pytest.approx(tested["top1"], abs=1e-5)
    assert table.read_text() == (out / "test_classes.csv").read_text()


def test_the_same_whole_batch_gives_the_same_curve(finished: Finished, tmp_path: Path) -> None:
    # TinyViT whose batch norms are frozen: nothing depends on who sees what together.
    init = ["--init", str(finished.folder / "best.safetensors")]
    more = [*init, *sets(bn="eval", layer_decay=0.8, lr=3e-4)]
    found = []
    for turns in ("1", "2", "4"):
        turned = [*more, "--accumulate", turns]
        found.append(rows(trained(finished.cache, tmp_path / turns, *turned, arch=finished.folder)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            for name in ("train_loss", "holdout_loss"):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-4), name


def test_averaged_weights_follow_the_formula(cache: Path, tmp_path: Path) -> None:
    from nas.train.fit import _Loop

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

    more = sets(ema_decay=0.6, ema_warmup="true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Loop, "_take", watched)
        trained(cache, tmp_path / "o", *more)
    assert len(trace) > 4


def test_what_is_not_a_number_is_wrong_and_ties_are_not(digits: Dataset) -> None:
    from nas.data.augment.spec import default_spec
    from nas.train.evaluate import evaluate

    def constant(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda inputs: torch.full((len(inputs), 10), value)

    spec = default_spec(digits)
    for value, top1 in ((float("nan"), 0.0), (0.0, 1.0)):
        found = evaluate(constant(value), digits.test, spec, num_classes=10)
        assert found.summary()["top1"] == top1


def test_less_memory_and_mixed_precision_change_no_more_than_they_must(cache: Path, tmp_path: Path) -> None:
    options: dict[str, list[str]] = {"plain": [], "light": ["--grad-checkpointing"], "half": ["--amp", "bf16"]}
    plain, light, half = (trained(cache, tmp_path / name, *more) for name, more in options.items())
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(light)[key], value, rtol=1e-4, atol=1e-5)
    assert weights(half)["head.weight"].dtype == torch.float32
    for a, b in zip(rows(plain), rows(half), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=0.02)
        assert a["train_loss"] != b["train_loss"]


@pytest.mark.slow
def test_a_compiled_net_learns_alike_and_leaves_plain_weights(cache: Path, tmp_path: Path) -> None:
    plain, fast = (trained(cache, tmp_path / name, *more) for name, more in (("plain", []), ("fast", ["--compile"])))
    assert weights(fast).keys() == weights(plain).keys()
    for a, b in zip(rows(plain), rows(fast), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)


@pytest.mark.parametrize("how", ["own", "published", "timm"])
def test_weights_of_another_size_and_other_classes_are_taken_over(how: str, cache: Path, tmp_path: Path) -> None:
    first = trained(cache, tmp_path / "first", "--epochs", "1")
    (tmp_path / "map.txt").write_text("\n".join(str(n) for n in [9, 8, 7, 6, 5, 4, 3, 2, 1, -1]))
    init = ["--img-size", "48", "--init", str(first / "best.safetensors"), "--resize", how]
    more = [*init, "--head-map", str(tmp_path / "map.txt")]
    more += sets(lr=0, min_lr=0, warmup_lr=0, weight_decay=0)
    old, new = weights(first, "best"), weights(trained(cache, tmp_path / "out", *more))
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
    store = toy_store(tmp_path / "labels", cache)
    for name, source in (
        ("store", ["--labels", str(store)]),
        ("online", ["--teacher", "auto", "--teacher-epochs", "1"]),
    ):
        out = trained(cache, tmp_path / name, *source, "--distill", kind, arch=arch)
        assert float(rows(out)[-1]["train_loss"]) < 5
        if kind == "token":
            assert {"dist_token", "head_dist.weight"} <= weights(out).keys()
    capsys.readouterr()
    losses = []
    for how in ("logits", "softmax"):  # of one head both are the same
        model = tmp_path / "store"
        assert train.main(evaluation(model, cache, "--fusion", how)) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert (losses[0] == losses[1]) == (kind != "token")


def test_labels_of_mixed_images_teach_with_true_labels_mixed_alike(cache: Path, tmp_path: Path) -> None:
    changes = {"mixup": 0.8, "cutmix": 1.0}
    store = toy_store(tmp_path / "mixed", cache, **changes)
    found = []
    for alpha in ("0", "1"):
        more = ["--labels", str(store), "--distill", "hard", "--set", f"distill_alpha={alpha}"]
        found.append(float(rows(trained(cache, tmp_path / alpha, *more))[0]["train_loss"]))
    assert found[0] != found[1]


def test_a_model_is_evaluated_on_its_own_size_only(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--evaluate", str(finished.folder), "--cache-dir", str(finished.cache), "--quiet"]
    assert train.main([*start, "--data", "digits", "--img-size", "48"]) == 2
    assert "the model's own 32" in capsys.readouterr().err
    assert train.main(start) == 2
    assert "--data" in capsys.readouterr().err


def test_python_users_get_what_the_command_does(cache: Path, tmp_path: Path) -> None:
    result = train.train(
        str(arch_file(tmp_path)),
        "digits",
        tmp_path / "out",
        img_size=32,
        max_images=200,
        epochs=1,
        threads=1,
        cache_dir=cache,
        set=["lr=1e-4", "erase_prob=none"],
        hflip=0,
    )
    assert result["status"] == "finished"
    told = json.loads((tmp_path / "out" / "train.json").read_text())
    assert told["config"]["recipe"]["lr"] == 1e-4
    assert (told["augment"]["erase_prob"], told["augment"]["hflip"]) == (0.0, 0.0)


def test_a_flag_given_from_python_is_what_the_command_line_reads() -> None:
    words = "--hflip 0 --crop-scale 0.5,0.9 --crop-ratio 1 --erase 0.2 --set lr=1 --workers 0 --no-pixel-cache"
    want = read_flags([*words.split(), "--no-compile", "--json", "--random-seed", "0"])
    values: dict[str, Any] = {"hflip": 0, "crop_scale": (0.5, 0.9), "crop_ratio": 1, "erase": 0.2, "set": ["lr=1"]}
    values |= {"workers": 0, "pixel_cache": False, "compile": False, "json": True, "random_seed": 0, "epochs": None}
    assert read_values(**values) == want
    assert read_values(erase_prob=0.2).given == {"erase_prob"}
    for name, value, said in (("epoch", 3, "epoch: got 3, want one of arch"), ("epochs", 2.5, "want an integer")):
        with pytest.raises(InputError, match=said):
            read_values(**{name: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_in_half_precision_and_goes_on(cache: Path, tmp_path: Path) -> None:
    more = ["--device", "cuda", "--amp", "fp16", "--save-steps", "2", "--set", "ema_decay=0.9"]
    out = trained(cache, tmp_path / "out", *more)
    (out / "result.json").unlink()
    assert resume(cache, out) == 0
    assert json.loads((out / "train.json").read_text())["machine"]["device"] == "cuda"


def test_a_plan_prints_every_value_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "21M", "--data", "digits", "--recipe", "tinyvit-1k", "--plan"]
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    assert "drop_path=0.2" in said
    assert "peak 0.001, least 1e-05, first 1e-06" in said
    assert os.listdir(tmp_path) == []


def test_a_runs_winner_trained_on_is_exported_and_read_back(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.export import __main__ as export

    init = ["--init", str(finished.folder / "best.safetensors")]
    out = trained(finished.cache, tmp_path / "out", *init, arch=finished.folder)
    assert export.main([str(out), "--to", "timm", "--out", str(tmp_path / "hub"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["difference"] == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Trained on `digits`" in card
    assert "recipe small" in card
    # The run itself names a training that its flags allow.
    from nas.report import next_commands

    said = next(c for c in next_commands(finished.folder) if "nas.train" in c).split()[3:]
    planned = make_config(read_flags(said))
    assert planned.init == str(finished.folder / "best.safetensors")
    # What was exported teaches.
    trained(finished.cache, tmp_path / "taught", "--teacher", str(tmp_path / "hub"), "--distill", "hard")
