"""The soft-label store: what the teacher said, made once and kept.

    manifest.json     what decides the store, sealed; how many epochs it is to have
    keys.bin          the keys of the labelled images, sorted (16 bytes each)
    holdout-keys.bin  the same of the holdout
    dropped.csv       images left out because teacher and label disagreed (`--clean`)
    epoch-0000/00000.bin ...   pieces: fixed records, each file with a seal of its own
    holdout/00000.bin ...      labels of the holdout's evaluation inputs

A record holds the teacher's K best classes and nothing else: keys are told once, in `keys.bin`,
and the augmentation's code follows from key, epoch and the store's salt. A store is named by a hash
of all that decides a record, the number of epochs excepted: it grows by whole pieces, and existing
ones never change.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.data import Dataset
from nas.data.augment.spec import augmentation_codes
from nas.data.sealed_files import digest_of, file_sha256, read_sealed
from nas.labels.codec import make_codec
from nas.labels.keys import StoredKeys, map_keys
from nas.labels.shards import HOLDOUT_EPOCH, Piece, map_piece, pieces_of
from nas.labels.soft_labels import Labels
from nas.labels.store_spec import (
    SCHEMA,
    StoreSpec,
    check_use,
    identity,
    library_versions,
    refuse_other,
)
from space.checks import read_int
from space.errors import InputError, refuse

Rows = NDArray[np.int64]
MANIFEST, KEYS, HOLDOUT_KEYS, DROPPED = (
    "manifest.json",
    "keys.bin",
    "holdout-keys.bin",
    "dropped.csv",
)


class LabelStore:
    """An opened store. Labels are read from maps, a piece's bytes being checked when it is opened
    first: memory does not grow with the number of images."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.spec = StoreSpec.from_dict(manifest["spec"])
        self.id: str = manifest["id"]
        self.epochs: int = manifest["epochs"]
        self.libraries: Mapping[str, str] = manifest["libraries"]
        self.piece_records: int = manifest["piece_records"]
        self.codec = make_codec(self.spec.codec, self.spec.topk, self.spec.num_classes)
        try:
            self.keys = StoredKeys(map_keys(folder / KEYS, self.spec.train_images))
            self.holdout_keys = StoredKeys(
                map_keys(folder / HOLDOUT_KEYS, self.spec.holdout_images)
            )
        except (OSError, ValueError) as error:
            raise damaged(folder, error) from error

    def pieces(self, epoch: int) -> list[Piece]:
        """List the pieces of an epoch (-1: the holdout)."""
        holdout = epoch == HOLDOUT_EPOCH
        images = self.spec.holdout_images if holdout else self.spec.train_images
        return pieces_of(epoch, images, self.piece_records)

    def codes(self, epoch: int, rows: slice | Rows = slice(None)) -> NDArray[np.uint64]:
        """Derive the augmentation codes of rows of the key table in an epoch: uint64 [m]."""
        return augmentation_codes(self.keys.raw(rows), epoch, self.spec.salt)

    def epoch(self, epoch: int) -> EpochLabels:
        """Open a stored epoch, 0 <= epoch < epochs. Raises InputError."""
        assert 0 <= epoch < self.epochs, (epoch, self.epochs)
        return EpochLabels(self, epoch)

    def holdout(self) -> EpochLabels:
        """Open the labels of the holdout's evaluation inputs. Raises InputError."""
        return EpochLabels(self, HOLDOUT_EPOCH)

    def map(self, piece: Piece, *, check: bool = True) -> NDArray[np.uint8]:
        """Map a piece's records. Raises InputError naming what is missing or damaged."""
        try:
            return map_piece(
                self.folder / piece.name, piece, self.id, self.codec.record_bytes, check=check
            )
        except FileNotFoundError:
            raise refuse(
                f"label store {self.folder}",
                f"no piece {piece.name}",
                "all its pieces",
                "build it to the end",
            ) from None
        except (OSError, ValueError) as error:
            raise damaged(self.folder, error) from error


class EpochLabels:
    """The labels of one epoch, or of the holdout; rows are those of the store's key table."""

    def __init__(self, store: LabelStore, epoch: int) -> None:
        self._codec = store.codec
        self._size = store.piece_records
        self._maps = [store.map(piece) for piece in store.pieces(epoch)]

    def __len__(self) -> int:
        return sum(len(records) for records in self._maps)

    def records(self, rows: Rows) -> NDArray[np.uint8]:
        """Gather records of rows in any order: uint8 [m, R]."""
        if len(self._maps) == 1:
            return np.take(self._maps[0], rows, axis=0)
        out = np.empty((len(rows), self._codec.record_bytes), dtype=np.uint8)
        piece = rows // self._size
        order = np.argsort(piece, kind="stable")
        ends = np.searchsorted(piece[order], np.arange(len(self._maps) + 1))
        for number in np.flatnonzero(np.diff(ends)):
            here = order[ends[number] : ends[number + 1]]
            out[here] = np.take(self._maps[number], rows[here] - number * self._size, axis=0)
        return out

    def __getitem__(self, rows: Rows) -> Labels:
        """Decode the labels of rows in any order, ready for the loss."""
        return Labels(*self._codec.decode(self.records(np.asarray(rows, dtype=np.int64))))


def damaged(folder: Path, why: object) -> Exception:
    """Say that a store is not as it was written."""
    return refuse(
        f"label store {folder}",
        why,
        "the files as they were written",
        "delete what is damaged and build again; `nas.labels verify` lists it",
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a store's manifest. Raises InputError."""
    path = folder / MANIFEST
    if not path.exists():
        raise refuse("label store", folder, "a folder made by this toolkit")
    try:
        manifest = read_sealed(path)
        if manifest["schema"] != SCHEMA:
            raise refuse(
                f"label store {folder}",
                f"schema {manifest['schema']}",
                f"schema {SCHEMA}, which this version reads",
                "build it anew",
            )
        odd = sorted(dict(manifest["files"]).keys() - {KEYS, HOLDOUT_KEYS, DROPPED})
        if odd:  # they are hashed and copied by name
            raise refuse(f"{path}: files", odd[0], f"{KEYS}, {HOLDOUT_KEYS} and {DROPPED} only")
        spec = StoreSpec.from_dict(manifest["spec"])
        if manifest["id"] != digest_of(identity(spec, manifest["libraries"])):
            raise ValueError("its id does not fit its content")
        for name in ("epochs", "piece_records"):
            read_int(f"{path}: {name}", manifest[name], 1, 2**31)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{MANIFEST}: {error}") from error
    return manifest


def open_store(
    folder: Path,
    *,
    expect: StoreSpec | None = None,
    use: Dataset | None = None,
    epochs: int | None = None,
) -> LabelStore:
    """Open a store: manifest, key tables and the presence of its pieces are checked here, a
    piece's bytes when it is read, everything by `nas.labels.verify`.

    With `expect`, it must be exactly the store of that specification; with `use`, fit that data
    set (see `nas.labels.store_spec.check_use`); with `epochs`, hold at least so many. Raises
    InputError
    naming both sides of each mismatch, or what is damaged or missing.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    spec = StoreSpec.from_dict(manifest["spec"])
    if expect is not None:
        have = identity(spec, manifest["libraries"])
        refuse_other(folder, have, identity(expect, library_versions()))
    if use is not None:
        check_use(folder, spec, manifest["libraries"], use)
    for name, sha256 in manifest["files"].items():
        if _hash(folder / name) != sha256:
            raise damaged(folder, f"{name} does not fit its checksum")
    store = LabelStore(folder, manifest)
    if epochs is not None and store.epochs < epochs:
        raise refuse(
            f"label store {folder}",
            f"{store.epochs} epochs",
            f"{epochs} epochs",
            "build more, or let the labels start again (--beyond cycle)",
        )
    for epoch in (HOLDOUT_EPOCH, *range(store.epochs)):
        for piece in store.pieces(epoch):
            if not (folder / piece.name).is_file():
                store.map(piece)  # says what is missing
    return store


def _hash(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


def dropped_keys(store: LabelStore) -> frozenset[str]:
    """List the keys that `--clean` left out on purpose; empty without it."""
    if DROPPED not in store.manifest["files"]:
        return frozenset()
    try:
        return read_dropped((store.folder / DROPPED).read_bytes())
    except OSError as error:
        raise damaged(store.folder, error) from error


def read_dropped(table: bytes) -> frozenset[str]:
    """Read the keys of a table of dropped images. Raises InputError."""
    want = "a table with a column `key`, 32 hex characters each"
    try:
        rows = list(csv.DictReader(io.StringIO(table.decode("utf-8"), newline=""), strict=True))
        keys = frozenset(str(row["key"]) for row in rows)
    except (ValueError, KeyError, csv.Error) as error:
        got = f"{type(error).__name__}: {error}"
        raise refuse(DROPPED, got, want, "build the store anew") from None
    for key in keys:
        if len(key) != 32 or set(key) - set("0123456789abcdef"):
            raise refuse(DROPPED, key, want, "build the store anew")
    return keys
