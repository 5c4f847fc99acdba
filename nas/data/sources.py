"""Sources of images: what a source is, scikit-learn's digits, and whatever timm's readers open.

torch is imported only to open a reader's data set.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.core.progress import Tick
from nas.data.dataset import DataSpec
from nas.data.decode import as_rgb_key, chosen_img_size, fitted, refuse_bomb, shown_name, store_size_of, why_broken
from nas.data.split import TEST_IMAGES, choose, content_key, proxy_limit
from nas.data.tree import plain_name
from space.errors import refuse

DIGITS_IMG_SIZE = 48
DIGITS_VERSION = 1
"""Of the scaling below: another one is another data set."""
READER_VERSION = 3
PREFIXES = ("torch", "hfds", "wds")
_NEEDS = {
    "torch": ("torchvision", "pip install torchvision"),
    "hfds": ("datasets", "pip install -e '.[hub]'"),
    "wds": ("webdataset", "pip install -e '.[webdataset]'"),
}
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("validation", "val", "test", "valid")
_LOOKED_AT = 25


class ImagePool:
    """Decoded images in the order in which a source gives them: pixels on disk (or, with `path`
    None, nowhere), the rest here."""

    def __init__(self, path: Path | None, store_size: int) -> None:
        self._file = None if path is None else open(path, "wb")  # noqa: SIM115 - see `pixels`
        self._path = path
        self.store_size = store_size
        self.keys: list[str] = []
        self.pictures: list[str] = []  # hashes of decoded pixels
        self.labels: list[int] = []
        self.roles: list[str] = []
        self.names: list[str] = []
        self.broken: dict[str, str] = {}  # names with reasons
        self.grey_bits: int | None = None  # of deep grey, where there is any (`nas.data.decode.as_rgb`)

    def add(self, key: str, label: int, role: str, pixels: NDArray[np.uint8], name: str, picture: str = "") -> None:
        """Append one image, uint8 [S, S, 3], under its name for users; `picture` hashes what is decoded of it."""
        assert pixels.shape == (self.store_size, self.store_size, 3), pixels.shape
        assert pixels.dtype == np.uint8, pixels.dtype
        if self._file is not None:
            self._file.write(np.ascontiguousarray(pixels).data)
        self.keys.append(key)
        self.pictures.append(picture or key)
        self.labels.append(label)
        self.roles.append(role)
        self.names.append(name)

    def lose(self, name: str, why: str) -> None:
        """Count an image that could not be read, with the reason in a few words."""
        self.broken[name] = why

    def examples(self, most: int) -> str:
        """Name the first broken images, with reasons."""
        return ", ".join(f"{shown_name(name)} ({why})" for name, why in [*self.broken.items()][:most])

    def pixels(self) -> NDArray[np.uint8] | None:
        """Map all that was added: uint8 [n, S, S, 3]. Ends the adding."""
        if self._file is None or self._path is None:
            return None
        self._file.close()
        shape = (len(self.keys), self.store_size, self.store_size, 3)
        return np.memmap(self._path, dtype=np.uint8, mode="r", shape=shape)


@dataclass(frozen=True)
class DataSource:
    """A data set that has been inspected but not decoded; no `classes` means no ground truth.

    `identity` is plain JSON that changes when the content does; `decoding` names how pixels come about; `fill` decodes
    into a pool, ticking once an image; `seeded`: the cut is still to be drawn; `root` is the folder of the files if no
    pixels are kept; `given` are the sides, "holdout" or "test", that the user gave: they may lack classes.
    """

    name: str
    classes: tuple[str, ...]
    img_size: int
    store_size: int
    hflip: bool
    identity: Mapping[str, Any]
    decoding: str
    count: int
    fill: Callable[[ImagePool, Tick], None]
    notes: tuple[str, ...] = ()
    seeded: bool = True
    root: Path | None = None
    given: frozenset[str] = frozenset()


def digits(spec: DataSpec) -> DataSource:
    """Describe the set: ten classes, grey levels 0..16 scaled to 0..255, bicubic, RGB by copy."""
    size = spec.img_size or DIGITS_IMG_SIZE

    def fill(pool: ImagePool, tick: Tick) -> None:
        # Only the building process needs scikit-learn, and only once.
        from sklearn.datasets import load_digits

        table = load_digits()
        grey = np.round(table.images * (255.0 / 16.0)).astype(np.uint8)
        labels = np.asarray(table.target, dtype=np.int64)
        keys = [content_key(image.tobytes()) for image in grey]
        # So many that train and holdout hold at most `max_images`; the test side comes on top.
        count = len(keys) if spec.max_images is None else round(spec.max_images / 0.8)
        for row in choose(keys, labels, count, "proxy", at_least=3).tolist():
            image = Image.fromarray(grey[row]).resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.repeat(np.asarray(image)[:, :, None], 3, axis=2)
            pool.add(keys[row], int(labels[row]), "any", pixels, f"digit {row}")
            tick(1.0)

    return DataSource(
        name="digits",
        classes=tuple("0123456789"),
        img_size=size,
        store_size=size,
        hflip=False,
        identity={"digits": DIGITS_VERSION, "max_images": spec.max_images},
        decoding=f"digits {DIGITS_VERSION}",
        count=1797,
        fill=fill,
    )


@dataclass(frozen=True)
class _Side:
    """One split: images by number, or in a stream; `labels` where the reader lists them."""

    items: Any
    count: int
    labels: NDArray[np.int64] | None
    streamed: bool

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[Any, Any] | str]:
        """Return (image, label) of the wanted numbers, rising; of a broken one the reason."""
        if self.streamed:
            chosen = set(wanted)
            try:
                yield from (item for at, item in enumerate(self.items) if at in chosen)
            except Exception as error:  # a broken link or shard; streams cannot skip
                got = f"a stream that broke off ({_line(error)})"
                raise refuse("--data", got, "readable shards") from error
            return
        for at in wanted:
            try:
                image, label = self.items[at]
                refuse_bomb(image)
                image.load()
            except (AttributeError, IndexError, TypeError):
                raise  # not a damaged image but a data set of another kind
            except Exception as error:  # a damaged image raises almost anything
                yield why_broken(error)
            else:
                yield image, label


def reader(spec: DataSpec, cache_dir: Path) -> DataSource:
    """Open a data set through timm, downloading it if its reader can. Raises InputError."""
    prefix, _, rest = spec.data.partition("/")
    package, install = _NEEDS[prefix]
    if importlib.util.find_spec(package) is None:
        raise refuse("--data", spec.data, f"the package {package}", install)
    if not rest:
        raise refuse("--data", spec.data, f"a name after {prefix}/", "e.g. torch/cifar100")
    train = _opened(spec.data, TRAIN_SPLITS, cache_dir)
    if isinstance(train, Exception):
        want = "a data set that timm can open"
        raise refuse("--data", f"{spec.data} ({_line(train)})", want, "check name and network")
    test = _opened(spec.data, TEST_SPLITS, cache_dir)
    notes: list[str] = []
    sides = {"train": _side(train)}
    if isinstance(test, Exception):
        notes.append(f"no split for testing ({_line(test)}): it is cut from the training images")
        sides = {"any": sides["train"]}
    else:
        sides["test"] = _side(test)
    classes = _apart(_classes(train, next(iter(sides.values())), spec.data), notes)
    wanted = _wanted(sides, len(classes), spec.images_for(len(classes)), spec.max_test_images, notes)
    img_size = spec.img_size
    if img_size is None:
        role = next(iter(sides))
        found = sides[role].read(wanted[role][:_LOOKED_AT])
        img_size, line = chosen_img_size(item[0].size for item in found if not isinstance(item, str))
        notes.append(line)
    name, store_size = spec.data, store_size_of(img_size)

    def fill(pool: ImagePool, tick: Tick) -> None:
        for role, side in sides.items():
            split = "train" if role == "any" else role  # the split's name in timm
            for at, item in zip(wanted[role], side.read(wanted[role]), strict=False):
                shown = f"{split}[{at}]"
                if isinstance(item, str):
                    pool.lose(shown, item)
                else:
                    image, label = item[0], _checked_label(item[1], len(classes), name)
                    pool.add(as_rgb_key(image), label, role, fitted(image, img_size, store_size), shown)
                tick(1.0)

    return DataSource(
        name=name,
        classes=classes,
        img_size=img_size,
        store_size=store_size,
        hflip="mnist" not in name.lower(),
        identity={
            "reader": READER_VERSION,
            "counts": {role: [side.count, len(wanted[role])] for role, side in sides.items()},
            "shards": _shards(name),
        },
        decoding=f"reader {READER_VERSION}",
        count=sum(len(rows) for rows in wanted.values()),
        fill=fill,
        notes=tuple(notes),
    )


def _create(name: str, split: str, cache_dir: Path) -> Any:
    """Call timm; a seam for tests, which have no network."""
    from timm.data.dataset_factory import create_dataset

    prefix, _, rest = name.partition("/")
    if prefix == "torch":
        root = cache_dir / "downloads" / "torch"
        root.mkdir(parents=True, exist_ok=True)
        return create_dataset(name, root=str(root), split=split, download=True)
    if prefix == "wds":
        return create_dataset("wds/", root=rest, split=split)
    return create_dataset(name, split=split)


def _opened(name: str, splits: Iterable[str], cache_dir: Path) -> Any:
    """Open the first split that exists; give the first failure if none does."""
    first: Exception | None = None
    for split in splits:
        try:
            return _create(name, split, cache_dir)
        except Exception as error:  # network, disk, unknown name or split: each reader has its own
            first = first or error
    return first


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _side(items: Any) -> _Side:
    from torch.utils.data import IterableDataset

    if not hasattr(items, "__getitem__") or isinstance(items, IterableDataset):
        return _Side(items, len(items), None, True)
    labels = getattr(items, "targets", None)
    iter_targets = getattr(getattr(items, "reader", None), "iter_targets", None)
    if labels is None and iter_targets is not None:
        labels = list(iter_targets())
    known = np.asarray(labels)
    listed = known.ndim == 1 and known.dtype.kind in "iu"
    return _Side(items, len(items), known.astype(np.int64) if listed else None, False)


def _classes(items: Any, side: _Side, name: str) -> tuple[str, ...]:
    """Name the classes, by number where the set has no names. Raises InputError."""
    table = getattr(items, "class_to_idx", None) or getattr(getattr(items, "reader", None), "class_to_idx", None)
    listed = getattr(items, "classes", None)
    if listed:
        names = [", ".join(map(str, e)) if isinstance(e, (list, tuple)) else str(e) for e in listed]
    elif table:
        names = [str(key) for key, _ in sorted(table.items(), key=lambda pair: int(pair[1]))]
    elif side.labels is not None and len(side.labels):
        names = [str(number) for number in range(int(side.labels.max()) + 1)]
    else:
        read = side.read(range(side.count))
        last = max((int(item[1]) for item in read if not isinstance(item, str)), default=0)
        names = [str(number) for number in range(last + 1)]
    if len(names) < 2:
        raise refuse("--data", f"{name}, which has one class only", "at least two classes")
    return tuple(names)


def _apart(classes: tuple[str, ...], notes: list[str]) -> tuple[str, ...]:
    """Add its number to a name that several classes have, as two of ImageNet's are called crane."""
    times = Counter(plain_name(name) for name in classes)
    names = [f"{name} ({at})" if times[plain_name(name)] > 1 else name for at, name in enumerate(classes)]
    if added := [name for name, before in zip(names, classes, strict=True) if name != before]:
        notes.append(f"classes of one name are told apart by their numbers: {', '.join(added[:4])}")
    return tuple(names)


def _checked_label(label: Any, classes: int, name: str) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < classes:
        got = f"{name}, an image with label {label!r}"
        raise refuse("--data", got, f"one class number from 0 to {classes - 1}")
    return number


def _wanted(
    sides: dict[str, _Side], classes: int, asked: int | None, most_test: int | None, notes: list[str]
) -> dict[str, list[int]]:
    """Choose which numbers are read, stratified where the reader lists labels."""
    split = "test" in sides
    limits = {role: proxy_limit(classes, asked, split) for role in sides}
    if split:
        limits["test"] = max(TEST_IMAGES, classes) if most_test is None else most_test
    wanted: dict[str, list[int]] = {}
    for role, side in sides.items():
        labels = np.zeros(side.count, dtype=np.int64) if side.labels is None else side.labels
        ids = [str(at) for at in range(side.count)]
        rows = choose(ids, labels, limits[role], role, 1 if role == "test" else 3)
        wanted[role] = rows.tolist()
        if len(rows) < side.count:
            what = "test" if role == "test" else "training"
            flag = " (--max-test-images)" if role == "test" else " (--max-images)"
            notes.append(f"{len(rows):,} of {side.count:,} {what} images used{flag}")
    return wanted


def _shards(name: str) -> list[list[Any]]:
    """List the local files of a WebDataset with size and time; nothing for other readers."""
    prefix, _, rest = name.partition("/")
    if prefix != "wds" or not os.path.isdir(rest):
        return []
    about = [(e.name, e.stat()) for e in os.scandir(rest) if e.is_file()]
    return sorted([n, s.st_size, s.st_mtime_ns] for n, s in about)
