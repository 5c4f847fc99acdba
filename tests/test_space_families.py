"""TinyViT and ViT: closed forms against timm and torch, keys against nets as built, refusals."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import space_cases
import timm
import torch
import vit_cases
from space_cases import (
    drawn,
    on_meta,
    one_thread,  # noqa: F401 - a fixture, used by every test here
)
from torch.utils.flop_counter import FlopCounterMode

from space import Arch, Context, InputError
from space.contractions import Band, baselines_in, contains, count_contractions, propose
from space.family import Family
from space.tinyvit import map_sizes

IMAGENET, DIGITS = Context(224, 1000), Context(48, 10)
TINYVIT, VIT = space_cases.FAMILY, vit_cases.FAMILY
GOOD = {f.name: f.to_dict(f.seed(name)) for f, name in ((TINYVIT, "21M"), (VIT, "deit_tiny"))}
CASES = pytest.mark.parametrize("cases", [space_cases, vit_cases], ids=["tinyvit", "vit"])


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


def signature(net: Any) -> tuple[object, ...]:
    """Everything that makes a net: its class, tensors, and per attention heads and window."""
    attention = [
        (m.num_heads, getattr(m, "key_dim", 0)) for m in net.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")
    ]
    windows = [m.window_size for m in net.modules() if hasattr(m, "window_size")]
    return type(net), tuple(shapes(net).items()), tuple(attention), tuple(windows)


def torch_macs(net: torch.nn.Module, ctx: Context) -> int:
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the counter does not see padding inside the fused kernel
    image = torch.empty(1, ctx.in_chans, ctx.img_size, ctx.img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize(
    ("name", "img_size", "num_classes", "params"),
    [
        *(("5M", 224, 1000, 5_392_764), ("11M", 224, 1000, 10_996_972), ("21M", 224, 1000, 21_198_568)),
        *(("21M", 384, 1000, 21_230_488), ("21M", 512, 1000, 21_268_120), ("5M", 224, 21_841, 12_082_725)),
        *(("11M", 224, 21_841, 20_354_581), ("21M", 224, 21_841, 33_223_825)),
        *(("deit_tiny", 224, 1000, 5_717_416), ("deit_tiny_distilled", 224, 1000, 5_910_800)),
        *(("deit_small", 224, 1000, 22_050_664), ("deit_small_distilled", 224, 1000, 22_436_432)),
        *(("deit_base", 224, 1000, 86_567_656), ("deit_base_distilled", 224, 1000, 87_338_192)),
        *(("deit_base", 384, 1000, 86_859_496), ("deit_base_distilled", 384, 1000, 87_630_032)),
        *(("vit_small_patch8", 224, 1000, 22_055_272), ("vit_small_patch32", 224, 1000, 22_878_952)),
        *(("vit_base_patch8", 224, 1000, 86_576_872), ("vit_base_patch32", 224, 1000, 88_224_232)),
        *(("vit_large_patch14", 224, 1000, 304_203_752), ("vit_large_patch16", 224, 1000, 304_326_632)),
        ("vit_large_patch32", 224, 1000, 306_535_400),
    ],
)
def test_published_parameters(name: str, img_size: int, num_classes: int, params: int) -> None:
    family = TINYVIT if name.endswith("M") else VIT
    assert family.count_params(family.seed(name), Context(img_size, num_classes)) == params


@pytest.mark.parametrize(
    ("name", "macs", "off"),
    [
        *(("5M", 1_255_174_720, 0), ("11M", 2_016_046_144, 0), ("21M", 4_250_329_536, 0)),
        *(("deit_tiny", 1.258e9, 4e-3), ("deit_small", 4.608e9, 4e-3), ("deit_base", 17.58e9, 4e-3)),
    ],
)
def test_published_macs(name: str, macs: float, off: float) -> None:
    """DeiT's as timm publishes them, which counts norms besides."""
    family = TINYVIT if name.endswith("M") else VIT
    assert family.count_macs(family.seed(name), IMAGENET) == pytest.approx(macs, rel=off)


@CASES
def test_every_published_name_is_timms(cases: ModuleType) -> None:
    for p in cases.FAMILY.published:
        for name in (a for a in p.aliases if re.search(r"_(224|384|512)$", a)):
            with on_meta():
                theirs = timm.create_model(name, num_classes=1000)
            ours = cases.meta_build(p.arch, Context(int(name[-3:]), 1000))
            assert signature(ours) == signature(theirs), name


@CASES
def test_parameters_and_macs_equal_timm_and_torch_on_random_archs_and_contexts(cases: ModuleType) -> None:
    rng, family = random.Random(0), cases.FAMILY
    for turn in range(80):
        arch, ctx = drawn(cases, rng)
        net = cases.meta_build(arch, ctx)
        assert family.count_params(arch, ctx) == sum(p.numel() for p in net.parameters()), arch
        if turn < 20:
            assert family.count_macs(arch, ctx) == torch_macs(net, ctx), (arch, ctx)


@CASES
def test_counts_of_many_equal_counts_of_one(cases: ModuleType) -> None:
    rng, family = random.Random(2), cases.FAMILY
    archs = [cases.random_arch(rng) for _ in range(200)]
    table = family.table(archs)
    for ctx in (Context(2 * 3 * 5 * 7 * 16, 10), Context(1120, 7, 4)):  # every patch fills them
        for many, one in ((family.count_params_many, family.count_params), (family.count_macs_many, family.count_macs)):
            assert many(table, ctx).tolist() == [one(a, ctx) for a in archs]
    assert [family.row(table, i) for i in range(len(archs))] == archs
    assert family.valid_many(table).all()


@CASES
def test_open_grids_count_as_flat_tables_do(cases: ModuleType) -> None:
    family = cases.FAMILY
    rng = np.random.default_rng(0)
    some = {
        f: v[np.sort(rng.choice(len(v), min(len(v), 5), replace=False))]
        for f, v in family.moves(family.published[0].arch).items()
    }
    sizes = [len(v) for v in some.values()]
    grid, flat = {}, {}
    for k, (field, v) in enumerate(some.items()):
        shape = [1] * k + [len(v)] + [1] * (len(some) - k - 1)
        grid[field] = v.reshape(*shape, *v.shape[1:])
        full = np.broadcast_to(grid[field], (*sizes, *v.shape[1:]))
        flat[field] = full.reshape(-1, *v.shape[1:])

    def terms(table: Any, ctx: Context) -> Any:
        return np.stack(list(family.cost_terms_many(table, ctx).values()), axis=-1)

    for count in (family.count_params_many, family.count_macs_many, terms):
        assert np.array_equal(count(grid, IMAGENET).reshape(-1), count(flat, IMAGENET).reshape(-1))


@CASES
def test_cost_terms_add_up_to_the_macs_in_the_shape_of_counts(cases: ModuleType) -> None:
    rng, family = random.Random(0), cases.FAMILY
    kinds = ("linear", "attend", "depthwise", "stem macs", "head macs", "merge")
    table = family.table([cases.random_arch(rng) for _ in range(100)])
    for ctx in (IMAGENET, Context(1120, 7, 4)):
        macs, terms = family.count_macs_many(table, ctx), family.cost_terms_many(table, ctx)
        assert {v.shape for v in terms.values()} == {macs.shape}
        assert all((v >= 0).all() for v in terms.values())
        assert np.array_equal(sum(v for name, v in terms.items() if name.endswith(kinds)), macs)
        assert (terms["once"] == 1).all()
        plain = Family.cost_terms_many(family, table, ctx)  # of a family without parts
        assert (plain["macs"] == macs).all()
        assert {v.shape for v in plain.values()} == {macs.shape}


@CASES
def test_every_legal_arch_runs_at_its_size(cases: ModuleType) -> None:
    rng = random.Random(3)
    for _ in range(7):
        arch, ctx = drawn(cases, rng, most=64)
        ctx = ctx if cases is vit_cases else Context(rng.choice([33, 48, 61]), 5, ctx.in_chans)
        net: Any = cases.FAMILY.build(arch, ctx).eval()
        with torch.no_grad():
            image = torch.randn(2, ctx.in_chans, ctx.img_size, ctx.img_size)
            out = net(image)
        assert out.shape == (2, ctx.num_classes)
        assert out.isfinite().all()
        if getattr(arch, "dist_token", False):
            tokens = net.forward_features(image)
            heads = [net.head(tokens[:, 0]), net.head_dist(tokens[:, 1])]
            assert torch.allclose(out, torch.stack(heads).mean(0), atol=1e-6)


def test_map_sizes_are_timms() -> None:
    narrow = {"embed_dims": [8, 32, 32, 32], "depths": [1] * 4}
    arch: Any = TINYVIT.arch({**GOOD["tinyvit"], **narrow})
    for size in (16, 17, 48, 95, 96, 97, 223, 224, 225, 511):
        net = space_cases.meta_build(arch, Context(size, 1))
        image = torch.empty(1, 3, size, size, device="meta")
        maps = net.forward_intermediates(image, intermediates_only=True)
        assert map_sizes(size) == tuple(m.shape[-1] for m in maps)


def neighbours(arch: Any, rng: random.Random) -> list[dict[str, object]]:
    """Small changes, some of which build the same net."""
    changes: list[dict[str, object]] = [{"mlp_ratio": arch.mlp_ratio * (1 + rng.choice([1e-9, 1e-3, 0.02]))}]
    if hasattr(arch, "dist_token"):
        tokens = [{"dist_token": not arch.dist_token}, {"dist_token": int(arch.dist_token)}]
        return [*changes, *tokens, {"head_dim": 1}]
    smaller = [e for e in range(1, arch.head_dim) if arch.head_dim % e == 0] or [1]
    windows = [max(1, w + rng.choice([-3, 0, 3, 7])) for w in arch.window_sizes]
    expand = arch.mbconv_expand_ratio * (1 + rng.choice([1e-9, 0.01, 0.1]))
    return [*changes, {"window_sizes": windows}, {"mbconv_expand_ratio": expand}, {"head_dim": max(smaller)}]


@CASES
def test_keys_are_equal_exactly_where_nets_are(cases: ModuleType) -> None:
    rng, family, met = random.Random(4), cases.FAMILY, {True: 0, False: 0}
    for _ in range(35):
        arch, ctx = drawn(cases, rng, most=96)
        net = signature(cases.meta_build(arch, ctx))
        for change in neighbours(arch, rng):
            other = family.arch({**family.to_dict(arch), **change})
            same = net == signature(cases.meta_build(other, ctx))
            met[same] += 1
            assert (family.key(arch, ctx) == family.key(other, ctx)) == same, (arch, other, ctx)
        assert re.fullmatch(r"[a-z0-9._-]{1,120}", family.key(arch, ctx))
    assert min(met.values()) >= 20  # both sides of the law were seen


def test_keys_are_stable() -> None:
    assert VIT.key(VIT.seed("deit_tiny"), IMAGENET) == "d192_n12_e64_m4_p16_t0"
    arch = TINYVIT.seed("5M")
    assert TINYVIT.key(arch, DIGITS) == "d64-128-160-320_n2-2-6-2_w2-3-2_r4_m4_e32"
    assert TINYVIT.key(arch, IMAGENET) == "d64-128-160-320_n2-2-6-2_w7-14-7_r4_m4_e32"
    wide = TINYVIT.arch({**GOOD["tinyvit"], "window_sizes": [14, 14, 14]})
    assert TINYVIT.key(wide, IMAGENET).split("_")[2] == "w14-14-7"  # the last map is 7x7


@CASES
def test_timm_call_and_dict_rebuild_the_net_through_json(cases: ModuleType) -> None:
    rng, family = random.Random(6), cases.FAMILY
    for arch in [p.arch for p in family.published] + [cases.random_arch(rng) for _ in range(12)]:
        ctx = cases.random_context(rng, arch)
        name, kwargs = json.loads(json.dumps(family.timm_call(arch, ctx)))
        with on_meta():
            net = timm.create_model(name, pretrained=False, **kwargs)
        assert shapes(net) == shapes(cases.meta_build(arch, ctx))
        assert not [m for m in net.modules() if type(m).__name__ == "DropPath"]
        again = family.arch(json.loads(json.dumps(family.to_dict(arch))))
        assert (again, hash(again)) == (arch, hash(arch))


def test_timm_call_names_the_nearest_published_size() -> None:
    for p in TINYVIT.published:
        assert TINYVIT.timm_call(p.arch, IMAGENET)[0] == f"tiny_vit_{p.name.lower()}_224"


def test_window_sizes_as_timm_writes_them() -> None:
    for change in ({"window_sizes": [7, 7, 14, 7]}, {"mlp_ratio": 4, "window_sizes": (7, 14, 7)}):
        assert TINYVIT.arch({**GOOD["tinyvit"], **change}) == TINYVIT.seed("21M")


INT = "want an integer from 1 to"
REFUSED: list[tuple[str, dict[str, object], str]] = [
    (
        "tinyvit",
        {"embed_dims": [96, 192, 150, 576]},
        "embed_dims[2]=150 is not a multiple of head_dim=32; nearest: 128, 160",
    ),
    ("tinyvit", {"embed_dims": [95, 192, 384, 576]}, "embed_dims[0]=95 is not a multiple of 2; nearest: 94, 96"),
    ("tinyvit", {"embed_dims": [96, 192, 384]}, "embed_dims: got [96, 192, 384], want a list of 4 integers; it has 3"),
    ("tinyvit", {"embed_dims": "96,192"}, "embed_dims: got '96,192', want a list of 4 integers"),
    ("tinyvit", {"embed_dims": [96, 192, 384, 576.0]}, f"embed_dims[3]: got 576.0, {INT} 16384"),
    ("tinyvit", {"depths": [2, 2, 0, 2]}, f"depths[2]: got 0, {INT} 512"),
    ("tinyvit", {"depths": [2, True, 6, 2]}, f"depths[1]: got True, {INT} 512"),
    ("tinyvit", {"window_sizes": [0, 7, 14, 7]}, f"window_sizes[0]: got 0, {INT} 512"),
    ("tinyvit", {"mlp_ratio": float("nan")}, "mlp_ratio: got nan, want a finite number > 0"),
    ("tinyvit", {"mlp_ratio": "4"}, "mlp_ratio: got '4', want a number > 0"),
    (
        "tinyvit",
        {"mbconv_expand_ratio": 0.01},
        "mbconv_expand_ratio: got 0.01, want 1 to 262144 hidden channels; at widths 96 to 96 it makes 0.96 to 0.96",
    ),
    ("tinyvit", {"head_dim": 32.0}, f"head_dim: got 32.0, {INT} 16384"),
    (
        "tinyvit",
        {"mlp_ration": 4},
        "arch: got the field 'mlp_ration', want only embed_dims, depths, window_sizes, "
        "mbconv_expand_ratio, mlp_ratio, head_dim; did you mean mlp_ratio?",
    ),
    ("vit", {"embed_dim": 20}, "embed_dim=20 is not a multiple of head_dim=64; nearest: 64"),
    ("vit", {"patch_size": True}, f"patch_size: got True, {INT} 512"),
    ("vit", {"dist_token": 2}, "dist_token: got 2, want an integer from 0 to 1"),
    (
        "vit",
        {"mlp_ratio": 1e-3},
        "mlp_ratio: got 0.001, want 1 to 262144 hidden channels; at widths 192 to 192 it makes 0.192 to 0.192",
    ),
]


@pytest.mark.parametrize(("name", "change", "line"), REFUSED)
def test_bad_archs_are_refused_in_one_line(name: str, change: dict[str, object], line: str) -> None:
    family = TINYVIT if name == "tinyvit" else VIT
    with pytest.raises(InputError) as refused:
        family.arch({**GOOD[name], **change})
    assert str(refused.value) == line


def test_missing_fields_are_named() -> None:
    with pytest.raises(InputError, match="got no depths, head_dim, want all of embed_dims"):
        TINYVIT.arch({k: v for k, v in GOOD["tinyvit"].items() if k not in ("depths", "head_dim")})
    with pytest.raises(InputError, match="want a mapping"):
        TINYVIT.arch([1, 2])


@pytest.mark.parametrize(("size", "nearest"), [(50, "48 or 64"), (223, "208 or 224")])
def test_images_that_patches_do_not_fill_are_refused(size: int, nearest: str) -> None:
    seed = VIT.seed("deit_tiny")
    table = VIT.table([seed])
    assert not VIT.valid_many(table, Context(size, 10)).any()
    for refusing in (VIT.check, VIT.build):
        with pytest.raises(InputError) as refused:
            refusing(seed, Context(size, 10))
        assert str(refused.value) == (
            f"--img-size: got {size}, want a multiple of the patch size 16 of {VIT.label(seed)}"
            f"; {nearest} is; or a seed of other patches"
        )


@CASES
def test_floors_and_scalings_of_any_arch_are_legal(cases: ModuleType) -> None:
    rng, family = random.Random(9), cases.FAMILY
    for _ in range(100):
        arch, ctx = drawn(cases, rng)
        floor, scaled = family.floor(arch, ctx), family.scaled(arch, rng.uniform(0.01, 1.2))
        for made in (floor, scaled):
            assert family.arch(family.to_dict(made)) == made
            assert family.fits(made, ctx)
        assert family.count_params(floor, ctx) <= family.count_params(arch, ctx)


def test_uniform_scaling_keeps_the_order_of_stages() -> None:
    rng = random.Random(8)
    for _ in range(100):
        arch = space_cases.random_arch(rng)
        unit = arch.head_dim * 2
        dims = sorted(unit * (d // arch.head_dim + 1) for d in arch.embed_dims)
        rising = TINYVIT.arch({**TINYVIT.to_dict(arch), "embed_dims": dims})
        scaled: Any = TINYVIT.scaled(rising, rng.uniform(0.01, 1.2))
        assert list(scaled.embed_dims) == sorted(scaled.embed_dims)
        assert all(d % 32 == 0 for d in scaled.embed_dims)


def test_the_floor_of_a_tinyvit_is_below_every_contraction() -> None:
    rng = random.Random(9)
    for arch, ctx in product((p.arch for p in TINYVIT.published), (IMAGENET, DIGITS)):
        least, moves = TINYVIT.count_params(TINYVIT.floor(arch, ctx), ctx), TINYVIT.moves(arch)
        for _ in range(50):
            values = {f: v[rng.randrange(len(v))].tolist() for f, v in moves.items()}
            assert TINYVIT.count_params(TINYVIT.arch(values), ctx) >= least


@pytest.mark.parametrize("img_size", [48, 224])
def test_contractions_of_a_vit_are_counted_and_the_floor_is_the_least(img_size: int) -> None:
    ctx, seed = Context(img_size, 10), VIT.seed("deit_tiny_distilled")
    moves, most = VIT.moves(seed), VIT.count_params(seed, ctx)
    sizes = []
    for values in product(*(v.tolist() for v in moves.values())):
        mapping = dict(zip(moves, values, strict=True))
        if not (mapping["embed_dim"] % mapping["head_dim"] or img_size % mapping["patch_size"]):
            sizes.append(VIT.count_params(VIT.arch(mapping), ctx))
    for lo, hi in ((0, most - 1), (2_000_000, 3_000_000)):
        inside = sum(lo <= size <= min(hi, most - 1) for size in sizes)
        assert count_contractions(VIT, seed, ctx, Band(lo, hi)) == inside > 0
    assert VIT.count_params(VIT.floor(seed, ctx), ctx) == min(sizes)


def test_the_published_small_and_tiny_are_contractions_of_base() -> None:
    for dist in ("", "_distilled"):
        base, *smaller = (VIT.seed(f"deit_{s}{dist}") for s in ("base", "small", "tiny"))
        for child in smaller:
            assert contains(VIT, base, child, IMAGENET)
            params = VIT.count_params(child, IMAGENET)
            band = Band(int(0.95 * params), int(1.05 * params))
            names = [name for name, _ in baselines_in(VIT, [base], IMAGENET, band)]
            assert any(name.startswith("published:deit") for name in names)
            listed = propose(VIT, [base], IMAGENET, band, 8, random_seed=0)
            assert child in [one.arch for one in listed]
    distilled: Arch = VIT.seed("deit_tiny_distilled")
    assert contains(VIT, distilled, VIT.seed("deit_tiny"), IMAGENET)
