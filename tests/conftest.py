"""Shared by the tests that need a whole run: one small arch, one cache, one finished run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nas.data import Dataset
    from nas.labels.store import LabelStore

# As the executor does for its workers; it must be set before anything imports torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

SMALL_ARCH = {
    "embed_dims": [64, 64, 96, 128],
    "depths": [1, 1, 2, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}


@dataclass(frozen=True)
class Finished:
    """A finished run of a few seconds: its folder, and the flags and cache that repeat it."""

    folder: Path
    flags: list[str]
    cache: Path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Contract a 590K-parameter arch to 400K on 200 digits, once for all tests."""
    from nas.contract.__main__ import main

    base = tmp_path_factory.mktemp("run")
    (base / "small.json").write_text(json.dumps(SMALL_ARCH))
    cache = base / "cache"
    flags = [
        *("--seed", str(base / "small.json"), "--target-params", "400K", "--effort", "smoke"),
        *("--steps", "2", "--candidates-per-step", "4", "--threads", "1", "--img-size", "32"),
        *("--max-images", "200", "--teacher-epochs", "2", "--final-epochs", "1"),
        *("--cache-dir", str(cache)),
    ]
    folder = base / "finished"
    assert main([*flags, "--out", str(folder), "--quiet"]) == 0
    return Finished(folder, flags, cache)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of data and teachers for all tests that do not look into it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def digits(cache: Path) -> Dataset:
    """Two hundred digits at 32 px, as `train_cases.flags` asks for them."""
    from nas.data import DataSpec, prepare

    return prepare(DataSpec("digits", img_size=32, max_images=200), cache)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eighty digits at 32 px."""
    from nas.data import DataSpec, prepare

    return prepare(DataSpec("digits", img_size=32, max_images=80), tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    """Their labels: three epochs, the four likeliest classes."""
    from label_cases import built

    return built(tmp_path_factory.mktemp("labels") / "store", dataset, epochs=3, topk=4)
