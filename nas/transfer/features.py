"""What a frozen network makes of images: pooled features of a data set's sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from nas.core.progress import Tick, no_tick
from nas.data import Split
from nas.data.augment.spec import AugmentSpec, eval_batch
from nas.export.weights import place
from nas.transfer.probes import Side

BATCH = 32  # larger ones leave a CPU's caches: 20 to 30 % slower at 48 px


def pooled(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Give what the classifier would see: [B, 3, S, S] -> float32 [B, D]; any timm network."""
    net: Any = model
    found: torch.Tensor = net.forward_head(net.forward_features(images), pre_logits=True)
    return found.flatten(1).float()


def side_of(
    model: nn.Module, split: Split, spec: AugmentSpec, device: str, tick: Tick = no_tick
) -> Side:
    """Give the pooled features of one side, seen as evaluation sees it. `tick` counts images.

    Moves the model, in eval mode, to `device` as training does.
    """
    place(model, device)
    rows = []
    with torch.no_grad():
        for start in range(0, len(split), BATCH):
            pixels = np.asarray(split.pixels[start : start + BATCH])
            images = eval_batch(pixels, spec).to(device, memory_format=torch.channels_last)
            rows.append(pooled(model, images).cpu().numpy())
            tick(float(len(pixels)))
    return Side(np.concatenate(rows), np.asarray(split.labels))
