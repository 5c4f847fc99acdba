"""Frozen factors: a family whose contractions never change them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from space.contractions import QUICK, Band, axes_of, walk
from space.errors import refuse
from space.family import Arch, Array, Choices, Context, Family, as_slots

Frozen = Mapping[str, tuple[int, ...]]
"""Frozen slots by field, ascending; a scalar field has slot 0."""


def freeze(family: Family, seed: Arch, names: Sequence[str]) -> Family:
    """Make a family like `family` in which the named factors keep the values of `seed`.

    `names`: a field ("window_sizes"), one of its slots ("embed_dims[2]"), or one of the family's `parts()`. Archs,
    keys, counts and builds stay the family's own; only what may be proposed changes: `moves`, `floor`, `scaled` and
    `published`. Raises `InputError` for unknown names, and when nothing would be left to contract.
    """
    frozen = _slots_of(family, names)
    if not frozen:
        return family
    kind = type(family)
    factors = []
    for f in family.factors:
        fixed = frozen.get(f.field, ())
        factors.append(replace(f, choices=tuple(Choices() if i in fixed else c for i, c in enumerate(f.choices))))

    def moves(self: Family, arch: Arch) -> dict[str, Array]:
        return _holding(kind.moves(self, arch), arch, frozen)

    def floor(self: Family, arch: Arch, ctx: Context) -> Arch:
        return _smallest(self, arch, ctx)

    def scaled(self: Family, arch: Arch, factor: float) -> Arch:
        return _restored(self, arch, family.scaled(arch, factor), frozen)

    # Everything else is the family's own, which goes by its own factors and releases.
    changed: dict[str, Any] = {"moves": moves, "floor": floor, "scaled": scaled}
    same = {
        name: getattr(family, name)
        for name in dir(family)
        if not name.startswith("_") and name not in changed and callable(getattr(family, name))
    }
    published = tuple(p for p in family.published if _agree(p.arch, seed, frozen))
    values = {"factors": tuple(factors), "published": published, "__module__": __name__}
    made = type(f"Frozen{kind.__name__}", (kind,), {**same, **changed, **values})
    result = cast(Family, object.__new__(made))
    vars(result).update(vars(family))
    if all(len(v) == 1 for v in result.moves(seed).values()):
        raise refuse("--freeze", ",".join(names), "at least one factor left to contract")
    return result


def _slots_of(family: Family, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Resolve names to frozen slots; unknown ones are refused."""
    known: dict[str, list[tuple[str, int]]] = {}
    for f in family.factors:
        known[f.field] = [(f.field, i) for i in range(f.slots)]
        if not f.scalar:
            known |= {f"{f.field}[{i}]": [(f.field, i)] for i in range(f.slots)}
    for part, members in family.parts().items():
        known[part] = [slot for member in members for slot in known[member]]
    found: set[tuple[str, int]] = set()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {close[0]}?" if close else ""
            raise refuse("--freeze", name, f"one of {', '.join(known)}", remedy)
        found.update(known[name])
    return {f: tuple(sorted(i for g, i in found if g == f)) for f in {g for g, _ in found}}


def _agree(a: Arch, b: Arch, frozen: Frozen) -> bool:
    """Return whether two archs have the same values in the frozen slots."""
    return all(as_slots(getattr(a, f))[i] == as_slots(getattr(b, f))[i] for f, slots in frozen.items() for i in slots)


def _holding(moves: Mapping[str, Array], arch: Arch, frozen: Frozen) -> dict[str, Array]:
    """Keep the joint values that leave the frozen slots of `arch` as they are."""
    kept = dict(moves)
    for field, slots in frozen.items():
        values = moves[field].reshape(len(moves[field]), -1)
        now = np.array(as_slots(getattr(arch, field)), dtype=values.dtype)
        kept[field] = moves[field][(values == now)[:, list(slots)].all(axis=1)]
    return kept


def _smallest(family: Family, arch: Arch, ctx: Context) -> Arch:
    """Find the contraction of fewest parameters, `arch` itself when there is none.

    Grids go down to their end in one move, so nothing smaller is reached by repetition. A product too large to walk is
    descended instead, one factor at a time.
    """
    axes = axes_of(family, arch, ctx)
    if math.prod(a.length for a in axes) > QUICK:
        return _descended(family, arch, ctx)
    best, least = arch, family.count_params(arch, ctx)
    band = Band(0, least - 1)
    for cut, inside in walk(family, axes, ctx, band):
        if not inside.any():
            continue
        parts = [a.values[part] for a, part in zip(axes, cut, strict=True)]
        rows = np.unravel_index(np.flatnonzero(inside), inside.shape)
        table = {a.field: v[i] for a, v, i in zip(axes, parts, rows, strict=True)}
        params = family.count_params_many(table, ctx)
        if int(params.min()) < least:
            best, least = family.row(table, int(np.argmin(params))), int(params.min())
            band = Band(0, least - 1)
    return best


def _descended(family: Family, arch: Arch, ctx: Context) -> Arch:
    """Descend to fewer parameters one factor at a time, until no single factor helps."""
    while True:
        before = arch
        for field, values in family.moves(arch).items():
            table = {**family.table([arch]), field: values}
            params = family.count_params_many(table, ctx)
            params = np.where(family.valid_many(table, ctx), params, np.iinfo(np.int64).max)
            if int(params.min()) < family.count_params(arch, ctx):
                value = values[int(np.argmin(params))].tolist()
                arch = family.arch({**family.to_dict(arch), field: value})
        if arch == before:
            return arch


def _restored(family: Family, arch: Arch, scaled: Arch, frozen: Frozen) -> Arch:
    """Return the frozen slots of `scaled` their values in `arch` back.

    Of what contraction may propose, the joint values nearest to the scaled ones that can be built: a free width may
    have to follow a frozen one.
    """
    moves = family.moves(arch)
    for field in frozen:
        wanted = np.array(as_slots(getattr(scaled, field)))
        values = moves[field]
        off = np.abs(values.reshape(len(values), -1) - wanted).sum(axis=1)
        valid = family.valid_many({**family.table([scaled]), field: values})
        off = np.where(valid, off, np.inf)
        if not np.isfinite(off.min()):
            return arch
        value = values[int(np.argmin(off))].tolist()
        scaled = family.arch({**family.to_dict(scaled), field: value})
    return scaled
