"""The one place where a job meets torch: kind -> function of a plain specification."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from nas.files import read_json, write_json
from nas.jobs import Job, Result, Tick, no_tick
from space import Context, get_family
from space.errors import InputError

log = logging.getLogger(__name__)

Values = dict[str, Any]


def run_job(job: Job, tick: Tick = no_tick) -> Result:
    """Do one job. Whatever goes wrong becomes a failed result with a reason in one line."""
    started = time.monotonic()
    try:
        function = _KINDS[job.kind]
        values = function(job.spec, tick)
    except InputError as error:
        return Result(job.key, False, {"input_error": True}, str(error), _since(started))
    except MemoryError:
        return Result(job.key, False, {}, "out of memory", _since(started))
    except Exception as error:
        log.debug("job %s failed", job.key, exc_info=True)
        traceback.print_exc()
        return Result(job.key, False, {}, _reason(error), _since(started))
    return Result(job.key, True, values, None, _since(started))


def _since(started: float) -> float:
    return time.monotonic() - started


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return f"out of memory: {text[:160]}"
    return f"{type(error).__name__}: {text[:200]}"


def _context(spec: Mapping[str, Any]) -> Context:
    return Context(**spec["context"])


def _hello(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Look at the device: `{"fingerprint": {...}}`; an unknown one is bad input."""
    from nas.measure.fingerprint import take_fingerprint

    return {"fingerprint": take_fingerprint(spec["device"]).to_dict()}


def _measure(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Time an arch as built, with fresh weights, against its reference."""
    import torch

    from nas.measure.throughput import measure

    family = get_family(spec["family"])
    context = _context(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["random_seed"])
        model = family.build(family.arch(spec["arch"]), context)
        reference = None
        if spec["reference"] is not None:
            reference = family.build(family.arch(spec["reference"]), context)
    measured = measure(
        model,
        reference,
        ctx=context,
        batch=spec["batch"],
        dtype=spec["dtype"],
        device=spec["device"],
        blocks=spec["blocks"],
        max_blocks=spec["max_blocks"],
        ratio_at_least=spec["ratio_at_least"],
        images_per_s_at_least=spec["images_per_s_at_least"],
    )
    return measured.to_dict()


def _teacher(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Have the teacher: `{"info": ..., "says": line}`."""
    from nas.data import open_dataset
    from nas.distill.teacher import make_teacher, parse_teacher

    info = make_teacher(
        parse_teacher(spec["teacher"]),
        open_dataset(Path(spec["dataset"])),
        Path(spec["cache"]),
        random_seed=spec["random_seed"],
        epochs=spec["teacher_epochs"],
        device=spec["device"],
        threads=spec["threads"],
        tick=tick,
    )
    notes = "".join(f"; {note}" for note in info.notes)
    says = (
        f"{info.id} ({info.model}), holdout top-1 {info.holdout_top1:.1%} +- "
        f"{info.holdout_top1_se:.1%}{notes}"
    )
    return {"info": info.to_dict(), "says": says}


def _labels(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Have the soft labels: the named store if it fits, else the teacher's, built as needed."""
    from dataclasses import replace

    from nas.data import open_dataset
    from nas.distill.augment import default_spec
    from nas.distill.store import StoreSpec, build_store, default_topk, open_store
    from nas.distill.teacher import TeacherInfo, load_teacher

    dataset = open_dataset(Path(spec["dataset"]))
    topk = spec["topk"] if spec["topk"] is not None else default_topk(dataset.num_classes)
    if "store" in spec:
        folder = Path(spec["store"])
        found = open_store(folder, None).spec
        # The teacher is the store's own affair; everything else must be what this run needs.
        expect = replace(
            found,
            epochs=spec["epochs"],
            topk=topk if spec["topk"] is not None else found.topk,
            augment=default_spec(dataset),
            dataset_fingerprint=dataset.fingerprint,
            num_classes=dataset.num_classes,
        )
    else:
        info = TeacherInfo.from_dict(spec["info"])
        expect = StoreSpec(
            epochs=spec["epochs"],
            topk=topk,
            augment=default_spec(dataset),
            salt=spec["random_seed"],
            dataset_fingerprint=dataset.fingerprint,
            teacher_id=info.id,
            teacher_hash=info.digest,
            num_classes=dataset.num_classes,
            threads=spec["threads"],
        )
        folder = build_store(
            Path(spec["cache"]) / "labels",
            expect,
            dataset,
            load_teacher(info, spec["device"]),
            spec["batch_size"],
            tick,
        )
    store = open_store(folder, expect)
    says = (
        f"{len(dataset.train)} images x {store.epochs} epochs, top {store.spec.topk} of "
        f"{store.spec.num_classes} classes, teacher {store.spec.teacher_id}, in {folder}"
    )
    return {"folder": str(folder), "id": store.id, "says": says}


def _train(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Train an arch on stored labels and score it; leaves the folder `out` whole.

    It then holds weights.safetensors, holdout.safetensors (per image), with `test`
    test.safetensors too, and result.json with what is returned.
    """
    out = Path(spec["out"])
    part = out.with_name(f"{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    # Only a folder of the shared cache has several writers; a run's own has its driver.
    shared = FileLock(out.with_name(f"{out.name}.lock")) if spec["shared"] else nullcontext()
    with shared:
        return _train_into(spec, out, part, tick)


def _loader_workers(device: str) -> int:
    """Return how many processes augment: on a CPU training itself needs every core."""
    return 0 if device == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))


def _train_into(spec: Mapping[str, Any], out: Path, part: Path, tick: Tick) -> Values:
    from nas.data import open_dataset
    from nas.distill.adopt import adopt
    from nas.distill.proxy import evaluate_test, mean_se, proxy_settings, train_and_score
    from nas.distill.store import open_store
    from nas.measure.macs import fvcore_macs

    if (out / "result.json").is_file():  # another run finished it while this one waited
        finished: Values = read_json(out / "result.json", "a finished training")["values"]
        return finished
    started = time.monotonic()
    family, context = get_family(spec["family"]), _context(spec)
    arch = family.arch(spec["arch"])
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), None)
    init, _, source = str(spec["init"]).partition(":")
    parent_arch, parent_context, parent_weights = None, context, None
    notes: list[str] = []
    if init == "file":
        init, parent_arch, parent_weights = "inherit", arch, part / "adopted.safetensors"
        parent_context, note = adopt(family, arch, context, source, parent_weights)
        notes.append(note)
    elif init == "inherit":
        parent_arch = family.arch(spec["parent"]["arch"])
        parent_weights = Path(spec["parent"]["weights"])
    checkpoint = part / "checkpoint.safetensors" if spec["checkpoint"] else None
    weights = part / "weights.safetensors"
    score = train_and_score(
        family,
        arch,
        context,
        store=store,
        dataset=dataset,
        settings=proxy_settings(spec["epochs"], init, batch_size=spec["batch_size"]),
        init=init,
        random_seed=spec["random_seed"],
        device=spec["device"],
        parent_arch=parent_arch,
        parent_ctx=parent_context,
        parent_weights=parent_weights,
        first_epoch=spec["first_epoch"],
        out_weights=weights,
        checkpoint=checkpoint,
        workers=_loader_workers(spec["device"]),
        tick=tick,
    )
    if not math.isfinite(score.soft_loss):
        raise FloatingPointError(f"the holdout loss is {score.soft_loss}")
    os.replace(part / "weights.holdout.safetensors", part / "holdout.safetensors")
    values: Values = {k: v for k, v in score.to_dict().items() if k not in ("weights", "per_image")}
    values["notes"] = notes
    if spec["test"]:
        tested = evaluate_test(
            family, arch, context, weights, dataset, store.spec.augment, device=spec["device"]
        )
        tested.save(part / "test.safetensors")
        top1, top1_se = mean_se(tested.correct)
        values.update(test_top1=top1, test_top1_se=top1_se, test_n=len(tested.correct))
        values["fvcore_macs"] = fvcore_macs(family.build(arch, context), context)
        assert values["fvcore_macs"] == family.count_macs(arch, context), "the counts disagree"
    for spent in (checkpoint, part / "adopted.safetensors"):
        if spent is not None:
            for leftover in part.glob(f"{spent.stem}*"):
                leftover.unlink()
    files = sorted(p.name for p in part.glob("*.safetensors"))
    seconds = time.monotonic() - started
    write_json(part / "result.json", {"values": values, "files": files, "seconds": seconds})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return values


_KINDS: dict[str, Callable[[Mapping[str, Any], Tick], Values]] = {
    "hello": _hello,
    "measure": _measure,
    "teacher": _teacher,
    "labels": _labels,
    "train": _train,
}
