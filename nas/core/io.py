"""Files on disk: atomic writes, checked JSON, checksums, safetensors arrays and cache folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from space.errors import InputError, refuse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors of a full, read-only or broken disk: of the machine, never of a candidate."""


def disk_refusal(error: BaseException) -> InputError | None:
    """Return a refusal in one line where an error is the disk's, else None.

    Libraries wrap the system's error in their own; its text remains.
    """
    code = error.errno if isinstance(error, OSError) else None
    text = " ".join(str(error).split())
    if code is None:
        found = re.search(r"os error (\d+)|\[Errno (\d+)\]", text)
        code = int(found[1] or found[2]) if found else None
        if code is None and re.search(r"no space left|disk is full|quota exceeded", text, re.I):
            code = errno.ENOSPC
    if code not in WRITE_ERRORS:
        return None
    named = getattr(error, "filename", None)
    where = str(named) if isinstance(named, (str, Path)) else "a file"
    return refuse(
        where, os.strerror(code), "room and permission to write", "see to it, then go on with --resume; nothing is lost"
    )


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one.

    The user's umask decides who may read and write it: a group that shares a cache, or its owner alone.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: two spaces, keys in the order given, NaN refused."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """Read JSON, of this toolkit or a user; a missing or unreadable file is refused."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise refuse(str(path), "no such file", what) from None
    except (OSError, ValueError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise refuse(str(path), got, what, "restore the file or start anew") from None


def read_object(path: Path, what: str, schema: Mapping[str, type]) -> dict[str, Any]:
    """Read a JSON object and check that it has the values of `schema` (see `check_object`)."""
    return check_object(str(path), read_json(path, what), what, schema)


def check_object(name: str, value: Any, what: str, schema: Mapping[str, type]) -> dict[str, Any]:
    """Return a JSON object after checking that each name of `schema` has a value of its type.

    An integer is a float too, a boolean is neither; further values are not checked. Raises InputError naming `name`.
    """
    if not isinstance(value, dict):
        raise refuse(name, f"{type(value).__name__}", f"{what}: a JSON object")
    for key, kind in schema.items():
        found = value.get(key)
        kinds = (int, float) if kind is float else (kind,)
        if key not in value:
            raise refuse(name, f"no {key}", what, "restore the file or start anew")
        if not isinstance(found, kinds) or (isinstance(found, bool) and kind is not bool):
            want = f"{key} of type {kind.__name__} in {what}"
            raise refuse(name, f"{key}: {found!r}", want, "restore the file or start anew")
    return value


def digest_of(value: object) -> str:
    """Hash plain JSON in its canonical form: 32 hex characters (blake2b). Raises ValueError for numbers that JSON has
    no word for."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file's bytes, read in blocks of 64 KiB: 64 hex characters. Raises OSError."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 16):
            total.update(block)
    return total.hexdigest()


def check_sha256(path: Path, sha256: object, remedy: str = "restore it") -> None:
    """Refuse a file that is missing, or whose bytes are not those that its JSON names."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise refuse(str(path), error.strerror, "the file as it was written", remedy) from None
    if found != sha256:
        got, want = f"sha256 {found[:12]}...", f"{str(sha256)[:12]}..., as written"
        raise refuse(str(path), got, want, f"it is damaged: {remedy}")


def load_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read the arrays of a safetensors file; a missing or damaged one is refused."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error
        remedy = "restore it, or remove its folder to have it made again"
        raise refuse(str(path), why, "a safetensors file of arrays", remedy) from None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer left aside in `folder` (not below it): files and folders."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            leftover.unlink()


def get_or_make(
    key: Path, make: Callable[[Path], None], *, found: Callable[[Path], bool] = Path.is_dir, resumable: bool = False
) -> bool:
    """Make a cache's folder `key` unless it is there already; return whether it was made now.

    One process makes it, under the lock `<key>.lock`, while others wait: `make` fills the draft `<key>.part`, which is
    then renamed, so that a folder is whole or not there. The draft of a killed process is removed first; a `resumable`
    one is continued. Raises InputError where the cache cannot be written.
    """
    from filelock import FileLock  # slow to import, and the command line needs no cache

    if found(key):
        return False
    draft = key.with_name(f"{key.name}.part")
    try:
        key.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{key}.lock"):
            if found(key):
                return False
            if not resumable:
                shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(exist_ok=True)
            remove_leftovers(draft)
            try:
                make(draft)
                os.rename(draft, key)
            finally:
                if not resumable:
                    shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        want = "a folder with room to write"
        raise refuse("--cache-dir", f"{key.parent.parent} ({error})", want) from error
    return True


def member(folder: Path, name: object, what: str, *, links: bool = False) -> Path:
    """Find a file that a folder's own JSON names; one that lies elsewhere is refused.

    No absolute path, no way up, and, unless `links` may, no link that leads out: what is copied or read by such a name
    stays inside.
    """
    want = f"the name of a file inside {folder}"
    if not isinstance(name, str) or not name or "\0" in name:
        raise refuse(what, repr(name), want)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise refuse(what, name, want)
    try:
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name of no text
        raise refuse(what, f"{name!r} ({error})", want) from None
    if not inside and not links:
        raise refuse(what, f"{name}, a link that leads out", want)
    return folder / name
