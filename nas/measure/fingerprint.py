"""Which device and software a number was measured on; importable without torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nas.core.cli import usable_cpus
from nas.core.requirement import Setting
from nas.measure.interference import gpu_driver, gpu_nominal_mhz
from space.errors import refuse


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a device with its software: numbers compare only where the `id` is equal.

    Momentary conditions (load, clock, time of day) are not identity; see `nas.measure.interference`. `usable_cpus` is
    what this process may use (affinity and container quota), a float because a quota may be a fraction. `driver`,
    `cuda` and `cudnn` are None on a CPU. `nominal_mhz` is the clock that the device is sold with, None where that is
    unknown. `threads` are the runtime's. `runtime` to `img_size` are None for a device by itself; `under` fills them in
    for a number that was measured there.
    """

    device: str
    device_name: str
    physical_cores: int | None
    logical_cores: int
    usable_cpus: float
    nominal_mhz: float | None
    driver: str | None
    cuda: str | None
    cudnn: str | None
    torch: str
    timm: str
    python: str
    os: str
    arch: str
    threads: int
    runtime: str | None = None
    runtime_version: str | None = None
    dtype: str | None = None
    batch: int | None = None
    img_size: int | None = None

    def under(self, setting: Setting, runtime_version: str, img_size: int) -> Fingerprint:
        """Return the fingerprint of a number measured here under a setting."""
        here = replace(self, runtime=setting.runtime, dtype=setting.dtype, batch=setting.batch)
        return replace(here, runtime_version=runtime_version, img_size=img_size)

    @property
    def id(self) -> str:
        """Short hash over every field, 12 hex characters."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, with the `id` for readers."""
        return {**asdict(self), "id": self.id}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Inverse of `to_dict`; refuses missing fields and an `id` that the fields do not give."""
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise refuse("fingerprint", ", ".join(missing), "all fields present", "measure again")
        made = cls(**{name: values[name] for name in names})
        if values.get("id", made.id) != made.id:
            raise refuse("fingerprint.id", values["id"], made.id, "measure again")
        return made

    def describe(self) -> str:
        """One line for people."""
        cores = f"{self.usable_cpus:g} of {self.logical_cores} CPUs"
        gpu = f"driver {self.driver}, CUDA {self.cuda}, " if self.driver or self.cuda else ""
        return (
            f"{self.device_name} ({self.device}; {gpu}{cores}, {self.threads} threads), "
            f"torch {self.torch}, timm {self.timm}, Python {self.python}, {self.os} {self.arch}"
        )


def take_fingerprint(device: str = "cpu", threads: int | None = None) -> Fingerprint:
    """Describe `device` ("cpu", "cuda", "cuda:1") with its software.

    `threads` defaults to torch's present number; torch is imported only for that or for a GPU. Refuses a device that is
    not there.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise refuse("--device", device, "cpu, cuda or cuda:N")
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    name, driver, cuda, cudnn, clock = _cpu_name(), None, None, None, _nominal_mhz()
    if kind == "cuda":
        name, driver, cuda, cudnn = _gpu(device)
        clock = gpu_nominal_mhz(device)
    return Fingerprint(
        device=kind,
        device_name=name,
        physical_cores=_physical_cores(),
        logical_cores=os.cpu_count() or 1,
        usable_cpus=_usable_cpus(),
        nominal_mhz=clock,
        driver=driver,
        cuda=cuda,
        cudnn=cudnn,
        torch=version_of("torch"),
        timm=version_of("timm"),
        python=platform.python_version(),
        os=f"{platform.system()} {platform.release()}",
        arch=platform.machine(),
        threads=threads,
    )


def version_of(package: str) -> str:
    """Return an installed package's version, "none" without it (a board that runs exported nets only).

    The distribution's version drops torch's local part (+cu132, +cpu), which decides speed.
    """
    try:
        if package == "torch":
            loaded = sys.modules.get("torch")
            if loaded is not None:
                return str(loaded.__version__)
            found = metadata.distribution("torch").locate_file("torch/version.py")
            for line in Path(str(found)).read_text(encoding="utf-8").splitlines():
                if line.startswith("__version__ ="):
                    return line.split("=", 1)[1].strip().strip("'\"")
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    # Cloud machines all say "AMD EPYC": family, model and stepping differ by generation.
    cpu = next(iter(_processors()), {})
    if "model name" in cpu:
        parts = [cpu.get(k, "?") for k in ("cpu family", "model", "stepping")]
        return f"{cpu['model name']} family {'/'.join(parts)}"
    if "CPU part" in cpu:
        parts = [cpu.get(k, "?") for k in ("CPU implementer", "CPU part")]
        return f"{platform.machine()} part {'/'.join(parts)}"
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def _processors() -> list[dict[str, str]]:
    """Return the entries of /proc/cpuinfo by processor; none where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = ([line.partition(":") for line in b.splitlines()] for b in text.split("\n\n"))
    return [{key.strip(): value.strip() for key, colon, value in b if colon} for b in blocks]


def _nominal_mhz() -> float | None:
    """Return the clock that a CPU is sold with, where the system has it.

    The frequency driver's own, else the name's ("@ 2.45GHz"), else, in a virtual machine without a frequency driver,
    the constant that the kernel shows; that one to 50 MHz, as boots differ.
    """
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    for name in ("base_frequency", "cpuinfo_max_freq"):
        try:
            return round(int((folder / name).read_text()) / 1e3, 1)
        except (OSError, ValueError):
            continue
    found = next(iter(_processors()), {})
    named = re.search(r"@\s*([0-9.]+)\s*GHz", found.get("model name", ""))
    if named is not None:
        return round(float(named.group(1)) * 1e3, 1)
    try:
        return None if folder.exists() else 50.0 * round(float(found["cpu MHz"]) / 50.0)
    except (KeyError, ValueError):
        return None


def _physical_cores() -> int | None:
    processors = [p for p in _processors() if "core id" in p]
    return len({(p.get("physical id"), p["core id"]) for p in processors}) or None


def _usable_cpus() -> float:
    # A container often sees 64 CPUs and may use two: by affinity, or by quota (cgroup 2 and 1).
    count = usable_cpus()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        folder = Path("/sys/fs/cgroup/cpu")
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return float(count)
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max": no quota
        return float(count)
    return min(float(count), round(share, 2)) if share > 0 else float(count)


def _gpu(device: str) -> tuple[str, str | None, str | None, str | None]:
    import torch

    if not torch.cuda.is_available():
        raise refuse("--device", device, "a device that torch sees", "use --device cpu")
    index = device.partition(":")[2]
    count = torch.cuda.device_count()
    if index and not (index.isdigit() and int(index) < count):
        raise refuse("--device", device, f"cuda:N with N < {count}")
    number = int(index) if index else torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(number)
    gib = properties.total_memory / 2**30
    name = f"{properties.name} {gib:.0f} GiB sm_{properties.major}{properties.minor}"
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return name, gpu_driver(device), torch.version.cuda, None if cudnn is None else str(cudnn)
