"""TinyViT: closed forms against timm and torch, keys against nets as built, the door."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import timm
import torch
from space_cases import (
    FAMILY,
    meta_build,
    on_meta,
    one_thread,  # noqa: F401 - a fixture, used by every test here
    random_arch,
    random_context,
)
from torch.utils.flop_counter import FlopCounterMode

from space import Context, InputError
from space.tinyvit import TinyVitArch, map_sizes

IMAGENET = Context(224, 1000)
GOOD = FAMILY.to_dict(FAMILY.seed("21M"))


def signature(arch: TinyVitArch, ctx: Context) -> tuple[object, ...]:
    """Everything that makes a net: its tensors, and per attention the heads and the window."""
    net = meta_build(arch, ctx)
    tensors = tuple((k, tuple(v.shape)) for k, v in net.state_dict().items())
    blocks = [m for m in net.modules() if type(m).__name__ == "TinyVitBlock"]
    return tensors, tuple((b.attn.num_heads, b.attn.key_dim, b.window_size) for b in blocks)


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
        ("5M", 224, 1000, 5_392_764),
        ("11M", 224, 1000, 10_996_972),
        ("21M", 224, 1000, 21_198_568),
        ("21M", 384, 1000, 21_230_488),
        ("21M", 512, 1000, 21_268_120),
        ("5M", 224, 21_841, 12_082_725),
        ("11M", 224, 21_841, 20_354_581),
        ("21M", 224, 21_841, 33_223_825),
    ],
)
def test_published_parameters(name: str, img_size: int, num_classes: int, params: int) -> None:
    assert FAMILY.count_params(FAMILY.seed(name), Context(img_size, num_classes)) == params


@pytest.mark.parametrize(
    ("name", "macs"), [("5M", 1_255_174_720), ("11M", 2_016_046_144), ("21M", 4_250_329_536)]
)
def test_published_macs(name: str, macs: int) -> None:
    arch = FAMILY.seed(name)
    assert (
        FAMILY.count_macs(arch, IMAGENET)
        == macs
        == torch_macs(meta_build(arch, IMAGENET), IMAGENET)
    )


@pytest.mark.parametrize("px", [384, 512])
def test_windows_scale_as_the_published_models_do(px: int) -> None:
    ours = meta_build(FAMILY.seed("21M"), Context(px, 1000))
    with on_meta():
        theirs = timm.create_model(f"tiny_vit_21m_{px}")
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_parameters_equal_timm_on_random_archs_and_contexts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        arch, ctx = random_arch(rng, deepest=rng.randint(1, 3)), random_context(rng)
        built = sum(p.numel() for p in meta_build(arch, ctx).parameters())
        assert FAMILY.count_params(arch, ctx) == built, (arch, ctx)


def test_macs_equal_torch_on_random_archs_and_contexts() -> None:
    rng = random.Random(1)
    for _ in range(30):
        arch, ctx = random_arch(rng, deepest=2), random_context(rng)
        assert FAMILY.count_macs(arch, ctx) == torch_macs(meta_build(arch, ctx), ctx), (arch, ctx)


def test_counts_of_many_equal_counts_of_one() -> None:
    rng = random.Random(2)
    archs = [random_arch(rng) for _ in range(300)]
    table = FAMILY.table(archs)
    # Longer than a chunk, so that the seams are covered.
    long = {field: np.resize(v, (9000, *v.shape[1:])) for field, v in table.items()}
    for _ in range(5):
        ctx = random_context(rng)
        params, macs = (
            [FAMILY.count_params(a, ctx) for a in archs],
            FAMILY.count_macs_many(table, ctx),
        )
        assert FAMILY.count_params_many(table, ctx).tolist() == params
        assert np.array_equal(FAMILY.count_params_many(long, ctx), np.resize(params, 9000))
        assert macs.tolist() == [FAMILY.count_macs(a, ctx) for a in archs]
    assert [FAMILY.row(table, i) for i in range(len(archs))] == archs
    assert FAMILY.valid_many(table).all()


def test_open_grids_count_as_flat_tables_do() -> None:
    moves = FAMILY.moves(FAMILY.seed("5M"))
    rng = np.random.default_rng(0)
    some = {
        f: v[np.sort(rng.choice(len(v), min(len(v), 5), replace=False))] for f, v in moves.items()
    }
    sizes = [len(v) for v in some.values()]
    grid, flat = {}, {}
    for k, (field, v) in enumerate(some.items()):
        shape = [1] * k + [len(v)] + [1] * (len(some) - k - 1)
        grid[field] = v.reshape(*shape, *v.shape[1:])
        full = np.broadcast_to(grid[field], (*sizes, *v.shape[1:]))
        flat[field] = full.reshape(-1, *v.shape[1:])
    for count in (FAMILY.count_params_many, FAMILY.count_macs_many):
        assert np.array_equal(count(grid, IMAGENET).reshape(-1), count(flat, IMAGENET))


def test_every_legal_arch_runs_at_its_size() -> None:
    rng = random.Random(3)
    for _ in range(6):
        arch = random_arch(rng, most=64, deepest=1)
        ctx = Context(rng.choice([32, 33, 48, 61, 96]), rng.randint(1, 20), rng.choice([1, 3, 4]))
        with torch.no_grad():
            image = torch.randn(2, ctx.in_chans, ctx.img_size, ctx.img_size)
            out = FAMILY.build(arch, ctx).eval()(image)
        assert out.shape == (2, ctx.num_classes)
        assert out.isfinite().all()


def test_map_sizes_are_timms() -> None:
    arch = FAMILY.arch({**GOOD, "embed_dims": [8, 32, 32, 32], "depths": [1] * 4})
    for size in (16, 17, 48, 95, 96, 97, 223, 224, 225, 511):
        ctx = Context(size, 1)
        net = meta_build(arch, ctx)
        image = torch.empty(1, 3, size, size, device="meta")
        maps = net.forward_intermediates(image, intermediates_only=True)
        assert map_sizes(size) == tuple(m.shape[-1] for m in maps)


def test_keys_are_equal_exactly_where_nets_are() -> None:
    rng = random.Random(4)
    met = {True: 0, False: 0}
    for _ in range(30):
        arch, ctx = random_arch(rng, most=96, deepest=1), random_context(rng)
        base, net = FAMILY.to_dict(arch), signature(arch, ctx)
        changes = [
            {"window_sizes": [max(1, w + rng.choice([-3, 0, 3, 7])) for w in arch.window_sizes]},
            {"mlp_ratio": arch.mlp_ratio * (1 + rng.choice([1e-9, 1e-3, 0.02]))},
            {"mbconv_expand_ratio": arch.mbconv_expand_ratio * (1 + rng.choice([1e-9, 0.01, 0.1]))},
            {
                "head_dim": max(
                    e
                    for e in range(1, arch.head_dim + 1)
                    if arch.head_dim % e == 0 and (e < arch.head_dim or e == 1)
                )
            },
        ]
        for change in changes:
            other = FAMILY.arch({**base, **change})
            same = net == signature(other, ctx)
            met[same] += 1
            assert (FAMILY.key(arch, ctx) == FAMILY.key(other, ctx)) == same, (arch, other, ctx)
    assert min(met.values()) >= 20  # both sides of the law were seen


def test_keys_are_stable_and_safe_in_file_names() -> None:
    arch = FAMILY.seed("5M")
    assert FAMILY.key(arch, Context(48, 10)) == "d64-128-160-320_n2-2-6-2_w2-3-2_r4_m4_e32"
    assert FAMILY.key(arch, IMAGENET) == "d64-128-160-320_n2-2-6-2_w7-14-7_r4_m4_e32"
    wide = FAMILY.arch({**GOOD, "window_sizes": [14, 14, 14]})
    assert FAMILY.key(wide, IMAGENET).split("_")[2] == "w14-14-7"  # the last map is 7x7
    rng = random.Random(5)
    for _ in range(200):
        key = FAMILY.key(random_arch(rng), random_context(rng))
        assert re.fullmatch(r"[a-z0-9._-]{1,120}", key)


def test_timm_call_rebuilds_the_net_through_json() -> None:
    rng = random.Random(6)
    archs = [p.arch for p in FAMILY.published] + [random_arch(rng, deepest=1) for _ in range(12)]
    for arch in archs:
        ctx = random_context(rng)
        name, kwargs = FAMILY.timm_call(arch, ctx)
        again = json.loads(json.dumps([name, kwargs]))
        assert again == [name, kwargs]
        with on_meta():
            net = timm.create_model(again[0], pretrained=False, **again[1])
        ours = meta_build(arch, ctx).state_dict()
        assert {k: v.shape for k, v in net.state_dict().items()} == {
            k: v.shape for k, v in ours.items()
        }
        assert sum(p.numel() for p in net.parameters()) == FAMILY.count_params(arch, ctx)
        drops = [m for m in net.modules() if type(m).__name__ == "DropPath"]
        assert not drops


def test_timm_call_names_the_nearest_published_size() -> None:
    for p in FAMILY.published:
        assert FAMILY.timm_call(p.arch, IMAGENET)[0] == f"tiny_vit_{p.name.lower()}_224"


def test_arch_and_dict_are_inverses() -> None:
    rng = random.Random(7)
    for _ in range(200):
        arch = random_arch(rng)
        assert FAMILY.arch(json.loads(json.dumps(FAMILY.to_dict(arch)))) == arch
        assert hash(FAMILY.arch(FAMILY.to_dict(arch))) == hash(arch)


def test_window_sizes_as_timm_writes_them() -> None:
    assert FAMILY.arch({**GOOD, "window_sizes": [7, 7, 14, 7]}) == FAMILY.seed("21M")
    assert FAMILY.arch({**GOOD, "mlp_ratio": 4, "window_sizes": (7, 14, 7)}) == FAMILY.seed("21M")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"embed_dims": [96, 192, 150, 576]},
            "embed_dims[2]=150 is not a multiple of head_dim=32; nearest: 128, 160",
        ),
        (
            {"embed_dims": [96, 20, 160, 576]},
            "embed_dims[1]=20 is not a multiple of head_dim=32; nearest: 32",
        ),
        (
            {"embed_dims": [95, 192, 384, 576]},
            "embed_dims[0]=95 is not a multiple of 2; nearest: 94, 96",
        ),
        (
            {"embed_dims": [96, 192, 384]},
            "embed_dims: got [96, 192, 384], want a list of 4 integers; it has 3",
        ),
        ({"embed_dims": "96,192"}, "embed_dims: got '96,192', want a list of 4 integers"),
        (
            {"embed_dims": [96, 192, 384, 576.0]},
            "embed_dims[3]: got 576.0, want an integer from 1 to 16384",
        ),
        (
            {"embed_dims": [96, 192, 384, 0]},
            "embed_dims[3]: got 0, want an integer from 1 to 16384",
        ),
        ({"depths": [2, 2, 0, 2]}, "depths[2]: got 0, want an integer from 1 to 512"),
        ({"depths": [2, True, 6, 2]}, "depths[1]: got True, want an integer from 1 to 512"),
        ({"depths": None}, "depths: got None, want a list of 4 integers"),
        ({"window_sizes": [7, 0, 7]}, "window_sizes[1]: got 0, want an integer from 1 to 512"),
        ({"window_sizes": [0, 7, 14, 7]}, "window_sizes[0]: got 0, want an integer from 1 to 512"),
        ({"window_sizes": 7}, "window_sizes: got 7, want a list of 3 integers"),
        ({"mlp_ratio": 0}, "mlp_ratio: got 0, want a finite number > 0"),
        ({"mlp_ratio": -4.0}, "mlp_ratio: got -4.0, want a finite number > 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio: got nan, want a finite number > 0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio: got inf, want a finite number > 0"),
        ({"mlp_ratio": "4"}, "mlp_ratio: got '4', want a number > 0"),
        ({"mbconv_expand_ratio": True}, "mbconv_expand_ratio: got True, want a number > 0"),
        (
            {"mbconv_expand_ratio": 0.01},
            "mbconv_expand_ratio: got 0.01, want 1 to 262144 hidden channels; "
            "at widths 96 to 96 it makes 0.96 to 0.96",
        ),
        ({"head_dim": 32.0}, "head_dim: got 32.0, want an integer from 1 to 16384"),
        (
            {"mlp_ration": 4},
            "arch: got the field 'mlp_ration', want only embed_dims, depths, window_sizes, "
            "mbconv_expand_ratio, mlp_ratio, head_dim; did you mean mlp_ratio?",
        ),
    ],
)
def test_bad_archs_are_refused_in_one_line(change: dict[str, object], line: str) -> None:
    with pytest.raises(InputError) as refused:
        FAMILY.arch({**GOOD, **change})
    assert str(refused.value) == line


def test_missing_fields_are_named() -> None:
    with pytest.raises(InputError, match="got no depths, head_dim, want all of embed_dims"):
        FAMILY.arch({k: v for k, v in GOOD.items() if k not in ("depths", "head_dim")})
    with pytest.raises(InputError, match="want a mapping"):
        FAMILY.arch([1, 2])  # type: ignore[arg-type]


def test_uniform_scaling_keeps_the_order_of_stages() -> None:
    rng = random.Random(8)
    for _ in range(200):
        arch = random_arch(rng)
        rising = FAMILY.arch(
            {
                **FAMILY.to_dict(arch),
                "embed_dims": sorted(
                    arch.head_dim * 2 * (d // arch.head_dim + 1) for d in arch.embed_dims
                ),
            }
        )
        scaled = FAMILY.scaled(rising, rng.uniform(0.01, 1.2))
        assert FAMILY.arch(FAMILY.to_dict(scaled)) == scaled
        assert list(scaled.embed_dims) == sorted(scaled.embed_dims)
        assert all(d % 32 == 0 for d in scaled.embed_dims)


def test_floor_is_legal_and_below_every_contraction() -> None:
    rng = random.Random(9)
    for name in ("5M", "11M", "21M"):
        for ctx in (IMAGENET, Context(48, 10)):
            arch = FAMILY.seed(name)
            floor = FAMILY.floor(arch, ctx)
            moves = FAMILY.moves(arch)
            least = FAMILY.count_params(floor, ctx)
            for _ in range(50):
                values = {f: v[rng.randrange(len(v))].tolist() for f, v in moves.items()}
                assert FAMILY.count_params(FAMILY.arch(values), ctx) >= least
    for _ in range(100):
        arch, ctx = random_arch(rng), random_context(rng)
        floor = FAMILY.floor(arch, ctx)
        assert FAMILY.arch(FAMILY.to_dict(floor)) == floor
        assert FAMILY.count_params(floor, ctx) <= FAMILY.count_params(arch, ctx)
