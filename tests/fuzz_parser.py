"""What a reader of a user's file is to the fuzzer, and what their valid inputs are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from space import Context
from space.seal import sealed

ARCHS: dict[str, Mapping[str, Any]] = {
    "tinyvit": {
        "embed_dims": [64, 64, 96, 128],
        "depths": [1, 1, 2, 1],
        "window_sizes": [7, 14, 7],
        "mbconv_expand_ratio": 4.0,
        "mlp_ratio": 4.0,
        "head_dim": 32,
    },
    "vit": {
        "embed_dim": 32,
        "depth": 2,
        "head_dim": 16,
        "mlp_ratio": 2.0,
        "patch_size": 8,
        "dist_token": False,
    },
}
CONTEXT = Context(32, 3)
WEIGHTS = b"no weights, but a file"


@dataclass(frozen=True)
class Parser:
    """A reader under a name: `read(data, folder)` has the bytes and a scratch folder of its own;
    it gives a value or raises InputError. `seeds` are valid inputs."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def json_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def both(value: Mapping[str, Any]) -> list[bytes]:
    """Give an object with its seal and without: a fuzzer gets past the second alone."""
    return [json_of(sealed(value)), json_of(value)]


def file_of(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """Have a reader of files read the bytes under a name."""

    def work(data: bytes, folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read(path)

    return work
