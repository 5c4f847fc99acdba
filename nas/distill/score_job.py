"""The job that scores an arch before any training: inherited weights, evaluated on the holdout."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.core.io import write_json
from nas.core.progress import Tick
from space import Context, get_family

Values = dict[str, Any]


def score(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Slice a parent's weights into an arch and score it on the holdout; no training.

    `spec`: as that of the job "train", of which family, arch, context, dataset, store, parent,
    batch_size, random_seed, device, missing, beyond, label_epochs, images and out count. With
    `recalibrate`, batch norms are first estimated anew on what a training of this random seed sees
    first (stored epoch 0). Leaves the folder `out` whole, with holdout.safetensors (per image) and
    result.json; returns soft_loss (nats) and top1 with their standard errors over images.
    """
    from nas.data import open_dataset
    from nas.data.augment.outputs import EVAL_BATCH
    from nas.distill.student import evaluate, mean_se, start_model, subset_by_key
    from nas.export.weights import place
    from nas.inherit.batchnorm import first_inputs
    from nas.inherit.importance import load_order
    from nas.labels.reader import Replay, holdout_batches
    from nas.labels.store import open_store

    started = time.monotonic()
    out = Path(spec["out"])
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # nothing in it is worth going on from
    part.mkdir(parents=True)
    family = get_family(spec["family"])
    context, device = Context(**spec["context"]), str(spec["device"])
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
    parent, inputs = spec["parent"], None
    order = None if parent.get("order") is None else load_order(Path(parent["order"]))
    if spec["recalibrate"]:
        replay = Replay(
            dataset.train,
            store,
            spec["batch_size"],
            spec["random_seed"],
            subset=subset_by_key(dataset.train, spec.get("images")),
            missing=spec["missing"],
            beyond=spec["beyond"],
            epochs=spec["label_epochs"],
            device=device,
        )
        inputs = first_inputs(replay, 0)
    model, _ = start_model(
        family,
        family.arch(spec["arch"]),
        context,
        init="inherit",
        random_seed=spec["random_seed"],
        parent_arch=family.arch(parent["arch"]),
        parent_weights=Path(parent["weights"]),
        order=order,
        inputs=inputs,
        device=device,
    )
    scored = evaluate(
        place(model, device),
        holdout_batches(dataset, store, EVAL_BATCH, spec["missing"]),
        dataset.holdout.labels,
        device,
        tick,
    )
    soft_loss, soft_loss_se = mean_se(scored.soft_loss)
    if not math.isfinite(soft_loss):
        raise FloatingPointError(f"the holdout loss is {soft_loss}")
    top1, top1_se = mean_se(scored.correct)
    values: Values = {
        "soft_loss": soft_loss,
        "soft_loss_se": soft_loss_se,
        "top1": top1,
        "top1_se": top1_se,
    }
    scored.save(part / "holdout.safetensors")
    seconds = time.monotonic() - started
    done = {"values": values, "files": ["holdout.safetensors"], "seconds": seconds}
    write_json(part / "result.json", done)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return values
