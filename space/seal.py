"""JSON objects that know when they were changed: a checksum among their own values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from space.errors import refuse

SEAL = "seal"
"""The name under which an object keeps its checksum."""


def digest_of(value: object) -> str:
    """Hash plain JSON in its canonical form: 32 hex characters (blake2b). Raises ValueError for
    numbers that JSON has no word for."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Add the seal to an object, its keys in the order given."""
    # As it will be read: JSON has no tuples, and its keys are text.
    plain = json.loads(json.dumps({k: v for k, v in value.items() if k != SEAL}, allow_nan=False))
    return {**plain, SEAL: digest_of(plain)}


def unsealed(name: str, value: Any) -> Any:
    """Take the seal off an object that was read from `name`; one that does not fit is refused.

    What carries no seal (a user's own file, an older version's) comes back as it is.
    """
    if not isinstance(value, dict) or SEAL not in value:
        return value
    plain = {k: v for k, v in value.items() if k != SEAL}
    try:
        fits = value[SEAL] == digest_of(plain)
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        remedy = f'restore it; if you changed it yourself, take its "{SEAL}" out'
        raise refuse(name, "content that its seal does not fit", "the file as written", remedy)
    return plain
