"""The batched engine: each image as Pillow would make it, whatever batch it comes in."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nas.data.augment import batched_engine as batched
from nas.data.augment.batched_engine import BatchedAugmenter, uniforms
from nas.data.augment.spec import AugmentSpec, augmentation_code

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = AugmentSpec(48, MEAN, STD, hflip=0.0, engine="batched")
ALL = replace(PLAIN, hflip=0.5, color_jitter=0.4, erase_prob=0.5)


def images(n: int, side: int) -> NDArray[np.uint8]:
    # Away from black and white, where Pillow cuts off between its two passes.
    small = np.random.default_rng(0).integers(64, 192, (n, 6, 6, 3), dtype=np.uint8)
    enlarge = (Image.fromarray(s).resize((side, side), Image.Resampling.BICUBIC) for s in small)
    return np.stack([np.asarray(image) for image in enlarge])


def codes(n: int) -> list[int]:
    return [augmentation_code(f"{at:032x}", 0, 0) for at in range(n)]


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
    spec, pixels = replace(PLAIN, img_size=size, scale=(0.08, 1.0)), images(n, side)
    found = grey_levels(BatchedAugmenter(spec).batch(pixels, codes(n)))
    turned = BatchedAugmenter(replace(spec, hflip=1.0)).batch(pixels, codes(n))
    assert np.allclose(grey_levels(turned), found[:, :, ::-1], atol=1e-3)
    top, left, high, wide = batched._crops(drawn(n), side, spec)
    for row in range(n):
        x, y = int(left[row]), int(top[row])
        box = (x, y, x + int(wide[row]), y + int(high[row]))
        image = Image.fromarray(pixels[row]).crop(box)
        want = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(found[row] - want).max() < 1.6  # Pillow rounds twice


def test_crops_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    spec = replace(PLAIN, scale=(0.08, 1.0))
    n, side = 4000, 55
    ours = np.stack(batched._crops(drawn(n), side, spec), 1)
    assert (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= side).all()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.zeros(3, side, side)
        theirs = np.array(
            [
                RandomResizedCrop.get_params(image, list(spec.scale), list(spec.ratio))
                for _ in range(n)
            ]
        )
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
        spec, pixels, chosen = replace(ALL, img_size=size), images(n, side), codes(n)
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
    n, spec = 12, replace(PLAIN, color_jitter=0.4)
    pixels = images(n, 55)
    plain = grey_levels(BatchedAugmenter(PLAIN).batch(pixels, codes(n))).astype(np.float64)
    found = grey_levels(BatchedAugmenter(spec).batch(pixels, codes(n)))
    factors = 0.6 + 0.8 * drawn(n)[:, batched._COLOR : batched._COLOR + 3]
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
    plain = BatchedAugmenter(PLAIN).batch(pixels, codes(n))
    found = BatchedAugmenter(replace(PLAIN, erase_prob=0.25)).batch(pixels, codes(n))
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


@pytest.mark.parametrize(("side", "size"), [(55, 48), (17, 16), (64, 30), (5, 40), (9, 1), (70, 9)])
def test_weights_of_every_stretch_are_pillows(side: int, size: int) -> None:
    pairs = np.array([(a, b) for a in range(side) for b in range(1, side - a + 1)])
    start, length = pairs[:, 0], pairs[:, 1]
    first, taps = batched._weights(start, length, side, size)
    assert np.allclose(taps.sum(-1), 1, atol=1e-6)
    alone = batched._computed(start[-7:-6], length[-7:-6], side, size)
    assert np.array_equal(first[-7], alone[0][0])
    assert np.array_equal(taps[-7], alone[1][0])
    for row in np.random.default_rng(side).permutation(len(pairs))[:40]:
        a, b = pairs[row]
        light = np.eye(side, dtype=np.float32)[:, a : a + b]  # what becomes of each pixel alone
        image = Image.fromarray(light, mode="F").resize((size, side), Image.Resampling.BICUBIC)
        dense = np.zeros((size, side), dtype=np.float32)
        np.put_along_axis(dense, first[row][:, None] + np.arange(taps.shape[-1]), taps[row], 1)
        assert np.allclose(dense.T, np.asarray(image), atol=1e-5)
