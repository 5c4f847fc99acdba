"""Jobs about labels: what a teacher says of images, and what may be wrong with a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.core.progress import Tick
from space.errors import refuse

Values = dict[str, Any]


def relabel(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Give images without ground truth the classes that their teacher sees: `{"folder": ...}`."""
    from nas.data import open_dataset
    from nas.data.augment.spec import default_spec
    from nas.data.pixels import relabelled
    from nas.export.trained_teacher import TeacherInfo, load_teacher
    from nas.labels.request import teacher_classes

    dataset = open_dataset(Path(spec["dataset"]))
    info = TeacherInfo.from_dict(spec["info"])
    logits = load_teacher(info, spec["device"])
    labels = teacher_classes(dataset, logits, default_spec(dataset), tick)
    classes = tuple(str(number) for number in range(info.num_classes))
    made = relabelled(dataset, Path(spec["cache"]), labels, classes, info.id)
    return {"folder": str(made.folder)}


def check_labels(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Refuse what can be refused before there is a teacher."""
    from nas.data import open_dataset
    from nas.labels.request import LabelRequest, check_request

    check_request(LabelRequest.from_dict(spec["request"]), open_dataset(Path(spec["dataset"])))
    return {}


def begin_labels(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Begin a label store, or find it begun: folder, id, and what is still to be made."""
    from nas.data import open_dataset
    from nas.data.augment.spec import default_spec
    from nas.export.trained_teacher import TeacherInfo, load_teacher
    from nas.labels.build import need, refuse_if_full
    from nas.labels.request import LabelRequest, begin_store, disagreements

    dataset = open_dataset(Path(spec["dataset"]))
    info = TeacherInfo.from_dict(spec["info"])
    request = LabelRequest.from_dict(spec["request"])
    dropped, count = None, 0
    if request.clean is not None:
        logits = load_teacher(info, request.device)
        dropped, count = disagreements(dataset, logits, default_spec(dataset), request.clean, tick)
    store = begin_store(
        Path(spec["place"]),
        dataset,
        info,
        request,
        made_by=spec["made_by"],
        named=spec["named"],
        dropped=dropped,
    )
    left = need(store, tuple(spec["part"]))
    refuse_if_full(store, left)
    return {
        "folder": str(store.folder),
        "id": store.id,
        "images": store.spec.train_images,
        "epochs": store.epochs,
        "topk": store.spec.topk,
        "num_classes": store.spec.num_classes,
        "codec": store.spec.codec,
        "record_bytes": store.codec.record_bytes,
        "dropped": count,
        "pieces": left.pieces,
        "records": left.records,
        "bytes": left.bytes,
        "total_bytes": left.total_bytes,
    }


def build_labels(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Make the missing pieces of a part of a store that was begun."""
    from nas.data import open_dataset
    from nas.export.trained_teacher import TeacherInfo, load_teacher
    from nas.labels.build import build_pieces
    from nas.labels.store import LabelStore, read_manifest

    store = LabelStore(Path(spec["folder"]), read_manifest(Path(spec["folder"])))
    info = TeacherInfo.from_dict(spec["info"])
    build_pieces(
        store,
        open_dataset(Path(spec["dataset"])),
        load_teacher(info, spec["device"], store.spec.precision),
        part=tuple(spec["part"]),
        batch_size=spec["batch_size"],
        device=spec["device"],
        tick=tick,
    )
    return {}


def open_labels(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Open a store for a data set and read what a run will use of it: every byte is checked."""
    from nas.data import open_dataset
    from nas.labels.reader import Replay, holdout_batches
    from nas.labels.store import open_store

    dataset = open_dataset(Path(spec["dataset"]))
    epochs = spec["epochs"]
    asked = epochs if spec["beyond"] == "refuse" else None
    store = open_store(Path(spec["store"]), use=dataset, epochs=asked)
    for epoch in range(min(epochs, store.epochs)):
        store.epoch(epoch)
    replay = Replay(dataset.train, store, 2, 0, missing=spec["missing"], beyond=spec["beyond"])
    next(holdout_batches(dataset, store, 1, spec["missing"]), None)
    manifest = store.spec
    says = (
        f"{replay.images} images x {store.epochs} epochs, top {manifest.topk} of "
        f"{manifest.num_classes} classes, teacher {manifest.teacher_id}, in {store.folder}"
    )
    values = {
        "folder": str(store.folder),
        "id": store.id,
        # A shared store may grow while a run goes on: the run keeps to what it began with.
        "use_epochs": min(spec["stored"] or store.epochs, store.epochs),
        "says": says,
    }
    return {**values, "notes": list(replay.notes)}


def verify_labels(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Name what is wrong with a store, one line each: `{"problems": [...]}`."""
    from nas.labels.verify import problems

    return {"problems": list(problems(Path(spec["store"]), tick))}


def ask_teacher(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Run a store's teacher again on random records and compare."""
    from nas.data import open_dataset
    from nas.export.trained_teacher import TeacherInfo, load_teacher
    from nas.labels import verify
    from nas.labels.store import open_store

    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
    info = TeacherInfo.from_dict(spec["info"])
    if info.digest != store.spec.teacher_hash:
        raise refuse(
            f"label store {store.folder}",
            f"teacher {store.spec.teacher_id}, weights {store.spec.teacher_hash[:12]}",
            f"{info.id}, weights {info.digest[:12]}",
            "name the store's own with --teacher-model",
        )
    logits = load_teacher(info, spec["device"], store.spec.precision)
    found = verify.ask_teacher(
        store, dataset, logits, spec["records"], spec["random_seed"], spec["device"], tick
    )
    return {
        "records": found.records,
        "mean_kl": found.mean_kl,
        "worst_kl": found.worst_kl,
        "good": found.good,
    }


def merge_labels(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Merge the parts of a store that several machines made."""
    from nas.labels.build import merge_stores, need

    store = merge_stores(Path(spec["store"]), [Path(part) for part in spec["parts"]], tick)
    return {"id": store.id, "missing": need(store).pieces}
