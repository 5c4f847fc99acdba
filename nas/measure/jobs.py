"""Jobs that time, weigh and compare networks on the worker's device."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.progress import Tick
from nas.core.requirement import Setting
from nas.jobs.job import out_of_memory
from space import Context, get_family
from space.errors import refuse

if TYPE_CHECKING:
    from torch import nn

    from nas.measure.throughput import Prepared

Values = dict[str, Any]

MOST_IMAGES = 4096
"""Largest batch that `--batch auto` tries."""

_kept: dict[str, Prepared] = {}
"""The reference of the last timing, ready in its runtime: exporting or compiling it anew for every
candidate would take longer than the timing itself."""


def hello(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Look at the device: `{"fingerprint": {...}}`; an unknown one is bad input.

    With `setting`, its runtime is checked too and the fingerprint is that of a number under it.
    """
    from nas.measure.fingerprint import take_fingerprint
    from nas.measure.runtimes import check_setting

    found = take_fingerprint(spec["device"])
    if spec.get("setting") is not None:
        setting = Setting(**spec["setting"])
        runtime = check_setting(setting, "--require")
        found = found.under(
            runtime=runtime.name,
            runtime_version=runtime.version(),
            dtype=setting.dtype,
            batch=setting.batch,
            img_size=spec["img_size"],
        )
    return {"fingerprint": found.to_dict()}


def build(network: Mapping[str, Any], ctx: Context) -> nn.Module:
    """Build `{"family", "arch"}` or `{"timm"}` with fresh weights, or those of `weights`."""
    if "family" in network:
        family = get_family(network["family"])
        model = family.build(family.arch(network["arch"]), ctx)
    else:
        model = _timm_model(network["timm"], ctx)
    if network.get("weights") is not None:
        from nas.export.weights import load_into, load_weights

        load_into(model, load_weights(Path(network["weights"])))
    return model


def _timm_model(name: str, ctx: Context) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        remedy = f"such as {', '.join(near)}" if near else "see timm.list_models()"
        raise refuse(
            "--arch", name, "a published arch, an arch's JSON file or a timm model", remedy
        )
    asked: dict[str, Any] = {
        "pretrained": False,
        "num_classes": ctx.num_classes,
        "in_chans": ctx.in_chans,
    }
    try:
        made = timm.create_model(name, img_size=ctx.img_size, **asked)
    except TypeError:  # a network that takes any resolution has no such argument
        made = timm.create_model(name, **asked)
    assert hasattr(made, "parameters")
    return made


def measure(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Time a network, with fresh weights unless it names some, against its reference."""

    from nas.measure.interleave import Bounds
    from nas.measure.throughput import measure_prepared, prepare

    ctx, setting = Context(**spec["context"]), Setting(**spec["setting"])
    bounds = dict(spec.get("bounds", {}))
    bounds["latency_ms"] = tuple((n, v) for n, v in bounds.get("latency_ms", ()))
    with _seeded(spec):
        network = prepare(build(spec["network"], ctx), ctx=ctx, setting=setting)
    reference = None
    if spec["reference"] is not None:
        beside = Setting(**(spec.get("reference_setting") or spec["setting"]))
        reference = _reference(spec["reference"], ctx, beside, spec["random_seed"])
    measured = measure_prepared(
        network,
        reference,
        bounds=Bounds(**bounds),
        blocks=spec["blocks"],
        max_blocks=spec["max_blocks"],
        min_block_s=spec.get("min_block_s", 0.06),
        min_passes=max(spec.get("min_passes", 1), _least_passes(bounds, spec["blocks"])),
    )
    network.ready.close()
    return measured.to_dict()


def _least_passes(bounds: Mapping[str, Any], blocks: int) -> int:
    """Return the passes a block without which a bounded percentile could not be told."""
    from nas.measure.interleave import LEAST_PASSES

    return max([1, *(-(-LEAST_PASSES[name] // blocks) for name, _ in bounds["latency_ms"])])


def _reference(network: Mapping[str, Any], ctx: Context, setting: Setting, seed: int) -> Prepared:
    import torch

    from nas.measure.throughput import prepare

    key = json.dumps([network, vars(ctx), vars(setting), seed], sort_keys=True)
    if key not in _kept:
        for old in _kept.values():
            old.ready.close()
        _kept.clear()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _kept[key] = prepare(build(network, ctx), ctx=ctx, setting=setting)
    return _kept[key]


def stage(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Write the file that a runtime deploys into the folder `out`: `{"file"}`, None if it has none.

    What is weighed loads it in a process that never exported anything.
    """
    from nas.measure.throughput import staged_file

    ctx, setting = Context(**spec["context"]), Setting(**spec["setting"])
    with _seeded(spec):
        model = build(spec["network"], ctx)
    made = staged_file(model, ctx=ctx, setting=setting, folder=Path(spec["out"]))
    return {"file": None if made is None else str(made)}


def peak_memory(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Weigh a network in this process, which should be a fresh one: `{"peak_mem_bytes"}`."""
    import torch

    from nas.measure.memory import peak_memory_bytes

    ctx, setting = Context(**spec["context"]), Setting(**spec["setting"])
    staged = spec.get("staged")
    with _seeded(spec):
        peak = peak_memory_bytes(
            lambda: build(spec["network"], ctx),
            ctx=ctx,
            setting=setting,
            threads=torch.get_num_threads(),
            staged=None if staged is None else Path(staged),
        )
    return {"peak_mem_bytes": peak}


@contextlib.contextmanager
def _seeded(spec: Mapping[str, Any]) -> Iterator[None]:
    """Draw weights from the job's random seed, and leave torch's random state as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["random_seed"])
        yield


def fastest_batch(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Find the batch of most images/s that fits: `{"batch", "tried": [[batch, images_per_s]]}`.

    Batches double from 1; two in a row that bring no 2 % end the search, and so does the first
    that does not fit in memory.
    """
    from nas.measure.throughput import measure as timed

    ctx = Context(**spec["context"])
    model = build(spec["network"], ctx)
    tried: list[tuple[int, float]] = []
    batch, since_best, best = 1, 0, (1, 0.0)
    why = ""
    while batch <= MOST_IMAGES and since_best < 2:
        setting = Setting(**{**spec["setting"], "batch": batch})
        try:
            found = timed(model, ctx=ctx, setting=setting, blocks=6, max_blocks=6, retries=0)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or not tried:
                raise
            why = f"batch {batch} does not fit in memory"
            break
        tried.append((batch, found.images_per_s))
        since_best = 0 if found.images_per_s > 1.02 * best[1] else since_best + 1
        best = max(best, (batch, found.images_per_s), key=lambda pair: pair[1])
        batch *= 2
    return {"batch": best[0], "tried": tried, "why": why}


def accuracy(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Compare a trained network in a runtime with eager float32 on a data set's test images.

    `{"top1", "eager_top1", "agreement", "test_n"}`: shares of the test images (whole batches of
    the setting only). int8 runtimes are calibrated on training images.
    """
    import numpy as np
    import torch

    from nas.data import open_dataset
    from nas.data.augment.spec import default_spec, eval_batch
    from nas.measure.throughput import prepare, private_copy

    ctx, setting = Context(**spec["context"]), Setting(**spec["setting"])
    dataset = open_dataset(Path(spec["dataset"]))
    batch = setting.batch
    augment, split = default_spec(dataset), dataset.test
    whole = len(split) // batch
    if whole == 0:
        raise refuse("--batch", batch, f"at most the {len(split)} test images", "lower it")
    shown = range(0, min(len(dataset.train), 8 * batch) - batch + 1, batch)
    calibration = [eval_batch(dataset.train.pixels[i : i + batch], augment).numpy() for i in shown]
    model = build(spec["network"], ctx)
    made = prepare(model, ctx=ctx, setting=setting, calibration=calibration)
    eager = private_copy(model, "cpu")
    found, wanted = [], []
    for i in range(whole):
        images = eval_batch(split.pixels[i * batch : (i + 1) * batch], augment).numpy()
        found.append(made.ready.logits(images).argmax(1))
        with torch.inference_mode():
            wanted.append(eager(torch.from_numpy(images)).argmax(1).numpy())
        tick(float(batch))
    guess, own = np.concatenate(found), np.concatenate(wanted)
    truth = np.asarray(split.labels[: len(guess)])
    made.ready.close()
    return {
        "top1": float((guess == truth).mean()),
        "eager_top1": float((own == truth).mean()),
        "agreement": float((guess == own).mean()),
        "test_n": len(guess),
        "top1_se": math.sqrt(float((guess == truth).var()) / len(guess)),
        "done": made.done,
    }


def count(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Count a network as built: `{"params", "macs"}`; macs is None where a counter gives up."""
    from nas.measure.macs import UnsupportedOperator, fvcore_macs

    ctx = Context(**spec["context"])
    model = build(spec["network"], ctx)
    try:
        macs: int | None = fvcore_macs(model, ctx)
    except (UnsupportedOperator, RuntimeError):
        macs = None
    return {"params": sum(p.numel() for p in model.parameters()), "macs": macs}
