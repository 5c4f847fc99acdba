"""Send files to the nodes of a cluster and back: each reaches a node once, whole or not at all."""

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
    """A file or folder on its way: a name that no other state has, and a reference to its bytes.

    `file` is the name of a file that travels alone, None for a folder.
    """

    name: str
    file: str | None
    reference: Any


def file_states(path: Path, *, top_only: bool = False) -> dict[str, tuple[int, int]]:
    """Return size and time of change of a file, or of the files of a folder, by relative name.

    Hidden files (locks, leftovers) and, with `top_only`, folders are left out. Raises
    FileNotFoundError.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    found = [path] if path.is_file() else path.iterdir() if top_only else path.rglob("*")
    files = [p for p in found if p.is_file() and not p.name.startswith(".")]
    stats = {(p.name if p == path else p.relative_to(path).as_posix()): p.stat() for p in files}
    return {name: (stats[name].st_size, stats[name].st_mtime_ns) for name in sorted(stats)}


def read_files(
    path: Path, *, top_only: bool = False, before: State | None = None
) -> dict[str, bytes]:
    """Read a file or a folder's files, by relative name; only those that changed since `before`."""
    folder = path.parent if path.is_file() else path
    states, known = file_states(path, top_only=top_only), before or {}
    return {n: (folder / n).read_bytes() for n, state in states.items() if known.get(n) != state}


def place_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files: a new folder at once, an existing one file by file, whole."""
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
        place_files(aside, files)
        aside.replace(out)


def fetch(bundle: Bundle, place: Path, load: Callable[[Any], Mapping[str, bytes]]) -> Path:
    """Return where a node keeps a bundle under `place`, loading it where it is not there yet.

    Safe in several processes at once.
    """
    folder = place / bundle.name
    with FileLock(place / f"{bundle.name}.lock"):
        if not folder.is_dir():
            place_files(folder, load(bundle.reference))
    return folder if bundle.file is None else folder / bundle.file
