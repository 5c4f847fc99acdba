"""A data set as frozen values, with tables of keys and names that stay on disk. Numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.class_match import check_unchanged_classes
from nas.core.data_config import DataConfig, grown_images
from nas.core.settings import check_settings, setting
from space import Context
from space.errors import refuse

MEAN = (0.485, 0.456, 0.406)
"""Channel means that inputs are normalised with (ImageNet's, so that published weights fit)."""
STD = (0.229, 0.224, 0.225)
"""Channel standard deviations, likewise."""
EMBEDDED = ("digits", "fractals")
"""Data sets that come with the toolkit and need no download."""


@dataclass(frozen=True)
class DataSpec(DataConfig):
    """A request for a data set; `random_seed` decides which images are taken and held out. Raises InputError.

    With `images_may_grow` the number `max_images` is a default, which grows with the classes. With `test_only` a folder
    is read for its test set alone: the one that it gives, else all its images. `grey_bits` are a model's, for a
    folder's pictures of deep grey (`Dataset.grey_bits`).
    """

    random_seed: int = setting(0, "of the images taken and held out", low=0)
    images_may_grow: bool = False
    test_only: bool = False
    grey_bits: int | None = None

    def __post_init__(self) -> None:
        if not self.data.strip():
            raise refuse("--data", self.data, "a data set", "e.g. digits, fractals or a folder")
        check_settings(self)

    @classmethod
    def of(cls, config: object, random_seed: int, **changes: Any) -> DataSpec:
        """Take the settings of a command (a `DataConfig`, or parsed flags with its names), some of them changed."""
        values = {f.name: getattr(config, f.name) for f in fields(DataConfig) if f.name not in changes}
        return cls(**values, random_seed=random_seed, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the data, as plain JSON: a folder and a file by its absolute path."""
        path = Path(self.data).expanduser()
        place = self.data if self.data in EMBEDDED or not path.is_dir() else str(path.resolve())
        left_out = {"pixel_cache"} if self.images_may_grow else {"pixel_cache", "images_may_grow"}
        left_out |= {"grey_bits"} if self.grey_bits is None else set()
        found = {k: v for k, v in {**asdict(self), "data": place}.items() if k not in left_out}
        if self.annotations is not None and Path(self.annotations).is_file():
            found["annotations"] = str(Path(self.annotations).resolve())
        return found

    def images_for(self, classes: int) -> int | None:
        """Return `max_images` for so many classes."""
        grows = self.images_may_grow and self.max_images is not None
        return grown_images(self.max_images or 0, classes) if grows else self.max_images


class KeyTable(Sequence[str]):
    """Keys of 32 hex characters over their bytes, `raw` uint8 [n, 16], mapped or not."""

    def __init__(self, raw: NDArray[np.uint8]) -> None:
        assert raw.ndim == 2, raw.shape
        assert raw.shape[1] == 16, raw.shape
        self.raw = raw

    @staticmethod
    def of(keys: Iterable[str]) -> KeyTable:
        """Make a table of hex keys."""
        coded = [bytes.fromhex(key) for key in keys]
        assert all(len(one) == 16 for one in coded), "a key has 32 hex characters"
        return KeyTable(np.frombuffer(b"".join(coded), dtype=np.uint8).reshape(-1, 16))

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, at: Any) -> Any:
        return KeyTable(self.raw[at]) if isinstance(at, slice) else bytes(self.raw[at]).hex()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.raw), 4096):
            text = np.ascontiguousarray(self.raw[start : start + 4096]).tobytes().hex()
            yield from (text[at : at + 32] for at in range(0, len(text), 32))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, KeyTable):
            return np.array_equal(self.raw, other.raw)
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


class NameTable(Sequence[str]):
    """Strings over one array of UTF-8 bytes, `text` uint8 [m], and where each `ends`, int64 [n]."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @staticmethod
    def of(names: Iterable[str]) -> NameTable:
        """Make a table of strings; what no text can hold is kept as the file system gave it."""
        coded = [name.encode("utf-8", "surrogateescape") for name in names]
        ends = np.cumsum([len(name) for name in coded], dtype=np.int64)
        return NameTable(np.frombuffer(b"".join(coded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[row] for row in range(*at.indices(len(self)))]
        row = int(at) + (len(self) if at < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(at)
        start = int(self.ends[row - 1]) if row else 0
        return bytes(self.text[start : int(self.ends[row])]).decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one side of a cut, sorted by key.

    `keys` hash the images' content (32 hex characters, unique in the data set); `labels` int64 [n], -1 without ground
    truth; `pixels` uint8 [n, S, S, 3], mapped or decoded on access; `names` are those of the user's files.
    """

    keys: Sequence[str]
    labels: NDArray[np.int64]
    pixels: Any
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.keys, KeyTable):
            object.__setattr__(self, "keys", KeyTable.of(self.keys))

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images, cut into train, holdout and test.

    `img_size` is what a model sees, `store_size` (S) what is stored: evaluation takes the centre. `fingerprint` hashes
    all that decides the content, `preparation` only what decides the pixels of an image. `broken` names images that
    were left out; `notes` are lines for the user; `labelled_by` is a teacher whose classes stand for the truth.
    `grey_bits` tells white of deep grey, where there are such pictures: 2^grey_bits - 1, from the brightest of them
    all.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    img_size: int
    store_size: int
    train: Split
    holdout: Split
    test: Split
    fingerprint: str
    broken: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    hflip: bool
    notes: tuple[str, ...]
    preparation: str
    labelled_by: str | None = None
    grey_bits: int | None = None

    @property
    def labelled(self) -> bool:
        """Whether images have classes at all."""
        return len(self.classes) > 0

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def context(self) -> Context:
        """The context of a model for these images."""
        return Context(img_size=self.img_size, num_classes=self.num_classes)

    @property
    def crop_pct(self) -> float:
        """Share of the resized side that evaluation crops, as timm's `crop_pct`.

        timm takes floor(img_size / crop_pct) for that side, hence the quarter of a pixel.
        """
        return 1.0 if self.store_size == self.img_size else self.img_size / (self.store_size + 0.25)


def subset_by_key(split: Split, images: int | None) -> list[int] | None:
    """Take the first images by key, which is a hash of content: a fixed random subset."""
    if images is None or images >= len(split):
        return None
    return sorted(range(len(split)), key=lambda row: split.keys[row])[:images]


def check_card_classes(card: Mapping[str, Any], classes: Sequence[str], whose: str) -> None:
    """Refuse data whose classes are not those of a `dataset_card`, naming the first that differs. Raises InputError.

    Cards without names, and those of classes that a teacher gave, are passed.
    """
    known = card.get("class_names")
    if isinstance(known, list) and known and card.get("labelled_by") is None:
        check_unchanged_classes(classes, known, "--data", whose, "restore the data, or start anew in another folder")


def dataset_card(dataset: Dataset) -> dict[str, Any]:
    """Summarise a data set as plain JSON, for `run.json` and reports."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "classes": len(dataset.classes),
        "class_names": list(dataset.classes),
        "labelled_by": dataset.labelled_by,
        "img_size": dataset.img_size,
        "train": len(dataset.train.labels),
        "holdout": len(dataset.holdout.labels),
        "test": len(dataset.test.labels),
        "broken": list(dataset.broken[:100]),
        "notes": list(dataset.notes),
    }
