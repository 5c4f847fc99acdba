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
from typing import TYPE_CHECKING, Any

from nas.core.cli import EXIT_BAD_INPUT, default_cache, guarded
from nas.core.io import read_json
from nas.core.progress import Console
from nas.core.provenance import git_commit, versions
from nas.data.dataset import dataset_card
from nas.data.prepared import prepared
from nas.measure.fingerprint import take_fingerprint
from nas.train.evaluate_model import evaluate_model
from nas.train.train_config import TrainConfig, read_config
from nas.train.train_flags import (
    build_parser,
    check_only_machine,
    describe,
    make_config,
    make_machine,
)
from space import Context
from space.errors import InputError

if TYPE_CHECKING:
    from nas.train.session import Machine
    from nas.train.training_folder import Folder

EXIT_FINISHED, EXIT_DIVERGED = 0, 3


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
    return run(build_parser(__doc__).parse_args(words))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on; returns what `result.json` holds."""
    from nas.train.batches import Share, check_parts
    from nas.train.distributed import world_of
    from nas.train.training_folder import Folder

    rank, world, _ = world_of()
    console = Console(quiet=given.quiet or rank > 0)
    told: dict[str, Any] = {}
    if given.resume is not None:
        check_only_machine(given)
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
    machine = make_machine(given, told.get("machine", {}))
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

    from nas.distill.teacher import make_teacher
    from nas.inherit.checkpoint_start import start_from
    from nas.train.distributed import together
    from nas.train.session import Work

    torch.set_num_threads(machine.threads)
    with together(machine.device) as ranks, contextlib.ExitStack() as stack:
        stack.callback(console.stop)
        with ranks.all_or_none():
            dataset = prepared(config.data_spec, cache, console)
            work = Work(
                config,
                machine,
                dataset,
                folder,
                ranks,
                cache,
                console.line,
                start_from=start_from,
                make_teacher=make_teacher,
            )
            console.start(float(config.teacher_epochs * len(dataset.train)), "images")
            teacher = work.teacher(console.advance)
            console.stop()
            if ranks.main:
                stack.enter_context(folder.held())
                started = {
                    "dataset": dataset_card(dataset),
                    "versions": versions(),
                    "git": git_commit(),
                    "fingerprint": dataclasses.asdict(
                        take_fingerprint(ranks.device, machine.threads)
                    ),
                }
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
        given = build_parser(__doc__).parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext():
            if given.evaluate is not None:
                result = evaluate_model(given)
            elif given.plan:
                config = make_config(given)
                print("\n".join(describe(config, 1)))
                result = {"status": "planned", **config.to_dict()}
            else:
                result = run(given)
                from nas.train.distributed import world_of

                if world_of()[0]:
                    return EXIT_DIVERGED if result["status"] == "diverged" else EXIT_FINISHED
                _say(result, given.resume or given.out, given.quiet)
        if given.json:
            print(json.dumps(result))
        return EXIT_DIVERGED if result.get("status") == "diverged" else EXIT_FINISHED

    return guarded(lambda: _once(work))


def _once(work: Callable[[], int]) -> int:
    """Do the work; of several processes the first alone says what was refused."""
    from nas.train.distributed import world_of

    try:
        return work()
    except InputError:
        if world_of()[0] == 0:
            raise
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
