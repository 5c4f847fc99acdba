"""TinyViT with all six contraction factors; the model code is timm's (timm.models.tiny_vit)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from space.errors import read_int, read_ints, refuse_multiple
from space.family import Arch, Array, Choices, Context, Factor, Family, Member, Published, Slice, Table
from space.ratios import apart, read_hidden_ratio, shortest_ratio
from space.tinyvit_slicing import TinyVitNet, block_names, members, resized, slices

WRITTEN_AT = 224  # pixels at which window sizes are written
WIDTH_STEP = 32  # channels

# Far beyond what fits in memory; they keep every count below 2**63.
MAX_DIM, MAX_DEPTH, MAX_WINDOW = 16_384, 512, 512


@dataclass(frozen=True)
class TinyVitArch(Arch):
    """One TinyViT. Stage 1 is convolutional: windows are those of stages 2 to 4, at 224 px."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    window_sizes: tuple[int, ...]
    mbconv_expand_ratio: float
    mlp_ratio: float
    head_dim: int


def _published(name: str, *dims: int, larger: tuple[int, ...] = ()) -> Published:
    arch = TinyVitArch(dims, (2, 2, 6, 2), (7, 14, 7), 4.0, 4.0, 32)
    stem = f"tiny_vit_{name.lower()}"
    # The 384 and 512 px releases are the same arch: their windows are 7, 14, 7 scaled.
    return Published(name, arch, (stem, *(f"{stem}_{px}" for px in (224, *larger))))


@dataclass(frozen=True)
class _Columns:
    """The widths of a net as built: arrays whose shapes broadcast, one column per stage."""

    dims: tuple[Array, ...]  # stages 1-4
    depths: tuple[Array, ...]  # stages 1-4
    windows: tuple[Array, ...]  # stages 2-4, scaled
    expand: Array  # hidden channels of an MBConv
    hidden: tuple[Array, ...]  # hidden channels of an MLP, stages 2-4
    heads: tuple[Array, ...]  # stages 2-4


def map_sizes(img_size: int) -> tuple[int, ...]:
    """Side lengths of the feature maps of stages 1 to 4: every stride-2 convolution rounds up."""
    return tuple(-(-img_size // stride) for stride in (4, 8, 16, 32))


def _built_windows(written: Array, ctx: Context) -> Array:
    """Scale windows [..., 3] to the image: min(map, max(2, round(W * img_size / 224)))."""
    maps = np.array(map_sizes(ctx.img_size)[1:], dtype=np.int64)
    scaled = np.rint(written * ctx.img_size / WRITTEN_AT).astype(np.int64)
    return np.minimum(maps, np.maximum(2, scaled))


def _columns(t: Table, ctx: Context) -> _Columns:
    # Copies: strided columns would halve the speed of everything after them.
    dims, depths, windows = (
        tuple(np.ascontiguousarray(a[..., i]) for i in range(a.shape[-1]))
        for a in (t["embed_dims"], t["depths"], _built_windows(t["window_sizes"], ctx))
    )
    return _Columns(
        dims=dims,
        depths=depths,
        windows=windows,
        # Truncation of the float64 product is timm's int(width * ratio), bit for bit.
        expand=(dims[0] * t["mbconv_expand_ratio"]).astype(np.int64),
        hidden=tuple((d * t["mlp_ratio"]).astype(np.int64) for d in dims[1:]),
        heads=tuple(d // t["head_dim"] for d in dims[1:]),
    )


def _params(c: _Columns, ctx: Context) -> Array:
    """Count parameters. Terms of few factors come first: on an open grid they stay small."""
    d1, d4 = c.dims[0], c.dims[3]
    total = (9 * ctx.in_chans + 2) * (d1 // 2) + 9 * (d1 // 2) * d1 + 2 * d1
    total = total + (2 + ctx.num_classes) * d4 + ctx.num_classes
    for before, d in pairwise(c.dims):
        total = total + (before + d + 15) * d
    for i, d in enumerate(c.dims[1:]):
        f, w = c.hidden[i], c.windows[i]
        total = total + c.depths[i + 1] * ((4 * d + 2 * f + 20) * d + f + c.heads[i] * (w * w))
    return np.asarray(total + c.depths[0] * ((2 * d1 + 13) * c.expand + 2 * d1))


def _macs(c: _Columns, ctx: Context) -> Array:
    """Count multiply-adds of convolutions and matrix products, padding of windows included."""
    maps = map_sizes(ctx.img_size)
    half, first = -(-ctx.img_size // 2), maps[0]
    d1, d4 = c.dims[0], c.dims[3]
    total = 9 * (d1 // 2) * (ctx.in_chans * half**2 + d1 * first**2) + d4 * ctx.num_classes
    for i, d in enumerate(c.dims[1:]):
        tokens = maps[i + 1] ** 2
        total = total + c.dims[i] * d * maps[i] ** 2 + tokens * (9 + d) * d
    for i, d in enumerate(c.dims[1:]):
        side, w = maps[i + 1], c.windows[i]
        padded = (-(-side // w) * w) ** 2
        block = padded * (4 * d + 2 * (w * w)) * d + side**2 * (9 + 2 * c.hidden[i]) * d
        total = total + c.depths[i + 1] * block
    return np.asarray(total + c.depths[0] * (first**2 * (2 * d1 + 9) * c.expand))


def _count(formula: Callable[[_Columns, Context], Array], table: Table, ctx: Context) -> npt.NDArray[np.int64]:
    """Apply a formula; where it ignores a field such as the head dim, the result still has its axis."""
    vectors = ("embed_dims", "depths", "window_sizes")  # the others have no slots
    shapes = (v.shape[:-1] if field in vectors else v.shape for field, v in table.items())
    return np.broadcast_to(formula(_columns(table, ctx), ctx), np.broadcast_shapes(*shapes))


def _own(arch: Arch) -> TinyVitArch:
    assert isinstance(arch, TinyVitArch), f"not a TinyViT: {arch!r}"
    return arch


def _windows(arch: TinyVitArch, ctx: Context) -> tuple[int, ...]:
    return tuple(_built_windows(np.array(arch.window_sizes), ctx).tolist())


def _net(arch: TinyVitArch, ctx: Context) -> TinyVitNet:
    """Describe an arch as built in `ctx`."""
    return TinyVitNet(
        dims=arch.embed_dims,
        depths=arch.depths,
        windows=_windows(arch, ctx),
        expand=int(arch.embed_dims[0] * arch.mbconv_expand_ratio),
        hidden=tuple(int(d * arch.mlp_ratio) for d in arch.embed_dims[1:]),
        head_dim=arch.head_dim,
        img_size=ctx.img_size,
        num_classes=ctx.num_classes,
        in_chans=ctx.in_chans,
    )


class TinyVit(Family):
    """TinyViT: a convolutional stage and three of windowed attention (arXiv 2207.10666).

    Counts follow timm 1.0.31 to the parameter; MACs are those of torch's FlopCounterMode / 2.
    """

    name = "tinyvit"
    resizes = ("own", "published", "timm")
    factors = (
        Factor("D", "embed_dims", (Choices(step=WIDTH_STEP, up=1),) * 4),
        Factor("N", "depths", (Choices(step=1),) * 4),
        # Stage 4 stays: 14 there pads its 7x7 map to 14x14, +11 % of all MACs for nothing.
        Factor("W", "window_sizes", (*(Choices((7, 14), up=None),) * 2, Choices())),
        Factor("R", "mbconv_expand_ratio", (Choices((2.0, 3.0, 4.0)),), scalar=True),
        Factor("M", "mlp_ratio", (Choices((2.0, 3.0, 4.0)),), scalar=True),
        Factor("E", "head_dim", (Choices((16, 32), up=None),), scalar=True),
    )
    published = (
        _published("5M", 64, 128, 160, 320),
        _published("11M", 64, 128, 256, 448),
        _published("21M", 96, 192, 384, 576, larger=(384, 512)),
    )

    def arch(self, mapping: Mapping[str, Any]) -> TinyVitArch:
        """Check a mapping and make an arch of it: whatever timm builds, on the grid or off. Raises `InputError`.

        `window_sizes` are those of stages 2 to 4; with four, as timm writes them, the first (unused) is dropped.
        """
        self.check_fields(mapping)
        head_dim = read_int("head_dim", mapping["head_dim"], 1, MAX_DIM)
        dims = read_ints("embed_dims", mapping["embed_dims"], 4, 1, MAX_DIM)
        if dims[0] % 2:
            raise refuse_multiple("embed_dims[0]", dims[0], 2)  # the stem has half as many
        for i in (1, 2, 3):
            if dims[i] % head_dim:
                raise refuse_multiple(f"embed_dims[{i}]", dims[i], head_dim, "head_dim")
        depths = read_ints("depths", mapping["depths"], 4, 1, MAX_DEPTH)
        windows = mapping["window_sizes"]
        if isinstance(windows, list | tuple) and len(windows) == 4:
            read_int("window_sizes[0]", windows[0], 1, MAX_WINDOW)
            windows = windows[1:]
        windows = read_ints("window_sizes", windows, 3, 1, MAX_WINDOW)
        expand = read_hidden_ratio("mbconv_expand_ratio", mapping["mbconv_expand_ratio"], dims[:1])
        mlp = read_hidden_ratio("mlp_ratio", mapping["mlp_ratio"], dims[1:])
        return TinyVitArch(dims, depths, windows, expand, mlp, head_dim)

    def effective(self, table: Table, ctx: Context) -> dict[str, Array]:
        """As `Family.effective`: windows are scaled, the rest is as written."""
        built = dict(table)
        if "window_sizes" in built:
            built["window_sizes"] = _built_windows(built["window_sizes"], ctx)
        return built

    def key(self, arch: Arch, ctx: Context) -> str:
        """Name the net as built in `ctx`, e.g. "d64-128-160-320_n2-2-6-2_w2-3-2_r4_m4_e32"."""
        a = _own(arch)
        d, n, w = ("-".join(map(str, v)) for v in (a.embed_dims, a.depths, _windows(a, ctx)))
        r = shortest_ratio(a.mbconv_expand_ratio, a.embed_dims[:1])
        m = shortest_ratio(a.mlp_ratio, a.embed_dims[1:])
        return f"d{d}_n{n}_w{w}_r{r}_m{m}_e{a.head_dim}"

    def count_params_many(self, table: Table, ctx: Context) -> npt.NDArray[np.int64]:
        """Count parameters exactly: tests hold it equal to timm on random archs and contexts."""
        return _count(_params, table, ctx)

    def count_macs_many(self, table: Table, ctx: Context) -> npt.NDArray[np.int64]:
        """Count multiply-adds of one image, attention (QK and AV) and window padding included."""
        return _count(_macs, table, ctx)

    def cost_terms_many(self, table: Table, ctx: Context) -> dict[str, Array]:
        """Return the parts of a pass by stage: blocks, multiply-adds and elements by kind of layer.

        `linear` are pointwise convolutions and matrix products with weights, `depthwise` are 3x3 convolutions a
        channel, `attend` the products of queries, keys and values, `softmax` its scores, `elements` the activations
        written on the way.
        """
        c, maps = _columns(table, ctx), map_sizes(ctx.img_size)
        n = np.asarray(c.depths[0] * 0 + 1)
        half, first = -(-ctx.img_size // 2), maps[0]
        d1 = c.dims[0]
        terms: dict[str, Array] = {
            "once": n,
            "stem macs": 9 * (d1 // 2) * (ctx.in_chans * half**2 + d1 * first**2),
            "head macs": c.dims[3] * ctx.num_classes * n,
            "s1 blocks": c.depths[0] * n,
            "s1 linear": c.depths[0] * first**2 * 2 * d1 * c.expand,
            "s1 depthwise": c.depths[0] * first**2 * 9 * c.expand,
            "s1 elements": c.depths[0] * first**2 * (2 * c.expand + d1),
        }
        for i, d in enumerate(c.dims[1:]):
            stage, side, w = f"s{i + 2}", maps[i + 1], c.windows[i]
            depth, hidden, heads = c.depths[i + 1], c.hidden[i], c.heads[i]
            tokens, padded = side**2, (-(-side // w) * w) ** 2
            terms |= {
                f"{stage} merge": c.dims[i] * d * maps[i] ** 2 + tokens * (9 + d) * d,
                f"{stage} blocks": depth * n,
                f"{stage} windows": depth * (padded // (w * w)),
                f"{stage} linear": depth * (padded * 4 * d * d + tokens * 2 * hidden * d),
                f"{stage} attend": depth * padded * 2 * (w * w) * d,
                f"{stage} softmax": depth * padded * (w * w) * heads,
                f"{stage} depthwise": depth * tokens * 9 * d,
                f"{stage} elements": depth * (padded * 5 * d + tokens * (2 * hidden + 4 * d)),
            }
        return dict(zip(terms, np.broadcast_arrays(*terms.values()), strict=True))

    def valid_many(self, table: Table, ctx: Context | None = None) -> npt.NDArray[np.bool_]:
        """Return which archs can be built: heads divide stages 2 to 4, D1 is even."""
        dims, head_dim = table["embed_dims"], table["head_dim"]
        ok = dims[..., 0] % 2 == 0
        for i in (1, 2, 3):
            ok = ok & (dims[..., i] % head_dim == 0)
        return np.asarray(ok)

    def coherent(self, field: str, values: Array) -> npt.NDArray[np.bool_]:
        """Return which joint values may be proposed: dims do not fall from stage to stage."""
        if field != "embed_dims":
            return super().coherent(field, values)
        return np.asarray((np.diff(values, axis=1) >= 0).all(axis=1))

    def moves(self, arch: Arch) -> dict[str, Array]:
        """As `Family.moves`, without ratios so close below one off the grid that they could build the same net."""
        moves, a = super().moves(arch), _own(arch)
        narrowest = min(WIDTH_STEP, *a.embed_dims)
        for field in ("mbconv_expand_ratio", "mlp_ratio"):
            moves[field] = apart(getattr(a, field), moves[field], narrowest)
        return moves

    def scaled(self, arch: Arch, factor: float) -> TinyVitArch:
        """Scale all dims by `factor`, rounded to 32s (or to what the head dim needs)."""
        a = _own(arch)
        unit = math.lcm(WIDTH_STEP, a.head_dim)
        return replace(a, embed_dims=tuple(max(unit, math.floor(v * factor / unit + 0.5) * unit) for v in a.embed_dims))

    def floor(self, arch: Arch, ctx: Context) -> TinyVitArch:
        a = _own(arch)
        # A dim below the grid may stay, but not under a wider stage before it.
        dims = tuple(np.maximum.accumulate(np.minimum(WIDTH_STEP, a.embed_dims)).tolist())
        options = self.moves(a)
        windows = tuple(min(options["window_sizes"].tolist(), key=sum))
        expand, mlp = (min(2.0, r) for r in (a.mbconv_expand_ratio, a.mlp_ratio))
        head_dims = [e for e in options["head_dim"].tolist() if not any(v % e for v in dims[1:])]
        if not head_dims:
            return a
        lowest = TinyVitArch(dims, (1, 1, 1, 1), windows, expand, mlp, max(head_dims))  # fewer heads, fewer bias rows
        return min(a, lowest, key=lambda x: self.count_params(x, ctx))

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Name the stages by the slots that shape them; stages 2 to 4 share the MLP ratio and the head dim."""
        found: dict[str, tuple[str, ...]] = {"stage1": ("embed_dims[0]", "depths[0]", "mbconv_expand_ratio")}
        for i in (1, 2, 3):
            own = (f"embed_dims[{i}]", f"depths[{i}]", f"window_sizes[{i - 1}]")
            found[f"stage{i + 1}"] = (*own, "mlp_ratio", "head_dim")
        return found

    def timm_call(self, arch: Arch, ctx: Context) -> tuple[str, dict[str, Any]]:
        """As `Family.timm_call`. The name is that of the nearest published size: it decides timm's preprocessing.

        timm does not use the first head count and window.
        """
        a, windows = _own(arch), _windows(_own(arch), ctx)
        return f"tiny_vit_{self.nearest_published(a, ctx).name.lower()}_224", {
            "embed_dims": list(a.embed_dims),
            "depths": list(a.depths),
            "num_heads": [max(1, d // a.head_dim) for d in a.embed_dims],
            "window_sizes": [windows[0], *windows],
            "mlp_ratio": a.mlp_ratio,
            "mbconv_expand_ratio": a.mbconv_expand_ratio,
            "drop_path_rate": 0.0,
            "num_classes": ctx.num_classes,
            "in_chans": ctx.in_chans,
        }

    def slicing(
        self,
        parent: Arch,
        child: Arch,
        ctx_parent: Context,
        ctx_child: Context,
        order: Mapping[str, Array] | None = None,
    ) -> dict[str, Slice]:
        """Map the child's state_dict onto the parent's.

        Without an `order`: the first channels, hidden units and heads, and blocks spread evenly over the parent's, the
        first and last kept. Heads are kept whole; with a new head dim the channels keep their place and the heads are
        cut anew. Attention biases keep the meaning of their offset in the image, blended where it falls between the
        parent's. Class rows and input channels are taken only when their number is the same.
        """
        return slices(_net(_own(parent), ctx_parent), _net(_own(child), ctx_child), order or {})

    def resized(self, arch: Arch, ctx_parent: Context, ctx_child: Context, how: str) -> dict[str, Slice]:
        """As `Family.resized`: "own" keeps the meaning of offsets, "published" and "timm" resize tables as images."""
        found = super().resized(arch, ctx_parent, ctx_child, how)
        return resized(found, _net(_own(arch), ctx_parent), _net(_own(arch), ctx_child), how)

    def groups(self, arch: Arch, ctx: Context) -> dict[str, tuple[Member, ...]]:
        """Return the groups of units that a child may take a part of.

        "stem"; "dim1".."dim4", the residual streams; "stages.1.downsample.hidden", between the convolutions of a merge;
        and of each block "stages.0.blocks.1.expand", or "stages.2.blocks.3.hidden" and "stages.2.blocks.3.heads".
        """
        return members(_net(_own(arch), ctx))

    def blocks(self, arch: Arch) -> dict[str, tuple[str, ...]]:
        """Return the blocks that a child may lack, by stage: "stages.0.blocks" and so on."""
        return block_names(_own(arch).depths)


FAMILY = TinyVit()
