"""Train a model in full: `python -m nas.train --arch RUN/best.json --data DATA --out DIR`.

By a recipe with published values, each of which --set overrides; alone or under torchrun; from true labels, a label
store or an online teacher. A killed training continues with --resume DIR. The folder's best.json is what nas.export
takes. Exit status 3: the training diverged.
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

from nas.core.augment_config import AugmentConfig
from nas.core.cli import EXIT_BAD_INPUT, default_cache, exit_status, path_argument, shell_command
from nas.core.io import read_json
from nas.core.progress import Console
from nas.core.provenance import git_commit, versions
from nas.data.dataset import check_card_classes, dataset_card
from nas.data.prepare import prepared
from nas.labels.api import check_source
from nas.measure.fingerprint import take_fingerprint
from nas.train.train_config import TrainConfig, read_config
from nas.train.train_flags import (
    check_only_machine,
    describe,
    extended,
    make_config,
    make_machine,
    read_flags,
    read_values,
)
from space import Context
from space.errors import InputError, refuse

if TYPE_CHECKING:
    from nas.data.sources import DataSource
    from nas.train.folder import TrainFolder
    from nas.train.train_config import Machine

EXIT_FINISHED, EXIT_DIVERGED = 0, 3


def train(arch: str, data: str, out: str | Path, **flags: Any) -> dict[str, Any]:
    """Train an arch on a data set into a new folder, as the command does, without output.

    `flags` are the command's, by name: `recipe="tinyvit-1k"`, `set=["lr=1e-4"]`, `hflip=0`, `pixel_cache=False`; None
    is not given. Returns what `result.json` holds. Raises InputError.
    """
    return run(read_values(arch=arch, data=data, out=out, **{"quiet": True, **flags}))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Start or resume a training; return what `result.json` holds. Raises InputError."""
    from nas.train.batches import RankShard, check_batch_size
    from nas.train.distributed import world_of
    from nas.train.folder import TrainFolder

    rank, world, _ = world_of()
    console = Console(quiet=given.quiet or rank > 0, warns=rank == 0)
    before: dict[str, Any] = {}
    if given.resume is not None:
        check_only_machine(given)
        folder = TrainFolder(Path(given.resume))
        before = folder.read_settings()
        config = read_config(before["config"])
        result = folder.read_result()
        if result is not None and result["status"] == "finished":
            if given.extend is None:
                return result
            config = extended(config, given.extend)
            folder.forget_result()  # a kill from here on continues with --resume
        elif given.extend is not None:
            raise refuse("--extend", "a training that has not ended", "a finished one", "end it with --resume alone")
    else:
        if given.extend is not None:
            raise refuse("--extend", "a new training", "the --resume DIR of a finished one", "give it more --epochs")
        config = make_config(given)
        folder = TrainFolder(Path(given.out))
        folder.check_new()
    machine = make_machine(given, before.get("machine", {}))
    shard = RankShard(rank, world, machine.accumulation_steps)
    check_batch_size(config.recipe.batch_size, shard, even=config.recipe.mixes)
    for line in describe(config, world):
        console.line(line)
    cache = Path(given.cache_dir) if given.cache_dir else default_cache()
    return _train(config, machine, folder, before, cache, console)


def _train(
    config: TrainConfig, machine: Machine, folder: TrainFolder, before: Mapping[str, Any], cache: Path, console: Console
) -> dict[str, Any]:
    """Join the other processes, prepare data and teacher, train."""
    import torch

    from nas.distill.teacher import make_teacher
    from nas.export.load import find_network
    from nas.inherit.slice import load_initial_weights
    from nas.train.distributed import init_distributed
    from nas.train.session import TrainSession

    torch.set_num_threads(machine.threads)
    with init_distributed(machine.device) as ranks, contextlib.ExitStack() as stack:
        with ranks.raise_on_all_ranks():
            started = folder.checkpoint.exists()
            _check_files(config, started=started)
            card = before.get("dataset", {})
            dataset = prepared(config.data_spec, cache, console, lambda source: _match(config, source, card, started))
            session = TrainSession(config, machine, dataset, folder, ranks, console.line)
            if config.init != "scratch" and not folder.checkpoint.exists():  # which has the weights
                head_map = None if config.head_map is None else Path(config.head_map)
                note = load_initial_weights(
                    session.model,
                    session.family,
                    session.arch,
                    session.ctx,
                    config.init,
                    dataset.classes,
                    resize=config.resize,
                    head_map=head_map,
                )
                session.note(f"start: {note}")
            if config.teacher is not None:
                with console.bar(float(config.teacher_epochs * len(dataset.train)), "images"):
                    info = make_teacher(
                        find_network(config.teacher, "--teacher"),
                        dataset,
                        cache,
                        random_seed=config.data_seed,  # not the training's own: several trainings share a teacher
                        epochs=config.teacher_epochs,
                        device=ranks.device,
                        threads=machine.threads,
                        augment=AugmentConfig.of(config.recipe),
                        tick=console.advance,
                    )
                session.use_teacher(info)
            if ranks.main:
                stack.enter_context(folder.lock())
                device = take_fingerprint(ranks.device, machine.threads)
                conditions = {
                    "dataset": dataset_card(dataset),
                    "versions": versions(),
                    "git": git_commit(),
                    "fingerprint": dataclasses.asdict(device),
                }
                notes = list(dict.fromkeys([*before.get("notes", ()), *session.notes]))
                folder.write_settings({**conditions, **before, **session.settings(), "notes": notes})
        ranks.check_same("teacher and labels", session.targets_id(), "one cache, or one store, for all")
        steps, images = session.source.steps_per_epoch, session.source.images_per_epoch
        used = {k: v for k, v in dataclasses.asdict(machine).items() if v is not None}
        console.line("machine: " + ", ".join(f"{k}={v}" for k, v in used.items()))
        console.line(f"augmentation: {session.spec.text}")
        console.line(f"{steps:,} steps and {images:,} images an epoch; in {folder.path}")
        with console.bar(float(images * config.epochs), "images"):
            return session.train(console.advance, _throughput(config, session.ctx))


def _check_files(config: TrainConfig, *, started: bool) -> None:
    """Open and match what the training will need, before any data are prepared."""
    from nas.inherit.check_files import check_store, check_teacher, check_weights
    from nas.inherit.slice import read_head_map

    if config.init != "scratch" and not started:
        check_weights(*config.family_and_arch, None, config.init, "--init")
    if config.head_map is not None and not started:
        read_head_map(Path(config.head_map), None)
    if config.teacher not in (None, "auto"):
        check_teacher(str(config.teacher))
    if config.labels is not None:
        check_store(config.labels)


def _match(config: TrainConfig, source: DataSource, card: Mapping[str, Any], started: bool) -> None:
    """Match the data's classes to those of an earlier start, of first weights and of labels, before any is decoded."""
    from nas.inherit.check_files import check_weights
    from nas.inherit.slice import read_head_map

    if not source.classes:
        return
    check_card_classes(card, source.classes, "the training")
    if config.labels is not None:
        check_source(config.labels, source)
    if config.head_map is not None and not started:
        read_head_map(Path(config.head_map), len(source.classes))
    elif config.init != "scratch" and not started:
        context = Context(source.img_size, len(source.classes))
        check_weights(*config.family_and_arch, context, config.init, "--init", source.classes)


def _throughput(config: TrainConfig, ctx: Context) -> Any:
    """Return the throughput that a run measured of this arch, if it is the same net."""
    path = Path(config.arch_from)
    if not path.is_file():
        return None
    saved = read_json(path, "an arch")
    same = (saved.get("img_size"), saved.get("num_classes")) == (ctx.img_size, ctx.num_classes)
    return saved.get("throughput") if same else None


def _print_result(result: Mapping[str, Any], folder: str, quiet: bool) -> None:
    """Print how it ended; a divergence even with --quiet."""
    if result["status"] == "diverged":
        kept = [str(result[k]) for k in ("checkpoint", "best") if result[k]]
        print(
            f"diverged: the loss became {result['loss']} by step {result['step']} (epoch {result['epoch']}); good and "
            f"kept: {', '.join(kept) or 'nothing yet'}; start anew with a lower --set lr=..., or a stricter --set "
            "clip_norm=...",
            file=sys.stderr,
        )
    elif not quiet:
        print(
            "best epoch {epoch} ({weights} weights): test top-1 {test_top1:.2%} +- {test_top1_se:.2%}, top-5 "
            "{test_top5:.2%} on {test_n} images; {params:,} parameters".format(**result)
        )
        command = shell_command("nas.export", path_argument(folder), "--to", "timm", "--out", "DIR")
        print(f"export it with: {command}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 2 for bad input, 3 diverged."""

    def work() -> int:
        given = read_flags(argv, __doc__)
        with contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext():
            if given.evaluate is not None:
                from nas.train.evaluate import evaluate_model

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
                _print_result(result, given.resume or given.out, given.quiet)
        if given.json:
            print(json.dumps(result))
        return EXIT_DIVERGED if result.get("status") == "diverged" else EXIT_FINISHED

    return exit_status(lambda: _on_one_rank(work))


def _on_one_rank(work: Callable[[], int]) -> int:
    """Do the work; of several processes only the first prints an error."""
    from nas.train.distributed import world_of

    try:
        return work()
    except InputError:
        if world_of()[0] == 0:
            raise
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
