"""Every part of an augmentation belongs to the user: set, switched off, kept, and never contradicted in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_cases import built
from PIL import Image

from nas.contract.checks import label_request, make_config, saved_config, teacher_settings
from nas.contract.flags import build_parser
from nas.core.augment_config import AugmentConfig, read_augment
from nas.core.config import RunConfig
from nas.core.settings import as_flags, parsed
from nas.data import Dataset, DataSpec, prepare
from nas.data.augment.mirror import flip_notes, mirror_notes
from nas.data.augment.spec import AugmentSpec, changed_spec, default_spec, preset_spec
from nas.data.augment.timm_engine import eval_batch
from nas.distill.teacher import teacher_spec
from nas.labels import __main__ as labels
from nas.labels.build import resolve_augment, stored_augment
from nas.train import __main__ as train
from nas.train.session import augment_spec
from nas.train.train_flags import make_config as train_config
from nas.train.train_flags import read_flags
from space.errors import InputError
from tests.train_cases import arch_file

ALL = {
    "hflip": ("0.25", {"hflip": 0.25}),
    "crop-scale": ("0.5,0.9", {"scale": (0.5, 0.9)}),
    "crop-ratio": ("2", {"ratio": (0.5, 2.0)}),
    "policy": ("rand-m3", {"policy": "rand-m3"}),
    "color-jitter": ("0.3", {"color_jitter": 0.3}),
    "erase": ("0.1", {"erase_prob": 0.1}),
    "mixup": ("0.4", {"mixup_alpha": 0.4}),
    "cutmix": ("0.6", {"cutmix_alpha": 0.6}),
}
OFF = {"hflip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "policy": None, "color_jitter": None}
OFF |= {"erase_prob": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
FIELD = {"crop-scale": "scale", "crop-ratio": "ratio", "erase": "erase_prob", "color-jitter": "color_jitter"}
FIELD |= {"mixup": "mixup_alpha", "cutmix": "cutmix_alpha", "hflip": "hflip", "policy": "policy"}


def arrows(folder: Path, images: int = 60, size: int = 24) -> Path:
    """Write noisy wedges that point left or right: a folder of two classes."""
    rng = np.random.default_rng(0)
    for number in range(images):
        pixels = rng.integers(0, 100, (size, size, 3)).astype(np.uint8)
        top, left = rng.integers(2, size - 14, 2)
        for at in range(12):
            pixels[top + 6 - (12 - at) // 2 : top + 6 + (12 - at) // 2, left + at] = rng.integers(180, 255)
        name = ("right", "left")[number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:, ::-1] if number % 2 else pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pointing(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = tmp_path_factory.mktemp("arrows")
    return prepare(DataSpec(str(arrows(place / "data", 400)), 24), place / "cache", lambda _: None)


def contract_spec(dataset: Dataset, *flags: str) -> AugmentSpec:
    words = ["--seed", "21M", "--target-params", "5M", *flags]
    config = make_config(parsed(RunConfig, vars(build_parser().parse_args(words))))
    # What run.json keeps is the same.
    assert saved_config(json.loads(json.dumps(config.to_dict()))) == config
    return resolve_augment(label_request(config, 1), dataset)


def training_spec(dataset: Dataset, *flags: str) -> AugmentSpec:
    given = read_flags(["--arch", "5M", "--data", "digits", "--plan", *flags])
    return augment_spec(train_config(given).recipe, dataset)


@pytest.mark.parametrize("flag", ALL)
def test_a_flag_decides_its_part_and_no_other(flag: str, dataset: Dataset) -> None:
    text, wanted = ALL[flag]
    for spec_of in (contract_spec, training_spec):
        usual = spec_of(dataset)
        mixing = flag in ("mixup", "cutmix") and spec_of is training_spec  # a training mixes by its recipe
        assert spec_of(dataset, f"--{flag}", text) == (usual if mixing else replace(usual, **wanted))
        off = spec_of(dataset, f"--{flag}", "none")
        assert getattr(off, FIELD[flag]) == OFF[FIELD[flag]]
        assert spec_of(dataset, f"--{flag}", "default") == usual


def test_all_parts_off_leave_the_image_as_it_is(dataset: Dataset) -> None:
    every = [word for flag in ALL for word in (f"--{flag}", "none")]
    for preset in ("22k", "1k", "batched"):
        found = contract_spec(dataset, "--augment", preset, *every)
        assert {name: getattr(found, name) for name in OFF} == OFF
        assert not found.mixes
    assert contract_spec(dataset, *every).text == "no random crop; never mirrored; no policy; no erasing"


def test_settings_are_written_again_as_flags(dataset: Dataset) -> None:
    words = [word for flag, (text, _) in ALL.items() for word in (f"--{flag}", text)]
    given = parsed(RunConfig, vars(build_parser().parse_args(words)))
    again = parsed(RunConfig, vars(build_parser().parse_args(as_flags(AugmentConfig, given, {}))))
    assert read_augment(again) == read_augment(given)
    assert as_flags(AugmentConfig, json.loads(json.dumps(given)), {}) == as_flags(AugmentConfig, given, {})
    assert as_flags(AugmentConfig, {"hflip": None, "data": "digits"}, {}) == []


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        *(("hflip", "1.5"), ("hflip", "often"), ("crop-scale", "0"), ("crop-scale", "0.9,0.5"), ("mixup", "-1")),
        *(("crop-scale", "0.1,0.2,0.3"), ("crop-ratio", "-1"), ("erase", "nan"), ("color-jitter", "2")),
    ],
)
def test_what_makes_no_sense_is_one_line(flag: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command, more in ((train, ["--arch", "5M", "--plan"]), (labels, ["build"])):
        if command is labels:
            more = ["build", "--data", "digits"]
            status = command.main([*more, f"--{flag}={text}"])
        else:
            status = command.main([*more, "--data", "digits", f"--{flag}={text}"])
        said = capsys.readouterr().err
        assert status == 2
        assert f"--{flag}" in said
        assert said.count("\n") == 1


def test_colours_that_timm_would_leave_out_are_refused(dataset: Dataset) -> None:
    photos = replace(dataset, name="photos")
    with pytest.raises(InputError, match="add --policy none"):
        changed_spec(default_spec(photos), AugmentConfig(color_jitter=0.4))
    changed_spec(default_spec(photos), AugmentConfig(color_jitter=0.4, policy="none"))
    changed_spec(preset_spec("batched", photos), AugmentConfig(color_jitter=0.2))
    # The teacher's own pipeline has a policy whatever that of the labels.
    assert teacher_spec(photos, AugmentConfig(color_jitter=0.2)).color_jitter is None


def test_a_teacher_follows_but_mixes_nothing(dataset: Dataset) -> None:
    settings = AugmentConfig(hflip=0.0, crop_scale=(0.9, 1.0), mixup=0.8)
    spec = teacher_spec(replace(dataset, hflip=True), settings)
    assert (spec.hflip, spec.scale, spec.mixes) == (0.0, (0.9, 1.0), False)
    config = make_config({"seed": "21M", "target_params": 10**6, "hflip": 0.0})
    assert teacher_settings(config)["augment"] == {"hflip": 0.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hflip": 0.5}, "--hflip"),
        ({"mixup": 0.0}, "--mixup"),
        ({"crop_scale": (0.1, 1.0)}, "--crop-scale"),
        ({"augment": "22k"}, "--augment"),
        ({"hflip": 0.0, "erase_prob": 0.0, "color_jitter": 0.0, "policy": "none"}, ""),
    ],
)
def test_stored_labels_keep_their_augmentation(
    settings: dict[str, Any], said: str, dataset: Dataset, tmp_path: Path
) -> None:
    store = built(tmp_path / "s", dataset, mixup=0.8)
    request = replace(label_request(make_config({"seed": "21M", "target_params": 10**6}), 1), **settings)
    if said:
        with pytest.raises(InputError, match=said):
            stored_augment(request, dataset, store.folder)
    else:
        assert stored_augment(request, dataset, store.folder) == store.spec.augment


def test_left_and_right_are_told_before_anything_is_trained(pointing: Dataset) -> None:
    spec = default_spec(pointing)
    (note,) = mirror_notes(pointing, spec)
    assert "--hflip 0" in note
    assert mirror_notes(pointing, replace(spec, hflip=0.0)) == []
    # Pictures that look alike in a mirror: the same, with labels that say nothing of a side.
    blind = replace(pointing.train, labels=np.arange(len(pointing.train)) % 2)
    held = replace(pointing.holdout, labels=np.arange(len(pointing.holdout)) % 2)
    assert mirror_notes(replace(pointing, train=blind, holdout=held), spec) == []


def four(folder: Path, images: int = 200, size: int = 32) -> Path:
    """Write noisy wedges that point left, right, up or down."""
    rng = np.random.default_rng(1)
    for number in range(images):
        pixels = rng.integers(0, 100, (size, size, 3)).astype(np.uint8)
        top, left = rng.integers(2, size - 14, 2)
        for at in range(12):
            pixels[top + 6 - (12 - at) // 2 : top + 6 + (12 - at) // 2, left + at] = rng.integers(180, 255)
        name = ("right", "up", "left", "down")[number % 4]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rot90(pixels, number % 4)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def four_ways(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = tmp_path_factory.mktemp("four")
    return prepare(DataSpec(str(four(place / "data", 480)), img_size=32), place / "cache")


def answers(dataset: Dataset, change: Any) -> Any:
    """Make a network that answers by what `change` (number, class, mirrored) tells of a holdout image."""
    spec, names = default_spec(dataset), list(dataset.classes)
    images = eval_batch(dataset.holdout.pixels[:], spec).flatten(1)
    sides = images, eval_batch(dataset.holdout.pixels[:], spec).flip(3).flatten(1)

    def network(asked: torch.Tensor) -> torch.Tensor:
        told = []
        for image in asked.flatten(1):
            found = [
                (float((side - image).square().sum(1).min()), int((side - image).square().sum(1).argmin()))
                for side in sides
            ]
            number = found[0][1] if found[0][0] <= found[1][0] else found[1][1]
            told.append(
                names.index(change(number, names[int(dataset.holdout.labels[number])], found[1][0] < found[0][0]))
            )
        return torch.nn.functional.one_hot(torch.tensor(told), len(names)).float()

    return network


def test_a_trained_network_tells_left_from_right_or_shows_that_it_cannot(four_ways: Dataset) -> None:
    spec, other = default_spec(four_ways), {"left": "right", "right": "left"}

    def sided(number: int, name: str, mirrored: bool) -> str:  # never saw a mirrored image
        return other.get(name, name) if mirrored else name

    def coin(number: int, name: str, mirrored: bool) -> str:  # saw as many mirrored as not
        return other.get(name, name) if number % 2 else name

    def sure(number: int, name: str, mirrored: bool) -> str:
        return name

    def poor(number: int, name: str, mirrored: bool) -> str:  # of nothing in particular
        return sorted(four_ways.classes)[number % 4]

    for change, words in ((sided, "the network loses"), (coin, "'left' and 'right'"), (sure, ""), (poor, "")):
        notes = flip_notes(answers(four_ways, change), four_ways, spec)
        assert len(notes) == bool(words), (change, notes)
        assert all(words in note and "--hflip 0" in note and note.startswith("warning: ") for note in notes)
        assert flip_notes(answers(four_ways, change), four_ways, replace(spec, hflip=0.0)) == []


@pytest.mark.slow
def test_left_and_right_are_learnt_without_mirroring_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, top1 = arrows(tmp_path / "data", 400), {}
    for name, more in (("mirrored", []), ("plain", ["--hflip", "0", "--policy", "none"])):
        start = ["--arch", str(arch_file(tmp_path)), "--data", str(data), "--img-size", "24", "--threads", "1"]
        place = ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / name), "--epochs", "15"]
        assert train.main([*start, *place, *more]) == 0
        said = capsys.readouterr()
        assert ("--hflip 0 never mirrors" in said.out + said.err) == (name == "mirrored")
        top1[name] = json.loads((tmp_path / name / "result.json").read_text())["test_top1"]
    assert top1["plain"] > 0.85
    assert top1["mirrored"] < 0.75
