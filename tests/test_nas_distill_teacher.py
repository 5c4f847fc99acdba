"""Teachers: made once, found again by what decides them, and true to their own preprocessing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from nas.core.dataclass_json import from_json, to_json
from nas.data import Dataset
from nas.data.augment.spec import default_spec
from nas.data.augment.timm_engine import eval_batch
from nas.distill import teacher as module
from nas.distill.teacher import make_teacher
from nas.export import load
from nas.export.load import find_network
from nas.export.teacher_net import TeacherInfo, TeacherNet, create_timm_model, load_teacher
from nas.export.weights import save_weights, weights_digest
from space.errors import InputError

SMALL = {"channels": (8, 8, 16, 16), "stem_width": 8}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "AUTO_KWARGS", SMALL)


def made(dataset: Dataset, cache: Path, text: str = "auto", **changes: Any) -> TeacherInfo:
    options = {"random_seed": 0, "epochs": 2, "device": "cpu", "threads": 1, **changes}
    return make_teacher(find_network(text, "--teacher"), dataset, cache, **options)


def small_resnet(classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net: nn.Module = timm.create_model("test_resnet", num_classes=classes)
    return net


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Stand in for timm's hub: test_resnet with seven classes, trained at 40 px, its own mean."""
    net = small_resnet(7)
    net.pretrained_cfg = {"input_size": (3, 40, 40), "mean": MEAN, "std": STD, "num_classes": 7}
    real = timm.create_model

    def create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return net if pretrained else real(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    return net


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_auto_is_made_once_and_found_again(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    before = torch.get_rng_state()
    info = made(dataset, tmp_path, tick=ticks.append)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert sum(ticks) == 2 * len(dataset.train)
    assert info.holdout_images == len(dataset.holdout)
    assert 0 <= info.holdout_top1 <= 1
    assert from_json(TeacherInfo, json.loads(json.dumps(to_json(info)))) == info
    monkeypatch.setattr(module, "train", None)  # a second training would fail
    ticks.clear()
    assert made(dataset, tmp_path, tick=ticks.append) == info
    assert sum(ticks) == 2 * len(dataset.train)
    logits = load_teacher(info)
    inputs = eval_batch(dataset.holdout.pixels[:], default_spec(dataset))
    right = (logits(inputs).argmax(1).numpy() == dataset.holdout.labels).mean()
    assert right == pytest.approx(info.holdout_top1)
    exact, mixed = logits(inputs), load_teacher(info, precision="bfloat16")(inputs)
    assert mixed.dtype == torch.float32, "logits of mixed precision become float32 first"
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.1)


def test_the_same_arguments_give_the_same_bytes_and_others_another_teacher(dataset: Dataset, tmp_path: Path) -> None:
    one, two = made(dataset, tmp_path / "a"), made(dataset, tmp_path / "b")
    assert files(Path(one.folder)) == files(Path(two.folder))
    assert one.digest != made(dataset, tmp_path / "a", random_seed=1).digest
    changes: list[dict[str, Any]] = [{"epochs": 1}, {"threads": 2}]
    folders = {one.folder} | {made(dataset, tmp_path / "a", **c).folder for c in changes}
    assert len(folders) == 3
    left = [p.name for p in (tmp_path / "a" / "teachers").iterdir() if not p.name.endswith(".lock")]
    assert sorted(left) == sorted(p.name for p in (tmp_path / "a" / "teachers").iterdir() if p.is_dir())


def test_a_killed_training_goes_on_to_the_same_bytes(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(dataset, tmp_path / "a")
    count = len(dataset.train)
    done = [0.0]

    def stop(images: float) -> None:
        done[0] += images
        if done[0] > count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(dataset, tmp_path / "b", tick=stop)
    again = made(dataset, tmp_path / "b")
    assert files(Path(again.folder)) == files(Path(whole.folder))


def test_damaged_weights_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    info = made(dataset, tmp_path, epochs=1)
    path = Path(info.folder) / "weights.safetensors"
    state = create_timm_model(info.model, info.kwargs, info.num_classes).state_dict()
    save_weights(path, state)
    with pytest.raises(InputError, match="other weights"):
        load_teacher(info)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="readable"):
        load_teacher(info)


def test_a_pretrained_head_is_kept_where_classes_agree(
    dataset: Dataset, tmp_path: Path, hub: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", None)
    seven = replace(dataset, classes=tuple("abcdefg"))
    info = made(seven, tmp_path, "test_resnet")
    assert info.digest == weights_digest(hub.state_dict())
    assert info.epochs == 0
    assert any("kept" in note for note in info.notes)
    assert any("40 px" in note for note in info.notes)
    # Undo the student's preprocessing and redo the teacher's: the same logits.
    pixels = dataset.holdout.pixels[:6]
    zero_one = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    own = (zero_one - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    own = functional.interpolate(own, size=(40, 40), mode="bicubic", antialias=True)
    with torch.no_grad():
        want = hub.eval()(own)
    got = load_teacher(info)(eval_batch(pixels, default_spec(dataset)))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_pretrained_net_of_other_classes_is_fine_tuned_first(
    dataset: Dataset, tmp_path: Path, hub: nn.Module
) -> None:
    before = weights_digest(hub.state_dict())
    info = made(dataset, tmp_path, "test_resnet", epochs=9)
    assert info.epochs == min(9, module.TUNE_SETTINGS.epochs)
    assert info.num_classes == 10
    assert any("fine-tuned" in note for note in info.notes)
    assert weights_digest(hub.state_dict()) == before, "the hub's own model is left as it was"
    assert load_teacher(info)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_checkpoints_in_files_and_folders(dataset: Dataset, tmp_path: Path) -> None:
    net = small_resnet(10)
    file = tmp_path / "w.safetensors"
    save_weights(file, net.state_dict())
    from_file = made(dataset, tmp_path, f"test_resnet:{file}")
    assert from_file.digest == weights_digest(net.state_dict())
    assert from_file.input_size is None
    folder = tmp_path / "hub"
    save_weights(folder / "model.safetensors", net.state_dict())
    config = {
        "architecture": "test_resnet",
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [3, 40, 40], "mean": MEAN, "std": STD},
    }
    (folder / "config.json").write_text(json.dumps(config))
    from_folder = made(dataset, tmp_path, str(folder))
    assert from_folder.digest == from_file.digest
    assert (from_folder.input_size, from_folder.mean) == (40, MEAN)
    assert from_folder.folder != from_file.folder, "the same weights behind other preprocessing"


def test_what_is_no_teacher_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    net = small_resnet(10)
    file = tmp_path / "w.safetensors"
    save_weights(file, net.state_dict())
    damaged = tmp_path / "hub"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    texts = ["resnet_of_nowhere", str(file), str(tmp_path), "test_resnet:missing.pth"]
    for text in (*texts, f"resnet10t:{file}", f"test_vit:{file}", str(damaged)):
        with pytest.raises(InputError) as caught:
            made(dataset, tmp_path, text)
        assert str(caught.value).startswith("--teacher: got "), text
        assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_refused_with_a_remedy(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError, match="network"):
        made(dataset, tmp_path, "resnet18.a1_in1k")


@pytest.mark.parametrize("size", [None, 32, 24])
def test_equal_preprocessing_is_passed_through(size: int | None) -> None:
    net = small_resnet(4).eval()
    inputs = torch.randn(2, 3, 32, 32)
    same = TeacherNet(net, (MEAN, STD), (MEAN, STD), size)
    with torch.no_grad():
        resized = functional.interpolate(inputs, (size, size), mode="bicubic", antialias=True) if size == 24 else inputs
        assert torch.equal(same(inputs), net(resized))
