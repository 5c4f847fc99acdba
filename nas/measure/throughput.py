"""Images per second of a network in a runtime, alone or interleaved with a reference."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nas.core.requirement import Setting
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interleave import TimingPlan, time_visit
from nas.measure.measurement import Measurement, measured_under
from nas.measure.runtimes import PreparedModel, Runtime, RuntimeRequest, check_setting
from space import Context

Images = npt.NDArray[np.float32]

CALIBRATION_BATCHES = 8
"""Batches of noise that int8 runtimes are calibrated on when nobody gives them images."""


@dataclass(frozen=True)
class Prepared:
    """A network ready in a runtime, what was done to it, and how far its logits are from eager's.

    `parity` is the largest difference of its logits from eager float32 as a share of the largest logit; `agrees`
    whether that is within the runtime's tolerance (None where it has none).
    """

    ready: PreparedModel
    runtime: Runtime
    setting: Setting
    ctx: Context
    parity: float
    agrees: bool | None
    done: str


def prepare(
    model: nn.Module,
    *,
    ctx: Context,
    setting: Setting,
    calibration: Sequence[Images] | None = None,
    staged: Path | None = None,
) -> Prepared:
    """Make a private copy of a network ready in the setting's runtime, and compare its logits.

    It is timed on `setting.batch` images of noise. `calibration` are images `[n, c, h, w]` in batches of that size, for
    int8 runtimes; `staged` is a file of the network to run instead of one made here. Refuses a runtime that is not
    installed or does not serve the setting; whatever the network or the runtime raises comes through.
    """
    runtime = check_setting(setting)
    with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
        request = _request(model, ctx, setting, runtime, Path(folder), staged)
        noted = "calibrated on noise" if calibration is None and request.calibration else ""
        if calibration is not None:
            request.calibration = calibration
        wanted = None
        if (setting.runtime, setting.dtype) != ("eager", "float32"):
            with torch.inference_mode():
                oracle = private_copy(model, setting.device)
                wanted = oracle(request.images.to(setting.device)).float().cpu().numpy()
                del oracle
        ready = runtime.prepare(request)
        parity = 0.0 if wanted is None else difference(ready.logits(request.images.numpy()), wanted)
    agrees = None if runtime.tolerance is None else parity <= runtime.tolerance[setting.dtype]
    return Prepared(ready, runtime, setting, ctx, parity, agrees, "; ".join(filter(None, (ready.done, noted))))


def staged_file(model: nn.Module, *, ctx: Context, setting: Setting, folder: Path) -> Path | None:
    """Write what the setting's runtime deploys into a folder; None where the model itself runs."""
    runtime = check_setting(setting)
    return runtime.stage(_request(model, ctx, setting, runtime, folder))


def _request(
    model: nn.Module, ctx: Context, setting: Setting, runtime: Runtime, folder: Path, staged: Path | None = None
) -> RuntimeRequest:
    """Draw the images to time on, and what int8 runtimes are calibrated on."""
    noise = torch.Generator().manual_seed(0)  # its own: the global random state is the caller's
    shape = (setting.batch, ctx.in_chans, ctx.img_size, ctx.img_size)
    images = torch.randn(shape, generator=noise)
    count = CALIBRATION_BATCHES if runtime.calibrates else 0
    drawn = [torch.randn(shape, generator=noise).numpy() for _ in range(count)]
    return RuntimeRequest(private_copy(model, "cpu"), images, setting, torch.get_num_threads(), folder, drawn, staged)


def difference(found: Images, wanted: Images) -> float:
    """Return the largest difference as a share of the largest wanted value; infinite for NaN."""
    largest = float(np.max(np.abs(found - wanted)) / max(float(np.max(np.abs(wanted))), 1e-12))
    return largest if math.isfinite(largest) else math.inf


def time_prepared(
    networks: Sequence[Prepared], reference: Prepared | None = None, plan: TimingPlan | None = None
) -> list[Measurement]:
    """Time prepared networks in blocks that alternate with the reference's: one visit of each; see `time_visit`."""
    sides = [*networks, *([] if reference is None else [reference])]
    timers, batches = [side.ready.timer for side in sides], [side.setting.batch for side in sides]
    device, beside = networks[0].setting.device, reference is not None
    timed = time_visit(timers, batches, plan or TimingPlan(), device, reference=beside)
    found = []
    for network, values in zip(networks, timed, strict=True):
        setting, ctx = network.setting, network.ctx
        on = take_fingerprint(setting.device).under(setting, network.runtime.version(), ctx.img_size)
        agrees = None if network.agrees is None else int(network.agrees)
        values = replace(values, parity=network.parity, agrees=agrees, done=network.done)
        found.append(measured_under(values, setting, ctx, on.threads, on.id))
    return found


def measure(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    ctx: Context,
    setting: Setting,
    threads: int | None = None,
    plan: TimingPlan | None = None,
) -> Measurement:
    """Prepare and time a network beside a reference under the same setting: one visit, in this process.

    `threads` pins torch's threads for the duration. Both networks are copied first: the caller's networks and torch's
    random state stay as they were. Out of memory and whatever else a network raises comes through as it is.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        nets = [model] if reference is None else [model, reference]
        ready = [prepare(net, ctx=ctx, setting=setting) for net in nets]
        return time_prepared(ready[:1], None if reference is None else ready[1], plan)[0]
    finally:
        torch.set_num_threads(before)


def private_copy(model: nn.Module, device: str) -> nn.Module:
    """Copy a network to a device in eval mode, without gradients and without stale caches.

    timm's attention caches its biases in eval mode. Such a cache may be older than the weights, which `train()` before
    `eval()` cures; and `deepcopy` refuses one that was made with gradients on, unless told what to put there.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        _detach_computed(vars(module), memo)
    made = copy.deepcopy(model, memo)
    return made.train().eval().requires_grad_(False).to(device=device, dtype=torch.float32)


def _detach_computed(value: object, memo: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            _detach_computed(item, memo)
