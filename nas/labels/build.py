"""Building a label store: disjoint pieces, by one process or many, that nobody makes twice."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from nas.core.io import remove_leftovers, write_atomic
from nas.core.progress import Tick, no_tick
from nas.data import Dataset, Split
from nas.data.augment.spec import eval_batch
from nas.data.augment.views import Plan, Views, make_augmenter, make_plan
from nas.data.sealed_files import file_sha256, write_sealed
from nas.labels.keys import StoredKeys, find_rows, keys_digest, raw_keys, sorted_planes, write_keys
from nas.labels.shards import HOLDOUT_EPOCH, SEAL_BYTES, Piece, map_piece, piece_records, sealed
from nas.labels.soft_labels import top_labels
from nas.labels.store import DROPPED, HOLDOUT_KEYS, KEYS, MANIFEST, LabelStore, read_manifest
from nas.labels.store_spec import (
    SCHEMA,
    TEACHER_BATCH,
    TEMPERATURE,
    StoreSpec,
    identity,
    library_versions,
    refuse_other,
    store_id,
)
from space.errors import refuse

TeacherLogits = Callable[[torch.Tensor], torch.Tensor]
_SPARE_BYTES = 64 << 20
"""Left free on the disk, for the manifest, other writers and the file system itself."""


@dataclass(frozen=True)
class Need:
    """What is still to be made of a store: pieces, records and bytes; `total_bytes` in all."""

    pieces: int
    records: int
    bytes: int
    total_bytes: int


def labelled_keys(split: Split, limit: int | None, dropped: frozenset[str]) -> NDArray[np.uint64]:
    """Choose which images of a split get labels, as sorted planes of keys.

    All but the `dropped` ones, or the first `limit` by key, which is a hash: a random subset.
    """
    raw = raw_keys(split.keys)
    if dropped:
        gone = raw_keys(sorted(dropped))
        rows = {bytes(row) for row in gone}
        raw = raw[[bytes(row) not in rows for row in raw]]
    planes = sorted_planes(raw)
    return planes if limit is None else np.ascontiguousarray(planes[:, :limit])


def start_store(
    folder: Path,
    spec: StoreSpec,
    epochs: int,
    train: NDArray[np.uint64],
    holdout: NDArray[np.uint64],
    made_by: Mapping[str, Any],
    dropped: str | None = None,
    dataset_fingerprint: str = "",
) -> LabelStore:
    """Write a store's manifest and key tables, or check that they are there and the same.

    `train` and `holdout` are the keys whose hashes `spec` quotes; `made_by` says in plain JSON what
    to ask for the same data and teacher again; `dropped` is the content of `dropped.csv`, and
    `dataset_fingerprint` tells of the whole data set. A store that is there grows to `epochs` if it
    has fewer. Safe in several processes at once. Raises InputError for a folder that holds another
    store.
    """
    assert spec.train_keys == keys_digest(train), "the keys of another store"
    assert spec.holdout_keys == keys_digest(holdout), "the holdout of another store"
    if epochs < 1:
        raise refuse("label epochs", epochs, "an integer >= 1")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            remove_leftovers(folder)
            told = {"dataset_fingerprint": dataset_fingerprint, "made_by": dict(made_by)}
            manifest = _manifest(folder, spec, epochs, told)
            if manifest is not None:
                write_keys(folder / KEYS, train)
                write_keys(folder / HOLDOUT_KEYS, holdout)
                files = [KEYS, HOLDOUT_KEYS]
                if dropped is not None:
                    write_atomic(folder / DROPPED, dropped.encode())
                    files.append(DROPPED)
                manifest["files"] = {name: file_sha256(folder / name) for name in files}
                write_sealed(folder / MANIFEST, manifest)
    except OSError as error:
        raise refuse("label store", f"{folder} ({error})", "a folder with room to write") from error
    return LabelStore(folder, read_manifest(folder))


def _manifest(
    folder: Path, spec: StoreSpec, epochs: int, told: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Give the manifest that is to be written, or None if the one there serves."""
    libraries = library_versions()
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        have = identity(StoreSpec.from_dict(manifest["spec"]), manifest["libraries"])
        refuse_other(folder, have, identity(spec, libraries))
        return None if manifest["epochs"] >= epochs else {**manifest, "epochs": epochs}
    return {
        "schema": SCHEMA,
        "id": store_id(spec),
        "spec": spec.to_dict(),
        "libraries": libraries,
        "teacher_batch": TEACHER_BATCH,
        "temperature": TEMPERATURE,
        "resolution": spec.augment.img_size,
        "epochs": epochs,
        "piece_records": piece_records(spec.train_images),
        **told,
    }


def all_pieces(store: LabelStore) -> list[Piece]:
    """List a store's pieces in the order in which they are made: the holdout first."""
    every = (HOLDOUT_EPOCH, *range(store.epochs))
    return [piece for epoch in every for piece in store.pieces(epoch)]


def own_pieces(store: LabelStore, part: tuple[int, int]) -> list[Piece]:
    """List the pieces of one part of a building: `(i, n)` is part i of n, 1 <= i <= n."""
    at, parts = part
    if not 1 <= at <= parts:
        raise refuse("--part", f"{at}/{parts}", "I/N with 1 <= I <= N, such as 2/3")
    return all_pieces(store)[at - 1 :: parts]


def is_made(store: LabelStore, piece: Piece) -> bool:
    """Tell whether a piece is there and this store's, going by its length and seal."""
    try:
        map_piece(store.folder / piece.name, piece, store.id, store.codec.record_bytes, check=False)
    except (OSError, ValueError):
        return False
    return True


def need(store: LabelStore, part: tuple[int, int] = (1, 1)) -> Need:
    """Say what is still to be made of a part."""
    width = store.codec.record_bytes
    missing = [piece for piece in own_pieces(store, part) if not is_made(store, piece)]
    size = sum(piece.count * width + SEAL_BYTES for piece in missing)
    total = sum(piece.count * width + SEAL_BYTES for piece in all_pieces(store))
    total += 16 * (len(store.keys) + len(store.holdout_keys))
    return Need(len(missing), sum(piece.count for piece in missing), size, total)


def refuse_if_full(store: LabelStore, wanted: Need) -> None:
    """Refuse to begin what will not fit on the disk. Raises InputError."""
    free = shutil.disk_usage(store.folder).free
    if wanted.bytes + _SPARE_BYTES > free:
        raise refuse(
            f"label store {store.folder}",
            f"{free / 1e9:.2f} GB free on its disk",
            f"{(wanted.bytes + _SPARE_BYTES) / 1e9:.2f} GB",
            "free some, choose another folder, or ask for fewer --epochs or a smaller --topk",
        )


def build_pieces(
    store: LabelStore,
    dataset: Dataset,
    teacher_logits: TeacherLogits,
    *,
    part: tuple[int, int] = (1, 1),
    batch_size: int = TEACHER_BATCH,
    device: str = "cpu",
    tick: Tick = no_tick,
) -> None:
    """Make the pieces of one part of a store that are missing.

    `teacher_logits` takes normalised inputs [B, 3, S, S] and gives logits [B, C]. A piece is a
    function of the store's specification alone and is put in place whole: a killed build goes on
    with the pieces that are missing, and parts may be made by processes or machines that share
    nothing (`merge_stores`). `batch_size` bounds the images held at a time, in whole batches of the
    teacher, and changes no label. `tick` counts images, those of finished pieces too. Raises
    InputError.
    """
    todo = own_pieces(store, part)
    aside = store.folder / f".part-{part[0]}-{part[1]}"
    try:
        _remove_abandoned(store.folder)
        aside.mkdir(exist_ok=True)
        with FileLock(aside / "lock"):
            refuse_if_full(store, need(store, part))
            aside.mkdir(exist_ok=True)
            remove_leftovers(aside)  # of a killed builder: the lock is ours
            maker = _Maker(store, dataset, teacher_logits, batch_size, device)
            for piece in todo:
                if is_made(store, piece):
                    tick(float(piece.count))
                    continue
                data = maker.make(piece, tick)
                _put(store.folder / piece.name, data, aside)
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise refuse(
            "label store",
            f"{store.folder} ({error})",
            "a folder with room to write",
            "what is finished is kept; build again to go on",
        ) from error


def _remove_abandoned(folder: Path) -> None:
    """Remove the drafts of builders that were killed: nobody holds their lock."""
    for aside in folder.glob(".part-*"):
        with contextlib.suppress(OSError, Timeout), FileLock(aside / "lock", timeout=0):
            shutil.rmtree(aside, ignore_errors=True)


def _put(path: Path, data: bytes, aside: Path) -> None:
    """Write a piece aside, where only its own part cleans up, and rename it into place."""
    path.parent.mkdir(exist_ok=True)
    draft = aside / path.name
    try:
        write_atomic(draft, data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class _Maker:
    """Makes pieces: views of the images, the teacher's logits, encoded records."""

    def __init__(
        self,
        store: LabelStore,
        dataset: Dataset,
        teacher_logits: TeacherLogits,
        batch_size: int,
        device: str,
    ) -> None:
        self._store, self._logits = store, teacher_logits
        self._held = -(-batch_size // TEACHER_BATCH) * TEACHER_BATCH
        self._holdout = dataset.holdout
        self._holdout_rows = _rows_of(dataset.holdout, store.holdout_keys, store)
        self._rows = _rows_of(dataset.train, store.keys, store)
        augmenter = make_augmenter(store.spec.augment, device)
        self._views = Views(dataset.train.pixels, augmenter, store.spec.augment)
        self._planned: tuple[int, Plan] | None = None

    def make(self, piece: Piece, tick: Tick) -> bytes:
        """Label a piece's images; the bytes of its file."""
        spec = self._store.spec
        records = np.empty((piece.count, self._store.codec.record_bytes), dtype=np.uint8)
        plan = None if piece.epoch == HOLDOUT_EPOCH else self._plan(piece.epoch)
        for part in _slices(piece.count, self._held):
            at = np.arange(piece.start + part.start, piece.start + part.stop)
            if plan is None:
                pixels = self._holdout.pixels[self._holdout_rows[at]]
                inputs = eval_batch(pixels, spec.augment)
            else:
                inputs = self._views.inputs(plan.of(at))
            with torch.no_grad():
                groups = torch.split(inputs, TEACHER_BATCH)
                logits = torch.cat([self._logits(group) for group in groups])
            if logits.shape[1] != spec.num_classes:
                raise refuse("teacher", f"{logits.shape[1]} classes", f"{spec.num_classes} classes")
            labels = top_labels(logits, spec.topk)
            records[part] = self._store.codec.encode(labels.index, labels.prob, labels.tail)
            tick(float(len(at)))
        return sealed(piece, self._store.id, records)

    def _plan(self, epoch: int) -> Plan:
        if self._planned is None or self._planned[0] != epoch:
            made = make_plan(self._store.codes(epoch), self._rows, self._store.spec.augment)
            self._planned = (epoch, made)
        return self._planned[1]


def _rows_of(split: Split, keys: StoredKeys, store: LabelStore) -> NDArray[np.int64]:
    """Find a store's images in a split: rows int64, in the order of the store's keys."""
    rows = find_rows(raw_keys(split.keys), keys.raw(slice(None)))
    if (rows < 0).any():
        raise refuse(
            f"label store {store.folder}",
            f"{int((rows < 0).sum())} images that are not in the data",
            "the data that it was begun with",
            "restore them, or build another store",
        )
    return rows


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def merge_stores(folder: Path, parts: Sequence[Path], tick: Tick = no_tick) -> LabelStore:
    """Copy the pieces that other machines made into one store; every piece is checked first.

    All must be parts of the same store. `tick` counts pieces. Raises InputError.
    """
    first = read_manifest(Path(parts[0]))
    folder, epochs = Path(folder), first["epochs"]
    for part in [Path(p) for p in parts] + ([folder] if (folder / MANIFEST).exists() else []):
        manifest = read_manifest(part)
        refuse_other(
            part,
            identity(StoreSpec.from_dict(manifest["spec"]), manifest["libraries"]),
            identity(StoreSpec.from_dict(first["spec"]), first["libraries"]),
        )
        epochs = max(epochs, manifest["epochs"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            remove_leftovers(folder)
            for name in first["files"]:
                write_atomic(folder / name, (Path(parts[0]) / name).read_bytes())
            write_sealed(folder / MANIFEST, {**first, "epochs": epochs})
            store = LabelStore(folder, read_manifest(folder))
            for part in map(Path, parts):
                _copy_pieces(LabelStore(part, read_manifest(part)), store, tick)
    except OSError as error:
        raise refuse("label store", f"{folder} ({error})", "a folder with room to write") from error
    return store


def _copy_pieces(source: LabelStore, store: LabelStore, tick: Tick) -> None:
    """Copy what one store has and the other lacks, checking it first."""
    aside = store.folder / ".merge"
    aside.mkdir(exist_ok=True)
    remove_leftovers(aside)
    for piece in all_pieces(source):
        if (source.folder / piece.name).is_file() and not is_made(store, piece):
            source.map(piece)
            _put(store.folder / piece.name, (source.folder / piece.name).read_bytes(), aside)
        tick(1.0)
    shutil.rmtree(aside, ignore_errors=True)
