"""The flags of `python -m nas.train`, and the configuration that they become."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from nas.core.augment_config import AugmentConfig
from nas.core.cli import Parser, usable_cpus
from nas.core.config import RunConfig
from nas.core.settings import add_settings, check_settings, parsed, setting, settings_of
from nas.data.dataset import EMBEDDED
from nas.export.load import find_network
from nas.measure.fingerprint import take_fingerprint
from nas.train.recipe import CHOICES, PIPELINE, PRESETS, Recipe, changed, find_recipe
from nas.train.train_config import Machine, TrainConfig, resolve_amp
from space import REFERENCE_CONTEXT
from space.errors import refuse


@dataclass(frozen=True)
class TrainOptions:
    """What is trained and by which recipe: the settings that become a `TrainConfig`."""

    arch: str | None = setting(
        None, "a published name (5M), a JSON file with an arch, or a run", group="what to train", metavar="ARCH"
    )
    family: str | None = setting(None, "of a published name", metavar="NAME", default_text=RunConfig.family)
    recipe: str = setting("small", f"{', '.join(PRESETS)}, or a JSON file", metavar="NAME")
    set: tuple[str, ...] = setting((), "override a recipe's value", metavar="KEY=VALUE")
    epochs: int | None = setting(None, "short for --set epochs=N", metavar="N", low=1)
    batch_size: int | None = setting(None, "the whole batch, of all processes and turns", metavar="N", low=1)
    distill: str | None = setting(
        None,
        "how to learn from a teacher",
        choices=CHOICES["distill"],
        default_text="the recipe's, else sparse with --labels and soft with --teacher",
    )


@dataclass(frozen=True)
class TrainProcess:
    """What one process does; changes no answer."""

    out: str | None = setting(None, "a new folder", group="the run", metavar="DIR")
    resume: str | None = setting(None, "continue a training", metavar="DIR")
    extend: int | None = setting(
        None,
        "with --resume: train a finished training N epochs further, at its least learning rate",
        metavar="N",
        low=1,
        high=100_000,
    )
    plan: bool = setting(False, "print every value, and stop")
    evaluate: str | None = setting(None, "evaluate a model of a run or training on --data", metavar="MODEL")
    split: str = setting("test", "for --evaluate", choices=("test", "holdout"))
    fusion: str = setting(
        "logits", "for --evaluate, of two heads: the mean of logits, or of probabilities", choices=("logits", "softmax")
    )
    cache_dir: str | None = setting(None, "data sets and teachers", metavar="DIR")
    quiet: bool = setting(False, "print nothing but errors and warnings")
    json: bool = setting(False, "end with one line of JSON")


GROUPS = (TrainOptions, TrainConfig, AugmentConfig, Machine, TrainProcess)


def build_parser(description: str | None = None) -> Parser:
    """Return the parser of `python -m nas.train`; flags that are not given are absent."""
    parser = Parser("python -m nas.train", description=description, argument_default=argparse.SUPPRESS)
    for group in GROUPS:
        add_settings(parser, group)
    return parser


def read_flags(argv: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """Parse a command line; what is not given has its default, of the machine None.

    `given` holds the names of what was given. Raises InputError.
    """
    return _complete(vars(build_parser(description).parse_args(argv)))


def _complete(found: dict[str, Any]) -> argparse.Namespace:
    """Parse texts, add defaults and check what becomes no configuration."""
    for group in GROUPS:
        found = parsed(group, found)
    usual = {
        field.name: None if group is Machine or field.default is MISSING else field.default
        for group in GROUPS
        for field in settings_of(group)
    }
    usual["resize"] = None  # depends on the family
    for group in (TrainOptions, TrainProcess):
        check_settings(group(**{f.name: found.get(f.name, f.default) for f in settings_of(group)}))
    return argparse.Namespace(**{**usual, **found, "given": frozenset(found)})


def read_values(**values: Any) -> argparse.Namespace:
    """Take settings by name, or by that of their flag, as a command line gives them; None is not given.

    Raises InputError.
    """
    fields = [field for group in GROUPS for field in settings_of(group)]
    names = {f.name: f.name for f in fields} | {f.flag[2:]: f.name for f in fields if f.about.spelling is not None}
    for name, value in values.items():
        if name not in names:
            raise refuse(name, value, f"one of {', '.join(names)}")
    return _complete({names[k]: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None})


def make_config(given: argparse.Namespace) -> TrainConfig:
    """Resolve the flags. Raises InputError."""
    for flag in ("arch", "data", "out"):
        if getattr(given, flag) is None and not (flag == "out" and given.plan):
            raise refuse(f"--{flag}", "nothing", f"what --help says of --{flag}")
    named = find_network(given.arch, "--arch")
    family, arch = named.arch(given.family or RunConfig.family)
    if given.family not in (None, family.name):
        raise refuse("--family", given.family, f"{family.name}, the family of --arch {given.arch}")
    values = {field.name: getattr(given, field.name) for field in settings_of(TrainConfig)}
    values["data"] = given.data if given.data in EMBEDDED else _path(given.data)
    for file in ("labels", "init", "head_map", "annotations"):
        if values[file] not in (None, "scratch"):
            values[file] = _path(values[file])
    if values["resize"] is None:
        values["resize"] = "published" if "published" in family.resizes else "own"
    recipe = _fitted(given, family.count_params(arch, REFERENCE_CONTEXT))
    return TrainConfig(family=family.name, arch=family.to_dict(arch), arch_from=named.origin, recipe=recipe, **values)


def _fitted(given: argparse.Namespace, params: int) -> Recipe:
    """Find the recipe, with the short flags in it and what stored labels decide."""
    short = {name: getattr(given, name) for name in ("epochs", "batch_size", "distill")}
    overrides = [*given.set, *(f"{name}={value}" for name, value in short.items() if value is not None)]
    augment = AugmentConfig.of(given).given
    recipe = changed(find_recipe(given.recipe, params, overrides), augment)
    named = augment.keys() | {text.partition("=")[0].strip().replace("-", "_") for text in overrides}
    changes: dict[str, Any] = {}
    if given.labels is not None:  # what is stored is augmented and mixed already
        changes = {"mixup": None, "cutmix": None, "repeats": 1}
    if recipe.distill == "none" and (given.labels is not None or given.teacher is not None):
        changes["distill"] = "sparse" if given.labels is not None else "soft"
    return changed(recipe, {name: value for name, value in changes.items() if name not in named})


def _path(text: str) -> str:
    """Make a path absolute, so that a resume may start elsewhere; names stay names."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


def make_machine(given: argparse.Namespace, before: Mapping[str, Any]) -> Machine:
    """Resolve what the training runs on: what is given now, else what it began with."""
    from nas.train.distributed import local_world

    names = [field.name for field in settings_of(Machine)]
    kept = {name: before[name] for name in names if name in before}
    device = given.device or str(kept.get("device", "cpu"))
    take_fingerprint(device, 1)  # refuses a device that is not there
    cores = usable_cpus() // local_world()
    usual = {"threads": max(1, cores), "workers": 0 if device == "cpu" else max(0, min(8, cores - 1))}
    # The number of threads decides bits: a resumed training keeps it unless --threads is given.
    given_now = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    moved = kept.get("device", device) != device
    amp = given.amp or ("auto" if moved else str(kept.get("amp", "auto")))
    return Machine(**{**usual, **kept, **given_now, "device": device, "amp": resolve_amp(amp, device)})


def describe(config: TrainConfig, world: int) -> list[str]:
    """Return every value that decides the training, in lines."""
    recipe = config.recipe
    family, arch = config.family_and_arch
    peak, least, first = recipe.rates()
    shown = {
        name: ("default" if name in PIPELINE.keys() - {"mixup", "cutmix"} else "none") if value is None else value
        for name, value in recipe.to_dict().items()
    }
    values = ", ".join(f"{name}={value}" for name, value in shown.items() if name != "name")
    further = f"; then {config.extend} at the least rate" if config.extend else ""
    return [
        f"arch: {family.name} {family.label(arch)} (of {config.arch_from})",
        f"recipe {recipe.name}: {values}{further}",
        f"rates for whole batches of {recipe.batch_size}: peak {peak:g}, least {least:g}, "
        f"first {first:g}; {world} process{'es' if world > 1 else ''}",
    ]


def extended(config: TrainConfig, epochs: int) -> TrainConfig:
    """Return the configuration of a training that goes on; a recipe that ends at a rate of 0 is refused."""
    if config.recipe.rates()[1] <= 0:
        raise refuse("--extend", f"{config.recipe.name}, whose rate ends at 0", "a least rate above 0", "start anew")
    return replace(config, extend=config.extend + epochs)


def check_only_machine(given: argparse.Namespace) -> None:
    """Refuse flags beside --resume that would change what was asked."""
    free = {"resume", "extend", "cache_dir", "quiet", "json"} | {f.name for f in settings_of(Machine)}
    flags = {field.name: field.flag for group in GROUPS for field in settings_of(group)}
    for name in sorted(given.given - free):
        raise refuse(
            flags[name],
            f"{getattr(given, name)} beside --resume",
            "what the training began with",
            "start a new one with another --out",
        )
