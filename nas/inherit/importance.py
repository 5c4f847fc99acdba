"""Which channels, heads and blocks a net needs most, so that a child keeps those."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas.core.io import read_json
from nas.export.weights import drop_stale_caches
from nas.labels.reader import Batch
from space import Context
from space.errors import refuse
from space.family import Arch, Family, Member

CRITERIA = ("prefix", "l1", "l2", "taylor")
"""Ways to rank the units of a group; `rank_units` says what each means."""

Scores = npt.NDArray[np.float64]
Order = dict[str, list[int]]
"""Units (or blocks) of every group, most wanted first: `order` of `Family.slicing`."""
StepLoss = Callable[[nn.Module, Batch], torch.Tensor]
"""The mean loss of a batch, a scalar."""


def rank_units(
    family: Family,
    arch: Arch,
    ctx: Context,
    model: nn.Module,
    criterion: str,
    *,
    batches: Iterable[Batch] = (),
    step_loss: StepLoss | None = None,
    device: str = "cpu",
) -> Order:
    """Order the units of all groups of a net, most wanted first.

    "prefix": as they stand. "l1", "l2": by the size of a unit's weights (`weight_norms`). "taylor": by what the loss
    would change without it, to first order (`taylor_scores`), which alone takes `batches` and `step_loss`. Ties go to
    the lower number. The model is left as it was.
    """
    if criterion not in CRITERIA:
        raise refuse("--importance", criterion, f"one of {', '.join(CRITERIA)}")
    groups = family.groups(arch, ctx)
    if criterion == "prefix":
        return {name: list(range(_units(members))) for name, members in groups.items()}
    if criterion == "taylor":
        assert step_loss is not None, "taylor takes a loss"
        scores = taylor_scores(model, groups, batches, step_loss, device)
    else:
        scores = weight_norms(model, groups, int(criterion[1]))
    return order_of(scores)


def order_of(scores: Mapping[str, Scores]) -> Order:
    """Order units or blocks by their scores, the most wanted first; ties go to the lower number."""
    return {name: np.argsort(-value, kind="stable").tolist() for name, value in scores.items()}


def weight_norms(model: nn.Module, groups: Mapping[str, tuple[Member, ...]], power: int) -> dict[str, Scores]:
    """Measure how large a unit's weights are, by group: float64 [units].

    `power` 1 sums magnitudes, 2 squares. Matrices and kernels count (`.weight` of two and more dimensions), each as
    applied: a batch norm behind a convolution is folded in, since before one the scale of a weight means nothing.
    Every tensor is divided by its mean over units, so that all count alike. Method: Li et al. 2017 (arXiv 1608.08710).
    """
    weights = _folded(model)
    scores: dict[str, Scores] = {}
    for name, members in groups.items():
        total = np.zeros(_units(members))
        for member in members:
            if member.key in weights:
                found = _by_unit(weights[member.key].abs() ** power, member, len(total))
                mean = found.mean()
                total += found / mean if mean > 0 else 0.0
        scores[name] = total
    return scores


def _folded(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return matrices and kernels in float64, with the batch norm declared next folded in."""
    found: dict[str, torch.Tensor] = {}
    last = ""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
            last = f"{name}.weight"
            found[last] = weight.detach().double().cpu()
        elif isinstance(module, _BatchNorm) and last:
            kernel = found[last]
            if module.affine and module.running_var is not None:
                spread = (module.running_var.double() + module.eps).sqrt()
                scale = (module.weight.detach().double() / spread).cpu()
                if len(scale) == len(kernel):
                    found[last] = kernel * scale.view([-1] + [1] * (kernel.ndim - 1))
            last = ""
    return found


def taylor_scores(
    model: nn.Module,
    groups: Mapping[str, tuple[Member, ...]],
    batches: Iterable[Batch],
    step_loss: StepLoss,
    device: str = "cpu",
) -> dict[str, Scores]:
    """Estimate how much the loss would change without a unit, by group: float64 [units].

    The sum of weight times gradient over all of a unit's parameters, squared, averaged over
    batches; in eval mode. Method: Molchanov et al. 2019 (arXiv 1906.10771), group contribution.
    """
    totals = {name: np.zeros(_units(members)) for name, members in groups.items()}
    net, count = _copied(model, device).requires_grad_(True), 0
    for batch in batches:
        net.train().eval()  # a bias table that eval mode has cached belongs to the last graph
        net.zero_grad(set_to_none=True)
        with torch.enable_grad():
            step_loss(net, batch).backward()  # type: ignore[no-untyped-call]
        parts = {key: (p.detach() * p.grad).double().cpu() for key, p in net.named_parameters() if p.grad is not None}
        for name, members in groups.items():
            units = len(totals[name])
            each = [_by_unit(parts[m.key], m, units) for m in members if m.key in parts]
            totals[name] += np.sum(each, axis=0) ** 2
        count += 1
    assert count, "importance of no batches"
    return {name: total / count for name, total in totals.items()}


def block_harm(
    model: nn.Module,
    blocks: Mapping[str, tuple[str, ...]],
    batches: Iterable[Batch],
    step_loss: StepLoss,
    device: str = "cpu",
) -> dict[str, Scores]:
    """Measure the mean loss with one block bypassed less that of the whole net, in eval mode: float64 [blocks].

    Harm is that of one block alone: of several, the least harmful are the last ones in its order.
    """
    harm = {name: np.zeros(len(names)) for name, names in blocks.items()}
    net, count = _copied(model, device).eval(), 0
    with torch.no_grad():
        for batch in batches:
            whole = float(step_loss(net, batch))
            for name, names in blocks.items():
                for j, block in enumerate(names):
                    harm[name][j] += _bypassed(net, block, batch, step_loss) - whole
            count += 1
    assert count, "importance of no batches"
    return {name: value / count for name, value in harm.items()}


def _copied(model: nn.Module, device: str) -> nn.Module:
    drop_stale_caches(model)  # a graph cannot be copied
    return copy.deepcopy(model).to(device)


def _bypassed(model: nn.Module, block: str, batch: Batch, step_loss: StepLoss) -> float:
    """Return the loss with a block replaced by the identity."""
    path, _, name = block.rpartition(".")
    holder = model.get_submodule(path)
    kept = holder.get_submodule(name)
    setattr(holder, name, nn.Identity())
    try:
        return float(step_loss(model, batch))
    finally:
        setattr(holder, name, kept)


def _by_unit(values: torch.Tensor, member: Member, units: int) -> Scores:
    """Sum the values that belong to each unit: float64 [units]."""
    others = [d for d in range(values.ndim) if d != member.dim]
    lines = (values.sum(others) if others else values).numpy()
    mine = member.unit >= 0
    sums = np.bincount(member.unit[mine], weights=lines[mine], minlength=units)
    return sums.astype(np.float64)


def _units(members: tuple[Member, ...]) -> int:
    return 1 + max(int(m.unit.max(initial=-1)) for m in members)


def load_order(path: Path) -> dict[str, npt.NDArray[np.int64]]:
    """Read the `order` of a file that the job "importance" left; damaged: refused."""
    what = "an order of units by group"
    kept: Any = read_json(path, what)
    try:
        return {str(k): np.array(v, dtype=np.int64) for k, v in kept["order"].items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise refuse(str(path), got, what, "rank the parent again") from None
