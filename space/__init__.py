"""What can be built: model families with factors, exact counts and legal contractions."""

from __future__ import annotations

from space.errors import InputError
from space.family import Arch, Context, Family, family_names, get_family

__all__ = ["Arch", "Context", "Family", "InputError", "family_names", "get_family"]
