"""What decides a label store: a frozen specification, its hash, and what a mismatch says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nas.data import Dataset
from nas.data.augment.spec import AugmentSpec
from nas.data.sealed_files import digest_of
from space.errors import refuse

SCHEMA = 2
TEACHER_BATCH = 64
"""Images that the teacher sees at a time. Other sizes give other last bits, so it is fixed."""
TEMPERATURE = 1.0
"""Labels are stored at it; `nas.train.losses.retemper` gives those of any other."""
PRECISIONS = ("float32", "bfloat16", "float16")
LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision")


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that a teacher cannot have on a device ("cpu", "cuda:1", ...)."""
    if precision not in PRECISIONS:
        raise refuse("--precision", precision, f"one of {', '.join(PRECISIONS)}")
    if precision != "float32" and device.split(":")[0] != "cuda":
        raise refuse("--precision", precision, "float32 on a CPU", "or --device cuda")


@dataclass(frozen=True)
class StoreSpec:
    """All that decides the content of a store, but for the number of epochs.

    `topk` classes are kept of each label, fewer than `num_classes`; `codec` is "plain" or
    "packed". `train_keys` and `holdout_keys` hash the sets of labelled images, `preparation` how
    their pixels came about. `teacher_hash` is of the teacher's weights; `precision` the type it
    computes in; `threads` are torch's in each process and `device` is "cpu" or "cuda", since
    others give other last bits. Raises InputError.
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
    num_classes: int
    threads: int
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.topk < self.num_classes:
            raise refuse("top-K", self.topk, f"1 to {self.num_classes - 1} (classes - 1)")
        check_precision(self.precision, self.device)

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON."""
        return {**asdict(self), "augment": self.augment.to_dict()}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> StoreSpec:
        """Read plain JSON, the inverse of `to_dict`."""
        return StoreSpec(**{**value, "augment": AugmentSpec.from_dict(value["augment"])})


def default_topk(num_classes: int) -> int:
    """Keep ten classes, a hundred of more than 10,000, or all but one: as the paper does."""
    return min(100 if num_classes > 10_000 else 10, num_classes - 1)


def library_versions() -> dict[str, str]:
    """Name the versions of all that takes part in making a label or replaying an input."""
    return {name: version(name) for name in LIBRARIES}


def identity(spec: StoreSpec, libraries: Mapping[str, str]) -> dict[str, Any]:
    """Collect all that is hashed into a store's name, as plain JSON."""
    fixed = {"schema": SCHEMA, "teacher_batch": TEACHER_BATCH, "temperature": TEMPERATURE}
    return {**fixed, **spec.to_dict(), "libraries": dict(libraries)}


def store_id(spec: StoreSpec) -> str:
    """Name a store: 32 hex characters, the same for any number of epochs."""
    return digest_of(identity(spec, library_versions()))


def refuse_other(folder: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Raise InputError naming both sides of every field in which two identities differ."""
    odd = [name for name in want if have.get(name) != want[name]]
    if odd:
        raise refuse(
            f"label store {folder}",
            "; ".join(f"{name} {_shown(have.get(name), want[name])}" for name in odd),
            "; ".join(f"{name} {_shown(want[name], have.get(name))}" for name in odd),
            "build another store, or leave --labels out to have a fitting one built",
        )


def _shown(value: object, other: object) -> object:
    """Show a field, or only the differing entries of a table."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: v for k, v in value.items() if other.get(k) != v}
    return value


def check_use(
    folder: Path, spec: StoreSpec, libraries: Mapping[str, str], dataset: Dataset
) -> None:
    """Refuse a store whose labels or inputs would be wrong on this data set or installation.

    The images may differ: which of them have labels is another question, asked key by key. Raises
    InputError naming both sides.
    """
    have = {
        "preparation": spec.preparation,
        "resolution": spec.augment.img_size,
        "num_classes": spec.num_classes,
        "mean": list(spec.augment.mean),
        "std": list(spec.augment.std),
        "libraries": dict(libraries),
    }
    want = {
        "preparation": dataset.preparation,
        "resolution": dataset.img_size,
        "num_classes": dataset.num_classes or spec.num_classes,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "libraries": library_versions(),
    }
    refuse_other(folder, have, want)
