"""Making, describing, checking and merging label stores: what `nas.labels` gives Python users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.cli import MOST_AT_ONCE, default_cache, read_threads, usable_cpus
from nas.core.executor_config import ExecutorConfig
from nas.core.progress import Console
from nas.data import Dataset, DataSpec
from nas.data.prepare import prepared
from nas.jobs.executor import make_executor
from nas.jobs.job import Job, Result
from nas.jobs.local import LocalExecutor
from nas.jobs.queue import Executor
from nas.labels import jobs
from nas.labels import make_store as labelling
from nas.labels.jobs import AskTeacherJob, MergeLabelsJob, VerifyLabelsJob
from space.errors import InputError, read_int, refuse

Teach = Callable[..., Mapping[str, Any]]
"""Has the teacher of a data set made: `nas.distill.jobs.teach`, which lies on a higher layer."""

RETRIES = 2
"""How often a process that died goes on with its shards."""


def build(
    data: str,
    *,
    teach: Teach,
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
    max_images: int | None = None,
    max_corrupt: float = 0.01,
    pixel_cache: bool = True,
    teacher_epochs: int = 15,
    random_seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    processes: int = 1,
    part: tuple[int, int] = (1, 1),
    means: ExecutorConfig | None = None,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> Mapping[str, Any]:
    """Make a teacher's soft labels of a data set once: `epochs` views of every training image.

    `teach` has the teacher made (`nas.distill.jobs.teach`). `data`, `teacher` and the sizes are as
    in `nas.contract`; `augment` names a preset whose fields `changes` overrides; `limit` labels so
    many images; `clean` drops images on which teacher and label disagree; `part` (i, n) makes every
    n-th shard only, for n machines; `means` may name a cluster, and `processes` is how many parts
    are made there. Returns the store's `folder`, `id`,
    `records`, `bytes_per_record` and more. A killed build goes on where it stopped. Raises
    InputError.
    """
    console = console if console is not None else Console(quiet=True)
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    read_int("--processes", processes, 1, MOST_AT_ONCE)
    if threads is None:
        threads = max(1, usable_cpus() // processes)
    read_threads(threads)
    asked = DataSpec(data, img_size, max_images, max_corrupt, random_seed, pixel_cache=pixel_cache)
    taught_by = {
        "teacher": teacher,
        "teacher_epochs": teacher_epochs,
        "random_seed": random_seed,
        "device": device,
        "threads": threads,
    }
    made_by = {"data": _data_dict(asked), **taught_by}
    request = {
        "epochs": epochs,
        "topk": topk,
        "codec": codec,
        "preset": augment,
        "changes": dict(changes or {}),
        "salt": salt,
        "limit": limit,
        "clean": clean,
        "precision": precision,
        "device": device,
        "threads": threads,
    }
    dataset = prepared(asked, cache, console)
    with LocalExecutor(threads=threads, workers=processes, retries=RETRIES) as worker:
        do = _doer(worker, console)
        labelling.check(do, dataset, request)
        console.start(float(len(dataset.train) * teacher_epochs))
        try:
            taught = teach(do, dataset, cache, **taught_by)
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
        worker.release()  # what a teacher's training left in a GPU's memory is for all
        at, parts = part
        mine = [(at + parts * one, parts * processes) for one in range(processes)]
        if means is None or means.executor == "local":
            _make(begun, dataset, info, mine, device, worker, console)
        else:
            # A part comes back from a cluster whole: one that is there is not made again.
            open_parts = []
            for each in mine:
                left = labelling.begin(
                    do,
                    dataset,
                    info,
                    request,
                    place,
                    named=out is not None,
                    made_by=made_by,
                    part=each,
                )
                if left["shards"]:
                    open_parts.append(each)
            with make_executor(means, threads=threads, device=device) as cluster:
                _make(begun, dataset, info, open_parts, device, cluster, console)
    return {**begun, "bytes_per_record": begun["total_bytes"] / (begun["images"] * begun["epochs"])}


def _data_dict(spec: DataSpec) -> dict[str, Any]:
    name = spec.name
    path = Path(name).expanduser()
    return {
        "name": str(path.resolve()) if path.is_dir() else name,
        "img_size": spec.img_size,
        "max_images": spec.max_images,
        "max_corrupt": spec.max_corrupt,
        "random_seed": spec.random_seed,
    }


def _doer(worker: Executor, console: Console) -> labelling.Do:
    def do(job: Job) -> Result:
        return worker.run(job, tick=console.advance, heartbeat=console.refresh)

    return do


def _announce(begun: Mapping[str, Any], console: Console) -> None:
    """Say what is to be made and what room it takes, before it starts."""
    console.line(
        f"labels: {begun['images']:,} images x {begun['epochs']} epochs, top {begun['topk']} of "
        f"{begun['num_classes']:,} classes, {begun['codec']}, {begun['record_bytes']} bytes a "
        f"record: {begun['total_bytes'] / 1e6:,.1f} MB in {begun['folder']}"
    )
    console.line(
        f"labels: {begun['shards']} shards with {begun['records']:,} records "
        f"({begun['bytes'] / 1e6:,.1f} MB) are still to be built"
    )


def _make(
    begun: Mapping[str, Any],
    dataset: Dataset,
    info: Mapping[str, Any],
    parts: Sequence[tuple[int, int]],
    device: str,
    executor: Executor,
    console: Console,
) -> None:
    """Build the shards side by side."""
    jobs = [labelling.build_job(begun, dataset, info, part=one, device=device) for one in parts]
    console.start(sum(job.units for job in jobs), unit="images")
    try:
        for result in executor.stream(
            jobs, tick=lambda _, units: console.advance(units), heartbeat=console.refresh
        ):
            labelling.check_built(result)
    finally:
        console.stop()


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
    teach: Teach | None = None,
    random_seed: int = 0,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> list[str]:
    """Read every byte of a store and name what is wrong, one line each; [] for a whole one.

    With `teacher`, its teacher is also run again on so many random records; `data` and
    `teacher_model` say where they are now, if not where they were, and `teach` has the teacher made
    (`nas.distill.jobs.teach`). Raises InputError.
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
            job = Job(jobs.verify_labels, VerifyLabelsJob(store=folder), "verify", size)
            found = worker.run(job, tick=console.advance, heartbeat=console.refresh)
        finally:
            console.stop()
        if not found.ok:
            raise InputError(found.reason)
        wrong: list[str] = list(found.values["problems"])
    if wrong or teacher is None:
        return wrong
    assert teach is not None, "asking the teacher takes one"
    return _ask(folder, teacher, data, teacher_model, teach, random_seed, cache_dir, console)


def _ask(
    folder: Path,
    records: int,
    data: str | None,
    teacher_model: str | None,
    teach: Teach,
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
        taught = teach(do, dataset, cache, **asked)["info"]
        job = AskTeacherJob(
            store=folder,
            dataset=dataset.folder,
            teacher=Path(taught["folder"]),
            device=asked["device"],
            records=records,
            random_seed=random_seed,
        )
        found = do(Job(jobs.ask_teacher, job, "ask-teacher", float(records)))
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
    """Copy the shards that several machines built into one store. Raises InputError.

    Returns its `id` and how many shards are still `missing`.
    """
    job = MergeLabelsJob(store=Path(store), parts=tuple(Path(part) for part in parts))
    with LocalExecutor(threads=1) as worker:
        found = worker.run(Job(jobs.merge_labels, job, "merge"))
    if not found.ok:
        raise InputError(found.reason)
    return found.values
