"""Label stores from the driver's side, without torch: begin, build, open, describe and merge them.

A `Do` runs one job. What needs the store's teacher is in `nas.distill.label_store`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.class_match import check_unchanged_classes
from nas.core.io import read_json
from nas.data import Dataset
from nas.data.sources import DataSource
from nas.jobs.job import Job, Result
from nas.jobs.local import LocalExecutor
from nas.labels import jobs
from nas.labels.jobs import BeginLabelsJob, BuildLabelsJob, CheckLabelsJob, MergeLabelsJob, OpenLabelsJob, RelabelJob
from nas.labels.request import LabelRequest, match_store_classes
from space.errors import InputError, refuse

Do = Callable[[Job], Result]


def job_values(result: Result, what: str) -> Mapping[str, Any]:
    """Return a job's values; raises InputError, about `what`, where it failed."""
    if not result.ok:
        raise InputError(result.reason if result.values.get("input_error") else f"{what}: {result.reason}")
    return result.values


def made_by(store: Path) -> Mapping[str, Any]:
    """Read from a store's manifest what data and teacher it was made by. Raises InputError."""
    found: Mapping[str, Any] = read_manifest(store)["made_by"]
    return found


def read_manifest(store: Path) -> Mapping[str, Any]:
    """Read a store's manifest without torch. Raises InputError."""
    path = Path(store) / "manifest.json"
    if not path.is_file():
        raise refuse("label store", store, "a folder made by this toolkit")
    found: Any = read_json(path, "the manifest of a label store")
    if not (isinstance(found, dict) and isinstance(found.get("spec"), dict)):
        raise refuse(f"label store {store}", "a manifest without `spec`", "the file as written")
    return found


def check_source(store: str | Path, source: DataSource, *, continued: bool = False) -> None:
    """Refuse a store of other classes or another resolution than the data's, before any image is decoded.

    The classes of a store that is `continued` must stand in their order, too. Raises InputError.
    """
    spec = read_manifest(Path(store))["spec"]
    known, size = spec.get("classes"), spec.get("augment", {}).get("img_size")
    if not source.classes or not isinstance(known, list):
        return
    if continued:
        remedy = "build another store, or restore the data"
        check_unchanged_classes(source.classes, known, f"label store {store}", "the store", remedy)
    else:
        match_store_classes(store, known, source.classes)
    if size != source.img_size:
        remedy = f"--img-size {size}, or another store"
        raise refuse(f"label store {store}", f"resolution {size}", f"resolution {source.img_size}", remedy)


def classes_from_teacher(do: Do, dataset: Dataset, cache: Path, info: Mapping[str, Any], device: str) -> Path:
    """Label images that have no ground truth by their teacher; the folder of the new data set."""
    job = RelabelJob(dataset=dataset.folder, cache=cache, teacher=Path(info["folder"]), device=device)
    units = float(len(dataset.train) + len(dataset.holdout) + len(dataset.test))
    made = job_values(do(Job(jobs.relabel, job, "relabel", units)), "labelling by the teacher")
    return Path(made["folder"])


def check(do: Do, dataset: Dataset, request: LabelRequest, store: str | None = None) -> Mapping[str, Any]:
    """Refuse, before there is a teacher, what could not be labelled as asked, or contradicts a `store` that is there.

    Gives the `augmentation` in a line, and `notes`. Raises InputError.
    """
    job = CheckLabelsJob(dataset=dataset.folder, request=request, store=None if store is None else Path(store))
    return job_values(do(Job(jobs.check_labels, job, "check-labels")), "soft labels")


def begin(
    do: Do,
    dataset: Dataset,
    info: Mapping[str, Any],
    request: LabelRequest,
    place: Path,
    *,
    named: bool,
    made_by: Mapping[str, Any],
    part: tuple[int, int] = (1, 1),
) -> Mapping[str, Any]:
    """Begin a store, or find it: folder, id, what is still to be made and what room it needs."""
    job = BeginLabelsJob(
        dataset=dataset.folder,
        teacher=Path(info["folder"]),
        request=request,
        place=place,
        named=named,
        made_by=made_by,
        part=part,
    )
    units = float(len(dataset.train))
    return job_values(do(Job(jobs.begin_labels, job, "begin-labels", units)), "soft labels")


def build_job(
    begun: Mapping[str, Any], dataset: Dataset, info: Mapping[str, Any], *, part: tuple[int, int], device: str
) -> Job:
    """Describe the making of a part of a store that was begun."""
    job = BuildLabelsJob(
        folder=Path(begun["folder"]), dataset=dataset.folder, teacher=Path(info["folder"]), part=part, device=device
    )
    records = begun["images"] * begun["epochs"] + len(dataset.holdout)
    return Job(jobs.build_labels, job, f"labels-{part[0]}-{part[1]}", records / part[1])


def open_for(
    do: Do, folder: str | Path, dataset: Dataset, *, epochs: int, stored: int | None, missing: str, label_overflow: str
) -> Mapping[str, Any]:
    """Check a store for a training of `epochs` epochs on its first `stored` (None: all).

    Gives folder, id, `use_epochs`, notes and a line `says`. Raises InputError.
    """
    job = OpenLabelsJob(
        store=Path(folder),
        dataset=dataset.folder,
        epochs=epochs,
        stored=stored,
        missing=missing,
        label_overflow=label_overflow,
    )
    return job_values(do(Job(jobs.open_labels, job, "open-labels")), "soft labels")


def info(store: str | Path) -> Mapping[str, Any]:
    """Tell what a store is: its manifest, less the checksums, and its size. Raises InputError."""
    folder = Path(store)
    manifest = read_manifest(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    spec = manifest["spec"]
    records = spec["train_images"] * manifest["epochs"]
    described = {k: v for k, v in manifest.items() if k != "files"}
    return {**described, "bytes": size, "records": records, "bytes_per_record": size / records}


def merge(store: str | Path, parts: Sequence[str | Path]) -> Mapping[str, Any]:
    """Copy the shards that several machines built into one store. Raises InputError.

    Returns its `id` and how many shards are still `missing`.
    """
    job = MergeLabelsJob(store=Path(store), parts=tuple(Path(part) for part in parts))
    with LocalExecutor(threads=1) as worker:
        found = worker.run(Job(jobs.merge_labels, job, "merge"))
    if not found.ok:
        raise InputError(found.reason)
    return found.values
