"""Where the jobs of a run are done: settings that change no answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nas.core.cli import MOST_AT_ONCE
from space.errors import read_int, refuse

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class ExecutorConfig:
    """Where jobs run, how many at once, and how often a lost one is tried again.

    It changes no answer. `workers` None: one, or one a `gpu_share`. `job_minutes` and
    `job_memory_gb` None: no limit. `ray_address` None: a cluster of this machine alone;
    `measure_on` names the resource of the nodes that are timed (None: the driver's machine);
    `ship` sends files also to nodes that see the driver's own.
    """

    executor: str = "local"
    workers: int | None = None
    retries: int = 2
    job_minutes: float | None = None
    job_memory_gb: float | None = None
    gpu_share: float = 1.0
    ray_address: str | None = None
    measure_on: str | None = None
    ship: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.executor not in EXECUTORS:
            raise refuse("--executor", self.executor, f"one of {', '.join(EXECUTORS)}")
        if self.workers is not None:
            read_int("--workers", self.workers, 1, MOST_AT_ONCE)
        read_int("--retries", self.retries, 0, 1000)
        limits = (("--job-minutes", self.job_minutes), ("--job-memory-gb", self.job_memory_gb))
        for name, number in limits:
            if number is not None and not (math.isfinite(number) and number > 0):
                raise refuse(name, number, "a number above 0")
        if not 0 < self.gpu_share <= 1:
            raise refuse("--gpu-share", self.gpu_share, "a share of a GPU in (0, 1]")
        for name, given in (("--ray-address", self.ray_address), ("--measure-on", self.measure_on)):
            if given is not None and self.executor != "ray":
                raise refuse(name, f"{given} with --executor local", "--executor ray")
        if self.ship and self.executor != "ray":
            raise refuse("--ship", "--executor local", "--executor ray")

    @property
    def limit_s(self) -> float | None:
        """How long an attempt may take."""
        return None if self.job_minutes is None else 60 * self.job_minutes

    @property
    def memory_bytes(self) -> int | None:
        """How much memory a job may take."""
        return None if self.job_memory_gb is None else int(1e9 * self.job_memory_gb)
