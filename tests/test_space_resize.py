"""Tables of positions resized by name: against torch, DeiT's and TinyViT's own code, and timm."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import space_cases
import torch
import torch.nn.functional as F
import vit_cases
from space_cases import (
    SMALL,
    drawn,
    on_meta,
    one_thread,  # noqa: F401 - a fixture, used by every test here
)
from timm.layers import resample_abs_pos_embed
from timm.models import tiny_vit, vision_transformer

from nas.inherit.slice import inherit
from space import Context, InputError, get_family
from space.family import Arch, Family, Slice
from space.slicing import antialiased, bicubic, square

VIT, TINYVIT = get_family("vit"), get_family("tinyvit")
BIASES = "attn.attention_biases"
State = dict[str, torch.Tensor]


def vit(**changes: object) -> Arch:
    return vit_cases.small(**{"embed_dim": 16, "depth": 1, "head_dim": 8, "mlp_ratio": 2.0, **changes})


def tinyvit(**changes: object) -> Arch:
    narrow = {"embed_dims": [8, 16, 16, 24], "depths": [1, 2, 1, 1], "head_dim": 8}
    ratios = {"mbconv_expand_ratio": 2.0, "mlp_ratio": 2.0}
    return TINYVIT.arch({**SMALL, **narrow, **ratios, **changes})


def scrambled(family: Family, arch: Arch, ctx: Context, seed: int, dtype: torch.dtype) -> Any:
    """Build a net without repeated values; what is derived (TinyViT's indices) is left empty."""
    with on_meta():
        net = family.build(arch, ctx)
    net = net.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return net


def carried(
    family: Family, arch: Arch, there: Context, here: Context, how: str, dtype: torch.dtype = torch.float64
) -> tuple[State, State, State, Any]:
    """Give the state of a parent, the child's before and after `inherit`, and the child."""
    parent = scrambled(family, arch, there, 0, dtype).state_dict()
    child = scrambled(family, arch, here, 1, dtype)
    before = {k: v.clone() for k, v in child.state_dict().items()}
    inherit(child, parent, family.resized(arch, there, here, how))
    return parent, before, child.state_dict(), child


# -- oracles: what their authors' code does --------------------------------------------------------
def by_deit(state: State, net: Any) -> State:
    """Resize as DeiT's main.py does when it finetunes."""
    table = state["pos_embed"]
    extra = net.pos_embed.shape[-2] - net.patch_embed.num_patches
    old, new = int((table.shape[-2] - extra) ** 0.5), int(net.patch_embed.num_patches**0.5)
    grid = table[:, extra:].reshape(-1, old, old, table.shape[-1]).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return {**state, "pos_embed": torch.cat((table[:, :extra], grid), dim=1)}


def by_official_tinyvit(state: State, net: Any) -> State:
    """Resize as TinyViT's utils.py does in `load_pretrained`."""
    found, here = dict(state), net.state_dict()
    for key in (k for k in state if "attention_biases" in k):
        (heads, old), new = state[key].shape, here[key].shape[1]
        if old != new:
            table = state[key].view(1, heads, int(old**0.5), int(old**0.5))
            size = (int(new**0.5), int(new**0.5))
            found[key] = F.interpolate(table, size=size, mode="bicubic").view(heads, new)
    return found


def loaded(own: State, resized: State) -> State:
    """Load what fits, as all of them do: a head of other classes stays the child's own."""
    return {k: resized[k] if resized[k].shape == v.shape else v for k, v in own.items()}


def check_equal(got: State, want: State, tables: set[str], atol: float) -> None:
    """Hold a state equal to another: all bit by bit, but for the tables."""
    assert set(got) == set(want)
    for key, tensor in got.items():
        assert tensor.dtype == want[key].dtype
        if key in tables:
            assert torch.allclose(tensor, want[key], rtol=0, atol=atol), key
        else:
            assert torch.equal(tensor, want[key]), key


def plain(s: Slice) -> tuple[object, ...]:
    return s.source, [i.tolist() for i in s.index], {d: blend.tolist() for d, blend in s.blends.items()}


# -- the weights -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("line", "antialias"), [(bicubic, False), (antialiased, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_torchs_up_and_down(line: Any, antialias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [*product(range(1, 17), repeat=2), (24, 14), (14, 24), (32, 14), (32, 24), (37, 16)]
    for child, parent in sizes:
        table = torch.randn(2, 3, parent, parent, generator=generator, dtype=torch.float64)
        want = F.interpolate(
            table.to(dtype), size=(child, child), mode="bicubic", antialias=antialias, align_corners=False
        ).double()
        weights = torch.from_numpy(line(child, parent))
        assert weights.dtype == torch.float64
        # torch also places single precision's taps in single precision
        atol = 1e-12 if dtype == torch.float64 else 2e-5
        assert torch.allclose(weights @ table @ weights.T, want, rtol=0, atol=atol), (child, parent)
        index, blend = square(child, parent, line)
        if child == parent:
            assert blend is None
            assert index.tolist() == list(range(child**2))
        else:
            got = table.flatten(2) @ torch.from_numpy(blend).T
            assert torch.allclose(got, want.flatten(2), rtol=0, atol=atol), (child, parent)
            assert blend.shape == (len(index), parent**2)
            assert 0 <= index.min() <= index.max() < parent**2


# -- ViT -------------------------------------------------------------------------------------------
VIT_SIZES = [(48, 128), (128, 48), (64, 80), (80, 64), (224, 384), (384, 512), (512, 224)]


@pytest.mark.parametrize("dist", [False, True])
@pytest.mark.parametrize("classes", [(5, 5), (5, 7)])
@pytest.mark.parametrize(("there", "here"), VIT_SIZES)
def test_vits_are_resized_as_deit_and_timm_do(there: int, here: int, classes: tuple[int, int], dist: bool) -> None:
    arch, contexts = vit(dist_token=dist), (Context(there, classes[0]), Context(here, classes[1]))
    for how in ("own", "published"):
        parent, own, got, net = carried(VIT, arch, *contexts, how)
        check_equal(got, loaded(own, by_deit(parent, net)), {"pos_embed"}, 1e-12)
    published = got["pos_embed"]
    parent, own, got, net = carried(VIT, arch, *contexts, "timm")
    ways = [
        vision_transformer.checkpoint_filter_fn(parent, net),
        {
            **parent,
            "pos_embed": resample_abs_pos_embed(parent["pos_embed"], [here // 16] * 2, num_prefix_tokens=1 + dist),
        },
    ]
    for resized in ways:  # timm resizes in single precision
        check_equal(got, loaded(own, resized), {"pos_embed"}, 2e-5)
    assert not torch.allclose(got["pos_embed"], published, atol=0.01), "two ways"
    for state in (got["pos_embed"], published):
        assert torch.equal(state[:, : 1 + dist], parent["pos_embed"][:, : 1 + dist])


# -- TinyViT ---------------------------------------------------------------------------------------
TINYVIT_SIZES = [(48, 128), (128, 48), (64, 112), (96, 80), (224, 384), (384, 512), (512, 224)]


@pytest.mark.parametrize("classes", [(5, 5), (5, 7)])
@pytest.mark.parametrize(("there", "here"), TINYVIT_SIZES)
def test_tinyvits_are_resized_as_published_and_as_timm_does(there: int, here: int, classes: tuple[int, int]) -> None:
    arch, contexts = tinyvit(), (Context(there, classes[0]), Context(here, classes[1]))
    parent, own, published, net = carried(TINYVIT, arch, *contexts, "published")
    tables = {k for k in parent if k.endswith(BIASES)}
    assert len(tables) == 4
    check_equal(published, loaded(own, by_official_tinyvit(parent, net)), tables, 1e-12)
    parent, own, by_timm, net = carried(TINYVIT, arch, *contexts, "timm")
    resized = tiny_vit.checkpoint_filter_fn(parent, net)
    check_equal(by_timm, loaded(own, resized), tables, 2e-5)
    *_, ours, _ = carried(TINYVIT, arch, *contexts, "own")
    changed = [key for key in tables if parent[key].shape != ours[key].shape]
    assert changed
    for key in changed:
        for a, b in ((published, by_timm), (published, ours), (by_timm, ours)):
            assert not torch.allclose(a[key], b[key], atol=0.01), "three ways"


def test_published_sizes_have_the_published_windows() -> None:
    arch = TINYVIT.seed("21M")
    for size, windows in ((224, (7, 14, 7)), (384, (12, 24, 12)), (512, (16, 32, 16))):
        for stage, window in enumerate(windows, 1):
            s = TINYVIT.resized(arch, Context(224, 9), Context(size, 9), "published")
            slices = [v for k, v in s.items() if k.startswith(f"stages.{stage}.") and BIASES in k]
            assert {len(v.index[1]) for v in slices} == {window**2}
            grown = {v.blends[1].shape for v in slices if v.blends}
            assert grown == ({(window**2, (7, 14, 7)[stage - 1] ** 2)} if size > 224 else set())


def test_equal_windows_on_images_of_other_sizes_are_copied_unless_own() -> None:
    arch, contexts = tinyvit(window_sizes=[2, 2, 2]), (Context(160, 5), Context(224, 5))
    for how in ("published", "timm"):
        parent, _, got, _ = carried(TINYVIT, arch, *contexts, how)
        check_equal(got, parent, set(), 0)
    parent, _, got, _ = carried(TINYVIT, arch, *contexts, "own")
    key = f"stages.1.blocks.0.{BIASES}"
    assert parent[key].shape == got[key].shape
    assert not torch.equal(parent[key], got[key]), "offsets keep their meaning in the image"


# -- both, and any other ---------------------------------------------------------------------------
def cases() -> Iterator[tuple[Family, Arch, Context, Context]]:
    rng = random.Random(0)
    for _ in range(12):
        for kind, family in ((space_cases, TINYVIT), (vit_cases, VIT)):
            arch, ctx = drawn(kind, rng)
            yield family, arch, ctx, kind.random_context(rng, arch)


def test_only_tables_of_positions_change_and_they_fit_and_nothing_in_one_context() -> None:
    for family, arch, there, here in cases():
        own, same = family.slicing(arch, arch, there, here), family.slicing(arch, arch, there, there)
        for how in family.resizes:
            slices = family.resized(arch, there, here, how)
            assert set(slices) == set(own)
            for key, s in slices.items():
                if how == "own" or not (key == "pos_embed" or key.endswith(BIASES)):
                    assert plain(s) == plain(own[key]), key
                    continue
                assert s.source == key
                assert all((i >= 0).all() for i in s.index)
                for dim, blend in s.blends.items():
                    assert (dim, blend.shape[0]) == (1, len(s.index[1]))
                    assert (s.index[1] < blend.shape[1]).all()
            unchanged = family.resized(arch, there, there, how)
            assert {k: plain(s) for k, s in unchanged.items()} == {k: plain(s) for k, s in same.items()}
            assert not any(s.blends for s in unchanged.values())


@pytest.mark.parametrize("how", ["", "Own", "bilinear", "publ\nished"])
def test_an_unknown_name_is_refused_in_a_line(how: str) -> None:
    for family, arch in ((VIT, vit()), (TINYVIT, tinyvit())):
        with pytest.raises(InputError, match="want one of own, published, timm") as refused:
            family.resized(arch, Context(64, 5), Context(96, 5), how)
        assert str(refused.value).startswith("--resize: got ")
        assert "\n" not in str(refused.value)
