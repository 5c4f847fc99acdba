"""Verifies a label store: its bytes against their checksums, its labels against the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nas.core.progress import Tick, no_tick
from nas.data import Dataset
from nas.labels.build import TeacherLogits
from nas.labels.codec import SoftLabels, top_labels
from nas.labels.reader import LabelReader
from nas.labels.store import MANIFEST, TEACHER_BATCH, LabelStore, load_store, map_shard, table_problem
from space.errors import InputError, refuse

MEAN_KL, WORST_KL = 2e-3, 5e-2
"""Nats by which a stored label may differ from the teacher's: the packed codec's rounding, and a
last bit that another batch of the teacher rounds another way."""


def find_problems(folder: Path, tick: Tick = no_tick) -> Iterator[str]:
    """Read every byte of a store and yield what is wrong, one line each; `tick` counts bytes.

    Finds flipped bits, cut and missing files, shards of other stores or places, and foreign files that are not hidden.
    """
    folder = Path(folder)
    try:
        store = load_store(folder)
    except InputError as error:
        yield str(error)
        return
    known = {MANIFEST, *store.manifest["files"]}
    for name in store.manifest["files"]:
        if problem := table_problem(store, name):
            yield problem
        else:
            tick(float((folder / name).stat().st_size))
    for shard in store.all_shards():
        known.add(shard.name)
        try:
            map_shard(folder / shard.name, shard, store.id, store.codec.record_bytes)
        except FileNotFoundError:
            yield f"{shard.name}: is missing"
        except (OSError, ValueError) as error:
            yield f"{shard.name}: {str(error).removeprefix(f'{shard.name} ')}"
        tick(float(shard.count * store.codec.record_bytes))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_file() and name not in known and not hidden:
            yield f"{name}: is no shard of this store"


@dataclass(frozen=True)
class Agreement:
    """Kullback-Leibler divergences in nats of stored labels from the teacher's of now."""

    records: int
    mean_kl: float
    worst_kl: float

    @property
    def good(self) -> bool:
        """Whether rounding explains the divergences."""
        return self.mean_kl <= MEAN_KL and self.worst_kl <= WORST_KL


def compare_with_teacher(
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
    reader = LabelReader(dataset.train, store, TEACHER_BATCH, 0, missing="skip", device=device)
    rng = np.random.default_rng(random_seed)
    drawn = rng.integers(store.epochs, size=records)
    found: list[NDArray[np.float64]] = []
    for epoch, count in zip(*np.unique(drawn, return_counts=True), strict=True):
        usable = reader.present(int(epoch))
        rows = rng.choice(usable, min(int(count), len(usable)), replace=False)
        for part in np.array_split(rows, -(-len(rows) // TEACHER_BATCH)):
            with torch.no_grad():
                logits = teacher_logits(reader.inputs(int(epoch), part))
            now = top_labels(logits, store.spec.topk)
            stored = reader.labels(int(epoch), part)
            found.append(_divergence(now, stored, store.spec.num_classes))
            tick(float(len(part)))
    every = np.concatenate(found)
    return Agreement(len(every), float(np.mean(every)), float(np.max(every)))


def _divergence(p: SoftLabels, q: SoftLabels, num_classes: int) -> NDArray[np.float64]:
    """Compute KL(p || q) in nats [n], each tail spread evenly over the other classes."""
    dense = []
    for labels in (p, q):
        count, topk = labels.index.shape
        rest = labels.tail[:, None].astype(np.float64) / (num_classes - topk)
        table = np.broadcast_to(rest, (count, num_classes)).copy()
        np.put_along_axis(table, labels.index, labels.prob.astype(np.float64), axis=1)
        dense.append(torch.from_numpy(table))
    kl = torch.special.xlogy(dense[0], dense[0] / dense[1].clamp(min=1e-30)).sum(1)
    return np.asarray(kl.clamp(min=0.0).numpy())
