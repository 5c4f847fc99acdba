"""A network as a program of torch's own: `torch.export`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def export_program(model: nn.Module, images: Tensor, target: Path) -> Path:
    """Write a network in eval mode as a `.pt2` archive, for any number (two are given) of `images` [n, c, h, w]."""
    assert len(images) > 1, "one image would fix the number"
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    torch.export.save(program, target)
    return target
