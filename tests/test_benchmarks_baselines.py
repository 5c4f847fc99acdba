"""Comparisons that carry an interval: its coverage by simulation, and the books around it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.result import Budget, ResultRow, build_parser, figure, main, shortcomings, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.baselines import prune as _rivals_prune
from benchmarks.baselines import prune_worker as _rivals_train
from benchmarks.baselines import pruning as rivals
from benchmarks.baselines.archs import PUBLISHED, Side, Target, checked
from benchmarks.baselines.verdict import Paired, paired_interval, verdict
from nas.core.io import read_json
from nas.export.weights import save_weights
from space import Context, get_family
from space.errors import InputError
from space.family import Published

IMAGES, TRIALS = 300, 1000
SMALL = {
    "embed_dims": [64, 64, 96, 128],
    "depths": [1, 1, 2, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}


def _tables(
    rng: np.random.Generator, images: float, seeds: float, rest: float, number: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two tables whose true difference is 0, from crossed random effects."""
    difference = (
        images * rng.standard_normal((1, IMAGES))
        + seeds * rng.standard_normal((number, 1))
        + rest * rng.standard_normal((number, IMAGES))
    )
    base = rng.standard_normal((number, IMAGES))
    return base + difference, base


@pytest.mark.parametrize(
    ("images", "seeds", "rest"),
    [
        (1, 0, 0.3),
        (0, 0, 1),
        (1, 0.05, 1),
        (1, 0.1, 1),
        (1, 0.2, 0.5),
        (1, 0.4, 0.5),
        (0.3, 1, 0.3),
    ],
)
def test_three_seeds_cover_as_promised_whatever_the_mix(
    images: float, seeds: float, rest: float
) -> None:
    rng = np.random.default_rng(0)
    found = [paired_interval(*_tables(rng, images, seeds, rest)) for _ in range(TRIALS)]
    one_sided = np.mean([f.lower <= 0 for f in found])
    two_sided = np.mean([f.lo <= 0 <= f.hi for f in found])
    # Binomial(1000, 0.95) has a standard error of 0.7 %.
    assert 0.928 <= one_sided <= 0.985
    assert 0.928 <= two_sided <= 0.985


def test_a_detectable_difference_is_detected_about_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    size = paired_interval(*_tables(np.random.default_rng(2), 1, 0, 0.3)).detectable
    seen = 0
    for _ in range(400):
        a, b = _tables(rng, 1, 0, 0.3)
        seen += paired_interval(a + size, b).lo > 0
    assert 0.7 <= seen / 400 <= 0.9


@settings(max_examples=60, derandomize=True, deadline=None)
@given(seeds=st.integers(1, 5), images=st.integers(2, 60), seed=st.integers(0, 999))
def test_the_bounds_are_in_order_and_change_sign_with_the_sides(
    seeds: int, images: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (2, seeds, images))
    found, back = paired_interval(a, b), paired_interval(b, a)
    assert found.lo <= found.lower <= found.value <= found.hi
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (back.lo, back.hi) == (pytest.approx(-found.hi), pytest.approx(-found.lo))
    assert (found.seeds, found.images) == (seeds, images)
    order = rng.permutation(images)
    again = paired_interval(a[:, order], b[:, order])
    assert (again.lo, again.hi) == (pytest.approx(found.lo), pytest.approx(found.hi))


def test_one_seed_is_the_paired_t_interval_and_no_difference_has_no_width() -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 1, 80))
    wanted = stats.ttest_rel(a[0], b[0]).confidence_interval(0.95)
    found = paired_interval(a, b)
    assert (found.lo, found.hi) == (pytest.approx(wanted.low), pytest.approx(wanted.high))
    same = paired_interval(np.ones((3, 50)), np.ones((3, 50)))
    assert (same.value, same.lo, same.hi, same.lower) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((2, 5)), np.ones((3, 5))),
        (np.ones((2, 1)), np.ones((2, 1))),
        (np.full((2, 5), np.nan), np.ones((2, 5))),
    ],
)
def test_what_cannot_be_paired_is_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(InputError):
        paired_interval(a, b)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(value=st.floats(-0.2, 0.2), half=st.floats(1e-4, 0.2))
def test_better_excludes_zero_and_not_worse_excludes_the_margin(value: float, half: float) -> None:
    lower = value - 0.84 * half
    found = Paired(value, value - half, value + half, lower, half / 2, 0.0, half, 3, 100)
    said = verdict(found)
    assert said.startswith("better") == (found.lo > 0)
    assert said.startswith("worse") == (found.hi < 0)
    inside = found.lo <= 0 <= found.hi
    assert said.startswith("not worse") == (inside and lower > -0.015)
    assert verdict(found, tie=True) == "tie: the same arch"


def _target(most: int = 5_000_000) -> Target:
    published: Published = get_family("tinyvit").published[0]
    return Target("5M", 5_000_000, most, published.name, published.arch, 1.9)


def test_a_contracted_arch_that_misses_says_so() -> None:
    target = _target()
    own, rival = Side("contracted", target.published_arch), Side(PUBLISHED, target.published_arch)
    row = ResultRow(
        "x", None, None, None, 0, params=5_100_000, ratio=0.9, ratio_lo=0.8, ratio_hi=0.95
    )
    said = shortcomings(row, own, rival, target)
    assert "5,100,000 parameters, more than 5,000,000" in said
    assert "slower: 0.900x" in said
    fine = ResultRow(
        "x", None, None, None, 0, params=4_900_000, ratio=1.1, ratio_lo=1.0, ratio_hi=1.2
    )
    assert shortcomings(fine, own, rival, target) == ""
    other = Side("random", target.published_arch)
    beside = dataclasses.replace(row, params_rival=5_000_000)
    assert (
        shortcomings(beside, own, other, target) == "larger by 2.0%; slower: 0.900x its throughput"
    )
    assert shortcomings(dataclasses.replace(fine, params_rival=4_900_000), own, other, target) == ""
    stuck = Side("contracted", target.published_arch, "stuck: too slow")
    assert shortcomings(fine, stuck, rival, target) == "stuck: too slow"


def test_a_tools_message_becomes_one_line() -> None:
    table = "Profiling\n-----\n\u250f\u2513\n\u2503 params \u2503 6.8M \u2503\nNOT satisfied!"
    assert _rivals_train.one_line(table) == "Profiling params 6.8M NOT satisfied!"
    long = _rivals_train.one_line("word " * 100 + "the end")
    assert len(long) <= 245
    assert long.startswith("... word")
    assert long.endswith("the end")


def test_the_budget_lets_in_what_fits_by_the_pace_so_far() -> None:
    budget = Budget(1.0)
    assert budget.fits(1e9)  # nothing is known yet
    budget.guess = 10.0
    assert not budget.fits(400.0)
    budget.guess = 1e-6  # what was spent tells more than a guess
    budget.spent(100.0, 1000.0)
    assert budget.fits(300.0)
    assert not budget.fits(400.0)
    assert not Budget(1e-12).fits(0.0)


def test_tables_and_figures_hold_every_row(tmp_path: Path) -> None:
    rows = [
        ResultRow("a", 0.01, -0.01, 0.03, 2000, lower=-0.005, init="inherit", outcome="not worse"),
        ResultRow("b", None, None, None, 0, outcome="not run"),
    ]
    write(tmp_path / "result.csv", rows)
    lines = (tmp_path / "result.csv").read_text().splitlines()
    assert lines[0].startswith("name,estimate,lo,hi,n,")
    assert lines[0].endswith(",command")
    assert len(lines) == 3
    figure(tmp_path / "result.png", rows)
    figure(tmp_path / "none.png", rows[1:])
    assert (tmp_path / "result.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments",
    [
        ["--targets", "5M", "5M"],
        ["--targets", "many"],
        ["--budget-hours", "0"],
        ["--seeds", "0"],
        ["--effort", "extreme"],
    ],
)
@pytest.mark.parametrize("entry", [main, rivals.main])
def test_bad_input_is_one_line(
    entry: Any, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry([*arguments, "--out", str(tmp_path / "x.csv"), "--work", str(tmp_path / "w")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_flags_hold_what_the_lab_asks_for() -> None:
    found = checked(build_parser().parse_args(["--epochs", "7", "--effort", "smoke"]))
    assert (found.truth_epochs, found.proxy_epochs, found.target_params) == (7, 1, "5M")


# Rivals


def _base() -> rivals.RivalRow:
    return rivals.RivalRow("5M: x", None, None, None, 0, budget=1000)


def _row(work: rivals.Work, folder: Path, own: Any, **over: Any) -> rivals.RivalRow:
    asked: dict[str, Any] = {
        "seeds": 2,
        "workers": 1,
        "work": work,
        "budget": Budget(1.0),
        "absent": None,
        **over,
    }
    common = {"epochs": 1, "threads": 1}
    return rivals.pruned_row(_base(), common, _rivals_prune.VARIANTS[2], folder, own, **asked)


def _stand_in(params: int, hit: float) -> rivals.Work:
    """Work that prunes to `params` and hits a share of 40 test images."""

    def work(spec: Mapping[str, Any], threads: int) -> Mapping[str, Any]:
        out = Path(spec["out"])
        out.mkdir(parents=True)
        if spec["kind"] == "prune":
            pace = dict.fromkeys(rivals.PACE, 1.5)
            return {"ok": True, "values": {"params": params, "loads": False, **pace}}
        correct = torch.arange(40) < 40 * hit
        save_weights(out / "test.safetensors", {"correct": correct.to(torch.uint8)})
        return {"ok": True, "values": {}}

    return work


@pytest.mark.parametrize(("params", "reached"), [(1000, True), (950, True), (940, False)])
def test_a_rival_is_scored_and_compared(tmp_path: Path, params: int, reached: bool) -> None:
    row = _row(_stand_in(params, 0.5), tmp_path, np.ones((2, 40)))
    assert row.reached is reached
    assert row.estimate == pytest.approx(0.5)
    assert row.behind == pytest.approx(0.5)
    assert row.outcome == "the contracted arch is better"
    assert (row.n, row.seeds, row.loads, row.ratio) == (40, 2, False, 1.5)


def test_what_a_rival_cannot_do_is_an_outcome(tmp_path: Path) -> None:
    def crash(spec: Mapping[str, Any], threads: int) -> Mapping[str, Any]:
        return {"ok": False, "reason": "IndexError: out of bounds"}

    row = _row(crash, tmp_path, None)
    assert (row.reached, row.outcome) == (False, "failed: IndexError: out of bounds")
    assert row.estimate is None
    assert _row(crash, tmp_path, None, budget=Budget(1e-12)).outcome == rivals.SPENT
    rivals.write(tmp_path / "rivals.csv", [row])
    assert (tmp_path / "rivals.csv").read_text().startswith("name,estimate,lo,hi,n,")
    rivals.figure(tmp_path / "rivals.png", [row])


def test_a_tool_that_is_not_there_is_named_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_rivals_prune.importlib.util, "find_spec", lambda name: None)
    for variant in _rivals_prune.VARIANTS:
        said = _rivals_prune.missing(variant.tool)
        assert said is not None
        assert said.startswith("not run: ")
        assert "pip install" in said
    row = _row(_stand_in(1000, 1.0), tmp_path, None, absent="not run: no such tool")
    assert (row.outcome, row.params, row.reached) == ("not run: no such tool", None, None)
    monkeypatch.undo()
    assert _rivals_prune.missing("json") is None


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    budget=st.integers(30, 1000),
    coarse=st.integers(1, 300),
    fails_above=st.floats(0.0, 1.2),
    vanishing=st.booleans(),
)
def test_the_largest_net_within_the_budget_is_found(
    budget: int, coarse: int, fails_above: float, vanishing: bool
) -> None:
    """Widths are rounded, what would vanish stays whole, and some ratios do not work at all."""

    def prune(ratio: float) -> nn.Module:
        if ratio > fails_above:
            raise RuntimeError("num_heads is 0")
        kept = round((1 - ratio) * 1000 / coarse) * coarse
        if kept < coarse:
            kept = 1000 if vanishing else coarse
        return nn.Linear(kept, 1, bias=False)

    sizes = {}
    for ratio in np.arange(1, 20) / 20:
        with contextlib.suppress(RuntimeError):
            sizes[float(ratio)] = _rivals_prune.count(prune(float(ratio)))
    within = [size for size in sizes.values() if size <= budget]
    if not within:
        kind, said = (ValueError, "floor") if sizes else (RuntimeError, "num_heads")
        with pytest.raises(kind, match=said):
            _rivals_prune.prune_to_budget(prune, budget)
        return
    found, ratio = _rivals_prune.prune_to_budget(prune, budget)
    params = _rivals_prune.count(found)
    assert params == _rivals_prune.count(prune(ratio))
    assert max(within) <= params <= budget


def test_gradients_for_taylor_are_those_of_the_mean_loss_of_every_batch() -> None:
    family, context = get_family("tinyvit"), Context(32, 10)
    arch = family.arch(SMALL)
    torch.manual_seed(0)
    model = family.build(arch, context)
    batches = []
    for _ in range(3):
        index = torch.stack([torch.randperm(10)[:3] for _ in range(4)])
        prob = torch.full((4, 3), 0.3)
        batches.append(
            SimpleNamespace(
                inputs=torch.randn(4, 3, 32, 32),
                index=index,
                prob=prob,
                tail=torch.full((4,), 0.1),
                truth=torch.zeros(4, dtype=torch.long),
            )
        )
    replay = SimpleNamespace(epoch=lambda epoch: iter(batches))
    found = _rivals_train._gradients(model, replay)  # type: ignore[arg-type]
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
        for each, more in zip(
            wanted, torch.autograd.grad(loss, list(own.parameters())), strict=True
        ):
            each += more
    for mine, oracle in zip(found, wanted, strict=True):
        assert mine is not None
        assert torch.allclose(mine, oracle, atol=1e-5, rtol=1e-4)


def test_a_narrowed_net_is_rebuilt_from_its_shapes_alone(tmp_path: Path) -> None:
    tp = pytest.importorskip("torch_pruning")
    assert tp is not None
    family, context = get_family("tinyvit"), Context(32, 10)
    arch = family.arch(SMALL)
    torch.manual_seed(0)
    model, example = family.build(arch, context), torch.randn(2, 3, 32, 32)
    before = _rivals_prune.count(model)
    none: list[torch.Tensor | None] = [None for _ in model.parameters()]
    for variant in _rivals_prune.VARIANTS[2:4]:
        pruned = _rivals_prune.prune_by_ratio(model, example, variant, 0.3, none)
        again = _rivals_prune.rebuild(family.build(arch, context), pruned.state_dict()).eval()
        with torch.no_grad():
            assert torch.allclose(again(example), pruned(example), atol=1e-5)
        assert _rivals_prune.count(again) == _rivals_prune.count(pruned) < before
        call = family.timm_call(arch, context)
        assert not _rivals_train.loads_in_timm(call, again.state_dict())
        assert _rivals_train.loads_in_timm(call, model.state_dict())
    assert _rivals_prune.count(model) == before


def test_a_job_that_ends_without_a_word_is_an_outcome(tmp_path: Path) -> None:
    done = rivals.in_process({"kind": "none", "out": str(tmp_path / "job")}, 1)
    assert done == {"ok": False, "reason": "KeyError: 'none'"}
    assert read_json(tmp_path / "job" / "result.json", "a job's result") == done
    assert rivals.in_process({"kind": "load", "out": str(tmp_path / "job")}, 1) == done
    assert isinstance(build_parser(), argparse.ArgumentParser)
