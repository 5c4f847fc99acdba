"""What the driver's own tool tells of a GPU: driver, clocks, other processes. No torch."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache


def _index(device: str) -> str:
    # torch counts among the visible devices, nvidia-smi among all of them.
    number = int(device.partition(":")[2] or 0)
    shown = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return shown[number] if number < len(shown) and shown[number] else str(number)


def _query(what: str, device: str, of: str = "gpu") -> list[str] | None:
    """Ask nvidia-smi; the lines of its answer, or None where it does not answer."""
    index = _index(device)
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-{of}={what}", "--format=csv,noheader,nounits", "-i", index],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()]


def _number(lines: list[str] | None) -> float | None:
    try:
        return None if not lines else float(lines[0])
    except ValueError:  # "[N/A]"
        return None


@lru_cache(maxsize=8)
def driver(device: str) -> str | None:
    """Return the driver's version."""
    lines = _query("driver_version", device)
    return lines[0] if lines else None


@lru_cache(maxsize=8)
def nominal_mhz(device: str) -> float | None:
    """Return the highest clock of the multiprocessors: part of the device's identity."""
    return _number(_query("clocks.max.sm", device))


def clock_mhz(device: str) -> float | None:
    """Return the present clock of the multiprocessors: a condition."""
    return _number(_query("clocks.sm", device))


def other_processes(device: str) -> int | None:
    """Count the processes on the GPU that are not this one."""
    lines = _query("pid", device, of="compute-apps")
    if lines is None:
        return None
    return sum(1 for line in lines if line.isdigit() and int(line) != os.getpid())
