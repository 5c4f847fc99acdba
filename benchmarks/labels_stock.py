"""What the label benchmarks share: formula-driven images, a student that is small, stores of both
engines by a teacher whose quality does not matter there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nas.data import Dataset, DataSpec, prepare
from nas.export.trained_teacher import TeacherInfo
from nas.export.weights import place
from nas.labels.build import build_pieces
from nas.labels.request import LabelRequest, begin_store
from nas.labels.store import LabelStore, open_store
from space import Context, get_family

SMALL: dict[str, Any] = {
    "embed_dims": [32, 64, 128, 192],
    "depths": [1, 2, 4, 2],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}
"""About a tenth of the 21M's parameters."""


def data_for(cache: Path, img_size: int, images: int) -> Dataset:
    """Render or find formula-driven images: 100 classes, about so many to train on."""
    spec = DataSpec("fractals", img_size=img_size, proxy_images=round(images / 0.8))
    return prepare(spec, cache)


def store_for(cache: Path, dataset: Dataset, engine: str, epochs: int = 2) -> LabelStore:
    """Build or find a store by a fixed random linear teacher: what is said costs the same."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3 * dataset.img_size**2, dataset.num_classes, generator=generator) * 0.05
    info = TeacherInfo(
        folder="",
        id="linear",
        digest="0" * 32,
        model="linear",
        kwargs={},
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        input_size=None,
        student_mean=dataset.mean,
        student_std=dataset.std,
        epochs=0,
        holdout_top1=0.0,
        holdout_top1_se=0.0,
        holdout_images=0,
        notes=(),
    )
    preset = "batched" if engine == "batched" else "default"
    store = begin_store(
        cache / "labels",
        dataset,
        info,
        LabelRequest(epochs=epochs, preset=preset),
        made_by={},
        named=False,
    )
    build_pieces(store, dataset, lambda inputs: inputs.flatten(1) @ weights)
    return open_store(store.folder)


def teacher_of(name: str, dataset: Dataset, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Build a TinyViT to run along as a teacher, with fresh weights, in eval mode."""
    family = get_family("tinyvit")
    arch = family.arch(SMALL) if name == "small" else family.seed(name)
    net = place(family.build(arch, Context(dataset.img_size, dataset.num_classes)), device).eval()

    def said(inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = net(inputs.to(memory_format=torch.channels_last))
        return out

    return said
