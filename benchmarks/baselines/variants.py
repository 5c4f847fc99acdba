"""Ways to prune a network by other tools, and whether the tools are installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

INSTALL = {"torch_pruning": "pip install -e '.[rivals]'", "modelopt": "pip install nvidia-modelopt requests"}
"""What the tools are installed by, under the name that they are imported by."""


@dataclass(frozen=True)
class Variant:
    """One way to prune: tool, importance, spread over the layers, and what becomes of the heads.

    `heads`: `kept` (attention's inner widths are left alone), `dims` (the tool is told the number
    of heads and narrows each) or `pruned` (whole heads go).
    """

    name: str
    tool: str = "torch_pruning"
    importance: str = "magnitude"
    everywhere: bool = False
    heads: str = "kept"


VARIANTS = (
    Variant("Torch-Pruning, as its example for timm", heads="dims"),
    Variant("Torch-Pruning, whole heads", heads="pruned"),
    Variant("Torch-Pruning, magnitude, local"),
    Variant("Torch-Pruning, magnitude, global", everywhere=True),
    Variant("Torch-Pruning, Taylor, local", importance="taylor"),
    Variant("Torch-Pruning, Taylor, global", importance="taylor", everywhere=True),
    Variant("ModelOpt FastNAS", tool="modelopt"),
)


def not_installed(tool: str) -> str | None:
    """Return how to install a tool that is not there, None when it is."""
    if importlib.util.find_spec(tool) is not None:
        return None
    return f"not run: {tool} is not installed; {INSTALL[tool]}"
