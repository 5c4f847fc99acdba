"""A request for soft labels: plain values, checked, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nas.core.augment_config import AugmentConfig
from nas.core.class_match import ClassMatch, check_same_classes
from nas.core.config import choices_of
from nas.core.settings import check_settings, parse_share, setting
from space.errors import refuse

PRECISIONS = ("float32", "bfloat16", "float16")
CLEAN_RATIO = "0.01"
"""What `--clean` alone stands for."""


@dataclass(frozen=True, kw_only=True)
class LabelRequest(AugmentConfig):
    """The choices of a user that decide a label store, besides data and teacher.

    `threads` are torch's, in each process. Raises InputError.
    """

    epochs: int = setting(10, "views of each image", metavar="N", low=1)
    topk: int | None = setting(None, "classes kept", metavar="K", low=1, default_text="10; 100 of over 10,000")
    codec: str = setting("packed", "records", choices=choices_of("codec"))
    augment: str = setting(
        "default",
        "pipeline; the official ones are 22k, 1k and finetune",
        metavar="PRESET",
        choices=choices_of("augment"),
    )
    salt: int = setting(0, "another number: other views", metavar="N")
    limit: int | None = setting(None, "label N images only", metavar="N", low=2)
    clean: float | None = setting(
        None,
        "drop images whose given class gets less than RATIO of the probability of the teacher's "
        f"best (alone: {CLEAN_RATIO}), and list them",
        metavar="RATIO",
        parse=parse_share,
        const=CLEAN_RATIO,
        above=0.0,
    )
    precision: str = setting("float32", "of the teacher, on a GPU", choices=PRECISIONS)
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    threads: int = 1

    def __post_init__(self) -> None:
        check_settings(self)
        if self.clean is not None and self.clean >= 1:
            raise refuse("--clean", self.clean, "a ratio between 0 and 1, such as 0.01")
        check_precision(self.precision, self.device)


def check_precision(precision: str, device: str) -> None:
    """Reject a precision that a teacher cannot have on a device ("cpu", "cuda:1", ...)."""
    if precision not in PRECISIONS:
        raise refuse("--precision", precision, f"one of {', '.join(PRECISIONS)}")
    if precision != "float32" and device.split(":")[0] != "cuda":
        raise refuse("--precision", precision, "float32 on a CPU", "or --device cuda")


def default_topk(num_classes: int) -> int:
    """Return 10 classes, 100 of more than 10,000, or all but one: the paper's choice."""
    return min(100 if num_classes > 10_000 else 10, num_classes - 1)


def match_store_classes(folder: object, have: Sequence[str], want: Sequence[str]) -> ClassMatch:
    """Match the classes of the label store in a folder to the data's, in whatever order. Raises InputError."""
    remedy = "rename the data's folders, build another store, or leave --labels out to have a fitting one built"
    return check_same_classes(have, want, f"label store {folder}", remedy)
