"""The slicing map: complete, of the right shape, and true to what timm's tensors mean."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import space_cases
import torch
import vit_cases
from space_cases import (
    FAMILY,
    drawn,
    meta_build,
    one_thread,  # noqa: F401 - a fixture, used by every test here
)

from nas.export.arch_of_weights import checkpoint_context
from nas.inherit.slice import inherit
from space import Arch, Context
from space.family import Family, Slice
from space.slicing import bicubic, picked
from space.vit_slicing import kernel

VIT = vit_cases.FAMILY
CASES = pytest.mark.parametrize("cases", [space_cases, vit_cases], ids=["tinyvit", "vit"])
SMALL = {**space_cases.SMALL, "embed_dims": [32, 64, 96, 128], "depths": [2, 1, 3, 2], "mbconv_expand_ratio": 3.0}
CTX = Context(48, 5)
State = Mapping[str, torch.Tensor]


def small(**changes: object) -> Arch:
    return FAMILY.arch({**SMALL, **changes})


def scrambled(arch: Arch, ctx: Context, seed: int = 0, family: Family = FAMILY) -> torch.nn.Module:
    """Build a net with no zeros, ones or repeated values in it, in eval mode."""
    net = family.build(arch, ctx)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + (0.5 if name.endswith("running_var") else -0.5))
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


def loaded(arch: Arch, ctx: Context, state: State, family: Family = FAMILY) -> torch.nn.Module:
    net = family.build(arch, ctx)
    net.load_state_dict(dict(state))
    return net.train().eval()  # timm keeps stale attention biases otherwise


@CASES
def test_a_net_is_sliced_from_itself_whole_in_any_order_of_its_units(cases: ModuleType) -> None:
    rng, family = random.Random(3), cases.FAMILY
    for seed in range(10):
        arch, ctx = drawn(cases, rng, most=128)
        shapes = {k: v.shape for k, v in cases.meta_build(arch, ctx).state_dict().items()}
        order = random_order(arch, ctx, np.random.default_rng(seed), family)
        for wanted in ({}, order):
            slices = family.slicing(arch, arch, ctx, ctx, wanted)
            assert set(slices) == set(shapes)
            for key, s in slices.items():
                assert s.source == key
                assert not s.blends
                assert [i.tolist() for i in s.index] == [list(range(n)) for n in shapes[key]]


def may_be_absent(key: str, parent: Any, contexts: list[Context]) -> bool:
    """Tell whether a child's tensor may lack a source: deeper, other classes, channels, a token."""
    parts = key.split(".")
    there, here = contexts
    if "blocks" in parts:
        depth = parent.depths[int(parts[1])] if parts[0] == "stages" else parent.depth
        return int(parts[parts.index("blocks") + 1]) >= depth
    token = parts[0] in ("dist_token", "head_dist") and not getattr(parent, "dist_token", True)
    classes = parts[0].startswith("head") and there.num_classes != here.num_classes
    stem = ("patch_embed.conv1.conv.weight", "patch_embed.proj.weight")
    return token or classes or (key in stem and there.in_chans != here.in_chans)


@CASES
def test_every_tensor_of_any_child_of_any_parent(cases: ModuleType) -> None:
    rng, family = random.Random(0), cases.FAMILY
    for _ in range(40):
        (parent, there), (child, here) = drawn(cases, rng, most=128), drawn(cases, rng, most=128)
        states = [cases.meta_build(a, c).state_dict() for a, c in ((parent, there), (child, here))]
        slices = family.slicing(parent, child, there, here)
        for key, s in slices.items():
            source, own = states[0][s.source].shape, states[1][key].shape
            assert tuple(len(i) for i in s.index) == tuple(own)
            for dim, (index, size) in enumerate(zip(s.index, source, strict=True)):
                assert index.dtype == np.int64
                assert index.min(initial=0) >= -1
                assert index.max(initial=-1) < size
                assert dim not in s.blends or s.blends[dim].shape == (own[dim], size)
        for key in set(states[1]) - set(slices):
            assert may_be_absent(key, parent, [there, here]), key


@CASES
def test_contractions_leave_nothing_to_chance(cases: ModuleType) -> None:
    rng, family = random.Random(1), cases.FAMILY
    parent = family.seed("21M" if family is FAMILY else "deit_tiny_distilled")
    moves, seen = family.moves(parent), 0
    while seen < 12:
        table = {f: v[rng.randrange(len(v)), None] for f, v in moves.items()}
        ctx = Context(224 if family is VIT else rng.choice([48, 224]), 10)
        dims = "embed_dims" if family is FAMILY else "embed_dim"
        narrower = bool((table[dims] <= np.array(getattr(parent, dims))).all())
        if narrower and family.valid_many(table, ctx).all():
            seen += 1
            child = family.row(table, 0)
            slices = family.slicing(parent, child, ctx, ctx)
            assert set(slices) == set(cases.meta_build(child, ctx).state_dict())
            assert all((i >= 0).all() for s in slices.values() for i in s.index)


def test_growth_keeps_its_own_init() -> None:
    wide = small(embed_dims=[64, 64, 96, 160])
    slices = FAMILY.slicing(small(), wide, CTX, CTX)
    index = slices["stages.3.downsample.conv1.conv.weight"].index
    assert index[0].tolist() == [*range(128), *[-1] * 32]
    assert index[1].tolist() == list(range(96))
    assert (slices["stages.3.blocks.0.attn.attention_biases"].index[0] == [0, 1, 2, 3, -1]).all()
    assert (slices["stages.3.blocks.0.attn.qkv.bias"].index[0] == -1).sum() == 3 * 32


BY_HAND: dict[str, dict[str, Any]] = {
    "tinyvit": {
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
    },
    "vit": {
        "cls_token": np.s_[:, :, :32],
        "patch_embed.proj.weight": np.s_[:32],
        "blocks.1.mlp.fc1.weight": np.s_[:64, :32],
        "blocks.1.mlp.fc2.weight": np.s_[:32, :64],
        "blocks.2.attn.proj.weight": np.s_[:32, :32],
        "blocks.0.norm2.bias": np.s_[:32],
        "norm.weight": np.s_[:32],
        "head.weight": np.s_[:, :32],
        "head.bias": np.s_[:],
    },
}


@CASES
def test_prefixes_equal_slices_by_hand(cases: ModuleType) -> None:
    family = cases.FAMILY
    a, b = small(), small(embed_dims=[32, 32, 64, 96], mlp_ratio=2.0, mbconv_expand_ratio=2.0)
    if family is VIT:
        a, b = vit_cases.small(dist_token=True), vit_cases.small(embed_dim=32, mlp_ratio=2.0)
    parent = scrambled(a, CTX, family=family).state_dict()
    state = inherited(family.slicing(a, b, CTX, CTX), parent, family.build(b, CTX).state_dict())
    for key, part in BY_HAND[family.name].items():
        assert torch.equal(state[key], parent[key][part]), key
    if family is FAMILY:
        assert state["patch_embed.conv1.bn.num_batches_tracked"] == 0
        return
    qkv = parent["blocks.1.attn.qkv.weight"].view(3, 4, 16, 64)[:, :2, :, :32].reshape(96, 32)
    assert torch.equal(state["blocks.1.attn.qkv.weight"], qkv)
    rows = [0, *range(2, 11)]  # the class token, then the grid: the distillation token is gone
    assert torch.equal(state["pos_embed"], parent["pos_embed"][:, rows, :32])


@pytest.mark.parametrize(("ours", "theirs"), [(32, 32), (16, 32), (32, 16), (16, 16)])
def test_queries_keys_and_values_keep_their_channel(ours: int, theirs: int) -> None:
    a, b = small(head_dim=theirs), small(head_dim=ours, embed_dims=[32, 64, 64, 96])
    parent = scrambled(a, CTX).state_dict()
    child = inherited(FAMILY.slicing(a, b, CTX, CTX), parent, FAMILY.build(b, CTX).state_dict())

    def by_part(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
        """[q|k|v, channel among all heads, input]: the layout timm's view and split define."""
        return weight.view(-1, 3, head_dim, weight.shape[1]).transpose(0, 1).reshape(3, -1, weight.shape[1])

    for stage, dim in ((1, 64), (2, 64), (3, 96)):
        key = f"stages.{stage}.blocks.0.attn.qkv.weight"
        assert torch.equal(by_part(child[key], ours), by_part(parent[key], theirs)[:, :dim, :dim])


@pytest.mark.parametrize(("ours", "theirs"), [(7, 14), (14, 7)])
def test_biases_keep_their_offset(ours: int, theirs: int) -> None:
    """As timm lays them out: [head, offsets of a query's place, offsets of a key's]."""
    ctx = Context(224, 5)
    a, b = (small(window_sizes=[7, w, 7], depths=[1] * 4) for w in (theirs, ours))
    nets = scrambled(a, ctx), FAMILY.build(b, ctx)
    state = inherited(FAMILY.slicing(a, b, ctx, ctx), nets[0].state_dict(), nets[1].state_dict())
    nets[1].load_state_dict(state)
    full = []
    for net, window in zip(nets, (theirs, ours), strict=True):
        attn: Any = net.train().get_submodule("stages.2.blocks.0.attn")
        full.append(attn.get_attention_biases(torch.device("cpu")).view(3, *[window] * 4)[:, :7, :7, :7, :7])
    assert torch.equal(*full)


def test_heads_are_cut_from_the_heads_that_held_their_channels() -> None:
    slices = FAMILY.slicing(small(), small(head_dim=16), CTX, CTX)
    assert slices["stages.1.blocks.0.attn.attention_biases"].index[0].tolist() == [0, 0, 1, 1]
    slices = FAMILY.slicing(small(head_dim=16), small(), CTX, CTX)
    assert slices["stages.1.blocks.0.attn.attention_biases"].index[0].tolist() == [0, 2]


def test_blocks_are_spread_with_both_ends_kept() -> None:
    for parent in range(1, 30):
        for child in range(1, parent + 1):
            blocks: Any = picked(child, parent, None)
            assert len(set(blocks)) == child
            assert blocks == sorted(blocks)
            assert blocks[0] == 0
            assert child == 1 or blocks[-1] == parent - 1
            gaps = np.diff(blocks)
            assert child < 2 or gaps.max() - gaps.min() <= 1
    assert picked(3, 2, None) == [0, 1, None]
    slices = FAMILY.slicing(small(), small(depths=[2, 1, 2, 2]), CTX, CTX)
    assert slices["stages.2.blocks.1.mlp.fc1.bias"].source == "stages.2.blocks.2.mlp.fc1.bias"


def test_other_classes_and_channels_start_afresh() -> None:
    slices = FAMILY.slicing(small(), small(), CTX, Context(48, 7, 1))
    missing = set(meta_build(small(), CTX).state_dict()) - set(slices)
    assert missing == {"head.fc.weight", "head.fc.bias", "patch_embed.conv1.conv.weight"}


def random_order(arch: Arch, ctx: Context, rng: np.random.Generator, family: Family = FAMILY) -> dict[str, np.ndarray]:
    """Draw an order of the units of every group, and of the blocks of every stage."""
    sizes = {k: 1 + m[0].unit.max() for k, m in family.groups(arch, ctx).items()}
    sizes |= {k: len(names) for k, names in family.blocks(arch).items()}
    return {name: rng.permutation(n) for name, n in sizes.items()}


def reordered(
    arch: Arch, ctx: Context, state: State, order: Mapping[str, np.ndarray], family: Family = FAMILY
) -> State:
    """Move the units of groups, in all their members at once: unit k is then the old order[k]."""
    moved = {k: v.clone() for k, v in state.items()}
    for name, members in family.groups(arch, ctx).items():
        for m in members:
            if name not in order:
                continue
            rows = [np.flatnonzero(m.unit == unit) for unit in order[name]]
            if family is VIT and "qkv" in m.key and m.dim == 0:  # a place each in q, k and v
                thirds = np.split(np.arange(len(m.unit)), 3)
                rows = [np.intersect1d(r, third) for third in thirds for r in rows]
            index = torch.from_numpy(np.concatenate(rows))
            moved[m.key] = moved[m.key].index_select(m.dim, index)
    return moved


@CASES
def test_groups_name_every_unit_of_tensors_that_exist(cases: ModuleType) -> None:
    rng, family = random.Random(2), cases.FAMILY
    for _ in range(20):
        arch, ctx = drawn(cases, rng, most=128)
        state = cases.meta_build(arch, ctx).state_dict()
        named = set()
        for members in family.groups(arch, ctx).values():
            units = set(members[0].unit.tolist())
            assert units == set(range(len(units)))
            for m in members:
                assert len(m.unit) == state[m.key].shape[m.dim]
                assert m.unit.dtype == np.int64
                assert set(m.unit.tolist()) == units
                named.add((m.key, m.dim))
        # What is left belongs to no unit: classes, image channels, kernels, positions, tokens, counters.
        left = {(k, d) for k, v in state.items() for d in range(v.ndim)} - named
        tables = ("attention_biases", "cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight")
        for key, dim in left:
            first, last = key == "patch_embed.conv1.conv.weight", key.startswith("head")
            kernel = dim > 1 or (dim == 1 and state[key].shape[1] == 1)
            assert kernel or key.endswith(tables) or (first and dim == 1) or (last and dim == 0), (key, dim)
        below = slice(0, 4 if family is FAMILY else 2)
        assert sorted(m for names in family.blocks(arch).values() for m in names) == sorted(
            {".".join(k.split(".")[below]) for k in state if "blocks." in k}
        )


@CASES
def test_reordering_a_group_everywhere_changes_no_output(cases: ModuleType) -> None:
    family = cases.FAMILY
    arch = small() if family is FAMILY else vit_cases.small(dist_token=True)
    parent = scrambled(arch, CTX, family=family)
    order = random_order(arch, CTX, np.random.default_rng(0), family)
    state = reordered(arch, CTX, parent.state_dict(), order, family)
    changed = {k for k, v in parent.state_dict().items() if not torch.equal(v, state[k])}
    blocks = "stages.2.blocks" if family is FAMILY else "blocks"
    assert {f"{blocks}.1.mlp.fc2.weight", f"{blocks}.1.attn.qkv.bias"} < changed
    image = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        same = loaded(arch, CTX, state, family).double()(image)
        assert torch.allclose(same, parent.double()(image), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("cases", "changes"),
    [
        (space_cases, {"embed_dims": [16, 32, 64, 64]}),
        (space_cases, {"mlp_ratio": 1.5, "mbconv_expand_ratio": 1.5}),
        (space_cases, {"embed_dims": [32, 64, 64, 96], "head_dim": 16, "mlp_ratio": 2.0}),
        (space_cases, {"embed_dims": [32, 64, 64, 128], "head_dim": 64}),
        (vit_cases, {"embed_dim": 32, "mlp_ratio": 2.0}),
    ],
)
def test_wanted_units_are_taken_as_the_first_ones_of_a_net_with_them_in_front(
    cases: ModuleType, changes: dict[str, object]
) -> None:
    family, make = cases.FAMILY, small if cases is space_cases else vit_cases.small
    a, b = make(), make(**changes)
    order = random_order(a, CTX, np.random.default_rng(1), family)
    order = {name: wanted for name, wanted in order.items() if not name.endswith("blocks")}
    counts = {k: 1 + m[0].unit.max() for k, m in family.groups(b, CTX).items()}
    for name in counts:
        if name.endswith("heads"):  # how many parent heads hold the child's channels
            counts[name] = -(-(b.embed_dims[int(name[7])] if family is FAMILY else b.embed_dim) // a.head_dim)
    front = {
        name: np.concatenate([np.sort(wanted[: counts[name]]), np.sort(wanted[counts[name] :])])
        for name, wanted in order.items()
    }
    parent, own = scrambled(a, CTX, family=family).state_dict(), family.build(b, CTX).state_dict()
    got, plain = (inherited(family.slicing(a, b, CTX, CTX, wanted), parent, own) for wanted in (order, None))
    want = inherited(family.slicing(a, b, CTX, CTX), reordered(a, CTX, parent, front, family), own)
    for key in want:
        assert torch.equal(got[key], want[key]), key
    assert not all(torch.equal(got[key], plain[key]) for key in plain)


def test_wanted_blocks_are_taken_in_the_parents_order() -> None:
    orders = {"stages.2.blocks": np.array([2, 1, 0]), "stages.0.blocks": np.array([1, 0])}
    tinyvit = FAMILY.slicing(small(), small(depths=[1, 1, 2, 2]), CTX, CTX, orders)
    vit = VIT.slicing(vit_cases.small(), vit_cases.small(depth=2), CTX, CTX, {"blocks": np.array([2, 0, 1])})
    for slices, group, j, source in (
        *((tinyvit, "stages.0.blocks", 0, 1), (tinyvit, "stages.2.blocks", 0, 1), (tinyvit, "stages.2.blocks", 1, 2)),
        *((vit, "blocks", 0, 0), (vit, "blocks", 1, 2)),
    ):
        keys = [k.removeprefix(f"{group}.{j}.") for k in slices if k.startswith(f"{group}.{j}.")]
        assert keys
        assert all(slices[f"{group}.{j}.{key}"].source == f"{group}.{source}.{key}" for key in keys)


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


def blend_of(here: int, there: int, ours: int, theirs: int) -> tuple[Slice, int, int]:
    """Give the slice of stage 3's biases, and the windows as built (child, parent)."""
    archs = [small(window_sizes=[7, w, 7], depths=[1] * 4) for w in (theirs, ours)]
    contexts = Context(there, 5), Context(here, 5)
    s = FAMILY.slicing(*archs, *contexts)["stages.2.blocks.0.attn.attention_biases"]
    built = [meta_build(*both).get_submodule("stages.2.blocks.0") for both in zip(archs, contexts, strict=True)]
    return s, built[1].window_size, built[0].window_size


@pytest.mark.parametrize(
    ("here", "there", "ours", "theirs"),
    [(224, 384, 14, 14), (384, 224, 14, 14), (96, 224, 20, 7), (512, 384, 7, 20), (300, 96, 14, 7)],
)
def test_biases_between_the_parents_offsets_are_blended(here: int, there: int, ours: int, theirs: int) -> None:
    """By linear interpolation along one axis and then the other; it holds the ends, too."""
    s, window, parent_window = blend_of(here, there, ours, theirs)
    at, known = np.arange(window) * there / here, np.arange(parent_window)
    line = np.stack([np.interp(at, known, unit) for unit in np.eye(parent_window)], axis=1)
    assert set(s.blends) == {1}
    assert s.blends[1].dtype == np.float64
    np.testing.assert_allclose(s.blends[1], np.kron(line, line), rtol=0, atol=1e-12)
    assert (s.index[1] >= 0).all()


def test_nothing_is_blended_where_offsets_meet() -> None:
    for here, there, ours, theirs in [(224, 224, 7, 14), (224, 224, 14, 7), (112, 224, 14, 14)]:
        s, window, parent_window = blend_of(here, there, ours, theirs)
        assert not s.blends
        side = np.minimum(np.arange(window) * there // here, parent_window - 1)
        assert s.index[1].tolist() == [x * parent_window + y for x in side for y in side]


def test_a_token_that_the_parent_has_not_stays_the_childs_own() -> None:
    a, b = vit_cases.small(), vit_cases.small(dist_token=True)
    parent = scrambled(a, CTX, family=VIT).state_dict()
    for ctx in (CTX, Context(64, 5)):
        net = VIT.build(b, ctx)
        own = net.state_dict()["pos_embed"][:, 1].clone()
        inherit(net, parent, VIT.slicing(a, b, CTX, ctx))
        state = net.state_dict()["pos_embed"]
        assert torch.equal(state[:, 1], own)
        assert torch.equal(state[:, 0], parent["pos_embed"][:, 0])


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
    arch = vit_cases.small(patch_size=14)
    for size in (224, 56):
        state = VIT.build(arch, Context(size, 7)).state_dict()
        found = checkpoint_context(VIT, arch, Context(56, 5), state)
        assert found == Context(size, 7)
