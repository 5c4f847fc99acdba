"""Jobs about labels: what a teacher says of images, and what may be wrong with a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nas.core.progress import Tick
from nas.jobs.job import EXTENDS, READS, Values
from nas.labels.request import LabelRequest
from space.errors import refuse


@dataclass(frozen=True, kw_only=True)
class RelabelJob:
    """A data set without ground truth, and the folder of the teacher that sees its classes."""

    dataset: Path = field(metadata=READS)
    cache: Path
    teacher: Path = field(metadata=READS)
    device: str


@dataclass(frozen=True, kw_only=True)
class CheckLabelsJob:
    """A request for labels of a data set, or the labels in a store to be used instead."""

    dataset: Path = field(metadata=READS)
    request: LabelRequest
    store: Path | None = None


@dataclass(frozen=True, kw_only=True)
class BeginLabelsJob:
    """A label store to begin in the folder `place`, or in one of its folders unless it is `named`.

    `part` is (number, of how many) the shards that are asked for; `made_by` goes to the manifest.
    """

    dataset: Path
    teacher: Path
    request: LabelRequest
    place: Path
    named: bool
    made_by: Mapping[str, Any]
    part: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BuildLabelsJob:
    """The part of a begun store, in `folder`, that is to be made."""

    folder: Path = field(metadata=EXTENDS)
    dataset: Path = field(metadata=READS)
    teacher: Path = field(metadata=READS)
    part: tuple[int, int]
    device: str


@dataclass(frozen=True, kw_only=True)
class OpenLabelsJob:
    """A store to check for a training of `epochs` epochs on its first `stored` (None: all)."""

    store: Path
    dataset: Path
    epochs: int
    stored: int | None
    missing: str
    label_overflow: str


@dataclass(frozen=True, kw_only=True)
class VerifyLabelsJob:
    """A store to read whole."""

    store: Path


@dataclass(frozen=True, kw_only=True)
class AskTeacherJob:
    """A store whose teacher is asked again for so many random records."""

    store: Path
    dataset: Path
    teacher: Path
    device: str
    records: int
    random_seed: int


@dataclass(frozen=True, kw_only=True)
class MergeLabelsJob:
    """Stores with parts of the same labels, to be copied into one."""

    store: Path
    parts: tuple[Path, ...]


def relabel(job: RelabelJob, tick: Tick) -> Values:
    """Give images without ground truth the classes that their teacher sees: `{"folder": ...}`."""
    from nas.data import open_dataset
    from nas.data.augment.spec import default_spec
    from nas.data.cache import relabelled
    from nas.export.teacher_net import load_teacher, read_teacher
    from nas.labels.build import teacher_classes

    dataset = open_dataset(job.dataset)
    info = read_teacher(job.teacher)
    logits = load_teacher(info, job.device)
    labels = teacher_classes(dataset, logits, default_spec(dataset), tick)
    made = relabelled(dataset, job.cache, labels, info.classes, info.id)
    return {"folder": str(made.folder)}


def check_labels(job: CheckLabelsJob, tick: Tick) -> Values:
    """Refuse what can be refused before there is a teacher: `{"augmentation": line, "notes": [...]}`."""
    from nas.data import open_dataset
    from nas.data.augment.mirror import mirror_notes
    from nas.labels.build import check_request, stored_augment

    dataset = open_dataset(job.dataset)
    asked, store = job.request, job.store
    spec = check_request(asked, dataset) if store is None else stored_augment(asked, dataset, store)
    return {"augmentation": spec.text, "notes": mirror_notes(dataset, spec)}


def begin_labels(job: BeginLabelsJob, tick: Tick) -> Values:
    """Begin a label store, or find it begun: folder, id, and what is still to be made."""
    from nas.data import open_dataset
    from nas.data.augment.spec import default_spec
    from nas.export.teacher_net import load_teacher, read_teacher
    from nas.labels.build import begin_store, build_status, check_room, find_contradicted

    dataset = open_dataset(job.dataset)
    info, request = read_teacher(job.teacher), job.request
    dropped, count = None, 0
    if request.clean is not None:
        logits = load_teacher(info, request.device)
        dropped, count = find_contradicted(dataset, logits, default_spec(dataset), request.clean, tick)
    store = begin_store(job.place, dataset, info, request, made_by=job.made_by, named=job.named, dropped=dropped)
    left = build_status(store, job.part)
    check_room(store, left)
    spec = store.spec
    made = {"folder": str(store.folder), "id": store.id, "images": spec.train_images, "epochs": store.epochs}
    record = {"codec": spec.codec, "record_bytes": store.codec.record_bytes}
    kept = {"topk": spec.topk, "num_classes": spec.num_classes, "dropped": count}
    return {**made, **kept, **record, **asdict(left)}


def build_labels(job: BuildLabelsJob, tick: Tick) -> Values:
    """Build the missing shards of a part of a store that was begun."""
    from nas.data import open_dataset
    from nas.export.teacher_net import load_teacher, read_teacher
    from nas.labels.build import build_shards
    from nas.labels.store import load_store

    store, dataset = load_store(job.folder), open_dataset(job.dataset)
    logits = load_teacher(read_teacher(job.teacher), job.device, store.spec.precision)
    options: dict[str, Any] = {"part": job.part, "device": job.device}
    build_shards(store, dataset, logits, **options, tick=tick)
    return {}


def open_labels(job: OpenLabelsJob, tick: Tick) -> Values:
    """Open a store for a data set and read what a run will use of it: every byte is checked."""
    from nas.data import open_dataset
    from nas.labels.reader import LabelReader, holdout_batches
    from nas.labels.store import open_store

    dataset = open_dataset(job.dataset)
    store = open_store(job.store, use=dataset, epochs=job.epochs if job.label_overflow == "error" else None)
    for epoch in range(min(job.epochs, store.epochs)):
        store.epoch(epoch)
    reader = LabelReader(dataset.train, store, 2, 0, missing=job.missing, label_overflow=job.label_overflow)
    next(holdout_batches(dataset, store, 1, job.missing), None)
    spec = store.spec
    message = (
        f"{reader.images} images x {store.epochs} epochs, top {spec.topk} of {spec.num_classes} classes, "
        f"teacher {spec.teacher_id}, in {store.folder}"
    )
    # A shared store may grow while a run goes on: the run keeps to what it began with.
    use_epochs = min(job.stored or store.epochs, store.epochs)
    place = {"folder": str(store.folder), "id": store.id}
    return {**place, "use_epochs": use_epochs, "message": message, "notes": list(reader.notes)}


def verify_labels(job: VerifyLabelsJob, tick: Tick) -> Values:
    """Name what is wrong with a store, one line each: `{"problems": [...]}`."""
    from nas.labels.verify import find_problems

    return {"problems": list(find_problems(job.store, tick))}


def ask_teacher(job: AskTeacherJob, tick: Tick) -> Values:
    """Run a store's teacher again on random records and compare, both in the store's order of the classes."""
    from nas.data import open_dataset
    from nas.export.teacher_net import in_class_order, load_teacher, read_teacher
    from nas.labels import verify
    from nas.labels.build import TeacherLogits
    from nas.labels.store import open_store

    dataset = open_dataset(job.dataset)
    store = open_store(job.store, use=dataset)
    notes = []
    if store.class_order is not None:
        notes.append(f"the {store.spec.num_classes} classes stand in another order than the data's: matched by name")
        store.class_order = None
    info = read_teacher(job.teacher)
    digest, rows = in_class_order(info, store.spec.classes)
    if digest != store.spec.teacher_hash:
        got = f"teacher {store.spec.teacher_id}, weights {store.spec.teacher_hash[:12]}"
        want = f"{info.id}, weights {info.digest[:12]}"
        raise refuse(store.title, got, want, "name the store's own with --teacher-model")
    asked = load_teacher(info, job.device, store.spec.precision)
    logits: TeacherLogits = asked if rows is None else lambda inputs: asked(inputs)[:, rows]
    found = verify.compare_with_teacher(store, dataset, logits, job.records, job.random_seed, job.device, tick)
    return {**asdict(found), "good": found.good, "notes": notes}


def merge_labels(job: MergeLabelsJob, tick: Tick) -> Values:
    """Merge the parts of a store that several machines made."""
    from nas.labels.build import build_status, merge_stores

    store = merge_stores(job.store, job.parts, tick)
    return {"id": store.id, "missing": build_status(store).shards}
