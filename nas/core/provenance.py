"""Where a run comes from: data, library versions and commit, for `run.json`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide results."""
    names = ("torch", "torchvision", "timm", "optuna", "numpy", "pillow", "safetensors", "fvcore")
    found = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit() -> str | None:
    """Return the commit of this checkout, with `+` when the work tree differs; None elsewhere."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    asked = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        head, changed = (
            subprocess.run([*git, *what], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for what in asked
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")
