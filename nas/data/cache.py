"""The cache of decoded data sets: found or decoded, how much it may hold, what is removed first.

A data set that is open in any process holds a shared lock on `<folder>.use`; removing takes an
exclusive one, so what is in use stays. Removing renames first: nothing half is ever found.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.io import digest_of, get_or_make, read_json
from nas.core.progress import Tick
from nas.data.dataset import MEAN, STD, Dataset, KeyTable, NameTable
from nas.data.decode import shown_name
from nas.data.layout import FORMAT, SIDES, file_of, read_folder, write_meta, write_pixels, write_table
from nas.data.sources import DataSource, ImagePool
from nas.data.split import contradicting, cut, unique_rows
from space.errors import refuse

CAP_VARIABLE = "VISION_CONTRACTION_CACHE_CAP"
DEFAULT_CAP = 100 * 10**9
"""Bytes of decoded pixels kept, unless 80 % of the disk is less or the variable says otherwise."""
_SPARE = 64 << 20
_REMEDY = "lower --max-images, or decode as you go with --no-pixel-cache"
_LEFT_OUT = "images left out"
_ALONE = fcntl.LOCK_EX | fcntl.LOCK_NB
_held: dict[str, int] = {}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(name: str, text: str) -> int:
    """Parse a size such as 50G, 500M or 1000000. Raises InputError."""
    body = text.strip().upper().removesuffix("B")
    unit = body[-1:] if body[-1:] in _UNITS and body[-1:] else ""
    number = body[: len(body) - len(unit)]
    try:
        size = float(number) * _UNITS[unit]
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e18:
        raise refuse(name, text, "a size in bytes such as 50G or 500M")
    return int(size)


def cap_of(folder: Path) -> int:
    """Return how many bytes the data sets of a cache may take. Raises InputError."""
    named = os.environ.get(CAP_VARIABLE)
    if named:
        return parse_bytes(CAP_VARIABLE, named)
    return min(DEFAULT_CAP, int(0.8 * shutil.disk_usage(folder).total))


def hold(folder: Path) -> bool:
    """Mark a data set as in use until this process ends; False if it is not there.

    After True, no process removes it.
    """
    if not folder.is_dir():
        return False
    claim(folder)  # waits for a process that is about to remove it
    return folder.is_dir()


def claim(folder: Path) -> None:
    """Mark a data set as used now and in use until this process ends, even before it is made."""
    name = os.path.abspath(folder)
    with contextlib.suppress(OSError):  # a cache that may only be read cannot be cleaned either
        if name not in _held:
            _held[name] = _locked(_marker(folder), fcntl.LOCK_SH, create=True)
        os.utime(_marker(folder))


def _locked(path: Path, how: int, *, create: bool) -> int:
    """Open a file and lock it until it is closed; returns its handle. Raises OSError."""
    handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    try:
        fcntl.flock(handle, how)
    except OSError:
        os.close(handle)
        raise
    return handle


def _marker(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.use")


def _used(folder: Path) -> float:
    for path in (_marker(folder), folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _size(folders: Iterable[Path]) -> int:
    """Count the bytes of folders together; files that they share by links count once."""
    found: dict[tuple[int, int], int] = {}
    for folder in folders:
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            for path in folder.iterdir():
                about = path.stat()
                found[about.st_dev, about.st_ino] = about.st_size
    return sum(found.values())


def _by_age(cache: Path) -> list[Path]:
    """List the data sets of a cache, least recently used first; nothing half built or half gone."""
    data = cache / "data"
    if not data.is_dir():
        return []
    whole = [p for p in data.iterdir() if "." not in p.name and (p / "meta.json").is_file()]
    return sorted(whole, key=lambda folder: (_used(folder), folder.name))


def _in_use(folder: Path) -> bool:
    if os.path.abspath(folder) in _held:
        return True
    try:
        os.close(_locked(_marker(folder), _ALONE, create=False))
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def cache_report(cache_dir: Path) -> list[Mapping[str, Any]]:
    """List the decoded data sets of a cache, least recently used first: name, bytes (files that data sets share count
    in each), when it was last used (local time) and whether a living process uses it."""
    return [
        {
            "name": folder.name,
            "bytes": _size([folder]),
            "last_used": time.strftime("%Y-%m-%d %H:%M", time.localtime(_used(folder))),
            "in_use": _in_use(folder),
        }
        for folder in _by_age(Path(cache_dir))
    ]


def clean_cache(cache_dir: Path, keep_bytes: int) -> int:
    """Remove what killed processes left and the least recently used data sets that are not in use, until `keep_bytes`
    are left; return how many bytes were removed."""
    _clear_leftovers(Path(cache_dir) / "data")
    folders = _by_age(Path(cache_dir))
    return _size(folders) - _remove_down_to(folders, lambda total: total <= keep_bytes)


def _remove(folder: Path) -> bool:
    """Remove a data set unless it is in use; returns whether it is gone."""
    if os.path.abspath(folder) in _held:
        return False
    gone = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
    try:
        handle = _locked(_marker(folder), _ALONE, create=True)
    except OSError:
        return False
    try:
        os.rename(folder, gone)
    except OSError:
        return False
    finally:
        os.close(handle)
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _remove_down_to(folders: list[Path], enough: Callable[[int], bool]) -> int:
    """Remove data sets in turn until the bytes of the rest are `enough`; returns what is left."""
    total = _size(folders)
    for folder in tuple(folders):
        if enough(total):
            break
        if _remove(folder):
            folders.remove(folder)
            total = _size(folders)
    return total


def _clear_leftovers(data: Path) -> None:
    """Remove what was renamed aside or half built by processes that were killed."""
    for gone in data.glob("*.gone-*"):
        shutil.rmtree(gone, ignore_errors=True)
    for half in data.glob("*.part"):
        with contextlib.ExitStack() as until:
            try:  # a builder that lives has held its lock since before it made the folder
                lock = half.with_suffix(".lock")
                until.callback(os.close, _locked(lock, _ALONE, create=False))
            except FileNotFoundError:
                pass
            except OSError:
                continue
            shutil.rmtree(half, ignore_errors=True)


def make_room(cache_dir: Path, stays: int, while_building: int, what: str) -> None:
    """Make room for a data set that will take `stays` bytes, and `while_building` for a time.

    Removes what was not used for longest, no more than needed, or nothing where that would not do. Raises InputError
    then.
    """
    cache = Path(cache_dir)
    data = cache / "data"
    _clear_leftovers(data)
    cap = cap_of(data)
    folders = _by_age(cache)
    total, fixed = _size(folders), _size(folder for folder in folders if _in_use(folder))
    if stays and fixed + stays > cap:
        got, most = f"{what}, whose pixels take {stays / 1e9:.2f} GB", max(0, cap - fixed)
        want = f"at most {most / 1e9:.2f} GB, what the cache may hold beside {fixed / 1e9:.2f} GB in use"
        raise refuse("--data", got, want, f"{_REMEDY}, or raise {CAP_VARIABLE}")
    if _free(data) + total - fixed < while_building:
        raise _no_disk(what, while_building, _free(data) + total - fixed)
    _remove_down_to(folders, lambda t: t + stays <= cap and _free(data) >= while_building)
    if _free(data) < while_building:  # removed files stay on disk while a process maps them
        raise _no_disk(what, while_building, _free(data))


def _free(data: Path) -> int:
    return max(0, shutil.disk_usage(data).free - _SPARE)


def _no_disk(what: str, need: int, free: int) -> Exception:
    got, most = f"{what}, whose decoding takes {need / 1e9:.2f} GB", f"at most the {free / 1e9:.2f} GB"
    return refuse("--data", got, f"{most} that can be freed on the cache's disk", _REMEDY)


def open_dataset(folder: Path, verify: bool = False) -> Dataset:
    """Open a cached data set; it counts as in use until this process ends. Raises InputError for what is missing or
    damaged.

    Checks the description, every table's bytes, every pixel file's size and header, and with `verify` its bytes.
    """
    hold(Path(folder))
    return read_folder(Path(folder), verify)


def folder_of(source: DataSource, random_seed: int, cache_dir: Path) -> Path:
    """Return the folder of a source's data set in the cache, be it there or not."""
    identity = {
        "format": FORMAT,
        "name": source.name,
        "img_size": source.img_size,
        "store_size": source.store_size,
        "random_seed": random_seed if source.seeded else None,
        "source": dict(source.identity),
        "pixels": source.root is None,
    }
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in source.name)
    return cache_dir / "data" / f"{kept.strip('-')[-24:].strip('-') or 'data'}-{digest_of(identity)}"


def _build(source: DataSource, folder: Path, random_seed: int, max_corrupt: float, tick: Tick) -> None:
    """Decode, cut and write into `folder`, which is empty."""
    pool_path = folder / "pool.raw" if source.root is None else None
    pool = ImagePool(pool_path, source.store_size)
    source.fill(pool, tick)
    total = len(pool.keys) + len(pool.broken)
    odd = contradicting(pool.pictures, pool.labels) if source.classes else {}
    for row, other in odd.items():
        name = source.classes[pool.labels[other]]
        pool.lose(pool.names[row], f"the picture of {shown_name(pool.names[other])}, of class {name}")
    _check_broken(len(pool.broken), total, max_corrupt, pool.examples(3))
    pixels = pool.pixels()
    usable = np.array([row for row in range(len(pool.keys)) if row not in odd], dtype=np.int64)
    pictures, roles = ([column[r] for r in usable] for column in (pool.pictures, pool.roles))
    kept = usable[unique_rows(pictures, roles)]
    keys, roles = ([column[r] for r in kept] for column in (pool.keys, pool.roles))
    labels = np.array(pool.labels, dtype=np.int64)[kept]
    sides = cut(keys, labels, roles, source.classes, random_seed, source.given)
    notes = list(source.notes)
    if len(kept) < len(usable):
        dropped = len(usable) - len(kept)
        noun = "image is a copy" if dropped == 1 else "images are copies"
        notes.append(f"{dropped} {noun} of others by decoded pixels and left out")
    if pool.broken:
        both = "broken or contradicting" if odd else "broken"
        notes.append(f"{len(pool.broken)} {both} {_LEFT_OUT}, e.g. {pool.examples(1)}")
    decoding = source.decoding
    if pool.grey_bits is not None:
        decoding += f", white {2**pool.grey_bits - 1}"
        notes.append(f"pictures of deep grey: white is {2**pool.grey_bits - 1:,} in all of them, kept with the model")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "name": source.name,
        "classes": list(source.classes),
        "img_size": source.img_size,
        "store_size": source.store_size,
        "hflip": source.hflip,
        "interpolation": "bicubic",
        "mean": list(MEAN),
        "std": list(STD),
        "decoding": decoding,
        "labelled_by": None,
    }
    truth = labels if source.classes else np.full(len(labels), -1, dtype=np.int64)
    for side, rows in sides.items():
        names = NameTable.of(pool.names[kept[r]] for r in rows)
        tables: dict[str, NDArray[Any]] = {
            "keys": KeyTable.of(keys[r] for r in rows).raw,
            "labels": truth[rows],
            "names": names.text,
            "ends": names.ends,
        }
        for name, table in tables.items():
            write_table(folder / file_of(side, name), table)
        if pixels is not None:
            write_pixels(folder / file_of(side, "pixels"), pixels, kept[rows])
    del pixels
    if pool_path is not None:
        pool_path.unlink()
    extra = {
        "root": None if source.root is None else os.fspath(source.root),
        "broken": [name.encode("utf-8", "backslashreplace").decode() for name in pool.broken],
        "notes": notes,
        "grey_bits": pool.grey_bits,
    }
    write_meta(folder, meta, extra)


def _check_broken(broken: int, total: int, most: float, examples: str) -> None:
    """Refuse a larger share of broken images than is tolerated."""
    if broken > most * total:
        got, remedy = (
            f"{broken} broken images of {total}, e.g. {examples}",
            "repair or remove them, or raise --max-corrupt",
        )
        raise refuse("--data", got, f"at most {most:.2%} broken or of two classes", remedy)


def cached(source: DataSource, random_seed: int, max_corrupt: float, cache_dir: Path, tick: Tick) -> Dataset:
    """Open a source's folder in the cache, decoding it first if it is not there. Raises InputError."""
    folder = folder_of(source, random_seed, cache_dir)

    def make(draft: Path) -> None:
        one = source.count * source.store_size**2 * 3 if source.root is None else 0
        # Decoded in the source's order first, then put in the order of the cut.
        make_room(cache_dir, one, 2 * one, source.name)
        _build(source, draft, random_seed, max_corrupt, tick)
        claim(folder)

    if get_or_make(folder, make, found=hold):
        return open_dataset(folder)
    tick(float(source.count))
    dataset = open_dataset(folder)
    # What was tolerated when it was decoded may not be now.
    examples = next((n.partition("e.g. ")[2] for n in dataset.notes if _LEFT_OUT in n), "")
    _check_broken(len(dataset.broken), source.count, max_corrupt, examples)
    return dataset


def relabelled(
    dataset: Dataset, cache_dir: Path, labels_by_side: Mapping[str, NDArray[np.int64]], classes: Sequence[str], by: str
) -> Dataset:
    """Give a data set the classes of a teacher `by`: side -> int64 [n] in 0 .. len(classes) - 1. Raises InputError.

    Made once and found again; it shares the first one's files by hard links where the file system has them.
    """
    content = hashlib.blake2b(digest_size=16)
    for side in SIDES:
        labels = np.asarray(labels_by_side[side])
        assert labels.shape == (len(getattr(dataset, side)),), (side, labels.shape)
        assert labels.min() >= 0, side
        assert labels.max() < len(classes), side
        content.update(labels.astype("<i8").tobytes())
    # The folder's name, as two sets of one content may have other file names, or no stored pixels.
    identity = [FORMAT, dataset.folder.name, dataset.fingerprint, by, list(classes)]
    digest = digest_of([*identity, content.hexdigest()])
    name = f"{dataset.folder.name.rsplit('-', 1)[0]}-{digest}"
    folder = Path(cache_dir) / "data" / name

    def make(draft: Path) -> None:
        meta = read_json(dataset.folder / "meta.json", "a data set of this cache")
        for path in dataset.folder.glob("*.npy"):
            if not path.name.endswith(".labels.npy"):
                _linked(path, draft / path.name)
        for side in SIDES:
            write_table(draft / file_of(side, "labels"), np.asarray(labels_by_side[side], dtype=np.int64))
        extra = {key: meta.pop(key) for key in ("root", "broken", "notes", "grey_bits") if key in meta}
        for key in ("fingerprint", "files"):
            del meta[key]
        write_meta(draft, {**meta, "classes": list(classes), "labelled_by": by}, extra)
        claim(folder)

    get_or_make(folder, make, found=hold)
    return open_dataset(folder)


def _linked(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, to)
