"""Encoding of archs as integers: one dimension per slot of a factor that can change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from space.contractions import axes_of
from space.family import Arch, Context, Family


@dataclass(frozen=True)
class Dimension:
    """One slot of a factor that can change; `values` are ascending. `slot` is None for a scalar."""

    field: str
    slot: int | None
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Return the dimension's name, e.g. "embed_dims[2]"."""
        return self.field if self.slot is None else f"{self.field}[{self.slot}]"

    def index(self, arch: Arch) -> int:
        """Return the position of an arch's value among the choices, or of the nearest choice."""
        value = getattr(arch, self.field)
        value = value if self.slot is None else value[self.slot]
        return int(np.argmin(np.abs(np.array(self.values) - value)))


def dimensions_of(family: Family, seed: Arch, ctx: Context) -> tuple[Dimension, ...]:
    """Return the dimensions of a seed's contractions: each slot with several values as built."""
    axes = {axis.field: axis.values for axis in axes_of(family, seed, ctx)}
    dimensions = []
    for f in family.factors:
        columns = axes[f.field].reshape(-1, f.slots).T
        for i, column in enumerate(columns):
            values = tuple(np.unique(column).tolist())
            if len(values) > 1:
                dimensions.append(Dimension(f.field, None if f.scalar else i, values))
    return tuple(dimensions)


def decode(family: Family, seed: Arch, dimensions: tuple[Dimension, ...], indices: Mapping[str, int]) -> dict[str, Any]:
    """Return the seed's fields with dimensions set by name to positions among their choices.

    The values need not make a valid arch.
    """
    values = family.to_dict(seed)
    for dimension in dimensions:
        value = dimension.values[indices[dimension.name]]
        if dimension.slot is None:
            values[dimension.field] = value
        else:
            values[dimension.field][dimension.slot] = value
    return values
