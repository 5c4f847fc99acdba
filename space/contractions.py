"""Contractions of an arch inside a parameter band: counted exactly, shortlisted by rule.

The product of what each factor may become is walked in blocks on open grids: each factor keeps an axis of its own, so a
family's formula does most of its work on small arrays. Tens of millions of archs take well under a second, and no more
than a block is ever in memory.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from space.errors import refuse
from space.family import Arch, Array, Context, Family, Table

BLOCK = 1 << 17  # archs counted together: a few arrays of 1 MB
MAX_GRID = 20_000_000_000  # archs that one walk may meet: minutes

PARTS = 512  # uniform scalings are tried in as many steps
QUICK = 1 << 26  # archs that may be counted before a draw: a second
KEPT = 1 << 18  # entries gathered before all but the best of each stratum are dropped

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Band:
    """Parameter counts from `lo` to `hi`, both included; with `max_macs`, at most so many MACs."""

    lo: int
    hi: int
    max_macs: int | None = None


@dataclass(frozen=True)
class Axis:
    """What one factor may become: joint values, grid steps to each, places in the whole list."""

    field: str
    bit: int
    length: int
    values: Array
    steps: Ints
    place: Ints

    def within(self, radius: int) -> Axis:
        """Keep the values within `radius` steps."""
        near = self.steps <= radius
        return replace(self, values=self.values[near], steps=self.steps[near], place=self.place[near])


def axes_of(family: Family, arch: Arch, ctx: Context) -> list[Axis]:
    """Lay out what each factor may become, most values first; built alike is there once."""
    moves = family.moves(arch)
    all_steps = family.grid_steps(arch, moves)
    found = []
    for k, field in enumerate(moves):
        values, steps = moves[field], all_steps[field]
        built = family.effective({field: values}, ctx)[field]
        keep = np.arange(len(values))
        if not np.array_equal(built, values):
            nearest = np.argsort(steps, kind="stable")
            rows = built.reshape(len(values), -1)[nearest]
            keep = np.sort(nearest[np.unique(rows, axis=0, return_index=True)[1]])
        length = len(keep)
        found.append(Axis(field, 1 << k, length, values[keep], steps[keep], np.arange(length)))
    return sorted(found, key=lambda a: -a.length)


def _blocks(sizes: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cut a product into slices of at most about `BLOCK` elements, in order."""
    rest = math.prod(sizes[1:])
    step = max(1, BLOCK // rest) if sizes[1:] else BLOCK
    for i in range(0, sizes[0], step):
        here = slice(i, min(i + step, sizes[0]))
        if rest <= BLOCK:
            yield (here, *(slice(0, n) for n in sizes[1:]))
        else:
            for others in _blocks(sizes[1:]):
                yield (here, *others)


def mesh(columns: Sequence[Array], cut: Sequence[slice], slots: bool = False) -> list[Array]:
    """Return every column an axis of its own; with `slots`, 2-D columns keep their last one."""
    meshed = []
    for k, (column, part) in enumerate(zip(columns, cut, strict=True)):
        shape = [1] * len(columns)
        shape[k] = part.stop - part.start
        meshed.append(column[part].reshape(*shape, *(column.shape[1:] if slots else ())))
    return meshed


def inside_band(family: Family, table: Table, ctx: Context, band: Band) -> npt.NDArray[np.bool_]:
    """Return which archs of a table can be built and lie in the band."""
    params = family.count_params_many(table, ctx)
    inside = (params >= band.lo) & (params <= band.hi) & family.valid_many(table, ctx)
    if band.max_macs is not None:
        inside &= family.count_macs_many(table, ctx) <= band.max_macs
    return np.asarray(inside)


def walk(
    family: Family, axes: Sequence[Axis], ctx: Context, band: Band
) -> Iterator[tuple[tuple[slice, ...], npt.NDArray[np.bool_]]]:
    """Walk the product in blocks: (where, which of them can be built and lie in the band)."""
    for cut in _blocks([len(a.values) for a in axes]):
        meshed = mesh([a.values for a in axes], cut, slots=True)
        table = {a.field: column for a, column in zip(axes, meshed, strict=True)}
        yield cut, inside_band(family, table, ctx, band)


def walk_near(
    family: Family, near: Sequence[Axis], ctx: Context, band: Band, radius: int
) -> Iterator[tuple[tuple[Ints, ...], Ints]]:
    """Walk what lies in the band within `radius` steps, in blocks: (rows by axis, steps)."""
    for cut, inside in walk(family, near, ctx, band):
        meshed = mesh([a.steps for a in near], cut)
        steps = meshed[-1]
        for more in meshed[-2::-1]:  # the long axes last: until then the arrays are small
            steps = steps + more
        flat = np.flatnonzero(inside & (steps <= radius))
        if len(flat):
            found = np.unravel_index(flat, inside.shape)
            rows = tuple(i + part.start for i, part in zip(found, cut, strict=True))
            yield rows, steps.reshape(-1)[flat]


def checked(axes: Sequence[Axis]) -> Sequence[Axis]:
    """Refuse a product that is too large to walk."""
    number = math.prod(len(a.values) for a in axes)
    if number > MAX_GRID:
        raise refuse("arch", f"{number:,}", f"at most {MAX_GRID:,} contractions", "start from a smaller arch")
    return axes


@dataclass(frozen=True)
class Candidate:
    """An arch under test: what it costs, how far it is from its nearest parent, what is measured.

    `moved`: fields that differ as built. `baseline`: "uniform", "published:NAME" or None (the rule). Throughput is
    images/s and relative to the seed, with intervals; `requirements` are those timed so far, with their verdicts,
    `basis` is where the throughput is from, `seconds` were spent.
    """

    arch: Arch
    key: str
    params: int
    macs: int
    grid_steps: int
    moved: tuple[str, ...]
    baseline: str | None
    parent: Arch
    images_per_s: float | None = None
    images_per_s_lo: float | None = None
    images_per_s_hi: float | None = None
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    requirements: tuple[str, ...] = ()
    basis: str = ""
    seconds: float = 0.0


_ENTRY = np.dtype([("place", np.int64), ("steps", np.int64), ("moved", np.int64), ("priority", np.uint64)])
"""An arch of a grid: its mixed-radix index in the whole product, its steps, one bit a factor, and its seeded order."""


def _best(entries: Array, number: int) -> Array:
    """Sort by steps, factors moved and priority; keep `number` of each stratum."""
    ordered = entries[np.lexsort((entries["priority"], entries["moved"], entries["steps"]))]
    stratum = (ordered["steps"] << 32) | ordered["moved"]
    starts = np.flatnonzero(np.diff(stratum, prepend=-1))
    rank = np.arange(len(stratum)) - np.repeat(starts, np.diff([*starts, len(stratum)]))
    return np.asarray(ordered[rank < number])


def smaller_than(family: Family, arch: Arch, ctx: Context, band: Band) -> Band:
    """Cut the band to what is strictly smaller than `arch`."""
    return replace(band, hi=min(band.hi, family.count_params(arch, ctx) - 1))


def count_contractions(family: Family, arch: Arch, ctx: Context, band: Band) -> int:
    """Count the contractions of `arch` whose parameters lie in `band`, exactly.

    Contractions: archs that can be built from `family.moves`, with strictly fewer parameters than `arch`; those that
    are the same net as built in `ctx` count once. Raises `InputError` when the product is too large to walk.
    """
    axes = checked(axes_of(family, arch, ctx))
    return _count(family, axes, ctx, smaller_than(family, arch, ctx, band))


def _count(family: Family, axes: Sequence[Axis], ctx: Context, band: Band) -> int:
    """Count what lies in the band."""
    return sum(int(np.count_nonzero(inside)) for _, inside in walk(family, axes, ctx, band))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit integers one to one (SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seeded(x: Array, random_seed: int) -> npt.NDArray[np.uint64]:
    """Return each integer its place in a seeded order."""
    salt = _mix(np.array([random_seed % 2**64], dtype=np.uint64))
    return _mix(x.astype(np.uint64) ^ salt)


def _gather(
    family: Family, axes: Sequence[Axis], ctx: Context, band: Band, radius: int, number: int, random_seed: int
) -> tuple[int, Array]:
    """Collect what lies within `radius` steps: (how many, the first `number` per stratum)."""
    near = checked([a.within(radius) for a in axes])
    strides = [math.prod(a.length for a in axes[k + 1 :]) for k in range(len(axes))]
    kept, total = [np.zeros(0, _ENTRY)], 0
    for rows, steps in walk_near(family, near, ctx, band, radius):
        total += len(steps)
        found = np.zeros(len(steps), _ENTRY)
        for a, i, stride in zip(near, rows, strides, strict=True):
            found["place"] += a.place[i] * stride
            found["moved"] += (a.steps[i] > 0) * a.bit
        found["steps"], found["priority"] = steps, seeded(found["place"], random_seed)
        kept.append(found)
        if sum(map(len, kept)) > KEPT:
            kept = [_best(np.concatenate(kept), number)]
    return total, _best(np.concatenate(kept), number)


def _draw(entries: Array, number: int, random_seed: int) -> list[int]:
    """Draw by rule: nearest ring first; inside it, whichever factors moved least often so far."""
    drawn: list[int] = []
    times: dict[int, int] = {}
    for ring in np.unique(entries["steps"]).tolist():
        members = np.flatnonzero(entries["steps"] == ring)
        queues: dict[int, list[int]] = {}
        for i, moved in zip(members.tolist(), entries["moved"][members].tolist(), strict=True):
            queues.setdefault(moved, []).append(i)
        strata = np.array(list(queues), dtype=np.int64)
        ties = dict(zip(strata.tolist(), seeded(strata, random_seed).tolist(), strict=True))
        heap = [(times.get(m, 0), ties[m], m, 0) for m in queues]
        heapq.heapify(heap)
        while heap:
            count, tie, moved, i = heapq.heappop(heap)
            drawn.append(queues[moved][i])
            if len(drawn) == number:
                return drawn
            times[moved] = count + 1
            if i + 1 < len(queues[moved]):
                heapq.heappush(heap, (count + 1, tie, moved, i + 1))
    return drawn


def _by_rule(family: Family, arch: Arch, ctx: Context, band: Band, number: int, random_seed: int) -> list[Arch]:
    """List the first `number` contractions of one arch by the rule."""
    axes = axes_of(family, arch, ctx)
    below = smaller_than(family, arch, ctx, band)
    farthest = sum(int(a.steps.max()) for a in axes)
    wanted = number
    if math.prod(a.length for a in axes) <= QUICK:  # no wider radius for what is not there
        wanted = min(number, _count(family, axes, ctx, below))
    radius = min(3, farthest)
    while True:
        total, entries = _gather(family, axes, ctx, below, radius, number, random_seed)
        if total >= wanted or radius == farthest:
            break
        radius = min(farthest, radius + max(2, radius // 2))
    shape = [a.length for a in axes]
    archs = []
    for i in _draw(entries, number, random_seed):
        rows = np.unravel_index(int(entries["place"][i]), shape)
        values = {a.field: a.values[r].tolist() for a, r in zip(axes, rows, strict=True)}
        archs.append(family.arch(values))
    return archs


def baselines_in(family: Family, parents: Sequence[Arch], ctx: Context, band: Band) -> list[tuple[str, Arch]]:
    """Find the baselines: published archs in the band, then each parent's uniform scaling.

    Of the uniform scalings (all widths by one factor) the one nearest to the band's middle.
    """
    largest = max(family.count_params(p, ctx) for p in parents)
    baselines = []
    for p in family.published:
        params = family.count_params(p.arch, ctx)
        light = band.max_macs is None or family.count_macs(p.arch, ctx) <= band.max_macs
        small = band.lo <= params <= band.hi and params < largest
        if small and light and family.fits(p.arch, ctx):
            baselines.append((f"published:{p.name}", p.arch))
    for parent in parents:
        below = smaller_than(family, parent, ctx, band)
        baselines += [("uniform", arch) for arch in scalings(family, parent, ctx, below, band.lo + band.hi)[:1]]
    return baselines


def scalings(family: Family, arch: Arch, ctx: Context, band: Band, ends: int) -> list[Arch]:
    """Scale all widths of `arch` by one factor: what lies in the band, the nearest to half of `ends` first."""
    scaled = list(dict.fromkeys(family.scaled(arch, k / PARTS) for k in range(PARTS, 0, -1)))
    table = family.table(scaled)
    off = np.abs(2 * family.count_params_many(table, ctx) - ends)
    fits = inside_band(family, table, ctx, band)
    return [scaled[i] for i in np.argsort(off, kind="stable").tolist() if fits[i]]


def _distance(family: Family, parent: Arch, arch: Arch, ctx: Context) -> dict[str, int]:
    """Count grid steps per field between two nets as built in `ctx`; equal fields are left out."""
    pair, child = family.table([parent, arch]), family.table([arch])
    built = family.effective(pair, ctx)
    steps = family.grid_steps(parent, child)
    return {f: int(steps[f][0]) for f, v in built.items() if not np.array_equal(v[0], v[1])}


def propose(
    family: Family,
    parents: Sequence[Arch],
    ctx: Context,
    band: Band,
    size: int,
    *,
    random_seed: int,
    baselines: bool = True,
    exclude: Collection[str] = (),
) -> list[Candidate]:
    """Draw at most `size` candidates inside `band`: the baselines, then by rule.

    The rule: fewest grid steps first, the radius widened until the list is full; among equally near ones, those factors
    take turns that moved least often so far; then a seeded order. Several parents take turns. All candidates are
    different nets as built in `ctx` and smaller than their parent. `exclude`: keys already tried; drawing again without
    what came before continues the same sequence.
    """
    assert parents, "nothing to contract"
    drawn: dict[str, tuple[str | None, Arch]] = {}
    if baselines:
        for name, arch in baselines_in(family, parents, ctx, band):
            drawn.setdefault(family.key(arch, ctx), (name, arch))
    number = size + len(exclude) + len(drawn)  # enough even if all of those are drawn again
    rules = [_by_rule(family, p, ctx, band, number, random_seed) for p in parents]
    for turn in zip_longest(*rules):
        for candidate in turn:
            if candidate is not None:
                drawn.setdefault(family.key(candidate, ctx), (None, candidate))
    tried = set(exclude)
    chosen = [v for key, v in drawn.items() if key not in tried][:size]
    return describe_candidates(family, parents, chosen, ctx)


def describe_candidates(
    family: Family, parents: Sequence[Arch], chosen: Sequence[tuple[str | None, Arch]], ctx: Context
) -> list[Candidate]:
    """Return each chosen (baseline, arch) with its counts and its distance from its nearest parent.

    The parent is one that contracts to it, if any does, else any larger one; there must be one.
    """
    sizes = [family.count_params(p, ctx) for p in parents]
    reach = [family.moves(p) for p in parents]
    found = []
    for baseline, arch in chosen:
        params = family.count_params(arch, ctx)
        larger = [i for i, n in enumerate(sizes) if n > params]
        inside = [i for i in larger if _holds(family, reach[i], arch, ctx)]
        away = {i: _distance(family, parents[i], arch, ctx) for i in inside or larger}
        nearest = min(away, key=lambda i: sum(away[i].values()))
        moved, macs = away[nearest], family.count_macs(arch, ctx)
        parent, grid_steps = parents[nearest], sum(moved.values())
        key = family.key(arch, ctx)
        found.append(Candidate(arch, key, params, macs, grid_steps, tuple(moved), baseline, parent))
    return found


def contains(family: Family, parent: Arch, arch: Arch, ctx: Context) -> bool:
    """Return whether `arch` is a contraction of `parent`, whatever the band."""
    smaller = family.count_params(arch, ctx) < family.count_params(parent, ctx)
    return smaller and _holds(family, family.moves(parent), arch, ctx)


def _holds(family: Family, moves: dict[str, Array], arch: Arch, ctx: Context) -> bool:
    """Return whether every factor of `arch`, as built, is among the moves."""
    wanted, built = family.effective(family.table([arch]), ctx), family.effective(moves, ctx)
    return all(bool((built[f].reshape(len(built[f]), -1) == wanted[f].reshape(1, -1)).all(axis=1).any()) for f in built)
