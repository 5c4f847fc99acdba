"""What `python -m nas.train` is told: its flags, and the values that they become."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.core.cli import Parser
from nas.core.config import RunConfig, parse_share
from nas.core.cpus import usable_cpus
from nas.core.io import read_json
from nas.data.dataset import EMBEDDED
from nas.measure.fingerprint import take_fingerprint
from nas.train.recipe import CHOICES, PIPELINE, PRESETS, Recipe, changed, find_recipe
from nas.train.train_config import AMPS, Machine, TrainConfig, resolve_amp
from space import REFERENCE_CONTEXT, get_family
from space.errors import InputError, refuse


def build_parser(description: str | None = None) -> Parser:
    """Return the parser of `python -m nas.train`."""
    parser = Parser(
        prog="python -m nas.train",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("--arch", metavar="ARCH", help="a published name (5M), a JSON file with an arch, or a run")
    add("--family", metavar="NAME", help=f"of a published name (default: {RunConfig.family})")
    add(
        "--data",
        help="as in nas.contract: digits, fractals, a folder, torch/..., hfds/..., wds/...",
    )
    add("--labels", metavar="STORE", help="learn from stored labels (python -m nas.labels build)")
    add(
        "--teacher",
        metavar="NET",
        help="ask a teacher while training: auto, a timm name, MODEL:FILE",
    )
    add(
        "--distill",
        choices=CHOICES["distill"],
        help="how (default: the recipe's, else sparse with --labels and soft with --teacher)",
    )
    add("--init", default="scratch", metavar="WEIGHTS", help="scratch, a file, or a timm tag")
    add(
        "--resize",
        metavar="HOW",
        help="positions of another image size: published (default where "
        "the family has it), timm, or own",
    )
    add("--head-map", metavar="FILE", help="for each class the old one it starts from, -1 for none")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add(
        "--recipe",
        default="small",
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, or a JSON file (default: small)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value")
    add("--epochs", type=int, help="short for --set epochs=N")
    add("--batch-size", type=int, help="the whole batch, of all processes and turns")
    add("--img-size", type=int, metavar="PX", help="default: the recipe's, or the data's")
    add("--random-seed", type=int, default=0, help="of weights, order and views (default: 0)")
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--proxy-images", type=int, metavar="N", help="use so many images only (default: all)")
    add(
        "--data-seed",
        type=int,
        default=0,
        metavar="N",
        help="of the images held out; a store's or a run's --random-seed (default: 0)",
    )
    add("--max-broken", default="1%", metavar="SHARE")
    add(
        "--no-pixel-cache",
        dest="pixel_cache",
        action="store_false",
        help="decode files each time instead of keeping their pixels",
    )
    add("--missing", choices=("refuse", "skip"), default="refuse", help="images without a label")
    add("--teacher-epochs", type=int, default=15, help="of the auto teacher")
    add("--cache-dir", metavar="DIR")
    machine = parser.add_argument_group("machine (may change on --resume)")
    add = machine.add_argument
    add("--device", help="cpu (default) or cuda; under torchrun each process has its own GPU")
    add("--threads", type=int, help="torch's, a process (default: the cores, shared)")
    add("--workers", type=int, help="loader processes of each process (default: 0; 8 with a GPU)")
    add(
        "--accumulate",
        type=int,
        metavar="N",
        help="turns in which a process sees its share of a batch (default: 1)",
    )
    add("--amp", choices=AMPS, help="mixed precision (default: auto: on GPUs)")
    switch = argparse.BooleanOptionalAction
    add("--compile", action=switch, help="torch.compile")
    add("--grad-checkpointing", action=switch, help="less memory, more time")
    add("--save-steps", type=int, metavar="N", help="steps between checkpoints (default: 500)")
    add("--keep-every", type=int, metavar="N", help="keep a model every N epochs (default: none)")
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--out", metavar="DIR", help="a new folder")
    add("--resume", metavar="DIR", help="go on with a training")
    add("--plan", action="store_true", help="print every value, and stop")
    add("--evaluate", metavar="MODEL", help="evaluate a model of a run or training on --data")
    add("--split", choices=("test", "holdout"), default="test", help="for --evaluate")
    add(
        "--fusion",
        choices=("logits", "softmax"),
        default="logits",
        help="for --evaluate, of two heads: the mean of logits, or of probabilities",
    )
    add("--quiet", action="store_true")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def resolve_arch(name: str, family: str | None) -> tuple[str, dict[str, Any], str]:
    """Find an arch by published name, in a JSON file or in a run: (family, arch, where it is from).

    Raises InputError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "best.json"
        name = str(path)
    if path.suffix == ".json" and path.is_file():
        told = read_json(path, "an arch")
        if family is None and isinstance(told, dict) and "family" in told:
            family = str(told["family"])
        name = str(path.resolve())
    found = get_family(family or RunConfig.family)
    try:
        arch = found.seed(name)
    except InputError as error:
        raise InputError(str(error).replace("--seed", "--arch")) from None
    return found.name, found.to_dict(arch), name


def make_config(given: argparse.Namespace) -> TrainConfig:
    """Resolve what the flags say. Raises InputError."""
    for flag in ("arch", "data", "out"):
        if getattr(given, flag) is None and not (flag == "out" and given.plan):
            raise refuse(f"--{flag}", "nothing", f"what --help says of --{flag}")
    family, arch, arch_from = resolve_arch(given.arch, given.family)
    usual = "published" if "published" in get_family(family).resizes else "own"
    params = get_family(family).count_params(get_family(family).arch(arch), REFERENCE_CONTEXT)
    return TrainConfig(
        family=family,
        arch=arch,
        arch_from=arch_from,
        data=_path(given.data, data=True),
        recipe=_fitted(given, params),
        img_size=given.img_size,
        proxy_images=given.proxy_images,
        max_broken=parse_share("--max-broken", given.max_broken),
        pixel_cache=given.pixel_cache,
        labels=None if given.labels is None else _path(given.labels),
        missing=given.missing,
        teacher=given.teacher,
        teacher_epochs=given.teacher_epochs,
        init=given.init if given.init == "scratch" else _path(given.init),
        resize=given.resize or usual,
        head_map=None if given.head_map is None else _path(given.head_map),
        random_seed=given.random_seed,
        data_seed=given.data_seed,
    )


def _fitted(given: argparse.Namespace, params: int) -> Recipe:
    """Find the recipe, with the short flags in it and what stored labels decide."""
    short = [
        f"{name}={getattr(given, name)}"
        for name in ("epochs", "batch_size", "distill")
        if getattr(given, name) is not None
    ]
    recipe = find_recipe(given.recipe, params, [*given.set, *short])
    named = {text.partition("=")[0].strip().replace("-", "_") for text in [*given.set, *short]}
    changes: dict[str, Any] = {}
    taught = given.labels is not None or given.teacher is not None
    if "distill" not in named and recipe.distill == "none" and taught:
        changes["distill"] = "sparse" if given.labels is not None else "soft"
    if given.labels is not None:  # what is stored is augmented and mixed already
        stored = {"mixup": 0.0, "cutmix": 0.0, "repeats": 1}
        changes |= {k: v for k, v in stored.items() if k not in named}
    return changed(recipe, changes)


def _path(text: str, *, data: bool = False) -> str:
    """Make a path absolute, so that a resume may start elsewhere; names stay names."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() and not (data and text in EMBEDDED) else text


def make_machine(given: argparse.Namespace, before: Mapping[str, Any]) -> Machine:
    """Resolve what the training runs on: what is given now, else what it began with."""
    from nas.train.distributed import local_world

    known = {f.name for f in dataclasses.fields(Machine)}
    kept = {k: v for k, v in before.items() if k in known}
    device = given.device or str(kept.get("device", "cpu"))
    take_fingerprint(device, 1)  # refuses a device that is not there
    asked = {
        "device": device,
        "threads": given.threads,
        "workers": given.workers,
        "accumulation_steps": given.accumulate,
        "compile": given.compile,
        "grad_checkpointing": given.grad_checkpointing,
        "save_steps": given.save_steps,
        "keep_every": given.keep_every,
    }
    cores = usable_cpus() // local_world()
    usual = {
        "threads": max(1, cores),
        "workers": 0 if device == "cpu" else max(0, min(8, cores - 1)),
    }
    # The number of threads decides bits: a resumed training keeps it, unless told otherwise.
    given_now = {k: v for k, v in asked.items() if v is not None}
    moved = kept.get("device", device) != device
    amp = given.amp or ("auto" if moved else str(kept.get("amp", "auto")))
    return Machine(**{**usual, **kept, **given_now, "amp": resolve_amp(amp, device)})


def describe(config: TrainConfig, world: int) -> list[str]:
    """Say every value that decides the training, in lines."""
    recipe = config.recipe
    family, arch = config.family_and_arch
    peak, least, first = recipe.rates()
    words = dict.fromkeys(PIPELINE, "default")
    told = ", ".join(
        f"{k}={words.get(k, 'none') if v is None else v}"
        for k, v in recipe.to_dict().items()
        if k != "name"
    )
    return [
        f"arch: {family.name} {family.label(arch)} (of {config.arch_from})",
        f"recipe {recipe.name}: {told}",
        f"rates for whole batches of {recipe.batch_size}: peak {peak:g}, least {least:g}, "
        f"first {first:g}; {world} process{'es' if world > 1 else ''}",
    ]


def check_only_machine(given: argparse.Namespace) -> None:
    """Refuse flags beside --resume that would change what was asked."""
    free = {
        "resume",
        "cache_dir",
        "quiet",
        "json",
        "device",
        "threads",
        "workers",
        "accumulate",
        "amp",
        "compile",
        "grad_checkpointing",
        "save_steps",
        "keep_every",
    }
    usual = vars(build_parser().parse_args([]))
    for name, value in vars(given).items():
        if name not in free and value != usual[name]:
            flag = "--no-pixel-cache" if name == "pixel_cache" else f"--{name.replace('_', '-')}"
            raise refuse(
                flag,
                f"{value} beside --resume",
                "what the training began with",
                "start a new one with another --out",
            )
