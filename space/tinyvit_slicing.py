"""Which weights of a TinyViT a smaller one starts from: index maps over timm's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from space import slicing
from space.family import Array, Member, Slice
from space.slicing import Blend, Index, Named

HEADS = ("qkv", "inner", "heads")
"""Axes that are made of heads."""


@dataclass(frozen=True)
class TinyVitNet:
    """A TinyViT as built: widths, windows in pixels of the feature map, and its context."""

    dims: tuple[int, ...]  # stages 1-4
    depths: tuple[int, ...]  # stages 1-4
    windows: tuple[int, ...]  # stages 2-4
    expand: int  # hidden channels of an MBConv
    hidden: tuple[int, ...]  # hidden channels of an MLP, stages 2-4
    head_dim: int
    img_size: int
    num_classes: int
    in_chans: int


def _conv_norm(prefix: str, out: str, into: str, kernel: str) -> Iterator[Named]:
    yield f"{prefix}.conv.weight", (out, into, kernel, kernel)
    yield from slicing.norm(f"{prefix}.bn", out)
    yield f"{prefix}.bn.running_mean", (out,)
    yield f"{prefix}.bn.running_var", (out,)
    yield f"{prefix}.bn.num_batches_tracked", ()


def _outside_blocks() -> Iterator[Named]:
    yield from _conv_norm("patch_embed.conv1", "stem", "chans", "3")
    yield from _conv_norm("patch_embed.conv2", "dim1", "stem", "3")
    for i in (1, 2, 3):
        before, dim, merge = f"dim{i}", f"dim{i + 1}", f"stages.{i}.downsample"
        hidden = f"{merge}.hidden"
        yield from _conv_norm(f"{merge}.conv1", hidden, before, "1")
        yield from _conv_norm(f"{merge}.conv2", hidden, "1", "3")
        yield from _conv_norm(f"{merge}.conv3", dim, hidden, "1")
    yield from slicing.norm("head.norm", "dim4")
    yield from slicing.linear("head.fc", "classes", "dim4")


def _block(stage: int) -> Iterator[Named]:
    if stage == 0:
        yield from _conv_norm("conv1", "expand", "dim1", "1")
        yield from _conv_norm("conv2", "expand", "1", "3")
        yield from _conv_norm("conv3", "dim1", "expand", "1")
        return
    dim = f"dim{stage + 1}"
    yield from slicing.norm("attn.norm", dim)
    yield from slicing.linear("attn.qkv", "qkv", dim)
    yield from slicing.linear("attn.proj", dim, "inner")
    yield "attn.attention_biases", ("heads", "offsets")
    yield from slicing.norm("mlp.norm", dim)
    yield from slicing.linear("mlp.fc1", "hidden", dim)
    yield from slicing.linear("mlp.fc2", dim, "hidden")
    yield from _conv_norm("local_conv", dim, "1", "3")


def _group(axis: str, block: str) -> str:
    """Name the group that an axis of a block (or outside all blocks: "") belongs to."""
    if axis in HEADS:
        return f"{block}.heads"
    return f"{block}.{axis}" if axis in ("expand", "hidden") else axis


def _walk(net: TinyVitNet) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Return (block, key, axes) for every tensor; the block is "" outside of blocks."""
    for key, axes in _outside_blocks():
        yield "", key, axes
    for stage, depth in enumerate(net.depths):
        for j in range(depth):
            block = f"stages.{stage}.blocks.{j}"
            for key, axes in _block(stage):
                yield block, f"{block}.{key}", axes


def _sizes(net: TinyVitNet) -> dict[str, int]:
    """Count the units of every group."""
    sizes = {"stem": net.dims[0] // 2, **{f"dim{i + 1}": d for i, d in enumerate(net.dims)}}
    for i in (1, 2, 3):
        sizes[f"stages.{i}.downsample.hidden"] = net.dims[i]
    for block, _, axes in _walk(net):
        stage = int(block.split(".")[1]) if block else 0
        for axis in axes:
            if axis == "expand":
                sizes[_group(axis, block)] = net.expand
            elif axis == "hidden":
                sizes[_group(axis, block)] = net.hidden[stage - 1]
            elif axis in HEADS:
                sizes[_group(axis, block)] = net.dims[stage] // net.head_dim
    return sizes


def members(net: TinyVitNet) -> dict[str, tuple[Member, ...]]:
    """List every group of units with the tensors that it runs through."""
    each = {"qkv": 3 * net.head_dim, "inner": net.head_dim}  # positions a unit has on an axis
    layout = {axis: lambda unit, n=n: unit.repeat(n) for axis, n in each.items()}
    return slicing.group_members(_walk(net), _sizes(net), _group, layout)


def block_names(depths: tuple[int, ...]) -> dict[str, tuple[str, ...]]:
    """Return the blocks of every stage."""
    stages = {f"stages.{i}.blocks": depth for i, depth in enumerate(depths)}
    return {name: tuple(f"{name}.{j}" for j in range(n)) for name, n in stages.items()}


def _head_axes(child: TinyVitNet, parent: TinyVitNet, stage: int, order: Array | None) -> dict[str, Index]:
    """Map what is made of heads: rows of the fused projection, its channels, rows of biases.

    Rows are [head][q|k|v][channel of the head] in timm.
    """
    dim, head_dim, theirs = child.dims[stage], child.head_dim, parent.head_dim
    channels, heads = slicing.of_heads(dim, head_dim, parent.dims[stage], theirs, order)
    row = np.arange(3 * dim)
    part = row // head_dim % 3
    of = channels[row // (3 * head_dim) * head_dim + row % head_dim]
    rows = of // theirs * 3 * theirs + part * theirs + of % theirs
    return {"qkv": np.where(of >= 0, rows, np.int64(-1)), "inner": channels, "heads": heads}


def _offsets(child: TinyVitNet, parent: TinyVitNet, stage: int) -> tuple[Index, Blend | None]:
    """Map a bias table [window * window], indexed |dx| * window + |dy| in timm.

    The child's offsets are taken in the parent's units (images of another size); beyond the parent's last offset the
    table goes on as it ends. Offsets between the parent's are blended of the four around them, by distance; without
    any, there is no blend.
    """
    window, parent_window = child.windows[stage - 1], parent.windows[stage - 1]
    at = np.arange(window) * parent.img_size / child.img_size  # exact where it is whole
    at = np.minimum(at, parent_window - 1)
    side = np.rint(at).astype(np.int64)
    index: Index = (side[:, None] * parent_window + side[None, :]).reshape(-1)
    if (at == side).all():
        return index, None
    low = np.floor(at).astype(np.int64)
    line = np.zeros((window, parent_window), dtype=np.float64)
    line[np.arange(window), low] = 1 - (at - low)
    line[np.arange(window), np.minimum(low + 1, parent_window - 1)] += at - low
    return index, np.asarray(np.kron(line, line), dtype=np.float64)


def _axes(
    stage: int | None, block: str, parent: TinyVitNet, child: TinyVitNet, order: Mapping[str, Array]
) -> dict[str, Index]:
    """Map every axis that occurs in one parent block (or outside all blocks: None)."""
    axes = {k: np.arange(int(k)) for k in ("1", "3")}
    for i in range(4):
        name = f"dim{i + 1}"
        axes[name] = slicing.first(child.dims[i], parent.dims[i], order.get(name))
    if stage is None:
        axes["stem"] = slicing.first(child.dims[0] // 2, parent.dims[0] // 2, order.get("stem"))
        for i in (1, 2, 3):
            name = f"stages.{i}.downsample.hidden"
            axes[name] = slicing.first(child.dims[i], parent.dims[i], order.get(name))
        axes["chans"] = slicing.same(child.in_chans, parent.in_chans)
        axes["classes"] = slicing.same(child.num_classes, parent.num_classes)
    elif stage == 0:
        axes["expand"] = slicing.first(child.expand, parent.expand, order.get(f"{block}.expand"))
    else:
        axes |= _head_axes(child, parent, stage, order.get(f"{block}.heads"))
        wanted = order.get(f"{block}.hidden")
        axes["hidden"] = slicing.first(child.hidden[stage - 1], parent.hidden[stage - 1], wanted)
    return axes


def slices(parent: TinyVitNet, child: TinyVitNet, order: Mapping[str, Array]) -> dict[str, Slice]:
    """Map the child's state_dict onto the parent's; keys without any source are left out."""
    slicing.check_order(order, _sizes(parent) | {k: len(v) for k, v in block_names(parent.depths).items()})
    found: dict[str, Slice] = {}
    axes = _axes(None, "", parent, child, order)
    for key, names in _outside_blocks():
        slicing.add_slice(found, key, key, names, axes, {})
    for stage in range(4):
        blends: dict[str, Blend] = {}
        offsets = np.zeros(0, dtype=np.int64)
        if stage > 0:
            offsets, blend = _offsets(child, parent, stage)
            blends = {} if blend is None else {"offsets": blend}

        def axes_of(block: str, stage: int = stage, offsets: Index = offsets) -> dict[str, Index]:
            return _axes(stage, block, parent, child, order) | {"offsets": offsets}

        group, depths = f"stages.{stage}.blocks", (child.depths[stage], parent.depths[stage])
        slicing.add_blocks(found, group, *depths, order.get(group), _block(stage), axes_of, blends)
    return found


def resized(found: Mapping[str, Slice], parent: TinyVitNet, child: TinyVitNet, how: str) -> dict[str, Slice]:
    """Return a slicing between two sizes of one net with its tables resized the way called `how`.

    "own" is the slicing as it is. Otherwise a bias table is resized as if it were an image [window, window], whatever
    its offsets are in the image: the official `load_pretrained` (microsoft/Cream, TinyViT/utils.py) and timm's
    `checkpoint_filter_fn`. Of equal windows the tables are copied.
    """
    result = dict(found)
    if how == "own":
        return result
    for stage, names in enumerate(block_names(child.depths).values()):
        if stage == 0:
            continue
        index, blend = slicing.square(child.windows[stage - 1], parent.windows[stage - 1], slicing.LINES[how])
        for name in names:
            key = f"{name}.attn.attention_biases"
            heads = found[key].index[0]
            result[key] = Slice(key, (heads, index), {} if blend is None else {1: blend})
    return result
