"""Images per second of a network in a runtime, alone or interleaved with a reference."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nas.core.requirement import Setting
from nas.measure.fingerprint import Fingerprint, take_fingerprint
from nas.measure.interference import conditions
from nas.measure.interleave import Bounds, measure_rounds, summary
from nas.measure.intervals import MIN_BLOCKS
from nas.measure.measurement import Measurement
from nas.measure.runtimes import PreparedModel, Runtime, RuntimeRequest, check_setting
from space import Context
from space.errors import refuse

Images = npt.NDArray[np.float32]

CALIBRATION_BATCHES = 8
"""Batches of noise that int8 runtimes are calibrated on when nobody gives them images."""


@dataclass(frozen=True)
class Prepared:
    """A network ready in a runtime, what was done to it, and how far its logits are from eager's.

    `parity` is the largest difference of its logits from eager float32 as a share of the largest
    logit; `agrees` whether that is within the runtime's tolerance (None where it has none).
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
    threads: int | None = None,
    calibration: Sequence[Images] | None = None,
    staged: Path | None = None,
) -> Prepared:
    """Make a private copy of a network ready in the setting's runtime, and compare its logits.

    It is timed on `setting.batch` images of noise. `calibration` are images `[n, c, h, w]` in
    batches of that size, for int8 runtimes; `staged` is a file of the network to run instead of one
    made here. Refuses a runtime that is not installed or does not serve the setting; whatever the
    network or the runtime raises comes through.
    """
    runtime = check_setting(setting)
    threads = torch.get_num_threads() if threads is None else threads
    noise = torch.Generator().manual_seed(0)  # its own: the global random state is the caller's
    shape = (setting.batch, ctx.in_chans, ctx.img_size, ctx.img_size)
    images, drawn = _images(runtime, shape, noise)
    given: Sequence[Images] = drawn if calibration is None else calibration
    notes = ["calibrated on noise"] if calibration is None and drawn else []
    own = private_copy(model, "cpu")
    wanted = None
    as_built = setting.runtime == "eager" and setting.dtype == "float32"
    if not as_built:
        with torch.inference_mode():
            oracle = private_copy(model, setting.device)
            wanted = oracle(images.to(setting.device)).float().cpu().numpy()
            del oracle
    with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
        order = RuntimeRequest(own, images, setting, threads, Path(folder), given, staged)
        ready = runtime.prepare(order)
        parity = 0.0 if wanted is None else difference(ready.logits(images.numpy()), wanted)
    agrees = None
    if runtime.tolerance is not None:
        agrees = parity <= runtime.tolerance[setting.dtype]
    done = "; ".join(filter(None, (ready.done, *notes)))
    return Prepared(ready, runtime, setting, ctx, parity, agrees, done)


def staged_file(
    model: nn.Module, *, ctx: Context, setting: Setting, folder: Path, threads: int | None = None
) -> Path | None:
    """Write what the setting's runtime deploys into a folder; None where the model itself runs."""
    runtime = check_setting(setting)
    noise = torch.Generator().manual_seed(0)
    shape = (setting.batch, ctx.in_chans, ctx.img_size, ctx.img_size)
    images, given = _images(runtime, shape, noise)
    own = private_copy(model, "cpu")
    return runtime.stage(RuntimeRequest(own, images, setting, threads or torch.get_num_threads(), folder, given))


def _images(runtime: Runtime, shape: tuple[int, ...], noise: torch.Generator) -> tuple[Tensor, list[Images]]:
    """Draw the images to time on, and what int8 runtimes are calibrated on."""
    images = torch.randn(shape, generator=noise)
    count = CALIBRATION_BATCHES if runtime.calibrates else 0
    return images, [torch.randn(shape, generator=noise).numpy() for _ in range(count)]


def difference(found: Images, wanted: Images) -> float:
    """Return the largest difference as a share of the largest wanted value; infinite for NaN."""
    largest = float(np.max(np.abs(found - wanted)) / max(float(np.max(np.abs(wanted))), 1e-12))
    return largest if math.isfinite(largest) else math.inf


def measure_prepared(
    network: Prepared,
    reference: Prepared | None = None,
    *,
    bounds: Bounds | None = None,
    blocks: int = 12,
    max_blocks: int = 48,
    min_block_s: float = 0.06,
    min_passes: int = 1,
    fingerprint: Fingerprint | None = None,
    retries: int = 1,
) -> Measurement:
    """Time a prepared network, in blocks that alternate with the reference's.

    `bounds` say what is to be decided and how precisely, in at least `blocks` and at most
    `max_blocks` blocks of at least `min_block_s` seconds and `min_passes` passes; see
    `nas.measure.interleave`. `fingerprint` is the device's, looked up when it is not given.
    """
    _check(blocks, max_blocks, min_block_s)
    bounds = Bounds() if bounds is None else bounds
    assert bounds.ratio is None or reference is not None, "a ratio bound needs a reference"
    setting, ctx, runtime = network.setting, network.ctx, network.runtime
    now = conditions(setting.device)
    device = fingerprint or take_fingerprint(setting.device)
    on = device.under(setting, runtime.version(), ctx.img_size)
    timers = [network.ready.timer] + ([] if reference is None else [reference.ready.timer])
    timed = measure_rounds(
        timers,
        batch=setting.batch,
        reference_batch=None if reference is None else reference.setting.batch,
        bounds=bounds,
        blocks=blocks,
        max_blocks=max_blocks,
        min_block_s=min_block_s,
        min_passes=min_passes,
        # A GPU hides its first passes behind its queue and raises its clocks late.
        warm_up_s=0.5 if setting.device.startswith("cuda") else 0.0,
        retries=retries,
        device=setting.device,
    )
    return Measurement(
        **summary(timed),
        img_size=ctx.img_size,
        num_classes=ctx.num_classes,
        in_chans=ctx.in_chans,
        batch=setting.batch,
        dtype=setting.dtype,
        runtime=runtime.name,
        device=setting.device,
        threads=on.threads,
        fingerprint=on.id,
        load=now.load,
        when=now.when,
        clock_mhz=now.clock_mhz,
        parity=network.parity,
        agrees=None if network.agrees is None else int(network.agrees),
        done=network.done,
    )


def measure(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    ctx: Context,
    setting: Setting,
    threads: int | None = None,
    bounds: Bounds | None = None,
    blocks: int = 12,
    max_blocks: int = 48,
    min_block_s: float = 0.06,
    fingerprint: Fingerprint | None = None,
    retries: int = 1,
) -> Measurement:
    """Prepare and time a network beside a reference under the same setting.

    `threads` pins torch's threads for the duration. Both networks are copied first: the caller's
    networks and torch's random state stay as they were. Out of memory and whatever else a network
    raises comes through as it is.
    """
    _check(blocks, max_blocks, min_block_s)
    before = torch.get_num_threads()
    if threads is not None and threads != before:
        torch.set_num_threads(threads)
    try:
        nets = [model] if reference is None else [model, reference]
        ready = [prepare(net, ctx=ctx, setting=setting) for net in nets]
        return measure_prepared(
            ready[0],
            None if reference is None else ready[1],
            bounds=bounds,
            blocks=blocks,
            max_blocks=max_blocks,
            min_block_s=min_block_s,
            fingerprint=fingerprint,
            retries=retries,
        )
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def private_copy(model: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Copy a network to a device in eval mode, without gradients and without stale caches.

    timm's attention caches its biases in eval mode. Such a cache may be older than the weights,
    and where it was made with gradients on, `deepcopy` refuses it. The first is cured by
    `train()` before `eval()` on the copy; the second by telling `deepcopy` what to put there.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        _detach_computed(vars(module), memo)
    made = copy.deepcopy(model, memo)
    made.train()
    made.eval()
    made.requires_grad_(False)
    return made.to(device=device, dtype=dtype)


def _detach_computed(value: object, memo: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            _detach_computed(item, memo)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _detach_computed(item, memo)


def _check(blocks: int, max_blocks: int, min_block_s: float) -> None:
    if blocks < MIN_BLOCKS:
        raise refuse("blocks", blocks, f">= {MIN_BLOCKS}", "fewer give no 95 % interval")
    if max_blocks < blocks:
        raise refuse("max_blocks", max_blocks, f">= blocks = {blocks}")
    if not (min_block_s > 0 and math.isfinite(min_block_s)):
        raise refuse("min_block_s", min_block_s, "seconds > 0")
