"""Jobs about inheritance: which units of a parent matter, and a child's weights on their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nas.core.io import write_json
from nas.core.progress import Tick
from nas.jobs.job import READS, Values
from space import Context, get_family
from space.errors import refuse


@dataclass(frozen=True, kw_only=True)
class StudentJob:
    """A network's arch (as JSON) in its context, and the data and labels that train or score it.

    Images without a label are an error, or left out with `missing` "skip".
    """

    family: str
    arch: Mapping[str, Any]
    context: Context
    dataset: Path = field(metadata=READS)
    store: Path = field(metadata=READS)
    missing: str
    batch_size: int
    random_seed: int
    device: str


@dataclass(frozen=True, kw_only=True)
class ImportanceJob(StudentJob):
    """A trained parent whose units and blocks are ranked on about `images` training images.

    `criterion` is one of `nas.inherit.importance.CRITERIA`; the order goes to the file `out`.
    """

    weights: Path = field(metadata=READS)
    criterion: str
    images: int
    out: Path


@dataclass(frozen=True, kw_only=True)
class InheritJob:
    """A child whose first weights are sliced from a checkpoint or timm tag of its parent.

    `guess` is the context of weights that do not show theirs; `img_size` and `num_classes` are the child's own (None:
    its parent's).
    """

    family: str
    parent: Mapping[str, Any]
    child: Mapping[str, Any]
    guess: Context
    img_size: int | None
    num_classes: int | None
    weights: str
    criterion: str
    random_seed: int
    out: Path


@dataclass(frozen=True, kw_only=True)
class CheckFilesJob:
    """The files that a command will need, None for none: first weights of an arch (as JSON), a teacher, a label store.

    `context` is None, and `classes` empty, before the data are known.
    """

    family: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    context: Context | None = None
    classes: tuple[str, ...] = ()
    weights: str | None = None
    teacher: str | None = None
    store: str | None = None


def check_files(job: CheckFilesJob, tick: Tick) -> Values:
    """Open and match the files that a command will need, before anything costly."""
    from nas.inherit.check_files import check_store, check_teacher, check_weights

    if job.weights is not None:
        family = get_family(job.family)
        check_weights(family, family.arch(job.arch), job.context, job.weights, "--seed-weights", job.classes)
    if job.teacher not in (None, "auto"):
        check_teacher(str(job.teacher), job.classes)
    if job.store is not None:
        check_store(job.store)
    return {}


def rank_by_importance(job: ImportanceJob, tick: Tick) -> Values:
    """Rank a parent's units and blocks, and write `out`: `{"criterion": ..., "order": {...}}`.

    About `images` training images of the stored epoch 0 are replayed, the same for all criteria; "prefix" needs none
    and ranks no blocks, which are then spread evenly.
    """
    import torch
    from torch import nn

    from nas.data import open_dataset
    from nas.data.dataset import subset_by_key
    from nas.export.weights import load_into, load_weights, place
    from nas.inherit.importance import block_harm, order_of, rank_units
    from nas.labels.reader import Batch, LabelReader
    from nas.labels.store import open_store
    from nas.train.losses import sparse_soft_cross_entropy

    family, context = get_family(job.family), job.context
    arch, criterion, device = family.arch(job.arch), job.criterion, job.device
    dataset = open_dataset(job.dataset)
    store = open_store(job.store, use=dataset)
    reader = LabelReader(
        dataset.train,
        store,
        job.batch_size,
        job.random_seed,
        subset=subset_by_key(dataset.train, job.images),
        missing=job.missing,
        device=device,
    )
    with torch.random.fork_rng(devices=[]):
        model = family.build(arch, context)
    load_into(model, load_weights(job.weights, name="parent weights"))
    place(model, device)

    def step_loss(net: nn.Module, batch: Batch) -> torch.Tensor:
        here = batch.to(device)
        inputs = here.inputs.to(memory_format=torch.channels_last)
        tick(float(len(inputs)))
        return sparse_soft_cross_entropy(net(inputs), here.index, here.prob, here.tail).mean()

    batches = reader.epoch(0)
    order = rank_units(family, arch, context, model, criterion, batches=batches, step_loss=step_loss, device=device)
    if criterion != "prefix":
        order |= order_of(block_harm(model, family.blocks(arch), reader.epoch(0), step_loss, device))
    job.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.out, {"criterion": criterion, "order": order})
    return {"file": str(job.out), "criterion": criterion}


def inherit_weights(job: InheritJob, tick: Tick) -> Values:
    """Write a child's first weights to `out`, from a checkpoint or timm tag of its parent.

    The parent's context is read off its weights. Returns both contexts and how many numbers were inherited, with notes
    on what was read. Batch-norm statistics are the parent's: there are no images here.
    """
    import numpy as np
    import torch

    from nas.export.arch_of_weights import checkpoint_context
    from nas.export.load import find_network
    from nas.export.weights import load_into, save_weights
    from nas.inherit.importance import rank_units
    from nas.inherit.slice import inherit

    family = get_family(job.family)
    parent, child = family.arch(job.parent), family.arch(job.child)
    own = {"img_size": job.img_size, "num_classes": job.num_classes}
    changes = {name: value for name, value in own.items() if value is not None}
    guess = replace(job.guess, **changes)
    network = find_network(job.weights, "--weights")
    state = network.weights()
    there = checkpoint_context(family, parent, guess, state, name="--weights")
    here = replace(there, **changes)
    with torch.random.fork_rng(devices=[]):
        whole = family.build(parent, there)
        torch.manual_seed(job.random_seed)
        model = family.build(child, here)
    load_into(whole, state)
    ranked = rank_units(family, parent, there, whole, job.criterion)
    order = {name: np.array(units, dtype=np.int64) for name, units in ranked.items()}
    found = inherit(model, state, family.slicing(parent, child, there, here, order))
    try:
        digest = save_weights(job.out, model.state_dict())
    except OSError as error:
        raise refuse("--out", f"{job.out} ({error.strerror})", "a file to write") from None
    contexts = {"parent_context": asdict(there), "context": asdict(here)}
    counts = {"copied": found.copied, "kept": found.kept, "digest": digest}
    return {**contexts, **counts, "notes": list(network.notes)}
