"""Jobs that measure networks on the worker's device: time, memory, counts, accuracy."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.progress import Tick
from nas.core.requirement import Setting
from nas.jobs.job import READS, WRITES, Values, out_of_memory, reason_of
from nas.measure.interleave import TimingPlan, keep_freed_memory
from space import Context, get_family
from space.errors import InputError, refuse

if TYPE_CHECKING:
    from torch import nn

    from nas.measure.throughput import Prepared

GROUP = 8
"""Most networks of one visit."""

MOST_IMAGES = 4096
"""Largest batch that `--batch auto` tries."""


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A network to build: an arch (as JSON) of a family, or a timm model.

    `weights` is a safetensors file; None: fresh weights.
    """

    family: str | None = None
    arch: Mapping[str, Any] | None = None
    timm: str | None = None
    weights: Path | None = field(default=None, metadata=READS)


@dataclass(frozen=True, kw_only=True)
class FingerprintJob:
    """A device to look at, and the setting and resolution of a number that is measured on it."""

    device: str
    setting: Setting | None = None
    img_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class CountJob:
    """A network to count."""

    network: NetworkSpec
    context: Context


@dataclass(frozen=True, kw_only=True)
class NetworkJob(CountJob):
    """A network to run under a setting."""

    setting: Setting


@dataclass(frozen=True, kw_only=True)
class VisitJob:
    """Networks to time in one visit, interleaved with a reference; `reference_setting` None: as `setting`."""

    networks: tuple[NetworkSpec, ...]
    reference: NetworkSpec | None
    context: Context
    setting: Setting
    random_seed: int
    plan: TimingPlan = field(default_factory=TimingPlan)
    reference_setting: Setting | None = None


@dataclass(frozen=True, kw_only=True)
class ExportJob(NetworkJob):
    """A network to export in its runtime's format to the folder `out`."""

    random_seed: int
    out: Path = field(metadata=WRITES)


@dataclass(frozen=True, kw_only=True)
class MemoryJob(NetworkJob):
    """A network to measure the memory of, from a `file` in `folder` where its runtime has one."""

    random_seed: int
    folder: Path = field(metadata=READS)
    file: str | None


@dataclass(frozen=True, kw_only=True)
class AccuracyJob(NetworkJob):
    """A trained network to compare with eager float32 on the test images of a data set.

    `class_rows`: the output of each of the data's classes.
    """

    dataset: Path = field(metadata=READS)
    class_rows: tuple[int, ...]


def fingerprint(job: FingerprintJob, tick: Tick) -> Values:
    """Look at the device: `{"fingerprint": {...}}`; an unknown one is bad input.

    With `setting`, its runtime is checked too and the fingerprint is that of a number under it.
    """
    from nas.measure.fingerprint import take_fingerprint
    from nas.measure.runtimes import check_setting

    found = take_fingerprint(job.device)
    if job.setting is not None:
        assert job.img_size is not None, "a setting comes with a resolution"
        runtime = check_setting(job.setting, "--require")
        found = found.under(job.setting, runtime.version(), job.img_size)
    return {"fingerprint": found.to_dict()}


def build(network: NetworkSpec, ctx: Context) -> nn.Module:
    """Build a network; raises InputError for a timm model that there is not."""
    if network.family is not None:
        assert network.arch is not None, "a family's network has an arch"
        family = get_family(network.family)
        model = family.build(family.arch(network.arch), ctx)
    else:
        assert network.timm is not None, "neither a family's network nor timm's"
        model = _timm_model(network.timm, ctx)
    if network.weights is not None:
        from nas.export.weights import load_into, load_weights

        load_into(model, load_weights(network.weights))
    return model


def _timm_model(name: str, ctx: Context) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        remedy = f"such as {', '.join(near)}" if near else "see timm.list_models()"
        raise refuse("--arch", name, "a published arch, an arch's JSON file or a timm model", remedy)
    asked: dict[str, Any] = {"pretrained": False, "num_classes": ctx.num_classes, "in_chans": ctx.in_chans}
    try:
        made = timm.create_model(name, img_size=ctx.img_size, **asked)
    except TypeError:  # a network that takes any resolution has no such argument
        made = timm.create_model(name, **asked)
    assert hasattr(made, "parameters")
    return made


def _build_seeded(network: NetworkSpec, ctx: Context, random_seed: int) -> nn.Module:
    """Build a network with weights drawn from a random seed; torch's random state stays as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        return build(network, ctx)


def visit(job: VisitJob, tick: Tick) -> Values:
    """Time networks beside the reference; all start from `random_seed` unless they have weights.

    Returns `{"visits": [...]}`: of each network a `nas.measure.measurement.Measurement` as JSON, or `{"reason"}` where
    it failed (out of memory, say). The process should be a fresh one: what it finds is one visit.
    """
    from nas.measure.throughput import prepare, time_prepared

    keep_freed_memory()
    ctx, seed = job.context, job.random_seed
    reference = None
    if job.reference is not None:
        beside = job.reference_setting or job.setting
        reference = prepare(_build_seeded(job.reference, ctx, seed), ctx=ctx, setting=beside)
    ready: dict[int, Prepared] = {}
    found: list[dict[str, Any]] = [{} for _ in job.networks]
    for at, network in enumerate(job.networks):
        try:
            made = prepare(_build_seeded(network, ctx, seed), ctx=ctx, setting=job.setting)
            made.ready.timer(1)
            ready[at] = made
        except InputError:
            raise
        except Exception as error:
            traceback.print_exc()
            found[at] = {"reason": reason_of(error)}
    if ready:
        for at, measured in zip(ready, time_prepared([*ready.values()], reference, job.plan), strict=True):
            found[at] = measured.to_dict()
    for each in [*ready.values(), *([] if reference is None else [reference])]:
        each.ready.close()
    return {"visits": found}


def export_model(job: ExportJob, tick: Tick) -> Values:
    """Write the file that a runtime deploys: `{"file"}`, its name; None where it deploys none.

    Memory is measured in another process, which never exported anything.
    """
    from nas.measure.throughput import staged_file

    model = _build_seeded(job.network, job.context, job.random_seed)
    made = staged_file(model, ctx=job.context, setting=job.setting, folder=job.out)
    return {"file": None if made is None else made.relative_to(job.out).as_posix()}


def peak_memory(job: MemoryJob, tick: Tick) -> Values:
    """Measure a network's peak memory: `{"peak_mem_bytes"}`; the process should be a fresh one."""
    from nas.measure.memory import peak_memory_bytes

    staged = None if job.file is None else job.folder / job.file
    peak = peak_memory_bytes(
        lambda: _build_seeded(job.network, job.context, job.random_seed),
        ctx=job.context,
        setting=job.setting,
        staged=staged,
    )
    return {"peak_mem_bytes": peak}


def fastest_batch(job: NetworkJob, tick: Tick) -> Values:
    """Find the batch of most images/s that fits: `{"batch", "tried": [[batch, images_per_s]]}`.

    The setting's own batch is ignored. Batches double from 1; two in a row that bring no 2 % end the search, and so
    does the first that does not fit in memory.
    """
    from nas.measure.throughput import measure as timed

    model, plan = build(job.network, job.context), TimingPlan(retries=0)
    tried: list[tuple[int, float]] = []
    batch, since_best, best = 1, 0, (1, 0.0)
    why = ""
    while batch <= MOST_IMAGES and since_best < 2:
        try:
            found = timed(model, ctx=job.context, setting=replace(job.setting, batch=batch), plan=plan)
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


def accuracy(job: AccuracyJob, tick: Tick) -> Values:
    """Compare a trained network in a runtime with eager float32 on a data set's test images.

    `{"top1", "eager_top1", "agreement", "test_n"}`: shares of the test images (whole batches of the setting only). int8
    runtimes are calibrated on training images.
    """
    import numpy as np
    import torch

    from nas.data import open_dataset
    from nas.data.augment.spec import default_spec
    from nas.data.augment.timm_engine import eval_batch
    from nas.measure.throughput import prepare, private_copy

    ctx, setting = job.context, job.setting
    dataset = open_dataset(job.dataset)
    batch = setting.batch
    augment, split = default_spec(dataset), dataset.test
    whole = len(split) // batch
    if whole == 0:
        raise refuse("--batch", batch, f"at most the {len(split)} test images", "lower it")
    shown = range(0, min(len(dataset.train), 8 * batch) - batch + 1, batch)
    calibration = [eval_batch(dataset.train.pixels[i : i + batch], augment).numpy() for i in shown]
    model = build(job.network, job.context)
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
    truth = np.array(job.class_rows, dtype=np.int64)[split.labels[: len(guess)]]
    made.ready.close()
    return {
        "top1": float((guess == truth).mean()),
        "eager_top1": float((own == truth).mean()),
        "agreement": float((guess == own).mean()),
        "test_n": len(guess),
        "top1_se": math.sqrt(float((guess == truth).var()) / len(guess)),
        "done": made.done,
    }


def count(job: CountJob, tick: Tick) -> Values:
    """Count a network as built: `{"params", "macs"}`; macs is None where a counter gives up."""
    from nas.measure.macs import UnsupportedOperator, fvcore_macs

    model = build(job.network, job.context)
    macs: int | None = None
    with contextlib.suppress(UnsupportedOperator, RuntimeError):
        macs = fvcore_macs(model, job.context)
    return {"params": sum(p.numel() for p in model.parameters()), "macs": macs}
