"""The specification of an augmentation, its named pipelines, and the code of each image and epoch.

An input follows from the stored pixels, a specification and a 64-bit code. timm's and torchvision's transforms draw
from three global generators (random, numpy, torch), which are seeded with the code and put back afterwards.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform

from nas.core.augment_config import AugmentConfig
from nas.core.dataclass_json import to_json
from nas.core.io import digest_of
from nas.data import Dataset
from space.errors import refuse

_LOCK = threading.RLock()
PRESETS = ("default", "22k", "1k", "finetune", "batched")
_OFFICIAL_POLICY = "rand-m9-mstd0.5-inc1"
_choices: Any = auto_augment.rand_augment_choices  # has no types
_CHOICES: Mapping[str, frozenset[Any]] = {
    "engine": frozenset(("timm", "batched")),
    "interpolation": frozenset(("nearest", "bilinear", "bicubic", "lanczos", "random")),
    "erase_mode": frozenset(("const", "rand", "pixel")),
    "posterize_zero": frozenset(("black",)),
    "version": frozenset((2,)),
}


@dataclass(frozen=True)
class AugmentSpec:
    """Everything that decides an input, given the stored pixels and a code. Raises InputError for what cannot be
    replayed.

    `scale` and `ratio` bound the random resized crop; `hflip`, `erase_prob`, `mix_prob` and `mix_switch_prob` (CutMix
    where both are on) are probabilities; `policy` is a timm auto-augment string, `color_jitter` a strength (timm leaves
    it out under a policy); the alphas are of mixup's and CutMix's beta distributions, 0 for off. Engine "timm" works
    image by image, "batched" on whole batches. `posterize_zero`: posterizing to 0 bits gives black, as in Pillow before
    13.
    """

    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    policy: str | None = None
    color_jitter: float | None = None
    erase_prob: float = 0.0
    posterize_zero: str = "black"
    engine: str = "timm"
    erase_mode: str = "pixel"
    erase_count: int = 1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    version: int = 2

    def __post_init__(self) -> None:
        _check(self)

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed with partners."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    @property
    def text(self) -> str:
        """The augmentation in one line."""
        low, high = self.scale
        parts = [f"random crops of {100 * low:g} to {100 * high:g} % of the area" if low < 1 else "no random crop"]
        if self.ratio != (1.0, 1.0):
            parts[0] += f", {self.ratio[0]:.3g} to {self.ratio[1]:.3g} times as wide as high"
        parts.append(f"mirrored with probability {self.hflip:g}" if self.hflip else "never mirrored")
        parts.append(f"policy {self.policy}" if self.policy else "no policy")
        if self.color_jitter:
            parts.append(f"colours jittered by {self.color_jitter:g}")
        parts.append(f"erased with probability {self.erase_prob:g}" if self.erase_prob else "no erasing")
        if self.mixes:
            parts.append(f"mixup {self.mixup_alpha:g}, CutMix {self.cutmix_alpha:g}")
        return "; ".join(parts) + ("; batched engine" if self.engine == "batched" else "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        found: dict[str, Any] = to_json(self)
        return found

    def digest(self) -> str:
        """Hash all fields: 32 hex characters."""
        return digest_of(self.to_dict())


def _check(spec: AugmentSpec) -> None:
    """Refuse what does not exist or cannot be replayed, before any image is touched."""
    for name, choices in _CHOICES.items():
        if getattr(spec, name) not in choices:
            raise refuse(f"augmentation {name}", getattr(spec, name), f"one of {sorted(choices)}")
    for name in ("hflip", "erase_prob", "mix_prob", "mix_switch_prob"):
        if not 0 <= getattr(spec, name) <= 1:
            raise refuse(f"augmentation {name}", getattr(spec, name), "a share from 0 to 1")
    for name in ("mixup_alpha", "cutmix_alpha"):
        if not 0 <= getattr(spec, name) < float("inf"):
            raise refuse(f"augmentation {name}", getattr(spec, name), "a number >= 0")
    for name, least in (("img_size", 1), ("erase_count", 1)):
        if getattr(spec, name) < least:
            raise refuse(f"augmentation {name}", getattr(spec, name), f"an integer >= {least}")
    if not 0 < spec.scale[0] <= spec.scale[1] <= 1:
        raise refuse("augmentation scale", spec.scale, "shares of the area, 0 < low <= high <= 1")
    if not 0 < spec.ratio[0] <= spec.ratio[1] < float("inf"):
        raise refuse("augmentation ratio", spec.ratio, "width over height, 0 < low <= high")
    if spec.color_jitter is not None and not 0 <= spec.color_jitter <= 1:
        raise refuse("augmentation color_jitter", spec.color_jitter, "a strength from 0 to 1")
    if spec.engine == "batched":
        _check_batched(spec)
    elif spec.policy is not None:
        _check_policy(spec)


def _check_batched(spec: AugmentSpec) -> None:
    """Refuse what the batched engine does not offer."""
    offers = "crop, flip, color_jitter, pixel erasing, mixup and CutMix"
    if spec.policy is not None:
        raise refuse(
            "augmentation policy", f"{spec.policy} in the batched engine", offers, "engine timm, or policy none"
        )
    if spec.interpolation != "bicubic":
        raise refuse("augmentation interpolation", f"{spec.interpolation} in the batched engine", "bicubic")
    if spec.erase_prob > 0 and (spec.erase_mode, spec.erase_count) != ("pixel", 1):
        got = f"{spec.erase_count} boxes of {spec.erase_mode} in the batched engine"
        raise refuse("augmentation erasing", got, "one box of pixel noise")


def _check_policy(spec: AugmentSpec) -> None:
    """Refuse a policy that timm does not read, ignores a part of, or cannot apply."""
    name, *sections = str(spec.policy).split("-")
    for section in sections:
        named = name == "rand" and section.startswith("t")  # a set of operations
        known = _choices(section[1:]) is not _choices("") if named else re.search(r"\d", section)
        if not known:
            got = f"{spec.policy}, of which timm ignores {section!r}"
            raise refuse("augmentation policy", got, "parts that timm reads, such as inc1")
    with borrowed_generators():
        seed_all(0)
        try:
            assert name, "is empty"
            timm_transforms(spec)[1](Image.new("RGB", (32, 32), (99, 150, 201)))
        except Exception as error:  # timm, torch and Pillow have their own kinds
            why = " ".join(str(error).split())[:80]
            got, want = f"{spec.policy!r} ({type(error).__name__} {why})", f"a policy such as {_OFFICIAL_POLICY}"
            raise refuse("augmentation policy", got, want) from error


def default_spec(dataset: Dataset) -> AugmentSpec:
    """Choose the augmentation of a data set: digits keep most of the stroke and are never mirrored, fractals are
    cropped harder, photographs also get TinyViT's RandAugment; erasing is left to long schedules."""
    mean, std = dataset.mean, dataset.std
    spec = AugmentSpec(dataset.img_size, mean, std, dataset.interpolation)
    changes: dict[str, Any] = {"hflip": 0.5 if dataset.hflip else 0.0}
    if dataset.name == "digits":
        changes["scale"] = (0.6, 1.0)
    elif dataset.name != "fractals":
        changes["policy"] = _OFFICIAL_POLICY
    return replace(spec, **changes)


def preset_spec(name: str, dataset: Dataset) -> AugmentSpec:
    """Return a named pipeline for a data set; data that must not be mirrored never is. Raises InputError.

    `22k` and `finetune` are the official crop of 8 to 100 %, flip, RandAugment and erasing; `1k` adds mixup 0.8 and
    CutMix 1.0; `batched` crops as the default does and jitters colours where the default has a policy. Source: the
    TinyViT repository's configurations.
    """
    base = default_spec(dataset)
    if name == "default":
        return base
    if name == "batched":
        jitter = 0.4 if base.policy is not None else base.color_jitter
        return replace(base, engine="batched", policy=None, color_jitter=jitter)
    if name not in PRESETS:
        raise refuse("--augment", name, f"one of {', '.join(PRESETS)}")
    official = replace(base, scale=(0.08, 1.0), policy=_OFFICIAL_POLICY, color_jitter=None, erase_prob=0.25)
    return replace(official, mixup_alpha=0.8, cutmix_alpha=1.0) if name == "1k" else official


def changed_spec(spec: AugmentSpec, settings: AugmentConfig, *, mixing: bool = True) -> AugmentSpec:
    """Return an augmentation with the parts that the user set; without `mixing`, images stay unmixed.

    Raises InputError, also for colour jitter that timm would leave out.
    """
    changes = settings.changes()
    if not mixing:
        changes = {name: value for name, value in changes.items() if name not in ("mixup_alpha", "cutmix_alpha")}
    made = replace(spec, **changes)
    if changes.get("color_jitter") and made.policy is not None and "3a" not in made.policy:
        got = f"{made.color_jitter:g} beside the policy {made.policy}"
        raise refuse("--color-jitter", got, "one of them, as timm leaves it out", "add --policy none")
    return made


def augmentation_code(key: str, epoch: int, salt: int) -> int:
    """Derive the code of one image in one epoch: 64 bits, from nothing but the arguments."""
    text = f"{key}/{epoch}/{salt}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def augmentation_codes(raw_keys: NDArray[np.uint8], epoch: int, salt: int) -> NDArray[np.uint64]:
    """Derive the codes of keys given as bytes, uint8 [n, 16] -> uint64 [n], as `augmentation_code` does of each."""
    text, end = np.ascontiguousarray(raw_keys).tobytes().hex().encode(), f"/{epoch}/{salt}".encode()
    digests = b"".join(
        hashlib.blake2b(text[at : at + 32] + end, digest_size=8).digest() for at in range(0, len(text), 32)
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Lend the three global generators to one thread at a time and put their states back.

    Meanwhile posterizing to 0 bits gives black, as in Pillow before 13.
    """
    with _LOCK:
        python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
        posterize = ImageOps.posterize

        def to_black(image: Image.Image, bits: int) -> Image.Image:
            if bits > 0:
                return posterize(image, bits)
            return image.point([0] * 256 * len(image.getbands()))

        ImageOps.posterize = to_black
        try:
            yield
        finally:
            ImageOps.posterize = posterize
            random.setstate(python)
            np.random.set_state(arrays)
            torch.set_rng_state(tensors)


def timm_transforms(spec: AugmentSpec) -> Any:
    """Make timm's transforms: geometry, policy, tensor part."""
    # timm takes None for "no jitter"; its types do not.
    jitter: Any = spec.color_jitter
    return create_transform(
        spec.img_size,
        is_training=True,
        scale=spec.scale,
        ratio=spec.ratio,
        hflip=spec.hflip,
        auto_augment=spec.policy,
        color_jitter=jitter,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        re_prob=spec.erase_prob,
        re_mode=spec.erase_mode,
        re_count=spec.erase_count,
        separate=True,
    )


def seed_all(code: int) -> None:
    """Set the three generators that timm and torchvision draw from."""
    random.seed(code)
    np.random.seed((code & 0xFFFFFFFF, code >> 32))
    # Not torch.manual_seed: that also seeds every accelerator, which is slow.
    torch.default_generator.manual_seed(code & 0x7FFFFFFFFFFFFFFF)
