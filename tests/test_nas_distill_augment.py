"""One code, one input: whatever happened before, in whatever order, with timm's own transforms."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform

from nas.data.augment.spec import (
    Augmenter,
    AugmentSpec,
    _old_posterize,
    augmentation_code,
    augmentation_codes,
    eval_batch,
)
from nas.data.augment.views import make_augmenter
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
    spec = replace(PLAIN, erase_prob=0.2)
    others: dict[str, Any] = {
        "img_size": 64,
        "mean": STD,
        "std": MEAN,
        "interpolation": "bilinear",
        "scale": (0.2, 0.9),
        "ratio": (0.5, 2.0),
        "hflip": 0.1,
        "policy": "rand-m9",
        "color_jitter": 0.3,
        "erase_prob": 0.1,
        "engine": "batched",
        "erase_mode": "rand",
        "erase_count": 2,
        "mixup_alpha": 0.1,
        "cutmix_alpha": 0.1,
        "mix_prob": 0.5,
        "mix_switch_prob": 0.1,
    }
    assert set(others) | {"posterize_zero", "version"} == {
        field.name for field in fields(AugmentSpec)
    }
    digests = {replace(spec, **{name: value}).digest() for name, value in others.items()}
    assert len(digests | {spec.digest()}) == 1 + len(others)
    assert {"posterize_zero", "version"} < set(spec.to_dict()), "they have one value so far"
    assert AugmentSpec.from_dict(spec.to_dict()) == spec


BAD: list[tuple[dict[str, Any], str]] = [
    ({"posterize_zero": "error"}, "posterize_zero"),
    ({"engine": "magic"}, "engine"),
    ({"erase_mode": "stripes"}, "erase_mode"),
    ({"interpolation": "sinc"}, "interpolation"),
    ({"version": 3}, "version"),
    ({"policy": "no-such-policy"}, "no-such-policy"),
    ({"policy": "v1"}, "v1"),
    ({"policy": ""}, "policy"),
    ({"policy": "rand-m9-inc"}, "timm ignores 'inc'"),
    ({"policy": "rand-m9-tnone"}, "timm ignores 'tnone'"),
    ({"policy": "rand-n99-tweights"}, "rand-n99-tweights"),
    ({"policy": "augmix-mstd"}, "timm ignores 'mstd'"),
    ({"scale": (0.0, 1.0)}, "scale"),
    ({"scale": (0.9, 0.5)}, "scale"),
    ({"ratio": (2.0, 1.0)}, "ratio"),
    ({"hflip": 1.5}, "hflip"),
    ({"mixup_alpha": -1.0}, "mixup_alpha"),
    ({"cutmix_alpha": float("nan")}, "cutmix_alpha"),
    ({"mix_prob": 2.0}, "mix_prob"),
    ({"color_jitter": 7.0}, "color_jitter"),
    ({"erase_count": 0}, "erase_count"),
    ({"engine": "batched", "policy": "rand-m9"}, "rand-m9 in the batched engine"),
    ({"engine": "batched", "interpolation": "bilinear"}, "bilinear in the batched engine"),
    ({"engine": "batched", "erase_prob": 0.5, "erase_mode": "rand"}, "erasing"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_what_cannot_be_replayed_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        replace(PLAIN, **change)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="mixup"):
        AugmentSpec.from_dict({**PLAIN.to_dict(), "mixup": 0.8})


POLICIES = {
    "randaugment": {"policy": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5},
    "often": {"policy": "rand-m7-n3-mstd0.9-p0.7"},
    "weighted": {"policy": "rand-mstd1-tweights"},
    "auto": {"policy": "v0", "erase_mode": "rand", "erase_prob": 0.9, "erase_count": 3},
    "original": {"policy": "original-mstd0.5"},
    "three": {"policy": "3a", "color_jitter": 0.3},
    "augmix": {"policy": "augmix-m5-w4-d2"},
    "jitter": {
        "color_jitter": 0.4,
        "interpolation": "random",
        "erase_mode": "const",
        "erase_prob": 0.5,
    },
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_that_timm_has_replays(name: str) -> None:
    spec = replace(PLAIN, img_size=32, **POLICIES[name])  # type: ignore[arg-type]
    pixels, drawn = images(16, 36), codes(16)
    first = Augmenter(spec).batch(pixels, drawn)
    again, other = Augmenter(spec), Augmenter(SPECS["all"])
    for row in np.random.default_rng(3).permutation(16):
        other.batch(pixels[:1], drawn[:1])  # another's draws in between
        assert torch.equal(again(pixels[row], drawn[row]), first[row])
    assert not torch.equal(Augmenter(spec).batch(pixels, codes(16, 1)), first)


def replayed(spec: AugmentSpec, side: int, count: int) -> torch.Tensor:
    """What a process of its own makes; at module level, so that it can be sent to one."""
    torch.rand(7)
    random.random()
    return make_augmenter(spec).batch(images(count, side), codes(count))


ENGINES = {
    "timm": replace(PLAIN, policy="rand-m9-mstd0.5-inc1", erase_prob=0.5),
    "batched": replace(PLAIN, engine="batched", color_jitter=0.4, erase_prob=0.5),
}


def all_replayed() -> list[NDArray[np.float32]]:
    """Both engines at proxy size and at 224 px, in one process."""
    torch.set_num_threads(1)
    sizes = ((48, 55), (224, 256))
    pairs = itertools.product(ENGINES.values(), sizes)
    return [replayed(replace(spec, img_size=size), side, 4).numpy() for spec, (size, side) in pairs]


@pytest.mark.parametrize(
    "method", ["spawn", "fork", pytest.param("forkserver", marks=pytest.mark.slow)]
)
def test_processes_of_any_start_method_replay_to_the_bit(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    before = torch.get_num_threads()
    try:
        want = all_replayed()
    finally:
        torch.set_num_threads(before)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        found = pool.submit(all_replayed).result(timeout=120)
    assert all(np.array_equal(a, b) for a, b in zip(found, want, strict=True))


def test_threads_of_one_process_take_turns() -> None:
    spec, pixels, drawn = SPECS["all"], images(12), codes(12)
    want = Augmenter(spec).batch(pixels, drawn)
    augmenter = Augmenter(spec)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda row: augmenter(pixels[row], drawn[row]), range(12)))
    assert torch.equal(torch.stack(made), want)


def test_codes_of_many_keys_are_those_of_each() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (300, 16), dtype=np.uint8)
    keys = [bytes(row).hex() for row in raw]
    for epoch, salt in itertools.product((0, 7, 299), (0, 12345)):
        want = [augmentation_code(key, epoch, salt) for key in keys]
        assert augmentation_codes(raw, epoch, salt).tolist() == want
    assert augmentation_codes(raw[:0], 0, 0).shape == (0,)
