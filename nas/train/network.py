"""The net of a full training, with fresh weights and its regularisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from space import Context
from space.errors import refuse
from space.family import Arch, Family


def build(
    family: Family, arch: Arch, ctx: Context, *, drop_path: float, drop_rate: float, seed: int
) -> nn.Module:
    """Build a net with fresh weights, which follow from `seed` alone, and its regularisation."""
    options: dict[str, Any] = {"drop_path_rate": drop_path, "drop_rate": drop_rate}
    asked = {name: value for name, value in options.items() if value}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return family.build(arch, ctx, **asked)
        except TypeError as error:
            if not asked:
                raise
            told = ", ".join(f"{name}={value:g}" for name, value in asked.items())
            raise refuse(
                "drop_path, drop_rate",
                told,
                f"0 for family {family.name}",
                f"its net takes none ({error})",
            ) from None


def freeze_batch_norms(model: nn.Module) -> None:
    """Put batch norms into eval mode: they use and keep the statistics that they have."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
