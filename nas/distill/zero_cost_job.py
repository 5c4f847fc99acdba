"""The job that scores an untrained arch: the zero-cost proxies on the first replayed images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.progress import Tick
from space import Context, get_family
from space.errors import refuse

if TYPE_CHECKING:
    from nas.labels.reader import Batch, Replay

Values = dict[str, Any]


def zero_cost(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Score an arch by each of `nas.distill.zero_cost.ZERO_COST`, and say on how many `images`.

    `spec`: family, arch, context, dataset, store, images, batch_size, random_seed, device, missing.
    The batch is what a training of this `random_seed` and `batch_size` sees first, as many of its
    batches as make `images` images (all of the first epoch where that has fewer).
    """
    from nas.data import open_dataset
    from nas.distill.zero_cost import zero_cost_scores
    from nas.labels.reader import Replay
    from nas.labels.store import open_store

    family = get_family(spec["family"])
    context = Context(**spec["context"])
    arch = family.arch(spec["arch"])
    images, device = int(spec["images"]), str(spec["device"])
    if images < 2:
        raise refuse("images", images, "an integer >= 2 (images are compared)")
    dataset = open_dataset(Path(spec["dataset"]))
    store = open_store(Path(spec["store"]), use=dataset)
    replay = Replay(
        dataset.train,
        store,
        spec["batch_size"],
        spec["random_seed"],
        missing=spec["missing"],
        device=device,
    )
    batch = _first(replay, images)
    values: Values = {
        **zero_cost_scores(
            family, arch, context, batch, random_seed=spec["random_seed"], device=device
        ),
        "images": len(batch.rows),
    }
    tick(float(len(batch.rows)))
    return values


def _first(replay: Replay, images: int) -> Batch:
    """Join the first batches until they hold `images` images."""
    import torch

    from nas.labels.reader import Batch

    found: list[Batch] = []
    for batch in replay.epoch(0):
        found.append(batch)
        if sum(len(b.rows) for b in found) >= images:
            break
    names = ("inputs", "index", "prob", "tail", "truth", "rows")
    return Batch(*(torch.cat([getattr(b, name) for b in found])[:images] for name in names))
