"""A model out of a run: three forms, each loaded back without this toolkit; what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from nas.core.io import file_sha256
from nas.export.__main__ import main
from nas.export.hub import USAGE
from nas.export.load import (
    AutoTeacher,
    CheckpointFile,
    HubFolder,
    InlineArch,
    ModelAndFile,
    ModelName,
    NamedNetwork,
    SavedNetwork,
    WeightsFolder,
    find_network,
)
from nas.export.save import model_json
from nas.export.teacher_net import build_teacher_net
from nas.export.weights import load_weights, weights_digest
from space import Context, get_family
from space.errors import InputError
from tests.train_cases import TINY
from tests.train_cases import VIT as SMALL_VIT

CTX = Context(48, 3)
VIT: dict[str, Any] = {**SMALL_VIT, "embed_dim": 64, "head_dim": 32}
VIT |= {"patch_size": 16, "dist_token": True}
CLASSES = ["cat", "dög", "a|b"]
PREPROCESSING = {"crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def write_run(
    folder: Path,
    family_name: str,
    arch_dict: dict[str, Any],
    classes: Sequence[str] = CLASSES,
    preprocessing: Mapping[str, Any] = PREPROCESSING,
) -> Path:
    """A run's folder, as far as an export reads it, with weights that are nobody's defaults."""
    family = get_family(family_name)
    arch = family.arch(arch_dict)
    torch.manual_seed(1)
    model = family.build(arch, CTX)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                tensor.uniform_(-0.5, 0.5)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    folder.mkdir()
    save_file(model.state_dict(), folder / "best.safetensors")
    values = {
        "sha256": file_sha256(folder / "best.safetensors"),
        "score": {"soft_loss": 0.5, "holdout_top1": 0.8, "test_top1": 0.9, "test_top1_se": 0.01, "test_n": 359},
        "throughput": {
            **{"images_per_s": 1234.5, "images_per_s_lo": 1200.0, "images_per_s_hi": 1300.0, "ratio": 2.5},
            **{"runtime": "eager", "dtype": "float32", "batch": 16},
            **{"threads": 2, "device": "cpu", "fingerprint": "abc"},
        },
        "preprocessing": preprocessing,
    }
    record = model_json(family, arch, CTX, classes=classes, **values)  # type: ignore[arg-type]
    (folder / "best.json").write_text(json.dumps(record))
    data = {"seed": "21M", "target_params": 5_000_000, "data": "/data/pets"}
    config = {**data, "strategy": "contraction", "random_seed": 7}
    (folder / "run.json").write_text(json.dumps({"schema": 1, "config": config}))
    return folder


@pytest.fixture(scope="module", params=["tinyvit", pytest.param("vit", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = TINY if request.param == "tinyvit" else VIT
    return write_run(tmp_path_factory.mktemp("export") / "run", request.param, arch)


def agrees(run: Path, said: str, share: float) -> None:
    """Check the logits of one image and of all, as a lone process printed them."""
    one, more = (torch.tensor(rows) for rows in json.loads(said))
    want = logits_of(run, images(len(more)))
    near = share * float(want.abs().max())
    assert torch.allclose(more, want, atol=near)
    assert torch.allclose(one, want[:1], atol=near)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(5))


def logits_of(run: Path, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(find_network(run, "MODEL").saved().build()(x))


def alone(script: str, *arguments: str, cwd: Path) -> str:
    """Run a script in a process that must not import this toolkit."""
    guard = "import sys\nsys.modules['nas'] = sys.modules['space'] = None\n"
    done = subprocess.run([sys.executable, "-c", guard + script, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_timm_alone_loads_the_folder_and_says_the_same(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--to", "timm", "--out", str(tmp_path / "model")]) == 0
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "class_map.txt",
        "README.md",
    }
    torch.save(images(), tmp_path / "x.pt")
    said = alone(
        "import json, timm, torch\n"
        "m = timm.create_model('local-dir:model', pretrained=True).eval()\n"
        "x = torch.load('x.pt', weights_only=True)\n"
        "c = timm.data.resolve_model_data_config(m)\n"
        "with torch.no_grad(): print(json.dumps([m(x).tolist(), c]))",
        cwd=tmp_path,
    )
    found, config = json.loads(said)
    assert torch.allclose(torch.tensor(found), logits_of(run, images()), atol=1e-6)
    assert config["input_size"] == [3, 48, 48]
    assert (config["mean"], config["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bicubic")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    scores = ["test top-1: 90.0% +- 1.0% on 359 images", "1234.5 images/s [1200.0, 1300.0]", "2.50 times the seed's"]
    for words in (*scores, "`pets`", "seed 21M", "random seed 7"):
        assert words in card
    assert "/data" not in card


def test_the_five_lines_of_the_card_name_the_class_of_a_picture(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert main([str(run), "--to", "timm", "--out", str(folder)]) == 0
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    card = (folder / "README.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert code == USAGE.format(folder="model", white=65535).removeprefix("```python\n").removesuffix("```")
    said = alone(code, cwd=tmp_path).strip()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        best = model(transform(Image.open(tmp_path / "photo.jpg"))[None]).argmax().item()
    assert said == CLASSES[int(best)]


def test_the_folder_is_a_backbone_with_four_maps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    assert main([str(run), "--to", "timm", "--out", str(tmp_path / "model")]) == 0
    net = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True)
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    assert net.feature_info.channels() == TINY["embed_dims"]
    with torch.no_grad():
        maps = net.eval()(torch.randn(2, 3, 48, 48))
    sides = (-(-48 // r) for r in (4, 8, 16, 32))
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(TINY["embed_dims"], sides, strict=True)]
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "strides: [4, 8, 16, 32]; channels: [32, 32, 64, 64]" in card


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_onnx_runtime_alone_runs_any_number_of_images(
    run: Path, tmp_path: Path, fused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.onnx"
    more = ["--fused"] if fused else []
    assert main([str(run), "--to", "onnx", "--out", str(out), "--json", "--batch", "2", *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["difference"] <= 1e-4
    assert ("folded" in told) == fused
    pace = told["throughput"]
    assert 0 < pace["images_per_s_lo"] <= pace["images_per_s"] <= pace["images_per_s_hi"]
    np.save(tmp_path / "x.npy", images(5).numpy())
    said = alone(
        "import sys, json\nsys.modules['torch'] = None\n"
        "import numpy as np, onnxruntime as ort\n"
        "s = ort.InferenceSession('net.onnx', providers=['CPUExecutionProvider'])\n"
        "x = np.load('x.npy')\n"
        "print(json.dumps([s.run(None, {'images': x[:n]})[0].tolist() for n in (1, 5)]))",
        cwd=tmp_path,
    )
    agrees(run, said, 1e-4)


def test_torch_alone_runs_the_program(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    assert main([str(run), "--to", "torch", "--out", str(out), "--fused"]) == 0
    torch.save(images(4), tmp_path / "x.pt")
    said = alone(
        "import json, torch\nsys.modules['timm'] = None\n"
        "net = torch.export.load('net.pt2').module()\n"
        "x = torch.load('x.pt', weights_only=True)\n"
        "print(json.dumps([net(x[:n]).tolist() for n in (1, 4)]))",
        cwd=tmp_path,
    )
    agrees(run, said, 2e-5)


def test_a_model_of_the_family_and_bare_weights_are_sources_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    (run / "models").mkdir()
    for suffix in ("json", "safetensors"):
        shutil.copy(run / f"best.{suffix}", run / "models" / f"01-5000.{suffix}")
    x = images(1)
    for source in ("best.json", "best.safetensors", "models/01-5000.json"):
        saved = find_network(run / source, "MODEL").saved()
        assert saved.run["config"]["seed"] == "21M"
        assert torch.equal(logits_of(run / source, x), logits_of(run, x))


def test_every_form_of_a_name_gives_what_it_holds(tmp_path: Path) -> None:
    """A run serves as arch, weights, teacher and model; what a form lacks is refused with those that have it."""
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    assert main([str(run), "--to", "timm", "--out", str(tmp_path / "hub")]) == 0
    want, arch = load_weights(run / "best.safetensors"), get_family("tinyvit").arch(TINY)
    shutil.copy(run / "best.safetensors", tmp_path / "weights.safetensors")
    forms: dict[str, tuple[type[NamedNetwork], str]] = {
        "auto": (AutoTeacher, "teacher"),
        json.dumps(TINY): (InlineArch, "arch"),
        str(run): (SavedNetwork, "arch weights teacher saved"),
        str(run / "best.json"): (SavedNetwork, "arch weights teacher saved"),
        str(run / "best.safetensors"): (CheckpointFile, "arch weights teacher saved"),
        str(tmp_path / "hub"): (HubFolder, "arch weights teacher saved"),
        str(tmp_path): (WeightsFolder, "weights"),
        str(tmp_path / "weights.safetensors"): (CheckpointFile, "weights"),
        f"test_vit:{tmp_path / 'weights.safetensors'}": (ModelAndFile, "weights"),
        "5M": (ModelName, "arch"),
    }
    for name, (form, holds) in forms.items():
        found = find_network(name, "--init")
        assert type(found) is form
        for what in ("arch", "weights", "teacher", "saved"):
            if what not in holds.split():
                with pytest.raises(InputError):
                    getattr(found, what)()
        if "weights" in holds:
            assert weights_digest(found.weights()) == weights_digest(want)
        if "teacher" in holds and form is not AutoTeacher:
            source = found.teacher()
            assert (source.num_classes, source.input_size, source.mean) == (3, 48, (0.5, 0.4, 0.3))
            logits = build_teacher_net(source, 3).eval()(images())
            assert torch.allclose(logits, logits_of(run, images()), atol=1e-5)
        if "arch" in holds and name != "5M":
            assert found.arch() == (get_family("tinyvit"), arch)
    with pytest.raises(InputError, match=r"auto, want .*a finished run.*hub layout.*; or a checkpoint"):
        find_network("auto", "--init").weights()


def edited(key: str, value: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        record = json.loads((run / "best.json").read_text())
        *above, last = key.split(".")
        reduce(lambda inner, name: inner[name], above, record)[last] = value
        (run / "best.json").write_text(json.dumps(record))

    return change


def flipped(run: Path) -> None:
    data = bytearray((run / "best.safetensors").read_bytes())
    data[-7] ^= 1
    (run / "best.safetensors").write_bytes(data)


OVERLAY = "timm.kwargs.pretrained_cfg_overlay"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: (run / "best.json").unlink(), "no best.json in it"),
        (lambda run: (run / "best.json").write_text("{"), "best.json"),
        (lambda run: (run / "best.json").write_text("[]"), "a JSON object"),
        (lambda run: (run / "best.safetensors").unlink(), "best.safetensors: got No such file"),
        (flipped, "it is damaged"),
        (edited("family", "resnet"), "--family: got resnet"),
        (edited("arch.depths", [1, 1, 0, 1]), "depths[2]: got 0"),
        (edited("classes", ["one"]), "a list of 3 names"),
        (edited("num_classes", 4), "a list of 4 names"),
        (edited(f"{OVERLAY}.mean", [0.5, "x", 0.5]), "mean"),
        (edited(f"{OVERLAY}.crop_pct", None), "crop_pct"),
        (edited(f"{OVERLAY}.crop_pct", float("inf")), "crop_pct"),
        (edited(f"{OVERLAY}.interpolation", "cubic; rm"), "interpolation"),
        (edited("timm.kwargs", {}), "no input size"),
        (edited("arch.head_dim", 16), "want the weights of best.json"),
    ],
)
def test_what_no_run_left_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], words: str
) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    change(run)
    assert main([str(run), "--to", "timm", "--out", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("value", [None, [], {"images_per_s": "fast"}, {"test_top1": 1}])
def test_a_card_is_written_of_whatever_is_told(tmp_path: Path, value: Any) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    for key in ("throughput", "score"):
        edited(key, value)(run)
    (run / "run.json").write_text(json.dumps({"config": value}))
    assert main([str(run), "--to", "timm", "--out", str(tmp_path / "model")]) == 0
    assert "3 classes" in (tmp_path / "model" / "README.md").read_text("utf-8")


def test_what_timm_is_called_with_comes_from_the_arch_not_from_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    want = logits_of(run, images(1))
    edited("timm.model", "resnet50")(run)
    edited("timm.kwargs.checkpoint_path", "/etc/passwd")(run)
    assert torch.equal(logits_of(run, images(1)), want)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "onnx", "--out", "net.bin"], "want a file that ends in .onnx"),
        (["--to", "torch", "--out", "net.pt"], "want a file that ends in .pt2"),
        (["--to", "timm", "--out", "full"], "it holds notes.txt"),
        (["--to", "timm", "--out", "no/such/place"], "a folder that exists"),
        (["--to", "timm", "--out", "model", "--fused"], "--fused"),
        (["--to", "onnx", "--out", "net.onnx", "--batch", "0"], "--batch: got 0"),
    ],
)
def test_places_and_flags_that_cannot_be_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.iterdir())
    assert main([str(run), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_an_earlier_export_is_replaced_whole_and_its_neighbours_left_alone(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", "tinyvit", TINY), tmp_path / "model"
    for name in ("model.old", "model.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    for _ in range(2):
        assert main([str(run), "--to", "timm", "--out", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.old", "model.part", "run"]
    assert (tmp_path / "model.old" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(("to", "name"), [("timm", "model"), ("torch", "net.pt2")])
def test_what_says_something_else_is_not_written_over_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str, name: str
) -> None:
    run, out = write_run(tmp_path / "run", "tinyvit", TINY), tmp_path / name
    arguments = [str(run), "--to", to, "--out", str(out)]
    assert main(arguments) == 0

    def contents() -> list[tuple[str, bytes]]:
        return [(str(p), p.read_bytes()) for p in sorted(tmp_path.rglob("*")) if p.is_file()]

    before = contents()
    again = f"nas.export.__main__._{'read_timm' if to == 'timm' else 'program'}"
    monkeypatch.setattr(again, lambda *_: lambda x: torch.zeros(len(x), 3))
    assert main(arguments) == 2
    assert "logits that differ by" in capsys.readouterr().err
    assert contents() == before


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    for place in ("/proc/model", str(tmp_path / "run" / "best.json" / "model")):
        assert main([str(run), "--to", "timm", "--out", place]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --out: got ")
        assert said.count("\n") == 1
    assert main([str(tmp_path / "nowhere"), "--to", "timm", "--out", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
