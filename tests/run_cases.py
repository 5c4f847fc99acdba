"""What tests of whole runs share: settings of a small run, an executor that counts, its tables."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished

from nas.jobs.job import JobFunction
from nas.measure.interference import Disturbance
from tests._inline import InlineExecutor


def settings(finished: Finished, **more: Any) -> dict[str, Any]:
    """The flags of the finished run, for Python."""
    return {
        "seed": finished.flags[1],
        "target_params": "400K",
        "effort": "smoke",
        "threads": 1,
        "img_size": 32,
        "max_images": 200,
        "teacher_epochs": 2,
        "cache_dir": finished.cache,
        "max_visits": 4,
        "candidates_per_step": 3,
        "train_per_step": 2,
        "final_epochs": 1,
        "steps": 2,
        **more,
    }


class Calm:
    """Other tests run beside these: nothing disturbs."""

    def __init__(self, device: str) -> None: ...

    def read(self) -> Disturbance:
        return Disturbance(0.0, "")


def one_calm_thread(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, which an inline executor's runs are bound to, and an undisturbed machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    patch.setattr("nas.measure.interleave.Watch", Calm)
    yield
    torch.set_num_threads(before)


class Counting(InlineExecutor):
    """Runs jobs here and remembers which there were."""

    def __init__(self) -> None:
        self.jobs: list[tuple[JobFunction, str]] = []
        super().__init__(lambda job: self.jobs.append((job.function, job.key)))

    @property
    def kinds(self) -> list[str]:
        return [function.__name__ for function, _ in self.jobs]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as lines:
        return list(csv.DictReader(lines))


def trials(folder: Path) -> list[dict[str, str]]:
    return table(folder / "trials.csv")
