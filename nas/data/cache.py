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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from space.errors import refuse

CAP_VARIABLE = "VISION_CONTRACTION_CACHE_CAP"
DEFAULT_CAP = 100 * 10**9
"""Bytes of decoded pixels kept, unless 80 % of the disk is less or the variable says otherwise."""
_SPARE = 64 << 20
_held: dict[Path, int] = {}
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


def hold(folder: Path) -> None:
    """Mark a data set as used now, and as in use until this process ends."""
    path = _marker(folder)
    with contextlib.suppress(OSError):  # a cache that may only be read cannot be cleaned either
        if folder not in _held:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, fcntl.LOCK_SH)
            _held[folder] = handle
        os.utime(path)


def _marker(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.use")


def _used(folder: Path) -> float:
    try:
        return _marker(folder).stat().st_mtime
    except OSError:
        return folder.stat().st_mtime


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _folders(cache: Path) -> list[Path]:
    data = cache / "data"
    if not data.is_dir():
        return []
    return [p for p in data.iterdir() if p.is_dir() and (p / "meta.json").is_file()]


def _in_use(folder: Path) -> bool:
    try:
        handle = os.open(_marker(folder), os.O_RDWR | os.O_CREAT, 0o644)
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
    """List the decoded data sets of a cache, least recently used first: name, bytes, when it was
    last used (local time) and whether a living process uses it."""
    found = sorted(_folders(Path(cache_dir)), key=lambda folder: (_used(folder), folder.name))
    return [
        {
            "name": folder.name,
            "bytes": _size(folder),
            "last_used": time.strftime("%Y-%m-%d %H:%M", time.localtime(_used(folder))),
            "in_use": folder in _held or _in_use(folder),
        }
        for folder in found
    ]


def clean_cache(cache_dir: Path, keep_bytes: int) -> int:
    """Remove the least recently used data sets until `keep_bytes` are left, but none in use.

    Returns how many bytes were removed.
    """
    folders = sorted(_folders(Path(cache_dir)), key=lambda folder: (_used(folder), folder.name))
    total, removed = sum(_size(folder) for folder in folders), 0
    for folder in folders:
        if total - removed <= keep_bytes:
            break
        removed += _remove(folder)
    return removed


def _remove(folder: Path) -> int:
    """Remove a data set that nobody uses; bytes freed."""
    if folder in _held:
        return 0
    try:
        handle = os.open(_marker(folder), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return 0
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = _size(folder)
        gone = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
        return size
    except OSError:
        return 0
    finally:
        os.close(handle)


def make_room(cache_dir: Path, stays: int, while_building: int, what: str) -> None:
    """Make room for a data set that will take `stays` bytes, and `while_building` for a time.

    Removes what was not used for longest where the cap or the disk asks for it. Raises InputError
    when even that does not do.
    """
    data = Path(cache_dir) / "data"
    for leftover in data.glob("*.gone-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    cap = cap_of(data)
    remedy = "ask for fewer --proxy-images, or decode as you go with --no-pixel-cache"
    if stays > cap:
        raise refuse(
            "--data", f"{what}, whose pixels take {stays / 1e9:.2f} GB",
            f"at most {cap / 1e9:.2f} GB, what the cache may hold",
            f"{remedy}, or raise {CAP_VARIABLE}",
        )  # fmt: skip
    clean_cache(Path(cache_dir), cap - stays)
    if shutil.disk_usage(data).free < while_building + _SPARE:
        clean_cache(Path(cache_dir), 0)
    free = shutil.disk_usage(data).free
    if free < while_building + _SPARE:
        raise refuse(
            "--data", f"{what}, whose decoding takes {while_building / 1e9:.2f} GB",
            f"at most the {max(0, free - _SPARE) / 1e9:.2f} GB that are free on the cache's disk",
            remedy,
        )  # fmt: skip
