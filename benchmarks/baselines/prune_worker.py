"""Prune and train in a process of its own: `python -m benchmarks.baselines.prune_worker SPEC`.

A `prune` job leaves pruned.safetensors, timed beside the seed; a `train` job goes on from there as
`nas.distill.student.train_and_score` trains the contracted arch.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.baselines.prune import (
    Variant,
    count,
    fastnas,
    prune_by_ratio,
    prune_to_budget,
    rebuild,
)
from nas.core.io import read_json, write_json
from nas.core.requirement import Setting
from nas.data import open_dataset
from nas.data.augment.timm_engine import eval_batch
from nas.data.augment.views import EVAL_BATCH, outputs
from nas.distill.student import evaluate, mean_se, proxy_settings
from nas.export.weights import load_weights, place, save_weights
from nas.inherit.batchnorm import first_inputs, recalibrate
from nas.labels.reader import Batch, LabelReader, holdout_batches
from nas.labels.store import LabelStore, open_store
from nas.measure.throughput import measure
from nas.train.loop import train
from nas.train.losses import DistillLoss, TeacherTargets
from nas.train.optim import INHERIT_LR
from space import Context, get_family

Values = dict[str, Any]

GRADIENT_BATCHES = 8
SCORE_BATCHES = 4
"""Batches that Taylor importance, and a score of FastNAS, look at."""


def seed_network(spec: Mapping[str, Any], weights: bool = True) -> nn.Module:
    """Build the seed, with its trained weights."""
    family = get_family(spec["family"])
    model = family.build(family.arch(spec["arch"]), Context(**spec["context"]))
    if weights:
        model.load_state_dict(load_weights(Path(spec["weights"]), name="the seed's weights"))
    return model


def replay_of(spec: Mapping[str, Any], random_seed: int) -> LabelReader:
    """Open the replay that the contracted arch trains on."""
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
    return LabelReader(
        dataset.train,
        store,
        spec["batch_size"],
        random_seed,
        missing=spec["missing"],
        label_overflow=spec["label_overflow"],
        epochs=spec["label_epochs"],
        device=spec["device"],
    )


def prune_job(spec: Mapping[str, Any], part: Path) -> Values:
    """Prune the seed to the budget, keep it, time it beside the seed, try to load it in timm."""
    torch.set_num_threads(1)  # the same bits whatever the machine
    started = time.monotonic()
    ctx, variant = Context(**spec["context"]), Variant(**spec["variant"])
    model = seed_network(spec)
    example = torch.randn(
        2, ctx.in_chans, ctx.img_size, ctx.img_size, generator=torch.Generator().manual_seed(0)
    )
    replay = replay_of(spec, spec["random_seed"])
    if variant.tool == "modelopt":
        batches = list(first_inputs(replay, 0))
        pruned = fastnas(
            model,
            example,
            spec["budget"],
            batches,
            lambda net: _score(net, spec),
            spec["random_seed"],
        )
        ratio = None
    else:
        gradients: list[torch.Tensor | None] = [None for _ in model.parameters()]
        if variant.importance == "taylor":
            gradients = _gradients(model, replay)
        pruned, ratio = prune_to_budget(
            lambda r: prune_by_ratio(model, example, variant, r, gradients), spec["budget"]
        )
    state = pruned.state_dict()
    save_weights(part / "pruned.safetensors", state)
    again = rebuild(seed_network(spec, weights=False), state).eval()
    with torch.no_grad():
        pruned.train()
        pruned.eval()
        assert torch.allclose(again(example), pruned(example), atol=1e-4), "it is not rebuilt"
    seconds = time.monotonic() - started
    timed = measure(
        again,
        seed_network(spec),
        ctx=ctx,
        setting=Setting(**spec["setting"]),
        threads=spec["threads"],
        blocks=spec["blocks"],
        max_blocks=spec["max_blocks"],
    )
    measured = {f"seed_{k}": getattr(timed, k) for k in ("ratio", "ratio_lo", "ratio_hi")}
    told = {"params": count(again), "pruning_ratio": ratio, "prune_seconds": seconds}
    return {**told, **measured, "loads": loads_in_timm(spec["timm"], state)}


def _gradients(model: nn.Module, replay: LabelReader) -> list[torch.Tensor | None]:
    """Accumulate the gradients of the training loss over the first batches."""
    loss = DistillLoss()
    model.zero_grad()
    for number, batch in enumerate(replay.epoch(0)):
        if number == GRADIENT_BATCHES:
            break
        model.train()  # drops the bias tables that eval mode cached, and the last graph with them
        model.eval()
        targets = TeacherTargets(index=batch.index, prob=batch.prob, tail=batch.tail)
        found = loss(model(batch.inputs), batch.truth, targets)
        found.mean().backward()  # type: ignore[no-untyped-call]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradients


def _score(net: nn.Module, spec: Mapping[str, Any]) -> float:
    """Return the share of true labels hit on the first images of the holdout."""
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
    hit, images = 0, SCORE_BATCHES * EVAL_BATCH
    net.train()
    net.eval()
    pixels, labels = dataset.holdout.pixels[:images], dataset.holdout.labels[:images]
    with torch.no_grad():
        for start in range(0, len(labels), EVAL_BATCH):
            inputs = eval_batch(pixels[start : start + EVAL_BATCH], store.spec.augment)
            said = net(inputs).argmax(1).numpy()
            hit += int((said == labels[start : start + EVAL_BATCH]).sum())
    return hit / len(labels)


def loads_in_timm(call: tuple[str, Mapping[str, Any]], state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether `timm.create_model` and a strict `load_state_dict` take the weights."""
    import timm

    model = timm.create_model(call[0], **call[1])
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError:
        return False
    return True


def train_job(spec: Mapping[str, Any], part: Path) -> Values:
    """Fine-tune a pruned network on the soft labels; test it."""
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
    model = rebuild(
        seed_network(spec, weights=False), load_weights(Path(spec["pruned"]), name="pruned weights")
    )
    replay = replay_of(spec, spec["random_seed"])
    values = train_module(
        model,
        replay,
        epochs=spec["epochs"],
        batch_size=spec["batch_size"],
        random_seed=spec["random_seed"],
        device=spec["device"],
    )
    held = evaluate(
        model,
        holdout_batches(dataset, store, EVAL_BATCH, spec["missing"]),
        dataset.holdout.labels,
        spec["device"],
    )
    held.save(part / "holdout.safetensors")
    tested = evaluate_test(model, dataset, store, spec["device"])
    save_weights(part / "test.safetensors", {"correct": tested.to(torch.uint8)})
    top1, top1_se = mean_se(tested.numpy())
    return {
        **values,
        "params": count(model),
        "soft_loss": mean_se(held.soft_loss)[0],
        "test_top1": top1,
        "test_top1_se": top1_se,
        "test_n": len(tested),
    }


def train_module(
    model: nn.Module,
    replay: LabelReader,
    *,
    epochs: int,
    batch_size: int,
    random_seed: int,
    device: str,
) -> Values:
    """Train any network as the proxy trains an arch that inherits, batch norms estimated anew."""
    loss = DistillLoss()
    recalibrate(model, {}, {}, first_inputs(replay, 0), device, new_input=True)

    def step_loss(net: nn.Module, batch: Batch) -> torch.Tensor:
        inputs = batch.inputs.to(device, memory_format=torch.channels_last)
        index, prob, tail = (t.to(device) for t in (batch.index, batch.prob, batch.tail))
        targets = TeacherTargets(index=index, prob=prob, tail=tail)
        return loss(net(inputs), batch.truth.to(device), targets)

    settings = proxy_settings(epochs, INHERIT_LR, batch_size=batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        history = train(
            model,
            replay.epoch,
            step_loss,
            settings,
            steps_per_epoch=replay.steps_per_epoch,
            device=device,
        )
    return {"train_loss": history.final_loss, "epochs": epochs}


def evaluate_test(model: nn.Module, dataset: Any, store: LabelStore, device: str) -> torch.Tensor:
    """Return for every test image whether its class came first, bool [n]."""
    place(model, device).train()  # drops what eval mode may have cached
    model.eval()
    split = dataset.test
    said = [
        logits.argmax(1).cpu()
        for _, logits in outputs(model, split, store.spec.augment, device=device)
    ]
    return torch.cat(said) == torch.from_numpy(np.array(split.labels))


def one_line(text: str, most: int = 240) -> str:
    """Return a message as one line, without the rules of tables; of a long one, its end."""
    words = " ".join(re.sub(r"[\u2500-\u257f]+|-{4,}", " ", text).split())
    return words if len(words) <= most else "... " + words[-most:].partition(" ")[2]


JOBS = {"prune": prune_job, "train": train_job}


def main(path: Path) -> int:
    """Do the job of a specification; a failure is a result too, with a reason of one line."""
    spec = read_json(path, "the specification of a rival's job")
    out = Path(spec["out"])
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        result = {"ok": True, "values": JOBS[spec["kind"]](spec, part)}
    except Exception as error:
        result = {"ok": False, "reason": f"{type(error).__name__}: {one_line(str(error))}"}
    write_json(part / "result.json", result)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
