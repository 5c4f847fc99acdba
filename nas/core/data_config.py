"""The settings of the data, shared by every command that reads images."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from nas.core.settings import parse_share, setting

IMAGES_PER_CLASS = 4
GREY_BITS = 16
"""Of deep grey (more than 8 bits) in data that have none, and of a reader's images, which are not seen together."""


def grown_images(images: int, classes: int) -> int:
    """Return a default number of images, or four for each class if that is more."""
    return max(images, IMAGES_PER_CLASS * classes)


@dataclass(frozen=True)
class DataConfig:
    """Which images are read, at which size and how many; commands inherit these settings.

    `max_images` counts train and holdout together (None: 10,000 at most, all of an embedded set);
    without `pixel_cache` a folder's images are decoded whenever they are needed. `splits`, `classes` and `annotations`
    say of a folder what its layout does not.
    """

    data: str = setting(
        MISSING, "digits, fractals, an image folder, or torch/..., hfds/..., wds/...", group="data", metavar="SOURCE"
    )
    img_size: int | None = setting(
        None, "resolution", metavar="PX", low=16, high=1024, default_text="chosen from the data"
    )
    max_images: int | None = setting(
        None, "read a stratified subset of N images", metavar="N", low=4, default_text="10,000, or 4 a class if more"
    )
    max_test_images: int | None = setting(
        None, "use N images of a given test set", metavar="N", low=1, default_text="5,000, or 1 a class if more"
    )
    splits: str | None = setting(
        None,
        "of a folder, which folders are its splits",
        metavar="'train=A,holdout=B,test=C'",
        default_text="found by their usual names",
    )
    classes: str | None = setting(
        None,
        "of a folder in two levels, which are the classes",
        metavar="LEVEL",
        choices=("top", "leaf"),
        default_text="top, if that is no question",
    )
    annotations: str | None = setting(
        None, "of a folder, classes from a CSV file: file, class and perhaps split", metavar="FILE"
    )
    max_corrupt: float = setting(
        0.01,
        "images tolerated that are broken, missing or of two classes",
        metavar="SHARE",
        parse=parse_share,
        low=0.0,
        high=1.0,
        default_text="1%",
    )
    pixel_cache: bool = setting(True, "decode a folder's images each time instead of keeping their pixels")
