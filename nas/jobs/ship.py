"""Files on their way to a node and back: each reaches a node once, whatever jobs use it.

A folder or file travels under a name made of its content. A node keeps what came to it in a
folder of its own; what a job leaves comes back as bytes and is put in place by the driver's side,
whole or not at all. No torch, no Ray.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from nas.core.io import write_atomic

_BLOCK = 1 << 20


def at(spec: Mapping[str, Any], dotted: str) -> Any:
    """Return what a dotted path names in a specification: `parent.weights`."""
    value: Any = spec
    for part in dotted.split("."):
        value = value[part]
    return value


def put(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a specification with other values at dotted paths."""
    found = copy.deepcopy(dict(spec))
    for dotted, value in changes.items():
        *way, last = dotted.split(".")
        place = found
        for part in way:
            place = place[part]
        place[last] = value
    return found


def content_name(path: Path, *, flat: bool = False) -> str:
    """Return a name for what a file or folder holds: SHA-256 over names and bytes, 32 characters.

    Here and below, `flat` leaves out what lies in folders of the folder.
    """
    digest = hashlib.sha256()
    for file in _files(path, flat):
        name = "" if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:32]


def quick_name(path: Path, *, flat: bool = False) -> str:
    """Return a name for the state of a file or folder: sizes and times of change, 32 characters."""
    digest = hashlib.sha256(str(path).encode())
    for file in _files(path, flat):
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:32]


def _files(path: Path, flat: bool = False) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(path)
    found = path.iterdir() if flat else path.rglob("*")
    return sorted(p for p in found if p.is_file() and not p.name.startswith("."))


def pack(path: Path, *, flat: bool = False) -> bytes:
    """Return a file or folder as an uncompressed tar; hidden files (locks, leftovers) stay."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for file in _files(path, flat):
            name = path.name if file == path else file.relative_to(path).as_posix()
            tar.add(file, arcname=name, recursive=False)
    return out.getvalue()


def arrive(place: Path, name: str, load: Callable[[], bytes], *, single: str | None) -> Path:
    """Return where a node keeps what is called `name`, fetching it if it is not there yet.

    `single` is the name of a file that travelled alone. Safe in several processes at once.
    """
    folder = place / name
    if not folder.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f"{name}.lock"):
            if not folder.is_dir():
                aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=place))
                try:
                    with tarfile.open(fileobj=io.BytesIO(load())) as tar:
                        tar.extractall(aside, filter="data")
                    os.chmod(aside, 0o755)
                    aside.replace(folder)
                except BaseException:
                    shutil.rmtree(aside, ignore_errors=True)
                    raise
    return folder if single is None else folder / single


def copy_of(folder: Path, target: Path, *, flat: bool) -> None:
    """Copy a folder."""
    for file in _files(folder, flat):
        there = target / file.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, there)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file in a folder, {} where there is none."""
    if not folder.is_dir():
        return {}
    found = {}
    for file in _files(folder):
        stat = file.stat()
        found[file.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def left(folder: Path, before: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """Return the files of a folder that are new or changed since `before`, by relative name."""
    return {
        name: (folder / name).read_bytes()
        for name, state in state_of(folder).items()
        if before.get(name) != state
    }


def place_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Put in place what a job left: a new folder at once, an existing one file by file, whole."""
    for name in files:
        parts = Path(name).parts
        assert parts, "a file without a name"
        assert ".." not in parts, name
        assert not Path(name).is_absolute(), name
    if out.is_dir():
        for name, data in sorted(files.items()):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out / name, data)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        for name, data in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(data)
        os.chmod(aside, 0o755)
        for name in files:
            with (aside / name).open("rb") as content, contextlib.suppress(OSError):
                os.fsync(content.fileno())
        aside.replace(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
