"""A piece of a label store: fixed records of one epoch, and a seal that tells what they are.

    records  uint8 [n, R]   one row per image, in the order of the store's key table
    seal     72 bytes       magic, store id, epoch, number, n, R, and a hash of all before it

A file that was cut, changed in any bit, or belongs elsewhere (another store, epoch or place) is
found by its seal alone. Epoch -1 is the holdout, seen as in evaluation.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HOLDOUT_EPOCH = -1
SEAL_BYTES = 72
MIN_RECORDS, MAX_RECORDS = 512, 65_536
_MAGIC = b"SOFTLAB2"
_LAYOUT = struct.Struct("<8s16siIII32s")
assert _LAYOUT.size == SEAL_BYTES


@dataclass(frozen=True, order=True)
class Piece:
    """Which piece: epoch (-1: the holdout), its number there, and its rows of the key table."""

    epoch: int
    number: int
    start: int
    count: int

    @property
    def name(self) -> str:
        """Where it lies in its store, with forward slashes."""
        folder = "holdout" if self.epoch == HOLDOUT_EPOCH else f"epoch-{self.epoch:04d}"
        return f"{folder}/{self.number:05d}.bin"

    @property
    def rows(self) -> slice:
        """Its rows of the key table."""
        return slice(self.start, self.start + self.count)


def piece_records(images: int) -> int:
    """Choose how many records a piece has: about sixteen pieces an epoch, 512 to 65,536 records.

    Always a multiple of what the teacher sees at a time, so that pieces never share a batch.
    """
    return min(MAX_RECORDS, max(MIN_RECORDS, 1 << max(images // 16, 1).bit_length() - 1))


def pieces_of(epoch: int, images: int, records: int) -> list[Piece]:
    """List the pieces of an epoch, in order."""
    return [
        Piece(epoch, number, start, min(records, images - start))
        for number, start in enumerate(range(0, images, records))
    ]


def sealed(piece: Piece, store_id: str, records: NDArray[np.uint8]) -> bytes:
    """Turn uint8 [count, R] into the bytes of the file."""
    assert records.shape[0] == piece.count, (records.shape, piece)
    body = np.ascontiguousarray(records).tobytes()
    return body + _seal(piece, store_id, records.shape[1], body)


def _seal(piece: Piece, store_id: str, record_bytes: int, body: bytes | memoryview) -> bytes:
    front = (_MAGIC, bytes.fromhex(store_id), piece.epoch, piece.number, piece.count, record_bytes)
    total = hashlib.blake2b(body, digest_size=32)
    total.update(_LAYOUT.pack(*front, b"")[: -total.digest_size])
    return _LAYOUT.pack(*front, total.digest())


def map_piece(
    path: Path, piece: Piece, store_id: str, record_bytes: int, *, check: bool = True
) -> NDArray[np.uint8]:
    """Map a piece's records: uint8 [count, R], read-only.

    With `check`, every byte is read once and compared with the seal; without it the length and
    what the seal says of itself. Raises OSError, or ValueError in words.
    """
    size, want = os.stat(path).st_size, piece.count * record_bytes + SEAL_BYTES
    if size != want:
        raise ValueError(f"{piece.name} has {size} bytes instead of {want}")
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    body, seal = whole[:-SEAL_BYTES], bytes(whole[-SEAL_BYTES:])
    if check:
        good = seal == _seal(piece, store_id, record_bytes, memoryview(body.data))
    else:
        front = _LAYOUT.unpack(seal)[:-1]
        good = front == _LAYOUT.unpack(_seal(piece, store_id, record_bytes, b""))[:-1]
    if not good:
        raise ValueError(f"{piece.name} {_what_is_wrong(seal, piece, store_id)}")
    return np.asarray(body).reshape(piece.count, record_bytes)


def _what_is_wrong(seal: bytes, piece: Piece, store_id: str) -> str:
    """Say whether a piece is damaged or stale."""
    magic, identity, epoch, number, *_ = _LAYOUT.unpack(seal)
    if magic == _MAGIC and identity.hex() != store_id:
        return f"is a stale piece of the store {identity.hex()[:12]}"
    if magic == _MAGIC and (epoch, number) != (piece.epoch, piece.number):
        return f"is the piece of epoch {epoch}, number {number}"
    return "does not fit its checksum"
