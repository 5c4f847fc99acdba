"""One loader for every flag: each form of a network works there, or is refused in one line with the reason."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.throughput.networks import find_nets
from nas.export.__main__ import main as export
from nas.export.load import find_network
from nas.export.state_dict import load_state
from nas.export.teacher_net import build_teacher_net
from nas.export.weights import State, first_mismatch, weights_digest
from nas.inherit.slice import load_initial_weights, load_seed_weights
from nas.transfer.backbone import open_backbone
from space import Context, get_family
from space.errors import InputError
from tests.test_nas_export import CLASSES, CTX, TINY, VIT, write_run

TINYVIT = get_family("tinyvit")
FIVE = TINYVIT.seed("5M")


def microsoft_names(state: State) -> State:
    """Write a state dict under the names of TinyViT's authors (github.com/microsoft/Cream/TinyViT/models)."""
    found = {}
    for key, tensor in state.items():
        name = key.replace(".conv.weight", ".c.weight")
        name = re.sub(r"^patch_embed\.conv([12])", lambda m: f"patch_embed.seq.{(int(m[1]) - 1) * 2}", name)
        name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        name = re.sub(r"^stages\.", "layers.", name)
        found[name.replace("head.norm.", "norm_head.").replace("head.fc.", "head.")] = tensor
        if key.endswith("attention_biases"):
            count = tensor.shape[1]
            found[name.replace("attention_biases", "attention_bias_idxs")] = torch.zeros(count, count, dtype=torch.long)
    return found


def timm_checkpoint(path: Path, state: State, **args: Any) -> Path:
    """Save what timm's training script saves (timm.utils.CheckpointSaver), with averaged weights that differ."""
    usual = {"num_classes": None, "img_size": None, "input_size": None, "mean": None, "std": None, "crop_pct": None}
    settings = argparse.Namespace(**{**usual, "interpolation": "", "model_kwargs": {}, "opt": "adamw", **args})
    averaged = {k: v.clone() for k, v in state.items()}
    worse = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}
    content = {"epoch": 3, "arch": settings.model, "state_dict": worse, "optimizer": optimizer, "version": 2}
    torch.save({**content, "args": settings, "state_dict_ema": averaged, "metric": 71.5}, path)
    return path


class Forms:
    """A file or folder of each form; all but `microsoft` hold the network of `run`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = write_run(root / "run", "tinyvit", TINY)
        self.state = load_file(self.run / "best.safetensors")
        self.training = shutil.copytree(self.run, root / "training")
        (self.training / "run.json").rename(self.training / "train.json")
        self.hub = root / "hub"
        assert export([str(self.run), "--to", "timm", "--out", str(self.hub)]) == 0
        _, kwargs = TINYVIT.timm_call(TINYVIT.arch(TINY), CTX)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("num_classes", "in_chans", "drop_path_rate")}
        told = {"model": "tiny_vit_5m_224", "num_classes": 3, "img_size": 48, "model_kwargs": kwargs}
        self.timm = timm_checkpoint(root / "model_best.pth.tar", self.state, **told)
        torch.manual_seed(2)
        self.five = TINYVIT.build(FIVE, Context(224, 7)).state_dict()
        self.microsoft = root / "tiny_vit_5m_22k_distill.pth"
        torch.save({"model": microsoft_names(self.five)}, self.microsoft)

    def of(self, form: str) -> tuple[Path, State, Any, Context]:
        """Return a form with the weights, arch and context that it stands for."""
        path = {"best.json": self.run / "best.json", "weights": self.run / "best.safetensors"}.get(form)
        if form == "microsoft":
            return self.microsoft, self.five, FIVE, Context(224, 7)
        return path or getattr(self, form), self.state, TINYVIT.arch(TINY), CTX


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(tmp_path_factory.mktemp("forms"))


FORMS = ("run", "training", "best.json", "weights", "hub", "timm", "microsoft")
Check = Callable[[Path, State, Any, Context, Path], None]


def names(path: Path, ctx: Context) -> tuple[str, ...]:
    """Return the class names that a form carries, or some where it has none."""
    return find_network(path, "--init").classes or tuple(f"class {number}" for number in range(ctx.num_classes))


def seed_weights(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    made_in, rows, note = load_seed_weights(TINYVIT, arch, ctx, str(path), out / "w.safetensors", names(path, ctx))
    assert made_in == ctx
    assert rows == tuple(range(ctx.num_classes))
    assert weights_digest(load_file(out / "w.safetensors")) == weights_digest(state)
    assert ("averaged weights (state_dict_ema) are taken" in note) == path.name.endswith(".pth.tar")


def init(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    model = TINYVIT.build(arch, ctx)
    load_initial_weights(model, TINYVIT, arch, ctx, str(path), names(path, ctx), resize="own", head_map=None)
    assert weights_digest(model.state_dict()) == weights_digest(state)


def arch_flag(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    family, found = find_network(path, "--arch").arch()
    assert Path(find_network(path, "--arch").origin).exists()
    assert family.name == "tinyvit"
    assert family.key(found, ctx) == family.key(arch, ctx)


def teacher(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    source = find_network(path, "--teacher").teacher()
    assert (source.num_classes, source.input_size) == (ctx.num_classes, ctx.img_size)
    assert weights_digest(build_teacher_net(source, ctx.num_classes).state_dict()) == weights_digest(state)


def evaluate_or_export(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    saved = find_network(path, "--evaluate").saved()
    assert saved.context == ctx
    assert weights_digest(saved.build().state_dict()) == weights_digest(state)


def export_flag(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    assert export([str(path), "--to", "timm", "--out", str(out / "model")]) == 0
    again = find_network(out / "model", "SOURCE")
    assert weights_digest(again.weights()) == weights_digest(state)
    assert again.classes == find_network(path, "SOURCE").classes
    card = (out / "model" / "README.md").read_text("utf-8")
    named = again.classes is not None
    assert (out / "model" / "class_map.txt").is_file() == ("class_map.txt" in card) == ("label_names" in card) == named


def transfer(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    found = open_backbone(path, None, out)
    assert found.img_size == ctx.img_size
    assert weights_digest(found.classifier(None).state_dict()) == weights_digest(state)


def throughput(path: Path, state: State, arch: Any, ctx: Context, out: Path) -> None:
    (net,) = find_nets([str(path)], TINYVIT)
    assert net.family is not None
    assert net.key(ctx) == TINYVIT.key(arch, ctx)
    assert net.counts(ctx) == {"params": TINYVIT.count_params(arch, ctx), "macs": TINYVIT.count_macs(arch, ctx)}


FLAGS: dict[str, Check] = {
    **{"--seed-weights": seed_weights, "--init": init, "--arch": arch_flag, "--teacher": teacher},
    **{"--evaluate": evaluate_or_export, "nas.export": export_flag, "nas.transfer": transfer},
    "benchmarks.throughput": throughput,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flag", FLAGS)
def test_every_form_serves_every_flag(forms: Forms, flag: str, form: str, tmp_path: Path) -> None:
    if (flag, form) == ("benchmarks.throughput", "run"):
        pytest.skip("a run's folder stands for its Pareto set there (tests/test_benchmarks_throughput.py)")
    path, state, arch, ctx = forms.of(form)
    FLAGS[flag](path, state, arch, ctx, tmp_path)


@pytest.mark.parametrize(
    ("form", "classes"), [(form, None if form in ("timm", "microsoft") else tuple(CLASSES)) for form in FORMS]
)
def test_classes_are_those_that_the_form_carries(forms: Forms, form: str, classes: tuple[str, ...] | None) -> None:
    assert find_network(forms.of(form)[0], "--init").classes == classes


def test_a_folder_of_timms_training_is_its_best_checkpoint(forms: Forms, tmp_path: Path) -> None:
    for name in ("last.pth.tar", "model_best.pth.tar"):
        shutil.copy(forms.timm, tmp_path / name)
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "last.pth.tar")
    named = find_network(tmp_path, "--init")
    assert weights_digest(named.weights()) == weights_digest(forms.state)
    assert weights_digest(find_network(tmp_path, "--evaluate").saved().build().state_dict()) == weights_digest(
        forms.state
    )


def test_the_head_of_21841_classes_is_replaced_and_said(tmp_path: Path) -> None:
    arch, there, here = TINYVIT.arch(TINY), Context(48, 21_841), CTX
    state = TINYVIT.build(arch, there).state_dict()
    torch.save({"model": microsoft_names(state)}, tmp_path / "m.pth")
    model = TINYVIT.build(arch, here)
    source, classes = str(tmp_path / "m.pth"), ("a", "b", "c")
    note = load_initial_weights(model, TINYVIT, arch, here, source, classes, resize="own", head_map=None)
    assert "a new head (21841 -> 3 classes)" in note
    assert "the TinyViT authors' names" in note
    assert torch.equal(
        model.state_dict()["stages.3.blocks.0.mlp.fc1.weight"], state["stages.3.blocks.0.mlp.fc1.weight"]
    )


def test_deits_own_checkpoint_and_a_folder_of_transformers(forms: Forms, tmp_path: Path) -> None:
    """DeiT's `input_size` is a number; transformers puts `timm_model.` before each name."""
    family = get_family("vit")
    state = family.build(family.seed("deit_tiny"), Context(224, 4)).state_dict()
    args = argparse.Namespace(model="deit_tiny_patch16_224", input_size=224, nb_classes=4, output_dir=Path("out"))
    torch.save({"model": state, "epoch": 3, "scaler": {}, "args": args}, tmp_path / "best.pth")
    assert find_network(tmp_path / "best.pth", "--evaluate").saved().context == Context(224, 4)
    hub = shutil.copytree(forms.hub, tmp_path / "hub")
    save_file({f"timm_model.{key}": value for key, value in forms.state.items()}, hub / "model.safetensors")
    assert weights_digest(find_network(hub, "--evaluate").saved().build().state_dict()) == weights_digest(forms.state)


def test_a_vit_keeps_its_heads_its_patches_and_its_token(tmp_path: Path) -> None:
    family = get_family("vit")
    for arch_dict in (VIT, {**VIT, "dist_token": False, "head_dim": 16, "patch_size": 8}):
        arch = family.arch(arch_dict)
        out = tmp_path / f"{family.key(arch, CTX)}"
        run = write_run(out.with_suffix(".run"), "vit", arch_dict)
        assert export([str(run), "--to", "timm", "--out", str(out)]) == 0
        assert find_network(out, "--arch").arch() == (family, arch)


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


class CfgNode(dict):  # type: ignore[type-arg]
    """As yacs's: a dictionary with attributes."""

    __module__ = "yacs.config"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__dict__["__immutable__"] = True


@pytest.mark.parametrize("key", ["args", "config", "metric", "output"])
def test_settings_beside_the_weights_are_read_without_running_anything(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    import numpy as np

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    state = {"a.weight": torch.ones(2)}
    beside: Any = {
        "args": argparse.Namespace(lr=0.1, output=Path("x")),
        "config": CfgNode({"MODEL": CfgNode({"NAME": "tiny_vit_5m"})}),
        "metric": np.float64(71.5),
        "output": Path("x"),
    }[key]
    torch.save({"model": state, key: beside}, tmp_path / "c.pth")
    monkeypatch.setitem(sys.modules, "yacs.config", None)
    assert load_state(tmp_path / "c.pth", "--init").state.keys() == state.keys()


@pytest.mark.parametrize("wrapped", ["args", "model"])
def test_any_other_object_is_refused_and_never_runs(
    tmp_path: Path, wrapped: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}
    if wrapped == "args":
        content["args"] = argparse.Namespace(x=Harmful())
    else:
        content["model"] = Harmful()  # type: ignore[assignment]
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="tensors only"):
        find_network(tmp_path / "bad.pth", "--init").weights()
    assert "never" not in capsys.readouterr().out


def refusal(path: Path, flag: str) -> str:
    with pytest.raises(InputError) as caught:
        FLAGS[flag](path, {}, TINYVIT.arch(TINY), CTX, path.parent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("flag", ["--arch", "--teacher", "--evaluate", "nas.transfer", "benchmarks.throughput"])
def test_weights_of_no_known_arch_are_refused_where_the_arch_is_asked(forms: Forms, tmp_path: Path, flag: str) -> None:
    save_file(forms.state, tmp_path / "bare.safetensors")
    assert re.search("no published arch|MODEL:FILE", refusal(tmp_path / "bare.safetensors", flag))


@pytest.mark.parametrize("flag", ["--arch", "--evaluate", "nas.transfer", "benchmarks.throughput"])
def test_a_checkpoint_of_another_kind_of_net_is_refused_by_its_name(tmp_path: Path, flag: str) -> None:
    import timm

    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    path = timm_checkpoint(tmp_path / "r.pth.tar", state, model="resnet10t")
    assert "timm's resnet10t" in refusal(path, flag)
    source = find_network(path, "--teacher").teacher()
    assert weights_digest(build_teacher_net(source, 3).state_dict()) == weights_digest(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model_args"].update(num_heads=[1, 1, 1, 2]), "one head dim"),
        (lambda c: c["model_args"].update(depths=[1, 1, 2, 1]), "missing"),
        (lambda c: c["model_args"].update(use_rope=True), "with use_rope"),
        (lambda c: c["model_args"].update(embed_dims="wide"), "arguments that cannot be"),
        (lambda c: c["model_args"].update(num_heads=[0, 0, 0, 0]), "arguments that cannot be"),
        (lambda c: c["model_args"].update(num_heads=2), "num_heads [2], want 4 of them"),
        (lambda c: c["model_args"].update(window_sizes=[2]), "window_sizes"),
        (lambda c: c.update(model_args=3), "its arguments by name"),
        (lambda c: c["pretrained_cfg"].update(interpolation="lanczos"), "interpolation"),
        (lambda c: c["pretrained_cfg"].update(input_size="wide"), "config.json"),
        (lambda c: c.update(architecture="resnet18"), "timm's resnet18"),
        (lambda c: c.update(label_names=["a", "b"]), "2 label_names"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    forms: Forms, tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    hub = shutil.copytree(forms.hub, tmp_path / "hub")
    config = json.loads((hub / "config.json").read_text())
    change(config)
    (hub / "config.json").write_text(json.dumps(config))
    assert words in refusal(hub, "--evaluate")


@pytest.mark.parametrize("args", [{"img_size": "48"}, {"in_chans": "rgb"}, {"mean": "grey"}, {"model_kwargs": [1]}])
def test_settings_of_a_training_that_cannot_be_are_refused(forms: Forms, tmp_path: Path, args: dict[str, Any]) -> None:
    path = timm_checkpoint(tmp_path / "c.pth.tar", forms.state, **{"model": "tiny_vit_5m_224", **args})
    refusal(path, "--evaluate")


def test_names_of_the_authors_come_back_whole(forms: Forms) -> None:
    assert first_mismatch(forms.five, load_state(forms.microsoft, "--init").state) == ""
