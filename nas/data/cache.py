"""The folder of decoded data sets: what it may take, what is in use, what goes first.

A data set that is open in any process holds a shared lock on `<folder>.use`; removing takes an
exclusive one, so what is in use stays. Removing renames first: nothing half is ever found.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from space.errors import refuse

CAP_VARIABLE = "VISION_CONTRACTION_CACHE_CAP"
DEFAULT_CAP = 100 * 10**9
"""Bytes of decoded pixels kept, unless 80 % of the disk is less or the variable says otherwise."""
_SPARE = 64 << 20
_REMEDY = "ask for fewer --proxy-images, or decode as you go with --no-pixel-cache"
_held: dict[str, int] = {}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(name: str, text: str) -> int:
    """Read a size such as 50G, 500M or 1000000. Raises InputError."""
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
    """Say how many bytes the data sets of a cache may take. Raises InputError."""
    named = os.environ.get(CAP_VARIABLE)
    if named:
        return parse_bytes(CAP_VARIABLE, named)
    return min(DEFAULT_CAP, int(0.8 * shutil.disk_usage(folder).total))


def hold(folder: Path) -> bool:
    """Mark a data set as used now, and as in use until this process ends; False if it is not there.

    After True, nobody removes it.
    """
    if not folder.is_dir():
        return False
    claim(folder)  # waits for a process that is about to remove it
    return folder.is_dir()


def claim(folder: Path) -> None:
    """Mark a data set as in use until this process ends, be it there or about to be."""
    name = os.path.abspath(folder)
    with contextlib.suppress(OSError):  # a cache that may only be read cannot be cleaned either
        if name not in _held:
            handle = os.open(_marker(folder), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_SH)
            except OSError:
                os.close(handle)
                raise
            _held[name] = handle
        os.utime(_marker(folder))


def _marker(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.use")


def _used(folder: Path) -> float:
    for path in (_marker(folder), folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _files(folder: Path) -> dict[tuple[int, int], int]:
    """List a folder's files as (device, inode) -> bytes: data sets may share files by links."""
    found: dict[tuple[int, int], int] = {}
    with contextlib.suppress(OSError):  # removed by another process meanwhile
        for path in folder.iterdir():
            about = path.stat()
            found[about.st_dev, about.st_ino] = about.st_size
    return found


def _size(folders: Iterable[Path]) -> int:
    """Count the bytes of folders together, shared files once."""
    found: dict[tuple[int, int], int] = {}
    for folder in folders:
        found.update(_files(folder))
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
        handle = os.open(_marker(folder), os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def cache_report(cache_dir: Path) -> list[Mapping[str, Any]]:
    """List the decoded data sets of a cache, least recently used first: name, bytes (files that
    data sets share count in each), when it was last used (local time) and whether a living process
    uses it."""
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
    """Remove the least recently used data sets until `keep_bytes` are left, but none in use; and
    what killed processes left half done.

    Returns how many bytes were removed.
    """
    _clear_leftovers(Path(cache_dir) / "data")
    folders = _by_age(Path(cache_dir))
    before = total = _size(folders)
    for folder in tuple(folders):
        if total <= keep_bytes:
            break
        if _remove(folder):
            folders.remove(folder)
            total = _size(folders)
    return before - total


def _remove(folder: Path) -> bool:
    """Remove a data set unless it is in use; tells whether it went."""
    if os.path.abspath(folder) in _held:
        return False
    try:
        handle = os.open(_marker(folder), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return False
    gone = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(folder, gone)
    except OSError:
        return False
    finally:
        os.close(handle)
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _clear_leftovers(data: Path) -> None:
    """Remove what was renamed aside or half built by processes that were killed."""
    for gone in data.glob("*.gone-*"):
        shutil.rmtree(gone, ignore_errors=True)
    for half in data.glob("*.part"):
        # A builder that lives holds its lock; it has it before it makes the folder.
        with contextlib.ExitStack() as until:
            try:
                name = half.name.removesuffix(".part")
                handle = os.open(data / f"{name}.lock", os.O_RDWR)
                until.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                pass
            except OSError:
                continue
            shutil.rmtree(half, ignore_errors=True)


def make_room(cache_dir: Path, stays: int, while_building: int, what: str) -> None:
    """Make room for a data set that will take `stays` bytes, and `while_building` for a time.

    Removes what was not used for longest, as much as the cap or the disk asks for, and nothing
    where even that would not do. Raises InputError then.
    """
    cache = Path(cache_dir)
    data = cache / "data"
    _clear_leftovers(data)
    cap = cap_of(data)
    if stays > cap:
        raise _too_large(what, stays, cap, "what the cache may hold")
    folders = _by_age(cache)
    used = [folder for folder in folders if _in_use(folder)]
    total, fixed = _size(folders), _size(used)
    if stays and fixed + stays > cap:
        told = f"what the cache may hold beside the {fixed / 1e9:.2f} GB of data sets in use"
        raise _too_large(what, stays, max(0, cap - fixed), told)
    if _free(data) + total - fixed < while_building:
        raise _no_disk(what, while_building, _free(data) + total - fixed)
    for folder in tuple(folders):
        if total + stays <= cap and _free(data) >= while_building:
            break
        if _remove(folder):
            folders.remove(folder)
            total = _size(folders)
    if _free(data) < while_building:  # what is removed stays on disk while somebody has it mapped
        raise _no_disk(what, while_building, _free(data))


def _free(data: Path) -> int:
    return max(0, shutil.disk_usage(data).free - _SPARE)


def _too_large(what: str, stays: int, most: int, told: str) -> Exception:
    return refuse(
        "--data",
        f"{what}, whose pixels take {stays / 1e9:.2f} GB",
        f"at most {most / 1e9:.2f} GB, {told}",
        f"{_REMEDY}, or raise {CAP_VARIABLE}",
    )


def _no_disk(what: str, need: int, free: int) -> Exception:
    return refuse(
        "--data",
        f"{what}, whose decoding takes {need / 1e9:.2f} GB",
        f"at most the {free / 1e9:.2f} GB that can be freed on the cache's disk",
        _REMEDY,
    )
