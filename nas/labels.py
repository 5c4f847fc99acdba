"""Soft labels on their own: `python -m nas.labels build|info|verify|merge|cache`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

from nas import labelling
from nas.command import Parser, default_cache, guarded
from nas.config import LABEL_CHOICES, parse_share
from nas.data import Dataset, DataSpec
from nas.data.cache import cache_report, clean_cache, parse_bytes
from nas.door import prepared, usable_cpus
from nas.executor import LocalExecutor
from nas.jobs import Job, Result, Tick
from nas.progress import Console
from space.errors import InputError, refuse

CLEAN_RATIO = 0.01
"""What `--clean` alone stands for."""


def build(
    data: str,
    *,
    teacher: str = "auto",
    epochs: int = 10,
    out: str | Path | None = None,
    topk: int | None = None,
    codec: str = "packed",
    augment: str = "default",
    changes: Mapping[str, Any] | None = None,
    salt: int = 0,
    limit: int | None = None,
    clean: float | None = None,
    precision: str = "float32",
    img_size: int | None = None,
    proxy_images: int | None = None,
    max_broken: float = 0.01,
    pixel_cache: bool = True,
    teacher_epochs: int = 15,
    random_seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    processes: int = 1,
    part: tuple[int, int] = (1, 1),
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> Mapping[str, Any]:
    """Make a teacher's soft labels of a data set once: `epochs` views of every training image.

    `data`, `teacher` and the sizes are as in `nas.contract`; `augment` names a preset whose fields
    `changes` overrides; `limit` labels so many images; `clean` drops images on which teacher and
    label disagree; `part` (i, n) makes every n-th piece only, for n machines. Returns the store's
    `folder`, `id`, `records`, `bytes_per_record` and more. A killed build goes on where it stopped.
    Raises InputError.
    """
    console = console if console is not None else Console(quiet=True)
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    if processes < 1:
        raise refuse("--processes", processes, "an integer >= 1")
    if threads is None:
        threads = max(1, usable_cpus() // processes)
    if threads < 1:
        raise refuse("--threads", threads, "an integer >= 1")
    asked = DataSpec(data, img_size, proxy_images, max_broken, random_seed, pixel_cache=pixel_cache)
    taught_by = {
        "teacher": teacher, "teacher_epochs": teacher_epochs, "random_seed": random_seed,
        "device": device, "threads": threads,
    }  # fmt: skip
    made_by = {"data": _data_dict(asked), **taught_by}
    request = {
        "epochs": epochs, "topk": topk, "codec": codec, "preset": augment,
        "changes": dict(changes or {}), "salt": salt, "limit": limit, "clean": clean,
        "precision": precision, "device": device, "threads": threads,
    }  # fmt: skip
    dataset = prepared(asked, cache, console)
    with LocalExecutor(threads=threads) as worker:
        do = _doer(worker, console)
        console.start(float(len(dataset.train) * teacher_epochs))
        try:
            taught = labelling.teach(do, dataset, cache, **taught_by)  # type: ignore[arg-type]
        finally:
            console.stop()
        console.line(f"teacher: {taught['says']}")
        info = taught["info"]
        place = cache / "labels" if out is None else Path(out)
        begun = labelling.begin(
            do, dataset, info, request, place, named=out is not None, made_by=made_by, part=part
        )
    if clean is not None:
        console.line(
            f"clean: {begun['dropped']} of {len(dataset.train)} images dropped, listed in "
            f"{begun['folder']}/dropped.csv"
        )
    _announce(begun, console)
    _make(begun, dataset, info, part, processes, device, threads, console)
    return {
        **begun,
        "bytes_per_record": begun["total_bytes"] / (begun["images"] * begun["epochs"]),
    }


def _data_dict(spec: DataSpec) -> dict[str, Any]:
    name = spec.name
    path = Path(name).expanduser()
    return {
        "name": str(path.resolve()) if path.is_dir() else name,
        "img_size": spec.img_size,
        "proxy_images": spec.proxy_images,
        "max_broken": spec.max_broken,
        "random_seed": spec.random_seed,
    }


def _doer(worker: LocalExecutor, console: Console, tick: Tick | None = None) -> labelling.Do:
    def do(job: Job) -> Result:
        return worker.run(job, tick=tick or console.advance, heartbeat=console.refresh)

    return do


def _announce(begun: Mapping[str, Any], console: Console) -> None:
    """Say what is to be made and what room it takes, before it starts."""
    console.line(
        f"labels: {begun['images']:,} images x {begun['epochs']} epochs, top {begun['topk']} of "
        f"{begun['num_classes']:,} classes, {begun['codec']}, {begun['record_bytes']} bytes a "
        f"record: {begun['total_bytes'] / 1e6:,.1f} MB in {begun['folder']}"
    )
    console.line(
        f"labels: {begun['pieces']} pieces with {begun['records']:,} records "
        f"({begun['bytes'] / 1e6:,.1f} MB) are still to be made"
    )


def _make(
    begun: Mapping[str, Any],
    dataset: Dataset,
    info: Mapping[str, Any],
    part: tuple[int, int],
    processes: int,
    device: str,
    threads: int,
    console: Console,
) -> None:
    """Let so many processes make disjoint pieces, and wait for all."""
    at, parts = part
    jobs = [
        labelling.build_job(
            begun, dataset, info, part=(at + parts * one, parts * processes), device=device
        )
        for one in range(processes)
    ]
    console.start(sum(job.units for job in jobs), unit="images")
    lock = Lock()

    def tick(units: float) -> None:
        with lock:
            console.advance(units)

    workers = [LocalExecutor(threads=threads) for _ in jobs]
    pool = ThreadPoolExecutor(len(jobs))
    try:
        waiting = [
            pool.submit(labelling.build, _plain(worker, tick), job)
            for worker, job in zip(workers, jobs, strict=True)
        ]
        for one in waiting:
            one.result()
    finally:
        for worker in workers:
            worker.close()
        pool.shutdown(wait=True)
        console.stop()


def _plain(worker: LocalExecutor, tick: Tick) -> labelling.Do:
    return lambda job: worker.run(job, tick=tick)


def info(store: str | Path) -> Mapping[str, Any]:
    """Tell what a store is: its manifest, less the checksums, and its size. Raises InputError."""
    folder = Path(store)
    manifest = labelling.read_manifest(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    spec = manifest["spec"]
    records = spec["train_images"] * manifest["epochs"]
    told = {k: v for k, v in manifest.items() if k != "files"}
    return {**told, "bytes": size, "records": records, "bytes_per_record": size / records}


def verify(
    store: str | Path,
    *,
    teacher: int | None = None,
    data: str | None = None,
    teacher_model: str | None = None,
    random_seed: int = 0,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> list[str]:
    """Read every byte of a store and name what is wrong, one line each; [] for a whole one.

    With `teacher`, its teacher is also run again on so many random records; `data` and
    `teacher_model` say where they are now, if not where they were. Raises InputError.
    """
    console = console if console is not None else Console(quiet=True)
    folder = Path(store)
    if not (folder / "manifest.json").is_file():
        raise refuse("label store", folder, "a folder made by this toolkit")
    if teacher is not None and teacher < 1:
        raise refuse("--teacher", teacher, "an integer >= 1")
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    with LocalExecutor(threads=usable_cpus()) as worker:
        console.start(size)
        try:
            job = Job("verify-labels", "verify", {"store": str(folder)}, units=size)
            found = worker.run(job, tick=console.advance, heartbeat=console.refresh)
        finally:
            console.stop()
        if not found.ok:
            raise InputError(found.reason)
        wrong: list[str] = list(found.values["problems"])
    if wrong or teacher is None:
        return wrong
    return _ask(folder, teacher, data, teacher_model, random_seed, cache_dir, console)


def _ask(
    folder: Path,
    records: int,
    data: str | None,
    teacher_model: str | None,
    random_seed: int,
    cache_dir: str | Path | None,
    console: Console,
) -> list[str]:
    """Run a store's teacher again on random records; what is wrong, in lines."""
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    asked = dict(labelling.made_by(folder))
    given = dict(asked.pop("data"))
    if data is not None:
        given["name"] = data
    if teacher_model is not None:
        asked["teacher"] = teacher_model
    dataset = prepared(DataSpec(**given), cache, console)
    with LocalExecutor(threads=int(asked["threads"])) as worker:
        do = _doer(worker, console)
        taught = labelling.teach(do, dataset, cache, **asked)["info"]
        spec = {
            "store": str(folder), "dataset": str(dataset.folder), "info": dict(taught),
            "device": asked["device"], "records": records, "random_seed": random_seed,
        }  # fmt: skip
        found = do(Job("ask-teacher", "ask-teacher", spec, units=float(records)))
    if not found.ok:
        raise InputError(found.reason)
    values = found.values
    line = (
        f"teacher: {values['records']} records asked again, KL {values['mean_kl']:.2g} nats on "
        f"average, {values['worst_kl']:.2g} at worst"
    )
    console.line(line)
    return [] if values["good"] else [f"the teacher says something else: {line}"]


def merge(
    store: str | Path, parts: Sequence[str | Path], *, console: Console | None = None
) -> Mapping[str, Any]:
    """Copy the pieces that several machines made into one store. Raises InputError.

    Returns its `id` and how many pieces are still `missing`.
    """
    spec = {"store": str(store), "parts": [str(part) for part in parts]}
    with LocalExecutor(threads=1) as worker:
        found = worker.run(Job("merge-labels", "merge", spec))
    if not found.ok:
        raise InputError(found.reason)
    return found.values


def _part(text: str) -> tuple[int, int]:
    at, slash, parts = text.partition("/")
    if not (slash and at.isdigit() and parts.isdigit() and 1 <= int(at) <= int(parts)):
        raise refuse("--part", text, "I/N with 1 <= I <= N, such as 2/3")
    return int(at), int(parts)


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the fields of the augmentation that flags override."""
    names = {
        "mixup": "mixup_alpha", "cutmix": "cutmix_alpha", "erase": "erase_prob",
        "policy": "policy", "color_jitter": "color_jitter",
    }  # fmt: skip
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
    make.add_argument("--codec", choices=LABEL_CHOICES["codec"], default="packed")
    make.add_argument("--augment", choices=LABEL_CHOICES["augment"], default="default",
                      help="pipeline; the official ones are 22k, 1k and finetune")  # fmt: skip
    make.add_argument("--mixup", type=float, metavar="ALPHA", help="override the pipeline's")
    make.add_argument("--cutmix", type=float, metavar="ALPHA", help="override the pipeline's")
    make.add_argument("--erase", type=float, metavar="PROB", help="override random erasing")
    make.add_argument("--policy", help="override RandAugment: a timm string, or none")
    make.add_argument("--color-jitter", type=float, metavar="X", help="override colour jitter")
    make.add_argument("--salt", type=int, default=0, help="another number: other views")
    make.add_argument("--limit", type=int, metavar="N", help="label N images only")
    make.add_argument("--clean", nargs="?", const=str(CLEAN_RATIO), metavar="RATIO",
                      help="drop images whose label gets less than RATIO of the probability of the "
                      f"teacher's best (alone: {CLEAN_RATIO}), listing them")  # fmt: skip
    make.add_argument("--precision", default="float32", help="of the teacher, on a GPU")
    make.add_argument("--img-size", type=int, metavar="PX")
    make.add_argument("--proxy-images", type=int, metavar="N", help="read N images of the data")
    make.add_argument("--max-broken", default="1%", metavar="SHARE")
    make.add_argument("--no-pixel-cache", dest="pixel_cache", action="store_false",
                      help="decode files each time instead of keeping their pixels")  # fmt: skip
    make.add_argument("--out", metavar="DIR", help="the store's folder (default: in the cache)")
    make.add_argument("--processes", type=int, default=1, help="of this machine (default: 1)")
    make.add_argument("--part", default="1/1", metavar="I/N",
                      help="make every N-th piece: one of N machines (see merge)")  # fmt: skip
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


def _build(arguments: argparse.Namespace, console: Console) -> int:
    clean = None if arguments.clean is None else parse_share("--clean", arguments.clean)
    made = build(
        arguments.data, teacher=arguments.teacher, teacher_epochs=arguments.teacher_epochs,
        epochs=arguments.epochs, out=arguments.out, topk=arguments.topk, codec=arguments.codec,
        augment=arguments.augment, changes=_changes(arguments), salt=arguments.salt,
        limit=arguments.limit, clean=clean, precision=arguments.precision,
        img_size=arguments.img_size, proxy_images=arguments.proxy_images,
        max_broken=parse_share("--max-broken", arguments.max_broken),
        pixel_cache=arguments.pixel_cache, random_seed=arguments.random_seed,
        device=arguments.device, threads=arguments.threads, processes=arguments.processes,
        part=_part(arguments.part), cache_dir=arguments.cache_dir, console=console,
    )  # fmt: skip
    console.line(f"store: {made['folder']} ({made['bytes_per_record']:.1f} bytes a record)")
    return _end(arguments, made)


def _info(arguments: argparse.Namespace, console: Console) -> int:
    told = info(arguments.store)
    for name, value in told.items():
        console.line(f"{name}: {json.dumps(value)}")
    return _end(arguments, told)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    wrong = verify(
        arguments.store, teacher=arguments.teacher, data=arguments.data,
        teacher_model=arguments.teacher_model, random_seed=arguments.random_seed,
        cache_dir=arguments.cache_dir, console=console,
    )  # fmt: skip
    for line in wrong:
        print(f"error: label store {arguments.store}: {line}", file=sys.stderr)
    if not wrong:
        console.line(f"{arguments.store}: whole")
    _end(arguments, {"problems": wrong})
    return 2 if wrong else 0


def _merge(arguments: argparse.Namespace, console: Console) -> int:
    made = merge(arguments.store, arguments.parts, console=console)
    console.line(f"{arguments.store}: {made['missing']} pieces missing")
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
    "build": _build, "info": _info, "verify": _verify, "merge": _merge, "cache": _cache,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and work. Returns the exit status: 0, or 2 for bad input and for a damaged store."""

    def work() -> int:
        arguments = build_parser().parse_args(argv)
        return _COMMANDS[arguments.command](arguments, Console(quiet=arguments.quiet))

    return guarded(work)


def entry() -> NoReturn:
    """Console-script entry: exit with the status of `main`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
