"""Encoding of archs as genes: one per slot of a factor, with the slot's ascending choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from space.contractions import axes_of
from space.family import Arch, Context, Family


@dataclass(frozen=True)
class Gene:
    """One slot of a factor that can change; `values` are ascending. `slot` is None for a scalar."""

    field: str
    slot: int | None
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Return the gene's name, e.g. "embed_dims[2]"."""
        return self.field if self.slot is None else f"{self.field}[{self.slot}]"

    def index(self, arch: Arch) -> int:
        """Return the position of an arch's value among the choices, or of the nearest choice."""
        value = getattr(arch, self.field)
        value = value if self.slot is None else value[self.slot]
        return int(np.argmin(np.abs(np.array(self.values) - value)))


def genes_of(family: Family, seed: Arch, ctx: Context) -> tuple[Gene, ...]:
    """Return the genes of a seed's contractions: every slot with more than one value as built."""
    axes = {axis.field: axis.values for axis in axes_of(family, seed, ctx)}
    genes = []
    for f in family.factors:
        columns = axes[f.field].reshape(-1, f.slots).T
        for i, column in enumerate(columns):
            values = tuple(np.unique(column).tolist())
            if len(values) > 1:
                genes.append(Gene(f.field, None if f.scalar else i, values))
    return tuple(genes)


def assembled(
    family: Family, seed: Arch, genes: tuple[Gene, ...], indices: Mapping[str, int]
) -> dict[str, Any]:
    """Put genes' values, by name as positions among their choices, into the seed.

    Returns a value for every field, which need not make an arch.
    """
    values = family.to_dict(seed)
    for gene in genes:
        value = gene.values[indices[gene.name]]
        if gene.slot is None:
            values[gene.field] = value
        else:
            values[gene.field][gene.slot] = value
    return values
