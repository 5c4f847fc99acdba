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
from space.family import Slice
from space.slicing import spread

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


def random_order(arch: Arch, ctx: Context, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw an order of the units of every group, and of the blocks of every stage."""
    sizes = {k: 1 + m[0].unit.max() for k, m in FAMILY.groups(arch, ctx).items()}
    sizes |= {k: len(names) for k, names in FAMILY.blocks(arch).items()}
    return {name: rng.permutation(n) for name, n in sizes.items()}


def reordered(arch: Arch, ctx: Context, state: State, order: Mapping[str, np.ndarray]) -> State:
    """Move the units of groups, in all their members at once: unit k is then the old order[k]."""
    moved = {k: v.clone() for k, v in state.items()}
    for name, members in FAMILY.groups(arch, ctx).items():
        for m in members:
            if name in order:
                rows = np.concatenate([np.flatnonzero(m.unit == unit) for unit in order[name]])
                moved[m.key] = moved[m.key].index_select(m.dim, torch.from_numpy(rows))
    return moved


def test_groups_name_every_unit_of_tensors_that_exist() -> None:
    rng = random.Random(2)
    for _ in range(20):
        arch, ctx = random_arch(rng, most=128, deepest=2), random_context(rng)
        state = meta_build(arch, ctx).state_dict()
        named = set()
        for members in FAMILY.groups(arch, ctx).values():
            units = set(members[0].unit.tolist())
            assert units == set(range(len(units)))
            for m in members:
                assert len(m.unit) == state[m.key].shape[m.dim]
                assert m.unit.dtype == np.int64
                assert set(m.unit.tolist()) == units
                named.add((m.key, m.dim))
        # What is left belongs to no unit: classes, image channels, kernels, offsets, counters.
        left = {(k, d) for k, v in state.items() for d in range(v.ndim)} - named
        for key, dim in left:
            first, last = key == "patch_embed.conv1.conv.weight", key.startswith("head.fc.")
            kernel = dim > 1 or (dim == 1 and state[key].shape[1] == 1)
            table = key.endswith("attention_biases") and dim == 1
            assert kernel or table or (first and dim == 1) or (last and dim == 0), (key, dim)
        assert sorted(m for names in FAMILY.blocks(arch).values() for m in names) == sorted(
            {".".join(k.split(".")[:4]) for k in state if ".blocks." in k}
        )


def test_reordering_a_group_everywhere_changes_nothing_that_the_net_says() -> None:
    arch = small()
    parent = scrambled(arch, CTX)
    order = random_order(arch, CTX, np.random.default_rng(0))
    state = reordered(arch, CTX, parent.state_dict(), order)
    image = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        same = loaded(arch, CTX, state).double()(image)
        assert torch.allclose(same, parent.double()(image), rtol=1e-9, atol=1e-9)
    changed = [k for k, v in parent.state_dict().items() if not torch.equal(v, state[k].double())]
    assert {"stages.2.blocks.1.mlp.fc2.weight", "stages.2.blocks.1.attn.qkv.bias"} < set(changed)


def test_any_order_of_all_units_is_the_net_itself() -> None:
    rng = random.Random(3)
    for seed in range(10):
        arch, ctx = random_arch(rng, most=128, deepest=3), random_context(rng)
        order = random_order(arch, ctx, np.random.default_rng(seed))
        for key, s in FAMILY.slicing(arch, arch, ctx, ctx, order).items():
            assert s.source == key
            assert not s.blends
            assert all((i == np.arange(len(i))).all() for i in s.index)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dims": [16, 32, 64, 64]},
        {"mlp_ratio": 1.5, "mbconv_expand_ratio": 1.5},
        {"embed_dims": [32, 64, 64, 96], "head_dim": 16, "mlp_ratio": 2.0},
        {"embed_dims": [32, 64, 64, 128], "head_dim": 64},
    ],
)
def test_wanted_units_are_taken_as_the_first_ones_of_a_net_with_them_in_front(
    changes: dict[str, object],
) -> None:
    a, b = small(), small(**changes)
    order = random_order(a, CTX, np.random.default_rng(1))
    order = {name: wanted for name, wanted in order.items() if not name.endswith("blocks")}
    counts = {k: 1 + m[0].unit.max() for k, m in FAMILY.groups(b, CTX).items()}
    for name in counts:
        if name.endswith("heads"):  # how many parent heads hold the child's channels
            counts[name] = -(-b.embed_dims[int(name[7])] // a.head_dim)
    front = {
        name: np.concatenate([np.sort(wanted[: counts[name]]), np.sort(wanted[counts[name] :])])
        for name, wanted in order.items()
    }
    parent, own = scrambled(a, CTX).state_dict(), FAMILY.build(b, CTX).state_dict()
    got = inherited(FAMILY.slicing(a, b, CTX, CTX, order), parent, own)
    moved = reordered(a, CTX, parent, front)
    want = inherited(FAMILY.slicing(a, b, CTX, CTX), moved, own)
    for key in want:
        assert torch.equal(got[key], want[key]), key
    plain = inherited(FAMILY.slicing(a, b, CTX, CTX), parent, own)
    assert not all(torch.equal(got[key], plain[key]) for key in plain)


def test_wanted_heads_are_kept_whole() -> None:
    a, b = small(), small(embed_dims=[32, 64, 64, 96])
    order = {"stages.3.blocks.0.heads": np.array([3, 0, 2, 1])}
    slices = FAMILY.slicing(a, b, CTX, CTX, order)
    attn = "stages.3.blocks.0.attn"
    rows = slices[f"{attn}.qkv.weight"].index[0]
    assert rows.tolist() == [r for head in (0, 2, 3) for r in range(96 * head, 96 * (head + 1))]
    assert slices[f"{attn}.qkv.bias"].index[0].tolist() == rows.tolist()
    columns = slices[f"{attn}.proj.weight"].index[1]
    assert columns.tolist() == [c for head in (0, 2, 3) for c in range(32 * head, 32 * (head + 1))]
    assert slices[f"{attn}.attention_biases"].index[0].tolist() == [0, 2, 3]
    assert slices["stages.3.blocks.1.attn.attention_biases"].index[0].tolist() == [0, 1, 2]


def test_wanted_blocks_are_taken_in_the_parents_order() -> None:
    order = {"stages.2.blocks": np.array([2, 1, 0]), "stages.0.blocks": np.array([1, 0])}
    slices = FAMILY.slicing(small(), small(depths=[1, 1, 2, 2]), CTX, CTX, order)
    for block, source in (("0.blocks.0", 1), ("2.blocks.0", 1), ("2.blocks.1", 2)):
        keys = [k for k in slices if k.startswith(f"stages.{block}.")]
        there = {slices[k].source.replace(f"{block[:-1]}{source}.", f"{block}.") for k in keys}
        assert there == set(keys)
        assert keys


def test_an_order_must_be_a_permutation_of_a_group_of_the_parent() -> None:
    wrong = {
        "dim1": np.zeros(32, dtype=np.int64),
        "dim2": np.arange(63),
        "stages.2.blocks": np.array([0, 1, 3]),
        "stages.1.blocks.0.heads": np.array([0]),
    }
    for name, order in wrong.items():
        with pytest.raises(AssertionError, match="permutation"):
            FAMILY.slicing(small(), small(), CTX, CTX, {name: order})
    with pytest.raises(AssertionError, match="has not"):
        FAMILY.slicing(small(), small(), CTX, CTX, {"dim5": np.arange(4)})


def blend_of(arch: Arch, child: Arch, here: int, there: int) -> tuple[Slice, int, int]:
    """Give the slice of stage 3's biases, and the windows (child, parent)."""
    slices = FAMILY.slicing(arch, child, Context(there, 5), Context(here, 5))
    s = slices["stages.2.blocks.0.attn.attention_biases"]
    built = [meta_build(a, Context(px, 5)) for a, px in ((child, here), (arch, there))]
    windows = [n.get_submodule("stages.2.blocks.0").window_size for n in built]
    return s, windows[0], windows[1]


@pytest.mark.parametrize(
    ("here", "there", "ours", "theirs"),
    [(224, 384, 14, 14), (384, 224, 14, 14), (96, 224, 20, 7), (512, 384, 7, 20), (300, 96, 14, 7)],
)
def test_biases_between_the_parents_offsets_are_blended(
    here: int, there: int, ours: int, theirs: int
) -> None:
    a, b = (small(window_sizes=[7, w, 7], depths=[1] * 4) for w in (theirs, ours))
    s, window, parent_window = blend_of(a, b, here, there)
    assert set(s.blends) == {1}
    blend = s.blends[1]
    assert blend.dtype == np.float64
    assert blend.shape == (window**2, parent_window**2)
    assert (s.index[1] >= 0).all()
    assert (blend >= 0).all()
    np.testing.assert_allclose(blend.sum(1), 1, rtol=0, atol=1e-12)
    rng = np.random.default_rng(0)
    # The oracle: linear interpolation along one axis and then the other; it holds the ends, too.
    table = rng.normal(size=(parent_window, parent_window))
    at, known = np.arange(window) * there / here, np.arange(parent_window)
    rows = np.stack([np.interp(at, known, column) for column in table.T], axis=1)
    want = np.stack([np.interp(at, known, row) for row in rows])
    got = (blend @ table.reshape(-1)).reshape(window, window)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    # A table that falls with distance still does.
    falling = -rng.random(size=table.shape).cumsum(0).cumsum(1)
    got = (blend @ falling.reshape(-1)).reshape(window, window)
    assert (np.diff(got, axis=0) <= 1e-12).all()
    assert (np.diff(got, axis=1) <= 1e-12).all()


def test_nothing_is_blended_where_offsets_meet() -> None:
    for here, there, ours, theirs in [(224, 224, 7, 14), (224, 224, 14, 7), (112, 224, 14, 14)]:
        a, b = (small(window_sizes=[7, w, 7], depths=[1] * 4) for w in (theirs, ours))
        s, window, parent_window = blend_of(a, b, here, there)
        assert not s.blends
        side = np.minimum(np.arange(window) * there // here, parent_window - 1)
        assert s.index[1].tolist() == [x * parent_window + y for x in side for y in side]
