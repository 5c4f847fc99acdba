"""The job that looks at the heads of a net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nas.core.progress import Tick
from space import Context, get_family


def heads(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    """Tell whether an arch in its context has a distillation token: `{"token": bool}`.

    Built without memory for its weights.
    """
    import torch

    from nas.train.losses import has_token

    family, context = get_family(spec["family"]), Context(**spec["context"])
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = family.build(family.arch(spec["arch"]), context)
    return {"token": has_token(model)}
