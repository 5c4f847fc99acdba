"""Where a run comes from: data, library versions and commit, for `run.json`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from nas.data import Dataset


def dataset_card(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "classes": len(dataset.classes),
        "labelled_by": dataset.labelled_by,
        "img_size": dataset.img_size,
        "train": len(dataset.train.labels),
        "holdout": len(dataset.holdout.labels),
        "test": len(dataset.test.labels),
        "broken": list(dataset.broken[:100]),
        "notes": list(dataset.notes),
    }


def versions() -> dict[str, str]:
    names = ("torch", "torchvision", "timm", "optuna", "numpy", "pillow", "safetensors", "fvcore")
    found = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit() -> str | None:
    """Return the commit of this checkout, with `+` when the work tree differs; None elsewhere."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")
