"""What a model family offers to the search: the interface, contexts and the registry."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import json
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from space.errors import InputError, read_int, refuse

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Table = Mapping[str, Array]
"""Archs by column: field -> [..., slots] (scalars: [...]); the leading shapes broadcast."""

ENTRY_POINTS = "vision_contraction.families"
MAX_VALUES = 4_000_000  # joint values of one factor


@dataclass(frozen=True)
class Context:
    """Where a net works: images of `img_size`^2 pixels and `in_chans` channels, and the classes."""

    img_size: int
    num_classes: int
    in_chans: int = 3

    def __post_init__(self) -> None:
        read_int("img_size", self.img_size, 16, 4096)
        read_int("num_classes", self.num_classes, 1, 10_000_000)
        read_int("in_chans", self.in_chans, 1, 4096)


REFERENCE_CONTEXT = Context(img_size=224, num_classes=1000)
"""Where sizes are quoted, as papers do, so that archs of different data can be compared."""


@dataclass(frozen=True)
class Choices:
    """The values that contraction may propose for one slot of a factor: its grid.

    `values` ascending, or every multiple of `step` from `step` on. `up`: how many grid values above the present one are
    proposed (None: all). Staying is always allowed, on the grid or off it.
    """

    values: tuple[float, ...] = ()
    step: int = 0
    up: int | None = 0

    def _grid(self, top: float) -> Sequence[float]:
        """Return the grid's values, up to `top` where it has no end."""
        return range(self.step, int(top) + 1, self.step) if self.step else self.values

    def options(self, present: float) -> list[float]:
        """Return the values that may follow `present`, ascending, `present` included."""
        grid = self._grid(present + self.step * (self.up or 0))
        return [*(v for v in grid if v < present), present, *[v for v in grid if v > present][: self.up]]

    def steps(self, present: float, value: float) -> int:
        """Count the grid steps from `present` to `value`; from off the grid, the first counts."""
        if value == present:
            return 0
        grid = self._grid(max(present, value))
        return max(1, sum(value <= v < present or present < v <= value for v in grid))


@dataclass(frozen=True)
class Factor:
    """One contraction factor: `symbol` as in the paper (D, N, W, R, M, E), `field` of the arch.

    `choices` for each slot; `scalar` fields hold a bare number instead of a tuple.
    """

    symbol: str
    field: str
    choices: tuple[Choices, ...]
    scalar: bool = False

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self.choices)


class Arch:
    """One immutable, hashable point of a family's space; each family has its own dataclass."""


@dataclass(frozen=True)
class Published:
    """An arch released by its authors, under its short name."""

    name: str
    arch: Arch
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Where one tensor of a child comes from: the key `source` in the parent's state_dict.

    `index`: one int64 array per dimension of the child's tensor: the parent's position to copy from, -1 to keep the
    child's own. `blends`: by dimension, float64 [child, parent]: its values as weighted sums of the parent's in place
    of its index, which then names the nearest position.
    """

    source: str
    index: tuple[npt.NDArray[np.int64], ...]
    blends: Mapping[int, npt.NDArray[np.float64]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One dimension of a tensor that belongs to a group of units (channels, heads).

    `key`: in the state_dict; `unit`: int64 [size of dimension `dim`], the unit of each position, -1: none.
    """

    key: str
    dim: int
    unit: npt.NDArray[np.int64]


class Family(ABC):
    """A kind of model. Everything that depends on the input or the classes takes a `Context`."""

    name: ClassVar[str]
    factors: ClassVar[tuple[Factor, ...]]
    published: ClassVar[tuple[Published, ...]]
    resizes: ClassVar[tuple[str, ...]] = ("own",)  # names that `resized` takes

    @abstractmethod
    def arch(self, mapping: Mapping[str, Any]) -> Arch:
        """Check a mapping from outside (JSON) and make an arch of it. Raises `InputError`."""

    @abstractmethod
    def effective(self, table: Table, ctx: Context) -> dict[str, Array]:
        """Return the fields as built in `ctx`. Works field by field, so a partial table will do."""

    @abstractmethod
    def key(self, arch: Arch, ctx: Context) -> str:
        """Name the net as built in `ctx`, safe in file names; equal nets and only they share it."""

    @abstractmethod
    def count_params_many(self, table: Table, ctx: Context) -> npt.NDArray[np.int64]:
        """Count parameters exactly; the result has the broadcast leading shape of the table."""

    @abstractmethod
    def count_macs_many(self, table: Table, ctx: Context) -> npt.NDArray[np.int64]:
        """Count multiply-adds of one image, dense; shape as `count_params_many`."""

    def cost_terms_many(self, table: Table, ctx: Context) -> dict[str, Array]:
        """Return what a forward pass is made of, by name: work that takes time in proportion.

        A device's time is close to a sum of these with weights of its own, none negative. A family may split them by
        stage and kind of layer. Shapes as `count_params_many`.
        """
        macs, params = self.count_macs_many(table, ctx), self.count_params_many(table, ctx)
        return {"once": np.ones_like(macs), "macs": macs, "params": params}

    @abstractmethod
    def valid_many(self, table: Table, ctx: Context | None = None) -> npt.NDArray[np.bool_]:
        """Return which archs can be built (in `ctx`); any shape that broadcasts to the table's."""

    def fits(self, arch: Arch, ctx: Context) -> bool:
        """Return whether `arch` can be built in `ctx`."""
        return bool(self.valid_many(self.table([arch]), ctx)[0])

    def check(self, arch: Arch, ctx: Context) -> None:
        """Refuse an arch that cannot be built in `ctx`, with the reason. Raises `InputError`."""
        if not self.fits(arch, ctx):
            raise refuse("--img-size", ctx.img_size, f"an image size that {self.label(arch)} can be built for")

    @abstractmethod
    def scaled(self, arch: Arch, factor: float) -> Arch:
        """Scale all widths by `factor`, rounded to the grid; everything else stays."""

    @abstractmethod
    def floor(self, arch: Arch, ctx: Context) -> Arch:
        """Return the arch of fewest parameters that repeated contraction of `arch` can reach."""

    @abstractmethod
    def timm_call(self, arch: Arch, ctx: Context) -> tuple[str, dict[str, Any]]:
        """Return (name, kwargs), plain JSON, with which `timm.create_model` rebuilds the net."""

    def build(self, arch: Arch, ctx: Context, **options: Any) -> torch.nn.Module:
        """Build the net as timm does, on the default device, freshly initialised from torch's global generator.

        `options` go to timm over the call's own, such as `drop_path_rate`. Raises `InputError` where `ctx` is unfit.
        """
        import timm
        import torch

        self.check(arch, ctx)
        name, kwargs = self.timm_call(arch, ctx)
        model = timm.create_model(name, pretrained=False, **{**kwargs, **options})
        assert isinstance(model, torch.nn.Module)
        return model

    @abstractmethod
    def slicing(
        self,
        parent: Arch,
        child: Arch,
        ctx_parent: Context,
        ctx_child: Context,
        order: Mapping[str, Array] | None = None,
    ) -> dict[str, Slice]:
        """Map the child's state_dict onto the parent's: pure indices, no weights, no torch.

        Keys without any source are left out. `order`: the parent's units (see `groups`) and blocks (see `blocks`) by
        group, most wanted first; without it, the first units and the blocks that the family prefers. What is kept stays
        in the parent's order.
        """

    def resized(self, arch: Arch, ctx_parent: Context, ctx_child: Context, how: str) -> dict[str, Slice]:
        """Map the state_dict of an arch onto that of the same arch in another context.

        `how`: one of `resizes`, how tables of positions change their size ("own": as in `slicing`); a family with other
        ways extends this. Another name: `InputError`.
        """
        if how not in self.resizes:
            raise refuse("--resize", how, f"one of {', '.join(self.resizes)}")
        return self.slicing(arch, arch, ctx_parent, ctx_child)

    def groups(self, arch: Arch, ctx: Context) -> dict[str, tuple[Member, ...]]:
        """Return the groups of units that a child may take a part of, with their tensors.

        Removing or reordering a unit in every member at once leaves a net that works. (Default: {})
        """
        return {}

    def blocks(self, arch: Arch) -> dict[str, tuple[str, ...]]:
        """Name the modules that a child may lack, in order, by group; each keeps the shape."""
        return {}

    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Name parts of the net ("stage2") by the fields and slots that shape them."""
        return {}

    def to_dict(self, arch: Arch) -> dict[str, Any]:
        """Return the arch as plain JSON; `arch()` is the inverse."""
        values = ((f.field, getattr(arch, f.field)) for f in self.factors)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values}

    def label(self, arch: Arch) -> str:
        """Return a readable name, e.g. "D64-128-160-320 N2-2-6-2 W7-14-7 R4 M4 E32"."""
        values = ((f.symbol, as_slots(getattr(arch, f.field))) for f in self.factors)
        return " ".join(s + "-".join(f"{v:g}" for v in vs) for s, vs in values)

    def describe_moves(self, parent: Arch, child: Arch) -> str:
        """Return what differs, e.g. "embed_dims[2] 384->256, depths[3] 2->1", or ""."""
        parts = []
        for f in self.factors:
            both = (as_slots(getattr(a, f.field)) for a in (parent, child))
            for i, (old, new) in enumerate(zip(*both, strict=True)):
                if old != new:
                    slot = "" if f.scalar else f"[{i}]"
                    parts.append(f"{f.field}{slot} {old:g}->{new:g}")
        return ", ".join(parts)

    def count_params(self, arch: Arch, ctx: Context) -> int:
        """Count the parameters of the net as built in `ctx`, exactly."""
        return int(self.count_params_many(self.table([arch]), ctx)[0])

    def count_macs(self, arch: Arch, ctx: Context) -> int:
        """Count multiply-adds of one image (FLOPs = 2 x MACs), dense, attention included."""
        return int(self.count_macs_many(self.table([arch]), ctx)[0])

    def table(self, archs: Sequence[Arch]) -> dict[str, Array]:
        """Lay archs out column by column: [n, slots], scalar fields [n]; int64 or float64."""
        table = {}
        for f in self.factors:
            real = isinstance(as_slots(getattr(self.published[0].arch, f.field))[0], float)
            values = [getattr(a, f.field) for a in archs]
            column = np.array(values, dtype=np.float64 if real else np.int64)
            table[f.field] = column.reshape((len(archs),) if f.scalar else (-1, f.slots))
        return table

    def nearest_published(self, arch: Arch, ctx: Context, among: Sequence[Published] | None = None) -> Published:
        """Return the published arch of the nearest size."""
        size = math.log(self.count_params(arch, ctx))
        return min(among or self.published, key=lambda p: abs(math.log(self.count_params(p.arch, ctx)) - size))

    def row(self, table: Table, i: int) -> Arch:
        """Read arch `i` back from a table."""
        return self.arch({f.field: table[f.field][i].tolist() for f in self.factors})

    def coherent(self, field: str, values: Array) -> npt.NDArray[np.bool_]:
        """Return which joint values [v, slots] of a factor may be proposed (default: all)."""
        return np.ones(len(values), dtype=bool)

    def moves(self, arch: Arch) -> dict[str, Array]:
        """Give, per factor, the joint values contraction may propose, the present one included.

        [v, slots] (scalar fields: [v]) in ascending order. Raises `InputError` when a factor has more than `MAX_VALUES`
        of them.
        """
        moves = {}
        for f, present in zip(self.factors, self.table([arch]).values(), strict=True):
            now = np.atleast_1d(present[0])
            options = [c.options(v) for c, v in zip(f.choices, now.tolist(), strict=True)]
            number = math.prod(len(o) for o in options)
            if number > MAX_VALUES:
                raise refuse(
                    f.field, f"{number:,}", f"at most {MAX_VALUES:,} combinations", "start from a smaller arch"
                )
            grid = np.meshgrid(*(np.array(o, dtype=now.dtype) for o in options), indexing="ij")
            values = np.stack(grid, axis=-1).reshape(number, f.slots)
            keep = self.coherent(f.field, values) | (values == now).all(axis=1)
            moves[f.field] = values[keep, 0] if f.scalar else values[keep]
        return moves

    def grid_steps(self, arch: Arch, values: Table) -> dict[str, npt.NDArray[np.int64]]:
        """Count, per field, the steps on the grid from `arch` to each joint value: [v]."""
        steps = {}
        for f in self.factors:
            if f.field not in values:
                continue
            total = np.zeros(len(values[f.field]), dtype=np.int64)
            columns = values[f.field].reshape(-1, f.slots).T
            present = as_slots(getattr(arch, f.field))
            for choices, now, column in zip(f.choices, present, columns, strict=True):
                distinct, inverse = np.unique(column, return_inverse=True)
                counts = [choices.steps(now, v) for v in distinct.tolist()]
                total += np.array(counts, dtype=np.int64)[inverse]
            steps[f.field] = total
        return steps

    def seed(self, name: str) -> Arch:
        """Find an arch by published name or alias (any case), or in a JSON file."""
        for p in self.published:
            if name.lower() in (p.name.lower(), *(a.lower() for a in p.aliases)):
                return p.arch
        path = Path(name)
        if path.suffix.lower() == ".json" or path.is_file():
            return self._read(path)
        raise refuse("--seed", name, f"one of {', '.join(p.name for p in self.published)} or a JSON file")

    def _read(self, path: Path) -> Arch:
        """Read an arch from a JSON file."""
        want = "a JSON file with an arch"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
            raise refuse("--seed", path, want, why or "it cannot be read") from None
        if not isinstance(data, dict):
            raise refuse("--seed", path, f"{want}: an object, not a {type(data).__name__}")
        if "arch" in data:
            if data.get("family", self.name) != self.name:
                raise refuse("--seed", f"{path} of family {data['family']}", f"an arch of family {self.name}")
            data = data["arch"]
        if not isinstance(data, dict):
            raise refuse("--seed", path, f"{want}: `arch` holds no object")
        try:
            return self.arch(data)
        except InputError as error:
            raise InputError(f"--seed {path}: {error}") from None

    def check_fields(self, mapping: Mapping[str, Any]) -> None:
        """Refuse a mapping with unknown or missing fields."""
        if not isinstance(mapping, Mapping):
            raise refuse("arch", repr(mapping), "a mapping of factors to values")
        fields = [f.field for f in self.factors]
        for field in mapping:
            if field not in fields:
                close = difflib.get_close_matches(str(field), fields, 1)
                remedy = f"did you mean {close[0]}?" if close else ""
                raise refuse("arch", f"the field {field!r}", f"only {', '.join(fields)}", remedy)
        missing = ", ".join(f for f in fields if f not in mapping)
        if missing:
            raise refuse("arch", f"no {missing}", f"all of {', '.join(fields)}")


def as_slots(value: Any) -> tuple[Any, ...]:
    """Return a field of an arch as a tuple, scalar or not."""
    return value if isinstance(value, tuple) else (value,)


def _own_families() -> dict[str, Family]:
    """Find the families of this package: the modules that hold a `FAMILY`."""
    path = importlib.import_module("space").__path__
    modules = (importlib.import_module(f"space.{m.name}") for m in pkgutil.iter_modules(path))
    families = (getattr(m, "FAMILY", None) for m in modules)
    return {f.name: f for f in families if isinstance(f, Family)}


def _other_families() -> dict[str, importlib.metadata.EntryPoint]:
    """Find the families that other packages register, without loading them."""
    return {e.name.lower(): e for e in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def family_names() -> tuple[str, ...]:
    """Name the families at hand: ours first, then those that other packages register."""
    own = _own_families()
    return (*sorted(own), *sorted(set(_other_families()) - set(own)))


def get_family(name: str) -> Family:
    """Return the family called `name` (any case); an unknown one is refused.

    Ours are one file each in `space/`, found by its `FAMILY`. Others register an object of type `Family` as an entry
    point in the group `vision_contraction.families`; ours come first.
    """
    own, others = _own_families(), _other_families()
    wanted = str(name).lower()  # a user's file may hold anything here
    if wanted in own:
        return own[wanted]
    if wanted not in others:
        raise refuse("--family", name, f"one of {', '.join(family_names())}")
    family = others[wanted].load()
    if not isinstance(family, Family):
        raise refuse("--family", others[wanted].value, "an entry point of type space.family.Family")
    return family
