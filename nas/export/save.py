"""Saving a model: its weights, and the JSON beside them that `nas.export.load` reads back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.io import write_atomic, write_json
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
    grey_bits: int | None = None,
) -> dict[str, Any]:
    """Return a model's record as plain JSON: arch, counts, the timm call, what was measured.

    `preprocessing` has crop_pct, interpolation, mean and std; `sha256` is of the weights' file; `grey_bits` those of
    the training images (`nas.data.Dataset`).
    """
    model, kwargs = family.timm_call(arch, ctx)
    size = [ctx.in_chans, ctx.img_size, ctx.img_size]
    overlay = {"input_size": size, **preprocessing, "num_classes": ctx.num_classes}
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
        **({} if grey_bits is None else {"grey_bits": grey_bits}),
        "sha256": sha256,
    }


def preprocessing_of(dataset: Any) -> dict[str, Any]:
    """Return the preprocessing of a data set's images (`nas.data.Dataset`)."""
    resize = {"crop_pct": dataset.crop_pct, "interpolation": dataset.interpolation}
    return {**resize, "mean": list(dataset.mean), "std": list(dataset.std)}


def write_model(
    stem: Path,
    weights: bytes,
    *,
    family: Family,
    arch: Arch,
    ctx: Context,
    dataset: Any,
    score: Mapping[str, Any],
    throughput: Mapping[str, Any] | None,
) -> None:
    """Write `<stem>.safetensors` and `<stem>.json`: the weights of a timm model and its record."""
    stem.parent.mkdir(exist_ok=True)
    write_atomic(stem.with_name(f"{stem.name}.safetensors"), weights)
    record = model_json(
        family,
        arch,
        ctx,
        classes=dataset.classes,
        sha256=hashlib.sha256(weights).hexdigest(),
        score=score,
        throughput=throughput,
        preprocessing=preprocessing_of(dataset),
        grey_bits=dataset.grey_bits,
    )
    write_json(stem.with_name(f"{stem.name}.json"), record)
