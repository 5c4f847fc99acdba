"""Random TinyViTs and contexts for the tests of `space`: on the grid and far off it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from timm.models import deit, tiny_vit, vision_transformer

from space import Arch, Context, get_family
from space.tinyvit import TinyVitArch

FAMILY = get_family("tinyvit")
SMALL: dict[str, Any] = {
    "embed_dims": [32, 64, 64, 96],
    "depths": [1, 1, 2, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 3.0,
    "head_dim": 32,
}
"""A TinyViT with few contractions."""


def random_arch(rng: random.Random, most: int = 256, deepest: int = 3) -> TinyVitArch:
    """Draw any legal arch: odd head dims, falling dims, broken ratios, windows from 1 on."""
    head_dim = rng.choice([1, 3, 8, 16, 20, 32, 48, 64])
    dims = [2 * rng.randint(1, most // 4)]
    dims += [head_dim * rng.randint(1, max(1, most // head_dim)) for _ in range(3)]
    whole = rng.random() < 0.5
    arch = FAMILY.arch(
        {
            "embed_dims": dims,
            "depths": [rng.randint(1, deepest) for _ in range(4)],
            "window_sizes": [rng.randint(1, 20) for _ in range(3)],
            "mbconv_expand_ratio": rng.randint(1, 6) if whole else rng.uniform(0.5, 6.0),
            "mlp_ratio": rng.randint(1, 6) if whole else rng.uniform(1.0, 6.0),
            "head_dim": head_dim,
        }
    )
    assert isinstance(arch, TinyVitArch)
    return arch


def random_context(rng: random.Random, arch: Arch | None = None) -> Context:
    """Draw a context: odd sizes, one to four channels, one to 21,841 classes."""
    img_size = rng.choice([rng.randint(16, 80), rng.randint(80, 300), 32, 48, 224, 384, 512])
    num_classes = rng.choice([1, 2, 10, rng.randint(1, 1000), 1000, 21_841])
    return Context(img_size, num_classes, rng.choice([1, 3, 4]))


def drawn(cases: Any, rng: random.Random, **most: int) -> tuple[Any, Context]:
    """Draw an arch of `space_cases` or `vit_cases`, with a context that it can be built in."""
    arch = cases.random_arch(rng, **most)
    return arch, cases.random_context(rng, arch)


@contextmanager
def on_meta() -> Iterator[None]:
    """Build on the meta device, without filling tensors that hold no data there."""
    with ExitStack() as stack:
        for kind, fill in (
            (tiny_vit.Attention, "_init_buffers"),
            (tiny_vit.TinyVit, "init_weights"),
            (deit.VisionTransformerDistilled, "init_weights"),
            (vision_transformer.VisionTransformer, "init_weights"),
            (torch.nn.Conv2d, "reset_parameters"),
            (torch.nn.Linear, "reset_parameters"),
        ):
            stack.enter_context(mock.patch.object(kind, fill, return_value=None))
        stack.enter_context(torch.device("meta"))
        yield


TINY_FACTORS: dict[str, Any] = {
    "embed_dims": [32, 32, 32, 32],
    "depths": [1, 1, 1, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 2.0,
    "mlp_ratio": 2.0,
    "head_dim": 16,
}


def meta_build(arch: TinyVitArch, ctx: Context) -> Any:
    """Build an arch without memory for its weights."""
    with on_meta():
        return FAMILY.build(arch, ctx).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Give torch one thread: on small nets they only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
