"""What the tests of `nas.train` share: small archs, flags, and what a training left."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from label_cases import built
from safetensors.torch import load_file

from nas.data import DataSpec, prepare
from nas.train.__main__ import main
from nas.train.fit import _Loop
from tests.conftest import SMALL_ARCH

VIT = {**{"embed_dim": 32, "depth": 2, "head_dim": 16}, **{"mlp_ratio": 2.0, "patch_size": 8, "dist_token": False}}
TINY = {**SMALL_ARCH, "embed_dims": [32, 32, 64, 64], "depths": [1, 1, 1, 1]}
TINY |= {"mbconv_expand_ratio": 2.0, "mlp_ratio": 2.0}


def arch_file(folder: Path, **changes: Any) -> Path:
    path = folder / "arch.json"
    path.write_text(json.dumps({"family": "vit", "arch": {**VIT, **changes}}))
    return path


def flags(cache: Path, arch: Path | str, out: Path, *more: str) -> list[str]:
    return [
        *("--arch", str(arch), "--data", "digits", "--img-size", "32", "--max-images", "200"),
        *("--epochs", "2", "--threads", "1", "--cache-dir", str(cache), "--out", str(out)),
        *("--quiet", *more),
    ]


def trained(cache: Path, out: Path, *more: str, arch: Path | str | None = None) -> Path:
    """Train an arch, the small ViT by default; return the folder."""
    assert main(flags(cache, arch or arch_file(out.parent), out, *more)) == 0
    return out


def resume(cache: Path, out: Path, *more: str) -> int:
    """Continue a training; return the exit status."""
    return main(["--resume", str(out), "--cache-dir", str(cache), "--quiet", *more])


class Stop(Exception):
    """The power fails."""


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the power fail before a step."""
    take = _Loop._take

    def failing(self: Any, *args: Any) -> None:
        if args[-1] == step:
            raise Stop
        take(self, *args)

    patch.setattr(_Loop, "_take", failing)


def sets(**values: object) -> list[str]:
    """Return `--set name=value` for each value."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def evaluation(model: Path, cache: Path, *more: str) -> list[str]:
    """Return the flags that evaluate a model on the digits of `flags`."""
    start = ["--evaluate", str(model), "--data", "digits", "--max-images", "200"]
    return [*start, "--cache-dir", str(cache), "--quiet", "--json", *more]


def toy_store(out: Path, cache: Path, **request: Any) -> Path:
    """Build labels of the digits of `flags`, with a toy teacher."""
    return built(out, prepare(DataSpec("digits", 32, 200), cache), **request).folder


def run(*arguments: str, torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)] if torchrun else []
    return subprocess.run(
        [sys.executable, *start, "-m", "nas.train", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "log.csv").read_text().splitlines()))


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return dict(load_file(out / f"{name}.safetensors"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def dense_target(index: torch.Tensor, prob: torch.Tensor, tail: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Spell a stored label out, float32 [B, C]: the oracle of the losses."""
    each = tail.float() / (num_classes - index.shape[1])
    target = each[:, None].expand(-1, num_classes).clone()
    return target.scatter_(1, index, prob.float())
