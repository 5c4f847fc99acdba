"""What we export, where people load it: timm's validation, transformers' pipeline, ONNX Runtime on image files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nas.core.io import file_sha256
from nas.data import Dataset, DataSpec, prepare
from nas.data.augment.spec import preset_spec
from nas.data.augment.timm_engine import eval_batch
from nas.data.augment.views import outputs
from nas.export.__main__ import main
from nas.export.load import find_network
from nas.export.onnx import OPSET, RECIPE, opsets
from nas.export.save import preprocessing_of
from nas.train.__main__ import main as train
from tests.test_nas_export import TINY, VIT, alone, write_run

NAMES = ("1", "10", "2")
"""In the toolkit's order; timm sorts them 1, 2, 10."""


def picture(rng: np.random.Generator, at: int) -> Image.Image:
    """A smooth picture of an odd size, in one of the modes that folders hold."""
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((71 + 13 * at % 60, 50 + 17 * at % 90), Image.Resampling.BICUBIC)
    return image.convert(("RGB", "L", "RGBA", "P")[at % 4])


class Case:
    """A folder of images, the toolkit's data set of it, and a run with weights that tell the images apart."""

    def __init__(self, root: Path, family: str) -> None:
        rng = np.random.default_rng(3)
        self.images = root / "images"
        for side, each in (("train", 3), ("val", 8)):
            for name in NAMES:
                (self.images / side / name).mkdir(parents=True)
                for at in range(each):
                    picture(rng, at).save(self.images / side / name / f"{name}-{at}.{('png', 'tif', 'webp')[at % 3]}")
        self.dataset: Dataset = prepare(DataSpec(str(self.images), img_size=48), root / "cache")
        assert self.dataset.classes == NAMES
        seen = preprocessing_of(self.dataset)
        self.run = write_run(root / "run", family, TINY if family == "tinyvit" else VIT, NAMES, seen)
        self._tell_apart()

    def _tell_apart(self) -> None:
        """Make logits spread over images, and attention biases count."""
        path = self.run / "best.safetensors"
        network = find_network(self.run, "MODEL").saved().build()
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if name.endswith("attention_biases"):
                    tensor.normal_(0, 2, generator=generator)
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            network.train()(eval_batch(self.dataset.test.pixels[:], preset_spec("default", self.dataset)))
        state = network.state_dict()
        save_file(state, path)
        logits = self._raw()
        scale = 3 / logits.std(0).mean()
        for head in ("head.fc", "head", "head_dist"):
            if f"{head}.weight" in state:
                state[f"{head}.weight"] *= scale
                state[f"{head}.bias"] = (state[f"{head}.bias"] - logits.mean(0)) * scale
        save_file(state, path)
        self._raw()

    def _raw(self) -> torch.Tensor:
        told = json.loads((self.run / "best.json").read_text())
        told["sha256"] = file_sha256(self.run / "best.safetensors")
        (self.run / "best.json").write_text(json.dumps(told))
        self.logits = self.of_toolkit()
        return torch.stack(list(self.logits.values()))

    def of_toolkit(self) -> dict[str, torch.Tensor]:
        """The toolkit's own logits of the test images, by file."""
        split, network = self.dataset.test, find_network(self.run, "MODEL").saved().build()
        found = torch.zeros(len(split), len(NAMES))
        for rows, logits in outputs(network, split, preset_spec("default", self.dataset), device="cpu"):
            found[torch.from_numpy(rows)] = logits
        return {Path(str(name)).name: row for name, row in zip(split.names, found, strict=True)}

    def check(self, found: dict[str, torch.Tensor], share: float = 1e-4) -> None:
        """Check logits, the class of each image that is not a tie, and the accuracy that follows."""
        assert found.keys() == self.logits.keys()
        for name, row in self.logits.items():
            best, second = row.topk(2).values
            assert torch.allclose(found[name], row, atol=share * float(row.abs().max()))
            assert found[name].argmax() == row.argmax() or best - second < 1e-3
        assert len({int(row.argmax()) for row in self.logits.values()}) > 1


@pytest.fixture(scope="module", params=["tinyvit", pytest.param("vit", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("consumers"), request.param)


@pytest.fixture(scope="module")
def folder(case: Case) -> Path:
    out = case.run.parent / "model"
    assert main([str(case.run), "--to", "timm", "--out", str(out)]) == 0
    return out


def validated(case: Case, folder: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return files, logits and classes by the method of timm's validate.py, on its own reader."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    root, names = str(case.images / "val"), str(folder / "class_map.txt")
    data = timm.data.create_dataset("", root=root, split="validation", class_map=names, input_key=".png;.tif;.webp")
    loader = timm.data.create_loader(
        data,
        input_size=config["input_size"],
        batch_size=5,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )
    with torch.no_grad():
        both = [(model(x), y) for x, y in loader]
    logits, truth = (torch.cat(part) for part in zip(*both, strict=True))
    return [str(name) for name in data.filenames(basename=True)], logits, truth


def test_timms_validation_sees_the_same_classes_inputs_and_accuracy(case: Case, folder: Path) -> None:
    assert f"--class-map {folder.name}/class_map.txt" in (folder / "README.md").read_text("utf-8")
    files, logits, truth = validated(case, folder)
    case.check(dict(zip(files, logits, strict=True)))
    assert [NAMES[y] for y in truth.tolist()] == [name.split("-")[0] for name in files]


@pytest.mark.parametrize("odd", ["two\nlines", " blank", "=x, 'y' \"z\" Ärger"])
def test_a_class_map_has_names_that_timm_reads_back_or_is_not_there(odd: str, tmp_path: Path) -> None:
    names = (odd, "None", "10")
    run = write_run(tmp_path / "run", "tinyvit", TINY, names)
    out = tmp_path / "model"
    assert main([str(run), "--to", "timm", "--out", str(out)]) == 0
    assert tuple(json.loads((out / "config.json").read_text())["label_names"]) == names
    found = out / "class_map.txt"
    assert found.is_file() == (odd.strip() == odd and odd.isprintable())
    if found.is_file():
        read = timm.data.readers.class_map.load_class_map(str(found))
        assert read == {name: at for at, name in enumerate(names)}
    assert ("rename these classes" in (out / "README.md").read_text("utf-8")) != found.is_file()


def evaluated(
    case: Case, model: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any], str]:
    data = ["--data", str(case.images), "--cache-dir", str(case.images.parent / "cache")]
    status = train(["--evaluate", str(model), *data, "--split", "test", "--json", *more])
    told = capsys.readouterr()
    return status, json.loads(told.out.splitlines()[-1]) if status == 0 else {}, told.err


@pytest.mark.parametrize("mean", [None, [0.5, 0.4, 0.3]])
def test_evaluation_of_an_exported_folder_normalises_as_the_folder_says(
    case: Case, folder: Path, tmp_path: Path, mean: list[float] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if mean is not None:
        edit(copy, lambda config: config["pretrained_cfg"].update(mean=mean, std=[0.3, 0.2, 0.1]))
    _, logits, truth = validated(case, copy)
    status, found, _ = evaluated(case, copy, capsys)
    assert status == 0
    assert found["n"] == len(truth)
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == truth).float().mean()), abs=1e-6)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, truth)), rel=1e-4)


def test_classes_without_names_are_taken_in_order_and_said_or_refused(
    case: Case, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy, lambda config: config.pop("label_names"))
    assert find_network(copy, "MODEL").classes == NAMES, "class_map.txt"
    (copy / "class_map.txt").unlink()
    status, _, told = evaluated(case, copy, capsys)
    assert status == 2
    assert "timm counts 1, 2, 10" in told
    assert told.count("\n") == 1 or told.splitlines()[-1].startswith("error: --evaluate: got ")
    two = shutil.copytree(case.images, tmp_path / "images")
    for old, new in (("1", "a"), ("10", "b"), ("2", "c")):
        for side in ("train", "val"):
            (two / side / old).rename(two / side / new)
    assert train(["--evaluate", str(copy), "--data", str(two), "--cache-dir", str(tmp_path), "--split", "test"]) == 0
    assert "taken in the order a, b, c" in "".join(capsys.readouterr())


def test_transformers_is_given_each_argument_once_and_the_names_of_the_classes(folder: Path) -> None:
    """Its wrapper calls `timm.create_model(architecture, num_classes=len(label_names), **model_args)`."""
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == len(NAMES)
    assert tuple(config["label_names"]) == NAMES
    assert "num_classes" not in config["model_args"]
    model = timm.create_model(config["architecture"], num_classes=3, **config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))


def test_transformers_pipeline_names_the_class_that_we_name(case: Case, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("image-classification", model=str(folder))
    found = {}
    for path in sorted((case.images / "val").rglob("*-*")):
        told = {each["label"]: each["score"] for each in pipeline(str(path), top_k=3)}
        found[path.name] = torch.tensor([told[name] for name in NAMES])
    for name, row in case.logits.items():
        assert torch.allclose(found[name], row.softmax(0), atol=1e-4)


def test_metadata_claims_no_other_models_origin(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    told = config["pretrained_cfg"]
    claims = {"tag", "license", "url", "hf_hub_id", "origin_url", "paper_ids", "paper_name", "description", "notes"}
    assert not claims & (told.keys() | config.keys())
    card = (folder / "README.md").read_text("utf-8")
    assert "license" not in card
    assert "in22k" not in json.dumps(config) + card


def test_the_onnx_file_alone_names_the_class_that_we_name(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    flags = ["--to", "onnx", "--out", str(out), "--no-measure", "--opset", str(opsets()[0])]
    assert main([str(case.run), *flags]) == 0
    assert opset_of(out) == opsets()[0]
    about = onnx_metadata(out)
    told = preprocessing_of(case.dataset)
    assert tuple(json.loads(about["classes"])) == NAMES
    assert json.loads(about["img_size"]) == 48
    assert about["interpolation"] == told["interpolation"]
    for name in ("mean", "std", "crop_pct"):
        assert json.loads(about[name]) == told[name]
    assert json.loads(about["resize"]) == case.dataset.store_size == math.floor(48 / told["crop_pct"])
    assert json.loads(about["params"]) == find_network(case.run, "MODEL").saved().record["params"]
    assert about["version"]
    code = RECIPE.format(file=out).replace('"photo.jpg"', "path")
    body = "".join(f"    {line}\n" for line in code.splitlines())
    files = sorted(str(path) for path in (case.images / "val").rglob("*-*"))
    script = f"import sys\nsys.modules['torch'] = sys.modules['timm'] = None\nfor path in {files!r}:\n{body}"
    named = alone(script, cwd=tmp_path).split()
    for path, name in zip(files, named, strict=True):
        row = case.logits[Path(path).name]
        best, second = row.topk(2).values
        assert name == NAMES[int(row.argmax())] or best - second < 1e-3
    assert len(RECIPE.strip().splitlines()) == 4  # the imports, and three lines


def onnx_metadata(path: Path) -> dict[str, str]:
    return {each.key: each.value for each in onnx.load(str(path), load_external_data=False).metadata_props}


def opset_of(path: Path) -> int:
    return next(each.version for each in onnx.load(str(path)).opset_import if each.domain == "")


@pytest.mark.slow
def test_the_highest_opset_and_the_default_are_the_written_ones(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    for opset, more in ((OPSET, []), (opsets()[-1], ["--opset", str(opsets()[-1])])):
        assert main([str(case.run), "--to", "onnx", "--out", str(out), "--no-measure", *more]) == 0
        assert opset_of(out) == opset


@pytest.mark.parametrize("beyond", ["below", "above", "zero", "negative"])
def test_other_opsets_are_refused_by_the_range(
    case: Case, tmp_path: Path, beyond: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served = opsets()
    opset = {"below": served[0] - 1, "above": served[-1] + 1, "zero": 0, "negative": -18}[beyond]
    flags = ["--to", "onnx", "--out", str(tmp_path / "net.onnx"), "--opset", str(opset)]
    assert main([str(case.run), *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"--opset: got {opset}" in told
    assert f"{served[0]} to {served[-1]}" in told
    assert not (tmp_path / "net.onnx").exists()


def test_an_opset_is_of_onnx_alone(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(case.run), "--to", "timm", "--out", str(tmp_path / "m"), "--opset", "18"]) == 2
    assert "--opset: got with --to timm" in capsys.readouterr().err


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_class_names_are_those_that_each_form_carries(case: Case, folder: Path, tmp_path: Path) -> None:
    def classes(name: Path | str) -> tuple[str, ...] | None:
        return find_network(name, "MODEL").classes

    for named in (case.run, case.run / "best.json", case.run / "best.safetensors", folder):
        assert classes(named) == NAMES
    save_file(load_file(case.run / "best.safetensors"), tmp_path / "bare.safetensors")
    (tmp_path / "arch.json").write_text(json.dumps({"family": "tinyvit", "arch": TINY}))
    for bare in (tmp_path / "bare.safetensors", tmp_path / "arch.json", "5M", "auto", f"resnet18:{tmp_path}/x.pth"):
        assert classes(bare) is None
    edit(folder, lambda config: config.update(label_names={str(i): n for i, n in enumerate(NAMES)}))
    assert classes(folder) == NAMES
    edit(folder, lambda config: config["pretrained_cfg"].update(label_names=config.pop("label_names")))
    assert classes(folder) == ("1", "10", "2")
