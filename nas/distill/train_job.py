"""The job that trains: an arch on stored labels, scored on the holdout, a folder left whole."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from nas.core.io import read_json, remove_leftovers, write_json
from nas.core.progress import Tick
from space import Context, get_family
from space.errors import refuse

Values = dict[str, Any]

CHECKPOINT = "checkpoint.safetensors"
"""Where a training stands, in its job's folder."""


def train(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Train an arch on stored labels and score it; leaves the folder `out` whole.

    It then holds weights.safetensors, holdout.safetensors (per image), with `test`
    test.safetensors too, and result.json with what is returned. With `rung`, training stops after
    so many epochs of the schedule and leaves checkpoint.safetensors in place of the weights, from
    which the next rung goes on (`continue_from`), on the CPU to the same bits as without a stop.
    """
    out = Path(spec["out"])
    part = out.with_name(f"{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    # Only a folder of the shared cache has several writers; a run's own has its driver.
    shared = FileLock(out.with_name(f"{out.name}.lock")) if spec["shared"] else nullcontext()
    with shared:
        return _train_into(spec, out, part, tick)


def _take_over(before: Path, checkpoint: Path) -> None:
    """Copy where an earlier rung stands; refuse when it is gone."""
    aside = checkpoint.with_name(f".{checkpoint.name}.tmp")
    try:
        shutil.copyfile(before, aside)
    except FileNotFoundError:
        want = "the checkpoint of the rung before"
        raise refuse(str(before), "no such file", want, "start a new run") from None
    aside.replace(checkpoint)


def _without(tick: Tick, units: float) -> Tick:
    """Let the units pass unsaid that an earlier rung has told of."""
    left = units

    def after(now: float) -> None:
        nonlocal left
        said = min(left, now)
        left -= said
        if now > said:
            tick(now - said)

    return after


def _loader_workers(device: str) -> int:
    """Return how many processes augment: on a CPU training itself needs every core."""
    return 0 if device == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))


def _train_into(spec: Mapping[str, Any], out: Path, part: Path, tick: Tick) -> Values:
    from nas.data import open_dataset
    from nas.distill.student import evaluate_test, mean_se, proxy_settings, train_and_score
    from nas.inherit.adopt import adopt
    from nas.inherit.importance import load_order
    from nas.labels.store import open_store
    from nas.measure.macs import fvcore_macs
    from nas.train.losses import DistillLoss

    if (out / "result.json").is_file():  # another run finished it while this one waited
        finished: Values = read_json(out / "result.json", "a finished training")["values"]
        return finished
    remove_leftovers(part)  # of a worker that was killed
    started = time.monotonic()
    family = get_family(spec["family"])
    context = Context(**spec["context"])
    arch = family.arch(spec["arch"])
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
    init, _, source = str(spec["init"]).partition(":")
    parent_arch, parent_context, parent_weights, order = None, context, None, None
    notes: list[str] = []
    if init == "file":
        init, parent_arch, parent_weights = "inherit", arch, part / "adopted.safetensors"
        parent_context, note = adopt(family, arch, context, source, parent_weights)
        notes.append(note)
    elif init == "inherit":
        parent_arch = family.arch(spec["parent"]["arch"])
        parent_weights = Path(spec["parent"]["weights"])
        if spec["parent"].get("order") is not None:
            order = load_order(Path(spec["parent"]["order"]))
    rung, before = spec.get("rung"), spec.get("continue_from")
    checkpoint = None
    if spec["checkpoint"] or rung is not None or before is not None:
        checkpoint = part / CHECKPOINT
        if before is not None and not checkpoint.exists():
            _take_over(Path(before["checkpoint"]), checkpoint)
    if before is not None:
        images = spec.get("images") or len(dataset.train)
        tick = _without(tick, float(before["epochs"] * images))
    # Absent from the jobs of before there was a choice, as from those that stay with sparse.
    loss = DistillLoss(hard_weight=spec.get("hard_weight", 0.0))
    if "distill" in spec:
        assert "hard_weight" not in spec, "one loss"
        loss = DistillLoss(spec["distill"])
    weights = part / "weights.safetensors"
    score = train_and_score(
        family,
        arch,
        context,
        store=store,
        dataset=dataset,
        settings=proxy_settings(spec["epochs"], spec["lr"], batch_size=spec["batch_size"]),
        init=init,
        random_seed=spec["random_seed"],
        device=spec["device"],
        parent_arch=parent_arch,
        parent_ctx=parent_context,
        parent_weights=parent_weights,
        parent_order=order,
        first_epoch=spec["first_epoch"],
        images_per_epoch=spec.get("images"),
        loss=loss,
        out_weights=weights,
        checkpoint=checkpoint,
        stop_after=rung,
        workers=_loader_workers(spec["device"]),
        missing=spec["missing"],
        beyond=spec["beyond"],
        label_epochs=spec["label_epochs"],
        tick=tick,
    )
    if not math.isfinite(score.soft_loss):
        raise FloatingPointError(f"the holdout loss is {score.soft_loss}")
    os.replace(part / "weights.holdout.safetensors", part / "holdout.safetensors")
    values: Values = {k: v for k, v in score.to_dict().items() if k not in ("weights", "per_image")}
    values["notes"] = [*notes, *score.notes]
    if spec["test"]:
        tested = evaluate_test(
            family, arch, context, weights, dataset, store.spec.augment, device=spec["device"]
        )
        tested.save(part / "test.safetensors")
        top1, top1_se = mean_se(tested.correct)
        values.update(test_top1=top1, test_top1_se=top1_se, test_n=len(tested.correct))
        values["fvcore_macs"] = fvcore_macs(family.build(arch, context), context)
        assert values["fvcore_macs"] == family.count_macs(arch, context), "the counts disagree"
    done = [part / "adopted.safetensors"]
    # A rung leaves where it stands; what it weighs then is of no use to anyone else.
    done.append(weights if rung is not None else part / CHECKPOINT)
    for spent in done:
        spent.unlink(missing_ok=True)
    files = sorted(p.name for p in part.glob("*.safetensors"))
    seconds = time.monotonic() - started
    write_json(part / "result.json", {"values": values, "files": files, "seconds": seconds})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return values
