"""A model that a run left, read back: its files checked, the network built with its weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.io import read_json
from space import Context, get_family
from space.errors import InputError, refuse
from space.family import Arch, Family

if TYPE_CHECKING:
    from torch import nn

NEEDED = ("family", "arch", "img_size", "num_classes", "timm", "classes", "sha256")
PREPROCESSING = ("crop_pct", "interpolation", "mean", "std")
"""What is taken over of the preprocessing that the file names."""


@dataclass(frozen=True)
class Left:
    """A model that a run left: what its JSON tells, its weights, and the run's own account.

    `run` is the `run.json` (or `train.json`) beside it, empty where there is none.
    """

    path: Path
    weights: Path
    told: Mapping[str, Any]
    family: Family
    arch: Arch
    context: Context
    run: Mapping[str, Any]

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return [str(name) for name in self.told["classes"]]

    @property
    def call(self) -> tuple[str, dict[str, Any]]:
        """What timm builds the network from: of the arch, whatever the file says of timm."""
        return self.family.timm_call(self.arch, self.context)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The input's size and what is done to an image before."""
        overlay = self.told["timm"]["kwargs"]["pretrained_cfg_overlay"]
        size = self.context.img_size
        return {
            "input_size": [self.context.in_chans, size, size],
            **{name: overlay[name] for name in PREPROCESSING},
        }

    def build(self) -> nn.Module:
        """Build the network in plain timm, with its weights, in eval mode."""
        import timm
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        name, kwargs = self.call
        overlay = {**self.preprocessing, "num_classes": self.context.num_classes}
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
        assert isinstance(model, torch.nn.Module)
        try:
            model.load_state_dict(load_file(self.weights), strict=True)
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            what = " ".join(str(error).split())[:160]
            raise refuse(str(self.weights), what, f"the weights of {self.path.name}") from None
        return model.train().eval()  # drops what eval mode may have cached


def left_by(source: Path) -> Left:
    """Find and check the model of a run's folder, of a JSON in it, or of the weights beside one.

    Raises `InputError` for what is missing, of another format, or damaged.
    """
    path = source
    if source.is_dir():
        path = source / "best.json"
        if not path.is_file():
            remedy = "name a model of its family/ instead"
            if (source / "run.json").is_file():
                remedy = f"finish it (python -m nas.contract --resume {source}), or {remedy}"
            raise refuse(str(source), "no best.json in it", "the folder of a finished run", remedy)
    elif source.suffix == ".safetensors":
        path = source.with_suffix(".json")
    told = read_json(path, "a model that a run left")
    want = f"a model's JSON with {', '.join(NEEDED)}"
    if not isinstance(told, dict) or any(name not in told for name in NEEDED):
        raise refuse(str(path), "another format", want, "name a run's folder or its best.json")
    try:
        family = get_family(str(told["family"]))
        arch = family.arch(told["arch"])
        context = Context(told["img_size"], told["num_classes"], _channels(told))
        family.check(arch, context)
        found = Left(
            path, path.with_suffix(".safetensors"), told, family, arch, context, _run(path)
        )
        _check(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def _channels(told: Mapping[str, Any]) -> Any:
    try:
        return told["timm"]["kwargs"]["pretrained_cfg_overlay"]["input_size"][0]
    except (KeyError, TypeError, IndexError):
        raise refuse("timm", "no input size", "what a run writes there") from None


def _check(found: Left) -> None:
    """Check preprocessing, class names and that the weights are those that were written."""
    classes = found.told["classes"]
    if not isinstance(classes, list) or len(classes) != found.context.num_classes:
        raise refuse("classes", classes, f"a list of {found.context.num_classes} names")
    overlay = found.told["timm"]["kwargs"]["pretrained_cfg_overlay"]
    numbers = {"mean": found.context.in_chans, "std": found.context.in_chans, "crop_pct": 0}
    for name, count in numbers.items():
        value = overlay.get(name)
        values = value if count and isinstance(value, list) else [value]
        real = all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not real or (count and len(values) != count):
            raise refuse(name, value, f"{count} numbers" if count else "a number")
    if overlay.get("interpolation") not in ("bicubic", "bilinear", "nearest"):
        raise refuse("interpolation", overlay.get("interpolation"), "bicubic, bilinear or nearest")
    if not found.weights.is_file():
        raise refuse("weights", f"no {found.weights.name}", "the file beside it", "restore it")
    digest = hashlib.sha256(found.weights.read_bytes()).hexdigest()
    if digest != found.told["sha256"]:
        raise refuse(
            found.weights.name,
            f"sha256 {digest[:12]}...",
            f"{str(found.told['sha256'])[:12]}..., as written",
            "it is damaged: restore it",
        )


def _run(path: Path) -> Mapping[str, Any]:
    """Read the account of the run or training that a model lies in, where there is one."""
    for folder in (path.parent, path.parent.parent):
        for name in ("run.json", "train.json"):
            if (folder / name).is_file():
                data = read_json(folder / name, f"the {name} of a run")
                return data if isinstance(data, dict) else {}
    return {}
