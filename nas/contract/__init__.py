"""The search: contract a seed model step by step to a budget (`python -m nas.contract`)."""

from __future__ import annotations

from nas.contract.run import contract

__all__ = ["contract"]
