"""The network to check: a run's model, or a folder in timm's hub layout, as timm loads it.

A run's model is exported to a folder first: it and its export are the same network here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.core.io import read_json
from nas.export.hub import export_timm
from nas.export.load import HubFolder, find_network
from space import Context
from space.errors import refuse

LEAST_STRIDE = 4
"""Of the maps in a pyramid, as in feature pyramid networks; finer ones cost most and help least."""
MOST_LEVELS = 4
_HUB = "a folder in timm's hub layout: config.json, model.safetensors"


@dataclass(frozen=True)
class Backbone:
    """A network in timm's hub layout, and how it sees images: `img_size` pixels a side, normalised.

    `trained_size` is what it was trained at. Fresh weights are timm's, from the random seed alone.
    """

    folder: Path
    img_size: int
    trained_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sized: bool
    notes: tuple[str, ...] = ()

    def pyramid(self, random_seed: int | None) -> nn.Module:
        """Build what gives feature maps [B, C, H, W], finest first, likewise; see `levels`."""
        with torch.device("meta"):
            info: Any = getattr(self.classifier(0), "feature_info", None)
        if not info:
            raise refuse("--checks", "segment", "a network with feature maps (timm's features_only)", "leave it out")
        indices = levels([int(f["reduction"]) for f in info])
        return self.classifier(random_seed, features_only=True, out_indices=indices)

    def classifier(self, random_seed: int | None, **kwargs: Any) -> nn.Module:
        """Build the whole network in eval mode; fresh weights with a seed, its own with None."""
        import timm

        if self.sized:
            kwargs["img_size"] = self.img_size
        with torch.random.fork_rng(devices=[]):
            if random_seed is not None:
                torch.default_generator.manual_seed(random_seed)
            model = timm.create_model(f"local-dir:{self.folder}", pretrained=random_seed is None, **kwargs)
        assert isinstance(model, nn.Module)
        return model.eval()


def levels(strides: list[int]) -> tuple[int, ...]:
    """Choose the maps of the pyramid by their strides in order of depth: indices.

    The deepest map of each stride from 4 pixels on; of a network of one stride, as plain ViTs, its last 4 maps.
    """
    if len(set(strides)) == 1:
        return tuple(range(max(0, len(strides) - MOST_LEVELS), len(strides)))
    deepest = {stride: at for at, stride in enumerate(strides)}
    kept = {s: at for s, at in deepest.items() if s >= LEAST_STRIDE} or deepest
    return tuple(sorted(kept.values()))


def open_backbone(source: Path, img_size: int | None, scratch: Path) -> Backbone:
    """Find, check and try a network; a run's model is exported into the folder `scratch`.

    `img_size` None is its own. Raises InputError for what is missing or damaged, for an image size that it does not
    take, and for input that is no RGB.
    """
    folder, named = source, find_network(source, "MODEL")
    if not isinstance(named, HubFolder):
        saved = named.saved()
        if img_size is not None:
            saved.family.check(saved.arch, Context(img_size, saved.context.num_classes, saved.context.in_chans))
        folder = export_timm(saved, scratch / "model")
    found = _described(folder, source, img_size)
    _tried(found, source)
    return replace(found, notes=named.notes)


def _described(folder: Path, source: Path, img_size: int | None) -> Backbone:
    """Read how a folder's network sees images."""
    if not (folder / "model.safetensors").is_file():  # timm would take a pickle beside it
        raise refuse(str(source), "no model.safetensors in it", _HUB, "export the run again")
    config = read_json(folder / "config.json", _HUB)
    try:
        seen, given = config["pretrained_cfg"], config.get("model_args") or {}
        channels, trained_size = int(seen["input_size"][0]), int(seen["input_size"][-1])
        mean, std = (tuple(float(v) for v in seen[name]) for name in ("mean", "std"))
        if not len(mean) == len(std) == channels or not all(map(math.isfinite, mean)):
            raise ValueError("mean and std")
        if not all(0 < v < math.inf for v in std) or min(trained_size, channels) < 1:
            raise ValueError("std or input_size")
        sized = "img_size" in given or bool(seen.get("fixed_input_size"))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        got = f"a config.json without sound preprocessing ({type(error).__name__}: {error})"
        raise refuse(str(source), got, _HUB, "export the run again") from None
    if channels != 3:
        raise refuse(str(source), f"input of {channels} channels", "3, as images here are RGB")
    size = trained_size if img_size is None else img_size
    return Backbone(folder, size, trained_size, mean, std, sized and size != trained_size)


def _tried(found: Backbone, source: Path) -> None:
    """Load the weights and run one image; what fails is refused in one line."""
    try:
        model: Any = found.classifier(None)
    except Exception as error:  # timm raises kinds of its own; each means "not to be had"
        got = f"{type(error).__name__}: {error}"
        if found.sized:
            raise refuse("--img-size", f"{found.img_size} ({got})", _sizes(found)) from None
        raise refuse(str(source), got, f"{_HUB} that timm loads", "export the run again") from None
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = patch if isinstance(patch, tuple) else (patch,) if isinstance(patch, int) else ()
    if any(found.img_size % side for side in sides):  # timm would cut the image without a word
        raise refuse("--img-size", found.img_size, f"a multiple of the patch size {sides[0]}")
    try:
        with torch.no_grad():
            model.forward_features(torch.zeros(1, 3, found.img_size, found.img_size))
    except Exception as error:  # layers raise anything on a size that they do not take
        got = f"{found.img_size} ({type(error).__name__}: {error})"
        raise refuse("--img-size", got, _sizes(found)) from None


def _sizes(found: Backbone) -> str:
    return f"an image size that the network takes, such as its own {found.trained_size}"
