"""Named pipelines of augmentation: the data's default, TinyViT's official ones, the batched one."""

from __future__ import annotations

from dataclasses import replace

from nas.data import Dataset
from nas.data.augment.spec import AugmentSpec, default_spec
from space.errors import refuse

PRESETS = ("default", "22k", "1k", "finetune", "batched")
_OFFICIAL_POLICY = "rand-m9-mstd0.5-inc1"


def preset_spec(name: str, dataset: Dataset) -> AugmentSpec:
    """Give a named pipeline for a data set. Raises InputError.

    `22k` (distillation on ImageNet-22k) and `finetune` (22k to 1k) are the official random resized
    crop of 8 to 100 %, flip, RandAugment and erasing; `1k` (from scratch) adds mixup 0.8 and CutMix
    1.0. Data that must not be mirrored never is. `batched` crops as the default does, jitters
    colours where the default has a policy, and works on whole batches.
    Source: the TinyViT repository's configurations.
    """
    base = default_spec(dataset)
    if name == "default":
        return base
    if name == "batched":
        jitter = 0.4 if base.policy is not None else base.color_jitter
        return replace(base, engine="batched", policy=None, color_jitter=jitter)
    if name not in PRESETS:
        raise refuse("--augment", name, f"one of {', '.join(PRESETS)}")
    official = replace(
        base, scale=(0.08, 1.0), policy=_OFFICIAL_POLICY, color_jitter=None, erase_prob=0.25
    )
    return replace(official, mixup_alpha=0.8, cutmix_alpha=1.0) if name == "1k" else official
