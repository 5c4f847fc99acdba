"""A request for soft labels: plain values, checked, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from space.errors import refuse

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LabelRequest:
    """The choices of a user that decide a label store, besides data and teacher.

    `topk` None means `default_topk`; `preset` names an augmentation and `changes` overrides its
    fields; `limit` labels so many images only; `clean` drops images whose given class gets less
    than this share of the teacher's best (None: off). `salt` makes other views of the same images.
    Raises InputError.
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
        check_precision(self.precision, self.device)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> LabelRequest:
        """Read plain JSON."""
        return LabelRequest(**value)


def check_precision(precision: str, device: str) -> None:
    """Reject a precision that a teacher cannot have on a device ("cpu", "cuda:1", ...)."""
    if precision not in PRECISIONS:
        raise refuse("--precision", precision, f"one of {', '.join(PRECISIONS)}")
    if precision != "float32" and device.split(":")[0] != "cuda":
        raise refuse("--precision", precision, "float32 on a CPU", "or --device cuda")


def default_topk(num_classes: int) -> int:
    """Return 10 classes, 100 of more than 10,000, or all but one: the paper's choice."""
    return min(100 if num_classes > 10_000 else 10, num_classes - 1)
