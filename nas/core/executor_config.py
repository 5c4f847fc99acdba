"""Where the jobs of a run are done: settings that change no answer."""

from __future__ import annotations

from dataclasses import dataclass

from nas.core.cli import MOST_AT_ONCE
from nas.core.settings import check_settings, setting
from space.errors import refuse

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class ExecutorConfig:
    """Where jobs run, how many at once, and how often a lost one is tried again.

    It changes no answer and may differ on a resume.
    """

    workers: int | None = setting(
        None,
        "jobs at a time; the cores are shared among them unless --threads says how many each has",
        group="where jobs run (changes no answer; may differ on --resume)",
        metavar="N",
        low=1,
        high=MOST_AT_ONCE,
        default_text="1, or one a GPU with --device cuda",
    )
    executor: str = setting(
        "local", "processes of this machine, or a cluster (needs the extra [ray])", metavar="NAME", choices=EXECUTORS
    )
    ray_address: str | None = setting(
        None,
        "of a running cluster: HOST:PORT or auto",
        metavar="ADDRESS",
        default_text="a cluster of this machine alone",
    )
    benchmark_resource: str | None = setting(
        None, "with Ray, time on nodes that have this resource, such as orin", metavar="RESOURCE", default_text="here"
    )
    copy_files: bool = setting(False, "with Ray, send files also to nodes that see this machine's (a slow shared disk)")
    retries: int = setting(2, "how often a job is tried again whose worker or node died", metavar="N", low=0, high=1000)
    job_memory_gb: float | None = setting(
        None, "memory that a job may take; more is its failure", metavar="GB", above=0.0, default_text="no limit"
    )
    gpu_share: float = setting(
        1.0, "of a GPU that a job takes", metavar="SHARE", above=0.0, want="a share of a GPU in (0, 1]"
    )
    job_minutes: float | None = setting(
        None, "a job that takes longer is ended and counts as lost", metavar="M", above=0.0, default_text="no limit"
    )

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_settings(self)
        if self.gpu_share > 1:
            raise refuse("--gpu-share", self.gpu_share, "a share of a GPU in (0, 1]")
        for name, given in (("--ray-address", self.ray_address), ("--benchmark-resource", self.benchmark_resource)):
            if given is not None and self.executor != "ray":
                raise refuse(name, f"{given} with --executor local", "--executor ray")
        if self.copy_files and self.executor != "ray":
            raise refuse("--copy-files", "--executor local", "--executor ray")

    @property
    def limit_s(self) -> float | None:
        """How long an attempt may take."""
        return None if self.job_minutes is None else 60 * self.job_minutes

    @property
    def memory_bytes(self) -> int | None:
        """How much memory a job may take."""
        return None if self.job_memory_gb is None else int(1e9 * self.job_memory_gb)
