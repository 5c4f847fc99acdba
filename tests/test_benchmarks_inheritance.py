"""Inheritance and proxies: what the benchmarks make of losses and ranks."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import proxy
from benchmarks.inheritance import CRITERIA, RAW, RENEWED, TRAINED, ablation_rows
from benchmarks.trainings import Training


def test_criteria_are_compared_on_the_same_images() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(size=(8, 50)) * 10  # what archs and images do to all criteria alike
    names = [f"{c}, {when}" for c in CRITERIA for when in (RENEWED, RAW, TRAINED)] + [f"scratch, {TRAINED}"]
    shift = {name: float(rng.normal()) for name in names}
    rows = ablation_rows({name: common + shift[name] for name in names}, "c")
    assert len({r.name for r in rows}) == len(rows) == 14
    assert all(row.hi - row.lo < 1e-9 for row in rows)
    by = {r.name: r.estimate for r in rows}
    assert by["l1 - prefix, 1 epoch"] == pytest.approx(shift["l1, 1 epoch"] - shift["prefix, 1 epoch"])
    assert by["norms anew - as inherited, l2"] == pytest.approx(shift[f"l2, {RENEWED}"] - shift[f"l2, {RAW}"])


@pytest.mark.parametrize("number", range(1, 12))
@pytest.mark.parametrize(("ruled", "drawn"), [(5, 5), (6, 4), (2, 7)])
def test_fewer_archs_are_half_of_either_kind_and_none_twice(number: int, ruled: int, drawn: int) -> None:
    listed: list[Any] = [("rule", i) for i in range(ruled)] + [("uniform", 100 + i) for i in range(drawn)]
    found = cast(list[int], proxy.chosen(listed, number))
    assert len(found) == len(set(found)) == min(number, ruled + drawn)
    if number <= 2 * min(ruled, drawn):
        assert abs(sum(1 if arch < 100 else -1 for arch in found)) <= 1


def _pool() -> Any:
    """As much of a pool as the table needs: an arch is its position."""
    pool = SimpleNamespace(key="a{}".format, label="a{}".format, cost=lambda of: float(of.epochs * of.images))
    pool.run = pool.family = pool
    pool.dataset = SimpleNamespace(holdout=SimpleNamespace(labels=range(40)))
    return pool


def _done(worth: float, epochs: int, images: int) -> Any:
    of = Training(cast(Any, 0), "inherit", epochs, 0, images=images)
    per_image = np.linspace(-1, 1, 40) + worth
    return SimpleNamespace(of=of, values={"soft_loss": worth}, losses=lambda: per_image)


def test_the_proxy_that_is_asked_costs_a_tenth_of_the_truth_at_most() -> None:
    rng, n = np.random.default_rng(6), 8
    worth = np.arange(n, dtype=np.float64)
    truth = [_done(w + rng.normal() * 0.01, 5, 2000) for _ in range(3) for w in worth]

    def table(images: int) -> Any:
        given = argparse.Namespace(truth_epochs=5, proxy_epochs=2, images=images, seeds=3)
        scored = {
            proxy.named(what, epochs): [_done(w, epochs, images) for w in by]
            for what, by in (("inherited (l1)", worth), ("from scratch", -worth))
            for epochs in proxy.lengths(given)
        }
        return proxy.table(_pool(), given, cast(Any, range(n)), scored, truth, {"parameters": list(-worth)})

    rows, summary = table(1000)
    by_name = {row.name: row for row in rows}
    assert summary["proxy"] == "inherited (l1), 1 epoch"
    assert summary["cost_share"] == pytest.approx(0.1)
    assert summary["regret"] == pytest.approx(0.0, abs=0.05)
    for name, row in by_name.items():
        if name.startswith("inherited"):
            assert row.estimate == pytest.approx(1.0)
        if name.startswith(("from scratch", "parameters")):
            assert row.estimate == pytest.approx(-1.0)
    both = by_name["both, ranks added, 1 epoch each"]  # opposite ranks cancel
    assert math.isnan(both.estimate)
    assert both.cost_share == pytest.approx(0.2)
    _, summary = table(4000)  # nothing is cheap enough: the shortest is asked, and its share is told
    assert summary["proxy"] == "inherited (l1), 1 epoch"
    assert summary["cost_share"] == pytest.approx(0.4)
