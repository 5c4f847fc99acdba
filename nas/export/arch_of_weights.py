"""Which arch a state dict is of, and in which context it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from nas.export.weights import first_mismatch
from space import Context, family_names, get_family
from space.errors import InputError, refuse
from space.family import Arch, Family

_PUBLISHED_SIZES = (224, 384, 512, 256, 192, 160, 128, 96, 64, 48, 32)
"""Image sizes that a checkpoint may have been made for, tried in this order."""
_HARMLESS = {"num_classes", "in_chans", "img_size", "global_pool", "pretrained", "checkpoint_path", "num_heads"}
"""Arguments of a timm model that the arch has no part in, or that are read for themselves."""


def state_shapes(family: Family, arch: Arch, ctx: Context) -> dict[str, torch.Tensor]:
    """Return the state dict of an arch on the meta device, without memory for weights."""
    with torch.device("meta"):
        return dict(family.build(arch, ctx).state_dict())


def class_dims(build: Callable[[int], torch.nn.Module]) -> dict[str, int]:
    """Find the tensors with a row for each class, whatever heads a net has: their names, and in which dimension.

    `build` makes the net for a number of classes; nothing is allocated.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        two, three = (build(count).state_dict() for count in (2, 3))
    return {
        key: dim
        for key, tensor in two.items()
        for dim, (a, b) in enumerate(zip(tensor.shape, three[key].shape, strict=True))
        if a != b
    }


def checkpoint_context(
    family: Family, arch: Arch, ctx: Context, state: Mapping[str, torch.Tensor], *, name: str = "--seed-weights"
) -> Context:
    """Find the context in which `state` is a state dict of `arch`, to inherit from it.

    Its classes are read off the tensor whose shape depends on them; image sizes are tried from `ctx`'s own over those
    of published models. With equal classes the slicing keeps the head, with others the child's own stays. Raises
    InputError about the flag `name` with the first mismatch.
    """
    classes = _count_classes(family, arch, ctx, state)
    tried = ""
    for size in dict.fromkeys((ctx.img_size, *_PUBLISHED_SIZES)):
        candidate = replace(ctx, img_size=size, num_classes=classes)
        if not family.fits(arch, candidate):
            continue
        mismatch = first_mismatch(state_shapes(family, arch, candidate), state)
        if not mismatch:
            return candidate
        if mismatch == tried:
            break  # the same difference at two sizes is not one of size
        tried = tried or mismatch
    raise refuse(name, tried, f"weights of {family.label(arch)}", "name a checkpoint of the seed's own arch")


def check_arch(family: Family, arch: Arch, state: Mapping[str, torch.Tensor], *, name: str) -> None:
    """Refuse weights of another arch by all that depends neither on image size nor on classes. Raises InputError."""
    classes = _count_classes(family, arch, Context(_PUBLISHED_SIZES[0], 1000), state)
    fitting = sorted(s for s in _PUBLISHED_SIZES if family.fits(arch, Context(s, classes)))
    shapes = [state_shapes(family, arch, Context(s, classes)) for s in {*fitting[:1], *fitting[-1:]}]
    known = {key: shape for one in shapes for key, shape in one.items()}
    fixed = {key: tensor for key, tensor in known.items() if all(tensor.shape == one[key].shape for one in shapes)}
    mismatch = first_mismatch(fixed, {key: tensor for key, tensor in state.items() if key in fixed or key not in known})
    if shapes and mismatch:
        raise refuse(name, mismatch, f"weights of {family.label(arch)}", "name a checkpoint of the seed's own arch")


def _count_classes(family: Family, arch: Arch, ctx: Context, state: Mapping[str, torch.Tensor]) -> int:
    """Read the number of classes off the tensors whose shape depends on it; else it is the context's."""
    heads = class_dims(lambda count: family.build(arch, replace(ctx, num_classes=count)))
    sizes = (state[key].shape[dim] for key, dim in heads.items() if key in state and state[key].ndim > dim)
    return max(1, next(sizes, ctx.num_classes))


def arch_of_state(
    state: Mapping[str, torch.Tensor], family: str, ctx: Context, *, name: str
) -> tuple[Family, Arch, Context]:
    """Find the published arch that a state dict is of, in `family` first. Raises InputError about the flag `name`."""
    for found in (get_family(each) for each in dict.fromkeys((family, *family_names()))):
        for published in found.published:
            if state_shapes(found, published.arch, ctx).keys() != state.keys():
                continue
            try:
                return found, published.arch, checkpoint_context(found, published.arch, ctx, state)
            except InputError:
                continue
    remedy = "name its arch: the JSON or folder of the run that made it, or MODEL:FILE"
    raise refuse(name, f"weights of no published arch ({next(iter(state), '')}, ...)", "those of one", remedy)


def arch_of_timm(model: str, given: Mapping[str, Any], img_size: int, *, name: str) -> tuple[Family, Arch]:
    """Read the arch off a timm model's name and arguments. Raises InputError about the flag `name`."""
    for family, published in _published():
        if model not in (published.name, *published.aliases):
            continue
        values = family.to_dict(published.arch)
        if not isinstance(given, Mapping):
            raise refuse(name, f"{model} with {given!r}", "its arguments by name", "as nas.export writes them")
        unknown = sorted(k for k in given if k not in values and k not in _HARMLESS and not k.endswith("_rate"))
        if unknown:
            raise refuse(name, f"{model} with {unknown[0]}", f"only {', '.join(values)}", "as nas.export writes them")
        try:
            return family, family.arch(_with_arguments(values, given, img_size, name))
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            got = f"{model} with arguments that cannot be ({type(error).__name__}: {error})"
            raise refuse(name, got, "what nas.export writes") from None
    raise refuse(name, f"timm's {model}", f"a model of a family ({', '.join(family_names())})", "name its arch")


def _published() -> Iterator[tuple[Family, Any]]:
    for each in family_names():
        family = get_family(each)
        yield from ((family, published) for published in family.published)


def _with_arguments(values: dict[str, Any], given: Mapping[str, Any], img_size: int, name: str) -> dict[str, Any]:
    """Change the factors of a published arch by timm's arguments."""
    width = "embed_dims" if "embed_dims" in values else "embed_dim"
    own = _many(values[width])
    heads = _many(given.get("num_heads") or [max(1, dim // values["head_dim"]) for dim in own])
    found = {**values, **{k: v for k, v in given.items() if k in values and k != "window_sizes"}}
    dims = _many(found[width])
    if len(dims) != len(heads):
        raise refuse(name, f"num_heads {heads}", f"{len(dims)} of them")
    sizes = {dim / count for dim, count in zip(dims, heads, strict=True)}
    if len(dims) > 1:  # TinyViT's first stage has no attention
        sizes = {dim / count for dim, count in zip(dims[1:], heads[1:], strict=True)}
    if len(sizes) != 1 or not min(sizes).is_integer():
        raise refuse(name, f"{width} {dims} with num_heads {heads}", "one head dim for all stages")
    found["head_dim"] = int(min(sizes))
    if "window_sizes" in values and "window_sizes" in given:
        built = _many(given["window_sizes"])[-3:]
        found["window_sizes"] = [
            _written(now, usual, img_size) for now, usual in zip(built, values["window_sizes"], strict=False)
        ]
    return found


def _written(built: int, usual: int, img_size: int) -> int:
    """Return the window, as written at 224 pixels, that is built as `built` at this image size."""
    for written in (usual, 7, 14):
        if max(2, round(written * img_size / 224)) == built:
            return written
    return max(1, round(built * 224 / img_size))


def _many(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
