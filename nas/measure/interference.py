"""Disturbances of a measurement: waiting for a core, changed or throttled clocks, other processes on a GPU."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
import weakref
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
    number; `text` describes what disturbed, empty for nothing; `clock_mhz` is a GPU's median clock while it worked.
    """

    waited: float | None
    text: str
    clock_mhz: float | None = None


CONTENDED = 0.10
"""Share of their time that our threads may wait for a core, or a GPU be throttled, before a measurement is repeated."""

CLOCK_DRIFT = 0.10
"""Share by which a clock may differ from before to after; on a GPU, from its fastest to its slowest while it works."""

SAMPLE_MS = 200
"""Between two looks at a GPU's clock."""

IDLE = 0x1
THROTTLED = {
    0x04: "the power limit",
    0x08: "a slowdown by hardware",
    0x20: "temperature",
    0x40: "temperature (by hardware)",
    0x80: "the power brake",
}
"""Bits of the driver's reasons for a lower clock (NVML's `nvmlClocksEventReasons`) that are no setting of a user."""


class Watch:
    """Watches for disturbances from its creation on.

    Threads wait when another process has the core (the kernel's run-queue delay of each), when a container's quota
    stops them, or when the host of a virtual machine takes the time. A GPU's clock and the reasons that limit it are
    read while it works, by the driver's tool in a process of its own: an idle GPU has other ones.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._conditions = conditions(device)
        self._samples = _ClockSamples(device) if device.startswith("cuda") else None
        self._began = time.perf_counter()
        self._before = _counters()

    def read(self) -> Disturbance:
        """Return the disturbances since the watch began."""
        waited = self._waited()
        samples = self._samples.end() if self._samples else []
        before, after = self._conditions, conditions(self._device)
        found = []
        if waited is not None and waited > CONTENDED:
            found.append(f"waited {waited:.0%} of the time for a core")
        busy = [mhz for mhz, _ in samples]
        first, last = before.clock_mhz, after.clock_mhz
        if busy:
            first, last = sorted((min(busy), max(busy)), key=busy.index)
        if first and last and abs(last / first - 1.0) > CLOCK_DRIFT:
            found.append(f"the clock went from {first:.0f} to {last:.0f} MHz")
        for bit, reason in THROTTLED.items():
            share = sum(1 for _, bits in samples if bits & bit) / max(1, len(samples))
            if share > CONTENDED:
                found.append(f"throttled by {reason} {share:.0%} of the time")
        others = max(before.gpu_others or 0, after.gpu_others or 0)
        if others:
            found.append(f"{others} other processes on the GPU")
        return Disturbance(waited, "; ".join(found), statistics.median(busy) if busy else None)

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


class _ClockSamples:
    """A GPU's clock in MHz and the bits that limit it, looked at again and again while it works; it is never set."""

    def __init__(self, device: str) -> None:
        names = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # today's name, that of old drivers
        known = next((name for name in names if gpu_has(name, device)), None)
        self._process: subprocess.Popen[str] | None = None
        if known is not None:
            command = [*_nvidia_smi(f"clocks.sm,{known}", device), "-lms", str(SAMPLE_MS)]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                weakref.finalize(self, _end, self._process)

    def end(self) -> list[tuple[float, int]]:
        """End looking and return what was seen while the GPU worked."""
        found = []
        for line in _end(self._process) if self._process else []:
            with contextlib.suppress(ValueError):  # "[N/A]", or a line that the end cut
                clock, bits = line.split(",")
                if line.endswith("\n") and not int(bits, 16) & IDLE:
                    found.append((float(clock), int(bits, 16)))
        return found


def _end(process: subprocess.Popen[str]) -> list[str]:
    """End a process, if it has not ended, and return the lines that it wrote."""
    if process.stdout is None or process.stdout.closed:
        return []
    process.kill()
    with process:
        return process.stdout.readlines()


def _nvidia_smi(what: str, device: str, of: str = "gpu") -> list[str]:
    """Return the command that asks the driver's tool."""
    # torch counts among the visible devices, nvidia-smi among all of them.
    number = int(device.partition(":")[2] or 0)
    shown = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    index = shown[number] if number < len(shown) and shown[number] else str(number)
    return ["nvidia-smi", f"--query-{of}={what}", "--format=csv,noheader,nounits", "-i", index]


def _ask_nvidia_smi(what: str, device: str, of: str = "gpu") -> list[str] | None:
    """Return the lines of nvidia-smi's answer; None where there is none."""
    command = _nvidia_smi(what, device, of)
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
def gpu_has(what: str, device: str) -> bool:
    """Return whether the driver's tool is there and answers a question."""
    return bool(_ask_nvidia_smi(what, device))


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
    listed = {int(line) for line in lines if line.isdigit()}
    # A container has process numbers of its own: this process, which uses the GPU, is then one of those listed.
    return len(listed - {os.getpid()}) if os.getpid() in listed else max(0, len(listed) - 1)
