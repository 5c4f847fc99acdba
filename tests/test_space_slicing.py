"""The slicing map: complete, of the right shape, and true to what timm's tensors mean."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from space_cases import (
    FAMILY,
    meta_build,
    one_thread,  # noqa: F401 - a fixture, used by every test here
    random_arch,
    random_context,
)

from space import Arch, Context
from space._tinyvit_slicing import spread
from space.family import Slice

SMALL = {
    "embed_dims": [32, 64, 96, 128],
    "depths": [2, 1, 3, 2],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 3.0,
    "mlp_ratio": 3.0,
    "head_dim": 32,
}
CTX = Context(48, 5)
State = Mapping[str, torch.Tensor]


def small(**changes: object) -> Arch:
    return FAMILY.arch({**SMALL, **changes})


def scrambled(arch: Arch, ctx: Context, seed: int = 0) -> torch.nn.Module:
    """Build a net with no zeros, ones or repeated values in it, in eval mode."""
    net = FAMILY.build(arch, ctx)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                shift = 0.5 if name.endswith("running_var") else -0.5
                tensor.copy_(noise + shift)
    return net.train().eval()


def inherited(slices: Mapping[str, Slice], parent: State, child: State) -> dict[str, torch.Tensor]:
    """Apply the map, element by element as its definition says."""
    state = {k: v.clone() for k, v in child.items()}
    for key, s in slices.items():
        if not s.index:
            state[key] = parent[s.source].clone()
            continue
        here = [np.flatnonzero(i >= 0) for i in s.index]
        there = [i[i >= 0] for i in s.index]
        grid, source = np.ix_(*here), np.ix_(*there)
        state[key][grid] = parent[s.source][source]
    return state


def loaded(arch: Arch, ctx: Context, state: State) -> torch.nn.Module:
    net = FAMILY.build(arch, ctx)
    net.load_state_dict(dict(state))
    return net.train().eval()  # timm keeps stale attention biases otherwise


def test_a_net_is_sliced_from_itself_whole() -> None:
    arch = small()
    parent = scrambled(arch, CTX)
    slices = FAMILY.slicing(arch, arch, CTX, CTX)
    state = parent.state_dict()
    assert set(slices) == set(state)
    for key, s in slices.items():
        assert s.source == key
        assert [i.tolist() for i in s.index] == [list(range(n)) for n in state[key].shape]
    child = loaded(arch, CTX, inherited(slices, state, FAMILY.build(arch, CTX).state_dict()))
    image = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(child(image), parent(image))


def test_every_tensor_of_any_child_of_any_parent() -> None:
    rng = random.Random(0)
    for _ in range(30):
        pair = [random_arch(rng, most=128, deepest=2) for _ in range(2)]
        contexts = [random_context(rng) for _ in range(2)]
        states = [meta_build(a, c).state_dict() for a, c in zip(pair, contexts, strict=True)]
        slices = FAMILY.slicing(pair[0], pair[1], *contexts)
        for key, s in slices.items():
            there, here = states[0][s.source].shape, states[1][key].shape
            assert tuple(len(i) for i in s.index) == tuple(here)
            for index, size in zip(s.index, there, strict=True):
                assert index.dtype == np.int64
                assert index.min(initial=0) >= -1
                assert index.max(initial=-1) < size
        for key in set(states[1]) - set(slices):
            parts = key.split(".")
            deeper = parts[2] == "blocks" and int(parts[3]) >= pair[0].depths[int(parts[1])]
            classes = key.startswith("head.fc") and (
                contexts[0].num_classes != contexts[1].num_classes
            )
            stem = key == "patch_embed.conv1.conv.weight" and (
                contexts[0].in_chans != contexts[1].in_chans
            )
            assert deeper or classes or stem, key


def test_contractions_leave_nothing_to_chance() -> None:
    rng = random.Random(1)
    parent = FAMILY.seed("21M")
    moves = FAMILY.moves(parent)
    dims = moves["embed_dims"]
    moves["embed_dims"] = dims[(dims <= np.array(parent.embed_dims)).all(axis=1)]
    for _ in range(12):
        child = FAMILY.arch({f: v[rng.randrange(len(v))].tolist() for f, v in moves.items()})
        ctx = Context(rng.choice([48, 224]), 10)
        slices = FAMILY.slicing(parent, child, ctx, ctx)
        assert set(slices) == set(meta_build(child, ctx).state_dict())
        assert all((i >= 0).all() for s in slices.values() for i in s.index)


def test_growth_keeps_its_own_init() -> None:
    wide = small(embed_dims=[64, 64, 96, 160])
    slices = FAMILY.slicing(small(), wide, CTX, CTX)
    index = slices["stages.3.downsample.conv1.conv.weight"].index
    assert index[0].tolist() == [*range(128), *[-1] * 32]
    assert index[1].tolist() == list(range(96))
    assert (slices["stages.3.blocks.0.attn.attention_biases"].index[0] == [0, 1, 2, 3, -1]).all()
    assert (slices["stages.3.blocks.0.attn.qkv.bias"].index[0] == -1).sum() == 3 * 32


def test_prefixes_equal_slices_by_hand() -> None:
    narrow = small(embed_dims=[32, 32, 64, 96], mlp_ratio=2.0, mbconv_expand_ratio=2.0)
    parent = scrambled(small(), CTX).state_dict()
    state = inherited(
        FAMILY.slicing(small(), narrow, CTX, CTX), parent, FAMILY.build(narrow, CTX).state_dict()
    )
    by_hand = {
        "patch_embed.conv2.conv.weight": np.s_[:32, :16],
        "patch_embed.conv1.bn.running_var": np.s_[:16],
        "stages.0.blocks.1.conv1.conv.weight": np.s_[:64, :32],
        "stages.0.blocks.1.conv2.conv.weight": np.s_[:64],
        "stages.1.downsample.conv1.conv.weight": np.s_[:32, :32],
        "stages.2.downsample.conv2.conv.weight": np.s_[:64],
        "stages.2.blocks.2.mlp.fc1.weight": np.s_[:128, :64],
        "stages.2.blocks.2.mlp.fc2.weight": np.s_[:64, :128],
        "stages.3.blocks.1.attn.proj.weight": np.s_[:96, :96],
        "stages.3.blocks.0.local_conv.bn.running_mean": np.s_[:96],
        "head.norm.bias": np.s_[:96],
        "head.fc.weight": np.s_[:, :96],
        "head.fc.bias": np.s_[:],
    }
    for key, part in by_hand.items():
        assert torch.equal(state[key], parent[key][part]), key
    assert state["patch_embed.conv1.bn.num_batches_tracked"] == 0


@pytest.mark.parametrize(("ours", "theirs"), [(32, 32), (16, 32), (32, 16), (16, 16)])
def test_queries_keys_and_values_keep_their_channel(ours: int, theirs: int) -> None:
    a, b = small(head_dim=theirs), small(head_dim=ours, embed_dims=[32, 64, 64, 96])
    parent = scrambled(a, CTX).state_dict()
    child = inherited(FAMILY.slicing(a, b, CTX, CTX), parent, FAMILY.build(b, CTX).state_dict())
    for stage, dim in ((1, 64), (2, 64), (3, 96)):
        key = f"stages.{stage}.blocks.0.attn.qkv.weight"

        def by_part(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
            """[q|k|v, channel among all heads, input]: the layout timm's view and split define."""
            apart = weight.view(-1, 3, head_dim, weight.shape[1]).transpose(0, 1)
            return apart.reshape(3, -1, weight.shape[1])

        expected = by_part(parent[key], theirs)[:, :dim, :dim]
        assert torch.equal(by_part(child[key], ours), expected)


@pytest.mark.parametrize(("ours", "theirs"), [(7, 14), (14, 7), (7, 7)])
def test_biases_keep_their_offset(ours: int, theirs: int) -> None:
    ctx = Context(224, 5)
    a, b = (small(window_sizes=[7, w, 7], depths=[1] * 4) for w in (theirs, ours))
    nets = scrambled(a, ctx), FAMILY.build(b, ctx)
    state = inherited(FAMILY.slicing(a, b, ctx, ctx), nets[0].state_dict(), nets[1].state_dict())
    nets[1].load_state_dict(state)
    full = []
    for net, window in zip(nets, (theirs, ours), strict=True):
        attn = net.train().get_submodule("stages.2.blocks.0.attn")
        full.append(attn.get_attention_biases(torch.device("cpu")).view(3, *[window] * 4))  # type: ignore[operator]
    both = slice(min(ours, theirs))
    corner = (slice(None), both, both, both, both)
    assert torch.equal(full[0][corner], full[1][corner])


def test_biases_follow_the_image_when_its_size_changes() -> None:
    arch = small()
    slices = FAMILY.slicing(arch, arch, Context(224, 5), Context(112, 5))
    index = slices["stages.2.blocks.0.attn.attention_biases"].index[1]
    assert index.reshape(7, 7)[0].tolist() == [0, 2, 4, 6, 8, 10, 12]  # twice as far apart
    assert index.reshape(7, 7)[:, 0].tolist() == [14 * i for i in (0, 2, 4, 6, 8, 10, 12)]


def test_heads_are_cut_from_the_heads_that_held_their_channels() -> None:
    slices = FAMILY.slicing(small(), small(head_dim=16), CTX, CTX)
    assert slices["stages.1.blocks.0.attn.attention_biases"].index[0].tolist() == [0, 0, 1, 1]
    slices = FAMILY.slicing(small(head_dim=16), small(), CTX, CTX)
    assert slices["stages.1.blocks.0.attn.attention_biases"].index[0].tolist() == [0, 2]


def test_blocks_are_spread_with_both_ends_kept() -> None:
    for parent in range(1, 30):
        for child in range(1, parent + 1):
            picked = spread(child, parent)
            assert len(set(picked)) == child
            assert picked == sorted(picked)  # type: ignore[type-var]
            assert picked[0] == 0
            assert child == 1 or picked[-1] == parent - 1
            gaps = np.diff(picked)  # type: ignore[arg-type]
            assert child < 2 or gaps.max() - gaps.min() <= 1
    assert spread(3, 2) == [0, 1, None]
    slices = FAMILY.slicing(small(), small(depths=[2, 1, 2, 2]), CTX, CTX)
    assert slices["stages.2.blocks.1.mlp.fc1.bias"].source == "stages.2.blocks.2.mlp.fc1.bias"


def test_other_classes_and_channels_start_afresh() -> None:
    slices = FAMILY.slicing(small(), small(), CTX, Context(48, 7, 1))
    missing = set(meta_build(small(), CTX).state_dict()) - set(slices)
    assert missing == {"head.fc.weight", "head.fc.bias", "patch_embed.conv1.conv.weight"}


def test_a_preferred_order_reaches_every_tensor_of_its_channels() -> None:
    """Reordering all channel groups of a net consistently does not change what it computes."""
    arch = small()
    parent = scrambled(arch, CTX)
    rng = np.random.default_rng(0)
    groups = {"stem": 16, "dim1": 32, "dim2": 64, "dim3": 96, "dim4": 128}
    for stage, depth in enumerate(SMALL["depths"]):  # type: ignore[call-overload]
        for block in range(depth):
            hidden = "expand" if stage == 0 else "hidden"
            groups[f"stages.{stage}.blocks.{block}.{hidden}"] = 3 * groups[f"dim{stage + 1}"]
    order = {name: rng.permutation(n) for name, n in groups.items()}
    slices = FAMILY.slicing(arch, arch, CTX, CTX, order)
    state = inherited(slices, parent.state_dict(), FAMILY.build(arch, CTX).state_dict())
    image = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        same = loaded(arch, CTX, state).double()(image)
        assert torch.allclose(same, parent.double()(image), rtol=1e-9, atol=1e-9)
    changed = [k for k, v in parent.state_dict().items() if not torch.equal(v, state[k].double())]
    assert "stages.2.blocks.1.mlp.fc2.weight" in changed


def test_a_preferred_order_must_be_a_permutation() -> None:
    with pytest.raises(AssertionError, match="permutation"):
        FAMILY.slicing(small(), small(), CTX, CTX, {"dim1": np.zeros(32, dtype=np.int64)})
