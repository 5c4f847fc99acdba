"""Files that know when they were changed: hashes, and JSON with a checksum of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.core.io import write_atomic
from space.seal import SEAL, digest_of

__all__ = ["digest_of", "file_sha256", "read_sealed", "write_sealed"]


def _sealed_bytes(value: Mapping[str, Any], seal: object) -> bytes:
    return (json.dumps({**value, SEAL: seal}, sort_keys=True, indent=0) + "\n").encode()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain JSON with a checksum of itself, atomically."""
    write_atomic(path, _sealed_bytes(value, digest_of(dict(value))))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote. Raises OSError, or ValueError if one bit of it changed."""
    raw = path.read_bytes()
    try:
        value = json.loads(raw.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a table of values")
    seal = value.pop(SEAL, None)
    # The bytes are compared too: a flipped bit in white space changes no value.
    if seal != digest_of(value) or raw != _sealed_bytes(value, seal):
        raise ValueError("its checksum does not fit its content")
    return value


def file_sha256(path: Path) -> str:
    """Hash a file's bytes, read in pieces of 64 KiB: 64 hex characters."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 16):
            total.update(block)
    return total.hexdigest()
