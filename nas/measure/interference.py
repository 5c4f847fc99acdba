"""Disturbances of a measurement: waiting for a core, changed clocks, other processes on a GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Conditions:
    """What holds for a moment only, and is never identity.

    The one-minute load average, the CPU's or GPU's present clock in MHz, other processes on the GPU (None where that is
    unknown), and the time (UTC, ISO 8601).
    """

    load: float | None
    when: str
    clock_mhz: float | None = None
    gpu_others: int | None = None


def conditions(device: str = "cpu") -> Conditions:
    """Read the conditions of this moment; None where the system has no such number."""
    try:
        load: float | None = os.getloadavg()[0]
    except (OSError, AttributeError):
        load = None
    clock, others = _cpu_clock_mhz(), None
    if device.startswith("cuda"):
        clock, others = gpu_clock_mhz(device), other_gpu_processes(device)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Conditions(load, when, clock, others)


def _cpu_clock_mhz() -> float | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = [float(x.split(":")[1]) for x in text.splitlines() if x.startswith("cpu MHz")]
    except (OSError, ValueError, IndexError):
        return None
    return round(sum(found) / len(found), 1) if found else None


@dataclass(frozen=True)
class Disturbance:
    """What kept a measurement from being undisturbed.

    `waited` is the share of their time in which the process's threads could not run, None where the kernel has no such
    number; `text` describes what disturbed, empty for nothing.
    """

    waited: float | None
    text: str


CONTENDED = 0.10
"""Share of their time that our threads may wait for a core before a measurement is repeated."""

CLOCK_DRIFT = 0.10
"""Share by which a clock may differ from before to after."""


class Watch:
    """Watches for disturbances from its creation on.

    Threads wait when another process has the core (the kernel's run-queue delay of each), when a container's quota
    stops them, or when the host of a virtual machine takes the time.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._began = time.perf_counter()
        self._conditions = conditions(device)
        self._before = _counters()

    def read(self) -> Disturbance:
        """Return the disturbances since the watch began."""
        waited = self._waited()
        before, after = self._conditions, conditions(self._device)
        found = []
        if waited is not None and waited > CONTENDED:
            found.append(f"waited {waited:.0%} of the time for a core")
        clocks = before.clock_mhz, after.clock_mhz
        if clocks[0] and clocks[1] and abs(clocks[1] / clocks[0] - 1.0) > CLOCK_DRIFT:
            found.append(f"the clock went from {clocks[0]:.0f} to {clocks[1]:.0f} MHz")
        others = max(before.gpu_others or 0, after.gpu_others or 0)
        if others:
            found.append(f"{others} other processes on the GPU")
        return Disturbance(waited, "; ".join(found))

    def _waited(self) -> float | None:
        now, before = _counters(), self._before
        if now is None or before is None:
            return None
        ran, waited, throttled, stolen = (b - a for a, b in zip(before, now, strict=True))
        waited += throttled
        if ran + waited <= 0.0:
            return None
        own = min(1.0, max(0.0, waited / (ran + waited)))
        of_all = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        taken = min(1.0, max(0.0, stolen) / max(of_all, 1e-9))
        return round(min(1.0, own + (1.0 - own) * taken), 4)


class _Counters(NamedTuple):
    ran_s: float
    waited_s: float
    throttled_s: float
    stolen_s: float


def _counters() -> _Counters | None:
    ran = waited = 0.0
    try:
        for thread in os.scandir("/proc/self/task"):
            with contextlib.suppress(OSError):  # the thread ended meanwhile
                fields = Path(thread.path, "schedstat").read_text().split()
                ran += int(fields[0]) / 1e9
                waited += int(fields[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return _Counters(ran, waited, _throttled_s(), _stolen_s())


def _throttled_s() -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/sys/fs/cgroup/cpu.stat").read_text().splitlines():
            if line.startswith("throttled_usec"):
                return int(line.split()[1]) / 1e6
    return 0.0


def _stolen_s() -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _ask_nvidia_smi(what: str, device: str, of: str = "gpu") -> list[str] | None:
    """Return the lines of nvidia-smi's answer; None where there is none."""
    # torch counts among the visible devices, nvidia-smi among all of them.
    number = int(device.partition(":")[2] or 0)
    shown = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    index = shown[number] if number < len(shown) and shown[number] else str(number)
    command = ["nvidia-smi", f"--query-{of}={what}", "--format=csv,noheader,nounits", "-i", index]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _number(lines: list[str] | None) -> float | None:
    try:
        return None if not lines else float(lines[0])
    except ValueError:  # "[N/A]"
        return None


@lru_cache(maxsize=8)
def gpu_driver(device: str) -> str | None:
    """Return the driver's version."""
    lines = _ask_nvidia_smi("driver_version", device)
    return lines[0] if lines else None


@lru_cache(maxsize=8)
def gpu_nominal_mhz(device: str) -> float | None:
    """Return the highest clock of the multiprocessors: part of the device's identity."""
    return _number(_ask_nvidia_smi("clocks.max.sm", device))


def gpu_clock_mhz(device: str) -> float | None:
    """Return the present clock of the multiprocessors: a condition."""
    return _number(_ask_nvidia_smi("clocks.sm", device))


def other_gpu_processes(device: str) -> int | None:
    """Count the processes on the GPU that are not this one."""
    lines = _ask_nvidia_smi("pid", device, of="compute-apps")
    if lines is None:
        return None
    return sum(1 for line in lines if line.isdigit() and int(line) != os.getpid())
