"""A model that a run or a training left, on a split of a data set: `nas.train --evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.cli import default_cache
from nas.core.config import parse_share
from nas.core.progress import Console
from nas.data.prepared import prepared
from nas.measure.fingerprint import take_fingerprint
from space.errors import refuse

if TYPE_CHECKING:
    from torch import Tensor, nn


def evaluate_model(given: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a model that a run or a training left, on a split of a data set."""
    from nas.data import DataSpec
    from nas.data.augment.presets import preset_spec
    from nas.export.model import left_by
    from nas.export.weights import place
    from nas.train.distributed import world_of
    from nas.train.evaluate import evaluate
    from nas.train.train_config import ALL_IMAGES

    if world_of()[1] > 1:
        raise refuse("--evaluate", "several processes", "one", "start it without torchrun")
    if given.data is None:
        raise refuse("--data", "nothing", "the data set to evaluate on")
    left = left_by(Path(given.evaluate))
    size = left.context.img_size
    if given.img_size not in (None, size):
        raise refuse("--img-size", given.img_size, f"the model's own {size}", "leave it out")
    device = given.device or "cpu"
    take_fingerprint(device, 1)  # refuses a device that is not there
    console = Console(quiet=given.quiet)
    spec = DataSpec(
        given.data,
        size,
        ALL_IMAGES if given.proxy_images is None else given.proxy_images,
        parse_share("--max-broken", given.max_broken),
        given.data_seed,
        pixel_cache=given.pixel_cache,
    )
    cache = Path(given.cache_dir) if given.cache_dir else default_cache()
    dataset = prepared(spec, cache, console)
    if list(dataset.classes) != left.classes:
        theirs, own = (", ".join(map(str, c[:3])) for c in (left.classes, dataset.classes))
        raise refuse(
            "--data",
            f"{dataset.num_classes} classes ({own}, ...)",
            f"the {len(left.classes)} of {left.path} ({theirs}, ...)",
        )
    split = getattr(dataset, given.split)
    model = place(left.build(), device)
    console.start(float(len(split)), "images")
    try:
        outcome = evaluate(
            _fused(model, given.fusion),
            split,
            preset_spec("default", dataset),
            num_classes=dataset.num_classes,
            device=device,
            tick=console.advance,
        )
    finally:
        console.stop()
    (top1, se), (top5, se5) = outcome.top(1), outcome.top(5)
    table = outcome.by_class(dataset.classes)
    if given.out is not None:
        try:
            Path(given.out).write_text(table, encoding="utf-8")
        except OSError as error:
            raise refuse("--out", given.out, "a CSV file to write", error.strerror or "") from None
    console.line(
        f"{given.split}: top-1 {top1:.2%} +- {se:.2%}, top-5 {top5:.2%} +- {se5:.2%} on "
        f"{len(split)} images"
    )
    for line in table.splitlines() if given.out is None else ():
        console.line(line)
    return {
        "split": given.split,
        "n": len(split),
        "top1": top1,
        "top1_se": se,
        "top5": top5,
        "top5_se": se5,
        "loss": outcome.mean_loss,
    }


def _fused(model: nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    """Give a net whose two heads, if it has two, are fused as asked."""
    from nas.train.teaching import both_heads, fuse, has_token

    if how == "logits" or not has_token(model):
        return model
    return lambda inputs: fuse(both_heads(model, inputs), how)
