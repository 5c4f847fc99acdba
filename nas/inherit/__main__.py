"""What a child takes from its parent, layer by layer: `python -m nas.inherit PARENT CHILD`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.core.cli import Parser, exit_status
from nas.core.config import RunConfig
from nas.core.io import read_json
from nas.inherit.jobs import InheritJob, inherit_weights
from nas.jobs.job import Job
from nas.jobs.local import LocalExecutor
from space import Context, get_family
from space.errors import InputError, refuse
from space.family import Arch, Array, Family, Slice

Shape = tuple[int, ...]
IMG_SIZE, NUM_CLASSES = 224, 1000
"""Unless flags, weights or a best.json give them."""
WITHOUT_DATA = ("prefix", "l1", "l2")
"""Criteria that need no images."""


@dataclass(frozen=True)
class Layer:
    """One layer, or a whole block that is not at its old place.

    `was`, `now`: shape of its first tensor in the parent and in the child, None where it is not there, () for a block.
    `origin`: the parent's module if it is another, "resampled", or "new"; "" for the one of the same name (in a moved
    block: of the block it is taken from). `changed`: not all of what the parent has, or not in the same place.
    """

    name: str
    was: Shape | None
    now: Shape | None
    origin: str
    changed: bool
    block: bool = False


def compare(
    family: Family,
    parent: Arch,
    child: Arch,
    ctx_parent: Context,
    ctx_child: Context,
    order: Mapping[str, Array] | None = None,
) -> tuple[Layer, ...]:
    """Compare every layer of a child with its parent's, in the order of the parent's, without making weights.

    `order` as in `Family.slicing`. A block that is dropped is one entry; one that is new or moved is an entry before
    its layers.
    """
    from nas.inherit.slice import is_whole

    slicing = family.slicing(parent, child, ctx_parent, ctx_child, order)
    was, now = _shapes(family, parent, ctx_parent), _shapes(family, child, ctx_child)
    old_blocks, new_blocks = _blocks(family, parent), _blocks(family, child)
    taken = _taken(slicing, old_blocks, new_blocks)
    places = {name: i for i, name in enumerate(_modules(was))}
    placed: list[tuple[int, Layer]] = []
    at, inside = 0, ""
    for name, keys in _modules(now).items():
        block = _within(name, new_blocks)
        origin = taken.get(block, "")
        found = slicing.get(keys[0])
        old = name if found is None else _module(found.source)
        called = name if keys[0].endswith(".weight") else keys[0]  # a bare table goes by its own
        at = places.get(old, at) if found is not None or not block else at
        if block and block != inside and origin != block:
            placed.append((at, Layer(block, () if origin else None, (), origin or "new", True, True)))
        inside = block
        home = origin + name[len(block) :] if origin else name
        homes = {key: f"{home}.{key.rpartition('.')[2]}".lstrip(".") for key in keys}
        whole = all(is_whole(homes[key], slicing.get(key), now[key], was) for key in keys)
        if found is None and block and not origin:
            layer = Layer(called, None, now[keys[0]], "new", False)  # its block is an entry
        elif found is None:
            layer = Layer(called, was.get(keys[0]), now[keys[0]], "new", True)
        else:
            words = "resampled" if found.blends else "" if old == home else old
            layer = Layer(called, was[found.source], now[keys[0]], words, not whole)
        placed.append((at, layer))
    placed += _dropped(was, slicing, _modules(now), set(old_blocks) - set(taken.values()), places)
    return tuple(layer for _, layer in sorted(placed, key=lambda pair: pair[0]))


def _dropped(
    was: Mapping[str, Shape],
    slicing: Mapping[str, Slice],
    present: Mapping[str, Any],
    blocks: set[str],
    places: Mapping[str, int],
) -> list[tuple[int, Layer]]:
    """Find what only the parent has: whole blocks, and layers outside of them."""
    used = {_module(one.source) for one in slicing.values()}
    found: dict[str, tuple[int, Layer]] = {}
    for name, keys in _modules(was).items():
        block = _within(name, blocks)
        if block:
            found.setdefault(block, (places[name], Layer(block, (), None, "", True, True)))
        elif name not in used and name not in present:
            found[name] = places[name], Layer(name, was[keys[0]], None, "", True)
    return list(found.values())


def _taken(slicing: Mapping[str, Slice], old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Return the parent's block that each of the child's is taken from, where there is one."""
    found = {}
    for key, one in slicing.items():
        block = _within(_module(key), new)
        if block:
            found[block] = _within(_module(one.source), old)
    return found


def _shapes(family: Family, arch: Arch, ctx: Context) -> dict[str, Shape]:
    """Return the shapes of a state dict, in its order."""
    from nas.export.arch_of_weights import state_shapes

    return {k: tuple(v.shape) for k, v in state_shapes(family, arch, ctx).items()}


def _modules(keys: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Gather the tensors of each module, in order."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(_module(key), []).append(key)
    return found


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _blocks(family: Family, arch: Arch) -> list[str]:
    return [name for names in family.blocks(arch).values() for name in names]


def _within(module: str, blocks: Sequence[str] | set[str]) -> str:
    """Return the block that a module is part of; "" for none."""
    return next((b for b in blocks if module == b or module.startswith(f"{b}.")), "")


def _cells(layer: Layer) -> tuple[str, str, str, str]:
    """Format a layer: layer, was, is, from."""

    def shape(value: Shape | None, none: str) -> str:
        if value is None:
            return none
        return "block" if layer.block else "x".join(map(str, value)) or "1"

    origin = layer.origin
    if layer.block and origin not in ("", "new"):
        origin = f"taken from {'.'.join(origin.split('.')[-2:])}"
    return layer.name, shape(layer.was, "-"), shape(layer.now, "dropped"), origin


def table(layers: Sequence[Layer], params: tuple[int, int]) -> list[str]:
    """Format layers as lines "layer | was | is | from", the parameters (was, is) last."""
    share = f"{params[1] / params[0]:.1%}"
    rows = [("layer", "was", "is", "from"), *(_cells(layer) for layer in layers)]
    rows.append(("parameters", f"{params[0]:,}", f"{params[1]:,}", share))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = (" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser("python -m nas.inherit", description=__doc__)
    parser.add_argument("parent", metavar="PARENT", help="5M, 11M, 21M, or a JSON file")
    parser.add_argument("child", metavar="CHILD", help="likewise; nothing of it need be smaller")
    parser.add_argument("--family", default=RunConfig.family, help="kind of model")
    size = f"the child's resolution (default: the weights', that of a best.json, or {IMG_SIZE})"
    parser.add_argument("--img-size", type=int, metavar="PX", help=size)
    classes = f"the child's classes (default: the weights', those of a best.json, or {NUM_CLASSES})"
    parser.add_argument("--num-classes", type=int, metavar="N", help=classes)
    parser.add_argument("--weights", metavar="FILE", help="of the parent: a checkpoint or timm tag")
    out = "write the child's weights (.safetensors); batch-norm statistics stay the parent's"
    parser.add_argument("--out", metavar="FILE", help=out)
    kept = f"what is kept in --out: {', '.join(WITHOUT_DATA)} (default: l1)"
    parser.add_argument("--importance", default="l1", metavar="CRITERION", help=kept)
    parser.add_argument("--random-seed", type=int, default=0, help="of what the parent has not")
    parser.add_argument("--all", action="store_true", help="print unchanged layers, too")
    parser.add_argument("--json", action="store_true", help="a last line for programs")
    return parser


def _arch(family: Family, name: str, label: str) -> Arch:
    try:
        return family.seed(name)
    except InputError as error:
        raise InputError(str(error).replace("--seed", label, 1)) from None


def _trained_at(name: str, size: int | None, classes: int | None) -> tuple[int | None, int | None]:
    """Fill in the resolution and the classes that a `best.json` was made for."""
    if Path(name).suffix.lower() != ".json":
        return size, classes
    saved = read_json(Path(name), "an arch")

    def given(key: str, low: int) -> int | None:
        value = saved.get(key) if isinstance(saved, dict) else None
        return value if type(value) is int and value >= low else None

    return (given("img_size", 16) if size is None else size, given("num_classes", 1) if classes is None else classes)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    given = {"--weights": arguments.weights, "--out": arguments.out}
    for flag, other in (("--weights", "--out"), ("--out", "--weights")):
        if given[flag] is not None and given[other] is None:
            raise refuse(flag, f"no {other} with it", "both or neither")
    if arguments.out is not None and Path(arguments.out).suffix != ".safetensors":
        raise refuse("--out", arguments.out, "a file ending in .safetensors")
    if arguments.importance not in WITHOUT_DATA:
        remedy = "taylor needs images and labels, which only a run has" if arguments.importance == "taylor" else ""
        raise refuse("--importance", arguments.importance, f"one of {', '.join(WITHOUT_DATA)}", remedy)


def _write(arguments: argparse.Namespace, family: Family, parent: Arch, child: Arch) -> Any:
    """Write the child's weights; returns what the job returns."""
    job = InheritJob(
        family=family.name,
        parent=family.to_dict(parent),
        child=family.to_dict(child),
        guess=Context(IMG_SIZE, NUM_CLASSES),
        img_size=arguments.img_size,
        num_classes=arguments.num_classes,
        weights=arguments.weights,
        out=Path(arguments.out),
        criterion=arguments.importance,
        random_seed=arguments.random_seed,
    )
    with LocalExecutor(threads=1) as worker:
        result = worker.run(Job(inherit_weights, job, "inherit"))
    if result.values.get("input_error"):
        raise InputError(result.reason)
    if not result.ok:
        raise refuse("CHILD", arguments.child, "weights that can be made here", result.reason or "")
    return result.values


def _work(arguments: argparse.Namespace) -> int:
    _check(arguments)
    family = get_family(arguments.family)
    parent = _arch(family, arguments.parent, "PARENT")
    child = _arch(family, arguments.child, "CHILD")
    size, classes = arguments.img_size, arguments.num_classes
    if arguments.weights is None:  # with weights, theirs
        size, classes = _trained_at(arguments.child, size, classes)
    there = here = Context(IMG_SIZE if size is None else size, NUM_CLASSES if classes is None else classes)
    written: dict[str, Any] = {}
    if arguments.weights is not None:
        written = dict(_write(arguments, family, parent, child))
        there, here = Context(**written["parent_context"]), Context(**written["context"])
    layers = compare(family, parent, child, there, here)
    shown = [layer for layer in layers if layer.changed or arguments.all]
    params = family.count_params(parent, there), family.count_params(child, here)
    print("\n".join(table(shown, params)))
    if not written and any(layer.block for layer in shown):
        print("blocks: spread evenly here; a run drops those whose loss does least harm")
    for note in written.get("notes", ()):
        print(note)
    if written:
        total = written["copied"] + written["kept"]
        print(f"{written['copied']:,} of {total:,} numbers from the parent, in {arguments.out}")
    if arguments.json:
        rows = [dict(zip(("layer", "was", "is", "from"), _cells(x), strict=True)) for x in shown]
        values = {"layers": rows, "params_was": params[0], "params_is": params[1], **written}
        print(json.dumps(values))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and work. Returns the exit status: 0, or 2 for bad input."""
    return exit_status(lambda: _work(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
