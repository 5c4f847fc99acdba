"""Is a store still what was written, and does its teacher still say so?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nas.core.progress import Tick, no_tick
from nas.data import Dataset
from nas.data.sealed_files import file_sha256
from nas.labels.build import TeacherLogits, all_pieces
from nas.labels.reader import Replay
from nas.labels.shards import Piece, map_piece
from nas.labels.soft_labels import top_labels
from nas.labels.store import MANIFEST, LabelStore, read_manifest
from nas.labels.store_spec import TEACHER_BATCH
from space.errors import InputError, refuse

MEAN_KL, WORST_KL = 2e-3, 5e-2
"""Nats by which a label may differ from what its teacher says now: the packed codec's rounding, and
a last bit that another batch of the teacher rounds another way."""


def problems(folder: Path, tick: Tick = no_tick) -> Iterator[str]:
    """Read every byte of a store and name what is wrong, one line each; nothing for a whole one.

    Finds any flipped bit, cut or missing file, pieces of other stores or places, and files that
    belong to none. `tick` counts bytes. Locks and drafts of a killed builder, which are hidden, are
    no part of a store.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        yield str(error)
        return
    known = {MANIFEST, *manifest["files"]}
    for name, sha256 in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if file_sha256(folder / name) != sha256:
                yield f"{name}: does not fit its checksum"
            tick(float(size))
        except OSError as error:
            yield f"{name}: {error.strerror or error}"
    try:
        store = LabelStore(folder, manifest)
    except InputError as error:
        yield str(error)
        return
    for piece in all_pieces(store):
        known.add(piece.name)
        try:
            store.map(piece)
        except InputError:
            yield f"{piece.name}: {_why(store, piece)}"
        tick(float(piece.count * store.codec.record_bytes))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_file() and name not in known and not hidden:
            yield f"{name}: is no piece of this store"


def _why(store: LabelStore, piece: Piece) -> str:
    try:
        map_piece(store.folder / piece.name, piece, store.id, store.codec.record_bytes)
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{piece.name} ")
    return "was damaged when it was read first, and is not now"


@dataclass(frozen=True)
class Agreement:
    """How stored labels compare with what the teacher says now: divergences in nats (KL of the
    label made now from the stored one), over `records`."""

    records: int
    mean_kl: float
    worst_kl: float

    @property
    def good(self) -> bool:
        """Tell whether nothing but rounding is between them."""
        return self.mean_kl <= MEAN_KL and self.worst_kl <= WORST_KL


def ask_teacher(
    store: LabelStore,
    dataset: Dataset,
    teacher_logits: TeacherLogits,
    records: int,
    random_seed: int,
    device: str = "cpu",
    tick: Tick = no_tick,
) -> Agreement:
    """Run the teacher on random records and compare. Raises InputError."""
    if records < 1:
        raise refuse("--teacher", records, "an integer >= 1")
    replay = Replay(dataset.train, store, TEACHER_BATCH, 0, missing="skip", device=device)
    draws = np.random.PCG64(random_seed).random_raw(2 * records)
    epochs = draws[:records] % store.epochs
    found: list[float] = []
    for epoch in np.unique(epochs):
        count = int((epochs == epoch).sum())
        usable = replay.present(int(epoch))
        at = np.unique(draws[records : records + count] % len(usable))
        draws = np.concatenate([draws[:records], draws[records + count :]])
        rows = usable[at.astype(np.int64)]
        for part in np.array_split(rows, -(-len(rows) // TEACHER_BATCH)):
            found += _divergences(store, replay, int(epoch), part, teacher_logits)
            tick(float(len(part)))
    return Agreement(len(found), float(np.mean(found)), float(np.max(found)))


def _divergences(
    store: LabelStore, replay: Replay, epoch: int, rows: np.ndarray, teacher_logits: TeacherLogits
) -> list[float]:
    with torch.no_grad():
        logits = teacher_logits(replay.inputs(epoch, rows)).double()
    classes, topk = store.spec.num_classes, store.spec.topk
    now = top_labels(logits, topk)
    was = replay.labels(epoch, rows)
    dense = []
    for said in (now, was):
        each = said.tail.astype(np.float64) / (classes - topk)
        table = np.repeat(each[:, None], classes, axis=1)
        np.put_along_axis(table, said.index, said.prob.astype(np.float64), axis=1)
        dense.append(table)
    p, q = dense
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / np.maximum(q, 1e-30)), 0.0)
    return [max(0.0, float(value)) for value in terms.sum(1)]
