"""ViT and DeiT: closed forms against timm and torch, keys against nets as built, the door."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import timm
import torch
from space_cases import (
    on_meta,
    one_thread,  # noqa: F401 - a fixture, used by every test here
)
from timm.models import vision_transformer
from torch.utils.flop_counter import FlopCounterMode
from vit_cases import FAMILY, meta_build, random_arch, random_context

from space import Context, InputError
from space.contractions import Band, anchors_in, contains, count_contractions, shortlist
from space.family import Arch
from space.vit import VitArch

IMAGENET = Context(224, 1000)
GOOD = FAMILY.to_dict(FAMILY.seed("deit_tiny"))


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
    ("name", "gmacs"), [("deit_tiny", 1.258), ("deit_small", 4.608), ("deit_base", 17.58)]
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
