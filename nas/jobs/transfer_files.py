"""Send files to the nodes of a cluster and back; each is sent to a node once, and written whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from nas.core.io import write_atomic

State = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Bundle:
    """A file or folder to send: a unique name of its state, and a reference to its bytes.

    `file` is the name of a single file, empty for a folder.
    """

    name: str
    file: str
    reference: Any


def file_states(path: Path, *, top_only: bool = False) -> dict[str, tuple[int, int]]:
    """Return size and modification time of a file, or of a folder's files by relative name.

    Skips hidden files (locks, temporary ones) and, with `top_only`, subfolders. Raises FileNotFoundError.
    """
    path.stat()
    found = [path] if path.is_file() else path.iterdir() if top_only else path.rglob("*")
    files = [p for p in found if p.is_file() and not p.name.startswith(".")]
    stats = {(p.name if p == path else p.relative_to(path).as_posix()): p.stat() for p in files}
    return {name: (stats[name].st_size, stats[name].st_mtime_ns) for name in sorted(stats)}


def read_files(path: Path, *, top_only: bool = False, before: State | None = None) -> dict[str, bytes]:
    """Read a file or a folder's files, by relative name; only those that changed since `before`."""
    folder = path.parent if path.is_file() else path
    states, known = file_states(path, top_only=top_only), before or {}
    return {n: (folder / n).read_bytes() for n, state in states.items() if known.get(n) != state}


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files: a new folder atomically, into an existing one each file atomically."""
    for name in files:
        inside = name and ".." not in Path(name).parts and not Path(name).is_absolute()
        assert inside, name
    if out.is_dir():
        for name, data in sorted(files.items()):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out / name, data)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as base:
        aside = Path(base, out.name)
        aside.mkdir()
        write_files(aside, files)
        aside.replace(out)


def fetch(bundle: Bundle, cache: Path, load: Callable[[Any], Mapping[str, bytes]]) -> Path:
    """Return the path of a bundle under `cache`, loaded once for all processes of a node."""
    folder = cache / bundle.name
    with FileLock(cache / f"{bundle.name}.lock"):
        if not folder.is_dir():
            write_files(folder, load(bundle.reference))
    return folder / bundle.file
