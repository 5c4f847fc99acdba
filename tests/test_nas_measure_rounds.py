"""Blocks of a visit alternate, and are repeated when they were disturbed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.measure import interleave as rounds
from nas.measure.interference import Disturbance
from nas.measure.interleave import TimingPlan, settle, time_visit
from nas.measure.measurement import Throughput

LAW = settings(derandomize=True, deadline=None, max_examples=50)
Fake = Callable[[int], list[float]]


class Machine:
    """A fake device: timers with given costs, in a clock that may drift."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift = 0.0, drift
        self.log: list[str] = []

    def timer(self, name: str, cost: Callable[[], float], *, whole: bool = False) -> Fake:
        """Clock each pass, or with `whole` the block as one piece, as on a GPU."""

        def run(passes: int) -> list[float]:
            self.log.append(name)
            pieces = []
            for _ in range(passes):
                pieces.append(cost() * (1.0 + self.now * self.drift))
                self.now += pieces[-1]
            return [math.fsum(pieces)] if whole else pieces

        return run


class Scripted:
    """A watch that sees what it was given, attempt by attempt, and nothing after that."""

    script: Iterator[Disturbance] = iter(())

    def __init__(self, device: str = "cpu") -> None: ...

    def read(self) -> Disturbance:
        return next(Scripted.script, Disturbance(0.0, ""))


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests is not what is measured here."""
    monkeypatch.setattr(rounds, "Watch", Scripted)
    monkeypatch.setattr(Scripted, "script", iter(()))


def timed(timers: list[Fake], reference_batch: int = 8, **changes: Any) -> Throughput:
    plan = TimingPlan(**{"blocks": 6, "min_block_s": 1e-6, **changes})
    return time_visit(timers, [8, reference_batch][: len(timers)], plan, reference=len(timers) > 1)[0]


def test_blocks_alternate_and_drift_cancels() -> None:
    """Order A B B A ...; on a machine that becomes far slower the ratio stays the true 2."""
    machine = Machine(drift=1 / 50)
    found = timed([machine.timer("A", lambda: 1.0), machine.timer("B", lambda: 2.0)], blocks=12)
    assert "".join(machine.log[-24:]) == "ABBA" * 6
    assert found.ratio == pytest.approx(2.0, rel=0.03)
    alone = timed([machine.timer("A", lambda: 1.0)])
    assert (alone.ratio, alone.reference_images_per_s) == (None, None)


def test_networks_of_a_visit_share_a_reference() -> None:
    machine = Machine()
    timers = [machine.timer(name, lambda c=cost: c) for name, cost in (("A", 1.0), ("B", 2.0), ("R", 4.0))]
    found = time_visit(timers, [8, 8, 8], TimingPlan(blocks=4, min_block_s=1e-6))
    assert "".join(machine.log[-12:]) == "ABRRBA" * 2
    assert [of.ratio for of in found] == pytest.approx([4.0, 2.0])
    assert all((of.visits, of.images_per_s_lo, of.ratio_lo) == (1, None, None) for of in found), (
        "one process: no interval"
    )
    alone = time_visit(timers, [8, 8, 8], TimingPlan(blocks=1, min_block_s=1e-6), reference=False)
    assert [of.images_per_s for of in alone] == pytest.approx([8.0, 4.0, 2.0])


@given(st.floats(0.05, 20.0), st.floats(1e-4, 1.0), st.integers(1, 64))
@LAW
def test_ratio_and_images_per_s_are_those_of_the_costs(ratio: float, cost: float, reference_batch: int) -> None:
    """Images/s are batch over seconds, each network with its own batch."""
    machine = Machine()
    timers = [machine.timer("A", lambda: cost), machine.timer("B", lambda: cost * ratio)]
    found = timed(timers, reference_batch=reference_batch)
    medians = [found.images_per_s, found.reference_images_per_s, found.ratio, found.latency_ms_p50]
    assert medians == pytest.approx(
        [8 / cost, reference_batch / (cost * ratio), ratio * 8 / reference_batch, cost * 1e3]
    )


def test_a_block_clocked_as_one_piece_gives_the_mean_of_its_passes() -> None:
    costs = iter([1.0, 3.0] * 1000)
    found = timed([Machine().timer("A", lambda: next(costs), whole=True)], min_passes=4)
    assert found.passes == 4 * 6
    assert found.images_per_s == pytest.approx(8 / 2.0)
    assert found.latency_ms_p50 == found.latency_ms_p99 == pytest.approx(2000.0)


def test_every_pass_counts_for_the_latency() -> None:
    rng = random.Random(0)
    found = timed([Machine().timer("A", lambda: rng.expovariate(1.0))], min_passes=200, blocks=10)
    assert found.passes == 2000
    assert found.latency_ms_p50 == pytest.approx(1e3 * math.log(2), rel=0.1)
    assert found.latency_ms_p99 == pytest.approx(1e3 * math.log(100), rel=0.15)


@pytest.mark.parametrize(
    ("seen", "retries", "attempts", "kept"),
    [
        ([(0.0, "")], 1, 1, 0),
        ([(0.5, "waited"), (0.0, "")], 1, 2, 1),
        ([(0.3, "waited"), (0.5, "waited")], 1, 2, 0),
        ([(0.5, "waited"), (0.3, "waited")], 1, 2, 1),
        ([(0.5, "waited")], 0, 1, 0),
        ([(0.5, "waited"), (0.4, "waited"), (0.2, "waited")], 2, 3, 2),
        # A clock or another process on the GPU disturbs without any waiting.
        ([(None, "the clock"), (None, "")], 1, 2, 1),
        ([(0.0, "2 other processes"), (0.05, "")], 1, 2, 1),
    ],
)
def test_what_was_disturbed_is_repeated_and_the_calmest_kept(
    seen: list[tuple[float | None, str]], retries: int, attempts: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [Disturbance(*each) for each in seen]
    monkeypatch.setattr(Scripted, "script", iter(script))
    found = timed([Machine().timer("A", lambda: 1.0)], retries=retries)
    assert (found.attempts, Disturbance(found.waited, found.disturbed)) == (attempts, script[kept])


def test_settling_warms_up_until_passes_stop_becoming_faster() -> None:
    costs = [10.0 * 0.8**k / 1e3 for k in range(12)]
    taken: list[float] = []

    def timer(passes: int) -> list[float]:
        taken.append(costs[min(len(taken), 11)])
        return [taken[-1]]

    assert settle(timer, min_block_s=0.06) == math.ceil(0.06 / costs[-1])
    assert 12 <= len(taken) <= 16


@pytest.mark.parametrize(
    ("first", "factor", "warm_up_s", "least", "most"),
    [(0.125, 1.0, 2.0, 1.8, 2.2), (30.0, 0.9, 0.0, 60.0, 90.0)],  # the second: 30 s a pass, measured all the same
)
def test_settling_takes_the_asked_time_and_no_more_than_a_minute(
    first: float, factor: float, warm_up_s: float, least: float, most: float
) -> None:
    spent: list[float] = []

    def timer(passes: int) -> list[float]:
        spent.append(first * factor ** len(spent))
        return [spent[-1]]

    assert settle(timer, 0.06, warm_up_s) == 1
    assert least <= math.fsum(spent) <= most


@given(st.floats(1e-6, 1e3), st.floats(1e-4, 10.0))
@LAW
def test_a_block_lasts_at_least_as_long_as_asked(cost: float, least: float) -> None:
    passes = settle(lambda n: [cost] * n, least)
    assert passes * cost >= least * (1 - 1e-9)
    assert passes == 1 or (passes - 1) * cost < least * (1 + 1e-9)
