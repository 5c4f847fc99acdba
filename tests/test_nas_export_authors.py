"""Checkpoints as the authors of TinyViT, DeiT and Swin and other programs write them; no code of a file ever runs."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from yacs.config import CfgNode

from nas.export.load import find_network
from nas.export.state_dict import load_state
from nas.export.teacher_net import build_teacher_net
from nas.export.weights import State, weights_digest
from space import Context, get_family
from space.errors import InputError
from tests.test_nas_export_forms import microsoft_names

STATE: State = {"stem.weight": torch.arange(4.0), "head.weight": torch.ones(3, 2)}


def training(state: State, **more: Any) -> dict[str, Any]:
    """Return what a training keeps beside its weights: optimizer, schedule, scaler, epoch."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}
    schedule = {"base_values": [0.1], "warmup_steps": [1e-5], "t_in_epochs": False}
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
    found = {"model": state, "optimizer": optimizer, "lr_scheduler": schedule, "scaler": scaler, "epoch": 89}
    return {**found, "max_accuracy": 84.8, **more}


def tinyvit_config() -> CfgNode:
    """Return a part of Cream's TinyViT/config.py, as its main.py saves it."""
    config = CfgNode()
    config.BASE, config.OUTPUT = [""], "output/tiny_vit_21m"
    config.MODEL = CfgNode()
    config.MODEL.TYPE, config.MODEL.NUM_CLASSES = "tiny_vit", 21_841
    config.MODEL.TINY_VIT = CfgNode()
    config.MODEL.TINY_VIT.EMBED_DIMS = [96, 192, 384, 576]
    config.AUG = CfgNode({"MEAN": [0.485, 0.456, 0.406], "REPROB": 0.25})
    config.freeze()
    return config


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_tinyvits_own_training_checkpoint(tmp_path: Path) -> None:
    """`config` is yacs's, a head has 21,841 rows, and bias tables have their indices beside them."""
    family = get_family("tinyvit")
    arch, ctx = family.seed("5M"), Context(224, 21_841)
    state = family.build(arch, ctx).state_dict()
    path = saved(tmp_path / "ckpt_epoch_89.pth", training(microsoft_names(state), config=tinyvit_config()))
    named = find_network(path, "--seed-weights")
    assert weights_digest(named.weights()) == weights_digest(state)
    assert named.arch()[1] == arch
    assert named.classes is None
    assert "the TinyViT authors' names" in named.notes[0]
    beside = find_network(f"tiny_vit_5m_224:{path}", "--teacher").teacher()
    assert beside.num_classes == 21_841


def test_deits_own_checkpoint_takes_its_averaged_weights_and_says_so(tmp_path: Path) -> None:
    family = get_family("vit")
    state = family.build(family.seed("deit_tiny"), Context(224, 4)).state_dict()
    worse = {key: value + 1 for key, value in state.items()}
    args = argparse.Namespace(model="deit_tiny_patch16_224", input_size=224, nb_classes=4, output_dir=Path("out"))
    content = training(worse, model_ema={f"module.{k}": v for k, v in state.items()}, args=args)
    named = find_network(saved(tmp_path / "checkpoint.pth", content), "--evaluate")
    assert named.saved().context == Context(224, 4)
    assert weights_digest(named.weights()) == weights_digest(state)
    assert "averaged weights (model_ema) are taken, not its model" in named.notes[0]


def test_swins_own_checkpoint_is_read_by_timms_rule(tmp_path: Path) -> None:
    """Its downsampling ends a stage, its head is `head`, and it keeps masks and indices."""
    torch.manual_seed(0)
    net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5)
    state = net.state_dict()
    theirs: State = {}
    for key, value in state.items():
        name = key.replace("head.fc.", "head.")
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        theirs[name] = value
        if name.endswith("relative_position_bias_table"):
            theirs[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    path = saved(tmp_path / "swin.pth", training(theirs, config=tinyvit_config()))
    (tmp_path / "class_map.txt").write_text("a\nb\nc\nd\ne\n")
    named = find_network(f"swin_tiny_patch4_window7_224:{path}", "--teacher")
    source = named.teacher()
    assert named.classes == tuple("abcde")
    assert source.num_classes == 5
    assert weights_digest(build_teacher_net(source, 5).state_dict()) == weights_digest(state)
    assert "timm's rule" in named.notes[-1]


Wrap = Callable[[State], object]
WRAPS: dict[str, Wrap] = {
    "bare": lambda s: s,
    "ddp": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled in ddp": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "ddp in compile": lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    "pytorch's tutorial": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "wrapped twice": lambda s: {"state_dict": {"model": {f"module.{k}": v for k, v in s.items()}}},
    "deepspeed": lambda s: {"module": s, "global_steps": 3, "ds_config": {"a": 1}},
    "lightning": lambda s: {
        "state_dict": {**{f"model.{k}": v for k, v in s.items()}, "criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.4",
    },
    "thop": lambda s: {**s, "total_ops": torch.zeros(1), "stem.total_params": torch.zeros(1)},
    "one of them empty": lambda s: {"model": {}, "state_dict": s},
    "torchvision's average": lambda s: {
        "model": {k: v + 1 for k, v in s.items()},
        "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}},
    },
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_come_out_of_every_wrapper(wrap: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save(WRAPS[wrap](STATE), path, _use_new_zipfile_serialization=zipped)
    assert weights_digest(load_state(path, "--init").state) == weights_digest(STATE)


BESIDE: dict[str, Any] = {
    "args": argparse.Namespace(lr=0.1, out=PosixPath("x"), when=datetime.datetime(2026, 1, 1)),
    "config": tinyvit_config(),
    "metric": np.float64(71.5),
    "rng": np.arange(3),
    "drawn": ("MT19937", np.arange(4, dtype=np.uint32), 4, 0, 0.0),
}


@pytest.mark.parametrize("key", BESIDE)
def test_harmless_settings_beside_the_weights_pass_the_safe_reader(key: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pth", {"model": STATE, key: BESIDE[key]})
    assert load_state(path, "--init").state.keys() == STATE.keys()


def test_class_names_inside_a_checkpoint_are_its_names(tmp_path: Path) -> None:
    for key, value in (("classes", ["x", "y"]), ("class_to_idx", {"y": 1, "x": 0}), ("id2label", {1: "y", 0: "x"})):
        path = saved(tmp_path / f"{key}.pth", {"model": STATE, key: value})
        assert load_state(path, "--init").classes == ("x", "y")


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Harmful(), "with a print, want"),
        ({"model": torch.nn.Linear(2, 2)}, "with a torch.nn.modules.linear.Linear"),
        ({"model": STATE, "callbacks": [Harmful()]}, "save model.state_dict() alone"),
        ({"student": STATE, "teacher": STATE}, 'one under "state_dict" or "model"'),
    ],
)
def test_what_could_run_is_refused_by_its_name(
    content: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        load_state(saved(tmp_path / "bad.pth", content), "--init")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "never" not in capsys.readouterr().out


def test_torchscript_is_refused_as_what_it_is(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "net.pt"))
    with pytest.raises(InputError, match="a TorchScript program"):
        load_state(tmp_path / "net.pt", "--init")


def test_a_cut_file_is_refused_and_json_beside_weights_may_be_names_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pth", {"model": STATE})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="a whole, readable weights file"):
        load_state(path, "--init")
    saved(tmp_path / "d.pth", {"model": STATE})
    (tmp_path / "d.json").write_text(json.dumps(["x", "y", "z"]))
    assert find_network(tmp_path / "d.pth", "--init").classes == ("x", "y", "z")
