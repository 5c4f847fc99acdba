"""Files that are whole or not there: write aside, sync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from space.errors import refuse


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one."""
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON atomically: two spaces, keys in the order given, NaN refused."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """Read JSON that this toolkit wrote; a missing or damaged file is refused in one line."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise refuse(str(path), "no such file", what) from None
    except (OSError, ValueError) as error:
        raise refuse(
            str(path), f"{type(error).__name__}: {error}", what, "restore the file or start anew"
        ) from None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer left aside in `folder` (not below it)."""
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()
