"""Making the executor that a user asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nas.jobs.local import LocalExecutor
from nas.jobs.means import LOGS, RECORD, WORKER_LOG, Means
from nas.jobs.pool import Pool
from space.errors import refuse


def visible_gpus() -> list[int]:
    """Return the indices of the GPUs that this process may use, without a driver library."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [int(text) for text in named.split(",") if text.strip().isdecimal()]
    try:
        return list(range(len(os.listdir("/proc/driver/nvidia/gpus"))))
    except OSError:
        return []


def workers_for(means: Means, device: str) -> tuple[int, list[int]]:
    """Return how many processes work here and which GPUs they take in turn.

    `cuda` without a number means every GPU there is; a single one needs no dealing out.
    """
    gpus = visible_gpus() if device == "cuda" else []
    gpus = gpus if len(gpus) > 1 else []
    each = int(1 / means.gpu_share + 1e-9) if device.startswith("cuda") else 1
    return means.workers or max(1, len(gpus)) * each, gpus


def make_executor(
    means: Means, *, threads: int, device: str = "cpu", folder: Path | None = None, **more: Any
) -> Pool:
    """Make the executor that a user asked for; its logs and records go to `folder`.

    Raises InputError, as where Ray is not installed.
    """
    workers, gpus = workers_for(means, device)
    kept: dict[str, Any] = {}
    if folder is not None:
        kept = {"log": folder / WORKER_LOG, "logs": folder / LOGS, "record": folder / RECORD}
    if means.executor == "ray":
        if device not in ("cpu", "cuda"):
            want = "cuda, as a cluster deals its GPUs out by itself"
            raise refuse("--device", f"{device} with --executor ray", want)
        from nas.jobs.ray import RayExecutor

        return RayExecutor(
            means=means, threads=threads, device=device, workers=workers, **kept, **more
        )
    return LocalExecutor(
        threads=threads,
        workers=workers,
        gpus=gpus,
        limit_s=means.limit_s,
        retries=means.retries,
        memory_bytes=means.memory_bytes,
        **kept,
        **more,
    )
