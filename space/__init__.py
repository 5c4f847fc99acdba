"""Model families: their factors, exact counts, legal contractions, builds and weight slices."""

from __future__ import annotations

from space.errors import InputError
from space.family import REFERENCE_CONTEXT, Arch, Context, Family, family_names, get_family

__all__ = ["REFERENCE_CONTEXT", "Arch", "Context", "Family", "InputError", "family_names", "get_family"]
