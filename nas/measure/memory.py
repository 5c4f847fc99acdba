"""The highest memory that a network takes while it runs, seen from its process."""

from __future__ import annotations

import contextlib
import importlib
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nas.core.requirement import Setting
from nas.measure.runtimes import RuntimeRequest, check_setting
from space import Context


def peak_memory_bytes(build: Callable[[], nn.Module], *, ctx: Context, setting: Setting, staged: Path | None) -> int:
    """Return the bytes that a network needs while it is loaded and run, libraries left out.

    On a CPU that is how far the process's resident memory rises above where it stood before the network was there: call
    it in a fresh process, as what was freed earlier hides growth. On a GPU it is what torch allocated at most, with a
    CUDA graph's own memory; for other runtimes, what the device has less free afterwards. `staged` is the runtime's own
    file (see `Runtime.stage`), loaded instead of building and exporting here.
    """
    runtime = check_setting(setting)
    # What is imported and what torch sets up once is not the network's.
    for library in ("timm", runtime.executes[0]):
        importlib.import_module(library)
    nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)).sum().item()
    shape = (setting.batch, ctx.in_chans, ctx.img_size, ctx.img_size)
    cuda = setting.device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
        base, free = torch.cuda.memory_allocated(setting.device), torch.cuda.mem_get_info(setting.device)[0]
    before = _status("VmRSS") or highest_resident_bytes()
    model = None if staged is not None else build().eval().requires_grad_(False)
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        threads = torch.get_num_threads()
        request = RuntimeRequest(model, torch.zeros(shape), setting, threads, Path(folder), staged=staged)
        ready = runtime.prepare(request)
    del model, request
    # What preparing took for a moment (a compilation, a conversion) is not what running takes. Linux forgets the
    # highest value on request; elsewhere the preparation counts too.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    ready.timer(5)
    if not cuda:
        return max(0, highest_resident_bytes() - before)
    torch.cuda.synchronize(setting.device)
    if runtime.executes != ("torch",):
        return int(max(0, free - torch.cuda.mem_get_info(setting.device)[0]))
    by_torch = torch.cuda.max_memory_allocated(setting.device) - base
    torch.cuda.empty_cache()  # what stays reserved is in use, or a CUDA graph's
    return int(max(by_torch, torch.cuda.memory_reserved(setting.device) - base))


def highest_resident_bytes() -> int:
    """Return the most resident memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int | None:
    """Return a number of bytes from Linux's status of this process; None where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
