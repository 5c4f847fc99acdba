"""One 64-bit code per image and epoch, from which the same input follows again.

Engine "timm": timm and torchvision draw from three module-global generators (random, numpy, torch);
all three are seeded with the code for one image and put back afterwards. Calls inside a process are
serialised. Engine "batched": see `nas.data.augment.batched_engine`. Mixing: see
`nas.data.augment.mixing`.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform

from nas.data import Dataset
from nas.data.sealed_files import digest_of
from space.errors import refuse

LOCK = threading.RLock()
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
    """Everything that decides an input, given the stored pixels and a code.

    `scale` and `ratio` bound the random resized crop; `hflip`, `erase_prob`, `mix_prob` and
    `mix_switch_prob` (CutMix where both are on) are probabilities; `policy` is a timm auto-augment
    string or None; `color_jitter` a strength or None (timm leaves it out under a policy);
    `erase_mode` and `erase_count` are as timm's RandomErasing takes them; the alphas are of the
    beta distributions of mixup and CutMix, 0 for off. `engine` "timm" works image by image with
    timm's own transforms, "batched" on whole batches with torch. `posterize_zero` names what
    posterizing to 0 bits gives: "black", as in Pillow before 13, which raises instead. Raises
    InputError for what does not exist or cannot be replayed.
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
        """Tell whether images are mixed with partners."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON, the inverse of `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> AugmentSpec:
        """Read plain JSON; raises InputError for unknown or missing fields."""
        known = {f.name for f in fields(AugmentSpec)}
        if set(value) != known:
            odd = ", ".join(sorted(set(value) ^ known))
            raise refuse("augmentation", f"unknown or missing {odd}", "this version's fields")
        read: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in value.items()
        }
        try:
            return AugmentSpec(**read)
        except (AttributeError, IndexError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise refuse("augmentation", why, "this version's fields") from None

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
            "augmentation policy",
            f"{spec.policy} in the batched engine",
            offers,
            "engine timm, or policy none",
        )
    if spec.interpolation != "bicubic":
        raise refuse(
            "augmentation interpolation", f"{spec.interpolation} in the batched engine", "bicubic"
        )
    if spec.erase_prob > 0 and (spec.erase_mode, spec.erase_count) != ("pixel", 1):
        got = f"{spec.erase_count} boxes of {spec.erase_mode} in the batched engine"
        raise refuse("augmentation erasing", got, "one box of pixel noise")


def _check_policy(spec: AugmentSpec) -> None:
    """Refuse a policy that timm does not read, would leave out a part of, or cannot apply."""
    name, *sections = str(spec.policy).split("-")
    for section in sections:
        named = name == "rand" and section.startswith("t")  # a set of operations
        known = _choices(section[1:]) is not _choices("") if named else re.search(r"\d", section)
        if not known:
            got = f"{spec.policy}, of which timm ignores {section!r}"
            raise refuse("augmentation policy", got, "parts that timm reads, such as inc1")
    with LOCK, borrowed_generators(), _old_posterize():
        seed_all(0)
        try:
            assert name, "is empty"
            _timms(spec)[1](Image.new("RGB", (32, 32), (99, 150, 201)))
        except Exception as error:  # timm, torch and Pillow have their own kinds
            why = " ".join(str(error).split())[:80]
            raise refuse(
                "augmentation policy",
                f"{spec.policy!r} ({type(error).__name__} {why})",
                "a policy that timm reads, such as rand-m9-mstd0.5-inc1",
            ) from error


def default_spec(dataset: Dataset) -> AugmentSpec:
    """Choose the augmentation of a data set.

    Digits keep most of the stroke (crops of 60 % and more) and are never mirrored; fractals are
    cropped harder; photographs also get TinyViT's RandAugment. Random erasing is left to long
    schedules.
    """
    mean, std = dataset.mean, dataset.std
    spec = AugmentSpec(dataset.img_size, mean, std, dataset.interpolation)
    changes: dict[str, Any] = {"hflip": 0.5 if dataset.hflip else 0.0}
    if dataset.name == "digits":
        changes["scale"] = (0.6, 1.0)
    elif dataset.name != "fractals":
        changes["policy"] = "rand-m9-mstd0.5-inc1"
    return replace(spec, **changes)


def augmentation_code(key: str, epoch: int, salt: int) -> int:
    """Derive the code of one image in one epoch: 64 bits, from nothing but the arguments."""
    text = f"{key}/{epoch}/{salt}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def augmentation_codes(raw_keys: NDArray[np.uint8], epoch: int, salt: int) -> NDArray[np.uint64]:
    """Derive the codes of keys given as bytes, uint8 [n, 16] -> uint64 [n], as `augmentation_code`
    does of each."""
    text, end = np.ascontiguousarray(raw_keys).tobytes().hex().encode(), f"/{epoch}/{salt}".encode()
    digests = b"".join(
        hashlib.blake2b(text[at : at + 32] + end, digest_size=8).digest()
        for at in range(0, len(text), 32)
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Lend the three global generators and put their states back."""
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)


@contextmanager
def _old_posterize() -> Iterator[None]:
    """Give 0 bits their old meaning while timm's policy runs; timm calls through the module."""
    original = ImageOps.posterize

    def posterize(image: Image.Image, bits: int) -> Image.Image:
        return original(image, bits) if bits > 0 else image.point([0] * 256 * len(image.getbands()))

    ImageOps.posterize = posterize
    try:
        yield
    finally:
        ImageOps.posterize = original


def _timms(spec: AugmentSpec) -> Any:
    """Have timm make its transforms: geometry, policy, tensor part."""
    # timm takes None for "no jitter" but does not say so in its types.
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


class Augmenter:
    """Applies a specification to stored pixels; the code decides every random choice."""

    def __init__(self, spec: AugmentSpec) -> None:
        assert spec.engine == "timm", "the batched engine has an augmenter of its own"
        self.spec = spec
        geometry, policy, final = _timms(spec)
        self._on_image: Sequence[Callable[[Any], Any]] = (*geometry.transforms, *policy.transforms)
        # The last one erases; turning into a tensor and normalising is done batch by batch here.
        self._erase: Callable[[Any], Any] | None = (
            final.transforms[-1] if spec.erase_prob > 0 else None
        )

    def __call__(self, pixels: NDArray[np.uint8], code: int) -> torch.Tensor:
        """Augment one image, uint8 [S, S, 3] -> normalised float32 [3, img_size, img_size]."""
        return self.batch(pixels[None], [code])[0]

    def batch(self, pixels: NDArray[np.uint8], codes: Sequence[int]) -> torch.Tensor:
        """Augment images one by one, uint8 [n, S, S, 3] -> float32 [n, 3, img_size, img_size]."""
        views = np.empty((len(pixels), self.spec.img_size, self.spec.img_size, 3), dtype=np.uint8)
        erased: list[torch.Tensor] = []
        with LOCK, borrowed_generators(), _old_posterize():
            for row, code in enumerate(codes):
                seed_all(int(code))
                image: Any = Image.fromarray(pixels[row])
                for transform in self._on_image:
                    image = transform(image)
                views[row] = image
                if self._erase is not None:  # draws from where this image's transforms stopped
                    erased.append(self._erase(_normalised(views[row : row + 1], self.spec)[0]))
        return torch.stack(erased) if erased else _normalised(views, self.spec)


def seed_all(code: int) -> None:
    """Set the three generators that timm and torchvision draw from."""
    random.seed(code)
    np.random.seed((code & 0xFFFFFFFF, code >> 32))
    # Not torch.manual_seed: that also seeds every accelerator, which is slow.
    torch.default_generator.manual_seed(code & 0x7FFFFFFFFFFFFFFF)


def _normalised(pixels: NDArray[np.uint8], spec: AugmentSpec) -> torch.Tensor:
    """Scale and normalise like torchvision, uint8 [n, H, W, 3] -> float32 [n, 3, H, W]."""
    inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    mean = torch.tensor(spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(spec.std).view(1, 3, 1, 1)
    return inputs.to(torch.float32).div_(255).sub_(mean).div_(std)


def eval_batch(pixels: NDArray[np.uint8], spec: AugmentSpec) -> torch.Tensor:
    """Take the centre and normalise, as timm evaluates.

    uint8 [n, S, S, 3] -> float32 [n, 3, img_size, img_size].
    """
    side = pixels.shape[1]
    start = round((side - spec.img_size) / 2.0)
    end = start + spec.img_size
    return _normalised(pixels[:, start:end, start:end], spec)
