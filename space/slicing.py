"""How a child's positions are chosen among its parent's: what all families' slicing shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from space.family import Array

Index = npt.NDArray[np.int64]
Blend = npt.NDArray[np.float64]


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

    As many of the parent's heads as hold the child's channels are chosen; their channels keep their
    place among each other. Heads of the parent's size are thereby whole heads of the parent, and
    those of another size are cut from neighbouring ones; a head is that of its first channel.
    """
    theirs = parent_head_dim
    number = min(parent_dim // theirs, -(-dim // theirs))
    heads = chosen(number, order)
    kept = (heads[:, None] * theirs + np.arange(theirs)).reshape(-1)[:dim]
    channels = np.full(dim, -1, dtype=np.int64)
    channels[: len(kept)] = kept
    begins = channels[np.arange(dim // head_dim) * head_dim]
    return channels, np.where(begins >= 0, begins // theirs, np.int64(-1))


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


def picked(child: int, parent: int, order: Array | None) -> list[int | None]:
    """Pick a parent block for each of the child's: the wanted ones, or spread evenly."""
    if order is None or child >= parent:
        return spread(child, parent)
    return [int(j) for j in chosen(child, order)]
