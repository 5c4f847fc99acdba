"""Which weights of a ViT a smaller one starts from: index maps over timm's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from space import slicing
from space.family import Array, Member, Slice
from space.slicing import Blend, Index, Line, Named

HEADS = ("qkv", "inner")
"""Axes that are made of heads."""


@dataclass(frozen=True)
class VitNet:
    """A ViT as built, and its context; `grid`: patches a side, `prefix`: class token and more."""

    dim: int
    depth: int
    head_dim: int
    hidden: int
    patch: int
    grid: int
    prefix: int
    num_classes: int
    in_chans: int


def _outside_blocks(net: VitNet) -> Iterator[Named]:
    yield "cls_token", ("1", "1", "dim")
    if net.prefix > 1:
        yield "dist_token", ("1", "1", "dim")
    yield "pos_embed", ("1", "tokens", "dim")
    yield "patch_embed.proj.weight", ("dim", "chans", "patch", "patch")
    yield "patch_embed.proj.bias", ("dim",)
    yield from slicing.norm("norm", "dim")
    yield from slicing.linear("head", "classes", "dim")
    if net.prefix > 1:
        yield from slicing.linear("head_dist", "classes", "dim")


def _block() -> Iterator[Named]:
    yield from slicing.norm("norm1", "dim")
    yield from slicing.linear("attn.qkv", "qkv", "dim")
    yield from slicing.linear("attn.proj", "dim", "inner")
    yield from slicing.norm("norm2", "dim")
    yield from slicing.linear("mlp.fc1", "hidden", "dim")
    yield from slicing.linear("mlp.fc2", "dim", "hidden")


def _group(axis: str, block: str) -> str:
    """Name the group that an axis of a block (or outside all blocks: "") belongs to."""
    if axis == "dim":
        return axis
    return f"{block}.heads" if axis in HEADS else f"{block}.{axis}"


def _walk(net: VitNet) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Return (block, key, axes) for every tensor; the block is "" outside of blocks."""
    for key, axes in _outside_blocks(net):
        yield "", key, axes
    for block in block_names(net.depth)["blocks"]:
        for key, axes in _block():
            yield block, f"{block}.{key}", axes


def _sizes(net: VitNet) -> dict[str, int]:
    """Count the units of every group."""
    sizes = {"dim": net.dim}
    for block in block_names(net.depth)["blocks"]:
        sizes |= {f"{block}.heads": net.dim // net.head_dim, f"{block}.hidden": net.hidden}
    return sizes


def members(net: VitNet) -> dict[str, tuple[Member, ...]]:
    """List every group of units with the tensors that it runs through."""
    each = net.head_dim
    layout = {
        "inner": lambda unit: unit.repeat(each),
        "qkv": lambda unit: np.tile(unit.repeat(each), 3),  # queries, then keys, then values
    }
    return slicing.group_members(_walk(net), _sizes(net), _group, layout)


def block_names(depth: int) -> dict[str, tuple[str, ...]]:
    """Return the blocks."""
    return {"blocks": tuple(f"blocks.{j}" for j in range(depth))}


def kernel(child: int, parent: int) -> Blend:
    """Return the weights [child, parent] that resize a line of a patch projection.

    A coarser projection gives for an enlarged patch what the parent's gives for the patch (FlexiViT's pseudo-inverse,
    arXiv 2212.08013); a finer one gives for a patch what the parent's gives for the enlarged patch.
    """
    if child < parent:
        return np.asarray(slicing.bicubic(parent, child).T)
    return np.asarray(np.linalg.pinv(slicing.bicubic(child, parent)).T)


def _tokens(child: VitNet, parent: VitNet, line: Line = slicing.bicubic) -> tuple[Index, Blend | None]:
    """Map positions: [class, distillation, grid row by row]; a grid of another size is resized.

    Source: DeiT resizes the grid and leaves the others as they are, and timm does too.
    """
    prefix = np.array([i if i < parent.prefix else -1 for i in range(child.prefix)])
    grid, weights = slicing.square(child.grid, parent.grid, line)
    index = np.concatenate([prefix, parent.prefix + grid]).astype(np.int64)
    if weights is None:
        return index, None
    blend = np.zeros((len(index), parent.prefix + parent.grid**2), dtype=np.float64)
    kept = np.flatnonzero(prefix >= 0)
    blend[kept, prefix[kept]] = 1
    blend[child.prefix :, parent.prefix :] = weights
    return index, blend


def _axes(block: str, parent: VitNet, child: VitNet, order: Mapping[str, Array]) -> dict[str, Index]:
    """Map every axis that occurs in one parent block (or outside all blocks: "")."""
    dim = slicing.first(child.dim, parent.dim, order.get("dim"))
    if not block:
        near = (np.arange(child.patch) + 0.5) * parent.patch / child.patch
        return {
            "1": np.arange(1),
            "dim": dim,
            "tokens": _tokens(child, parent)[0],
            "patch": np.minimum(near.astype(np.int64), parent.patch - 1),
            "chans": slicing.same(child.in_chans, parent.in_chans),
            "classes": slicing.same(child.num_classes, parent.num_classes),
        }
    heads = order.get(f"{block}.heads")
    channels, _ = slicing.of_heads(child.dim, child.head_dim, parent.dim, parent.head_dim, heads)
    rows = [np.where(channels >= 0, channels + part * parent.dim, -1) for part in range(3)]
    return {
        "dim": dim,
        "inner": channels,
        "qkv": np.concatenate(rows),
        "hidden": slicing.first(child.hidden, parent.hidden, order.get(f"{block}.hidden")),
    }


def slices(parent: VitNet, child: VitNet, order: Mapping[str, Array]) -> dict[str, Slice]:
    """Map the child's state_dict onto the parent's; keys without any source are left out."""
    slicing.check_order(order, _sizes(parent) | {"blocks": parent.depth})
    found: dict[str, Slice] = {}
    resized: dict[str, Blend] = {}
    positions = _tokens(child, parent)[1]
    if positions is not None:
        resized["tokens"] = positions
    if child.patch != parent.patch:
        resized["patch"] = kernel(child.patch, parent.patch)
    theirs = {key for key, _ in _outside_blocks(parent)}
    axes = _axes("", parent, child, order)
    for key, names in _outside_blocks(child):
        if key in theirs:
            slicing.add_slice(found, key, key, names, axes, resized)
    slicing.add_blocks(
        found,
        "blocks",
        child.depth,
        parent.depth,
        order.get("blocks"),
        _block(),
        lambda block: _axes(block, parent, child, order),
        resized,
    )
    return found


def resized(found: Mapping[str, Slice], parent: VitNet, child: VitNet, how: str) -> dict[str, Slice]:
    """Return a slicing between two sizes of one net with its positions resized by `how`.

    "own" is the slicing as it is, and the same as "published". Position embeddings alone differ.
    """
    blend = None if how == "own" else _tokens(child, parent, slicing.LINES[how])[1]
    if blend is None:
        return dict(found)
    return {**found, "pos_embed": replace(found["pos_embed"], blends={1: blend})}
