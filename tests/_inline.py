"""An executor that runs jobs in the test's own process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from nas.core.progress import Tick, no_tick
from nas.jobs.job import Job, Result, run_job
from nas.jobs.queue import Executor, KeyTick, OutOfTime, no_key_tick


class InlineExecutor(Executor):
    """Runs jobs one by one, checking the deadline before each; `seen` may answer a job in place of its function."""

    def __init__(self, seen: Callable[[Job], Result | None] = lambda job: None) -> None:
        self.seen = seen

    def run(self, job: Job, *, tick: Tick = no_tick, deadline: float | None = None, **_: Any) -> Result:
        if deadline is not None and time.monotonic() >= deadline:
            raise OutOfTime(job.key)
        return self.seen(job) or run_job(job, tick)

    def stream(
        self, jobs: Sequence[Job], *, tick: KeyTick = no_key_tick, deadline: float | None = None, **_: Any
    ) -> Iterator[Result]:
        for job in jobs:
            yield self.run(job, tick=partial(tick, job.key), deadline=deadline)

    def release(self) -> None: ...

    def close(self) -> None: ...
