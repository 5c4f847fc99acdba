"""Soft labels from the driver's side: which jobs make, open and check a store, in which order.

No torch here; a `Do` runs one job and gives its values, or raises `InputError` with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nas.data import Dataset
from nas.data.sealed_files import read_sealed
from nas.jobs.job import Job, Needs, Result
from space.errors import InputError, refuse

Do = Callable[[Job], Result]


def _values(result: Result, what: str) -> Mapping[str, Any]:
    if not result.ok:
        raise InputError(
            result.reason if result.values.get("input_error") else f"{what}: {result.reason}"
        )
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
    try:
        found = read_sealed(path)
        if not isinstance(found.get("spec"), dict):
            raise ValueError("no specification")
    except (OSError, ValueError) as error:
        raise refuse(
            f"label store {store}", f"manifest.json: {error}", "the file as it was written"
        ) from error
    return found


def teach(
    do: Do,
    dataset: Dataset,
    cache: Path,
    *,
    teacher: str,
    teacher_epochs: int,
    random_seed: int,
    device: str,
    threads: int,
) -> Mapping[str, Any]:
    """Have the teacher of a data set: `info` and a line `says`. Raises InputError."""
    spec = {
        "dataset": str(dataset.folder),
        "cache": str(cache),
        "teacher": teacher,
        "teacher_epochs": teacher_epochs,
        "random_seed": random_seed,
        "device": device,
        "threads": threads,
    }
    units = float(len(dataset.train) * teacher_epochs)
    return _values(do(Job("teacher", "teacher", spec, units=units)), f"--teacher {teacher}")


def classes_from_teacher(
    do: Do, dataset: Dataset, cache: Path, info: Mapping[str, Any], device: str
) -> Path:
    """Label images that have no ground truth by their teacher; the folder of the new data set."""
    spec = {
        "dataset": str(dataset.folder),
        "cache": str(cache),
        "info": dict(info),
        "device": device,
    }
    units = float(len(dataset.train) + len(dataset.holdout) + len(dataset.test))
    made = _values(do(Job("relabel", "relabel", spec, units=units)), "labelling by the teacher")
    return Path(made["folder"])


def check(do: Do, dataset: Dataset, request: Mapping[str, Any]) -> None:
    """Refuse, before there is a teacher, what could not be labelled as asked. Raises InputError."""
    spec = {"dataset": str(dataset.folder), "request": dict(request)}
    _values(do(Job("check-labels", "check-labels", spec)), "soft labels")


def begin(
    do: Do,
    dataset: Dataset,
    info: Mapping[str, Any],
    request: Mapping[str, Any],
    place: Path,
    *,
    named: bool,
    made_by: Mapping[str, Any],
    part: tuple[int, int] = (1, 1),
) -> Mapping[str, Any]:
    """Begin a store, or find it: folder, id, what is still to be made and what room it needs."""
    spec = {
        "dataset": str(dataset.folder),
        "info": dict(info),
        "request": dict(request),
        "place": str(place),
        "named": named,
        "made_by": dict(made_by),
        "part": list(part),
    }
    units = float(len(dataset.train))
    return _values(do(Job("begin-labels", "begin-labels", spec, units=units)), "soft labels")


def build_job(
    begun: Mapping[str, Any],
    dataset: Dataset,
    info: Mapping[str, Any],
    *,
    part: tuple[int, int],
    device: str,
    batch_size: int = 64,
) -> Job:
    """Describe the making of a part of a store that was begun."""
    spec = {
        "folder": begun["folder"],
        "dataset": str(dataset.folder),
        "info": dict(info),
        "part": list(part),
        "device": device,
        "batch_size": batch_size,
    }
    records = begun["images"] * begun["epochs"] + len(dataset.holdout)
    needs = Needs(("dataset", "folder", "info.folder"), "folder", flat=("folder",))
    return Job("labels", f"labels-{part[0]}-{part[1]}", spec, records / part[1], needs)


def build(do: Do, job: Job) -> None:
    """Make a part of a store. Raises InputError."""
    check_built(do(job))


def check_built(result: Result) -> None:
    """Refuse a part of a store that was not made, with its reason. Raises InputError."""
    _values(result, "soft labels")


def open_for(
    do: Do,
    folder: str | Path,
    dataset: Dataset,
    *,
    epochs: int,
    stored: int | None,
    missing: str,
    beyond: str,
) -> Mapping[str, Any]:
    """Check a store for a training of `epochs` epochs on its first `stored` (None: all).

    Gives folder, id, `use_epochs`, notes and a line `says`. Raises InputError.
    """
    spec = {
        "store": str(folder),
        "dataset": str(dataset.folder),
        "epochs": epochs,
        "stored": stored,
        "missing": missing,
        "beyond": beyond,
    }
    return _values(do(Job("open-labels", "open-labels", spec)), "soft labels")
