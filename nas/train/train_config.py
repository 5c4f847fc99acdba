"""What the user asked of a full training, checked, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nas.data import DataSpec
from nas.train.recipe import Recipe, read_recipe
from space import get_family
from space.errors import refuse
from space.family import Arch, Family

ALL_IMAGES = 1_000_000_000
"""A full training uses every image of its data set."""
AMPS = ("auto", "none", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a full training. Sizes as in `nas.data.DataSpec`.

    `arch` is one of `family`, `arch_from` what the user called it; `labels` a store and `teacher` a
    net that is asked while training (one of them at most); `init` "scratch" or weights, their
    position tables resized as `resize` names; `head_map` a file of old classes. `random_seed` is
    that of weights, order and views, `data_seed` of the images held out. Raises InputError.
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
            raise refuse(
                "--teacher",
                f"{self.teacher} beside --labels",
                "one of them",
                "stored labels need no teacher",
            )
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
            raise refuse(
                "--head-map",
                f"{self.head_map} with --init scratch",
                "weights to map",
                "--init FILE",
            )
        for name in ("random_seed", "data_seed"):
            if getattr(self, name) < 0:
                flag = f"--{name.replace('_', '-')}"
                raise refuse(flag, getattr(self, name), "an integer >= 0")
        if self.labels is not None and self.recipe.mixes:
            raise refuse(
                "--labels",
                f"beside the recipe's mixup={self.recipe.mixup:g} and cutmix="
                f"{self.recipe.cutmix:g}",
                "no mixing but the store's own",
                "--set mixup=0 --set cutmix=0",
            )
        if self.labels is not None and self.recipe.repeats > 1:
            raise refuse(
                "--labels",
                f"beside the recipe's repeats={self.recipe.repeats}",
                "an image once an epoch, as stored",
                "--set repeats=1",
            )

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON, the inverse of `read_config`."""
        return {**asdict(self), "arch": dict(self.arch)}

    @property
    def of(self) -> tuple[Family, Arch]:
        """Give the family and the arch."""
        family = get_family(self.family)
        return family, family.arch(self.arch)

    @property
    def data_spec(self) -> DataSpec:
        """Say which data is asked for: all of it, unless `proxy_images` says otherwise."""
        return DataSpec(
            self.data,
            self.recipe.img_size if self.img_size is None else self.img_size,
            ALL_IMAGES if self.proxy_images is None else self.proxy_images,
            self.max_broken,
            self.data_seed,
            pixel_cache=self.pixel_cache,
        )


def read_config(value: Mapping[str, Any]) -> TrainConfig:
    """Read plain JSON; raises InputError for what is not of this version."""
    known = {f.name for f in fields(TrainConfig)}
    if not isinstance(value, Mapping) or not known.issuperset(value):
        odd = ", ".join(sorted(set(value) - known)) if isinstance(value, Mapping) else value
        raise refuse("train.json", odd, "the settings of this version", "start a new training")
    try:
        return TrainConfig(**{**value, "recipe": read_recipe(value["recipe"])})
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise refuse("train.json", why, "the settings of this version", "restore it") from None
