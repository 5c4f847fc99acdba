"""Make the executor that the settings ask for."""

from __future__ import annotations

import os
from pathlib import Path

from nas.core.executor_config import ExecutorConfig
from nas.jobs.job import LOGS, RECORD, WORKER_LOG
from nas.jobs.local import LocalBackend, WorkerOptions
from nas.jobs.queue import Executor
from space.errors import refuse


def visible_gpus() -> list[int]:
    """Return the indices of the GPUs that this process may use; loads no driver library."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [int(text) for text in named.split(",") if text.strip().isdecimal()]
    try:
        return list(range(len(os.listdir("/proc/driver/nvidia/gpus"))))
    except OSError:
        return []


def workers_for(config: ExecutorConfig, device: str) -> tuple[int, list[int]]:
    """Return the number of workers, and the GPUs that they take in turn.

    `cuda` without a number means every GPU; a single one is not assigned.
    """
    gpus = visible_gpus() if device == "cuda" else []
    gpus = gpus if len(gpus) > 1 else []
    each = int(1 / config.gpu_share + 1e-9) if device.startswith("cuda") else 1
    return config.workers or max(1, len(gpus)) * each, gpus


def make_executor(config: ExecutorConfig, *, threads: int, device: str = "cpu", folder: Path | None = None) -> Executor:
    """Make the executor of `config`; its logs and attempts go to `folder`. Raises InputError."""
    workers, gpus = workers_for(config, device)
    options = WorkerOptions(
        threads=threads,
        limit_s=config.limit_s,
        memory_bytes=config.memory_bytes,
        log=None if folder is None else folder / WORKER_LOG,
        logs=None if folder is None else folder / LOGS,
    )
    if config.executor == "local":
        backend = LocalBackend(options, workers, gpus)
    else:
        if device not in ("cpu", "cuda"):
            want = "cuda, as a cluster assigns its GPUs itself"
            raise refuse("--device", f"{device} with --executor ray", want)
        from nas.jobs.ray import RayBackend

        backend = RayBackend(config, options, device=device, workers=workers)
    return Executor(backend, retries=config.retries, record=None if folder is None else folder / RECORD)
