"""Formula-driven images to segment: patches of texture on another texture, with exact masks.

The class of a pixel is the kind of texture there. Values are ranked inside every patch and painted
between two colours of one distribution, so that all classes have the same histogram: only the
pattern tells them apart, no threshold does. In the spirit of Kataoka et al., "Pre-training without
natural images" (ACCV 2020), as `nas.data.fractals`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
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
    left, top = np.floor(u.min()), np.floor(v.min())
    a, b = u - left, v - top
    i, j = a.astype(np.int64), b.astype(np.int64)
    table = rng.random((int(i.max()) + 2, int(j.max()) + 2))
    a, b = a - i, b - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    near = table[i, j] * (1 - b) + table[i, j + 1] * b
    far = table[i + 1, j] * (1 - b) + table[i + 1, j + 1] * b
    return np.asarray(near * (1 - a) + far * a)


def _stripes(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return np.asarray(np.sin(2 * np.pi * u))


def _checks(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return np.asarray(np.sin(np.pi * u) * np.sin(np.pi * v))


def _cells(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Distance to the nearest point of a jittered lattice (Worley, "A cellular texture basis")."""
    left, top = np.floor(u.min()) - 1, np.floor(v.min()) - 1
    a, b = u - left, v - top
    i, j = a.astype(np.int64), b.astype(np.int64)
    points = rng.random((int(i.max()) + 2, int(j.max()) + 2, 2))
    nearest = np.full(u.shape, np.inf)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            point = points[i + di, j + dj]
            square = (i + di + point[..., 0] - a) ** 2 + (j + dj + point[..., 1] - b) ** 2
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


def masked_images(
    count: int, img_size: int, random_seed: int, role: str = "train"
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw images uint8 [n, S, S, 3] and masks uint8 [n, S, S] of classes 0 .. len(KINDS) - 1.

    An image follows from the size, the random seed, the role ("train", "test") and its number
    alone. One to three patches of different kinds may cover each other, but never the last, whose
    kinds take turns: every class occurs in any len(KINDS) - 1 images in a row.
    """
    images = np.empty((count, img_size, img_size, 3), dtype=np.uint8)
    masks = np.empty((count, img_size, img_size), dtype=np.uint8)
    for number in range(count):
        rng = np.random.default_rng((random_seed, ROLES.index(role), number))
        images[number], masks[number] = _scene(img_size, number, rng)
    return images, masks


def _scene(
    size: int, number: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
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
    """Tell which pixels lie in a star-shaped patch around the origin; at least its centre's do."""
    angle, radius = np.arctan2(y, x), rng.uniform(0.2, 0.32) * len(x)
    edge = np.ones_like(angle)
    for wave in (2, 3, 4):
        edge += rng.uniform(0, 0.15) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.asarray(np.hypot(x, y) < radius * edge)


def _ranked(values: Floats) -> Floats:
    """Spread values evenly over [0, 1], in their order."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = (np.arange(len(values)) + 0.5) / len(values)
    return ranks


def _colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw two tones that can be told apart, a little tinted."""
    while True:
        one, other = rng.uniform(0, 1, 2)
        if abs(one - other) >= _LEAST_CONTRAST:
            tints = rng.uniform(-_TINT, _TINT, (2, 3))
            return one + tints[0], other + tints[1]
