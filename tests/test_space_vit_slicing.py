"""ViT and DeiT: what a child takes from its parent, against what timm's tensors mean."""

from __future__ import annotations

import math
import random
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from space_cases import one_thread  # noqa: F401 - a fixture, used by every test here
from vit_cases import CTX, FAMILY, meta_build, random_arch, random_context, small

from nas.inherit.slice import checkpoint_context, inherit
from space import Context
from space.family import Arch
from space.vit_slicing import bicubic, kernel


def scrambled(arch: Arch, ctx: Context, seed: int = 0) -> torch.nn.Module:
    """Build a net with no zeros, ones or repeated values in it."""
    net = FAMILY.build(arch, ctx).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 0.5)
    return net


def child_of(parent: torch.nn.Module, a: Arch, b: Arch, there: Context, here: Context) -> Any:
    """Build `b` from the weights of `a`."""
    child = FAMILY.build(b, here).double().eval()
    inherit(child, parent.state_dict(), FAMILY.slicing(a, b, there, here))
    return child


def test_a_net_is_sliced_from_itself_whole() -> None:
    rng = random.Random(1)
    for _ in range(10):
        arch = random_arch(rng, most=64)
        ctx = random_context(rng, arch)
        parent = scrambled(arch, ctx)
        for key, s in FAMILY.slicing(arch, arch, ctx, ctx).items():
            assert s.source == key
            assert not s.blends
        child = child_of(parent, arch, arch, ctx, ctx)
        image = torch.randn(2, ctx.in_chans, ctx.img_size, ctx.img_size).double()
        with torch.no_grad():
            assert torch.equal(child(image), parent(image))


def test_every_tensor_of_any_child_of_any_parent() -> None:
    rng = random.Random(0)
    for _ in range(60):
        pair = [random_arch(rng, most=128) for _ in range(2)]
        contexts = [random_context(rng, a) for a in pair]
        states = [meta_build(a, c).state_dict() for a, c in zip(pair, contexts, strict=True)]
        slices = FAMILY.slicing(pair[0], pair[1], *contexts)
        for key, s in slices.items():
            there, here = states[0][s.source].shape, states[1][key].shape
            assert tuple(len(i) for i in s.index) == tuple(here)
            for dim, (index, size) in enumerate(zip(s.index, there, strict=True)):
                assert index.dtype == np.int64
                assert index.min(initial=0) >= -1
                assert index.max(initial=-1) < size
                if dim in s.blends:
                    assert s.blends[dim].shape == (here[dim], size)
        for key in set(states[1]) - set(slices):
            parts = key.split(".")
            deeper = parts[0] == "blocks" and int(parts[1]) >= pair[0].depth
            classes = parts[0] in ("head", "head_dist") and (
                contexts[0].num_classes != contexts[1].num_classes
            )
            token = parts[0] in ("dist_token", "head_dist") and not pair[0].dist_token
            stem = key == "patch_embed.proj.weight" and (
                contexts[0].in_chans != contexts[1].in_chans
            )
            assert deeper or classes or token or stem, key


def test_contractions_leave_nothing_to_chance() -> None:
    rng = random.Random(1)
    parent = FAMILY.seed("deit_tiny_distilled")
    moves = FAMILY.moves(parent)
    seen = 0
    while seen < 12:
        values = {f: v[rng.randrange(len(v))].tolist() for f, v in moves.items()}
        if values["embed_dim"] % values["head_dim"]:
            continue
        seen += 1
        child = FAMILY.arch(values)
        ctx = Context(224, 10)
        slices = FAMILY.slicing(parent, child, ctx, ctx)
        assert set(slices) == set(meta_build(child, ctx).state_dict())
        assert all((i >= 0).all() for s in slices.values() for i in s.index)


def test_prefixes_equal_slices_by_hand() -> None:
    a, b = small(dist_token=True), small(embed_dim=32, mlp_ratio=2.0)
    parent = scrambled(a, CTX)
    child = child_of(parent, a, b, CTX, CTX).state_dict()
    state = parent.state_dict()
    by_hand = {
        "cls_token": np.s_[:, :, :32],
        "patch_embed.proj.weight": np.s_[:32],
        "blocks.1.mlp.fc1.weight": np.s_[:64, :32],
        "blocks.1.mlp.fc2.weight": np.s_[:32, :64],
        "blocks.2.attn.proj.weight": np.s_[:32, :32],
        "blocks.0.norm2.bias": np.s_[:32],
        "norm.weight": np.s_[:32],
        "head.weight": np.s_[:, :32],
        "head.bias": np.s_[:],
    }
    for key, part in by_hand.items():
        assert torch.equal(child[key], state[key][part]), key
    qkv = state["blocks.1.attn.qkv.weight"].view(3, 4, 16, 64)[:, :2, :, :32].reshape(96, 32)
    assert torch.equal(child["blocks.1.attn.qkv.weight"], qkv)
    rows = [0, *range(2, 11)]  # the class token, then the grid: the distillation token is gone
    assert torch.equal(child["pos_embed"], state["pos_embed"][:, rows, :32])


def random_order(arch: Arch, ctx: Context, rng: np.random.Generator) -> dict[str, np.ndarray]:
    sizes = {k: 1 + m[0].unit.max() for k, m in FAMILY.groups(arch, ctx).items()}
    sizes |= {k: len(names) for k, names in FAMILY.blocks(arch).items()}
    return {name: rng.permutation(n) for name, n in sizes.items()}


def test_reordering_a_group_everywhere_changes_nothing_that_the_net_says() -> None:
    arch = small(dist_token=True)
    parent = scrambled(arch, CTX)
    order = random_order(arch, CTX, np.random.default_rng(0))
    moved = {k: v.clone() for k, v in parent.state_dict().items()}
    for name, members in FAMILY.groups(arch, CTX).items():
        for m in members:
            rows = [np.flatnonzero(m.unit == unit) for unit in order[name]]
            if "qkv" in m.key and m.dim == 0:  # heads keep their place inside q, k and v
                thirds = np.split(np.arange(len(m.unit)), 3)
                rows = [np.intersect1d(r, third) for third in thirds for r in rows]
            moved[m.key] = moved[m.key].index_select(m.dim, torch.from_numpy(np.concatenate(rows)))
    again = FAMILY.build(arch, CTX).double().eval()
    again.load_state_dict(moved)
    image = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(again(image), parent(image), rtol=1e-9, atol=1e-9)
    named = {(m.key, m.dim) for ms in FAMILY.groups(arch, CTX).values() for m in ms}
    left = {(k, d) for k, v in moved.items() for d in range(v.ndim)} - named
    plain = {"cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight"}
    assert all(k in plain or (k.startswith("head") and d == 0) for k, d in left)


def test_wanted_units_and_blocks_are_taken_in_the_parents_order() -> None:
    a, b = small(), small(embed_dim=32, depth=2, mlp_ratio=2.0)
    order = random_order(a, CTX, np.random.default_rng(1))
    slices = FAMILY.slicing(a, b, CTX, CTX, order)
    blocks = sorted(order["blocks"][:2].tolist())
    for j, block in enumerate(blocks):
        heads = np.sort(order[f"blocks.{block}.heads"][:2])
        channels = [h * 16 + c for h in heads.tolist() for c in range(16)]
        qkv = slices[f"blocks.{j}.attn.qkv.weight"]
        assert qkv.source == f"blocks.{block}.attn.qkv.weight"
        assert qkv.index[0].tolist() == [p * 64 + c for p in range(3) for c in channels]
        assert qkv.index[1].tolist() == np.sort(order["dim"][:32]).tolist()
        assert slices[f"blocks.{j}.attn.proj.weight"].index[1].tolist() == channels
        hidden = np.sort(order[f"blocks.{block}.hidden"][: 2 * 32]).tolist()
        assert slices[f"blocks.{j}.mlp.fc2.weight"].index[1].tolist() == hidden


def test_lines_are_resized_as_torch_does() -> None:
    for parent, child in product((1, 2, 3, 7, 14, 24), (1, 2, 5, 14, 24)):
        line = torch.randn(1, 1, parent, parent, dtype=torch.float64)
        want = F.interpolate(line, size=(child, child), mode="bicubic", align_corners=False)
        weights = torch.from_numpy(bicubic(child, parent))
        got = weights @ line[0, 0] @ weights.T
        assert torch.allclose(got, want[0, 0], atol=1e-12), (parent, child)


@pytest.mark.parametrize("dist", [False, True])
def test_position_embeddings_are_resized_as_deit_does(dist: bool) -> None:
    arch, here, there = small(dist_token=dist), Context(112, 5), Context(48, 5)
    parent = scrambled(arch, there)
    got = child_of(parent, arch, arch, there, here).pos_embed
    own = parent.state_dict()["pos_embed"]
    tokens = 1 + dist
    grid = own[:, tokens:].reshape(1, 3, 3, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False)
    want = torch.cat([own[:, :tokens], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    assert torch.allclose(got, want, atol=1e-12)


def test_a_token_that_the_parent_has_not_stays_the_childs_own() -> None:
    a, b = small(), small(dist_token=True)
    parent, here = scrambled(a, CTX), Context(64, 5)
    for ctx in (CTX, here):
        fresh = FAMILY.build(b, ctx).double().eval()
        own = fresh.state_dict()["pos_embed"][:, 1].clone()
        inherit(fresh, parent.state_dict(), FAMILY.slicing(a, b, CTX, ctx))
        state = fresh.state_dict()["pos_embed"]
        assert torch.equal(state[:, 1], own)
        assert torch.equal(state[:, 0], parent.state_dict()["pos_embed"][:, 0])


@pytest.mark.parametrize(("theirs", "ours"), [(8, 16), (16, 32), (16, 8), (14, 16), (16, 14)])
def test_patch_projections_keep_what_they_say_of_enlarged_patches(theirs: int, ours: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(theirs, theirs))
    line = kernel(ours, theirs)
    resized = line @ weights @ line.T
    patch = rng.normal(size=(min(ours, theirs),) * 2)
    enlarge = bicubic(max(ours, theirs), min(ours, theirs))
    large = enlarge @ patch @ enlarge.T
    small_says, large_says = (weights, resized) if theirs < ours else (resized, weights)
    assert math.isclose((patch * small_says).sum(), (large * large_says).sum(), rel_tol=1e-9)


def test_published_weights_of_other_sizes_are_recognised() -> None:
    arch = small(patch_size=14)
    for size in (224, 56):
        state = FAMILY.build(arch, Context(size, 7)).state_dict()
        found = checkpoint_context(FAMILY, arch, Context(56, 5), state)
        assert found == Context(size, 7)
