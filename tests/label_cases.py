"""Small label stores for tests: real digits, a toy teacher, the true building code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nas.data import Dataset
from nas.export.teacher_net import TeacherInfo
from nas.labels.build import begin_store, build_shards
from nas.labels.request import LabelRequest
from nas.labels.store import LabelStore, open_store


class Toy:
    """A linear teacher that counts its images; after `fail_after` of them it is interrupted."""

    def __init__(self, pixels: int, classes: int, fail_after: float = float("inf")) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.randn(pixels, classes, generator=generator) * 0.2
        self.images = 0
        self.fail_after = fail_after

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.images >= self.fail_after:
            raise KeyboardInterrupt
        self.images += len(inputs)
        return inputs.flatten(1) @ self.weights


def toy_for(dataset: Dataset, classes: int = 10, fail_after: float = float("inf")) -> Toy:
    return Toy(3 * dataset.img_size**2, classes, fail_after)


def teacher_info(classes: int = 10, **changes: Any) -> TeacherInfo:
    values: dict[str, Any] = {
        **{"folder": "", "id": "toy", "digest": "abc", "model": "toy", "kwargs": {}},
        **{"classes": tuple(map(str, range(classes))), "mean": (0.0,), "std": (1.0,), "input_size": None},
        **{"student_mean": (0.0,), "student_std": (1.0,), "epochs": 0, "holdout_top1": 0.0},
        **{"holdout_top1_se": 0.0, "holdout_images": 0, "notes": ()},
        **changes,
    }
    return TeacherInfo(**values)


def begun(folder: Path, dataset: Dataset, dropped: str | None = None, classes: int = 10, **request: Any) -> LabelStore:
    asked = LabelRequest(**{"epochs": 2, "topk": 3, **request})
    return begin_store(folder, dataset, teacher_info(classes), asked, made_by={}, named=True, dropped=dropped)


def built(folder: Path, dataset: Dataset, dropped: str | None = None, classes: int = 10, **request: Any) -> LabelStore:
    store = begun(folder, dataset, dropped, classes, **request)
    build_shards(store, dataset, toy_for(dataset, classes))
    return open_store(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a store but hidden ones: locks, and drafts of a builder that was killed."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name[0] != "."}
