"""Training of teachers, which are made once and kept with a fingerprint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional

from nas.core.augment_config import AugmentConfig
from nas.core.class_match import ClassMatch, match_classes, match_head
from nas.core.io import digest_of, get_or_make, write_json
from nas.core.progress import Tick, no_tick
from nas.data import Dataset, Split
from nas.data.augment.mirror import flip_notes, mirror_notes
from nas.data.augment.spec import AugmentSpec, augmentation_code, changed_spec, default_spec
from nas.data.augment.timm_engine import TimmAugmenter
from nas.data.augment.views import outputs
from nas.export.load import AutoTeacher
from nas.export.named_network import NamedNetwork
from nas.export.teacher_net import (
    SCHEMA,
    NetSource,
    TeacherInfo,
    TeacherNet,
    build_teacher_net,
    read_teacher,
    to_device,
)
from nas.export.weights import place, save_weights, weights_digest
from nas.labels.reader import batch_sizes, epoch_order
from nas.train.loop import TrainSettings, train
from nas.train.norms import RULE, settle
from space.errors import refuse

AUTO_SETTINGS = TrainSettings(epochs=15, lr=6e-3, min_lr=1e-5, weight_decay=0.05, warmup_epochs=1.0, batch_size=32)
"""How the `auto` teacher trains; `epochs` is an argument."""
TUNE_SETTINGS = TrainSettings(epochs=5, lr=3e-4, min_lr=1e-6, weight_decay=0.05, warmup_epochs=0.5, batch_size=32)
"""How a pretrained teacher with other classes is fine-tuned first; at most so many epochs."""
LABEL_SMOOTHING = 0.1
EVAL_BATCH = 128
FEWEST_JUDGED = 50
"""Holdout images from which a teacher at chance is refused."""
KEPT = AugmentConfig()
_SALT = 0x7EAC


def teacher_spec(dataset: Dataset, settings: AugmentConfig) -> AugmentSpec:
    """Return the augmentation that a teacher of a data set trains with: its default, less what the user replaced."""
    base = default_spec(dataset)
    if base.policy is not None and settings.policy is None:
        settings = replace(settings, color_jitter=None)  # another pipeline's: timm jitters no colours under a policy
    return changed_spec(base, settings, mixing=False)


def make_teacher(
    named: NamedNetwork,
    dataset: Dataset,
    cache_dir: Path,
    *,
    random_seed: int,
    epochs: int,
    device: str,
    threads: int,
    augment: AugmentConfig = KEPT,
    tick: Tick = no_tick,
) -> TeacherInfo:
    """Make the teacher of a data set, or find it in the cache, under `<cache>/teachers/`.

    `auto` trains for `epochs` epochs on the train split with its augmentation, of which `augment` replaces parts
    (teachers mix no images), hard labels smoothed by 0.1. A
    pretrained net keeps its head where it has the data's classes, by name, in whatever order; otherwise the rows of
    shared names are kept, the others start fresh, and it gets min(epochs, 5) epochs of fine-tuning. The cache's
    fingerprint covers data, net, starting weights, class names, epochs, augmentation, random seed, threads, device kind
    and library versions. `tick` counts training images; a killed training continues at its last epoch. Raises
    InputError, also for a teacher that cannot tell the data's classes apart (`check_accuracy`).
    """
    spec = teacher_spec(dataset, augment)
    if not dataset.labelled and isinstance(named, AutoTeacher):
        raise refuse(
            "--teacher",
            f"auto for {dataset.name}, which has no labels",
            "a teacher that is trained already",
            "name a pretrained timm model, or MODEL:FILE",
        )
    source = named.teacher()
    if source.state is None:
        source = replace(source, num_classes=dataset.num_classes, mean=dataset.mean, std=dataset.std)
    # Without ground truth the classes are the teacher's own.
    names = named.classes
    wanted = dataset.classes or names or tuple(map(str, range(source.num_classes)))
    own = names is None and dataset.labelled_by is not None and source.num_classes == len(wanted)
    match = match_classes(wanted, wanted)
    if source.state is not None and not own:
        match = match_head(named, source.num_classes, wanted)
    settings: TrainSettings | None = None  # the weights serve as they are
    if source.state is None:
        settings = replace(AUTO_SETTINGS, epochs=epochs)
    elif not match.whole:
        settings = replace(TUNE_SETTINGS, epochs=min(epochs, TUNE_SETTINGS.epochs))
    recipe = {
        "schema": SCHEMA,
        "model": source.model,
        "kwargs": {k: list(v) if isinstance(v, tuple) else v for k, v in source.kwargs.items()},
        "start": weights_digest(source.state) if source.state is not None else None,
        "classes": [*map(list, (wanted, match.rows)), None if names is None else list(names)],
        "input": [list(source.mean), list(source.std), source.input_size],
        "settings": asdict(settings) if settings is not None else None,
        "label_smoothing": LABEL_SMOOTHING,
        "batch_norms": RULE,
        "dataset": dataset.fingerprint,
        "augment": spec.digest(),
        "random_seed": random_seed,
        "device": device.split(":")[0],
        "threads": threads,
        "libraries": {n: version(n) for n in ("numpy", "pillow", "timm", "torch", "torchvision")},
    }
    fingerprint = digest_of(recipe)

    def make(folder: Path) -> None:
        """Train where needed, test on the holdout, and fill the folder."""
        progress = folder / "training.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            inner = build_teacher_net(source, len(wanted), match.rows)
            net = TeacherNet(inner, (dataset.mean, dataset.std), (source.mean, source.std), source.input_size)
            if settings is not None:
                batches = _Batches(dataset.train, spec, settings.batch_size, random_seed)
                train(
                    net,
                    batches.epoch,
                    _step_loss(device),
                    settings,
                    device=device,
                    tick=tick,
                    steps_per_epoch=batches.steps_per_epoch,
                    checkpoint=progress,
                )
                settle(net, dataset.train, spec, updates=batches.steps_per_epoch, device=device)
        correct = np.zeros(0, dtype=bool)
        mirror: list[str] = []
        if dataset.labelled:
            place(net, device).eval()
            mirror = flip_notes(net, dataset, spec, device=device)
            batched = outputs(net, dataset.holdout, spec, device=device, batch_size=EVAL_BATCH)
            predicted = np.concatenate([logits.argmax(1).cpu().numpy() for _, logits in batched])
            correct = predicted == dataset.holdout.labels
        digest = save_weights(folder / "weights.safetensors", inner.state_dict())
        top1 = float(correct.mean()) if len(correct) else 0.0
        info = {
            "id": f"{named.name}@{fingerprint[:8]}",
            "digest": digest,
            "model": source.model,
            "kwargs": recipe["kwargs"],
            "classes": list(wanted),
            "mean": list(source.mean),
            "std": list(source.std),
            "input_size": source.input_size,
            "student_mean": list(dataset.mean),
            "student_std": list(dataset.std),
            "epochs": settings.epochs if settings is not None else 0,
            "holdout_top1": top1,
            "holdout_top1_se": math.sqrt(top1 * (1 - top1) / max(1, len(correct))),
            "holdout_images": len(correct),
            "notes": [*_notes(named, source, settings, dataset, match), *mirror],
        }
        write_json(folder / "info.json", {"schema": SCHEMA, "recipe": recipe, "info": info})
        progress.unlink(missing_ok=True)

    folder = cache_dir / "teachers" / fingerprint
    if not get_or_make(folder, make, resumable=True) and settings is not None:
        tick(float(settings.epochs * len(dataset.train)))
    info = read_teacher(folder)
    if dataset.labelled_by is not None:
        return info
    return check_accuracy(info, named, match, lambda: _mirrored(dataset, spec, settings))


def check_accuracy(
    info: TeacherInfo, named: NamedNetwork, match: ClassMatch, mirrored: Callable[[], Sequence[str]] = tuple
) -> TeacherInfo:
    """Refuse a teacher that is hardly better than chance on the holdout; add a note to one that may be.

    It is refused where the upper end of its 95 % interval (Wilson's) is below three times chance, 1.5 times at up to
    five classes, on at least `FEWEST_JUDGED` images. `mirrored` tells whether mirrored images hide the classes. Raises
    InputError.
    """
    if not info.holdout_images:
        return info
    chance = 1 / info.num_classes
    bound = chance * (1.5 if info.num_classes <= 5 else 3.0)
    right = round(info.holdout_top1 * info.holdout_images)
    low, high = binomtest(right, info.holdout_images).proportion_ci(method="wilson")
    found = (
        f"top-1 {info.holdout_top1:.1%} [{low:.1%}, {high:.1%}] on {info.holdout_images} holdout images, where "
        f"chance is {chance:.1%}"
    )
    if isinstance(named, AutoTeacher):
        why = "too few --teacher-epochs, or images that do not show their classes"
    elif info.epochs:
        why = "its features do not fit these images, or too few --teacher-epochs to fine-tune a new head"
    elif match.named:
        why = "its images were prepared in another way, or it is another net's weights"
    else:
        why = "it carries no class names, and its classes probably stand in another order than the data's folders"
    if low < bound and mirrored():
        trained = isinstance(named, AutoTeacher) or info.epochs > 0
        how = "its training mirrors images: --hflip 0" if trained else "its own training mirrored images, as most do"
        why = f"left and right tell the classes apart, and {how}; or {why}"
    if high < bound and info.holdout_images >= FEWEST_JUDGED:
        want = f"a teacher above {bound:.1%}"
        raise refuse("--teacher", f"{named.name} with {found}", want, f"the likely reason: {why}")
    if low >= bound:
        return info
    return replace(info, notes=(*info.notes, f"warning: {named.name} is weak, {found}; if so: {why}"))


def _mirrored(dataset: Dataset, spec: AugmentSpec, settings: TrainSettings | None) -> list[str]:
    """Return a warning where mirroring hides the classes: as the teacher trains here, or trained elsewhere."""
    return mirror_notes(dataset, spec if settings is not None else replace(spec, hflip=0.5))


def _notes(
    named: NamedNetwork, source: NetSource, settings: TrainSettings | None, dataset: Dataset, match: ClassMatch
) -> Iterator[str]:
    if isinstance(named, AutoTeacher):
        return
    yield from named.notes
    if settings is None and not dataset.labelled:
        yield f"{named.name}: its {source.num_classes} classes, for images without labels"
    elif settings is None:
        how = match.describe()
        yield f"{named.name}: its head of {source.num_classes} classes is kept" + (how and f"; {how}")
    else:
        epochs = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"
        yield (
            f"{named.name}: its head of {source.num_classes} classes does not fit the data's "
            f"{dataset.num_classes}; {match.describe()}; fine-tuned for {epochs}"
        )
    if source.input_size is not None and source.input_size != dataset.img_size:
        yield f"{named.name}: images are resized to {source.input_size} px for it"


class _Batches:
    """Augmented training batches with hard labels, a function of the epoch alone."""

    def __init__(self, split: Split, augment: AugmentSpec, batch_size: int, seed: int) -> None:
        self._split, self._batch_size, self._seed = split, batch_size, seed
        self._augmenter = TimmAugmenter(augment)
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


def _step_loss(device: str) -> Callable[[nn.Module, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, labels = batch
        logits = model(to_device(inputs, device)).float()
        return functional.cross_entropy(logits, labels.to(device), reduction="none", label_smoothing=LABEL_SMOOTHING)

    return loss
