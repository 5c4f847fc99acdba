"""The teacher: made once, kept with a fingerprint, then a plain function from inputs to logits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional

from nas.data import Dataset, Split
from nas.data.files import digest_of
from nas.distill.augment import Augmenter, AugmentSpec, augmentation_code, default_spec
from nas.distill.outputs import outputs
from nas.distill.replay import batch_sizes, epoch_order
from nas.distill.teacher_net import (
    Source,
    TeacherNet,
    TeacherSpec,
    create,
    find_source,
    load_checked,
    parse_teacher,
)
from nas.files import read_json, remove_leftovers, write_json
from nas.jobs import Tick, no_tick
from nas.training.loop import TrainSettings, place, train
from nas.training.weights import load_into, load_weights, save_weights, weights_digest
from space.errors import refuse

__all__ = ["TeacherInfo", "TeacherSpec", "load_teacher", "make_teacher", "parse_teacher"]

SCHEMA = 1
AUTO_SETTINGS = TrainSettings(
    epochs=15, lr=6e-3, min_lr=1e-5, weight_decay=0.05, warmup_epochs=1.0, batch_size=32
)
"""How the `auto` teacher trains; `epochs` is an argument."""
TUNE_SETTINGS = TrainSettings(
    epochs=5, lr=3e-4, min_lr=1e-6, weight_decay=0.05, warmup_epochs=0.5, batch_size=32
)
"""How a pretrained teacher with other classes is fine-tuned first; at most so many epochs."""
LABEL_SMOOTHING = 0.1
EVAL_BATCH = 128
_SALT = 0x7EAC


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher at hand, as plain values.

    `folder` holds weights.safetensors and info.json; `id` names it for people, `digest` hashes its
    weights; `model` and `kwargs` are the timm call; `mean`, `std`, `input_size` (None: as given)
    are its own inputs', `student_mean` and `student_std` those it is given. `holdout_top1` is a
    share, with its standard error over `holdout_images` (none without ground truth).
    """

    folder: str
    id: str
    digest: str
    model: str
    kwargs: Mapping[str, Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int | None
    student_mean: tuple[float, ...]
    student_std: tuple[float, ...]
    epochs: int
    holdout_top1: float
    holdout_top1_se: float
    holdout_images: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON, the inverse of `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> TeacherInfo:
        """Read plain JSON."""
        read: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return TeacherInfo(**read)


def make_teacher(
    spec: TeacherSpec,
    dataset: Dataset,
    cache_dir: Path,
    *,
    random_seed: int,
    epochs: int,
    device: str,
    threads: int,
    tick: Tick = no_tick,
) -> TeacherInfo:
    """Make the teacher of a data set, or find it in the cache, under `<cache>/teachers/`.

    `auto` trains for `epochs` epochs on the train split with its augmentation, hard labels smoothed
    by 0.1. A pretrained net keeps its head where the number of classes agrees; otherwise it gets a
    new one and min(epochs, 5) epochs of fine-tuning. The cache's fingerprint covers data, net,
    starting weights, epochs, augmentation, random seed, threads, device kind and library versions.
    `tick` counts training images; a killed training goes on at its last epoch. Raises InputError.
    """
    augment = default_spec(dataset)
    if not dataset.labelled and spec.kind == "auto":
        raise refuse(
            "--teacher", f"auto for {dataset.name}, which has no labels", "a teacher that is "
            "trained already", "name a pretrained timm model, or MODEL:FILE",
        )  # fmt: skip
    source = find_source(spec, dataset.num_classes, dataset.mean, dataset.std)
    # Without ground truth the classes are the teacher's own.
    classes = dataset.num_classes or source.num_classes
    settings = _settings(source, classes, epochs)
    recipe = _recipe(spec, source, settings, dataset, augment, random_seed, device, threads)
    fingerprint = digest_of(recipe)
    folder = cache_dir / "teachers" / fingerprint
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{fingerprint}.lock")):
            if not (folder / "info.json").is_file():
                _make(folder, spec, source, settings, dataset, augment, recipe, device, tick)
            elif settings is not None:
                tick(float(settings.epochs * len(dataset.train)))
    except OSError as error:
        raise refuse("--cache-dir", f"{folder} ({error})", "a folder with room to write") from error
    return _read(folder)


def _settings(source: Source, num_classes: int, epochs: int) -> TrainSettings | None:
    """Say how to train, or None where the weights serve as they are."""
    if source.state is None:
        return _with_epochs(AUTO_SETTINGS, epochs)
    if source.num_classes != num_classes:
        return _with_epochs(TUNE_SETTINGS, min(epochs, TUNE_SETTINGS.epochs))
    return None


def _with_epochs(settings: TrainSettings, epochs: int) -> TrainSettings:
    return TrainSettings(**{**asdict(settings), "epochs": epochs})


def _recipe(
    spec: TeacherSpec,
    source: Source,
    settings: TrainSettings | None,
    dataset: Dataset,
    augment: AugmentSpec,
    random_seed: int,
    device: str,
    threads: int,
) -> dict[str, Any]:
    """Collect all that decides a teacher, as plain JSON."""
    return {
        "schema": SCHEMA,
        "model": source.model,
        "kwargs": {k: list(v) if isinstance(v, tuple) else v for k, v in source.kwargs.items()},
        "start": weights_digest(source.state) if source.state is not None else None,
        "input": [list(source.mean), list(source.std), source.input_size],
        "settings": asdict(settings) if settings is not None else None,
        "label_smoothing": LABEL_SMOOTHING,
        "dataset": dataset.fingerprint,
        "augment": augment.digest(),
        "random_seed": random_seed,
        "device": device.split(":")[0],
        "threads": threads,
        "libraries": {n: version(n) for n in ("numpy", "pillow", "timm", "torch", "torchvision")},
    }


def _make(
    folder: Path,
    spec: TeacherSpec,
    source: Source,
    settings: TrainSettings | None,
    dataset: Dataset,
    augment: AugmentSpec,
    recipe: Mapping[str, Any],
    device: str,
    tick: Tick,
) -> None:
    """Train where needed, test on the holdout, and put the folder in place whole."""
    seed = int(recipe["random_seed"])
    classes = dataset.num_classes or source.num_classes
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(exist_ok=True)
    remove_leftovers(part)
    progress = part / "training.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = load_checked(source, classes)
        student = (dataset.mean, dataset.std)
        net = TeacherNet(inner, student, (source.mean, source.std), source.input_size)
        if settings is not None:
            batches = _Batches(dataset.train, augment, settings.batch_size, seed)
            train(
                net, batches.epoch, _step_loss(device), settings, device=device, tick=tick,
                steps_per_epoch=batches.steps_per_epoch, checkpoint=progress,
            )  # fmt: skip
    correct = np.zeros(0, dtype=bool)
    if dataset.labelled:
        correct = _correct(place(net, device), dataset.holdout, augment, device)
    digest = save_weights(part / "weights.safetensors", inner.state_dict())
    top1 = float(correct.mean()) if len(correct) else 0.0
    info = {
        "id": f"{spec.name}@{folder.name[:8]}",
        "digest": digest,
        "model": source.model,
        "kwargs": recipe["kwargs"],
        "num_classes": classes,
        "mean": list(source.mean),
        "std": list(source.std),
        "input_size": source.input_size,
        "student_mean": list(dataset.mean),
        "student_std": list(dataset.std),
        "epochs": settings.epochs if settings is not None else 0,
        "holdout_top1": top1,
        "holdout_top1_se": math.sqrt(top1 * (1 - top1) / max(1, len(correct))),
        "holdout_images": len(correct),
        "notes": list(_notes(spec, source, settings, dataset)),
    }
    write_json(part / "info.json", {"schema": SCHEMA, "recipe": dict(recipe), "info": info})
    progress.unlink(missing_ok=True)
    os.rename(part, folder)


def _notes(
    spec: TeacherSpec, source: Source, settings: TrainSettings | None, dataset: Dataset
) -> Iterator[str]:
    if spec.kind == "auto":
        return
    if settings is None and not dataset.labelled:
        yield f"teacher {spec.name}: its {source.num_classes} classes, for images without labels"
    elif settings is None:
        yield f"teacher {spec.name}: its head of {source.num_classes} classes is kept"
    else:
        yield (
            f"teacher {spec.name}: its head of {source.num_classes} classes does not fit the "
            f"data's {dataset.num_classes}; new head, fine-tuned for {settings.epochs} epochs"
        )
    if source.input_size is not None and source.input_size != dataset.img_size:
        yield f"teacher {spec.name}: images are resized to {source.input_size} px for it"


def _read(folder: Path) -> TeacherInfo:
    path, what = folder / "info.json", "a teacher of this toolkit"
    data = read_json(path, what)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise refuse(str(folder), f"schema {schema}", f"schema {SCHEMA}", "delete it")
    try:
        return TeacherInfo.from_dict({**data["info"], "folder": str(folder)})
    except (KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise refuse(str(path), got, what, "delete the folder") from None


def load_teacher(
    info: TeacherInfo, device: str = "cpu", precision: str = "float32", *, stay: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Open a teacher: student-normalised [B, 3, S, S] -> logits float32 [B, C] on the CPU.

    Always eval mode; with `stay` the logits stay on the teacher's device; `precision` "bfloat16" or
    "float16" runs the net under autocast, whose logits become float32 before anything else is done
    with them. Weights that are not those of `info` are refused.
    """
    path = Path(info.folder) / "weights.safetensors"
    state = load_weights(path, name="teacher")
    if weights_digest(state) != info.digest:
        raise refuse("teacher", f"other weights in {path}", info.digest[:12], "delete the folder")
    inner = create(info.model, info.kwargs, info.num_classes)
    load_into(inner, state, name="teacher")
    student = (info.student_mean, info.student_std)
    net = TeacherNet(inner, student, (info.mean, info.std), info.input_size)
    place(net, device).eval()

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        kind = getattr(torch, precision)
        autocast = torch.autocast(device.split(":")[0], dtype=kind, enabled=kind != torch.float32)
        with torch.no_grad(), autocast:
            out: torch.Tensor = net(_to(inputs, device))
        return out.float() if stay else out.float().cpu()

    return logits


class _Batches:
    """Augmented training batches with hard labels, a function of the epoch alone."""

    def __init__(self, split: Split, augment: AugmentSpec, batch_size: int, seed: int) -> None:
        self._split, self._batch_size, self._seed = split, batch_size, seed
        self._augmenter = Augmenter(augment)
        self._rows = np.arange(len(split))

    @property
    def steps_per_epoch(self) -> int:
        return len(batch_sizes(len(self._split), self._batch_size))

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = epoch_order(self._split, self._rows, self._seed, epoch)
        ends = np.cumsum(batch_sizes(len(order), self._batch_size))
        for rows in np.split(order, ends[:-1]):
            keys = [self._split.keys[row] for row in rows]
            codes = [augmentation_code(key, epoch, _SALT + self._seed) for key in keys]
            inputs = self._augmenter.batch(self._split.pixels[rows], codes)
            yield inputs, torch.from_numpy(self._split.labels[rows])


def _step_loss(
    device: str,
) -> Callable[[nn.Module, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, labels = batch
        logits = model(_to(inputs, device)).float()
        return functional.cross_entropy(
            logits, labels.to(device), reduction="none", label_smoothing=LABEL_SMOOTHING
        )

    return loss


def _correct(net: nn.Module, split: Split, augment: AugmentSpec, device: str) -> Any:
    """Tell for each image whether the net is right: bool [n]."""
    net.eval()
    said = outputs(net, split, augment, device=device, batch_size=EVAL_BATCH)
    found = [logits.argmax(1).cpu().numpy() for _, logits in said]
    return np.concatenate(found) == split.labels


def _to(inputs: torch.Tensor, device: str) -> torch.Tensor:
    return inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
