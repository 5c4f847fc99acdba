"""Which weights of a TinyViT a smaller one starts from: index maps over timm's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from space.family import Array, Slice

Index = npt.NDArray[np.int64]
Named = tuple[str, tuple[str, ...]]
"""A key of the state_dict and the channel group of each of its dimensions."""


@dataclass(frozen=True)
class Net:
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


def _norm(prefix: str, group: str) -> Iterator[Named]:
    yield f"{prefix}.weight", (group,)
    yield f"{prefix}.bias", (group,)


def _conv_norm(prefix: str, out: str, into: str, kernel: str) -> Iterator[Named]:
    yield f"{prefix}.conv.weight", (out, into, kernel, kernel)
    yield from _norm(f"{prefix}.bn", out)
    yield f"{prefix}.bn.running_mean", (out,)
    yield f"{prefix}.bn.running_var", (out,)
    yield f"{prefix}.bn.num_batches_tracked", ()


def _linear(prefix: str, out: str, into: str) -> Iterator[Named]:
    yield f"{prefix}.weight", (out, into)
    yield f"{prefix}.bias", (out,)


def _outside_blocks() -> Iterator[Named]:
    yield from _conv_norm("patch_embed.conv1", "stem", "chans", "3")
    yield from _conv_norm("patch_embed.conv2", "dim1", "stem", "3")
    for i in (1, 2, 3):
        before, dim, merge = f"dim{i}", f"dim{i + 1}", f"stages.{i}.downsample"
        yield from _conv_norm(f"{merge}.conv1", dim, before, "1")
        yield from _conv_norm(f"{merge}.conv2", dim, "1", "3")
        yield from _conv_norm(f"{merge}.conv3", dim, dim, "1")
    yield from _norm("head.norm", "dim4")
    yield from _linear("head.fc", "classes", "dim4")


def _block(stage: int) -> Iterator[Named]:
    if stage == 0:
        yield from _conv_norm("conv1", "expand", "dim1", "1")
        yield from _conv_norm("conv2", "expand", "1", "3")
        yield from _conv_norm("conv3", "dim1", "expand", "1")
        return
    dim = f"dim{stage + 1}"
    yield from _norm("attn.norm", dim)
    yield from _linear("attn.qkv", "qkv", dim)
    yield from _linear("attn.proj", dim, "inner")
    yield "attn.attention_biases", ("heads", "offsets")
    yield from _norm("mlp.norm", dim)
    yield from _linear("mlp.fc1", "hidden", dim)
    yield from _linear("mlp.fc2", dim, "hidden")
    yield from _conv_norm("local_conv", dim, "1", "3")


def _first(child: int, parent: int, order: Array | None = None) -> Index:
    """Map channels: the parent's first (or most wanted) ones; what is grown has no source."""
    index = np.full(child, -1, dtype=np.int64)
    taken = min(child, parent)
    if order is not None:
        assert sorted(order.tolist()) == list(range(parent)), "order is not a permutation"
        index[:taken] = order[:taken]
    else:
        index[:taken] = np.arange(taken)
    return index


def _same(child: int, parent: int) -> Index:
    """Map positions that mean something by themselves: all of them, or none."""
    return np.arange(child) if child == parent else np.full(child, -1, dtype=np.int64)


def _qkv(dim: int, head_dim: int, parent_dim: int, parent_head_dim: int) -> Index:
    """Map rows of the fused projection, [head][q|k|v][channel of the head] in timm.

    A channel keeps its place among all heads' channels, so heads of another size are cut from
    neighbouring ones.
    """
    row = np.arange(3 * dim)
    part = row // head_dim % 3
    channel = row // (3 * head_dim) * head_dim + row % head_dim
    head, rest = channel // parent_head_dim, channel % parent_head_dim
    source = head * 3 * parent_head_dim + part * parent_head_dim + rest
    return np.where(channel < parent_dim, source, np.int64(-1))


def _heads(dim: int, head_dim: int, parent_dim: int, parent_head_dim: int) -> Index:
    """Map heads to the parent's head that holds their first channel."""
    first = np.arange(dim // head_dim) * head_dim
    return np.where(first < parent_dim, first // parent_head_dim, -1)


def _offsets(window: int, parent_window: int, scale: float) -> Index:
    """Map a bias table [window * window], indexed |dx| * window + |dy| in timm.

    `scale` turns the child's offsets into the parent's (images of another size); what reaches
    beyond the parent's window takes its last offset.
    """
    side = np.rint(np.arange(window) * scale).astype(np.int64)
    side = np.minimum(side, parent_window - 1)
    table: Index = side[:, None] * parent_window + side[None, :]
    return table.reshape(-1)


def spread(child: int, parent: int) -> list[int | None]:
    """Pick a parent block for each of the child's: evenly, the first and last kept.

    A single block is the first; blocks beyond the parent's depth have no source.
    """
    if child >= parent:
        return [j if j < parent else None for j in range(child)]
    if child == 1:
        return [0]
    gaps = child - 1
    return [(2 * j * (parent - 1) + gaps) // (2 * gaps) for j in range(child)]


def _groups(
    stage: int | None, block: str, parent: Net, child: Net, order: Mapping[str, Array]
) -> dict[str, Index]:
    """Map every channel group that occurs in one block (or outside all blocks: None)."""
    groups = {k: np.arange(int(k)) for k in ("1", "3")}
    for i in range(4):
        name = f"dim{i + 1}"
        groups[name] = _first(child.dims[i], parent.dims[i], order.get(name))
    if stage is None:
        groups["stem"] = _first(child.dims[0] // 2, parent.dims[0] // 2, order.get("stem"))
        groups["chans"] = _same(child.in_chans, parent.in_chans)
        groups["classes"] = _same(child.num_classes, parent.num_classes)
    elif stage == 0:
        groups["expand"] = _first(child.expand, parent.expand, order.get(f"{block}.expand"))
    else:
        i = stage - 1
        widths = child.dims[stage], child.head_dim, parent.dims[stage], parent.head_dim
        groups["qkv"] = _qkv(*widths)
        groups["inner"] = _first(child.dims[stage], parent.dims[stage])
        groups["heads"] = _heads(*widths)
        scale = parent.img_size / child.img_size
        groups["offsets"] = _offsets(child.windows[i], parent.windows[i], scale)
        wanted = order.get(f"{block}.hidden")
        groups["hidden"] = _first(child.hidden[i], parent.hidden[i], wanted)
    return groups


def slices(parent: Net, child: Net, order: Mapping[str, Array]) -> dict[str, Slice]:
    """Map the child's state_dict onto the parent's; keys without any source are left out."""
    found: dict[str, Slice] = {}

    def add(to: str, source: str, axes: tuple[str, ...], groups: Mapping[str, Index]) -> None:
        index = tuple(groups[axis] for axis in axes)
        if all((i >= 0).any() for i in index):
            found[to] = Slice(source, index)

    groups = _groups(None, "", parent, child, order)
    for key, axes in _outside_blocks():
        add(key, key, axes, groups)
    for stage in range(4):
        for j, source in enumerate(spread(child.depths[stage], parent.depths[stage])):
            if source is None:
                continue
            block = f"stages.{stage}.blocks.{source}"
            groups = _groups(stage, block, parent, child, order)
            for key, axes in _block(stage):
                add(f"stages.{stage}.blocks.{j}.{key}", f"{block}.{key}", axes, groups)
    return found
