"""Comparisons of archs: what a row claims, what is an outcome, and the pruning of networks."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.baselines import jobs, prune
from benchmarks.baselines.__main__ import build_parser, checked
from benchmarks.baselines.archs import PUBLISHED, Side, Target
from benchmarks.baselines.compare import SPENT, BaselineRow, pruned_row, shortcomings
from nas.core.requirement import Setting
from nas.distill.jobs import ParentWeights
from nas.export.weights import save_weights
from nas.jobs.job import Job, Result
from nas.jobs.local import LocalExecutor
from nas.jobs.queue import OutOfTime
from space import Context, get_family
from space.family import Published
from tests.conftest import SMALL_ARCH as SMALL
from tests.test_nas_measure_table import MEASUREMENT


def _target(most: int = 5_000_000) -> Target:
    published: Published = get_family("tinyvit").published[0]
    return Target("5M", 5_000_000, most, published.name, published.arch, 1.9)


def test_a_contracted_arch_that_misses_says_so() -> None:
    target = _target()
    own, rival = Side("contracted", target.published_arch), Side(PUBLISHED, target.published_arch)
    row = BaselineRow("x", params=5_100_000, ratio=0.9, ratio_lo=0.8, ratio_hi=0.95)
    said = shortcomings(row, own, rival, target)
    assert "5,100,000 parameters, more than 5,000,000" in said
    assert "slower: 0.900x" in said
    fine = BaselineRow("x", params=4_900_000, ratio=1.1, ratio_lo=1.0, ratio_hi=1.2)
    assert shortcomings(fine, own, rival, target) == ""
    other = Side("random", target.published_arch)
    beside = dataclasses.replace(row, params_rival=5_000_000)
    assert shortcomings(beside, own, other, target) == "larger by 2.0%; slower: 0.900x its throughput"
    assert shortcomings(dataclasses.replace(fine, params_rival=4_900_000), own, other, target) == ""
    stuck = Side("contracted", target.published_arch, "stuck: too slow")
    assert shortcomings(fine, stuck, rival, target) == "stuck: too slow"


def test_flags_hold_what_a_training_pool_reads() -> None:
    found = checked(build_parser().parse_args(["--epochs", "7", "--effort", "smoke"]))
    assert (found.truth_epochs, found.proxy_epochs, found.target_params) == (7, 1, "5M")


def _jobs(folder: Path) -> tuple[jobs.PruneJob, list[jobs.PrunedVisitJob], list[jobs.PrunedTrainJob]]:
    here = folder / "none"  # what no stand-in reads
    common: dict[str, Any] = {
        "family": "tinyvit",
        "arch": SMALL,
        "context": Context(32, 10),
        **dict.fromkeys(("dataset", "store"), here),
        "missing": "error",
        "batch_size": 8,
        "device": "cpu",
        "label_epochs": None,
        "parent": ParentWeights(arch=SMALL, weights=here),
        "recalibrate": True,
        "label_overflow": "cycle",
    }
    pruning = jobs.PruneJob(**common, random_seed=0, variant=jobs.VARIANTS[2], budget=1000, out=folder / "pruned")
    same: dict[str, Any] = {**common, "pruned": here}
    visits = [jobs.PrunedVisitJob(**same, random_seed=0, setting=Setting(), out=folder / f"v{n}") for n in range(4)]
    return pruning, visits, [jobs.PrunedTrainJob(**same, random_seed=s, epochs=1, out=folder / f"r{s}") for s in (0, 1)]


def _row(work: Any, folder: Path) -> BaselineRow:
    return pruned_row(BaselineRow("5M: x", params=1000), *_jobs(folder), np.ones((2, 40)), 1, 1, work)


def _stand_in(params: int, hit: float) -> Any:
    """Work that prunes to `params` and hits a share of 40 test images."""

    def work(asked: list[Job], workers: int, threads: int) -> list[Result]:
        timed = {**MEASUREMENT.to_dict(), "ratio": 1.5, "ratio_lo": None, "ratio_hi": None}
        for job in asked:
            job.argument.out.mkdir()
            correct = (torch.arange(40) < 40 * hit).to(torch.uint8)
            save_weights(job.argument.out / "test.safetensors", {"correct": correct})
        return [Result(j.key, True, {"params": params, "loads": False, **timed}) for j in asked]

    return work


@pytest.mark.parametrize(("params", "reached"), [(1000, True), (950, True), (940, False)])
def test_a_pruned_net_is_scored_and_compared(tmp_path: Path, params: int, reached: bool) -> None:
    row = _row(_stand_in(params, 0.5), tmp_path)
    assert row.reached is reached
    assert (row.top1, row.top1_rival) == (1.0, 0.5)
    assert row.estimate == pytest.approx(0.5)
    assert row.outcome == "better"
    assert (row.n, row.seeds, row.loads, row.seed_ratio) == (40, 2, False, 1.5)


def test_a_tool_that_crashes_is_an_outcome(tmp_path: Path) -> None:
    def crash(asked: list[Job], workers: int, threads: int) -> list[Result]:
        return [Result(job.key, False, {}, "IndexError: out of bounds") for job in asked]

    row = _row(crash, tmp_path)
    assert (row.reached, row.outcome) == (False, "failed: IndexError: out of bounds")
    assert row.estimate is None


def test_what_the_hours_do_not_suffice_for_is_left_for_the_next_call(tmp_path: Path) -> None:
    def late(asked: list[Job], workers: int, threads: int) -> list[Result]:
        if asked[0].key == "prune" or asked[0].timed:
            return _stand_in(1000, 0.5)(asked, workers, threads)
        raise OutOfTime("r0")

    row = _row(late, tmp_path)
    assert (row.outcome, row.reached, row.estimate) == (SPENT, True, None)


def test_a_worker_process_runs_the_jobs(tmp_path: Path) -> None:
    """A data set that is not there is refused in one line, by the job itself."""
    pruning, visits, trainings = _jobs(tmp_path)
    with LocalExecutor(threads=1, command=jobs.WORKER) as executor:
        arguments = (pruning, trainings[0], visits[0])
        for function, argument in zip((jobs.prune, jobs.train_pruned, jobs.visit_pruned), arguments, strict=True):
            found = executor.run(Job(function, argument, "job"))  # type: ignore[arg-type]
            assert not found.ok
            assert str(tmp_path / "none") in str(found.reason)


def test_a_tool_that_is_not_installed_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs.not_installed("json") is None
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
    for variant in jobs.VARIANTS:
        assert "pip install" in str(jobs.not_installed(variant.tool))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    budget=st.integers(30, 1000), coarse=st.integers(1, 300), fails_above=st.floats(0.0, 1.2), vanishing=st.booleans()
)
def test_the_largest_net_within_the_budget_is_found(
    budget: int, coarse: int, fails_above: float, vanishing: bool
) -> None:
    """Widths are rounded, what would vanish stays whole, and some ratios do not work at all."""

    def pruned(ratio: float) -> nn.Module:
        if ratio > fails_above:
            raise RuntimeError("num_heads is 0")
        kept = round((1 - ratio) * 1000 / coarse) * coarse
        if kept < coarse:
            kept = 1000 if vanishing else coarse
        return nn.Linear(kept, 1, bias=False)

    sizes = {}
    for ratio in np.arange(1, 20) / 20:
        with contextlib.suppress(RuntimeError):
            sizes[float(ratio)] = prune.count(pruned(float(ratio)))
    within = [size for size in sizes.values() if size <= budget]
    if not within:
        kind, said = (ValueError, "floor") if sizes else (RuntimeError, "num_heads")
        with pytest.raises(kind, match=said):
            prune.prune_to_budget(pruned, budget)
        return
    found, ratio = prune.prune_to_budget(pruned, budget)
    params = prune.count(found)
    assert params == prune.count(pruned(ratio))
    assert max(within) <= params <= budget


def test_gradients_for_taylor_are_those_of_the_mean_loss_of_every_batch() -> None:
    family, context = get_family("tinyvit"), Context(32, 10)
    arch = family.arch(SMALL)
    torch.manual_seed(0)
    model = family.build(arch, context)
    batches = [
        SimpleNamespace(
            inputs=torch.randn(4, 3, 32, 32),
            index=torch.stack([torch.randperm(10)[:3] for _ in range(4)]),
            prob=torch.full((4, 3), 0.3),
            tail=torch.full((4,), 0.1),
            truth=torch.zeros(4, dtype=torch.long),
        )
        for _ in range(3)
    ]
    replay = SimpleNamespace(epoch=lambda epoch: iter(batches))
    found = jobs.loss_gradients(model, replay)  # type: ignore[arg-type]
    own = family.build(arch, context)
    own.load_state_dict(model.state_dict())
    wanted = [torch.zeros_like(p) for p in own.parameters()]
    for batch in batches:
        own.train()
        own.eval()
        log = own(batch.inputs).log_softmax(1)
        rest = torch.ones_like(log).scatter(1, batch.index, 0.0) / 7 * 0.1
        target = rest.scatter(1, batch.index, batch.prob)
        loss = -(target * log).sum(1).mean()
        for each, more in zip(wanted, torch.autograd.grad(loss, list(own.parameters())), strict=True):
            each += more
    for mine, oracle in zip(found, wanted, strict=True):
        assert mine is not None
        assert torch.allclose(mine, oracle, atol=1e-5, rtol=1e-4)


def test_a_narrowed_net_is_rebuilt_from_its_shapes_alone(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    family, context = get_family("tinyvit"), Context(32, 10)
    arch = family.arch(SMALL)
    torch.manual_seed(0)
    model, example = family.build(arch, context), torch.randn(2, 3, 32, 32)
    before = prune.count(model)
    none: list[torch.Tensor | None] = [None for _ in model.parameters()]
    for everywhere in (False, True):
        pruned = prune.prune_by_ratio(
            model, example, 0.3, none, importance="magnitude", everywhere=everywhere, heads="kept"
        )
        again = prune.rebuild(family.build(arch, context), pruned.state_dict()).eval()
        with torch.no_grad():
            assert torch.allclose(again(example), pruned(example), atol=1e-5)
        assert prune.count(again) == prune.count(pruned) < before
        call = family.timm_call(arch, context)
        assert not prune.loads_in_timm(call, again.state_dict())
        assert prune.loads_in_timm(call, model.state_dict())
    assert prune.count(model) == before
