"""Train a model for real: `python -m nas.train --arch RUN/best.json --data DATA --out DIR`.

By a recipe with published values, each of which --set overrides; alone or under torchrun; from
true labels, a label store or a teacher that is asked while training. Killed at any moment, it goes
on: --resume DIR. The folder's best.json is what nas.export takes. Exit status 3: it diverged.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nas.command import EXIT_BAD_INPUT, Parser, default_cache, guarded
from nas.config import RunConfig, parse_share
from nas.data.values import EMBEDDED
from nas.door import prepared
from nas.files import read_json
from nas.measure.fingerprint import take_fingerprint, usable_cpus
from nas.progress import Console
from nas.provenance import dataset_card, git_commit, versions
from nas.trainer.values import AMPS, TrainConfig, read_config
from nas.training.recipe import CHOICES, PIPELINE, PRESETS, Recipe, changed, find_recipe
from space import Context, get_family
from space.errors import InputError, refuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.trainer.folder import Folder
    from nas.trainer.work import Machine

EXIT_FINISHED, EXIT_DIVERGED = 0, 3
REFERENCE = Context(224, 1000)
"""Where a net's size is counted to choose what a recipe publishes by size."""


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="python -m nas.train", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
    add("--distill", choices=CHOICES["distill"], help="how (default: the recipe's, else sparse "
        "with --labels and soft with --teacher)")  # fmt: skip
    add("--init", default="scratch", metavar="WEIGHTS", help="scratch, a file, or a timm tag")
    add("--resize", metavar="HOW", help="positions of another image size: published (default where "
        "the family has it), timm, or own")  # fmt: skip
    add("--head-map", metavar="FILE", help="for each class the old one it starts from, -1 for none")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--recipe", default="small", metavar="NAME",
        help=f"{', '.join(PRESETS)}, or a JSON file (default: small)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value")
    add("--epochs", type=int, help="short for --set epochs=N")
    add("--batch-size", type=int, help="the whole batch, of all processes and turns")
    add("--img-size", type=int, metavar="PX", help="default: the recipe's, or the data's")
    add("--random-seed", type=int, default=0, help="of weights, order and views (default: 0)")
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--proxy-images", type=int, metavar="N", help="use so many images only (default: all)")
    add("--data-seed", type=int, default=0, metavar="N", help="of the images held out; a store's "
        "or a run's --random-seed (default: 0)")  # fmt: skip
    add("--max-broken", default="1%", metavar="SHARE")
    add("--no-pixel-cache", dest="pixel_cache", action="store_false",
        help="decode files each time instead of keeping their pixels")  # fmt: skip
    add("--missing", choices=("refuse", "skip"), default="refuse", help="images without a label")
    add("--teacher-epochs", type=int, default=15, help="of the auto teacher")
    add("--cache-dir", metavar="DIR")
    machine = parser.add_argument_group("machine (may change on --resume)")
    add = machine.add_argument
    add("--device", help="cpu (default) or cuda; under torchrun each process has its own GPU")
    add("--threads", type=int, help="torch's, a process (default: the cores, shared)")
    add("--workers", type=int, help="loader processes of each process (default: 0; 8 with a GPU)")
    add("--accumulate", type=int, metavar="N", help="turns in which a process sees its share of a "
        "batch (default: 1)")  # fmt: skip
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
    add("--fusion", choices=("logits", "softmax"), default="logits",
        help="for --evaluate, of two heads: the mean of logits, or of probabilities")  # fmt: skip
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
    params = get_family(family).count_params(get_family(family).arch(arch), REFERENCE)
    return TrainConfig(
        family=family, arch=arch, arch_from=arch_from, data=_path(given.data, data=True),
        recipe=_fitted(given, params), img_size=given.img_size, proxy_images=given.proxy_images,
        max_broken=parse_share("--max-broken", given.max_broken), pixel_cache=given.pixel_cache,
        labels=None if given.labels is None else _path(given.labels), missing=given.missing,
        teacher=given.teacher, teacher_epochs=given.teacher_epochs,
        init=given.init if given.init == "scratch" else _path(given.init),
        resize=given.resize or usual,
        head_map=None if given.head_map is None else _path(given.head_map),
        random_seed=given.random_seed, data_seed=given.data_seed,
    )  # fmt: skip


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


def _machine(given: argparse.Namespace, before: Mapping[str, Any]) -> Machine:
    """Resolve what the training runs on: what is given now, else what it began with."""
    from nas.trainer.ranks import local_world
    from nas.trainer.work import Machine, resolve_amp

    known = {f.name for f in dataclasses.fields(Machine)}
    kept = {k: v for k, v in before.items() if k in known}
    device = given.device or str(kept.get("device", "cpu"))
    take_fingerprint(device, 1)  # refuses a device that is not there
    asked = {
        "device": device, "threads": given.threads, "workers": given.workers,
        "turns": given.accumulate, "compile": given.compile,
        "grad_checkpointing": given.grad_checkpointing, "save_steps": given.save_steps,
        "keep_every": given.keep_every,
    }  # fmt: skip
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
    family, arch = config.of
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


def _only_machine(given: argparse.Namespace) -> None:
    """Refuse flags beside --resume that would change what was asked."""
    free = {
        "resume", "cache_dir", "quiet", "json", "device", "threads", "workers", "accumulate", "amp",
        "compile", "grad_checkpointing", "save_steps", "keep_every",
    }  # fmt: skip
    usual = vars(build_parser().parse_args([]))
    for name, value in vars(given).items():
        if name not in free and value != usual[name]:
            flag = "--no-pixel-cache" if name == "pixel_cache" else f"--{name.replace('_', '-')}"
            raise refuse(flag, f"{value} beside --resume", "what the training began with",
                         "start a new one with another --out")  # fmt: skip


def train(arch: str, data: str, out: str | Path, **flags: Any) -> dict[str, Any]:
    """Train an arch on a data set into a new folder, as the command does; quietly.

    `flags` are the command's, by name: `recipe="tinyvit-1k"`, `set=["lr=1e-4"]`, `compile=True`.
    Returns what `result.json` holds. Raises InputError.
    """
    words = ["--arch", arch, "--data", data, "--out", str(out), "--quiet"]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words += [flag] if each is True else [] if each in (None, False) else [flag, str(each)]
    return run(build_parser().parse_args(words))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on; returns what `result.json` holds."""
    from nas.trainer.batches import Share, check_parts
    from nas.trainer.folder import Folder
    from nas.trainer.ranks import world_of

    rank, world, _ = world_of()
    console = Console(quiet=given.quiet or rank > 0)
    told: dict[str, Any] = {}
    if given.resume is not None:
        _only_machine(given)
        folder = Folder(Path(given.resume))
        told = folder.told()
        config = read_config(told["config"])
        result = folder.result()
        if result is not None and result["status"] == "finished":
            return result
    else:
        config = make_config(given)
        folder = Folder(Path(given.out))
        folder.check_new()
    machine = _machine(given, told.get("machine", {}))
    share = Share(rank, world, machine.turns)
    check_parts("batch_size", config.recipe.batch_size, share, even=config.recipe.mixes)
    for line in describe(config, world):
        console.line(line)
    cache = Path(given.cache_dir) if given.cache_dir else default_cache()
    return _together(config, machine, folder, told, cache, console)


def _together(
    config: TrainConfig,
    machine: Machine,
    folder: Folder,
    told: Mapping[str, Any],
    cache: Path,
    console: Console,
) -> dict[str, Any]:
    """Join the other processes, prepare, train."""
    import torch

    from nas.trainer.ranks import together
    from nas.trainer.work import Work

    torch.set_num_threads(machine.threads)
    with together(machine.device) as ranks, contextlib.ExitStack() as stack:
        stack.callback(console.stop)
        with ranks.all_or_none():
            dataset = prepared(config.data_spec, cache, console)
            work = Work(config, machine, dataset, folder, ranks, cache, console.line)
            console.start(float(config.teacher_epochs * len(dataset.train)), "images")
            teacher = work.teacher(console.advance)
            console.stop()
            if ranks.main:
                stack.enter_context(folder.held())
                started = {
                    "dataset": dataset_card(dataset), "versions": versions(), "git": git_commit(),
                    "fingerprint": dataclasses.asdict(
                        take_fingerprint(ranks.device, machine.threads)
                    ),
                }  # fmt: skip
                folder.write({**started, **told, **work.settings()})
        ranks.same("teacher and labels", work.taught_by(), "one cache, or one store, for all")
        steps, images = work.source.steps_per_epoch, work.source.images_per_epoch
        kept = {k: v for k, v in dataclasses.asdict(machine).items() if v is not None}
        console.line("machine: " + ", ".join(f"{k}={v}" for k, v in kept.items()))
        console.line(f"augmentation: {json.dumps(work.spec.to_dict())}")
        console.line(f"{steps:,} steps and {images:,} images an epoch; in {folder.path}")
        console.start(float(images * config.recipe.epochs), "images")
        return work.train(teacher, console.advance, _pace(config, work.ctx))


def _pace(config: TrainConfig, ctx: Context) -> Any:
    """Take over the throughput that a run measured of this arch, if it is the same net."""
    path = Path(config.arch_from)
    if not path.is_file():
        return None
    told = read_json(path, "an arch")
    same = (told.get("img_size"), told.get("num_classes")) == (ctx.img_size, ctx.num_classes)
    return told.get("throughput") if same else None


def evaluate_model(given: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a model that a run or a training left, on a split of a data set."""
    from nas.data import DataSpec
    from nas.distill.presets import preset_spec
    from nas.exporting.model import left_by
    from nas.trainer.evaluation import evaluate
    from nas.trainer.ranks import world_of
    from nas.trainer.values import ALL_IMAGES
    from nas.training.loop import place

    if world_of()[1] > 1:
        raise refuse("--evaluate", "several processes", "one", "start it without torchrun")
    if given.data is None:
        raise refuse("--data", "nothing", "the data set to evaluate on")
    left = left_by(Path(given.evaluate))
    size = left.context.img_size
    if given.img_size not in (None, size):
        raise refuse("--img-size", given.img_size, f"the model's own {size}", "leave it out")
    device = given.device or "cpu"
    take_fingerprint(device, 1)  # refuses a device that is not there
    console = Console(quiet=given.quiet)
    spec = DataSpec(
        given.data, size, ALL_IMAGES if given.proxy_images is None else given.proxy_images,
        parse_share("--max-broken", given.max_broken), given.data_seed,
        pixel_cache=given.pixel_cache,
    )  # fmt: skip
    cache = Path(given.cache_dir) if given.cache_dir else default_cache()
    dataset = prepared(spec, cache, console)
    if list(dataset.classes) != left.classes:
        theirs, own = (", ".join(map(str, c[:3])) for c in (left.classes, dataset.classes))
        raise refuse("--data", f"{dataset.num_classes} classes ({own}, ...)",
                     f"the {len(left.classes)} of {left.path} ({theirs}, ...)")  # fmt: skip
    split = getattr(dataset, given.split)
    model = place(left.build(), device)
    console.start(float(len(split)), "images")
    try:
        outcome = evaluate(
            _fused(model, given.fusion), split, preset_spec("default", dataset),
            num_classes=dataset.num_classes, device=device, tick=console.advance,
        )  # fmt: skip
    finally:
        console.stop()
    (top1, se), (top5, se5) = outcome.top(1), outcome.top(5)
    table = outcome.by_class(dataset.classes)
    if given.out is not None:
        try:
            Path(given.out).write_text(table, encoding="utf-8")
        except OSError as error:
            raise refuse("--out", given.out, "a CSV file to write", error.strerror or "") from None
    console.line(
        f"{given.split}: top-1 {top1:.2%} +- {se:.2%}, top-5 {top5:.2%} +- {se5:.2%} on "
        f"{len(split)} images"
    )
    for line in table.splitlines() if given.out is None else ():
        console.line(line)
    return {
        "split": given.split, "n": len(split), "top1": top1, "top1_se": se, "top5": top5,
        "top5_se": se5, "loss": outcome.mean_loss,
    }  # fmt: skip


def _fused(model: nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    """Give a net whose two heads, if it has two, are fused as asked."""
    from nas.distill.teaching import both_heads, fuse, has_token

    if how == "logits" or not has_token(model):
        return model
    return lambda inputs: fuse(both_heads(model, inputs), how)


def _say(result: Mapping[str, Any], folder: str, quiet: bool) -> None:
    """Say how it ended; a divergence also where little is to be said."""
    if result["status"] == "diverged":
        kept = [str(result[k]) for k in ("checkpoint", "best") if result[k]]
        print(
            f"diverged: the loss became {result['loss']} by step {result['step']} "
            f"(epoch {result['epoch']}); good and kept: {', '.join(kept) or 'nothing yet'}; "
            "start anew with a lower --set lr=..., or a stricter --set clip_norm=...",
            file=sys.stderr,
        )
    if result["status"] == "diverged" or quiet:
        return
    print(
        f"best epoch {result['epoch']} ({result['weights']} weights): test top-1 "
        f"{result['test_top1']:.2%} +- {result['test_top1_se']:.2%}, top-5 "
        f"{result['test_top5']:.2%} on {result['test_n']} images; {result['params']:,} parameters"
    )
    print(f"export it with: python -m nas.export {folder} --to timm --out DIR")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and work. Returns the exit status: 0, 2 for bad input, 3 diverged."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext():
            if given.evaluate is not None:
                result = evaluate_model(given)
            elif given.plan:
                config = make_config(given)
                print("\n".join(describe(config, 1)))
                result = {"status": "planned", **config.to_dict()}
            else:
                result = run(given)
                from nas.trainer.ranks import world_of

                if world_of()[0]:
                    return EXIT_DIVERGED if result["status"] == "diverged" else EXIT_FINISHED
                _say(result, given.resume or given.out, given.quiet)
        if given.json:
            print(json.dumps(result))
        return EXIT_DIVERGED if result.get("status") == "diverged" else EXIT_FINISHED

    return guarded(lambda: _once(work))


def _once(work: Callable[[], int]) -> int:
    """Do the work; of several processes the first alone says what was refused."""
    from nas.trainer.ranks import world_of

    try:
        return work()
    except InputError:
        if world_of()[0] == 0:
            raise
        return EXIT_BAD_INPUT


def entry() -> NoReturn:
    """Console-script entry: exit with the status of `main`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
