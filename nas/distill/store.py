"""The soft-label store: what the teacher said, made once and kept.

A store is a folder `<root>/<id>/` with a sealed `manifest.json` and one piece per epoch
(`epoch-0000.safetensors`) and one for the holdout (`holdout.safetensors`). A piece is a table,
one row per image, sorted by key:

    keys   uint8 [n, 16]             content hash of the image
    codes  uint64 [n]                its augmentation in this epoch (0 in the holdout)
    index  uint8|uint16|int32 [n, K] the teacher's K best classes, best first
    prob   float32 [n, K]            their probabilities at temperature 1
    tail   float32 [n]               what is left for the other classes, >= 0

The folder's name is a hash of all that decides a piece, the number of epochs excepted: a store
grows by whole pieces, and existing ones never change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.numpy import load as load_tables
from safetensors.numpy import save as save_tables

from nas.data import Dataset, Split
from nas.data.files import digest_of, file_sha256, read_sealed, write_sealed
from nas.distill.augment import Augmenter, AugmentSpec, augmentation_code, eval_batch
from nas.distill.labels import Labels, comparable, index_type, raw_keys, top_labels
from nas.files import remove_leftovers, write_atomic
from nas.jobs import Tick, no_tick
from space.errors import refuse

SCHEMA = 1
HOLDOUT = "holdout"
TEACHER_BATCH = 64
"""Images that the teacher sees at a time. Other sizes give other last bits, so it is fixed."""
TeacherLogits = Callable[[torch.Tensor], torch.Tensor]
_LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision")


@dataclass(frozen=True)
class StoreSpec:
    """All that decides a store. `teacher_hash` is of its weights; `threads` are torch's, since
    other threads give other bits; `topk` is at most `num_classes` - 1. Raises InputError."""

    epochs: int
    topk: int
    augment: AugmentSpec
    salt: int
    dataset_fingerprint: str
    teacher_id: str
    teacher_hash: str
    num_classes: int
    threads: int

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise refuse("label epochs", self.epochs, "an integer >= 1")
        if not 1 <= self.topk < self.num_classes:
            raise refuse("top-K", self.topk, f"1 to {self.num_classes - 1} (classes - 1)")

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON."""
        return {**asdict(self), "augment": self.augment.to_dict()}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> StoreSpec:
        """Read plain JSON, the inverse of `to_dict`."""
        return StoreSpec(**{**value, "augment": AugmentSpec.from_dict(value["augment"])})


def default_topk(num_classes: int) -> int:
    """Keep ten classes, or all but one."""
    return min(10, num_classes - 1)


def library_versions() -> dict[str, str]:
    """Name the versions of all that takes part in making a label or replaying an input."""
    return {name: version(name) for name in _LIBRARIES}


def _identity(spec: StoreSpec, libraries: Mapping[str, str]) -> dict[str, Any]:
    value = {k: v for k, v in spec.to_dict().items() if k != "epochs"}
    fixed = {"schema": SCHEMA, "teacher_batch": TEACHER_BATCH}
    return {**fixed, **value, "libraries": dict(libraries)}


def store_id(spec: StoreSpec) -> str:
    """Name the folder of a store: 32 hex characters, the same for any number of epochs."""
    return digest_of(_identity(spec, library_versions()))


def _piece_name(epoch: int) -> str:
    return f"epoch-{epoch:04d}"


class LabelStore:
    """An opened store: checked, read piece by piece."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self._pieces: Mapping[str, Mapping[str, Any]] = manifest["pieces"]
        self.epochs = sum(name != HOLDOUT for name in self._pieces)
        self.spec = replace(StoreSpec.from_dict(manifest["spec"]), epochs=max(1, self.epochs))
        self.id: str = digest_of(_identity(self.spec, manifest["libraries"]))
        self.libraries: Mapping[str, str] = manifest["libraries"]

    @property
    def digest(self) -> str:
        """Hash the identity and every piece; it changes when the store grows (`id` does not)."""
        hashes = {name: piece["sha256"] for name, piece in self._pieces.items()}
        return digest_of({"id": self.id, "pieces": hashes})

    def epoch(self, epoch: int) -> Labels:
        """Read the labels of a stored epoch, 0 <= epoch < epochs. Raises InputError."""
        assert 0 <= epoch < self.epochs, (epoch, self.epochs)
        return self._read(_piece_name(epoch))

    def holdout(self) -> Labels:
        """Read the labels of the holdout's evaluation inputs. Raises InputError."""
        return self._read(HOLDOUT)

    def _read(self, name: str) -> Labels:
        return _read_piece(self.folder, name, self._pieces[name])


def _damaged(folder: Path, why: object) -> Exception:
    return refuse(
        f"label store {folder}", why, "the files as they were written", "delete the folder"
    )


def _read_piece(folder: Path, name: str, want: Mapping[str, Any]) -> Labels:
    path = folder / f"{name}.safetensors"
    try:
        data = path.read_bytes()
        if len(data) != want["bytes"]:
            raise ValueError(f"{path.name} has {len(data)} bytes instead of {want['bytes']}")
        table = load_tables(data)
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error
    keys = comparable(table.pop("keys"))
    return Labels(keys=keys, **table)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / "manifest.json").exists():
        raise refuse("label store", folder, "a folder made by this toolkit")
    try:
        manifest = read_sealed(folder / "manifest.json")
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']}, this version reads {SCHEMA}")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, f"manifest.json: {error}") from error
    return manifest


def _refuse_mismatch(folder: Path, manifest: Mapping[str, Any], expect: StoreSpec) -> None:
    """Name every field in which a store and its use differ. `epochs` may be more than asked."""
    have = {**manifest, **manifest["spec"]}
    want = _identity(expect, library_versions())
    odd = [name for name in want if have[name] != want[name]]
    if odd:
        raise refuse(
            f"label store {folder}",
            "; ".join(f"{name} {_shown(have[name], want[name])}" for name in odd),
            "; ".join(f"{name} {_shown(want[name], have[name])}" for name in odd),
            "leave --labels out to have a fitting store built",
        )


def _shown(value: object, other: object) -> object:
    """Show a field, or only the differing entries of a table."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: v for k, v in value.items() if other.get(k) != v}
    return value


def open_store(folder: Path, expect: StoreSpec | None) -> LabelStore:
    """Open a store, checking every byte of its pieces and, if given, that it is the one expected.

    Raises InputError naming both sides of each mismatch, or what is damaged or missing.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if expect is not None:
        _refuse_mismatch(folder, manifest, expect)
    for name, want in manifest["pieces"].items():
        path = folder / f"{name}.safetensors"
        try:
            fits = path.stat().st_size == want["bytes"] and file_sha256(path) == want["sha256"]
        except OSError as error:
            raise _damaged(folder, error) from error
        if not fits:
            raise _damaged(folder, f"{path.name} does not fit its checksum")
    store = LabelStore(folder, manifest)
    if HOLDOUT not in manifest["pieces"] or store.epochs < 1:
        raise refuse(f"label store {folder}", "an unfinished store", "all its pieces", "build it")
    if expect is not None and store.epochs < expect.epochs:
        raise refuse(f"label store {folder}", f"{store.epochs} epochs", f"{expect.epochs} epochs")
    return store


def build_store(
    root: Path,
    spec: StoreSpec,
    dataset: Dataset,
    teacher_logits: TeacherLogits,
    batch_size: int,
    tick: Tick = no_tick,
) -> Path:
    """Make the pieces of a store that are missing; returns its folder.

    `teacher_logits` takes normalised inputs [B, 3, S, S] and gives logits [B, C]. Atomic piece by
    piece, so a killed build goes on where it stopped; a second builder waits for the first.
    `batch_size` bounds the images held at a time (in whole batches of the teacher) and changes no
    label. `tick` counts images, those of finished pieces too. Raises InputError.
    """
    assert spec.dataset_fingerprint == dataset.fingerprint, "the labels of another data set"
    folder = Path(root) / store_id(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            _build_missing(folder, spec, dataset, teacher_logits, batch_size, tick)
    except OSError as error:
        raise refuse("label store", f"{folder} ({error})", "a folder with room to write") from error
    return folder


def _build_missing(
    folder: Path,
    spec: StoreSpec,
    dataset: Dataset,
    teacher_logits: TeacherLogits,
    batch_size: int,
    tick: Tick,
) -> None:
    path = folder / "manifest.json"
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "spec": replace(spec, epochs=1).to_dict(),
        "libraries": library_versions(),
        "augment_digest": spec.augment.digest(),
        "teacher_batch": TEACHER_BATCH,
        "temperature": 1.0,
        "pieces": {},
    }
    if path.exists():
        manifest = _read_manifest(folder)
        _refuse_mismatch(folder, manifest, spec)
    remove_leftovers(folder)  # of a killed builder: the lock is ours
    augmenter = Augmenter(spec.augment)
    for name in (HOLDOUT, *(_piece_name(epoch) for epoch in range(spec.epochs))):
        split = dataset.holdout if name == HOLDOUT else dataset.train
        if name in manifest["pieces"]:
            tick(float(len(split)))
            continue
        epoch = None if name == HOLDOUT else int(name.rsplit("-", 1)[1])
        data = _make_piece(spec, split, epoch, augmenter, teacher_logits, batch_size, tick)
        piece = folder / f"{name}.safetensors"
        write_atomic(piece, data)
        size = {"bytes": len(data), "sha256": file_sha256(piece), "records": len(split)}
        manifest["pieces"] = {**manifest["pieces"], name: size}
        write_sealed(path, manifest)


def _make_piece(
    spec: StoreSpec,
    split: Split,
    epoch: int | None,
    augmenter: Augmenter,
    teacher_logits: TeacherLogits,
    batch_size: int,
    tick: Tick,
) -> bytes:
    """Label one epoch of a split, or its evaluation inputs (epoch None)."""
    n, kind = len(split), index_type(spec.num_classes)
    codes = np.zeros(n, dtype=np.uint64)
    if epoch is not None:
        codes[:] = [augmentation_code(key, epoch, spec.salt) for key in split.keys]
    index = np.empty((n, spec.topk), dtype=kind)
    prob = np.empty((n, spec.topk), dtype=np.float32)
    tail = np.empty(n, dtype=np.float32)
    for rows in _slices(n, -(-batch_size // TEACHER_BATCH) * TEACHER_BATCH):
        pixels = split.pixels[rows]
        inputs = (
            eval_batch(pixels, spec.augment)
            if epoch is None
            else augmenter.batch(pixels, codes[rows].tolist())
        )
        with torch.no_grad():
            logits = torch.cat(
                [teacher_logits(part) for part in torch.split(inputs, TEACHER_BATCH)]
            )
        index[rows], prob[rows], tail[rows] = top_labels(logits, spec.topk)
        tick(float(len(pixels)))
    return bytes(
        save_tables(
            {
                "keys": raw_keys(split.keys),
                "codes": codes,
                "index": index,
                "prob": prob,
                "tail": tail,
            }
        )
    )


def _slices(n: int, size: int) -> Iterator[slice]:
    for piece in range(math.ceil(n / size)):
        yield slice(piece * size, min(n, (piece + 1) * size))
