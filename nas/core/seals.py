"""safetensors files that know when they were changed: a checksum among their metadata. No torch."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.errors import refuse
from space.seal import SEAL

_BLOCK = 1 << 20
_METADATA = "__metadata__"
_LONGEST = 100_000_000
"""Bytes of a header that safetensors itself takes."""


def sealed_header(header: dict[str, Any], body: memoryview | bytes) -> bytes:
    """Give a file's beginning (length and header) with the seal of the header and its `body`.

    `header` is the parsed one, its metadata under `__metadata__`; its order is kept.
    """
    total = _begun(header)
    total.update(body)
    metadata = {**header.get(_METADATA, {}), SEAL: total.hexdigest()}
    text = json.dumps({**header, _METADATA: metadata}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _begun(header: dict[str, Any]) -> hashlib._Hash:
    """Hash a header without its seal, in its canonical form."""
    return hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())


def check_tensors(path: Path) -> None:
    """Compare a file with its seal, where it has one. Raises OSError, or ValueError in words."""
    with open(path, "rb") as file:
        raw = file.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
        if not 2 <= length <= _LONGEST:
            raise ValueError("no safetensors header")
        text = file.read(length)
        try:
            header = json.loads(text)
            metadata = header.get(_METADATA, {})
            seal = metadata.get(SEAL)
        except (ValueError, RecursionError, AttributeError):
            raise ValueError("no safetensors header") from None
        if seal is None:
            return
        header[_METADATA] = {k: v for k, v in metadata.items() if k != SEAL}
        total = _begun(header)
        while block := file.read(_BLOCK):
            total.update(block)
    if seal != total.hexdigest():
        raise ValueError("its checksum does not fit its content")


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read a file's arrays; a missing, damaged or changed one is refused in one line."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        check_tensors(path)
        return {name: np.asarray(value) for name, value in load_file(path).items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        remedy = "restore it, or remove its folder to have it made again"
        raise refuse(str(path), why, "the file as it was written", remedy) from None
