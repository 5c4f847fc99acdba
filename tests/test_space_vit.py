"""ViT and DeiT: closed forms against timm and torch, slicing against what the tensors mean."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from space_cases import (
    on_meta,
    one_thread,  # noqa: F401 - a fixture, used by every test here
)
from timm.models import vision_transformer
from torch.utils.flop_counter import FlopCounterMode

from nas.distill.inherit import inherit
from space import Context, InputError, get_family
from space._vit_slicing import bicubic, kernel
from space.family import Arch
from space.neighbours import Band, anchors_in, contains, count_contractions, shortlist
from space.vit import VitArch

FAMILY = get_family("vit")
IMAGENET = Context(224, 1000)
GOOD = FAMILY.to_dict(FAMILY.seed("deit_tiny"))
SMALL: dict[str, Any] = {
    "embed_dim": 64, "depth": 3, "head_dim": 16, "mlp_ratio": 3.0, "patch_size": 16,
    "dist_token": False,
}  # fmt: skip
CTX = Context(48, 5)
State = Mapping[str, torch.Tensor]


def small(**changes: object) -> Arch:
    return FAMILY.arch({**SMALL, **changes})


def random_arch(rng: random.Random, most: int = 256) -> VitArch:
    """Draw any legal arch: odd head dims and patches, broken ratios."""
    head_dim = rng.choice([1, 3, 8, 16, 20, 32, 48, 64])
    arch = FAMILY.arch({
        "embed_dim": head_dim * rng.randint(1, max(1, most // head_dim)),
        "depth": rng.randint(1, 4), "head_dim": head_dim,
        "mlp_ratio": rng.choice([rng.randint(1, 6), rng.uniform(1.0, 6.0)]),
        "patch_size": rng.choice([4, 5, 7, 8, 14, 16, 32]), "dist_token": rng.random() < 0.5,
    })  # fmt: skip
    assert isinstance(arch, VitArch)
    return arch


def random_context(rng: random.Random, arch: VitArch) -> Context:
    """Draw a context that the patches fill."""
    patch = arch.patch_size
    side = patch * rng.randint(-(-16 // patch), max(-(-16 // patch), 96 // patch))
    return Context(side, rng.choice([1, 2, 10, rng.randint(1, 1000)]), rng.choice([1, 3, 4]))


def meta_build(arch: Arch, ctx: Context) -> Any:
    """Build an arch without memory for its weights."""
    with on_meta():
        return FAMILY.build(arch, ctx).eval()


def torch_macs(net: torch.nn.Module, ctx: Context) -> int:
    for module in net.modules():
        if isinstance(module, vision_transformer.Attention):
            module.fused_attn = False
    image = torch.empty(1, ctx.in_chans, ctx.img_size, ctx.img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "img_size", "params"),
    [
        ("deit_tiny", 224, 5_717_416),
        ("deit_tiny_distilled", 224, 5_910_800),
        ("deit_small", 224, 22_050_664),
        ("deit_small_distilled", 224, 22_436_432),
        ("deit_base", 224, 86_567_656),
        ("deit_base_distilled", 224, 87_338_192),
        ("deit_base", 384, 86_859_496),
        ("deit_base_distilled", 384, 87_630_032),
        ("vit_small_patch8", 224, 22_055_272),
        ("vit_small_patch32", 224, 22_878_952),
        ("vit_base_patch8", 224, 86_576_872),
        ("vit_base_patch32", 224, 88_224_232),
        ("vit_large_patch14", 224, 304_203_752),
        ("vit_large_patch16", 224, 304_326_632),
        ("vit_large_patch32", 224, 306_535_400),
    ],
)
def test_published_parameters(name: str, img_size: int, params: int) -> None:
    assert FAMILY.count_params(FAMILY.seed(name), Context(img_size, 1000)) == params


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [("deit_tiny", 1.258), ("deit_small", 4.608), ("deit_base", 17.58)],
)
def test_published_macs(name: str, gmacs: float) -> None:
    """As timm publishes them, which counts norms besides."""
    assert FAMILY.count_macs(FAMILY.seed(name), IMAGENET) / 1e9 == pytest.approx(gmacs, rel=4e-3)


def test_every_published_name_is_timms() -> None:
    for p in FAMILY.published:
        for name in (a for a in p.aliases if re.search(r"_(224|384)$", a)):
            with on_meta():
                theirs = timm.create_model(name, num_classes=1000)
            ours = meta_build(p.arch, Context(int(name[-3:]), 1000))
            shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (ours, theirs)]
            assert shapes[0] == shapes[1], name
            heads = [n.blocks[0].attn.num_heads for n in (ours, theirs)]
            assert heads[0] == heads[1], name
            assert type(ours) is type(theirs)


def test_parameters_and_macs_equal_timm_and_torch_on_random_archs_and_contexts() -> None:
    rng = random.Random(0)
    for _ in range(60):
        arch = random_arch(rng)
        ctx = random_context(rng, arch)
        net = meta_build(arch, ctx)
        assert FAMILY.count_params(arch, ctx) == sum(p.numel() for p in net.parameters()), arch
        assert FAMILY.count_macs(arch, ctx) == torch_macs(net, ctx), (arch, ctx)


def test_counts_of_many_equal_counts_of_one() -> None:
    rng = random.Random(2)
    archs = [random_arch(rng) for _ in range(200)]
    table = FAMILY.table(archs)
    ctx = Context(2 * 3 * 5 * 7 * 16, 10)  # every patch fills it
    for many, one in (
        (FAMILY.count_params_many, FAMILY.count_params),
        (FAMILY.count_macs_many, FAMILY.count_macs),
    ):
        assert many(table, ctx).tolist() == [one(a, ctx) for a in archs]
    assert [FAMILY.row(table, i) for i in range(len(archs))] == archs
    assert FAMILY.valid_many(table).all()
    assert FAMILY.valid_many(table, ctx).tolist() == [
        ctx.img_size % a.patch_size == 0 for a in archs
    ]
    terms = FAMILY.cost_terms_many(table, ctx)
    macs = sum(terms[k] for k in ("stem macs", "head macs", "linear", "attend"))
    assert np.array_equal(macs, FAMILY.count_macs_many(table, ctx))


def test_every_legal_arch_runs_and_says_the_mean_of_its_heads() -> None:
    rng = random.Random(3)
    for _ in range(8):
        arch = random_arch(rng, most=64)
        ctx = random_context(rng, arch)
        net: Any = FAMILY.build(arch, ctx).eval()
        image = torch.randn(2, ctx.in_chans, ctx.img_size, ctx.img_size)
        with torch.no_grad():
            out, tokens = net(image), net.forward_features(image)
            heads = [net.head(tokens[:, 0])]
            if arch.dist_token:
                heads.append(net.head_dist(tokens[:, 1]))
        assert out.shape == (2, ctx.num_classes)
        assert torch.allclose(out, torch.stack(heads).mean(0), atol=1e-6)


def test_keys_are_equal_exactly_where_nets_are() -> None:
    rng = random.Random(4)
    met = {True: 0, False: 0}

    def signature(arch: Arch, ctx: Context) -> tuple[object, ...]:
        net = meta_build(arch, ctx)
        tensors = tuple((k, tuple(v.shape)) for k, v in net.state_dict().items())
        return tensors, net.blocks[0].attn.num_heads, type(net)

    for _ in range(40):
        arch = random_arch(rng, most=96)
        ctx = random_context(rng, arch)
        base, net = FAMILY.to_dict(arch), signature(arch, ctx)
        changes: list[dict[str, object]] = [
            {"mlp_ratio": arch.mlp_ratio * (1 + rng.choice([1e-9, 1e-3, 0.02]))},
            {"dist_token": not arch.dist_token},
            {"dist_token": int(arch.dist_token)},
            {"head_dim": 1},
        ]
        for change in changes:
            other = FAMILY.arch({**base, **change})
            same = net == signature(other, ctx)
            met[same] += 1
            assert (FAMILY.key(arch, ctx) == FAMILY.key(other, ctx)) == same, (arch, other, ctx)
        assert re.fullmatch(r"[a-z0-9._-]{1,80}", FAMILY.key(arch, ctx))
    assert min(met.values()) >= 20
    assert FAMILY.key(FAMILY.seed("deit_tiny"), IMAGENET) == "d192_n12_e64_m4_p16_t0"


def test_timm_call_rebuilds_the_net_through_json() -> None:
    rng = random.Random(6)
    archs = [p.arch for p in FAMILY.published] + [random_arch(rng) for _ in range(12)]
    for arch in archs:
        assert isinstance(arch, VitArch)
        ctx = random_context(rng, arch)
        call = FAMILY.timm_call(arch, ctx)
        name, kwargs = json.loads(json.dumps(call))
        with on_meta():
            net = timm.create_model(name, pretrained=False, **kwargs)
        ours = meta_build(arch, ctx).state_dict()
        assert {k: v.shape for k, v in net.state_dict().items()} == {
            k: v.shape for k, v in ours.items()
        }
        assert FAMILY.arch(json.loads(json.dumps(FAMILY.to_dict(arch)))) == arch


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"embed_dim": 100}, "embed_dim=100 is not a multiple of head_dim=64; nearest: 64, 128"),
        ({"embed_dim": 0}, "embed_dim: got 0, want an integer from 1 to 16384"),
        ({"depth": 0}, "depth: got 0, want an integer from 1 to 512"),
        ({"depth": 2.0}, "depth: got 2.0, want an integer from 1 to 512"),
        ({"patch_size": True}, "patch_size: got True, want an integer from 1 to 512"),
        ({"dist_token": 2}, "dist_token: got 2, want an integer from 0 to 1"),
        ({"dist_token": "no"}, "dist_token: got 'no', want an integer from 0 to 1"),
        ({"mlp_ratio": 0}, "mlp_ratio: got 0, want a finite number > 0"),
        (
            {"mlp_ratio": 1e-3},
            "mlp_ratio: got 0.001, want 1 to 262144 hidden channels; at width 192 it makes 0.192",
        ),
        (
            {"heads": 3},
            "arch: got the field 'heads', want only embed_dim, depth, head_dim, mlp_ratio, "
            "patch_size, dist_token; did you mean head_dim?",
        ),
    ],
)
def test_bad_archs_are_refused_in_one_line(change: dict[str, object], line: str) -> None:
    with pytest.raises(InputError) as refused:
        FAMILY.arch({**GOOD, **change})
    assert str(refused.value) == line


@pytest.mark.parametrize(("size", "near"), [(50, "48 or 64"), (223, "208 or 224")])
def test_images_that_patches_do_not_fill_are_refused(size: int, near: str) -> None:
    seed = FAMILY.seed("deit_tiny")
    for refusing in (FAMILY.check, FAMILY.build):
        with pytest.raises(InputError) as refused:
            refusing(seed, Context(size, 10))
        assert str(refused.value) == (
            f"--img-size: got {size}, want a multiple of the patch size 16 of {FAMILY.label(seed)}"
            f"; {near} is; or a seed of other patches"
        )


def test_the_published_small_and_tiny_are_contractions_of_base() -> None:
    for dist in ("", "_distilled"):
        base, *smaller = (FAMILY.seed(f"deit_{s}{dist}") for s in ("base", "small", "tiny"))
        for child in smaller:
            assert contains(FAMILY, base, child, IMAGENET)
            params = FAMILY.count_params(child, IMAGENET)
            band = Band(int(0.95 * params), int(1.05 * params))
            names = [name for name, _ in anchors_in(FAMILY, [base], IMAGENET, band)]
            assert any(name.startswith("published:deit") for name in names)
            listed = shortlist(FAMILY, [base], IMAGENET, band, 8, random_seed=0)
            assert child in [one.arch for one in listed]
    assert contains(FAMILY, FAMILY.seed("deit_tiny_distilled"), FAMILY.seed("deit_tiny"), IMAGENET)


@pytest.mark.parametrize("img_size", [48, 224])
def test_contractions_are_counted_and_floors_lie_below(img_size: int) -> None:
    ctx, seed = Context(img_size, 10), FAMILY.seed("deit_tiny_distilled")
    moves = FAMILY.moves(seed)
    most = FAMILY.count_params(seed, ctx)
    sizes = []
    for values in product(*(v.tolist() for v in moves.values())):
        mapping = dict(zip(moves, values, strict=True))
        if mapping["embed_dim"] % mapping["head_dim"] or img_size % mapping["patch_size"]:
            continue
        sizes.append(FAMILY.count_params(FAMILY.arch(mapping), ctx))
    for lo, hi in ((0, most - 1), (2_000_000, 3_000_000)):
        inside = sum(lo <= size <= min(hi, most - 1) for size in sizes)
        assert count_contractions(FAMILY, seed, ctx, Band(lo, hi)) == inside > 0
    assert FAMILY.count_params(FAMILY.floor(seed, ctx), ctx) == min(sizes)


def test_floors_and_scalings_of_any_arch_are_legal() -> None:
    rng = random.Random(9)
    for _ in range(100):
        arch = random_arch(rng)
        ctx = random_context(rng, arch)
        floor, scaled = FAMILY.floor(arch, ctx), FAMILY.scaled(arch, rng.uniform(0.01, 1.2))
        for made in (floor, scaled):
            assert FAMILY.arch(FAMILY.to_dict(made)) == made
            assert FAMILY.valid_many(FAMILY.table([made]), ctx).all()
        assert FAMILY.count_params(floor, ctx) <= FAMILY.count_params(arch, ctx)


# -- slicing -----------------------------------------------------------------------------------


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
    from nas.distill.inherit import checkpoint_context

    arch = small(patch_size=14)
    for size in (224, 56):
        state = FAMILY.build(arch, Context(size, 7)).state_dict()
        found = checkpoint_context(FAMILY, arch, Context(56, 5), state)
        assert found == Context(size, 7)
