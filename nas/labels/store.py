"""The label store: a teacher's soft labels of augmented images, computed once and kept on disk.

    manifest.json     the specification, the number of epochs, the sha256 of each table below
    keys.bin          keys of the labelled images, sorted (16 bytes each)
    holdout-keys.bin  keys of the holdout's images
    dropped.csv       images left out because teacher and label disagree (`--clean`)
    epoch-0000/00000.bin ...   shards: records of one size, then a sha256 of 32 bytes
    holdout/00000.bin ...      labels of the holdout's evaluation inputs

A record holds the teacher's K best classes and nothing else: its row of the key table names the image, and the
augmentation's code follows from key, epoch and the store's salt. A store's id hashes all that decides a record. The
number of epochs does not: a store grows by whole shards, and existing ones never change.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.dataclass_json import from_json, to_json
from nas.core.io import digest_of, file_sha256, read_json
from nas.data import Dataset
from nas.data.augment.spec import AugmentSpec, augmentation_codes
from nas.labels.codec import SoftLabels, make_codec
from nas.labels.request import check_precision, match_store_classes
from space.errors import InputError, read_int, refuse

Rows = NDArray[np.int64]
Keys = NDArray[np.bytes_]
"""Keys of images, 16 bytes each: dtype S16."""

SCHEMA = 4
MANIFEST, DROPPED = "manifest.json", "dropped.csv"
KEYS, HOLDOUT_KEYS = "keys.bin", "holdout-keys.bin"
HOLDOUT_EPOCH = -1
TEACHER_BATCH = 64
"""Images in a batch of the teacher. Other sizes give other last bits, so it is fixed."""
TEMPERATURE = 1.0
"""Of the stored labels; `nas.train.losses.retemper` gives those of any other."""
CHECKSUM_BYTES = 32
MIN_RECORDS, MAX_RECORDS = 512, 65_536
LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision")


@dataclass(frozen=True)
class StoreSpec:
    """All that decides the content of a store, except the number of epochs. Raises InputError.

    Labels keep `topk` of the named `classes`, in the order of the teacher's logits. `train_keys` and `holdout_keys`
    hash the sets of labelled images, `preparation` how their pixels are made, `teacher_hash` the teacher's weights.
    `precision`, `threads` and `device` ("cpu" or "cuda") are those of the teacher: others give other last bits.
    """

    topk: int
    augment: AugmentSpec
    salt: int
    codec: str
    preparation: str
    train_keys: str
    train_images: int
    holdout_keys: str
    holdout_images: int
    teacher_id: str
    teacher_hash: str
    classes: tuple[str, ...]
    threads: int
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self) -> None:
        make_codec(self.codec, self.topk, self.num_classes)
        check_precision(self.precision, self.device)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def library_versions() -> dict[str, str]:
    """Return the versions of all libraries that take part in making a label or an input."""
    return {name: version(name) for name in LIBRARIES}


def identity(spec: StoreSpec, libraries: Mapping[str, str]) -> dict[str, Any]:
    """Collect all that a store's id hashes, as plain JSON."""
    fixed = {"schema": SCHEMA, "teacher_batch": TEACHER_BATCH, "temperature": TEMPERATURE}
    return {**fixed, **to_json(spec), "libraries": dict(libraries)}


def check_same(folder: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Raise InputError that names both sides of every field in which two identities differ."""
    odd = [name for name in want if have.get(name) != want[name]]
    if odd:
        got = "; ".join(f"{name} {_difference(have.get(name), want[name])}" for name in odd)
        wanted = "; ".join(f"{name} {_difference(want[name], have.get(name))}" for name in odd)
        raise refuse(
            f"label store {folder}", got, wanted, "build another store, or leave --labels out to have one built"
        )


def _difference(value: object, other: object) -> object:
    """Return a field, or only the differing entries of a table, the first one of a list of names."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: v for k, v in value.items() if other.get(k) != v}
    if isinstance(value, list) and isinstance(other, list) and isinstance(value[0], str):
        at = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), len(other))
        return f"{len(value)}" + (f", number {at} {value[at]!r}" if at < len(value) else "")
    return value


def check_use(store: LabelStore, dataset: Dataset) -> Rows | None:
    """Reject a store whose labels or inputs would be wrong on this data set or installation.

    The images may differ: which of them have labels is asked key by key. Classes are matched by name: those in
    another order are no mismatch, and the data's number of each of the store's classes is returned, int64 [C]; else
    None. Raises InputError.
    """
    spec = store.spec
    pairs = {
        "preparation": (spec.preparation, dataset.preparation),
        "resolution": (spec.augment.img_size, dataset.img_size),
        "mean": (list(spec.augment.mean), list(dataset.mean)),
        "std": (list(spec.augment.std), list(dataset.std)),
        "libraries": (dict(store.libraries), library_versions()),
    }
    check_same(store.folder, *({name: pair[side] for name, pair in pairs.items()} for side in (0, 1)))
    if not dataset.labelled:
        return None
    match = match_store_classes(store.folder, spec.classes, dataset.classes)
    return None if match.in_order else np.argsort(np.array(match.rows, dtype=np.int64))


def key_array(keys: Any) -> Keys:
    """Turn hex keys, or a table with their bytes as `raw` uint8 [n, 16], into S16 [n]."""
    raw = getattr(keys, "raw", None)
    if raw is None:
        raw = np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, 16)
    found: Keys = np.ascontiguousarray(raw).view("S16")[:, 0]
    return found


def key_bytes(keys: Keys) -> NDArray[np.uint8]:
    """Turn S16 [n] into uint8 [n, 16]."""
    return np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 16)


def find_rows(among: Keys, wanted: Keys) -> Rows:
    """Find keys [m] in a sorted table [n]: rows int64 [m], -1 for a key that is not there."""
    if not len(among):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return np.where(among[at] == wanted, at, -1)


def keys_digest(keys: Keys) -> str:
    """Hash a sorted table of keys: the sha256 of its file, 64 hex characters."""
    return hashlib.sha256(keys.tobytes()).hexdigest()


def _map_keys(path: Path, count: int) -> Keys:
    """Map a table of keys. Raises OSError, or ValueError for a file of another length."""
    size = path.stat().st_size
    if size != 16 * count:
        raise ValueError(f"{path.name} has {size} bytes instead of {16 * count}")
    if not count:
        return np.empty(0, dtype="S16")
    return np.memmap(path, dtype="S16", mode="r")


@dataclass(frozen=True)
class Shard:
    """A file of `count` records of one epoch (-1: the holdout), from row `start` of the keys."""

    epoch: int
    number: int
    start: int
    count: int

    @property
    def name(self) -> str:
        """Path inside its store, with forward slashes."""
        folder = "holdout" if self.epoch == HOLDOUT_EPOCH else f"epoch-{self.epoch:04d}"
        return f"{folder}/{self.number:05d}.bin"


def records_per_shard(images: int) -> int:
    """Choose a shard's number of records: about sixteen shards an epoch, 512 to 65,536 records.

    Always a multiple of the teacher's batch, so that shards never share one.
    """
    return min(MAX_RECORDS, max(MIN_RECORDS, 1 << max(images // 16, 1).bit_length() - 1))


def shards_of(epoch: int, images: int, records: int) -> list[Shard]:
    """List the shards of an epoch, in order."""
    return [
        Shard(epoch, number, start, min(records, images - start))
        for number, start in enumerate(range(0, images, records))
    ]


def with_checksum(shard: Shard, store_id: str, records: NDArray[np.uint8]) -> bytes:
    """Turn uint8 [count, R] into the bytes of a shard's file."""
    assert records.shape[0] == shard.count, (records.shape, shard)
    body = np.ascontiguousarray(records).tobytes()
    return body + _checksum(shard, store_id, body)


def _checksum(shard: Shard, store_id: str, body: bytes | memoryview) -> bytes:
    """Hash a shard's records and its place, so that a file in another's place does not fit."""
    total = hashlib.sha256(f"{store_id} {shard.name}\n".encode())
    total.update(body)
    return total.digest()


def map_shard(path: Path, shard: Shard, store_id: str, record_bytes: int) -> NDArray[np.uint8]:
    """Map a shard's records, uint8 [count, R] read-only, once every byte was read and compared.

    Raises OSError, or ValueError with the reason.
    """
    size, want = os.stat(path).st_size, shard.count * record_bytes + CHECKSUM_BYTES
    if size != want:
        raise ValueError(f"{shard.name} has {size} bytes instead of {want}")
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    body = whole[:-CHECKSUM_BYTES]
    if bytes(whole[-CHECKSUM_BYTES:]) != _checksum(shard, store_id, memoryview(body.data)):
        raise ValueError(f"{shard.name} does not fit its checksum: damaged, or of another store or place")
    return np.asarray(body).reshape(shard.count, record_bytes)


class LabelStore:
    """An opened store. Records are mapped, and a shard's bytes are checked when it is mapped:
    memory does not grow with the number of images. `class_order` is the number of each of the store's
    classes in the data that it is opened for, int64 [C]; None: its own."""

    class_order: Rows | None = None

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.spec: StoreSpec = from_json(StoreSpec, manifest["spec"])
        self.id: str = manifest["id"]
        self.epochs: int = manifest["epochs"]
        self.libraries: Mapping[str, str] = manifest["libraries"]
        self.shard_records: int = manifest["shard_records"]
        self.codec = make_codec(self.spec.codec, self.spec.topk, self.spec.num_classes)
        try:
            self.keys = _map_keys(folder / KEYS, self.spec.train_images)
            self.holdout_keys = _map_keys(folder / HOLDOUT_KEYS, self.spec.holdout_images)
        except (OSError, ValueError) as error:
            raise damaged(folder, error) from error

    @property
    def title(self) -> str:
        """How messages name the store."""
        return f"label store {self.folder}"

    @property
    def identity(self) -> dict[str, Any]:
        """All that the store's id hashes."""
        return identity(self.spec, self.libraries)

    def shards(self, epoch: int) -> list[Shard]:
        """List the shards of an epoch (-1: the holdout)."""
        holdout = epoch == HOLDOUT_EPOCH
        images = self.spec.holdout_images if holdout else self.spec.train_images
        return shards_of(epoch, images, self.shard_records)

    def all_shards(self) -> list[Shard]:
        """List all shards in the order in which they are built: the holdout's first."""
        every = (HOLDOUT_EPOCH, *range(self.epochs))
        return [shard for epoch in every for shard in self.shards(epoch)]

    def codes(self, epoch: int, rows: slice | Rows = slice(None)) -> NDArray[np.uint64]:
        """Derive the augmentation codes of rows of the key table in an epoch: uint64 [m]."""
        return augmentation_codes(key_bytes(self.keys[rows]), epoch, self.spec.salt)

    def epoch(self, epoch: int) -> EpochLabels:
        """Open a stored epoch, 0 <= epoch < epochs. Raises InputError."""
        assert 0 <= epoch < self.epochs, (epoch, self.epochs)
        return EpochLabels(self, epoch)

    def holdout(self) -> EpochLabels:
        """Open the labels of the holdout's evaluation inputs. Raises InputError."""
        return EpochLabels(self, HOLDOUT_EPOCH)

    def map(self, shard: Shard) -> NDArray[np.uint8]:
        """Map a shard's records. Raises InputError that names what is missing or damaged."""
        try:
            return map_shard(self.folder / shard.name, shard, self.id, self.codec.record_bytes)
        except FileNotFoundError:
            raise refuse(self.title, f"no shard {shard.name}", "all its shards", "build it to the end") from None
        except (OSError, ValueError) as error:
            raise damaged(self.folder, error) from error


class EpochLabels:
    """The labels of one epoch, or of the holdout; rows are those of the store's key table."""

    def __init__(self, store: LabelStore, epoch: int) -> None:
        self._codec, self._order = store.codec, store.class_order
        self._size = store.shard_records
        self._maps = [store.map(shard) for shard in store.shards(epoch)]

    def __len__(self) -> int:
        return sum(len(records) for records in self._maps)

    def records(self, rows: Rows) -> NDArray[np.uint8]:
        """Gather records of rows in any order: uint8 [m, R]."""
        if len(self._maps) == 1:
            return np.take(self._maps[0], rows, axis=0)
        out = np.empty((len(rows), self._codec.record_bytes), dtype=np.uint8)
        shard = rows // self._size
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            out[here] = np.take(self._maps[number], rows[here] - number * self._size, axis=0)
        return out

    def __getitem__(self, rows: Rows) -> SoftLabels:
        """Decode the labels of rows in any order, with the classes of the data that the store is opened for."""
        found = self._codec.decode(self.records(np.asarray(rows, dtype=np.int64)))
        return found if self._order is None else found._replace(index=self._order[found.index])


def damaged(folder: Path, why: object) -> Exception:
    """Return the error of a store that is not as it was written."""
    remedy = "delete what is damaged and build again; `nas.labels verify` lists it"
    return refuse(f"label store {folder}", why, "the files as they were written", remedy)


def load_store(folder: Path) -> LabelStore:
    """Load a store's manifest and map its key tables; its shards may be missing.

    Raises InputError.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise refuse("label store", folder, "a folder made by this toolkit")
    manifest = read_json(path, "the manifest of a label store")
    try:
        if manifest["schema"] != SCHEMA:
            got = f"schema {manifest['schema']}"
            raise refuse(f"label store {folder}", got, f"schema {SCHEMA}, which this version reads", "build it anew")
        odd = sorted(dict(manifest["files"]).keys() - {KEYS, HOLDOUT_KEYS, DROPPED})
        if odd:  # they are hashed and copied by name
            raise refuse(f"{path}: files", odd[0], f"{KEYS}, {HOLDOUT_KEYS} and {DROPPED} only")
        spec = from_json(StoreSpec, manifest["spec"])
        if manifest["id"] != digest_of(identity(spec, manifest["libraries"])):
            raise ValueError("its id does not fit its content")
        for name in ("epochs", "shard_records"):
            read_int(f"{path}: {name}", manifest[name], 1, 2**31)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{MANIFEST}: {error}") from error
    return LabelStore(folder, manifest)


def open_store(folder: Path, *, use: Dataset | None = None, epochs: int | None = None) -> LabelStore:
    """Open a complete store; a shard's bytes are checked when it is read, all bytes by `nas.labels.verify`.

    With `use`, it must fit that data set (`check_use`), whose class numbers its labels then have; with `epochs`, hold
    at least so many. Raises InputError that names both sides of each mismatch, or what is damaged or missing.
    """
    folder = Path(folder)
    store = load_store(folder)
    if use is not None:
        store.class_order = check_use(store, use)
    for name in store.manifest["files"]:
        if problem := table_problem(store, name):
            raise damaged(folder, problem)
    if epochs is not None and store.epochs < epochs:
        remedy = "build more, or let the labels start again (--label-overflow cycle)"
        raise refuse(store.title, f"{store.epochs} epochs", f"{epochs} epochs", remedy)
    for shard in store.all_shards():
        if not (folder / shard.name).is_file():
            store.map(shard)  # raises
    return store


def table_problem(store: LabelStore, name: str) -> str:
    """Compare a table that the manifest names with its sha256; "" if it fits."""
    try:
        fits = file_sha256(store.folder / name) == store.manifest["files"][name]
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    return "" if fits else f"{name}: does not fit its checksum"


def dropped_keys(store: LabelStore) -> frozenset[str]:
    """Return the keys that `--clean` left out on purpose; empty without it."""
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
