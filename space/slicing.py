"""How a child's tensors are cut from its parent's: what the slicing of all families shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from space.family import Array, Member, Slice

Index = npt.NDArray[np.int64]
Blend = npt.NDArray[np.float64]
Named = tuple[str, tuple[str, ...]]
"""A key of the state_dict and the axis name of each of its dimensions."""

CUBIC, SMOOTH_CUBIC = -0.75, -0.5
"""The constants of torch's bicubic interpolation: without, and with antialiasing (Pillow's)."""

Line = Callable[[int, int], Blend]
"""From the sizes of a child's and a parent's line: the weights [child, parent] between them."""


def norm(prefix: str, axis: str) -> Iterator[Named]:
    """Name the tensors of a normalisation."""
    yield f"{prefix}.weight", (axis,)
    yield f"{prefix}.bias", (axis,)


def linear(prefix: str, out: str, into: str) -> Iterator[Named]:
    """Name the tensors of a linear layer."""
    yield f"{prefix}.weight", (out, into)
    yield f"{prefix}.bias", (out,)


def group_members(
    tensors: Iterable[tuple[str, str, tuple[str, ...]]],
    sizes: Mapping[str, int],
    group_of: Callable[[str, str], str],
    layout: Mapping[str, Callable[[Index], Index]],
) -> dict[str, tuple[Member, ...]]:
    """List every group of units with the tensors that it runs through.

    `tensors`: (block, key, axes); `sizes`: units by group; `group_of`: from an axis and its block to a group (axes of
    other names belong to none); `layout`: from an axis's units to the unit of each of its positions, where they are not
    the same.
    """
    found: dict[str, list[Member]] = {name: [] for name in sizes}
    for block, key, axes in tensors:
        for dim, axis in enumerate(axes):
            name = group_of(axis, block)
            if name in found:
                unit = np.arange(sizes[name], dtype=np.int64)
                found[name].append(Member(key, dim, layout[axis](unit) if axis in layout else unit))
    return {name: tuple(group) for name, group in found.items()}


def add_slice(
    found: dict[str, Slice],
    to: str,
    source: str,
    names: tuple[str, ...],
    axes: Mapping[str, Index],
    blends: Mapping[str, Blend],
) -> None:
    """Add the slice of one tensor, its indices and blends by axis name, unless it has no source."""
    index = tuple(axes[name] for name in names)
    if all((i >= 0).any() for i in index):
        blended = {dim: blends[name] for dim, name in enumerate(names) if name in blends}
        found[to] = Slice(source, index, blended)


def add_blocks(
    found: dict[str, Slice],
    group: str,
    child: int,
    parent: int,
    order: Array | None,
    tensors: Iterable[Named],
    axes_of: Callable[[str], Mapping[str, Index]],
    blends: Mapping[str, Blend],
) -> None:
    """Add the slices of a group of blocks: of each a parent's block is taken, and its axes are those of `axes_of`."""
    named = tuple(tensors)
    for j, source in enumerate(picked(child, parent, order)):
        if source is not None:
            axes = axes_of(f"{group}.{source}")
            for key, names in named:
                add_slice(found, f"{group}.{j}.{key}", f"{group}.{source}.{key}", names, axes, blends)


def chosen(count: int, order: Array | None) -> Index:
    """Choose units: the most wanted (or first) `count`, ascending, so that all are just all."""
    first = np.arange(count) if order is None else np.sort(order[:count])
    return first.astype(np.int64)


def check_order(order: Mapping[str, Array], sizes: Mapping[str, int]) -> None:
    """Assert that every order is one of a group (by its size) of the parent, and whole."""
    for name, wanted in order.items():
        assert name in sizes, f"order of {name}, which the parent has not"
        whole = sorted(np.asarray(wanted).tolist()) == list(range(sizes[name]))
        assert whole, f"order of {name} is not a permutation of {sizes[name]}"


def first(child: int, parent: int, order: Array | None = None) -> Index:
    """Map channels to the parent's chosen ones; what is grown has no source."""
    index = np.full(child, -1, dtype=np.int64)
    taken = min(child, parent)
    index[:taken] = chosen(taken, order)
    return index


def same(child: int, parent: int) -> Index:
    """Map positions that mean something by themselves: all of them, or none."""
    return np.arange(child) if child == parent else np.full(child, -1, dtype=np.int64)


def of_heads(
    dim: int, head_dim: int, parent_dim: int, parent_head_dim: int, order: Array | None
) -> tuple[Index, Index]:
    """Map what is made of heads: (each channel's in the parent, each head's in the parent).

    As many of the parent's heads as hold the child's channels are chosen; their channels keep their place among each
    other. Heads of the parent's size are thereby whole heads of the parent, and those of another size are cut from
    neighbouring ones; a head is that of its first channel.
    """
    theirs = parent_head_dim
    number = min(parent_dim // theirs, -(-dim // theirs))
    heads = chosen(number, order)
    kept = (heads[:, None] * theirs + np.arange(theirs)).reshape(-1)[:dim]
    channels = np.full(dim, -1, dtype=np.int64)
    channels[: len(kept)] = kept
    begins = channels[np.arange(dim // head_dim) * head_dim]
    return channels, np.where(begins >= 0, begins // theirs, np.int64(-1))


def picked(child: int, parent: int, order: Array | None) -> list[int | None]:
    """Pick a parent block for each of the child's: the most wanted, without an order evenly, the first and last kept.

    A single block is then the first; blocks beyond the parent's depth have no source.
    """
    if child >= parent:
        return [j if j < parent else None for j in range(child)]
    if order is not None:
        return [int(j) for j in chosen(child, order)]
    gaps = max(1, child - 1)
    return [(2 * j * (parent - 1) + gaps) // (2 * gaps) for j in range(child)]


def _cubic(away: Blend, constant: float) -> Blend:
    """Return Keys's cubic convolution kernel at distances >= 0; nothing from 2 on."""
    near = ((constant + 2) * away - (constant + 3)) * away**2 + 1
    far = constant * (((away - 5) * away + 8) * away - 4)
    return np.where(away <= 1, near, np.where(away < 2, far, 0.0))


def bicubic(child: int, parent: int) -> Blend:
    """Return the weights [child, parent] that resize a line as torch does, without antialiasing.

    `F.interpolate(..., mode="bicubic", align_corners=False)`; beyond its ends a line goes on as it ends.
    """
    at = (np.arange(child) + 0.5) * parent / child - 0.5
    low = np.floor(at).astype(np.int64)
    weights = np.zeros((child, parent), dtype=np.float64)
    for tap in (-1, 0, 1, 2):
        source = np.clip(low + tap, 0, parent - 1)
        np.add.at(weights, (np.arange(child), source), _cubic(np.abs(at - (low + tap)), CUBIC))
    return weights


def antialiased(child: int, parent: int) -> Blend:
    """Return the weights [child, parent] that resize a line as torch does, with antialiasing.

    `F.interpolate(..., mode="bicubic", antialias=True)`, which is Pillow's: another constant than `bicubic`, so that
    larger lines differ too; the kernel is as wide as the child's step; beyond its ends a line is not there, and what is
    left of the weights sums to one.
    """
    step = parent / child
    centre = (np.arange(child) + 0.5) * step
    away = np.abs(np.arange(parent)[None, :] + 0.5 - centre[:, None]) / max(step, 1.0)
    weights = _cubic(away, SMOOTH_CUBIC)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


LINES: Mapping[str, Line] = {"published": bicubic, "timm": antialiased}
"""Ways of resizing that differ in their lines alone, by the name that users give."""


def square(child: int, parent: int, line: Line) -> tuple[Index, Blend | None]:
    """Map a table [child * child], row by row, onto one of [parent * parent].

    Returns the nearest positions and the weights over all of them; of equal sizes there are none.
    """
    near = ((np.arange(child) + 0.5) * parent / child).astype(np.int64)
    near = np.minimum(near, parent - 1)
    index = (near[:, None] * parent + near[None, :]).reshape(-1)
    if child == parent:
        return index, None
    along = line(child, parent)
    return index, np.asarray(np.kron(along, along), dtype=np.float64)
