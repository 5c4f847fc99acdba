"""A small segmentation on a backbone's feature maps, trained on formula-driven images with masks.

Images are patches of texture on another texture, and the class of a pixel is the kind of texture there. Values are
ranked inside every patch and painted between two colours of one distribution, so that all classes have the same
histogram: only the pattern separates them. In the spirit of Kataoka et al., "Pre-training without natural images"
(ACCV 2020).

The head is a light feature pyramid: every map, normalised, through a 1x1 convolution, summed from the coarsest to the
finest, one 3x3 convolution, a 1x1 to the classes, bilinear upsampling. Source: Lin et al., "Feature pyramid networks
for object detection" (CVPR 2017), section 3; classes are read off the finest map alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import nn
from torch.nn import functional

from nas.core.progress import Tick, no_tick
from nas.data.augment.spec import AugmentSpec
from nas.data.augment.timm_engine import eval_batch
from nas.export.weights import place
from nas.train.loop import TrainSettings, train
from nas.train.norms import estimate, lags, tracked_norms
from nas.transfer.rows import Floats, Ints, confusion

TRAIN_IMAGES, TEST_IMAGES = 1024, 256
WIDTH = 64
BATCH = 32
FROZEN_EPOCHS, FINETUNE_EPOCHS = 12, 5
FROZEN_LR, FINETUNE_LR = 1e-2, 1e-3
MOST_KEPT_BYTES = 2 << 30
"""Maps of a frozen backbone are kept in memory up to this size, and made anew each epoch beyond."""

Maps = list[torch.Tensor]

Texture = Callable[[Floats, Floats, np.random.Generator], Floats]

ROLES = ("train", "test")
MOST_PATCHES = 3
_PERIODS = (1 / 8, 1 / 5)  # of a texture, as shares of the image's side
_LEAST_PERIOD = 4.0  # pixels; anything finer is noise at this resolution
_LEAST_CONTRAST = 0.4  # between a patch's two tones, of the full range
_TINT = 0.1
_NOISE = 0.03


def _clouds(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Sum value noise over octaves: fractional Brownian motion."""
    total = np.zeros_like(u)
    for octave in range(4):
        scale = 2.0 ** (octave - 2)
        total += _value_noise(u * scale, v * scale, rng) / 2.0**octave
    return total


def _value_noise(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Blend random numbers on a lattice of unit spacing, smoothly."""
    i, j, a, b = _cell(u, v, 0)
    table = rng.random((int(i.max()) + 2, int(j.max()) + 2))
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    near = table[i, j] * (1 - b) + table[i, j + 1] * b
    far = table[i + 1, j] * (1 - b) + table[i + 1, j + 1] * b
    return np.asarray(near * (1 - a) + far * a)


def _cell(u: Floats, v: Floats, margin: int) -> tuple[Ints, Ints, Floats, Floats]:
    """Return the lattice cells of coordinates, numbered from `margin` on, and the places in them."""
    a, b = (w - np.floor(w.min()) + margin for w in (u, v))
    i, j = a.astype(np.int64), b.astype(np.int64)
    return i, j, a - i, b - j


def _stripes(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return np.asarray(np.sin(2 * np.pi * u))


def _checks(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return np.asarray(np.sin(np.pi * u) * np.sin(np.pi * v))


def _cells(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Distance to the nearest point of a jittered lattice (Worley, "A cellular texture basis")."""
    i, j, a, b = _cell(u, v, 1)
    points = rng.random((int(i.max()) + 2, int(j.max()) + 2, 2))
    nearest = np.full(u.shape, np.inf)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            point = points[i + di, j + dj]
            square = (di + point[..., 0] - a) ** 2 + (dj + point[..., 1] - b) ** 2
            nearest = np.minimum(nearest, square)
    return np.asarray(np.sqrt(nearest))


def _gasket(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Sierpinski's gasket: where the binary digits of the coordinates share no one."""
    i, j = (np.floor(w * 4).astype(np.int64) & 15 for w in (u, v))
    # Of the two levels, the ranks are drawn smoothly: grain would give this class away.
    return np.asarray(((i & j) == 0) + 1e-3 * _clouds(u, v, rng))


KINDS: Mapping[str, Texture] = MappingProxyType(
    {"clouds": _clouds, "stripes": _stripes, "checks": _checks, "cells": _cells, "gasket": _gasket}
)
"""The classes in order: 0 is the background. A texture takes coordinates in periods, any shape."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """Images to segment, uint8 [n, S, S, 3], and their masks, uint8 [n, S, S]."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def masked_images(count: int, img_size: int, random_seed: int, role: str = "train") -> Scenes:
    """Draw images and their masks of classes 0 .. len(KINDS) - 1.

    An image follows from the size, the random seed, the role ("train", "test") and its number alone. One to three
    patches of different kinds may cover each other, but never the last, whose kinds take turns: every class occurs in
    any len(KINDS) - 1 images in a row.
    """
    images = np.empty((count, img_size, img_size, 3), dtype=np.uint8)
    masks = np.empty((count, img_size, img_size), dtype=np.uint8)
    for number in range(count):
        rng = np.random.default_rng((random_seed, ROLES.index(role), number))
        images[number], masks[number] = _scene(img_size, number, rng)
    return Scenes(images, masks)


def _scene(size: int, number: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one image and its mask."""
    textures, others = tuple(KINDS.values()), len(KINDS) - 1
    top = 1 + number % others
    below = [kind for kind in rng.permutation(others) + 1 if kind != top]
    kinds = [0, *below[: rng.integers(MOST_PATCHES)], top]
    grid = np.arange(size) + 0.5
    x, y = np.meshgrid(grid, grid)
    mask = np.zeros((size, size), dtype=np.uint8)
    image = np.empty((size, size, 3))
    for kind in kinds:
        at = rng.uniform(0.2 * size, 0.8 * size, 2)
        inside = np.ones_like(mask, dtype=bool) if kind == 0 else _blob(x - at[0], y - at[1], rng)
        turn, period = rng.uniform(0, 2 * np.pi), rng.uniform(*_PERIODS) * size
        scale = 1 / max(period, _LEAST_PERIOD)
        a, b = (x[inside] - at[0]) * scale, (y[inside] - at[1]) * scale
        phase = rng.uniform(0, 1, 2)
        u = np.cos(turn) * a + np.sin(turn) * b + phase[0]
        v = np.cos(turn) * b - np.sin(turn) * a + phase[1]
        values = _ranked(textures[kind](u, v, rng))
        dark, light = _colours(rng)
        image[inside] = dark + (light - dark) * values[:, None]
        mask[inside] = kind
    image += rng.normal(0, _NOISE, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), mask


def _blob(x: Floats, y: Floats, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return which pixels lie in a star-shaped patch around the origin; its centre always does."""
    angle, radius = np.arctan2(y, x), rng.uniform(0.2, 0.32) * len(x)
    edge = np.ones_like(angle)
    for wave in (2, 3, 4):
        edge += rng.uniform(0, 0.15) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.asarray(np.hypot(x, y) < radius * edge)


def _ranked(values: Floats) -> Floats:
    """Spread values evenly over [0, 1], in their order."""
    return np.asarray((rankdata(values, "ordinal") - 0.5) / len(values))


def _colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw two tones of some contrast, a little tinted."""
    while True:
        one, other = rng.uniform(0, 1, 2)
        if abs(one - other) >= _LEAST_CONTRAST:
            tints = rng.uniform(-_TINT, _TINT, (2, 3))
            return one + tints[0], other + tints[1]


class Head(nn.Module):
    """From feature maps, finest first, to logits [B, classes, S, S]."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        # Without weights of their own: maps of any scale, fresh or trained, come in alike.
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in channels)
        self.laterals = nn.ModuleList(nn.Conv2d(c, WIDTH, 1) for c in channels)
        self.smooth = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.classify = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, maps: Maps, size: int) -> torch.Tensor:
        """Classify every pixel of images of `size` pixels a side."""
        found = None
        for at in range(len(maps) - 1, -1, -1):
            lateral = self.laterals[at](self.norms[at](maps[at]))
            found = lateral if found is None else lateral + _resized(found, lateral.shape[-1])
        assert found is not None, "a pyramid of no maps"
        return _resized(self.classify(self.smooth(found)), size)


def _resized(maps: torch.Tensor, size: int) -> torch.Tensor:
    if maps.shape[-1] == size:
        return maps
    return functional.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """A backbone that gives maps, with a head on top."""

    def __init__(self, pyramid: nn.Module, head: Head) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, classes, S, S] of images [B, 3, S, S]."""
        logits: torch.Tensor = self.head(maps_of(self.pyramid, images), images.shape[-1])
        return logits


def maps_of(pyramid: nn.Module, images: torch.Tensor) -> Maps:
    """Return the maps [B, C, H, W] of images, finest first, whatever order the network has."""
    maps = list(pyramid(images))
    if str(getattr(getattr(pyramid, "output_fmt", None), "value", "NCHW")) == "NHWC":
        maps = [m.permute(0, 3, 1, 2) for m in maps]
    return sorted(maps, key=lambda m: -m.shape[-1])


def scenes(img_size: int, random_seed: int) -> tuple[Scenes, Scenes]:
    """Draw the images to train on and to test on: 1,024 and 256."""
    fit = masked_images(TRAIN_IMAGES, img_size, random_seed, "train")
    return fit, masked_images(TEST_IMAGES, img_size, random_seed, "test")


def settings_of(epochs: int | None, finetune: bool) -> TrainSettings:
    """Return how the head, or all, is trained; the same for trained and fresh weights."""
    usual, lr = (FINETUNE_EPOCHS, FINETUNE_LR) if finetune else (FROZEN_EPOCHS, FROZEN_LR)
    return TrainSettings(epochs=usual if epochs is None else epochs, lr=lr, batch_size=BATCH, amp=False)


def segment(
    pyramid: nn.Module,
    sides: tuple[Scenes, Scenes],
    spec: AugmentSpec,
    settings: TrainSettings,
    *,
    finetune: bool,
    random_seed: int,
    device: str,
    tick: Tick = no_tick,
) -> Ints:
    """Train on one side, test once on the other: pixels counted int64 [n, C, C], see `confusion`.

    The backbone stays as it is, in eval mode, unless `finetune`. Batch norms that were trained are estimated anew where
    they lag (`nas.train.norms`). `tick` counts images: once a training image and
    epoch, once a test image. Raises `Diverged`.
    """
    fit, test = sides
    place(pyramid, device)
    pyramid.eval()
    size = spec.img_size
    with torch.no_grad():
        channels = [m.shape[1] for m in maps_of(pyramid, _inputs(fit, spec, [0]).to(device))]
    with torch.random.fork_rng():  # dropped paths draw from it, too
        torch.manual_seed(random_seed)
        head = Head(channels, len(KINDS))
        net = Segmenter(pyramid, head)
        kept = None if finetune else _kept(pyramid, fit, spec, device)

        def batches(epoch: int) -> Iterator[tuple[Any, torch.Tensor]]:
            order = np.random.default_rng((random_seed, epoch)).permutation(len(fit.images))
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                inputs = _inputs(fit, spec, rows) if kept is None else kept(rows)
                yield inputs, torch.from_numpy(fit.masks[rows].astype(np.int64))

        def loss(model: nn.Module, batch: tuple[Any, torch.Tensor]) -> torch.Tensor:
            inputs, masks = batch
            logits = model(inputs.to(device)) if finetune else model([m.to(device) for m in inputs], size)
            losses = functional.cross_entropy(logits, masks.to(device), reduction="none")
            return losses.mean((1, 2))

        steps = -(-len(fit.images) // BATCH)
        learner = net if finetune else head
        train(learner, batches, loss, settings, steps_per_epoch=steps, device=device, tick=tick)
        if lags(learner, steps):
            blocks = (range(at, min(at + BATCH, len(fit.images))) for at in range(0, len(fit.images), BATCH))
            estimate(net, tracked_norms(learner), (_inputs(fit, spec, rows) for rows in blocks), device)
    place(net, device).eval()
    predicted = np.empty_like(test.masks)
    with torch.no_grad():
        for start in range(0, len(predicted), BATCH):
            rows = range(start, min(start + BATCH, len(predicted)))
            logits = net(_inputs(test, spec, rows).to(device))
            predicted[start : start + BATCH] = logits.argmax(1).to(torch.uint8).cpu().numpy()
            tick(float(len(rows)))
    return confusion(test.masks, predicted, len(KINDS))


def _inputs(side: Scenes, spec: AugmentSpec, rows: Any) -> torch.Tensor:
    images = eval_batch(side.images[np.asarray(rows)], spec)
    return images.contiguous(memory_format=torch.channels_last)


def _kept(pyramid: nn.Module, side: Scenes, spec: AugmentSpec, device: str) -> Callable[[NDArray[np.int64]], Any]:
    """Return the maps of rows, from memory where all of them fit."""

    def made(rows: Any) -> Maps:
        with torch.no_grad():
            return maps_of(pyramid, _inputs(side, spec, rows).to(device))

    each = sum(m[0].numel() * m.element_size() for m in made([0]))
    if each * len(side.images) > MOST_KEPT_BYTES:
        return made
    blocks = range(0, len(side.images), BATCH)
    parts = [[m.cpu() for m in made(range(at, min(at + BATCH, len(side.images))))] for at in blocks]
    kept = [torch.cat(level) for level in zip(*parts, strict=True)]
    return lambda rows: [level[torch.from_numpy(rows)] for level in kept]
