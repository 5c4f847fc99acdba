"""Inheriting: a child gets exactly the numbers that its slicing names, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nas.distill.inherit import checkpoint_context, inherit
from nas.training.weights import weights_digest
from space import Context, get_family
from space.errors import InputError
from space.family import Slice

FAMILY = get_family("tinyvit")
PARENT: dict[str, Any] = {
    "embed_dims": [32, 64, 64, 96],
    "depths": [2, 2, 3, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 3.0,
    "mlp_ratio": 3.0,
    "head_dim": 32,
}
CTX = Context(32, 5)
CHILDREN: list[dict[str, Any]] = [
    {},
    {"embed_dims": [32, 32, 64, 64]},
    {"depths": [1, 1, 2, 1]},
    {"mbconv_expand_ratio": 2.0, "mlp_ratio": 2.0},
    {"head_dim": 16, "window_sizes": [14, 7, 7]},
    {"embed_dims": [32, 64, 96, 96], "depths": [1, 2, 1, 1], "mlp_ratio": 2.0},
]


def built(arch: Any, ctx: Context = CTX, random_seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        model = FAMILY.build(arch, ctx)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():  # so that no two tensors agree by their usual init
                tensor.add_(torch.rand_like(tensor) * 0.05)
            else:
                tensor.fill_(len(name) + random_seed)
    return model


def naive(child: dict[str, torch.Tensor], parent: dict[str, torch.Tensor], slicing: Any) -> Any:
    """Copy number by number."""
    result = {k: v.clone() for k, v in child.items()}
    copied = 0
    for name, source in slicing.items():
        for place in np.ndindex(tuple(child[name].shape)):
            at = tuple(int(rows[i]) for rows, i in zip(source.index, place, strict=True))
            if min(at, default=0) >= 0:
                result[name][place] = parent[source.source][at]
                copied += 1
    return result, copied


def test_the_same_arch_is_reproduced_exactly() -> None:
    arch = FAMILY.arch(PARENT)
    parent, child = built(arch), built(arch, random_seed=1)
    found = inherit(child, parent.state_dict(), FAMILY.slicing(arch, arch, CTX, CTX))
    assert found.kept == 0
    assert weights_digest(child.state_dict()) == weights_digest(parent.state_dict())
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(child.eval()(inputs), parent.eval()(inputs))


@pytest.mark.parametrize("change", CHILDREN)
def test_every_number_comes_from_where_the_slicing_says(change: dict[str, Any]) -> None:
    small = {"embed_dims": [32, 32, 64, 64], "depths": [2, 1, 2, 1], "mlp_ratio": 2.0}
    parent_arch = FAMILY.arch({**PARENT, **small, "mbconv_expand_ratio": 2.0})
    child_arch = FAMILY.arch({**PARENT, **small, "mbconv_expand_ratio": 2.0, **change})
    parent, child = built(parent_arch).state_dict(), built(child_arch, random_seed=1)
    slicing = {
        k: v
        for k, v in FAMILY.slicing(parent_arch, child_arch, CTX, CTX).items()
        if np.prod([len(i) for i in v.index]) < 5_000  # the naive copy is slow
    }
    before = {k: v.clone() for k, v in child.state_dict().items()}
    want, copied = naive(before, dict(parent), slicing)
    found = inherit(child, parent, slicing)
    assert weights_digest(child.state_dict()) == weights_digest(want)
    assert found.copied == copied > 0
    assert found.copied + found.kept == sum(t.numel() for t in before.values())


@pytest.mark.parametrize("seed", range(20))
def test_random_slices_against_the_naive_copy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 6, size=rng.integers(0, 5)))
    child = nn.Module()
    child.register_parameter("w", nn.Parameter(torch.randn(shape)))
    wide = tuple(int(n + rng.integers(0, 4)) for n in shape)
    parent = {"w": torch.randn(wide)}
    index = tuple(
        rng.integers(-1, size, size=n).astype(np.int64) for n, size in zip(shape, wide, strict=True)
    )
    slicing = {"w": Slice("w", index)}
    want, copied = naive(dict(child.state_dict()), parent, slicing)
    assert inherit(child, parent, slicing).copied == copied
    assert torch.equal(child.state_dict()["w"], want["w"])


def test_stale_attention_biases_are_dropped() -> None:
    arch = FAMILY.arch(PARENT)
    parent, child = built(arch), built(arch, random_seed=1).eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        child(inputs)
        inherit(child, parent.state_dict(), FAMILY.slicing(arch, arch, CTX, CTX))
        assert torch.equal(child(inputs), parent.eval()(inputs))


def test_another_arch_as_parent_is_refused() -> None:
    arch, child_arch = FAMILY.arch(PARENT), FAMILY.arch({**PARENT, "depths": [2, 2, 4, 1]})
    smaller = FAMILY.arch({**PARENT, "embed_dims": [32, 32, 64, 64], "depths": [1, 1, 1, 1]})
    slicing = FAMILY.slicing(arch, child_arch, CTX, CTX)
    for state in (built(smaller).state_dict(), {}):
        with pytest.raises(InputError, match="parent weights") as caught:
            inherit(built(child_arch), state, slicing)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "classes"), [(32, 5), (48, 5), (224, 5), (224, 7), (384, 1000)])
def test_the_context_of_a_checkpoint_is_found_and_inherited_from(size: int, classes: int) -> None:
    arch = FAMILY.arch(PARENT)
    there = Context(size, classes)
    state = built(arch, there).state_dict()
    found = checkpoint_context(FAMILY, arch, CTX, state)
    assert found.num_classes == classes
    shapes = {k: v.shape for k, v in built(arch, found).state_dict().items()}
    assert shapes == {k: v.shape for k, v in state.items()}
    child = built(arch, random_seed=1)
    own_head = child.state_dict()["head.fc.weight"].clone()
    inherit(child, state, FAMILY.slicing(arch, arch, found, CTX))
    now = child.state_dict()
    assert torch.equal(now["patch_embed.conv1.conv.weight"], state["patch_embed.conv1.conv.weight"])
    kept = state["head.fc.weight"] if classes == CTX.num_classes else own_head
    assert torch.equal(now["head.fc.weight"], kept)


def test_checkpoints_of_other_archs_are_refused_with_the_first_difference() -> None:
    arch = FAMILY.arch(PARENT)
    other = built(FAMILY.arch({**PARENT, "embed_dims": [32, 64, 96, 96]})).state_dict()
    with pytest.raises(InputError, match=r"--seed-weights: got .* instead of") as caught:
        checkpoint_context(FAMILY, arch, CTX, other)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is missing"):
        checkpoint_context(FAMILY, arch, replace(CTX, num_classes=3), {"a": torch.zeros(2)})
