"""How disturbed a measurement was: what our threads waited for, not what others did elsewhere."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path


@dataclass(frozen=True)
class Conditions:
    """What holds for a moment only, and is never identity.

    The one-minute load average, the CPU's or GPU's present clock in MHz, other processes on the GPU
    (None where the system does not tell), and the time (UTC, ISO 8601).
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
        from nas.measure.gpu import clock_mhz, other_processes

        clock, others = clock_mhz(device), other_processes(device)
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

    `waited` is the share of their wanted time in which our threads could not run, None where the
    kernel does not tell; `says` is empty when nothing is worth a word.
    """

    waited: float | None
    says: str


CONTENDED = 0.10
"""Share of their time that our threads may wait for a core before a measurement is repeated."""

CLOCK_DRIFT = 0.10
"""Share by which a clock may differ from before to after."""


class Watch:
    """Looks out for disturbances from now on.

    Threads wait when another process has the core (the kernel's run-queue delay of each), when a
    container's quota stops them, or when the host of a virtual machine takes the time.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._began = time.perf_counter()
        self._conditions = conditions(device)
        self._before = _counters()

    def read(self) -> Disturbance:
        """Tell what has disturbed since the watch began."""
        waited = self._waited()
        before, after = self._conditions, conditions(self._device)
        says = []
        if waited is not None and waited > CONTENDED:
            says.append(f"waited {waited:.0%} of the time for a core")
        clocks = before.clock_mhz, after.clock_mhz
        if clocks[0] and clocks[1] and abs(clocks[1] / clocks[0] - 1.0) > CLOCK_DRIFT:
            says.append(f"the clock went from {clocks[0]:.0f} to {clocks[1]:.0f} MHz")
        others = max(before.gpu_others or 0, after.gpu_others or 0)
        if others:
            says.append(f"{others} other processes on the GPU")
        return Disturbance(waited, "; ".join(says))

    def _waited(self) -> float | None:
        now, before = _counters(), self._before
        if now is None or before is None:
            return None
        ran, waited = now.ran_s - before.ran_s, now.waited_s - before.waited_s
        waited += now.throttled_s - before.throttled_s
        if ran + waited <= 0.0:
            return None
        own = min(1.0, max(0.0, waited / (ran + waited)))
        wall = time.perf_counter() - self._began
        cores = os.cpu_count() or 1
        stolen = min(1.0, max(0.0, now.stolen_s - before.stolen_s) / max(wall * cores, 1e-9))
        return round(min(1.0, own + (1.0 - own) * stolen), 4)


@dataclass(frozen=True)
class _Counters:
    ran_s: float
    waited_s: float
    throttled_s: float
    stolen_s: float


def _counters() -> _Counters | None:
    ran = waited = 0.0
    try:
        for thread in os.scandir("/proc/self/task"):
            try:
                fields = Path(thread.path, "schedstat").read_text().split()
            except OSError:  # the thread ended meanwhile
                continue
            ran += int(fields[0]) / 1e9
            waited += int(fields[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return _Counters(ran, waited, _throttled_s(), _stolen_s())


def _throttled_s() -> float:
    try:
        for line in Path("/sys/fs/cgroup/cpu.stat").read_text().splitlines():
            if line.startswith("throttled_usec"):
                return int(line.split()[1]) / 1e6
    except (OSError, ValueError, IndexError):
        pass
    return 0.0


def _stolen_s() -> float:
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
