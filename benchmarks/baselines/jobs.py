"""Jobs that prune the seed with other tools and train what is left."""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.progress import Tick
from nas.core.requirement import Setting
from nas.distill.jobs import ScoreJob, empty_part, finish_folder, label_reader
from nas.jobs.job import Values
from space import get_family

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nas.data import Dataset
    from nas.labels.reader import LabelReader
    from nas.labels.store import LabelStore

GRADIENT_BATCHES = 8
SCORE_BATCHES = 4
"""Batches that Taylor importance, and a score of FastNAS, look at."""
WORKER = (sys.executable, "-c", f"import sys; from nas.jobs.worker import main; sys.exit(main([{__name__!r}]))")
"""The command of a worker process that runs these jobs too."""
INSTALL = {"torch_pruning": "pip install -e '.[rivals]'", "modelopt": "pip install nvidia-modelopt requests"}
"""What the tools are installed by, under the name that they are imported by."""


@dataclass(frozen=True)
class Variant:
    """One way to prune: tool, importance, spread over the layers, and what becomes of the heads.

    `heads`: `kept` (attention's inner widths are left alone), `dims` (the tool narrows each head) or `pruned` (whole
    heads go).
    """

    name: str
    tool: str = "torch_pruning"
    importance: str = "magnitude"
    everywhere: bool = False
    heads: str = "kept"


VARIANTS = (
    Variant("Torch-Pruning, as its example for timm", heads="dims"),
    Variant("Torch-Pruning, whole heads", heads="pruned"),
    Variant("Torch-Pruning, magnitude, local"),
    Variant("Torch-Pruning, magnitude, global", everywhere=True),
    Variant("Torch-Pruning, Taylor, local", importance="taylor"),
    Variant("Torch-Pruning, Taylor, global", importance="taylor", everywhere=True),
    Variant("ModelOpt FastNAS", tool="modelopt"),
)


def not_installed(tool: str) -> str | None:
    """Return how to install a tool that is not there, None when it is."""
    if importlib.util.find_spec(tool) is not None:
        return None
    return f"not run: {tool} is not installed; {INSTALL[tool]}"


@dataclass(frozen=True, kw_only=True)
class SeedJob(ScoreJob):
    """A job on the trained seed (`arch`, `parent`) with the labels that the contracted arch trains on."""

    def network(self) -> nn.Module:
        """Build the seed with fresh weights."""
        family = get_family(self.family)
        return family.build(family.arch(self.arch), self.context)

    def data(self) -> tuple[Dataset, LabelStore, LabelReader]:
        """Open the data, its labels, and the batches that the contracted arch trains on."""
        from nas.data import open_dataset
        from nas.labels.store import open_store

        dataset = open_dataset(self.dataset)
        store = open_store(self.store, use=dataset)
        return dataset, store, label_reader(self, dataset, store)


@dataclass(frozen=True, kw_only=True)
class PruneJob(SeedJob):
    """The seed to prune to at most `budget` parameters."""

    variant: Variant
    budget: int


@dataclass(frozen=True, kw_only=True)
class PrunedVisitJob(SeedJob):
    """A pruned network to time beside the seed in one visit; `pruned` holds its weights."""

    pruned: Path
    setting: Setting


@dataclass(frozen=True, kw_only=True)
class PrunedTrainJob(SeedJob):
    """A pruned network to train for some epochs; `pruned` holds its weights."""

    pruned: Path
    epochs: int


def prune(job: PruneJob, tick: Tick) -> Values:
    """Prune the seed, keep `pruned.safetensors`, load it in timm."""
    import torch

    from benchmarks.baselines import prune as tools
    from nas.data.augment.views import EVAL_BATCH
    from nas.distill.student import evaluate
    from nas.export.weights import load_weights, save_weights
    from nas.inherit.batchnorm import first_inputs
    from nas.labels.reader import holdout_batches

    torch.set_num_threads(1)  # the same bits whatever the machine
    started, part = time.monotonic(), empty_part(job.out)
    ctx, variant, budget = job.context, job.variant, job.budget
    dataset, store, reader = job.data()
    seed = job.network()
    seed.load_state_dict(load_weights(job.parent.weights, name="the seed's weights"))
    size, generator = (2, ctx.in_chans, ctx.img_size, ctx.img_size), torch.Generator()
    example = torch.randn(size, generator=generator.manual_seed(0))
    ratio: float | None = None
    if variant.tool == "modelopt":

        def score(net: nn.Module) -> float:
            batches = islice(holdout_batches(dataset, store, EVAL_BATCH, job.missing), SCORE_BATCHES)
            return float(evaluate(net, batches, dataset.holdout.labels, "cpu").correct.mean())

        inputs = list(first_inputs(reader, 0))
        pruned = tools.fastnas(copy.deepcopy(seed), example, budget, inputs, score, job.random_seed)
    else:
        gradients: list[torch.Tensor | None] = [None for _ in seed.parameters()]
        if variant.importance == "taylor":
            gradients = loss_gradients(seed, reader)
        how: dict[str, Any] = {name: getattr(variant, name) for name in ("importance", "everywhere", "heads")}
        pruned, ratio = tools.prune_to_budget(
            lambda share: tools.prune_by_ratio(seed, example, share, gradients, **how), budget
        )
    state = pruned.state_dict()
    save_weights(part / "pruned.safetensors", state)
    again = tools.rebuild(job.network(), state).eval()
    with torch.no_grad():
        pruned.train()
        pruned.eval()
        assert torch.allclose(again(example), pruned(example), atol=1e-4), "it is not rebuilt"
    family = get_family(job.family)
    values = {
        "params": tools.count(again),
        "pruning_ratio": ratio,
        "loads": tools.loads_in_timm(family.timm_call(family.arch(job.arch), ctx), state),
    }
    finish_folder(job.out, part, values, started)
    return values


def visit_pruned(job: PrunedVisitJob, tick: Tick) -> Values:
    """Time a pruned network beside the seed: a `nas.measure.measurement.Measurement` as JSON."""
    from benchmarks.baselines.prune import rebuild
    from nas.export.weights import load_weights
    from nas.measure.interleave import keep_freed_memory
    from nas.measure.throughput import measure

    started, part = time.monotonic(), empty_part(job.out)
    keep_freed_memory()
    pruned = rebuild(job.network(), load_weights(job.pruned, name="pruned weights"))
    values = measure(pruned, job.network(), ctx=job.context, setting=job.setting).to_dict()
    finish_folder(job.out, part, values, started)
    return values


def loss_gradients(model: nn.Module, reader: LabelReader) -> list[torch.Tensor | None]:
    """Return the gradients of the training loss, summed over the first batches."""
    from nas.distill.student import batch_loss
    from nas.train.losses import DistillLoss

    model.zero_grad()
    for batch in islice(reader.epoch(0), GRADIENT_BATCHES):
        model.train()  # drops the bias tables that eval mode cached, and the last graph with them
        model.eval()
        batch_loss(model, batch, DistillLoss(), "cpu").mean().backward()  # type: ignore[no-untyped-call]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradients


def train_pruned(job: PrunedTrainJob, tick: Tick) -> Values:
    """Train a pruned network as the proxy trains an arch that inherits; test it.

    Leaves `test.safetensors` with `correct` [n], whether a test image's class came first.
    """
    from benchmarks.baselines.prune import rebuild
    from nas.distill.student import Evaluation, proxy_settings, train_on_labels
    from nas.export.weights import load_weights
    from nas.inherit.batchnorm import first_inputs, recalibrate
    from nas.train.evaluate import evaluate
    from nas.train.losses import DistillLoss
    from nas.train.norms import settle
    from nas.train.optim import INHERIT_LR

    started, part, device = time.monotonic(), empty_part(job.out), job.device
    dataset, store, reader = job.data()
    model = rebuild(job.network(), load_weights(job.pruned, name="pruned weights"))
    recalibrate(model, {}, {}, first_inputs(reader, 0), device, new_input=True)
    settings = proxy_settings(job.epochs, INHERIT_LR, batch_size=job.batch_size)
    history, _ = train_on_labels(
        model, reader, DistillLoss(), settings, random_seed=job.random_seed, device=device, tick=tick
    )
    augment = store.spec.augment
    settle(model, dataset.train, augment, updates=reader.steps_per_epoch, device=device)
    found = evaluate(model, dataset.test, augment, num_classes=job.context.num_classes, device=device)
    tested = Evaluation(found.loss, found.predicted, found.truth)
    tested.save(part / "test.safetensors")
    values = {"train_loss": history.final_loss, "test_top1": float(tested.correct.mean())}
    finish_folder(job.out, part, values, started)
    return values
