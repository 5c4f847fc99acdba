"""Convert dataclasses to plain JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def to_json(value: Any) -> Any:
    """Convert a dataclass, path, tuple, list or mapping of such to plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return value


def from_json(kind: Any, data: Any) -> Any:
    """Build a value of type `kind` from what `to_json` made of it.

    Dataclasses, paths, tuples and optional values are converted; all else stays as it is. Raises TypeError where fields
    are missing or unknown.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if data is None:
            return None
        (kind,) = (each for each in arguments if each is not NoneType)
        return from_json(kind, data)
    if origin is tuple:
        kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(from_json(each, item) for each, item in zip(kinds, data, strict=True))
    if kind is Path:
        return Path(data)
    if isinstance(kind, type) and is_dataclass(kind):
        kinds_of = get_type_hints(kind)
        return kind(**{k: from_json(kinds_of.get(k, Any), item) for k, item in data.items()})
    return data
