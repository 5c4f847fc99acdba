"""Build a label store with the teacher of its data, and verify one against its teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nas.core.augment_config import AugmentConfig, read_augment
from nas.core.cli import MOST_AT_ONCE, default_cache, usable_cpus
from nas.core.data_config import DataConfig
from nas.core.executor_config import ExecutorConfig
from nas.core.io import read_json
from nas.core.progress import Console
from nas.core.settings import check_settings, setting
from nas.data import Dataset, DataSpec
from nas.data.prepare import prepared
from nas.data.sources import DataSource
from nas.distill.jobs import TeacherJob, train_teacher
from nas.inherit.jobs import CheckFilesJob, check_files
from nas.jobs.executor import make_executor
from nas.jobs.job import Job, Result
from nas.jobs.local import LocalExecutor
from nas.jobs.queue import Executor
from nas.labels import api, jobs
from nas.labels.jobs import AskTeacherJob, VerifyLabelsJob
from nas.labels.request import LabelRequest
from space.errors import InputError, refuse

RETRIES = 2
"""How often a process that died continues with its shards."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions(DataConfig):
    """The settings of a label build beside its `LabelRequest`. Raises InputError."""

    teacher: str = setting(
        "auto", "auto, a timm name, MODEL:FILE, a folder", group="teacher and build", metavar="MODEL"
    )
    teacher_epochs: int = setting(15, "epochs of the auto teacher", metavar="N", low=1, high=100_000)
    random_seed: int = setting(0, "of every draw", metavar="N", low=0, high=2**31 - 1)
    processes: int = setting(1, "parts that are built side by side", metavar="N", low=1, high=MOST_AT_ONCE)
    part: str = setting("1/1", "build every N-th shard: one of N machines (see merge)", metavar="I/N")
    threads: int | None = setting(None, "torch's, a process; part of the store", metavar="N", low=1, high=MOST_AT_ONCE)

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.shards

    @property
    def shards(self) -> tuple[int, int]:
        """The part as (number, of how many)."""
        at, slash, parts = str(self.part).partition("/")
        if not (slash and at.isdigit() and parts.isdigit() and 1 <= int(at) <= int(parts)):
            raise refuse("--part", self.part, "I/N with 1 <= I <= N, such as 2/3")
        return int(at), int(parts)

    @property
    def data_spec(self) -> DataSpec:
        """The data set that is asked for."""
        return DataSpec.of(self, self.random_seed)


def _split(data: str, settings: Mapping[str, Any]) -> tuple[BuildOptions, LabelRequest]:
    """Sort settings by the dataclass that has them. Raises InputError."""
    decides = {f.name for f in fields(LabelRequest)} - {"threads"}
    known = decides | {f.name for f in fields(BuildOptions)} - {"data"}
    for name in settings.keys() - known:
        raise refuse(name, settings[name], f"one of {', '.join(sorted(known))}")
    options = BuildOptions(data=data, **{k: v for k, v in settings.items() if k not in decides})
    threads = options.threads or max(1, usable_cpus() // options.processes)
    asked = {k: v for k, v in settings.items() if k in decides}
    return options, LabelRequest(**asked, threads=threads)


def build(
    data: str,
    *,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    executor_config: ExecutorConfig | None = None,
    console: Console | None = None,
    **settings: Any,
) -> Mapping[str, Any]:
    """Make a teacher's soft labels of a data set once: `epochs` views of every training image.

    `settings` are the fields of `LabelRequest` and `BuildOptions`; `out` is the store's folder (default: in the
    cache); `executor_config` may name a cluster, where the `processes` parts are made. Returns the store's `folder`,
    `id`, `records`, `bytes_per_record` and more. A killed build continues where it stopped. Raises InputError.
    """
    options, request = _split(data, settings)
    console = console if console is not None else Console(quiet=True)
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    place = cache / "labels" if out is None else Path(out)
    device, threads = request.device, request.threads
    taught_by: dict[str, Any] = {
        "teacher": options.teacher,
        "teacher_epochs": options.teacher_epochs,
        "random_seed": options.random_seed,
        "device": device,
        "threads": threads,
        "augment": AugmentConfig.of(request).given,
    }
    with LocalExecutor(threads=threads, workers=options.processes, retries=RETRIES) as worker:
        do = _doer(worker, console)
        if options.teacher != "auto":  # before anything is made for it
            api.job_values(do(Job(check_files, CheckFilesJob(teacher=options.teacher), "check-files")), "--teacher")
        begun_before = out is not None and (place / "manifest.json").is_file()

        def check(source: DataSource) -> None:
            if begun_before:
                api.check_source(place, source, continued=True)

        dataset = prepared(options.data_spec, cache, console, check)
        checked = api.check(do, dataset, request)
        for line in (f"augmentation: {checked['augmentation']}", *checked["notes"]):
            console.line(line)
        with console.bar(float(len(dataset.train) * options.teacher_epochs)):
            taught = teach(do, dataset, cache, **taught_by)
        info = taught["info"]
        for line in (taught["message"], *info["notes"]):
            console.line(f"teacher: {line}")

        def begin(part: tuple[int, int]) -> Mapping[str, Any]:
            made_by = {"data": options.data_spec.to_dict(), **taught_by}
            return api.begin(do, dataset, info, request, place, named=out is not None, made_by=made_by, part=part)

        at, parts = options.shards
        begun = begin((at, parts))
        if request.clean is not None:
            dropped = f"{begun['dropped']} of {len(dataset.train)} images dropped"
            console.line(f"clean: {dropped}, listed in {begun['folder']}/dropped.csv")
        _announce(begun, console)
        worker.release()  # what a teacher's training left in a GPU's memory is for all
        mine = [(at + parts * one, parts * options.processes) for one in range(options.processes)]
        if executor_config is None or executor_config.executor == "local":
            _make(begun, dataset, info, mine, device, worker, console)
        else:
            # A part comes back from a cluster whole: one that is there is not made again.
            missing = [part for part in mine if begin(part)["shards"]]
            with make_executor(executor_config, threads=threads, device=device) as cluster:
                _make(begun, dataset, info, missing, device, cluster, console)
    return {**begun, "bytes_per_record": begun["total_bytes"] / (begun["images"] * begun["epochs"])}


def _doer(worker: Executor, console: Console) -> api.Do:
    def do(job: Job) -> Result:
        return worker.run(job, tick=console.advance, heartbeat=console.refresh)

    return do


def _make(
    begun: Mapping[str, Any],
    dataset: Dataset,
    info: Mapping[str, Any],
    parts: Sequence[tuple[int, int]],
    device: str,
    executor: Executor,
    console: Console,
) -> None:
    """Build parts of a store side by side."""
    work = [api.build_job(begun, dataset, info, part=part, device=device) for part in parts]
    with console.bar(sum(job.units for job in work), "images"):
        for result in executor.stream(work, tick=lambda _, units: console.advance(units), heartbeat=console.refresh):
            api.job_values(result, "soft labels")


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

    With `teacher`, its teacher is also run again on so many random records; `data` and `teacher_model` name where they
    are now, if not where they were. Raises InputError.
    """
    console = console if console is not None else Console(quiet=True)
    folder = Path(store)
    if not (folder / "manifest.json").is_file():
        raise refuse("label store", folder, "a folder made by this toolkit")
    if teacher is not None and teacher < 1:
        raise refuse("--teacher", teacher, "an integer >= 1")
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    with LocalExecutor(threads=usable_cpus()) as worker:
        with console.bar(size):
            job = Job(jobs.verify_labels, VerifyLabelsJob(store=folder), "verify", size)
            found = _doer(worker, console)(job)
        if not found.ok:
            raise InputError(found.reason)
        wrong: list[str] = list(found.values["problems"])
    if wrong or teacher is None:
        return wrong
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    return _ask(folder, teacher, data, teacher_model, random_seed, cache, console)


def teach(
    do: api.Do,
    dataset: Dataset,
    cache: Path,
    *,
    teacher: str,
    teacher_epochs: int,
    random_seed: int,
    device: str,
    threads: int,
    augment: Mapping[str, Any] = MappingProxyType({}),
) -> Mapping[str, Any]:
    """Make the teacher of a data set in a worker: its `info`, with notes, and a line, `message`.

    `augment` holds the settings that replace parts of its augmentation (`AugmentConfig.given`). Raises InputError.
    """
    job = TeacherJob(
        dataset=dataset.folder,
        cache=cache,
        teacher=teacher,
        epochs=teacher_epochs,
        random_seed=random_seed,
        device=device,
        threads=threads,
        augment=read_augment(augment),
    )
    units = float(len(dataset.train) * teacher_epochs)
    return api.job_values(do(Job(train_teacher, job, "teacher", units)), f"--teacher {teacher}")


def _ask(
    folder: Path,
    records: int,
    data: str | None,
    teacher_model: str | None,
    random_seed: int,
    cache: Path,
    console: Console,
) -> list[str]:
    """Run a store's teacher again on random records; returns what is wrong, in lines."""
    asked = dict(api.made_by(folder))
    given = dict(asked.pop("data"))
    if data is not None:
        given["data"] = data
    if teacher_model is not None:
        asked["teacher"] = teacher_model
    spec = api.read_manifest(folder)["spec"]
    dataset = prepared(DataSpec(**given), cache, console, lambda source: api.check_source(folder, source))
    with LocalExecutor(threads=int(asked["threads"])) as worker:
        do = _doer(worker, console)
        own = _kept_teacher(cache, spec) if teacher_model is None else None
        job = AskTeacherJob(
            store=folder,
            dataset=dataset.folder,
            teacher=own or Path(teach(do, dataset, cache, **asked)["info"]["folder"]),
            device=asked["device"],
            records=records,
            random_seed=random_seed,
        )
        found = do(Job(jobs.ask_teacher, job, "ask-teacher", float(records)))
    if not found.ok:
        raise InputError(found.reason)
    for note in found.values["notes"]:
        console.line(f"labels: {note}")
    line = "teacher: {records} records asked again, KL {mean_kl:.2g} nats on average, {worst_kl:.2g} at worst"
    line = line.format(**found.values)
    console.line(line)
    return [] if found.values["good"] else [f"the teacher says something else: {line}"]


def _kept_teacher(cache: Path, spec: Mapping[str, Any]) -> Path | None:
    """Find a store's own teacher in the cache by the digest of its weights, whatever data it is asked about."""
    wanted = (spec.get("teacher_hash"), spec.get("classes"))
    for path in sorted((cache / "teachers").glob("*/info.json")):
        with contextlib.suppress(InputError):
            value = read_json(path, "a teacher of this toolkit")
            info = value.get("info") if isinstance(value, dict) else None
            if isinstance(info, dict) and (info.get("digest"), info.get("classes")) == wanted:
                return path.parent
    return None


def _announce(begun: Mapping[str, Any], console: Console) -> None:
    """Print what is to be made and what room it takes, before it starts."""
    console.line(
        "labels: {images:,} images x {epochs} epochs, top {topk} of {num_classes:,} classes, {codec}, {record_bytes} "
        "bytes a record: {megabytes:,.1f} MB in {folder}".format(**begun, megabytes=begun["total_bytes"] / 1e6)
    )
    console.line(
        f"labels: {begun['shards']} shards with {begun['records']:,} records ({begun['bytes'] / 1e6:,.1f} MB) are "
        "still to be built"
    )
