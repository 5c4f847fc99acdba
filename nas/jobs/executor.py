"""Where jobs run: worker processes of this machine, or a Ray cluster."""

from __future__ import annotations

from nas.jobs.local import LocalExecutor
from nas.jobs.pool import InlineExecutor, OutOfTime, Pool

Executor = Pool | InlineExecutor

__all__ = ["Executor", "InlineExecutor", "LocalExecutor", "OutOfTime", "Pool"]
