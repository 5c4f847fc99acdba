"""One code, one input, whatever came before: timm's own transforms, and the batched engine's."""

from __future__ import annotations

import itertools
import math
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

from nas.core.dataclass_json import from_json
from nas.data.augment import batched_engine
from nas.data.augment.batched_engine import BatchedAugmenter, uniforms
from nas.data.augment.spec import AugmentSpec, augmentation_code, augmentation_codes, borrowed_generators
from nas.data.augment.timm_engine import TimmAugmenter, eval_batch
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


SMALL = replace(PLAIN, img_size=32)
POLICIES = {
    "often": replace(SMALL, policy="rand-m7-n3-mstd0.9-p0.7"),
    "weighted": replace(SMALL, policy="rand-mstd1-tweights"),
    "auto": replace(SMALL, policy="v0", erase_mode="rand", erase_prob=0.9, erase_count=3),
    "original": replace(SMALL, policy="original-mstd0.5"),
    "three": replace(SMALL, policy="3a", color_jitter=0.3),
    "augmix": replace(SMALL, policy="augmix-m5-w4-d2"),
    "any filter": replace(SMALL, color_jitter=0.4, interpolation="random", erase_mode="const", erase_prob=0.5),
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
    kept = ("scale", "ratio", "hflip", "color_jitter", "interpolation", "mean", "std")
    options: dict[str, Any] = {field: getattr(spec, field) for field in kept}
    options |= {"auto_augment": spec.policy, "re_prob": spec.erase_prob, "re_mode": "pixel"}
    timms = create_transform(spec.img_size, is_training=True, **options)
    pixels, ours = images(40), TimmAugmenter(spec)
    for row, code in enumerate(codes(40)):
        random.seed(code)
        np.random.seed((code & 0xFFFFFFFF, code >> 32))
        torch.default_generator.manual_seed(code & 0x7FFFFFFFFFFFFFFF)
        with borrowed_generators():
            want = timms(Image.fromarray(pixels[row]))
        assert torch.equal(ours.batch(pixels[row : row + 1], [code])[0], want)


@pytest.mark.parametrize("name", [*SPECS, *POLICIES])
def test_replay_is_exact_in_any_order_and_batch_and_leaves_no_trace(name: str) -> None:
    spec, pixels, drawn = (SPECS | POLICIES)[name], images(16), codes(16)
    first = TimmAugmenter(spec).batch(pixels, drawn)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    again, other = TimmAugmenter(spec), TimmAugmenter(SPECS["all"])
    for row in np.random.default_rng(1).permutation(16):
        other.batch(pixels[:1], drawn[:1])  # another's draws in between
        assert torch.equal(again.batch(pixels[row : row + 1], [drawn[row]])[0], first[row])
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1][1])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not torch.equal(TimmAugmenter(spec).batch(pixels, codes(16, epoch=1)), first)


def test_no_code_of_randaugment_dies_of_posterize_and_pillow_is_left_alone() -> None:
    original = ImageOps.posterize
    spec = replace(PLAIN, img_size=16, policy="rand-m9-n8-mstd3.0-inc1")
    inputs = TimmAugmenter(spec).batch(images(300, 16), codes(300))
    assert torch.isfinite(inputs).all()
    assert ImageOps.posterize is original
    with borrowed_generators():
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


def test_every_field_of_the_specification_is_in_its_digest() -> None:
    spec = replace(PLAIN, erase_prob=0.2)
    others: dict[str, Any] = {
        **{"img_size": 64, "mean": STD, "std": MEAN, "interpolation": "bilinear", "engine": "batched"},
        **{"scale": (0.2, 0.9), "ratio": (0.5, 2.0), "hflip": 0.1, "policy": "rand-m9", "color_jitter": 0.3},
        **{"erase_prob": 0.1, "erase_mode": "rand", "erase_count": 2},
        **{"mixup_alpha": 0.1, "cutmix_alpha": 0.1, "mix_prob": 0.5, "mix_switch_prob": 0.1},
    }
    assert set(others) | {"posterize_zero", "version"} == {field.name for field in fields(AugmentSpec)}
    digests = {replace(spec, **{name: value}).digest() for name, value in others.items()}
    assert len(digests | {spec.digest()}) == 1 + len(others)
    assert {"posterize_zero", "version"} < set(spec.to_dict()), "they have one value so far"
    assert from_json(AugmentSpec, spec.to_dict()) == spec


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
    with pytest.raises(InputError, match=said):
        replace(PLAIN, **change)


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


@pytest.mark.parametrize("method", ["spawn", "fork", pytest.param("forkserver", marks=pytest.mark.slow)])
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
    want = TimmAugmenter(spec).batch(pixels, drawn)
    augmenter = TimmAugmenter(spec)
    with ThreadPoolExecutor(4) as pool:
        rows = [pool.submit(augmenter.batch, pixels[r : r + 1], [drawn[r]]) for r in range(12)]
    assert torch.equal(torch.cat([row.result() for row in rows]), want)


def test_codes_of_many_keys_are_those_of_each_and_rarely_meet() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (300, 16), dtype=np.uint8)
    keys = [bytes(row).hex() for row in raw]
    met: list[int] = []
    for epoch, salt in itertools.product((0, 7, 299), (0, 12345)):
        met += (want := [augmentation_code(key, epoch, salt) for key in keys])
        assert augmentation_codes(raw, epoch, salt).tolist() == want
    assert len(set(met)) == 6 * 300
    assert max(met) >= 1 << 63
    assert augmentation_codes(raw[:0], 0, 0).shape == (0,)


# The batched engine

BATCHED = replace(PLAIN, hflip=0.0, engine="batched")
ALL_BATCHED = replace(BATCHED, hflip=0.5, color_jitter=0.4, erase_prob=0.5)


def soft_images(n: int, side: int) -> NDArray[np.uint8]:
    """Images away from black and white, where Pillow cuts off between its two passes."""
    return images(n, side) // 2 + 64


def drawn(n: int) -> NDArray[np.float64]:
    return uniforms(np.array(codes(n), dtype=np.uint64), np.arange(64, dtype=np.uint64))


def grey_levels(inputs: torch.Tensor) -> NDArray[np.float32]:
    """Undo the normalisation: [n, s, s, 3] in 0..255."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    levels: NDArray[np.float32] = ((inputs * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    return levels


@pytest.mark.parametrize(("size", "side"), [(48, 55), (16, 17), (64, 48), (96, 110), (224, 256)])
def test_crops_are_pillows_to_rounding(size: int, side: int) -> None:
    n = 40 if side < 100 else 6
    spec, pixels = replace(BATCHED, img_size=size, scale=(0.08, 1.0)), soft_images(n, side)
    found = grey_levels(BatchedAugmenter(spec).batch(pixels, codes(n)))
    turned = BatchedAugmenter(replace(spec, hflip=1.0)).batch(pixels, codes(n))
    assert np.allclose(grey_levels(turned), found[:, :, ::-1], atol=1e-3)
    top, left, high, wide = batched_engine._crops(drawn(n), side, spec)
    for row in range(n):
        x, y = int(left[row]), int(top[row])
        box = (x, y, x + int(wide[row]), y + int(high[row]))
        image = Image.fromarray(pixels[row]).crop(box)
        want = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(found[row] - want).max() < 1.6  # Pillow rounds twice


def test_crops_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    spec = replace(BATCHED, scale=(0.08, 1.0))
    n, side = 4000, 55
    ours = np.stack(batched_engine._crops(drawn(n), side, spec), 1)
    assert (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= side).all()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.zeros(3, side, side)
        theirs = np.array([RandomResizedCrop.get_params(image, list(spec.scale), list(spec.ratio)) for _ in range(n)])
    for at in range(4):
        a, b = np.sort(ours[:, at]), np.sort(theirs[:, at])
        grid = np.arange(side + 1)
        gap = np.searchsorted(a, grid, "right") / n - np.searchsorted(b, grid, "right") / n
        assert np.abs(gap).max() < 0.045, at  # 1.95 sqrt(2 / 4000): one in a thousand


@pytest.mark.parametrize(("size", "side"), [(48, 55), (224, 256), (7, 9), (10, 15)])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_is_the_same_in_any_batch(size: int, side: int, threads: int) -> None:
    n = 48 if side < 100 else 9
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        spec, pixels, chosen = replace(ALL_BATCHED, img_size=size), soft_images(n, side), codes(n)
        augmenter = BatchedAugmenter(spec)
        want = augmenter.batch(pixels, chosen)
        for count in (0, 1, 2, 5, 17, 32):
            rows = np.random.default_rng(count).permutation(n)[:count]
            found = augmenter.batch(pixels[rows], [chosen[r] for r in rows])
            assert torch.equal(found, want[torch.from_numpy(rows)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(augmenter.batch(pixels, chosen), want)
    finally:
        torch.set_num_threads(before)


def test_colours_follow_their_definition() -> None:
    n, spec = 12, replace(BATCHED, color_jitter=0.4)
    pixels = soft_images(n, 55)
    plain = grey_levels(BatchedAugmenter(BATCHED).batch(pixels, codes(n))).astype(np.float64)
    found = grey_levels(BatchedAugmenter(spec).batch(pixels, codes(n)))
    factors = 0.6 + 0.8 * drawn(n)[:, batched_engine._COLOR : batched_engine._COLOR + 3]
    weights = np.array([0.299, 0.587, 0.114])
    for row in range(n):
        image = np.clip(plain[row] * factors[row, 0], 0, 255)
        middle = (image @ weights).mean()
        image = np.clip((image - middle) * factors[row, 1] + middle, 0, 255)
        grey = (image @ weights)[..., None]
        image = np.clip((image - grey) * factors[row, 2] + grey, 0, 255)
        assert np.abs(found[row] - image).max() < 0.05


def test_erasing_puts_normal_noise_into_one_box() -> None:
    n = 400
    pixels = np.zeros((n, 55, 55, 3), dtype=np.uint8)
    plain = BatchedAugmenter(BATCHED).batch(pixels, codes(n))
    found = BatchedAugmenter(replace(BATCHED, erase_prob=0.25)).batch(pixels, codes(n))
    changed = (found != plain).any(1).numpy()
    erased = [row for row in range(n) if changed[row].any()]
    assert abs(len(erased) / n - 0.25) < 0.08
    noise = []
    for row in erased:
        ys, xs = np.nonzero(changed[row])
        area = changed[row].mean()
        assert 0.015 < area < 0.36
        assert (np.ptp(ys) + 1) * (np.ptp(xs) + 1) == changed[row].sum(), "a full box"
        noise.append(found[row][:, torch.from_numpy(changed[row])].flatten())
    values = torch.cat(noise).double()
    assert abs(float(values.mean())) < 4 / math.sqrt(len(values))
    assert abs(float(values.std()) - 1) < 4 / math.sqrt(len(values))


def test_hashed_numbers_are_uniform_and_do_not_depend_on_each_other() -> None:
    u = drawn(5000)
    assert u.min() >= 0
    assert u.max() < 1
    grid = np.linspace(0, 1, 101)
    for at in range(64):
        gap = np.searchsorted(np.sort(u[:, at]), grid) / 5000 - grid
        assert np.abs(gap).max() < 0.03
    correlations = np.corrcoef(u.T) - np.eye(64)
    assert np.abs(correlations).max() < 0.08
