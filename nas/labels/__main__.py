"""Soft labels on their own: `python -m nas.labels build|info|verify|merge|cache`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.cli import Parser, default_cache, guarded, usable_cpus
from nas.core.config import choices_of, parse_share
from nas.core.executor_config import EXECUTORS, ExecutorConfig
from nas.core.progress import Console
from nas.data.cache import cache_report, clean_cache, parse_bytes
from nas.distill.jobs import teach
from nas.labels.api import build, info, merge, verify
from space.errors import refuse

__all__ = ["build", "info", "main", "merge", "verify"]

CLEAN_RATIO = 0.01
"""What `--clean` alone stands for."""


def _part(text: str) -> tuple[int, int]:
    at, slash, parts = text.partition("/")
    if not (slash and at.isdigit() and parts.isdigit() and 1 <= int(at) <= int(parts)):
        raise refuse("--part", text, "I/N with 1 <= I <= N, such as 2/3")
    return int(at), int(parts)


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the fields of the augmentation that flags override."""
    names = {
        "mixup": "mixup_alpha",
        "cutmix": "cutmix_alpha",
        "erase": "erase_prob",
        "policy": "policy",
        "color_jitter": "color_jitter",
    }
    found = {field: getattr(arguments, flag) for flag, field in names.items()}
    given = {field: value for field, value in found.items() if value is not None}
    if given.get("policy") == "none":
        given["policy"] = None
    return given


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m nas.labels", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("build", help="make a store, or go on with one")
    make.add_argument("--data", required=True, help="as in nas.contract; a folder needs no classes")
    make.add_argument("--teacher", default="auto", help="auto, a timm name, or MODEL:FILE")
    make.add_argument("--teacher-epochs", type=int, default=15, help="of the auto teacher")
    make.add_argument("--epochs", type=int, default=10, help="views of each image (default: 10)")
    make.add_argument("--topk", type=int, help="classes kept (default: 10; 100 of over 10,000)")
    make.add_argument("--codec", choices=choices_of("codec"), default="packed")
    make.add_argument(
        "--augment",
        choices=choices_of("augment"),
        default="default",
        help="pipeline; the official ones are 22k, 1k and finetune",
    )
    make.add_argument("--mixup", type=float, metavar="ALPHA", help="override the pipeline's")
    make.add_argument("--cutmix", type=float, metavar="ALPHA", help="override the pipeline's")
    make.add_argument("--erase", type=float, metavar="PROB", help="override random erasing")
    make.add_argument("--policy", help="override RandAugment: a timm string, or none")
    make.add_argument("--color-jitter", type=float, metavar="X", help="override colour jitter")
    make.add_argument("--salt", type=int, default=0, help="another number: other views")
    make.add_argument("--limit", type=int, metavar="N", help="label N images only")
    make.add_argument(
        "--clean",
        nargs="?",
        const=str(CLEAN_RATIO),
        metavar="RATIO",
        help="drop images whose label gets less than RATIO of the probability of the "
        f"teacher's best (alone: {CLEAN_RATIO}), listing them",
    )
    make.add_argument("--precision", default="float32", help="of the teacher, on a GPU")
    make.add_argument("--img-size", type=int, metavar="PX")
    make.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        help="images read (default: 10,000, or 4 a class if more)",
    )
    make.add_argument("--max-corrupt", default="1%", metavar="SHARE")
    make.add_argument(
        "--no-pixel-cache",
        dest="pixel_cache",
        action="store_false",
        help="decode files each time instead of keeping their pixels",
    )
    make.add_argument("--out", metavar="DIR", help="the store's folder (default: in the cache)")
    make.add_argument("--processes", type=int, default=1, help="of this machine (default: 1)")
    make.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="ray: --processes parts are made as tasks of a cluster",
    )
    make.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="HOST:PORT or auto (default: a cluster of this machine alone)",
    )
    make.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="build every N-th shard: one of N machines (see merge)",
    )
    make.add_argument("--threads", type=int, help="torch's, a process; part of the store")
    make.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    tell = commands.add_parser("info", help="tell what a store is")
    tell.add_argument("store")
    check = commands.add_parser("verify", help="find any damaged, missing or stale file")
    check.add_argument("store")
    check.add_argument("--teacher", type=int, metavar="N", help="run it again on N records")
    check.add_argument("--data", help="where the data is now")
    check.add_argument("--teacher-model", help="where the teacher is now")
    join = commands.add_parser("merge", help="join the parts that several machines made")
    join.add_argument("store")
    join.add_argument("parts", nargs="+")
    keep = commands.add_parser("cache", help="tell what decoded pixels the cache holds")
    keep.add_argument("--keep", metavar="SIZE", help="remove the least recently used beyond it")
    for command in (make, check):
        command.add_argument("--random-seed", type=int, default=0)
    for command in (make, check, keep):
        command.add_argument("--cache-dir", metavar="DIR")
    for command in (make, tell, check, join, keep):
        command.add_argument("--quiet", action="store_true")
        command.add_argument("--json", action="store_true", help="a last line for programs")
    return parser


def _means(arguments: argparse.Namespace) -> ExecutorConfig:
    workers = max(1, min(arguments.processes, usable_cpus()))
    return ExecutorConfig(
        executor=arguments.executor, ray_address=arguments.ray_address, workers=workers
    )


def _build(arguments: argparse.Namespace, console: Console) -> int:
    clean = None if arguments.clean is None else parse_share("--clean", arguments.clean)
    made = build(
        arguments.data,
        teach=teach,
        teacher=arguments.teacher,
        teacher_epochs=arguments.teacher_epochs,
        epochs=arguments.epochs,
        out=arguments.out,
        topk=arguments.topk,
        codec=arguments.codec,
        augment=arguments.augment,
        changes=_changes(arguments),
        salt=arguments.salt,
        limit=arguments.limit,
        clean=clean,
        precision=arguments.precision,
        img_size=arguments.img_size,
        max_images=arguments.max_images,
        max_corrupt=parse_share("--max-corrupt", arguments.max_corrupt),
        pixel_cache=arguments.pixel_cache,
        random_seed=arguments.random_seed,
        device=arguments.device,
        threads=arguments.threads,
        processes=arguments.processes,
        part=_part(arguments.part),
        means=_means(arguments),
        cache_dir=arguments.cache_dir,
        console=console,
    )
    console.line(f"store: {made['folder']} ({made['bytes_per_record']:.1f} bytes a record)")
    return _end(arguments, made)


def _info(arguments: argparse.Namespace, console: Console) -> int:
    told = info(arguments.store)
    for name, value in told.items():
        console.line(f"{name}: {json.dumps(value)}")
    return _end(arguments, told)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    wrong = verify(
        arguments.store,
        teacher=arguments.teacher,
        data=arguments.data,
        teacher_model=arguments.teacher_model,
        teach=teach,
        random_seed=arguments.random_seed,
        cache_dir=arguments.cache_dir,
        console=console,
    )
    for line in wrong:
        print(f"error: label store {arguments.store}: {line}", file=sys.stderr)
    if not wrong:
        console.line(f"{arguments.store}: whole")
    _end(arguments, {"problems": wrong})
    return 2 if wrong else 0


def _merge(arguments: argparse.Namespace, console: Console) -> int:
    made = merge(arguments.store, arguments.parts, console=console)
    console.line(f"{arguments.store}: {made['missing']} shards missing")
    return _end(arguments, made)


def _cache(arguments: argparse.Namespace, console: Console) -> int:
    cache = Path(arguments.cache_dir) if arguments.cache_dir else default_cache()
    if arguments.keep is not None:
        clean_cache(cache, parse_bytes("--keep", arguments.keep))
    rows = [dict(row) for row in cache_report(cache)]
    for row in rows:
        console.line("  ".join(f"{name} {value}" for name, value in row.items()))
    return _end(arguments, {"data": rows})


def _end(arguments: argparse.Namespace, values: Mapping[str, Any]) -> int:
    if arguments.json:
        print(json.dumps(dict(values), default=str))
    return 0


_COMMANDS: Mapping[str, Callable[[argparse.Namespace, Console], int]] = {
    "build": _build,
    "info": _info,
    "verify": _verify,
    "merge": _merge,
    "cache": _cache,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and work. Returns the exit status: 0, or 2 for bad input and for a damaged store."""

    def work() -> int:
        arguments = build_parser().parse_args(argv)
        return _COMMANDS[arguments.command](arguments, Console(quiet=arguments.quiet))

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
