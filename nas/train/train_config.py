"""The settings of a full training as checked values: what decides its result, and the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nas.core.cpus import MOST_AT_ONCE, read_threads
from nas.data import DataSpec
from nas.train.recipe import Recipe, read_recipe
from space import get_family
from space.checks import read_int
from space.errors import refuse
from space.family import Arch, Family

ALL_IMAGES = 1_000_000_000
"""The default limit: every image of the data set."""
AMPS = ("auto", "none", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a full training. Sizes as in `nas.data.DataSpec`.

    `arch` is one of `family`, `arch_from` the user's name of it; `labels` a store and `teacher` a
    net that teaches online (one of them at most); `init` "scratch" or weights, their position
    tables resized by `resize`; `head_map` a file of old classes. `random_seed` decides weights,
    order and views, `data_seed` the images held out. Raises InputError.
    """

    family: str
    arch: Mapping[str, Any]
    arch_from: str
    data: str
    recipe: Recipe
    img_size: int | None = None
    proxy_images: int | None = None
    max_broken: float = 0.01
    pixel_cache: bool = True
    labels: str | None = None
    missing: str = "refuse"
    teacher: str | None = None
    teacher_epochs: int = 15
    init: str = "scratch"
    resize: str = "own"
    head_map: str | None = None
    random_seed: int = 0
    data_seed: int = 0

    def __post_init__(self) -> None:
        family = get_family(self.family)
        if self.resize not in family.resizes:
            raise refuse("--resize", self.resize, f"one of {', '.join(family.resizes)}")
        if self.labels is not None and self.teacher is not None:
            got = f"{self.teacher} beside --labels"
            raise refuse("--teacher", got, "one of them", "stored labels need no teacher")
        kind = self.recipe.distill
        taught = self.labels is not None or self.teacher is not None
        if kind != "none" and not taught:
            want = "--labels STORE or --teacher NET"
            remedy = "python -m nas.labels build makes a store"
            raise refuse("--distill", f"{kind} without a teacher", want, remedy)
        if kind == "none" and taught:
            what = "--labels" if self.labels is not None else "--teacher"
            got = f"beside the recipe's distill=none (of {self.recipe.name})"
            remedy = "--distill sparse, soft, hard or token"
            raise refuse(what, got, "a kind of distillation", remedy)
        if self.head_map is not None and self.init == "scratch":
            got = f"{self.head_map} with --init scratch"
            raise refuse("--head-map", got, "weights to map", "--init FILE")
        for name in ("random_seed", "data_seed"):
            if getattr(self, name) < 0:
                flag = f"--{name.replace('_', '-')}"
                raise refuse(flag, getattr(self, name), "an integer >= 0")
        if self.labels is not None and self.recipe.mixes:
            mixup, cutmix = self.recipe.mixup, self.recipe.cutmix
            got = f"beside the recipe's mixup={mixup:g} and cutmix={cutmix:g}"
            remedy = "--set mixup=0 --set cutmix=0"
            raise refuse("--labels", got, "no mixing but the store's own", remedy)
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
    def data_spec(self) -> DataSpec:
        """The data to prepare: all of it, unless `proxy_images` limits it."""
        return DataSpec(
            self.data,
            self.recipe.img_size if self.img_size is None else self.img_size,
            ALL_IMAGES if self.proxy_images is None else self.proxy_images,
            self.max_broken,
            self.data_seed,
            pixel_cache=self.pixel_cache,
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

    `device` as the user names it (a process under torchrun has its own GPU); `accumulation_steps`:
    micro-batches of each process before a step; `workers`: loader processes of each; `keep_every`:
    epochs between saved models. Raises InputError.
    """

    device: str
    threads: int
    workers: int = 0
    accumulation_steps: int = 1
    amp: str = "none"
    compile: bool = False
    grad_checkpointing: bool = False
    save_steps: int | None = 500
    keep_every: int | None = None

    def __post_init__(self) -> None:
        read_threads(self.threads)
        if self.accumulation_steps < 1:
            raise refuse("--accumulate", self.accumulation_steps, "an integer >= 1")
        read_int("--workers", self.workers, 0, MOST_AT_ONCE)
        for name, flag in (("save_steps", "--save-steps"), ("keep_every", "--keep-every")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise refuse(flag, value, "an integer >= 1")


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
