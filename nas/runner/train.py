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

from nas.files import read_json, write_json
from nas.jobs import Tick
from space import Context, get_family

Values = dict[str, Any]


def train(spec: Mapping[str, Any], tick: Tick) -> Values:
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
    family = get_family(spec["family"])
    context = Context(**spec["context"])
    arch = family.arch(spec["arch"])
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
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
