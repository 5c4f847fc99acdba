"""The settings of a full training as checked values: what decides its result, and the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nas.core.cli import MOST_AT_ONCE
from nas.core.data_config import DataConfig
from nas.core.settings import changed_setting, check_settings, setting
from nas.data import DataSpec
from nas.train.recipe import Recipe, read_recipe
from space import get_family
from space.errors import refuse
from space.family import Arch, Family

ALL_IMAGES = 1_000_000_000
"""The default limit: every image of the data set."""
AMPS = ("auto", "none", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Everything that decides a full training.

    `arch` is one of `family`, `arch_from` the user's name of it; `labels` a store and `teacher` a net that teaches
    online (one of them at most); `init` "scratch" or weights, their position tables resized by `resize`; `head_map` a
    file of old classes. `random_seed` decides weights, order and views, `data_seed` the images held out. `extend`
    epochs follow the recipe's, at its least rate. Raises InputError.
    """

    family: str
    arch: Mapping[str, Any]
    arch_from: str
    recipe: Recipe
    img_size: int | None = changed_setting(DataConfig, "img_size", default_text="the recipe's, or the data's")
    max_images: int | None = changed_setting(DataConfig, "max_images", low=20, default_text="all")
    max_test_images: int | None = changed_setting(DataConfig, "max_test_images", default_text="all")
    data_seed: int = setting(0, "of the images held out; a store's or a run's --random-seed", metavar="N", low=0)
    labels: str | None = setting(
        None,
        "learn from stored labels (python -m nas.labels build)",
        group="teacher and first weights",
        metavar="STORE",
    )
    missing: str = setting("error", "images without a label", choices=("error", "skip"))
    teacher: str | None = setting(None, "ask a teacher while training: as in nas.contract", metavar="NET")
    teacher_epochs: int = setting(15, "of the auto teacher", metavar="N", low=1)
    init: str = setting("scratch", "scratch, a file, or a timm tag", metavar="WEIGHTS")
    resize: str = setting(
        "own",
        "positions of another image size: published, timm or own",
        metavar="HOW",
        default_text="published where the family has it",
    )
    head_map: str | None = setting(None, "for each class the old one it starts from, -1 for none", metavar="FILE")
    random_seed: int = setting(0, "of weights, order and views", metavar="N", low=0)
    extend: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        family = get_family(self.family)
        if self.resize not in family.resizes:
            raise refuse("--resize", self.resize, f"one of {', '.join(family.resizes)}")
        if self.labels is not None and self.teacher is not None:
            got = f"{self.teacher} beside --labels"
            raise refuse("--teacher", got, "one of them", "stored labels need no teacher")
        kind = self.recipe.distill
        taught = self.labels is not None or self.teacher is not None
        if kind != "none" and not taught:
            got, want = f"{kind} without a teacher", "--labels STORE or --teacher NET"
            raise refuse("--distill", got, want, "python -m nas.labels build makes a store")
        if kind == "none" and taught:
            flag = "--labels" if self.labels is not None else "--teacher"
            got = f"beside the recipe's distill=none (of {self.recipe.name})"
            raise refuse(flag, got, "a kind of distillation", "--distill sparse, soft, hard or token")
        if self.head_map is not None and self.init == "scratch":
            raise refuse("--head-map", f"{self.head_map} with --init scratch", "weights to map", "--init FILE")
        if self.labels is not None and self.recipe.mixes:
            got = f"beside the recipe's mixup={self.recipe.mixup or 0:g} and cutmix={self.recipe.cutmix or 0:g}"
            raise refuse("--labels", got, "no mixing but the store's own", "--mixup 0 --cutmix 0")
        if self.labels is not None and self.recipe.repeats > 1:
            got = f"beside the recipe's repeats={self.recipe.repeats}"
            raise refuse("--labels", got, "an image once an epoch, as stored", "--set repeats=1")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, the inverse of `read_config`."""
        return {**asdict(self), "arch": dict(self.arch)}

    @property
    def family_and_arch(self) -> tuple[Family, Arch]:
        """The family and the arch."""
        family = get_family(self.family)
        return family, family.arch(self.arch)

    @property
    def epochs(self) -> int:
        """The epochs of the recipe, and those that a finished training was extended by."""
        return self.recipe.epochs + self.extend

    @property
    def data_spec(self) -> DataSpec:
        """The data to prepare: all of it, unless `max_images` limits it."""
        return DataSpec.of(
            self,
            self.data_seed,
            img_size=self.recipe.img_size if self.img_size is None else self.img_size,
            max_images=ALL_IMAGES if self.max_images is None else self.max_images,
            max_test_images=ALL_IMAGES if self.max_test_images is None else self.max_test_images,
        )


def read_config(value: Mapping[str, Any]) -> TrainConfig:
    """Read plain JSON; raises InputError for unknown, missing or wrong values."""
    known = {f.name for f in fields(TrainConfig)}
    if not isinstance(value, Mapping) or not known.issuperset(value):
        odd = ", ".join(sorted(set(value) - known)) if isinstance(value, Mapping) else value
        raise refuse("train.json", odd, "the settings of this version", "start a new training")
    try:
        return TrainConfig(**{**value, "recipe": read_recipe(value["recipe"])})
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise refuse("train.json", why, "the settings of this version", "restore it") from None


@dataclass(frozen=True)
class Machine:
    """What a training runs on, which may change on a resume.

    `device` as the user names it (a process under torchrun has its own GPU); `accumulation_steps`: micro-batches of
    each process before a step; `workers`: loader processes of each; `keep_every`: epochs between saved models. Raises
    InputError.
    """

    device: str = setting(
        "cpu", "cpu or cuda; under torchrun each process has its own GPU", group="machine (may change on --resume)"
    )
    threads: int = setting(
        1, "torch's, a process", metavar="N", low=1, high=MOST_AT_ONCE, default_text="the cores, shared"
    )
    workers: int = setting(
        0, "loader processes of each process", metavar="N", low=0, high=MOST_AT_ONCE, default_text="0; 8 with a GPU"
    )
    accumulation_steps: int = setting(
        1, "micro-batches in which a process sees its share of a batch", metavar="N", low=1, spelling="--accumulate"
    )
    amp: str = setting("none", "mixed precision", choices=AMPS, default_text="auto: on GPUs")
    compile: bool | None = setting(None, "torch.compile")
    grad_checkpointing: bool | None = setting(None, "less memory, more time")
    save_steps: int | None = setting(500, "steps between checkpoints", metavar="N", low=1)
    keep_every: int | None = setting(None, "keep a model every N epochs", metavar="N", low=1, default_text="none")

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_settings(self)


def resolve_amp(name: str, device: str) -> str:
    """Return the mixed precision that `--amp` means on a device. Raises InputError."""
    cuda = device.startswith("cuda")
    if name == "auto":
        if not cuda:
            return "none"
        import torch

        from nas.train.loop import half_precision

        return "bf16" if half_precision(device) is torch.bfloat16 else "fp16"
    if name == "fp16" and not cuda:
        raise refuse("--amp", f"fp16 on {device}", "a GPU", "bf16 works here, too")
    return name
