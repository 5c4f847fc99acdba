"""What is written beside a model's weights, for `nas.export.model` to read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from space import REFERENCE_CONTEXT, Context
from space.family import Arch, Family


def model_json(
    family: Family,
    arch: Arch,
    ctx: Context,
    *,
    classes: Sequence[str],
    sha256: str,
    score: Mapping[str, Any],
    throughput: Mapping[str, Any] | None,
    preprocessing: Mapping[str, Any],
) -> dict[str, Any]:
    """Tell of a model, as plain JSON: its arch and counts, the timm call, what was measured.

    `preprocessing` has crop_pct, interpolation, mean and std; `sha256` is of the weights' file.
    """
    model, kwargs = family.timm_call(arch, ctx)
    overlay = {
        "input_size": [ctx.in_chans, ctx.img_size, ctx.img_size],
        **preprocessing,
        "num_classes": ctx.num_classes,
    }
    return {
        "family": family.name,
        "arch": family.to_dict(arch),
        "key": family.key(arch, ctx),
        "params": family.count_params(arch, ctx),
        "params_1000": family.count_params(arch, REFERENCE_CONTEXT),
        "macs": family.count_macs(arch, ctx),
        "img_size": ctx.img_size,
        "num_classes": ctx.num_classes,
        "throughput": None if throughput is None else dict(throughput),
        "score": dict(score),
        "classes": list(classes),
        "timm": {"model": model, "kwargs": {**kwargs, "pretrained_cfg_overlay": overlay}},
        "sha256": sha256,
    }


def preprocessing_of(dataset: Any) -> dict[str, Any]:
    """Say what is done to an image of a data set (`nas.data.Dataset`) before the net sees it."""
    return {
        "crop_pct": dataset.crop_pct,
        "interpolation": dataset.interpolation,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }
