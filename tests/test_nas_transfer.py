"""Transfer checks: probes, masks and segmentation against naive versions; what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import balanced_accuracy_score, jaccard_score
from sklearn.tree import DecisionTreeClassifier
from test_nas_export import TINY, VIT, write_run
from torch import nn

from nas.data import DataSpec, prepare
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.timm_engine import eval_batch
from nas.export.__main__ import main as export
from nas.export.load import find_network
from nas.transfer import probes, segmentation
from nas.transfer.__main__ import TransferConfig, main, transfer
from nas.transfer.backbone import levels, open_backbone
from nas.transfer.probes import (
    NEIGHBOURS,
    TEMPERATURE,
    FeatureSet,
    features_of,
    knn_probe,
    linear_probe,
    neighbour_classes,
    pooled,
)
from nas.transfer.rows import bootstrapped, confusion, mean_iou, paired_bootstrap, pixel_accuracy
from nas.transfer.segmentation import KINDS, Scenes, maps_of, masked_images, segment, settings_of


@pytest.fixture(scope="module", params=["tinyvit", "vit"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = TINY if request.param == "tinyvit" else {**VIT, "dist_token": False}
    return write_run(tmp_path_factory.mktemp("transfer") / "run", request.param, arch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("tiny") / "run", "tinyvit", TINY)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segment few images."""
    monkeypatch.setattr(segmentation, "TRAIN_IMAGES", 24)
    monkeypatch.setattr(segmentation, "TEST_IMAGES", 12)


# -- probes ------------------------------------------------------------------------------------
def naive_knn(train: FeatureSet, query: Any, k: int, classes: int) -> int:
    """Walk over everything, one number at a time."""
    alike = []
    for row, label in zip(train.features.tolist(), train.labels.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(row, query, strict=True))
        norms = math.hypot(*row) * math.hypot(*query)
        alike.append((dot / norms, label))
    alike.sort(key=lambda pair: -pair[0])  # stable
    votes = [0.0] * classes
    for s, label in alike[:k]:
        votes[label] += math.exp(s / TEMPERATURE)
    return votes.index(max(votes))


@pytest.mark.parametrize("random_seed", range(4))
def test_neighbours_vote_as_in_a_naive_loop(random_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_BLOCK", 5)
    rng = np.random.default_rng(random_seed)
    classes, n, dim = int(rng.integers(2, 6)), int(rng.integers(5, 40)), int(rng.integers(2, 9))
    train = FeatureSet(rng.normal(size=(n, dim)).astype(np.float32), rng.integers(0, classes, n))
    queries = rng.normal(size=(17, dim)).astype(np.float32)
    ks = [1, 3, n]
    found = neighbour_classes(train, queries, ks, classes)
    for at, k in enumerate(ks):
        assert found[at].tolist() == [naive_knn(train, q, k, classes) for q in queries.tolist()]


def separable(random_seed: int, n: int) -> FeatureSet:
    """Four classes in corners, a scale for each feature."""
    rng = np.random.default_rng(random_seed)
    labels = np.arange(n) % 4
    corners = np.stack([labels % 2, labels // 2], 1) * 2.0 - 1
    features = np.concatenate([corners + rng.uniform(-0.4, 0.4, (n, 2)), rng.normal(size=(n, 2))], 1)
    return FeatureSet((features * [1e-3, 50, 1, 1]).astype(np.float32), labels)


def test_separable_features_are_probed_without_an_error() -> None:
    sides = separable(0, 80), separable(1, 40), separable(2, 60)
    assert linear_probe(*sides).right.all()
    constant = [np.c_[side.features, np.full(len(side.labels), 7.0)].astype(np.float32) for side in sides]
    two = [FeatureSet(features, side.labels % 2) for features, side in zip(constant, sides, strict=True)]
    assert linear_probe(*two).right.all()


def test_what_is_chosen_is_best_on_the_holdout_and_the_test_side_has_no_say() -> None:
    rng = np.random.default_rng(3)
    train, holdout, test = (
        FeatureSet(rng.normal(size=(n, 6)).astype(np.float32) + np.eye(3, 6)[labels] * 1.5, labels)
        for n in (60, 30, 30)
        for labels in [rng.integers(0, 3, n)]
    )
    ks = [k for k in NEIGHBOURS if k <= 60]
    on_holdout = neighbour_classes(train, holdout.features, ks, 3) == holdout.labels
    best = ks[int(on_holdout.mean(1).argmax())]
    other = FeatureSet(test.features, (test.labels + 1) % 3)
    for side in (test, other):
        assert knn_probe(train, holdout, side, 3).chosen == f"k={best}"
        said = neighbour_classes(train, side.features, [best], 3)[0]
        assert (knn_probe(train, holdout, side, 3).right == (said == side.labels)).all()
    assert linear_probe(train, holdout, test).chosen == linear_probe(train, holdout, other).chosen


# -- metrics -----------------------------------------------------------------------------------
def sklearns_iou(truth: Any, predicted: Any) -> float:
    """The mean over the classes that occur on either side."""
    return float(jaccard_score(truth.ravel(), predicted.ravel(), average="macro"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_overlap_is_scikit_learns(data: st.DataObject) -> None:
    classes, n, side = (data.draw(st.integers(1, hi)) for hi in (6, 3, 5))
    used = data.draw(st.integers(1, classes))  # the others are in no map at all
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    truth, said = rng.integers(0, used, (2, n, side, side)).astype(np.uint8)
    counts = confusion(truth, said, classes)
    assert counts.sum() == truth.size
    assert float(mean_iou(counts.sum(0))) == pytest.approx(sklearns_iou(truth, said))
    assert float(pixel_accuracy(counts.sum(0))) == pytest.approx(float((truth == said).mean()))
    for at in range(n):
        assert float(mean_iou(counts)[at]) == pytest.approx(sklearns_iou(truth[at], said[at]))


def test_bootstrap_errors_of_a_plain_mean_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (150, 6, 6)).astype(np.uint8)
    easy = rng.random((150, 1, 1)) ** 2
    said = np.where(rng.random(truth.shape) < easy, truth, 0).astype(np.uint8)
    counts = confusion(truth, said, 3)
    each = pixel_accuracy(counts)
    value, error = bootstrapped(pixel_accuracy, counts)
    assert value == pytest.approx(each.mean())
    assert error == pytest.approx(each.std(ddof=1) / math.sqrt(150), rel=0.1)
    assert paired_bootstrap(mean_iou, counts, counts) == (0, 0, 0)


# -- masks -------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 37, 48])
def test_images_and_masks_agree_and_every_class_occurs(size: int) -> None:
    found = masked_images(40, size, 5)
    assert (found.images.shape, found.masks.shape) == ((40, size, size, 3), (40, size, size))
    assert (found.images.dtype, found.masks.dtype) == (np.uint8, np.uint8)
    for start in range(40 - len(KINDS) + 2):
        seen = np.unique(found.masks[start : start + len(KINDS) - 1])
        assert set(range(1, len(KINDS))) <= set(seen.tolist()) <= set(range(len(KINDS)))
    assert 0 in found.masks


def test_an_image_follows_from_seed_role_and_number_alone() -> None:
    found, again = masked_images(12, 32, 1), masked_images(5, 32, 1)
    assert np.array_equal(found.images[:5], again.images)
    assert np.array_equal(found.masks[:5], again.masks)
    for other in (masked_images(5, 32, 2), masked_images(5, 32, 1, "test")):
        assert not (other.images == again.images).all((1, 2, 3)).any()
    assert len({image.tobytes() for image in found.images}) == 12


def test_no_threshold_on_colours_tells_the_classes_apart() -> None:
    fit, test = masked_images(150, 32, 0), masked_images(60, 32, 0, "test")
    tree = DecisionTreeClassifier(max_depth=10, class_weight="balanced", random_state=0)
    tree.fit(fit.images.reshape(-1, 3)[::3], fit.masks.ravel()[::3])
    found = balanced_accuracy_score(test.masks.ravel(), tree.predict(test.images.reshape(-1, 3)))
    assert found < 1.25 / len(KINDS)


# -- features ----------------------------------------------------------------------------------
def test_features_are_what_the_classifier_sees(run: Path, tmp_path: Path, cache: Path) -> None:
    dataset = prepare(DataSpec("digits", img_size=48), cache)
    backbone = open_backbone(run, None, tmp_path)
    net: Any = find_network(run, "MODEL").saved().build()
    spec = AugmentSpec(48, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert (backbone.img_size, backbone.mean, backbone.std) == (48, spec.mean, spec.std)
    side = dataset.holdout
    count = 45  # no multiple of a batch
    part = type(side)(side.keys[:count], side.labels[:count], np.asarray(side.pixels[:count]))
    ticks: list[float] = []
    found = features_of(backbone.classifier(None), part, spec, "cpu", ticks.append)
    with torch.no_grad():
        images = eval_batch(part.pixels, spec)
        want = net.forward_head(net.forward_features(images), pre_logits=True)
        logits = net.get_classifier()(torch.from_numpy(found.features))
        assert torch.allclose(logits, net(images), atol=1e-4)
    assert torch.allclose(torch.from_numpy(found.features), want, atol=1e-4)
    assert found.labels.tolist() == side.labels[:count].tolist()
    assert sum(ticks) == count


def test_maps_belong_to_the_weights_and_come_finest_first(run: Path, tmp_path: Path) -> None:
    backbone = open_backbone(run, None, tmp_path)
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for seed in (None, 3):
        net: Any = backbone.classifier(seed)
        with torch.no_grad():
            maps = maps_of(backbone.pyramid(seed), x)
            every = net.forward_intermediates(x, intermediates_only=True)
        assert [m.shape[-1] for m in maps] in ([12, 6, 3, 2], [3, 3])
        for ours, theirs in zip(maps, every, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=1, max_size=12).map(sorted))
def test_a_pyramid_has_the_deepest_map_of_each_stride(strides: list[int]) -> None:
    kept = levels(strides)
    assert list(kept) == sorted(set(kept))
    if len(set(strides)) == 1:
        assert kept == tuple(range(len(strides)))[-4:]
        return
    coarse = {s for s in strides if s >= 4} or set(strides)
    assert [strides[at] for at in kept] == sorted(coarse)
    assert all(at + 1 == len(strides) or strides[at + 1] != strides[at] for at in kept)


def test_fresh_weights_follow_from_the_seed_and_leave_the_generator_alone(tiny: Path, tmp_path: Path) -> None:
    backbone = open_backbone(tiny, None, tmp_path)
    before = torch.get_rng_state()
    one, same, other = (backbone.classifier(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["head.fc.weight"], other["head.fc.weight"])
    torch.manual_seed(0)
    name, kwargs = find_network(tiny, "MODEL").saved().timm_call
    plain = timm.create_model(name, **kwargs).state_dict()
    assert all(torch.equal(one[key], plain[key]) for key in plain)


def test_a_run_and_its_export_are_the_same_network_at_any_size(run: Path, tmp_path: Path) -> None:
    assert export([str(run), "--to", "timm", "--out", str(tmp_path / "hub")]) == 0
    for size in (None, 64, 96):
        nets = []
        for at, source in enumerate((run, tmp_path / "hub")):
            (tmp_path / f"{size}-{at}").mkdir()
            backbone = open_backbone(source, size, tmp_path / f"{size}-{at}")
            assert backbone.img_size == (size or 48)
            nets.append(backbone.classifier(None))
        x = torch.randn(2, 3, size or 48, size or 48)
        with torch.no_grad():
            assert torch.equal(pooled(nets[0], x), pooled(nets[1], x))


@pytest.mark.parametrize(
    ("name", "kwargs", "channels"),
    [
        ("resnet10t", {"channels": (16, 24, 32, 40), "stem_width": 8}, [16, 24, 32, 40]),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1)},
            [16, 32, 64, 128],
        ),
    ],
)
def test_any_network_of_timm_is_a_backbone(
    name: str, kwargs: dict[str, Any], channels: list[int], tmp_path: Path
) -> None:
    model = timm.create_model(name, num_classes=3, **kwargs)
    timm.models.save_for_hf(model, str(tmp_path), model_args=kwargs, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 64, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = open_backbone(tmp_path, None, tmp_path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = maps_of(backbone.pyramid(None), x)
        assert [tuple(m.shape[1:]) for m in maps] == [
            (c, 64 // s, 64 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
        ]
        found = pooled(backbone.classifier(None), x)
        assert torch.allclose(found, pooled(model.eval(), x), atol=1e-5)


# -- segmentation ------------------------------------------------------------------------------
class Shrunk(nn.Module):
    """A backbone that gives the image itself, at two strides, the coarse one first."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x * self.scale
        return [nn.functional.avg_pool2d(x, 4), nn.functional.avg_pool2d(x, 2)]


def painted(count: int, random_seed: int) -> Scenes:
    """Images of blocks whose colour is their class."""
    rng = np.random.default_rng(random_seed)
    masks = rng.integers(0, len(KINDS), (count, 4, 4)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    return Scenes(colours[masks].astype(np.uint8), masks)


@pytest.mark.parametrize("finetune", [False, True])
def test_a_head_learns_what_is_in_the_maps_and_frozen_is_frozen(
    finetune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = AugmentSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    sides = painted(96, 0), painted(20, 1)
    epochs = 2 if finetune else 10
    how = settings_of(epochs, finetune)
    found = []
    before = torch.get_rng_state()
    for most in (1 << 30, 0):  # maps from memory, and made anew
        monkeypatch.setattr(segmentation, "MOST_KEPT_BYTES", most)
        net, ticks = Shrunk(), [0.0]
        counts = segment(net, sides, spec, how, finetune=finetune, random_seed=0, device="cpu", tick=ticks.append)
        assert (net.scale.item() == 1) != finetune
        assert sum(ticks) == epochs * 96 + 20
        found.append(counts)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(found[0], found[1])
    assert found[0].sum((1, 2)).tolist() == [16 * 16] * 20
    if not finetune:  # the rate of fine-tuning is too low for a head alone, in so few steps
        assert mean_iou(found[0].sum(0)) > 0.8


# -- the command ------------------------------------------------------------------------------
def pictures(folder: Path, classes: int, each: int) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 99, (40, 40, 3), dtype=np.uint8)
            pixels[..., label] = 255
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return folder


def test_the_command_writes_what_it_prints(
    tiny: Path, tmp_path: Path, cache: Path, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "rows.csv", str(pictures(tmp_path / "mine", 3, 15))
    arguments = ["--data", data, "--epochs", "1", "--cache-dir", str(cache)]
    assert main([str(tiny), *arguments, "--out", str(out), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    rows = list(csv.DictReader(out.open()))
    names = [("probe", "top1"), ("knn", "top1"), ("segment", "mean_iou"), ("segment", "pixel_accuracy")]
    want = [(*name, model) for name in names for model in ("trained", "random")]
    assert [(r["check"], r["metric"], r["model"]) for r in rows] == want
    for row, said in zip(rows, told["rows"], strict=True):
        assert {k: "" if v is None else str(v) for k, v in said.items()} == row
        assert row["n"] == ("12" if row["check"] == "segment" else "9")
        assert 0 <= float(row["value"]) <= 1
        assert float(row["se"]) >= 0
        assert (row["difference"] == "") == (row["model"] == "random")
    for trained, random in zip(told["rows"][::2], told["rows"][1::2], strict=True):
        assert trained["difference"] == pytest.approx(trained["value"] - random["value"])
        assert trained["difference_lo"] <= trained["difference"] <= trained["difference_hi"]
        shown = next(i for i, x in enumerate(lines) if f" {trained['metric']} " in x and x.startswith(trained["check"]))
        assert f"{100 * trained['value']:.1f} +- {100 * trained['se']:.1f} %" in lines[shown]
    again = transfer(TransferConfig(tiny, data, epochs=1), cache)
    assert again["rows"] == told["rows"]
    assert again["seconds"].keys() == {"features", "probe", "knn", "segment"}
    assert told["rows"][0]["value"] == 1, "each class has a colour of its own"
    assert main([str(tiny), "--checks", "segment", "--epochs", "1", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_fresh_weights_gain_nothing_over_themselves(tmp_path: Path, cache: Path, few: None) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    name, kwargs = find_network(run, "MODEL").saved().timm_call
    torch.manual_seed(4)
    save_file(timm.create_model(name, **kwargs).state_dict(), run / "best.safetensors")
    told = json.loads((run / "best.json").read_text())
    told["sha256"] = hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()
    (run / "best.json").write_text(json.dumps(told))
    data = str(pictures(tmp_path / "mine", 3, 15))
    found = transfer(TransferConfig(run, data, random_seed=4, epochs=1, finetune=True), cache)
    for trained, random in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        assert trained["value"] == random["value"]
        assert trained["chosen"] == random["chosen"]
        assert trained["difference"] == 0
        assert trained["difference_lo"] <= 0 <= trained["difference_hi"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--checks", "segment"], "got nowhere"),
        (["empty", "--checks", "segment"], "the folder of a finished run"),
        (["RUN"], "--data: got nothing"),
        (["RUN", "--checks", "knn,probes"], "--checks: got probes"),
        (["RUN", "--checks", ""], "--checks: got"),
        (["RUN", "--checks", "knn", "--data", "missing"], "--data"),
        (["RUN", "--checks", "knn", "--data", "small"], "at least 3 of each class"),
        (["RUN", "--checks", "knn", "--data", "loose"], "images without classes"),
        (["RUN", "--checks", "knn", "--data", "one"], "one class"),
        (["RUN", "--checks", "segment", "--img-size", "8"], "--img-size: got 8"),
        (["VIT", "--checks", "segment", "--img-size", "50"], "a multiple of the patch size 16"),
        (["HUB", "--checks", "segment", "--img-size", "50"], "a multiple of the patch size 16"),
        (["RUN", "--checks", "segment", "--random-seed", "-1"], "--random-seed"),
        (["RUN", "--checks", "segment", "--epochs", "0"], "--epochs: got 0"),
        (["RUN", "--checks", "knn", "--data", "digits", "--epochs", "3"], "segment among"),
        (["RUN", "--checks", "knn", "--data", "digits", "--finetune"], "--finetune"),
        (["RUN", "--checks", "segment", "--device", "tpu"], "--device: got tpu"),
        (["RUN", "--checks", "segment", "--out", "rows.txt"], "ends in .csv"),
        (["RUN", "--checks", "segment", "--out", "no/rows.csv"], "a folder that exists"),
        (["bare", "--checks", "segment"], "no model.safetensors"),
        (["odd", "--checks", "segment"], "without sound preprocessing"),
        (["grey", "--checks", "segment"], "input of 1 channels"),
        (["other", "--checks", "segment"], "that timm loads"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_line(
    tiny: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source, *flags = arguments
    if source in ("VIT", "HUB"):
        run = write_run(tmp_path / "vit", "vit", VIT)
        if source == "HUB":
            assert export([str(run), "--to", "timm", "--out", "hub"]) == 0
            capsys.readouterr()
            run = tmp_path / "hub"
        source = str(run)
    pictures(tmp_path / "small", 2, 2)
    (pictures(tmp_path / "a", 1, 6) / "class0").rename(tmp_path / "loose")
    pictures(tmp_path / "one", 1, 8)
    (tmp_path / "empty").mkdir()
    cfg = {"input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    grey = {**cfg, "input_size": [1, 48, 48], "mean": [0.5], "std": [0.5]}
    for name, seen in (("bare", cfg), ("odd", {**cfg, "std": [0, 1, 1]}), ("grey", grey), ("other", cfg)):
        (tmp_path / name).mkdir()
        config = {"architecture": "resnet18", "pretrained_cfg": seen}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        if name != "bare":
            save_file({"nothing": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    place = str(tiny) if source == "RUN" else source
    assert main([place, *flags, "--cache-dir", str(cache)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1


def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "tinyvit", TINY)
    assert export([str(run), "--to", "timm", "--out", str(tmp_path / "hub")]) == 0
    path = tmp_path / "hub" / "model.safetensors"
    state = find_network(run, "MODEL").saved().build().state_dict()
    save_file({key: value * float("nan") if value.is_floating_point() else value for key, value in state.items()}, path)
    data = str(pictures(tmp_path / "mine", 2, 6))
    flags = ["--data", data, "--checks", "knn", "--cache-dir", str(cache)]
    capsys.readouterr()
    assert main([str(tmp_path / "hub"), *flags]) == 2
    assert "that are not finite" in capsys.readouterr().err
