"""One code, one input: whatever happened before, in whatever order, with timm's own transforms."""

from __future__ import annotations

import itertools
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform

from nas.distill.augment import (
    Augmenter,
    AugmentSpec,
    _old_posterize,
    augmentation_code,
    eval_batch,
)
from space.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = AugmentSpec(48, MEAN, STD)
SPECS = {
    "digits": replace(PLAIN, scale=(0.6, 1.0), hflip=0.0),
    "fractals": PLAIN,
    "photographs": replace(PLAIN, policy="rand-m9-mstd0.5-inc1"),
    "all": replace(PLAIN, policy="rand-m9-mstd0.5-inc1", erase_prob=0.7),
    "jitter": replace(PLAIN, color_jitter=0.4, erase_prob=0.25),
    "larger": AugmentSpec(96, MEAN, STD, policy="rand-m9-mstd0.5-inc1"),
}


def images(n: int, side: int = 55, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    enlarge = (Image.fromarray(s).resize((side, side), Image.Resampling.BICUBIC) for s in small)
    return np.stack([np.asarray(image) for image in enlarge])


def codes(n: int, epoch: int = 0) -> list[int]:
    return [augmentation_code(f"{at:032x}", epoch, 0) for at in range(n)]


@pytest.mark.parametrize("name", SPECS)
def test_inputs_are_those_of_timms_pipeline_under_the_same_seeds(name: str) -> None:
    spec = SPECS[name]
    jitter: object = spec.color_jitter
    timms = create_transform(
        spec.img_size,
        is_training=True,
        scale=spec.scale,
        ratio=spec.ratio,
        hflip=spec.hflip,
        color_jitter=jitter,  # type: ignore[arg-type]
        auto_augment=spec.policy,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        re_prob=spec.erase_prob,
        re_mode="pixel",
    )
    pixels, ours = images(40), Augmenter(spec)
    for row, code in enumerate(codes(40)):
        random.seed(code)
        np.random.seed((code & 0xFFFFFFFF, code >> 32))
        torch.default_generator.manual_seed(code & 0x7FFFFFFFFFFFFFFF)
        with _old_posterize():
            want = timms(Image.fromarray(pixels[row]))
        assert torch.equal(ours(pixels[row], code), want)


@pytest.mark.parametrize("name", SPECS)
def test_replay_is_exact_in_any_order_and_batch_and_leaves_no_trace(name: str) -> None:
    pixels, drawn = images(24), codes(24)
    first = Augmenter(SPECS[name]).batch(pixels, drawn)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    again = Augmenter(SPECS[name])
    for row in np.random.default_rng(1).permutation(24):
        assert torch.equal(again(pixels[row], drawn[row]), first[row])
    assert random.getstate() == before[0]
    after = np.random.get_state()
    assert np.array_equal(after[1], before[1][1])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
    other = Augmenter(SPECS[name]).batch(pixels, codes(24, epoch=1))
    assert not torch.equal(other, first)


def test_no_code_of_randaugment_dies_of_posterize_and_pillow_is_left_alone() -> None:
    original = ImageOps.posterize
    spec = replace(PLAIN, img_size=16, policy="rand-m9-n8-mstd3.0-inc1")
    inputs = Augmenter(spec).batch(images(300, 16), codes(300))
    assert torch.isfinite(inputs).all()
    assert ImageOps.posterize is original
    with _old_posterize():
        black = ImageOps.posterize(Image.new("RGB", (3, 3), (200, 100, 50)), 0)
        kept = ImageOps.posterize(Image.new("RGB", (3, 3), (200, 100, 50)), 4)
    assert not np.asarray(black).any()
    assert np.asarray(kept)[0, 0].tolist() == [192, 96, 48]


def test_evaluation_takes_the_centre_as_timm_does() -> None:
    for side, size in itertools.product((48, 55, 64, 65), (48, 47, 33)):
        spec = AugmentSpec(size, MEAN, STD)
        pixels = images(3, side)
        crop = create_transform(side, mean=MEAN, std=STD, crop_pct=1.0)  # normalises only
        start = round((side - size) / 2)
        want = torch.stack([crop(Image.fromarray(p)) for p in pixels])
        want = want[:, :, start : start + size, start : start + size]
        assert torch.equal(eval_batch(pixels, spec), want)


def test_codes_depend_on_key_epoch_and_salt_and_rarely_meet() -> None:
    drawn = [
        augmentation_code(f"{key:032x}", epoch, salt)
        for key in range(200)
        for epoch in range(10)
        for salt in range(3)
    ]
    assert len(set(drawn)) == len(drawn)
    assert max(drawn) >= 1 << 63
    assert augmentation_code("0" * 32, 0, 0) == augmentation_code("0" * 32, 0, 0)


def test_every_field_of_the_specification_is_in_its_digest() -> None:
    spec = SPECS["all"]
    other = AugmentSpec(
        64, STD, MEAN, "bilinear", (0.2, 0.9), (0.5, 2.0), 0.1, None, 0.3, 0.1, "other", 2
    )
    digests = {spec.digest()}
    for field in fields(AugmentSpec):
        digests.add(replace(spec, **{field.name: getattr(other, field.name)}).digest())
    assert len(digests) == 1 + len(fields(AugmentSpec))
    assert AugmentSpec.from_dict(spec.to_dict()) == spec


def test_a_specification_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match="mixup"):
        AugmentSpec.from_dict({**PLAIN.to_dict(), "mixup": 0.8})
    with pytest.raises(InputError, match="posterize_zero"):
        Augmenter(replace(PLAIN, posterize_zero="error"))
