"""Image folders: what is accepted, what is chosen, what is refused and how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from nas.core.config import RunConfig, with_effort
from nas.data import Dataset, DataSpec, prepare
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.timm_engine import eval_batch
from nas.data.decode import fitted, store_size_of
from nas.data.folders import _proxy, folder
from nas.data.split import content_key
from space.errors import InputError


def tree(root: Path, classes: Sequence[str] = ("b", "a", "c"), each: int = 6, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for at in range(each):
            pixels = rng.integers(0, 256, (52 + at, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{at}.png")
    return root


def ready(root: Path, tmp_path: Path, **changes: object) -> Dataset:
    return prepare(DataSpec(str(root), **changes), tmp_path / "cache")  # type: ignore[arg-type]


def test_one_tree_is_cut_and_two_folders_are_kept_apart(tmp_path: Path) -> None:
    one = ready(tree(tmp_path / "one", each=10), tmp_path)
    assert one.classes == ("a", "b", "c")
    assert (len(one.train), len(one.holdout), len(one.test)) == (19, 5, 6)
    tree(tmp_path / "two" / "train", seed=1)
    tree(tmp_path / "two" / "val", each=2, seed=2)
    two = ready(tmp_path / "two", tmp_path)
    assert (len(two.train), len(two.holdout), len(two.test)) == (14, 4, 6)
    files = {content_key(p.read_bytes()): p for p in (tmp_path / "two").rglob("*.png")}
    for side, split in (("val", two.test), ("train", two.train), ("train", two.holdout)):
        for key, label in zip(split.keys, split.labels, strict=True):
            assert files[key].parent.name == two.classes[label]
            assert files[key].parent.parent.name == side
    assert two.img_size == 48
    assert two.store_size == 55
    assert "48" in two.notes[-1]


def test_renaming_and_moving_files_changes_nothing_but_the_cache_folder(tmp_path: Path) -> None:
    first = ready(tree(tmp_path / "first", each=8), tmp_path, img_size=48)
    root = tmp_path / "second"
    shutil.copytree(tmp_path / "first", root)
    for at, path in enumerate(sorted(root.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"{at}x.png"))
    second = ready(root, tmp_path, img_size=48)
    for side in ("train", "holdout", "test"):
        assert getattr(first, side).keys == getattr(second, side).keys
    assert first.folder != second.folder
    time = os.stat(root / "a").st_mtime_ns
    path = next((root / "a").iterdir())
    Image.new("RGB", (50, 50)).save(path, "PNG")
    os.utime(path, ns=(time + 10, time + 10))
    third = ready(root, tmp_path, img_size=48)
    assert third.folder != second.folder
    assert third.fingerprint != second.fingerprint


def test_stored_pixels_evaluate_as_timm_evaluates_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for img_size in (48, 61, 96):
        size = store_size_of(img_size)
        for _ in range(12):
            wide, high = rng.integers(30, 150, 2)
            small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((int(wide), int(high)), Image.Resampling.BICUBIC)
            ours = fitted(image, img_size, size)
            spec = AugmentSpec(img_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
            timms = create_transform(
                img_size, crop_pct=img_size / (size + 0.25), interpolation="bicubic", mean=spec.mean, std=spec.std
            )
            assert torch.equal(eval_batch(ours[None], spec)[0], timms(image)), (wide, high)


def test_copies_by_pixels_do_not_straddle_the_cut(tmp_path: Path) -> None:
    root = tree(tmp_path / "d" / "train").parent
    tree(root / "val", each=2, seed=5)
    shutil.copy(root / "val/a/0.png", root / "train/a/leak.png")
    Image.open(root / "val/b/0.png").save(root / "train/b/leak.bmp")
    Image.open(root / "train/b/0.png").save(root / "train/b/twin.tif")
    dataset = ready(root, tmp_path)
    assert len(dataset.train) + len(dataset.holdout) == 18
    assert len(dataset.test) == 6
    assert any("3 images are copies of others by decoded pixels" in note for note in dataset.notes)


def test_equal_pictures_of_two_classes_are_named_and_refused_over_a_share(tmp_path: Path) -> None:
    root = tree(tmp_path / "d" / "train", each=8).parent
    tree(root / "val", each=3, seed=5)
    Image.open(root / "train/a/1.png").save(root / "train/b/twin.bmp")
    Image.open(root / "val/a/1.png").save(root / "train/c/other.webp", lossless=True)
    with pytest.raises(InputError, match=r"4 broken .* train/a/1.png \(the picture of train/b/twin.bmp, of class b\)"):
        ready(root, tmp_path)
    for pixel_cache in (True, False):
        kept = ready(root, tmp_path, max_corrupt=0.2, pixel_cache=pixel_cache)
        assert set(kept.broken) == {"train/a/1.png", "train/b/twin.bmp", "val/a/1.png", "train/c/other.webp"}
        assert (len(kept.train) + len(kept.holdout), len(kept.test)) == (23, 8)
    with pytest.raises(InputError, match="4 broken images"):  # decoded before, under another limit
        ready(root, tmp_path)


def test_images_that_are_not_chosen_are_never_read(tmp_path: Path) -> None:
    root = tree(tmp_path / "d" / "train", each=20).parent
    tree(root / "val", each=2, seed=9)
    spec = DataSpec(str(root), img_size=48, max_images=12)
    files = sorted((root / "train").rglob("*.png"))
    before = prepare(spec, tmp_path / "cache")
    assert len(before.train) + len(before.holdout) == 12
    assert any("12 of 60 training images" in note for note in before.notes)
    used = set(before.train.keys) | set(before.holdout.keys)
    for path in files:
        if content_key(path.read_bytes()) not in used:
            path.write_bytes(b"never read")
    after = prepare(spec, tmp_path / "other")
    assert after.fingerprint == before.fingerprint
    assert after.broken == ()


def test_the_default_bites_at_ten_thousand_images() -> None:
    from nas.data.folders import _File

    files = [_File(f"{at}.jpg", at % 10, "train") for at in range(20_000)]
    used, notes = _proxy(files, 10, None, True)
    assert len(used) == 10_000
    assert np.bincount([f.label for f in used]).tolist() == [1000] * 10
    assert notes == ["10,000 of 20,000 training images used (--max-images)"]


def test_links_that_lead_back_are_not_followed_and_names_may_be_foreign(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", classes=("chien", "猫"), each=6)
    (root / "up").symlink_to(root)
    (root / "chien" / "loop").symlink_to(root)
    (tmp_path / "link").symlink_to(root)
    (root / "chien" / "notes.txt").write_text("not an image")
    (root / "chien" / ".hidden.png").write_text("not an image either")
    (root / "chien" / "0.png").rename(root / "chien" / "0.PNG")
    dataset = ready(tmp_path / "link", tmp_path)
    assert dataset.classes == ("chien", "猫")
    assert sum(map(len, (dataset.train, dataset.holdout, dataset.test))) == 12


def test_image_size_follows_the_median_image(tmp_path: Path) -> None:
    for side, want in ((40, 48), (95, 48), (97, 96), (223, 96), (230, 224)):
        root = tmp_path / f"s{side}"
        for name in "ab":
            (root / name).mkdir(parents=True)
            for at in range(3):
                colour = (side, at, ord(name))
                Image.new("RGB", (side + 9 * at, side), colour).save(root / name / f"{at}.png")
        source = folder(DataSpec(str(root)))
        assert source.img_size == want
        assert f"{want} px" in source.notes[-1]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("only/0 only/1 only/2", "one class only"),
        ("", "no class folders"),
        ("0", "1 images, want at least 3"),
        ("a/0 b/1 void/", "no image in .*void"),
        ("a/0 b/1 void/ nil/ un/ zip/", "no image in .*nil, un, void and 1 more, want .*remove what is no class"),
        ("train/a/0 train/c/1 val/a/2 val/d/3", "'c' only in train/, 'd' only in val/"),
        ("a/0 a/1 b/2 b/3", "too few for the train side: 2 of 'a', 2 of 'b', want at least 3 of each class"),
        ("a/x a/y b/z", "3 broken images of 3"),
        (None, "existing folder"),
    ],
)
def test_unusable_folders_are_refused_in_one_line(files: str | None, words: str, tmp_path: Path) -> None:
    root = tmp_path / "d"
    if files is not None:
        root.mkdir()
    for name in (files or "").split():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name[-1].isdigit():
            Image.new("RGB", (50, 50), (int(name[-1]), 0, 0)).save(f"{path}.png")
        elif not name.endswith("/"):
            Path(f"{path}.png").write_bytes(b"")
    with pytest.raises(InputError, match=words) as caught:
        ready(root, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--data: got ")


def test_too_few_proxy_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-images: got 5, want at least 6"):
        ready(tree(tmp_path / "d"), tmp_path, max_images=5)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 5000, "./digits", __file__])
def test_names_of_no_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data"):
        prepare(DataSpec(name), tmp_path)


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "d")

    def denied(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(InputError, match="Permission denied"):
        ready(root, tmp_path)


def test_the_default_number_of_images_grows_with_the_classes(tmp_path: Path) -> None:
    """What a smoke run asks for by itself is never refused; what the user asks for is."""
    root = tree(tmp_path / "many", [f"c{number:02d}" for number in range(12)])
    spec = DataSpec(str(root), img_size=16, max_images=20, images_may_grow=True)
    dataset = prepare(spec, tmp_path / "cache")
    assert len(dataset.train) + len(dataset.holdout) >= 36
    assert any("48 images instead of 20: 12 classes" in note for note in dataset.notes)
    assert DataSpec(**spec.to_dict()).images_may_grow
    with pytest.raises(InputError, match="at least 24"):
        prepare(DataSpec(str(root), img_size=16, max_images=20), tmp_path / "cache")


@pytest.mark.parametrize(("given", "grows"), [({}, True), ({"max_images": 700}, False), ({"effort": "normal"}, False)])
def test_only_the_effort_s_own_number_of_images_grows(given: dict[str, Any], grows: bool) -> None:
    config = RunConfig(seed="21M", target_params=5_000_000, **with_effort(str(given.get("effort", "smoke")), given))
    assert config.images_may_grow is grows
