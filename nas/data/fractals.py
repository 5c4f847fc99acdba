"""Formula-driven images: attractors of iterated function systems, one system per class.

An image is its class's system with jittered coefficients under a random similarity, in random colours, with a piece of
another attractor in the way. Source: Kataoka et al., "Pre-training without natural images" (ACCV 2020).

The pixels are the same on any machine: raw draws of PCG64, +, -, *, / and square roots of float32, integer counts; no
sine, no logarithm, no library's sum of floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nas.core.progress import Tick
from nas.data.dataset import DataSpec
from nas.data.sources import DataSource, ImagePool
from nas.data.split import choose, content_key
from space.errors import refuse

VERSION = 1
"""Of everything below that decides a pixel: another one is another data set."""
CLASSES = 100
DEFAULT_IMG_SIZE = 48
IMAGES_PER_CLASS = {"fit": 40, "holdout": 20, "test": 20}
_ROLE_NUMBERS = {"fit": 0, "holdout": 1, "test": 2}
_MAPS = 4
_CHAINS, _BURN_IN, _STEPS = 256, 12, 84
_BATCH = 50

Floats = NDArray[np.float32]


_DIFFICULTY = {"jitter": 0.23, "turn": 0.23, "smallest": 0.67, "clutter": 0.28, "noise": 0.06}
"""How far an image may stray from its class: the largest relative change of a coefficient, the tangent of half the
largest rotation, the least size as a share of the frame, the size of the other attractor, the pixel noise (1: full)."""
_JITTER, _TURN, _SMALLEST, _CLUTTER, _NOISE = _DIFFICULTY.values()


class Wanted(NamedTuple):
    """One image to render: its role, class and number."""

    role: str
    label: int
    number: int

    @property
    def name(self) -> str:
        """Return a name that no other image has."""
        return f"{self.role}/{self.label:03d}/{self.number:04d}"


class _Draws:
    """Uniform numbers from the raw bits of PCG64: the same under every version of numpy."""

    def __init__(self, *words: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(words))

    def unit(self, *shape: int) -> Floats:
        """Draw from [0, 1), multiples of 2^-24."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

    def signed(self, *shape: int) -> Floats:
        """Draw from [-1, 1)."""
        return self.unit(*shape) * np.float32(2) - np.float32(1)

    def octets(self, count: int) -> NDArray[np.uint8]:
        """Draw whole numbers from 0 to 255; `count` is a multiple of 8."""
        return self._bits.random_raw(count // 8).astype("<u8").view(np.uint8)

    def below(self, end: int) -> int:
        """Draw a whole number from 0 to end - 1."""
        return int(self._bits.random_raw()) % end


def _system(draws: _Draws) -> Floats:
    """Draw four contracting affine maps, rows of (a, b, c, d, e, f): float32 [4, 6].

    x' = a x + b y + e, y' = c x + d y + f. Systems of two or three maps repeat their first.
    """
    maps = draws.signed(_MAPS, 6)
    size = np.float32(0.55) + np.float32(0.4) * draws.unit(_MAPS)
    a, b, c, d = (maps[:, i].copy() for i in range(4))
    norm = np.sqrt(a * a + b * b + c * c + d * d)
    maps[:, :4] *= (size / np.maximum(norm, np.float32(1e-3)))[:, None]
    used = 2 + draws.below(_MAPS - 1)
    maps[used:] = maps[0]
    return maps


def class_systems() -> Floats:
    """Draw the system of every class, float32 [100, 4, 6], whose attractors fill between 12 and 50 % of a 48-pixel
    frame."""
    kept: list[Floats] = []
    attempt = 0
    while len(kept) < CLASSES:
        drawn = [_system(_Draws(VERSION, 7, attempt + i)) for i in range(_BATCH)]
        octets = np.stack([_Draws(VERSION, 8, attempt + i).octets(_STEPS * _CHAINS) for i in range(_BATCH)])
        views = np.zeros((_BATCH, 6), dtype=np.float32)
        views[:, 2] = 1
        counts = _histogram(np.stack(drawn), octets, views, 0.0, DEFAULT_IMG_SIZE)
        filled = (counts > 0).reshape(_BATCH, -1).sum(1)
        total = DEFAULT_IMG_SIZE * DEFAULT_IMG_SIZE
        kept += [s for s, f in zip(drawn, filled, strict=True) if 12 * total < 100 * f < 50 * total]
        attempt += _BATCH
    return np.stack(kept[:CLASSES])


def _points(systems: Floats, octets: NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """Play the chaos game: systems [B, 4, 6], octets [B, N] -> x, y [steps, B, chains]."""
    batch = len(systems)
    choice = (octets & 3).reshape(batch, _STEPS, -1).transpose(1, 0, 2)
    chains = choice.shape[2]
    at = choice + (np.arange(batch, dtype=np.intp) * _MAPS)[None, :, None]
    flat = np.ascontiguousarray(systems.reshape(batch * _MAPS, 6).T)
    x = np.zeros((batch, chains), dtype=np.float32)
    y = np.zeros_like(x)
    xs = np.empty((_STEPS - _BURN_IN, batch, chains), dtype=np.float32)
    ys = np.empty_like(xs)
    for step in range(_STEPS):
        a, b, c, d, e, f = (flat[i].take(at[step]) for i in range(6))
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= _BURN_IN:
            xs[step - _BURN_IN], ys[step - _BURN_IN] = x, y
    return xs, ys


def _histogram(systems: Floats, octets: NDArray[np.uint8], views: Floats, turn: float, size: int) -> NDArray[np.int64]:
    """Count the points of every attractor that fall on every pixel: int64 [B, size, size].

    `views` [B, 6]: turn, mirror, scale (a share of the frame), shifts x and y in [-1, 1] of the room that is left, -.
    """
    xs, ys = _points(systems, octets)
    one, half = np.float32(1), np.float32(0.5)
    mirror, scale = views[:, 1][None, :, None], views[:, 2]
    t: Floats = views[:, 0][None, :, None] * np.float32(turn)
    cos: Floats = (one - t * t) / (one + t * t)
    sin: Floats = (t + t) / (one + t * t)
    xs *= np.where(mirror < 0, -one, one).astype(np.float32)
    xs, ys = cos * xs - sin * ys, sin * xs + cos * ys
    low_x, low_y = xs.min((0, 2)), ys.min((0, 2))
    wide, high = xs.max((0, 2)) - low_x, ys.max((0, 2)) - low_y
    side = np.maximum(np.maximum(wide, high), np.float32(1e-6))
    room_x, room_y = one - scale * wide / side, one - scale * high / side
    left = room_x * (half + half * views[:, 3])
    top = room_y * (half + half * views[:, 4])
    factor = scale / side
    column = (xs - low_x[:, None]) * factor[:, None] + left[:, None]
    line = (ys - low_y[:, None]) * factor[:, None] + top[:, None]
    pixel_x = np.clip((column * np.float32(size)).astype(np.int64), 0, size - 1)
    pixel_y = np.clip((line * np.float32(size)).astype(np.int64), 0, size - 1)
    image = np.arange(len(systems))[None, :, None]
    flat = (image * size + pixel_y) * size + pixel_x
    counts = np.bincount(flat.ravel(), minlength=len(systems) * size * size)
    return counts.reshape(-1, size, size)


def _opacity(counts: NDArray[np.int64]) -> Floats:
    """Turn counts into opacity 0..1 [B, S, S]: the square root, full at three times the mean."""
    flat = counts.reshape(len(counts), -1)
    filled = np.maximum((flat > 0).sum(1), 1).astype(np.float32)
    mean = flat.sum(1).astype(np.float32) / filled
    share = counts.astype(np.float32) / (np.float32(3) * mean)[:, None, None]
    opacity: Floats = np.minimum(np.sqrt(share), np.float32(1))
    return opacity


def _ground(corners: Floats, size: int) -> Floats:
    """Blend four corner colours [B, 2, 2, 3] over the frame: float32 [B, size, size, 3]."""
    ramp = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    across, down = ramp[None, None, :, None], ramp[None, :, None, None]
    top, end = (corners[:, at, None, None, 0] * (1 - across) + corners[:, at, None, None, 1] * across for at in (0, 1))
    blend: Floats = top * (1 - down) + end * down
    return blend


def _render(wanted: Sequence[Wanted], systems: Floats, size: int) -> NDArray[np.uint8]:
    """Render a batch: uint8 [B, size, size, 3]. Every image depends on its own draws alone."""
    own, other, octets, views, others, colours, noise = [], [], [], [], [], [], []
    chains = _CHAINS * max(1, size // DEFAULT_IMG_SIZE)  # larger frames need more points
    for one in wanted:
        draws = _Draws(VERSION, 9, _ROLE_NUMBERS[one.role], one.label, one.number)
        jitter = np.float32(1) + np.float32(_JITTER) * draws.signed(_MAPS, 6)
        own.append(systems[one.label] * _tied(jitter, systems[one.label]))
        other.append(systems[(one.label + 1 + draws.below(CLASSES - 1)) % CLASSES])
        view, aside = draws.signed(6), draws.signed(6)
        share = np.float32(0.5) + np.float32(0.5) * view[2]
        view[2] = np.float32(_SMALLEST) + np.float32(0.97 - _SMALLEST) * share
        aside[2] = np.float32(_CLUTTER) * (np.float32(0.75) + np.float32(0.25) * aside[2])
        views.append(view)
        others.append(aside)
        colours.append(draws.unit(6, 3))
        # What depends on the size of the frame comes last, so that the scene does not.
        octets.append(draws.octets(2 * _STEPS * chains))
        noise.append(draws.octets(-(-size * size * 3 // 8) * 8)[: size * size * 3])
    points = np.stack(octets).reshape(len(wanted), 2, -1)
    paint = np.stack(colours)
    ground = paint[:, :4].reshape(-1, 2, 2, 3) * np.float32(0.6)
    image = _ground(ground, size)
    bright = np.float32(0.55) + np.float32(0.45) * paint[:, 4]
    distract = np.float32(0.4) + np.float32(0.6) * paint[:, 5]
    layers = [
        (np.stack(own), points[:, 0], np.stack(views), bright),
        (np.stack(other), points[:, 1], np.stack(others), distract),
    ]
    for maps, drawn, seen, colour in layers:
        cover = _opacity(_histogram(maps, drawn, seen, _TURN, size))[..., None]
        image = image * (1 - cover) + colour[:, None, None, :] * cover
    grain = np.stack(noise).reshape(image.shape).astype(np.float32) / np.float32(127.5) - 1
    image = np.clip(image + np.float32(_NOISE) * grain, 0, 1)
    return (image * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _tied(jitter: Floats, system: Floats) -> Floats:
    """Return repeated maps the jitter of the map they repeat, so that no map splits in two."""
    same = (system == system[0]).all(1)
    return np.where(same[:, None], jitter[:1], jitter)


def render(wanted: Sequence[Wanted], img_size: int = DEFAULT_IMG_SIZE) -> Iterator[NDArray[np.uint8]]:
    """Render images one by one, in order: uint8 [img_size, img_size, 3] each."""
    systems = class_systems()
    for start in range(0, len(wanted), _BATCH):
        yield from _render(wanted[start : start + _BATCH], systems, img_size)


def all_wanted() -> list[Wanted]:
    """List the whole set: 4,000 images to train on, 2,000 to hold out, 2,000 to test on."""
    sides = IMAGES_PER_CLASS.items()
    return [Wanted(role, *at) for role, each in sides for at in product(range(CLASSES), range(each))]


def fractals(spec: DataSpec) -> DataSource:
    """Describe the set; `max_images` keeps a stratified part of train and holdout."""
    size = spec.img_size or DEFAULT_IMG_SIZE
    wanted = all_wanted()
    if spec.max_images is not None:
        wanted = _kept(wanted, spec.max_images)

    def fill(pool: ImagePool, tick: Tick) -> None:
        for one, pixels in zip(wanted, render(wanted, size), strict=True):
            pool.add(content_key(pixels.tobytes()), one.label, one.role, pixels, one.name)
            tick(1.0)

    identity: dict[str, Any] = {"fractals": VERSION, "difficulty": _DIFFICULTY, "max_images": spec.max_images}
    return DataSource(
        name="fractals",
        classes=tuple(f"ifs{label:03d}" for label in range(CLASSES)),
        img_size=size,
        store_size=size,
        hflip=True,
        identity=identity,
        decoding=f"fractals {VERSION}",
        count=len(wanted),
        fill=fill,
        seeded=False,
    )


def _kept(wanted: Sequence[Wanted], max_images: int) -> list[Wanted]:
    """Keep two thirds of `max_images` to train on, one third to hold out, and every test."""
    kept: list[Wanted] = []
    for role, share in (("fit", 2 / 3), ("holdout", 1 / 3), ("test", None)):
        side = [one for one in wanted if one.role == role]
        if share is not None:
            count = round(max_images * share)
            if count < CLASSES:
                want = f"at least {3 * CLASSES}, so that every class is on both sides"
                raise refuse("--max-images", max_images, want)
            labels = np.array([one.label for one in side], dtype=np.int64)
            side = [side[r] for r in choose([one.name for one in side], labels, count, "proxy")]
        kept += side
    return kept
