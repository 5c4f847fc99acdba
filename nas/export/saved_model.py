"""A model that a run or a training saved: a JSON, and the weights beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.data_config import GREY_BITS
from nas.core.io import check_sha256, read_json, read_object
from space import Context, get_family
from space.errors import InputError, refuse
from space.family import Arch, Family

if TYPE_CHECKING:
    from torch import nn

    from nas.export.weights import State

SAVED = {
    **{"family": str, "arch": dict, "img_size": int, "num_classes": int},
    **{"timm": dict, "classes": list, "sha256": str},
}
"""The JSON of a saved model: required names and their types."""
PREPROCESSING = ("crop_pct", "interpolation", "mean", "std")
"""The preprocessing that is read from the JSON of a saved model."""


@dataclass(frozen=True)
class SavedModel:
    """A model of a run or a training: its JSON (`record`), its weights, and the run's settings.

    `run` is the `run.json` (or `train.json`) of its folder, empty if there is none; `state` are the weights where
    they are read already.
    """

    path: Path
    weights: Path
    record: Mapping[str, Any]
    family: Family
    arch: Arch
    context: Context
    run: Mapping[str, Any]
    state: State | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty where the weights' program wrote none."""
        return [str(name) for name in self.record["classes"]]

    @property
    def timm_call(self) -> tuple[str, dict[str, Any]]:
        """The name and arguments of the timm call: from the arch, whatever the file says."""
        return self.family.timm_call(self.arch, self.context)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The input's size and the preprocessing of an image."""
        overlay = self.record["timm"]["kwargs"]["pretrained_cfg_overlay"]
        size = self.context.img_size
        return {"input_size": [self.context.in_chans, size, size], **{name: overlay[name] for name in PREPROCESSING}}

    @property
    def grey_bits(self) -> int:
        """The bits of white in pictures of deep grey: those of the training images, if they had such pictures."""
        return int(self.record.get("grey_bits") or GREY_BITS)

    def build(self) -> nn.Module:
        """Build the network in plain timm, with its weights, in eval mode. Raises InputError."""
        import timm
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        name, kwargs = self.timm_call
        overlay = {**self.preprocessing, "num_classes": self.context.num_classes}
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
        assert isinstance(model, torch.nn.Module)
        try:
            model.load_state_dict(load_file(self.weights) if self.state is None else self.state, strict=True)
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            what = " ".join(str(error).split())[:160]
            raise refuse(str(self.weights), what, f"the weights of {self.path.name}") from None
        return model.train().eval()  # drops what eval mode may have cached


def read_saved_model(path: Path) -> SavedModel:
    """Read and check a saved model by its JSON. Raises InputError for what is missing, foreign or damaged."""
    record = read_object(path, "a model's JSON, such as a run's best.json", SAVED)
    try:
        family = get_family(str(record["family"]))
        arch = family.arch(record["arch"])
        try:
            overlay = record["timm"]["kwargs"]["pretrained_cfg_overlay"]
            channels = overlay["input_size"][0]
        except (KeyError, TypeError, IndexError):
            raise refuse("timm", "no input size", "what a run writes there") from None
        context = Context(record["img_size"], record["num_classes"], channels)
        family.check(arch, context)
        _check_classes_and_preprocessing(record["classes"], overlay, context)
        _check_grey_bits(record.get("grey_bits"))
        weights = path.with_suffix(".safetensors")
        check_sha256(weights, record["sha256"])
        return SavedModel(path, weights, record, family, arch, context, _run_settings(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def foreign_model(
    path: Path,
    state: State,
    family: Family,
    arch: Arch,
    context: Context,
    *,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
) -> SavedModel:
    """Describe a model that another program saved in `path`, as one of a training. Raises InputError."""
    from nas.core.io import file_sha256
    from nas.export.save import model_json

    try:
        given = {name: preprocessing.get(name) for name in PREPROCESSING}
        seen = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        _check_classes_and_preprocessing(list(classes) or [""] * context.num_classes, seen, context)
        _check_grey_bits(preprocessing.get("grey_bits"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    record = model_json(
        family,
        arch,
        context,
        classes=classes,
        sha256=file_sha256(path),
        score={},
        throughput=None,
        preprocessing=seen,
        grey_bits=preprocessing.get("grey_bits"),
    )
    return SavedModel(path, path, record, family, arch, context, {}, state)


def _check_classes_and_preprocessing(classes: Any, overlay: Any, context: Context) -> None:
    if not isinstance(classes, list) or len(classes) != context.num_classes:
        raise refuse("classes", classes, f"a list of {context.num_classes} names")
    for name, count in {"mean": context.in_chans, "std": context.in_chans, "crop_pct": 0}.items():
        value = overlay.get(name)
        values = value if count and isinstance(value, list) else [value]
        real = all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not real or (count and len(values) != count):
            raise refuse(name, value, f"{count} numbers" if count else "a number")
    if overlay.get("interpolation") not in ("bicubic", "bilinear", "nearest"):
        raise refuse("interpolation", overlay.get("interpolation"), "bicubic, bilinear or nearest")


def _check_grey_bits(value: Any) -> None:
    if value is not None and (type(value) is not int or not 8 <= value <= 32):
        raise refuse("grey_bits", value, "8 to 32")


def _run_settings(path: Path) -> Mapping[str, Any]:
    """Read the settings of the run or training that a model belongs to; empty without."""
    for folder in (path.parent, path.parent.parent):
        for name in ("run.json", "train.json"):
            if (folder / name).is_file():
                data = read_json(folder / name, f"the {name} of a run")
                return data if isinstance(data, dict) else {}
    return {}
