"""What is asked of a label store, in plain values, and how its making begins."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.core.progress import Tick, no_tick
from nas.core.table import Writer
from nas.data import Dataset
from nas.data.augment.presets import preset_spec
from nas.data.augment.spec import AugmentSpec, eval_batch
from nas.export.trained_teacher import TeacherInfo
from nas.labels.build import labelled_keys, start_store
from nas.labels.codec import make_codec
from nas.labels.keys import keys_digest
from nas.labels.store import LabelStore, read_dropped
from nas.labels.store_spec import TEACHER_BATCH, StoreSpec, check_precision, default_topk, store_id
from space.errors import refuse

CLEAN_RATIO = 0.01
"""An image is dropped when its label gets less than this share of what the teacher's best gets."""
CLEAN_COLUMNS = ("key", "name", "label", "teacher_label", "label_prob", "teacher_prob")


@dataclass(frozen=True)
class LabelRequest:
    """What a user asks for.

    `topk` None means `default_topk`; `preset` names an augmentation and `changes` overrides fields
    of it; `limit` labels so many images only; `clean` drops images whose given class gets less than
    this share of the teacher's best (None: off). `salt` makes other views of the same images.
    """

    epochs: int
    topk: int | None = None
    codec: str = "packed"
    preset: str = "default"
    changes: Mapping[str, Any] = field(default_factory=dict)
    salt: int = 0
    limit: int | None = None
    clean: float | None = None
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise refuse("--epochs", self.epochs, "an integer >= 1")
        if self.topk is not None and self.topk < 1:
            raise refuse("--topk", self.topk, "an integer >= 1")
        if self.limit is not None and self.limit < 2:
            raise refuse("--limit", self.limit, "an integer >= 2")
        if self.clean is not None and not 0 < self.clean < 1:
            raise refuse("--clean", self.clean, "a ratio between 0 and 1, such as 0.01")

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> LabelRequest:
        """Read plain JSON."""
        return LabelRequest(**value)


def augment_of(request: LabelRequest, dataset: Dataset) -> AugmentSpec:
    """Resolve the augmentation of a request. Raises InputError."""
    spec = preset_spec(request.preset, dataset)
    unknown = set(request.changes) - {f.name for f in fields(AugmentSpec)}
    if unknown:
        raise refuse("augmentation", ", ".join(sorted(unknown)), "fields of an augmentation")
    changes: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in request.changes.items()
    }
    return replace(spec, **changes)


def check_request(request: LabelRequest, dataset: Dataset) -> None:
    """Refuse what can be refused before there is a teacher, whose training may take long."""
    augment_of(request, dataset)
    check_precision(request.precision, request.device)
    if request.clean is not None and not dataset.labelled:
        raise refuse("--clean", "images without labels", "labels that a teacher can contradict")
    if dataset.labelled:
        classes = dataset.num_classes
        make_codec(request.codec, request.topk or default_topk(classes), classes)


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
    """Write the manifest and keys of a store, or find it begun; its pieces are made later.

    `place` is the store's folder itself if it was `named` by the user, else the folder of stores,
    where it goes by its id. `dropped` is the table that `disagreements` gave. Raises InputError.
    """
    gone = read_dropped(dropped.encode()) if dropped else frozenset()
    train = labelled_keys(dataset.train, request.limit, gone)
    holdout = labelled_keys(dataset.holdout, None, frozenset())
    if not train.shape[1]:
        raise refuse(
            "--clean",
            "no image left",
            "images on which teacher and label agree",
            "lower --clean, or take a better --teacher",
        )
    classes = info.num_classes
    topk = default_topk(classes) if request.topk is None else request.topk
    spec = StoreSpec(
        topk=topk,
        augment=augment_of(request, dataset),
        salt=request.salt,
        codec=request.codec,
        preparation=dataset.preparation,
        train_keys=keys_digest(train),
        train_images=train.shape[1],
        holdout_keys=keys_digest(holdout),
        holdout_images=holdout.shape[1],
        teacher_id=info.id,
        teacher_hash=info.digest,
        num_classes=classes,
        threads=request.threads,
        device=request.device.split(":")[0],
        precision=request.precision,
    )
    make_codec(spec.codec, spec.topk, spec.num_classes)  # refuses before anything is written
    folder = place if named else place / store_id(spec)
    return start_store(
        folder, spec, request.epochs, train, holdout, made_by, dropped, dataset.fingerprint
    )


def disagreements(
    dataset: Dataset,
    logits: Callable[[torch.Tensor], torch.Tensor],
    augment: AugmentSpec,
    ratio: float,
    tick: Tick = no_tick,
) -> tuple[str, int]:
    """List the training images whose given class gets less than `ratio` of the probability of the
    teacher's best, seen as in evaluation.

    Returns a CSV table (`CLEAN_COLUMNS`, worst first) and how many rows it has. The authors of
    TinyViT cleaned ImageNet-22k in this manner. Raises InputError without ground truth.
    """
    split = dataset.train
    if not dataset.labelled:
        raise refuse("--clean", "images without labels", "labels that a teacher can contradict")
    found = []
    for start in range(0, len(split), TEACHER_BATCH):
        rows = np.arange(start, min(start + TEACHER_BATCH, len(split)))
        with torch.no_grad():
            said = logits(eval_batch(split.pixels[rows], augment)).double().softmax(1).numpy()
        given = np.asarray(split.labels[rows])
        mine, best = said[np.arange(len(rows)), given], said.max(1)
        for at in np.flatnonzero(mine < ratio * best):
            row = int(rows[at])
            found.append(
                (
                    float(mine[at] / best[at]),
                    split.keys[row],
                    split.names[row] if len(split.names) else "",
                    dataset.classes[given[at]],
                    dataset.classes[int(said[at].argmax())],
                    f"{mine[at]:.6g}",
                    f"{best[at]:.6g}",
                )
            )
        tick(float(len(rows)))
    table = io.StringIO()
    writer = Writer(table)
    writer.writerow(CLEAN_COLUMNS)
    writer.writerows(row[1:] for row in sorted(found))
    return table.getvalue(), len(found)


def teacher_classes(
    dataset: Dataset,
    logits: Callable[[torch.Tensor], torch.Tensor],
    augment: AugmentSpec,
    tick: Tick = no_tick,
) -> dict[str, np.ndarray]:
    """Ask a teacher for the class of every image, seen as in evaluation: side -> int64 [n]."""
    found = {}
    for side in ("train", "holdout", "test"):
        split, said = getattr(dataset, side), []
        for start in range(0, len(split), TEACHER_BATCH):
            rows = np.arange(start, min(start + TEACHER_BATCH, len(split)))
            with torch.no_grad():
                said.append(logits(eval_batch(split.pixels[rows], augment)).argmax(1).numpy())
            tick(float(len(rows)))
        found[side] = np.concatenate(said).astype(np.int64)
    return found
