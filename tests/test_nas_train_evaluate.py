"""`nas.train --evaluate` on folders: which images, which classes, and the same pictures as the exported snippet."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nas.data import Dataset, DataSpec, prepare
from nas.data.prepare import prepared
from nas.export.__main__ import main as export
from nas.train import evaluate
from nas.train.__main__ import main, read_flags
from tests.test_nas_data_layouts import lay
from tests.test_nas_export import VIT, write_run

CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", "vit", VIT, CLASSES)


def evaluated(model: Path, root: Path, *more: str) -> dict[str, object]:
    flags = ["--evaluate", str(model), "--data", str(root), "--cache-dir", str(root.parent / "cache"), "--quiet"]
    return evaluate.evaluate_model(read_flags([*flags, *more]))


def test_all_images_of_a_fresh_folder_are_evaluated_and_a_cap_is_a_flag(model: Path, tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "{a,b,c}*6")
    assert evaluated(model, root)["n"] == 18
    assert evaluated(model, root, "--max-test-images", "10")["n"] == 10
    assert evaluated(model, lay(tmp_path / "e", "train/{a,b,c}*6 test/{a,b,c}*2"))["n"] == 6


def test_the_folder_that_was_trained_on_is_cut_as_it_was_then(model: Path, tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "{a,b,c}*10")
    before = (model / "run.json").read_text()
    (model / "run.json").write_text(json.dumps({**json.loads(before), "config": {"data": str(root)}}))
    try:
        assert evaluated(model, root)["n"] == 6
        assert evaluated(model, lay(tmp_path / "e", "{a,b,c}*10"))["n"] == 30
    finally:
        (model / "run.json").write_text(before)


def test_some_of_the_classes_in_any_order_are_scored_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "classes.csv"
    found = evaluated(model, lay(tmp_path / "d", "{c,b}*5"), "--out", str(table))
    assert found["n"] == 10
    assert [line.split(",")[:2] for line in table.read_text().splitlines()[1:]] == [["b", "5"], ["c", "5"]]
    by_hand = evaluated(model, lay(tmp_path / "f", "{x,y}/{a,b}*3"), "--splits", "test=x")
    assert by_hand["n"] == 6
    start = ["--evaluate", str(model), "--cache-dir", str(tmp_path / "cache"), "--data"]
    assert main([*start, str(lay(tmp_path / "e", "{a,b,zebra}*3"))]) == 2
    assert "1 classes (zebra) that the model does not have" in capsys.readouterr().err


def grey(path: Path, top: int, kind: str) -> None:
    values = np.linspace(0, top, 60 * 50).reshape(50, 60)
    Image.fromarray(values.astype(np.uint16 if kind == "PNG" else np.int32)).save(path, kind)


@pytest.mark.parametrize("bits", [None, 12])
def test_the_card_reads_deep_and_turned_pictures_as_training_does(
    bits: int | None, model: Path, tmp_path: Path
) -> None:
    from nas.data.decode import as_rgb
    from nas.export.load import find_network
    from nas.export.onnx import metadata_of

    if bits is not None:  # as of a model whose training images were deep
        model = Path(shutil.copytree(model, tmp_path / "run"))
        record = json.loads((model / "best.json").read_text())
        (model / "best.json").write_text(json.dumps({**record, "grey_bits": bits}))
    assert export([str(model), "--to", "timm", "--out", str(tmp_path / "m")]) == 0
    for source in (model, tmp_path / "m"):
        saved = find_network(source, "MODEL").saved()
        assert saved.grey_bits == (bits or 16)
        assert metadata_of(saved)["white"] == str(2 ** (bits or 16) - 1)
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "m" / "README.md").read_text("utf-8"), re.DOTALL)[0]
    reading = [
        line for line in code.splitlines() if "model" not in line and "transform" not in line and "json." not in line
    ]
    reading[0] = "import numpy as np"
    for name, top in {
        "sixteen.png": 65535,
        "twelve.png": 4095,
        "eight.png": 200,
        "int.tif": 60_000,
        "wide.tif": 2**24,
    }.items():
        grey(tmp_path / name, top, "PNG" if name.endswith("png") else "TIFF")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((40, 60), 80).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    for path in [*tmp_path.glob("*.png"), *tmp_path.glob("*.tif"), *tmp_path.glob("*.jpg")]:
        scope: dict[str, object] = {}
        exec("\n".join(reading).replace('"photo.jpg"', repr(str(path))), scope)
        image = scope["image"]
        assert isinstance(image, Image.Image)
        with Image.open(path) as same:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(as_rgb(same, bits or 16))), path.name


@pytest.mark.parametrize(
    "config",
    [
        {"max_images": 20, "random_seed": 3, "effort": "smoke"},
        {"max_images": 800, "random_seed": 0, "effort": "smoke"},
        {"max_images": None, "random_seed": 1, "effort": "normal", "max_corrupt": 0.5},
        {"max_images": 24, "random_seed": 9, "data_seed": 3, "recipe": {}, "splits": "train=."},
        {"max_images": None, "random_seed": 9, "data_seed": 3, "recipe": {}},
    ],
)
def test_images_that_a_run_trained_on_are_never_its_test(
    model: Path, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings that decide the cut are the run's, unless a flag says otherwise."""
    root = lay(tmp_path / "d", "{a,b,c}*20")
    run = shutil.copytree(model, tmp_path / "run")
    told = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**told, "config": {"data": str(root), **config}}))
    seen: list[Dataset] = []
    monkeypatch.setattr(evaluate, "prepared", lambda *args: seen.append(prepared(*args)) or seen[-1])
    asked = {k: v for k, v in config.items() if k in ("max_images", "splits", "max_corrupt")}
    if "recipe" in config:
        asked["max_images"] = asked["max_images"] or 10**9
    seed = config.get("data_seed", config["random_seed"])
    own = prepare(DataSpec(str(root), img_size=48, random_seed=seed, **asked), tmp_path / "cache")
    for split in ("test", "holdout"):
        evaluated(run, root, "--split", split)
    assert [s.fingerprint for s in seen] == [own.fingerprint] * 2
    evaluated(run, root, "--max-images", "30", "--data-seed", "5")
    other = prepare(DataSpec(str(root), img_size=48, random_seed=5, **{**asked, "max_images": 30}), tmp_path / "cache")
    assert seen[-1].fingerprint == other.fingerprint != own.fingerprint
