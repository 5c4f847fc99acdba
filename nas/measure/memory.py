"""The highest memory that a network takes while it runs, seen from its process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from nas.measure.throughput import prepare
from nas.requirement import Setting
from space import Context


def peak_memory_bytes(model: nn.Module, *, ctx: Context, setting: Setting, before: int) -> int:
    """Return the bytes that a network needs above `before`, while it is loaded and run.

    On a CPU that is the process's highest resident memory since `before = resident_bytes()` was
    read: call it in a fresh process, before the network is built, or what was freed earlier hides
    growth. On a GPU it is what torch allocated at most; for other runtimes, what the device has
    less free afterwards. Weights, images, activations and the runtime's arenas count.
    """
    cuda = setting.device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
        base, free = torch.cuda.memory_allocated(setting.device), _free(setting.device)
    ready = prepare(model, ctx=ctx, setting=setting).ready
    del model
    if not cuda:
        # Preparing (an export, a quantisation) may take more than running ever will.
        _forget_highest()
    ready.timer(5)
    if not cuda:
        return max(0, highest_resident_bytes() - before)
    torch.cuda.synchronize(setting.device)
    by_torch = torch.cuda.max_memory_allocated(setting.device) - base
    return max(by_torch, free - _free(setting.device))


def resident_bytes() -> int:
    """Return the process's resident memory, or its highest where the system tells that only."""
    return _status("VmRSS") or highest_resident_bytes()


def highest_resident_bytes() -> int:
    """Return the process's highest resident memory."""
    told = _status("VmHWM")
    if told is not None:
        return told
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def _forget_highest() -> None:
    # Linux forgets the highest value on request; elsewhere the preparation counts too.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _free(device: str) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)
