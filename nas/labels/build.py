"""Builds a label store: disjoint shards, by one process or many, each shard once."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from nas.core.dataclass_json import to_json
from nas.core.io import digest_of, file_sha256, remove_leftovers, write_atomic, write_json
from nas.core.progress import Tick, no_tick
from nas.core.table import Writer
from nas.data import Dataset, Split
from nas.data.augment.spec import AugmentSpec, changed_spec, preset_spec
from nas.data.augment.timm_engine import eval_batch
from nas.data.augment.views import EpochPlan, Inputs, make_plan
from nas.export.teacher_net import TeacherInfo
from nas.labels.codec import make_codec, top_labels
from nas.labels.request import LabelRequest, default_topk
from nas.labels.store import (
    CHECKSUM_BYTES,
    DROPPED,
    HOLDOUT_EPOCH,
    HOLDOUT_KEYS,
    KEYS,
    MANIFEST,
    SCHEMA,
    TEACHER_BATCH,
    TEMPERATURE,
    Keys,
    LabelStore,
    Rows,
    Shard,
    StoreSpec,
    check_same,
    find_rows,
    identity,
    key_array,
    keys_digest,
    library_versions,
    load_store,
    read_dropped,
    records_per_shard,
    with_checksum,
)
from space.errors import refuse

TeacherLogits = Callable[[torch.Tensor], torch.Tensor]
"""Takes normalised inputs [B, 3, S, S] and gives logits [B, C]."""
DROPPED_COLUMNS = ("key", "name", "label", "teacher_label", "label_prob", "teacher_prob")
_SPARE_BYTES = 64 << 20
"""Left free on the disk, for the manifest, other writers and the file system itself."""


@dataclass(frozen=True)
class BuildStatus:
    """The shards, records and bytes of a store that are still to be built; `total_bytes` in all."""

    shards: int
    records: int
    bytes: int
    total_bytes: int


def resolve_augment(request: LabelRequest, dataset: Dataset) -> AugmentSpec:
    """Return the augmentation of a request. Raises InputError."""
    return changed_spec(preset_spec(request.augment, dataset), request)


def stored_augment(request: LabelRequest, dataset: Dataset, folder: Path) -> AugmentSpec:
    """Return the augmentation of stored labels. Raises InputError where the request asks for another one."""
    spec = load_store(folder).spec.augment
    request.check_stored(spec.to_dict(), folder)
    if request.augment != LabelRequest.augment:
        asked = resolve_augment(request, dataset)
        same = replace(asked, img_size=spec.img_size, mean=spec.mean, std=spec.std) == spec
        if not same:
            raise refuse("--augment", request.augment, f"that of the labels in {folder}: {spec.text}", "drop --augment")
    return spec


def check_request(request: LabelRequest, dataset: Dataset) -> AugmentSpec:
    """Reject what can be rejected before there is a teacher, whose training may take long; return the augmentation."""
    spec = resolve_augment(request, dataset)
    if request.clean is not None and not dataset.labelled:
        raise refuse("--clean", "images without labels", "labels that a teacher can contradict")
    if dataset.labelled:
        classes = dataset.num_classes
        make_codec(request.codec, request.topk or default_topk(classes), classes)
    return spec


def begin_store(
    place: Path,
    dataset: Dataset,
    info: TeacherInfo,
    request: LabelRequest,
    *,
    made_by: Mapping[str, Any],
    named: bool,
    dropped: str | None = None,
) -> LabelStore:
    """Write the manifest and key tables of a store, or find it begun; shards are built later. Safe in several
    processes.

    `place` is the store's folder if the user `named` it, else the folder of stores, where its id names it. `made_by`
    names what finds the data and teacher again, `dropped` is the table of `find_contradicted`. A store that is there
    grows to the epochs of the request. Raises InputError, also for a folder that holds another store.
    """
    train = np.sort(key_array(dataset.train.keys))
    if dropped:
        train = train[~np.isin(train, key_array(sorted(read_dropped(dropped.encode()))))]
    train = train[: request.limit]  # keys are hashes: the first are a random subset
    if not len(train):
        want = "images on which teacher and label agree"
        raise refuse("--clean", "no image left", want, "lower --clean, or take a better --teacher")
    holdout = np.sort(key_array(dataset.holdout.keys))
    spec = StoreSpec(
        topk=default_topk(info.num_classes) if request.topk is None else request.topk,
        augment=resolve_augment(request, dataset),
        salt=request.salt,
        codec=request.codec,
        preparation=dataset.preparation,
        train_keys=keys_digest(train),
        train_images=len(train),
        holdout_keys=keys_digest(holdout),
        holdout_images=len(holdout),
        teacher_id=info.id,
        teacher_hash=info.digest,
        classes=info.classes,
        threads=request.threads,
        device=request.device.split(":")[0],
        precision=request.precision,
    )
    libraries = library_versions()
    manifest = {
        "schema": SCHEMA,
        "id": digest_of(identity(spec, libraries)),
        "spec": to_json(spec),
        "libraries": libraries,
        "teacher_batch": TEACHER_BATCH,
        "temperature": TEMPERATURE,
        "epochs": request.epochs,
        "shard_records": records_per_shard(spec.train_images),
        "dataset_fingerprint": dataset.fingerprint,
        "made_by": dict(made_by),
    }
    folder = place if named else place / str(manifest["id"])
    tables = {KEYS: train.tobytes(), HOLDOUT_KEYS: holdout.tobytes()}
    if dropped is not None:
        tables[DROPPED] = dropped.encode()
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            remove_leftovers(folder)
            if (folder / MANIFEST).exists():
                store = load_store(folder)
                check_same(folder, store.identity, identity(spec, libraries))
                if store.epochs < request.epochs:
                    write_json(folder / MANIFEST, {**store.manifest, "epochs": request.epochs})
            else:
                for name, data in tables.items():
                    write_atomic(folder / name, data)
                files = {name: file_sha256(folder / name) for name in tables}
                write_json(folder / MANIFEST, {**manifest, "files": files})
    return load_store(folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into an InputError."""
    try:
        yield
    except OSError as error:
        want, remedy = "a folder with room to write", "build again to go on: what is finished is kept"
        raise refuse("label store", f"{folder} ({error})", want, remedy) from error


def shards_of_part(store: LabelStore, part: tuple[int, int]) -> list[Shard]:
    """List the shards of one part of a build: `(i, n)` is part i of n, 1 <= i <= n."""
    at, parts = part
    if not 1 <= at <= parts:
        raise refuse("--part", f"{at}/{parts}", "I/N with 1 <= I <= N, such as 2/3")
    return store.all_shards()[at - 1 :: parts]


def _size(store: LabelStore, shard: Shard) -> int:
    return shard.count * store.codec.record_bytes + CHECKSUM_BYTES


def _is_built(store: LabelStore, shard: Shard) -> bool:
    """Return whether a shard is there, by its length: a shard is renamed into place whole."""
    try:
        return (store.folder / shard.name).stat().st_size == _size(store, shard)
    except OSError:
        return False


def build_status(store: LabelStore, part: tuple[int, int] = (1, 1)) -> BuildStatus:
    """Count what is still to be built of a part."""
    missing = [shard for shard in shards_of_part(store, part) if not _is_built(store, shard)]
    total = sum(_size(store, shard) for shard in store.all_shards())
    return BuildStatus(
        len(missing),
        sum(shard.count for shard in missing),
        sum(_size(store, shard) for shard in missing),
        total + 16 * (len(store.keys) + len(store.holdout_keys)),
    )


def check_room(store: LabelStore, status: BuildStatus) -> None:
    """Reject a build that does not fit on the disk. Raises InputError."""
    free = shutil.disk_usage(store.folder).free
    if status.bytes + _SPARE_BYTES > free:
        got, want = f"{free / 1e9:.2f} GB free on its disk", f"{(status.bytes + _SPARE_BYTES) / 1e9:.2f} GB"
        raise refuse(store.title, got, want, "free some, or ask for fewer --epochs or a smaller --topk")


def build_shards(
    store: LabelStore,
    dataset: Dataset,
    teacher_logits: TeacherLogits,
    *,
    part: tuple[int, int] = (1, 1),
    device: str = "cpu",
    tick: Tick = no_tick,
) -> None:
    """Build the missing shards of one part of a store. Raises InputError.

    A shard follows from the specification alone and is put in place whole: a killed build goes on, and parts may be
    built by machines that share nothing (`merge_stores`). `tick` counts images, those of finished shards too.
    """
    shards = shards_of_part(store, part)
    drafts = store.folder / f".part-{part[0]}-{part[1]}"
    with _writing(store.folder):
        for folder in store.folder.glob(".part-*"):  # of killed builders: their locks are free
            with contextlib.suppress(OSError, Timeout), FileLock(folder / "lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        drafts.mkdir(exist_ok=True)
        with FileLock(drafts / "lock"):
            check_room(store, build_status(store, part))
            drafts.mkdir(exist_ok=True)
            remove_leftovers(drafts)
            builder = _ShardBuilder(store, dataset, teacher_logits, device)
            for shard in shards:
                if _is_built(store, shard):
                    tick(float(shard.count))
                else:
                    _put(store.folder / shard.name, builder.build(shard, tick), drafts)
            shutil.rmtree(drafts, ignore_errors=True)


def _put(path: Path, data: bytes, drafts: Path) -> None:
    """Write a shard among the drafts of its builder and rename it into place."""
    path.parent.mkdir(exist_ok=True)
    draft = drafts / path.name
    try:
        write_atomic(draft, data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class _ShardBuilder:
    """Builds shards: views of the images, the teacher's logits, encoded records."""

    def __init__(self, store: LabelStore, dataset: Dataset, teacher_logits: TeacherLogits, device: str) -> None:
        self._store, self._logits = store, teacher_logits
        self._holdout = dataset.holdout
        self._holdout_rows = _rows_of(dataset.holdout, store.holdout_keys, store)
        self._rows = _rows_of(dataset.train, store.keys, store)
        self._inputs = Inputs(dataset.train.pixels, store.spec.augment, device)
        self._planned: tuple[int, EpochPlan] | None = None

    def build(self, shard: Shard, tick: Tick) -> bytes:
        """Label a shard's images and return the bytes of its file."""
        spec = self._store.spec
        records = np.empty((shard.count, self._store.codec.record_bytes), dtype=np.uint8)
        for start in range(0, shard.count, TEACHER_BATCH):
            at = np.arange(start, min(shard.count, start + TEACHER_BATCH)) + shard.start
            if shard.epoch == HOLDOUT_EPOCH:
                inputs = eval_batch(self._holdout.pixels[self._holdout_rows[at]], spec.augment)
            else:
                inputs = self._inputs[self._plan(shard.epoch).of(at)]
            with torch.no_grad():
                logits = self._logits(inputs)
            if logits.shape[1] != spec.num_classes:
                raise refuse("teacher", f"{logits.shape[1]} classes", f"{spec.num_classes} classes")
            records[at - shard.start] = self._store.codec.encode(*top_labels(logits, spec.topk))
            tick(float(len(at)))
        return with_checksum(shard, self._store.id, records)

    def _plan(self, epoch: int) -> EpochPlan:
        if self._planned is None or self._planned[0] != epoch:
            plan = make_plan(self._store.codes(epoch), self._rows, self._store.spec.augment)
            self._planned = (epoch, plan)
        return self._planned[1]


def _rows_of(split: Split, keys: Keys, store: LabelStore) -> Rows:
    """Find a store's images in a split: rows int64, in the order of the store's keys."""
    there = key_array(split.keys)
    order = np.argsort(there, kind="stable")
    at = find_rows(there[order], keys)
    if (at < 0).any():
        got = f"{int((at < 0).sum())} images that are not in the data"
        raise refuse(store.title, got, "the data that it was begun with", "restore them, or build another store")
    return order[at]


def merge_stores(folder: Path, parts: Sequence[Path], tick: Tick = no_tick) -> LabelStore:
    """Copy the shards that other machines built into one store; every shard is checked first.

    All must be parts of the same store. `tick` counts shards. Raises InputError.
    """
    folder = Path(folder)
    sources = [load_store(Path(part)) for part in parts]
    first, same = sources[0], [load_store(folder)] if (folder / MANIFEST).exists() else []
    for store in [*sources, *same]:
        check_same(store.folder, store.identity, first.identity)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            remove_leftovers(folder)
            for name in first.manifest["files"]:
                write_atomic(folder / name, (first.folder / name).read_bytes())
            epochs = max(store.epochs for store in [*sources, *same])
            write_json(folder / MANIFEST, {**first.manifest, "epochs": epochs})
            merged = load_store(folder)
            drafts = folder / ".merge"
            drafts.mkdir(exist_ok=True)
            remove_leftovers(drafts)
            for source in sources:
                for shard in source.all_shards():
                    path = source.folder / shard.name
                    if path.is_file() and not _is_built(merged, shard):
                        source.map(shard)
                        _put(folder / shard.name, path.read_bytes(), drafts)
                    tick(1.0)
            shutil.rmtree(drafts, ignore_errors=True)
    return merged


def find_contradicted(
    dataset: Dataset, logits: TeacherLogits, augment: AugmentSpec, ratio: float, tick: Tick = no_tick
) -> tuple[str, int]:
    """List the training images whose given class gets less than `ratio` of the probability of the teacher's best.

    Returns a CSV table (`DROPPED_COLUMNS`, worst first) and its number of rows; TinyViT's authors cleaned ImageNet-22k
    so.
    """
    split = dataset.train
    if not dataset.labelled:
        raise refuse("--clean", "images without labels", "labels that a teacher can contradict")
    found: list[tuple[Any, ...]] = []
    for rows, outputs in _evaluated(split, logits, augment, tick):
        probs = outputs.double().softmax(1).numpy()
        given = np.asarray(split.labels[rows])
        mine, best = probs[np.arange(len(rows)), given], probs.max(1)
        for at in np.flatnonzero(mine < ratio * best):
            row, classes = int(rows[at]), (given[at], int(probs[at].argmax()))
            image = (split.keys[row], split.names[row] if len(split.names) else "")
            shares = (f"{mine[at]:.6g}", f"{best[at]:.6g}")
            found.append((float(mine[at] / best[at]), *image, *(dataset.classes[c] for c in classes), *shares))
    table = io.StringIO()
    writer = Writer(table)
    writer.writerow(DROPPED_COLUMNS)
    writer.writerows(row[1:] for row in sorted(found))
    return table.getvalue(), len(found)


def teacher_classes(
    dataset: Dataset, logits: TeacherLogits, augment: AugmentSpec, tick: Tick = no_tick
) -> dict[str, NDArray[np.int64]]:
    """Return the teacher's best class of every image, on evaluation inputs: side -> int64 [n]."""
    return {
        side: np.concatenate(
            [outputs.argmax(1).numpy() for _, outputs in _evaluated(getattr(dataset, side), logits, augment, tick)]
        ).astype(np.int64)
        for side in ("train", "holdout", "test")
    }


def _evaluated(
    split: Split, logits: TeacherLogits, augment: AugmentSpec, tick: Tick
) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Yield rows of a split and the logits of their evaluation inputs, batch by batch."""
    for start in range(0, len(split), TEACHER_BATCH):
        rows = np.arange(start, min(start + TEACHER_BATCH, len(split)))
        with torch.no_grad():
            yield rows, logits(eval_batch(split.pixels[rows], augment))
        tick(float(len(rows)))
