"""Inheritance and proxies: what the benchmarks make of losses and ranks."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import proxy
from benchmarks.inheritance import ablation_rows
from benchmarks.trainings import Training, TrainingPool
from space.family import Arch


def test_criteria_are_compared_on_the_same_images() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(size=(8, 50)) * 10  # what archs and images do to all criteria alike
    names = [
        f"{c}, {w}"
        for c in ("prefix", "l1", "l2", "taylor")
        for w in ("0 epochs", "0 epochs, norms as inherited", "1 epoch")
    ]
    names.append("scratch, 1 epoch")
    shift = {name: float(rng.normal()) for name in names}
    rows = ablation_rows({name: common + shift[name] for name in names}, "c")
    assert len({r.name for r in rows}) == len(rows) == 14
    for row in rows:
        assert row.hi - row.lo < 1e-9
    by = {r.name: r.estimate for r in rows}
    assert by["l1 - prefix, 1 epoch"] == pytest.approx(shift["l1, 1 epoch"] - shift["prefix, 1 epoch"])
    assert by["norms anew - as inherited, l2"] == pytest.approx(
        shift["l2, 0 epochs"] - shift["l2, 0 epochs, norms as inherited"]
    )


class _Pool:
    """As much of a pool as the table needs: an arch is its position."""

    def __init__(self) -> None:
        self.run = self
        self.family = self
        self.dataset = SimpleNamespace(holdout=SimpleNamespace(labels=range(40)))

    def key(self, arch: int) -> str:
        return f"a{arch}"

    label = key

    def cost(self, of: Training) -> float:
        return float(of.epochs * (of.images or 0))


@pytest.mark.parametrize("number", range(1, 12))
@pytest.mark.parametrize(("ruled", "drawn"), [(5, 5), (6, 4), (2, 7)])
def test_fewer_archs_are_half_of_either_kind_and_none_twice(number: int, ruled: int, drawn: int) -> None:
    listed = [("rule", i) for i in range(ruled)] + [("uniform", 100 + i) for i in range(drawn)]
    found = proxy.chosen(listed, number)  # type: ignore[arg-type]
    assert len(found) == len(set(found)) == min(number, ruled + drawn)
    kinds = [sum(arch < 100 for arch in found), sum(arch >= 100 for arch in found)]  # type: ignore[operator]
    if number <= 2 * min(ruled, drawn):
        assert abs(kinds[0] - kinds[1]) <= 1


class _Trained(SimpleNamespace):
    def losses(self) -> np.ndarray:
        return np.asarray(self.per_image)


def _done(worth: float, epochs: int, images: int) -> _Trained:
    of = Training(cast(Arch, 0), "inherit", epochs, 0, images=images)
    return _Trained(of=of, values={"soft_loss": worth}, per_image=np.linspace(-1, 1, 40) + worth)


def test_the_proxy_that_is_asked_costs_a_tenth_of_the_truth_at_most() -> None:
    rng, n = np.random.default_rng(6), 8
    worth = np.arange(n, dtype=np.float64)
    given = argparse.Namespace(truth_epochs=5, proxy_epochs=2, images=1000, seeds=3)
    truth = [_done(w + rng.normal() * 0.01, 5, 2000) for _ in range(3) for w in worth]
    scored = {
        proxy.named(what, epochs): [_done(w, epochs, 1000) for w in by]
        for what, by in (("inherited (l1)", worth), ("from scratch", -worth))
        for epochs in proxy.lengths(given)
    }
    free = {"parameters": list(-worth)}

    def table(of: Any) -> Any:
        return proxy.table(cast(TrainingPool, _Pool()), given, cast(Any, range(n)), of, truth, free)  # type: ignore[arg-type]

    rows, told = table(scored)
    by_name = {row.name: row for row in rows}
    assert told["proxy"] == "inherited (l1), 1 epoch"
    assert told["cost_share"] == pytest.approx(0.1)
    assert told["regret"] == pytest.approx(0.0, abs=0.05)
    for name, row in by_name.items():
        if name.startswith("inherited"):
            assert row.estimate == pytest.approx(1.0)
        if name.startswith(("from scratch", "parameters")):
            assert row.estimate == pytest.approx(-1.0)
    both = by_name["both, ranks added, 1 epoch each"]  # opposite ranks cancel
    assert math.isnan(both.estimate)
    assert both.cost_share == pytest.approx(0.2)
    given.images = 4000  # nothing is cheap enough: the shortest is asked, and its share is told
    longer = {
        name: [_done(float(t.values["soft_loss"]), t.of.epochs, 4000) for t in these] for name, these in scored.items()
    }
    _, told = table(longer)
    assert told["proxy"] == "inherited (l1), 1 epoch"
    assert told["cost_share"] == pytest.approx(0.4)


@pytest.mark.parametrize(("name", "value"), [("--seeds", "1"), ("--archs", "3")])
def test_too_few_to_rank_are_refused_before_anything_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    assert proxy.main([name, value, "--work", str(tmp_path / "w")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: got {value}, want")
    assert not (tmp_path / "w").exists()
