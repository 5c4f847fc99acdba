"""A small segmentation on top of the feature maps, trained on formula-driven masks.

The head is a light feature pyramid: every map, normalised, through a 1x1 convolution, summed from
the coarsest to the finest, one 3x3 convolution, a 1x1 to the classes, bilinear upsampling. Source:
Lin et al., "Feature pyramid networks for object detection" (CVPR 2017), section 3; classes are read
off the finest map alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from nas.core.progress import Tick, no_tick
from nas.data.augment.spec import AugmentSpec, eval_batch
from nas.export.weights import place
from nas.train.loop import TrainSettings, train
from nas.transfer.masks import KINDS, masked_images
from nas.transfer.probe_metrics import Ints, confusion

TRAIN_IMAGES, TEST_IMAGES = 1024, 256
WIDTH = 64
BATCH = 32
FROZEN_EPOCHS, FINETUNE_EPOCHS = 12, 5
FROZEN_LR, FINETUNE_LR = 1e-2, 1e-3
MOST_KEPT_BYTES = 2 << 30
"""Maps of a frozen backbone are kept in memory up to this size, and made anew each epoch beyond."""

Maps = list[torch.Tensor]


class Head(nn.Module):
    """From feature maps, finest first, to logits [B, classes, S, S]."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        """Lay out the layers for maps of these channels, weights from torch's generator."""
        super().__init__()
        # Without weights of their own: maps of any scale, fresh or trained, come in alike.
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in channels)
        self.laterals = nn.ModuleList(nn.Conv2d(c, WIDTH, 1) for c in channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )
        self.classify = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, maps: Maps, size: int) -> torch.Tensor:
        """Classify every pixel of images of `size` pixels a side."""
        found = None
        for at in range(len(maps) - 1, -1, -1):
            lateral = self.laterals[at](self.norms[at](maps[at]))
            found = lateral if found is None else lateral + _resized(found, lateral.shape[-1])
        assert found is not None, "a pyramid of no maps"
        return _resized(self.classify(self.smooth(found)), size)


def _resized(maps: torch.Tensor, size: int) -> torch.Tensor:
    if maps.shape[-1] == size:
        return maps
    return functional.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """A backbone that gives maps, with a head on top."""

    def __init__(self, pyramid: nn.Module, head: Head) -> None:
        """Put them together."""
        super().__init__()
        self.pyramid = pyramid
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Give logits [B, classes, S, S] of images [B, 3, S, S]."""
        logits: torch.Tensor = self.head(maps_of(self.pyramid, images), images.shape[-1])
        return logits


def maps_of(pyramid: nn.Module, images: torch.Tensor) -> Maps:
    """Give the maps [B, C, H, W] of images, finest first, whatever order the network has."""
    maps = list(pyramid(images))
    if str(getattr(getattr(pyramid, "output_fmt", None), "value", "NCHW")) == "NHWC":
        maps = [m.permute(0, 3, 1, 2) for m in maps]
    return sorted(maps, key=lambda m: -m.shape[-1])


@dataclass(frozen=True, eq=False)
class Scenes:
    """Images to segment, uint8 [n, S, S, 3], and their masks, uint8 [n, S, S]."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def scenes(img_size: int, random_seed: int) -> tuple[Scenes, Scenes]:
    """Draw what is trained on and what is tested on: 1,024 and 256 images."""
    fit = masked_images(TRAIN_IMAGES, img_size, random_seed, "train")
    return Scenes(*fit), Scenes(*masked_images(TEST_IMAGES, img_size, random_seed, "test"))


def settings_of(epochs: int | None, finetune: bool) -> TrainSettings:
    """Say how the head, or all, is trained; the same for trained and fresh weights."""
    usual, lr = (FINETUNE_EPOCHS, FINETUNE_LR) if finetune else (FROZEN_EPOCHS, FROZEN_LR)
    return TrainSettings(
        epochs=usual if epochs is None else epochs, lr=lr, batch_size=BATCH, amp=False
    )


def segment(
    pyramid: nn.Module,
    sides: tuple[Scenes, Scenes],
    spec: AugmentSpec,
    settings: TrainSettings,
    *,
    finetune: bool,
    random_seed: int,
    device: str,
    tick: Tick = no_tick,
) -> Ints:
    """Train on one side, test once on the other: pixels counted int64 [n, C, C], see `confusion`.

    The backbone stays as it is, in eval mode, unless `finetune`. `tick` counts images: once a
    training image and epoch, once a test image. Raises `Diverged`.
    """
    fit, test = sides
    place(pyramid, device)
    pyramid.eval()
    size = spec.img_size
    with torch.no_grad():
        channels = [m.shape[1] for m in maps_of(pyramid, _inputs(fit, spec, [0]).to(device))]
    with torch.random.fork_rng():  # dropped paths draw from it, too
        torch.manual_seed(random_seed)
        head = Head(channels, len(KINDS))
        net = Segmenter(pyramid, head)
        source = _images(fit, spec) if finetune else _kept(pyramid, fit, spec, device)

        def batches(epoch: int) -> Iterator[tuple[Any, torch.Tensor]]:
            order = np.random.default_rng((random_seed, epoch)).permutation(len(fit.images))
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                yield source(rows), torch.from_numpy(fit.masks[rows].astype(np.int64))

        def loss(model: nn.Module, batch: tuple[Any, torch.Tensor]) -> torch.Tensor:
            inputs, masks = batch
            if finetune:
                logits = model(inputs.to(device))
            else:
                logits = model([m.to(device) for m in inputs], size)
            losses = functional.cross_entropy(logits, masks.to(device), reduction="none")
            return losses.mean((1, 2))

        steps = -(-len(fit.images) // BATCH)
        learner = net if finetune else head
        train(learner, batches, loss, settings, steps_per_epoch=steps, device=device, tick=tick)
    place(net, device).eval()
    said = np.empty_like(test.masks)
    with torch.no_grad():
        for start in range(0, len(said), BATCH):
            rows = range(start, min(start + BATCH, len(said)))
            logits = net(_inputs(test, spec, rows).to(device))
            said[start : start + BATCH] = logits.argmax(1).to(torch.uint8).cpu().numpy()
            tick(float(len(rows)))
    return confusion(test.masks, said, len(KINDS))


def _inputs(side: Scenes, spec: AugmentSpec, rows: Any) -> torch.Tensor:
    images = eval_batch(side.images[np.asarray(rows)], spec)
    return images.contiguous(memory_format=torch.channels_last)


def _images(side: Scenes, spec: AugmentSpec) -> Callable[[NDArray[np.int64]], Any]:
    return lambda rows: _inputs(side, spec, rows)


def _kept(
    pyramid: nn.Module, side: Scenes, spec: AugmentSpec, device: str
) -> Callable[[NDArray[np.int64]], Any]:
    """Give the maps of rows, from memory where all of them fit."""

    def made(rows: Any) -> Maps:
        with torch.no_grad():
            return maps_of(pyramid, _inputs(side, spec, rows).to(device))

    each = sum(m[0].numel() * m.element_size() for m in made([0]))
    if each * len(side.images) > MOST_KEPT_BYTES:
        return made
    blocks = range(0, len(side.images), BATCH)
    parts = [[m.cpu() for m in made(range(at, min(at + BATCH, len(side.images))))] for at in blocks]
    kept = [torch.cat(level) for level in zip(*parts, strict=True)]
    return lambda rows: [level[torch.from_numpy(rows)] for level in kept]
