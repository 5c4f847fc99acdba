"""ViT and DeiT, with or without a distillation token; the model code is timm's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from space.errors import read_int, refuse, refuse_multiple
from space.family import Arch, Array, Choices, Context, Factor, Family, Member, Published, Slice, Table
from space.ratios import apart, read_hidden_ratio, shortest_ratio
from space.vit_slicing import VitNet, block_names, members, resized, slices

WIDTH_STEP = 32  # channels
LEAST_RATIO = 2.0

# Far beyond what fits in memory; they keep every count below 2**63.
MAX_DIM, MAX_DEPTH, MAX_PATCH = 16_384, 512, 512


@dataclass(frozen=True)
class VitArch(Arch):
    """One ViT: as many heads as `head_dim` goes into `embed_dim`; `dist_token` as DeiT has it."""

    embed_dim: int
    depth: int
    head_dim: int
    mlp_ratio: float
    patch_size: int
    dist_token: bool


def _published(name: str, dim: int, depth: int, patch: int, *aliases: str, dist: bool = False) -> Published:
    return Published(name, VitArch(dim, depth, 64, 4.0, patch, dist), aliases)


def _deit(size: str, dim: int, larger: tuple[int, ...] = ()) -> tuple[Published, Published]:
    """Name a DeiT with and without its token; the plain one is the ViT of that size."""
    found = []
    for kind, dist in (("", False), ("_distilled", True)):
        stem = f"deit_{size}{kind}"
        also = [f"{stem}_patch16", *(f"{stem}_patch16_{px}" for px in (224, *larger))]
        if not dist:
            vit = f"vit_{size}_patch16"
            also += [f"vit_{size}", vit, *(f"{vit}_{px}" for px in (224, 384))]
        found.append(_published(stem, dim, 12, 16, *also, dist=dist))
    return found[0], found[1]


def _vit(size: str, dim: int, depth: int, patch: int, *pixels: int) -> Published:
    name = f"vit_{size}_patch{patch}"
    return _published(name, dim, depth, patch, *(f"{name}_{px}" for px in pixels))


def _own(arch: Arch) -> VitArch:
    assert isinstance(arch, VitArch), f"not a ViT: {arch!r}"
    return arch


def _grid(patch: Array, ctx: Context) -> Array:
    """Count the patches along a side; what does not fill one is not built (see `valid_many`)."""
    return np.asarray(ctx.img_size // patch)


def _hidden(table: Table) -> Array:
    # Truncation of the float64 product is timm's int(width * ratio), bit for bit.
    return np.asarray((table["embed_dim"] * table["mlp_ratio"]).astype(np.int64))


def _net(a: VitArch, ctx: Context) -> VitNet:
    """Describe an arch as built in `ctx`."""
    return VitNet(
        dim=a.embed_dim,
        depth=a.depth,
        head_dim=a.head_dim,
        hidden=int(a.embed_dim * a.mlp_ratio),
        patch=a.patch_size,
        grid=ctx.img_size // a.patch_size,
        prefix=1 + a.dist_token,
        num_classes=ctx.num_classes,
        in_chans=ctx.in_chans,
    )


class Vit(Family):
    """ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877): equal blocks of full attention.

    Counts follow timm 1.0.31 to the parameter; MACs are those of torch's FlopCounterMode / 2. The classes are read off
    the class token; with a distillation token off the mean of both heads.
    """

    name = "vit"
    resizes = ("own", "published", "timm")
    factors = (
        Factor("D", "embed_dim", (Choices(step=WIDTH_STEP),), scalar=True),
        Factor("N", "depth", (Choices(step=1),), scalar=True),
        Factor("E", "head_dim", (Choices((16, 32, 48, 64), up=None),), scalar=True),
        Factor("M", "mlp_ratio", (Choices((LEAST_RATIO, 3.0, 4.0)),), scalar=True),
        Factor("P", "patch_size", (Choices((4, 8, 14, 16, 32), up=None),), scalar=True),
        Factor("T", "dist_token", (Choices((0, 1)),), scalar=True),
    )
    published = (
        *_deit("tiny", 192),
        *_deit("small", 384),
        *_deit("base", 768, larger=(384,)),
        _vit("small", 384, 12, 8, 224),
        _vit("small", 384, 12, 32, 224, 384),
        _vit("base", 768, 12, 8, 224),
        _vit("base", 768, 12, 32, 224, 384),
        _vit("large", 1024, 24, 16, 224, 384),
        _vit("large", 1024, 24, 14, 224),
        _vit("large", 1024, 24, 32, 224, 384),
    )

    def arch(self, mapping: Mapping[str, Any]) -> VitArch:
        """Check a mapping and make an arch of it: whatever timm builds, on the grid or off. Raises `InputError`."""
        self.check_fields(mapping)
        dim = read_int("embed_dim", mapping["embed_dim"], 1, MAX_DIM)
        head_dim = read_int("head_dim", mapping["head_dim"], 1, MAX_DIM)
        if dim % head_dim:
            raise refuse_multiple("embed_dim", dim, head_dim, "head_dim")
        ratio = read_hidden_ratio("mlp_ratio", mapping["mlp_ratio"], (dim,))
        token = mapping["dist_token"]
        if not isinstance(token, bool):
            token = bool(read_int("dist_token", token, 0, 1))
        return VitArch(
            dim,
            read_int("depth", mapping["depth"], 1, MAX_DEPTH),
            head_dim,
            ratio,
            read_int("patch_size", mapping["patch_size"], 1, MAX_PATCH),
            token,
        )

    def effective(self, table: Table, ctx: Context) -> dict[str, Array]:
        """Return the fields as built in `ctx`: as they are written."""
        return dict(table)

    def key(self, arch: Arch, ctx: Context) -> str:
        """Name the net as built in `ctx`, e.g. "d192_n12_e64_m4_p16_t0"."""
        a = _own(arch)
        m = shortest_ratio(a.mlp_ratio, (a.embed_dim,))
        return f"d{a.embed_dim}_n{a.depth}_e{a.head_dim}_m{m}_p{a.patch_size}_t{a.dist_token:d}"

    def count_params_many(self, table: Table, ctx: Context) -> npt.NDArray[np.int64]:
        """Count parameters exactly: tests hold it equal to timm on random archs and contexts."""
        d, h, p, t = table["embed_dim"], _hidden(table), table["patch_size"], table["dist_token"]
        tokens = _grid(p, ctx) ** 2 + 1 + t
        block = (4 * d + 2 * h + 9) * d + h
        heads = (1 + t) * ((d + 1) * ctx.num_classes + d)  # each with its token
        total = (p * p * ctx.in_chans + 1 + tokens + 2) * d + heads + table["depth"] * block
        return np.asarray(total + 0 * table["head_dim"])

    def count_macs_many(self, table: Table, ctx: Context) -> npt.NDArray[np.int64]:
        """Count multiply-adds of one image, attention (QK and AV) included."""
        d, h, p, t = table["embed_dim"], _hidden(table), table["patch_size"], table["dist_token"]
        patches = _grid(p, ctx) ** 2
        tokens = patches + 1 + t
        block = tokens * (4 * d + 2 * tokens + 2 * h) * d
        outside = patches * p * p * ctx.in_chans * d + (1 + t) * d * ctx.num_classes
        return np.asarray(outside + table["depth"] * block + 0 * table["head_dim"])

    def cost_terms_many(self, table: Table, ctx: Context) -> dict[str, Array]:
        """Return the parts of a pass: blocks, multiply-adds and elements by kind of layer.

        `linear` are matrix products with weights, `attend` the products of queries, keys and values, `softmax` its
        scores, `elements` the activations written on the way.
        """
        d, h, p, t = table["embed_dim"], _hidden(table), table["patch_size"], table["dist_token"]
        depth, patches = table["depth"], _grid(table["patch_size"], ctx) ** 2
        tokens = patches + 1 + t
        terms: dict[str, Array] = {
            "once": np.asarray(0 * d + 1),
            "stem macs": patches * p * p * ctx.in_chans * d,
            "head macs": (1 + t) * d * ctx.num_classes,
            "blocks": np.asarray(depth),
            "linear": depth * tokens * (4 * d + 2 * h) * d,
            "attend": depth * 2 * tokens**2 * d,
            "softmax": depth * tokens**2 * (d // table["head_dim"]),
            "elements": depth * tokens * (8 * d + 2 * h),
        }
        return dict(zip(terms, np.broadcast_arrays(*terms.values()), strict=True))

    def valid_many(self, table: Table, ctx: Context | None = None) -> npt.NDArray[np.bool_]:
        """Return which archs can be built: heads divide the width, patches the image."""
        ok = np.asarray(table["embed_dim"] % table["head_dim"] == 0)
        if ctx is None:
            return ok
        return np.asarray(ok & (ctx.img_size % table["patch_size"] == 0))

    def check(self, arch: Arch, ctx: Context) -> None:
        """Refuse images that the patches do not fill; timm would cut them without a word."""
        patch = _own(arch).patch_size
        if ctx.img_size % patch:
            below = ctx.img_size // patch * patch
            near = f"{below} or {below + patch}" if below else f"{patch}"
            want = f"a multiple of the patch size {patch} of {self.label(arch)}"
            raise refuse("--img-size", ctx.img_size, want, f"{near} is; or a seed of other patches")

    def moves(self, arch: Arch) -> dict[str, Array]:
        """Return the values per factor that contraction may propose (see `Family.moves`)."""
        moves, a = super().moves(arch), _own(arch)
        narrowest = min(WIDTH_STEP, a.embed_dim)
        moves["mlp_ratio"] = apart(a.mlp_ratio, moves["mlp_ratio"], narrowest)
        return moves

    def scaled(self, arch: Arch, factor: float) -> VitArch:
        """Scale the width by `factor`, rounded to 32s (or to what the head dim needs)."""
        a = _own(arch)
        unit = math.lcm(WIDTH_STEP, a.head_dim)
        return replace(a, embed_dim=max(unit, math.floor(a.embed_dim * factor / unit + 0.5) * unit))

    def floor(self, arch: Arch, ctx: Context) -> VitArch:
        """Return the arch of fewest parameters that repeated contraction of `arch` can reach."""
        a = _own(arch)
        dim, ratio = min(WIDTH_STEP, a.embed_dim), min(LEAST_RATIO, a.mlp_ratio)
        moves = self.moves(a)
        least = [
            VitArch(math.lcm(dim, head_dim), 1, head_dim, ratio, patch, False)
            for head_dim, patch in product(moves["head_dim"].tolist(), moves["patch_size"].tolist())
        ]
        reached = [arch for arch in least if arch.embed_dim <= a.embed_dim and self.fits(arch, ctx)]
        return min([a, *reached], key=lambda x: self.count_params(x, ctx))

    def timm_call(self, arch: Arch, ctx: Context) -> tuple[str, dict[str, Any]]:
        """As `Family.timm_call`. The name is that of the nearest DeiT: it decides timm's class and preprocessing."""
        a = _own(arch)
        alike = [p for p in self.published if p.name.startswith("deit") and _own(p.arch).dist_token == a.dist_token]
        return f"{self.nearest_published(a, ctx, alike).name}_patch16_224", {
            "img_size": ctx.img_size,
            "patch_size": a.patch_size,
            "embed_dim": a.embed_dim,
            "depth": a.depth,
            "num_heads": a.embed_dim // a.head_dim,
            "mlp_ratio": a.mlp_ratio,
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
        first and last kept. Position embeddings are resized as DeiT does (bicubic, not antialiased, those of tokens
        untouched), patch projections as FlexiViT does. Class rows and input channels are taken only when their number
        is the same.
        """
        return slices(_net(_own(parent), ctx_parent), _net(_own(child), ctx_child), order or {})

    def resized(self, arch: Arch, ctx_parent: Context, ctx_child: Context, how: str) -> dict[str, Slice]:
        """As `Family.resized`: "own" and "published" resize position embeddings as DeiT does, "timm" antialiased."""
        found = super().resized(arch, ctx_parent, ctx_child, how)
        return resized(found, _net(_own(arch), ctx_parent), _net(_own(arch), ctx_child), how)

    def groups(self, arch: Arch, ctx: Context) -> dict[str, tuple[Member, ...]]:
        """Return "dim", the residual stream; and of each block "blocks.3.hidden" and "blocks.3.heads"."""
        return members(_net(_own(arch), ctx))

    def blocks(self, arch: Arch) -> dict[str, tuple[str, ...]]:
        """Return the blocks that a child may lack: "blocks"."""
        return block_names(_own(arch).depth)


FAMILY = Vit()
