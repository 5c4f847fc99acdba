"""Blocks alternate, decide when they can, and are repeated when they were disturbed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.measure import interleave as rounds
from nas.measure.interference import Disturbance
from nas.measure.interleave import Bounds, TimingResult, measure_rounds, planned_looks, settle, summary
from nas.measure.measurement import Throughput

LAW = settings(derandomize=True, deadline=None)
Fake = Callable[[int], list[float]]


class Machine:
    """A fake device: timers that cost what they are told, in a clock that may drift."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift = 0.0, drift
        self.log: list[str] = []

    def timer(self, name: str, cost: Callable[[], float], *, whole: bool = False) -> Fake:
        """Clock each pass, or with `whole` the block as one piece, as on a GPU."""

        def run(passes: int) -> list[float]:
            self.log.append(name)
            pieces = []
            for _ in range(passes):
                seconds = cost() * (1.0 + self.now * self.drift)
                self.now += seconds
                pieces.append(seconds)
            return [math.fsum(pieces)] if whole else pieces

        return run


class Calm:
    """A watch that sees nothing."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def read(self) -> Disturbance:
        return Disturbance(0.0, "")


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests is not what is measured here."""
    monkeypatch.setattr(rounds, "Watch", Calm)


def timed(timers: list[Fake], bounds: Bounds | None = None, **changes: object) -> TimingResult:
    given = {"batch": 8, "blocks": 6, "max_blocks": 48, "min_block_s": 1e-6, **changes}
    return measure_rounds(timers, bounds=bounds or Bounds(), **given)  # type: ignore[arg-type]


@given(st.integers(1, 60), st.integers(0, 200))
@LAW
def test_looks_double_up_to_the_maximum(blocks: int, more: int) -> None:
    looks = planned_looks(blocks, blocks + more)
    assert looks[0] == blocks
    assert looks[-1] == blocks + more
    assert all(b == min(2 * a, blocks + more) for a, b in itertools.pairwise(looks))


def test_blocks_alternate_and_drift_cancels() -> None:
    """Order A B B A ...; on a machine that becomes far slower the ratio stays the true 2."""
    machine = Machine(drift=1 / 50)
    found = timed([machine.timer("A", lambda: 1.0), machine.timer("B", lambda: 2.0)], blocks=12)
    assert "".join(machine.log[-24:]) == "ABBA" * 6
    assert found.ratio is not None
    assert found.ratio.median == pytest.approx(2.0, rel=0.03)
    assert found.ratio.lo <= 2.0 <= found.ratio.hi
    assert found.own.hi > 1.5 * found.own.lo, "the drift is in images/s"
    alone = timed([machine.timer("A", lambda: 1.0)])
    assert (alone.ratio, alone.reference) == (None, None)


@given(st.floats(0.05, 20.0), st.floats(1e-4, 1.0), st.integers(1, 64), st.integers(1, 64))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_ratio_and_pace_are_those_of_the_costs(ratio: float, cost: float, batch: int, reference_batch: int) -> None:
    """Images/s are batch over seconds, each network with its own batch."""
    machine = Machine()
    timers = [machine.timer("A", lambda: cost), machine.timer("B", lambda: cost * ratio)]
    found = timed(timers, batch=batch, reference_batch=reference_batch)
    assert found.own.median == pytest.approx(batch / cost)
    assert found.reference is not None
    assert found.ratio is not None
    assert found.reference.median == pytest.approx(reference_batch / (cost * ratio))
    assert found.ratio.median == pytest.approx(ratio * batch / reference_batch)
    assert found.latency_ms["p50"].median == pytest.approx(cost * 1e3)


def noisy_pair(seed: int = 0) -> list[Fake]:
    machine, rng = Machine(), random.Random(seed)
    return [
        machine.timer("A", lambda: rng.lognormvariate(0.0, 0.05)),
        machine.timer("B", lambda: 2.0 * rng.lognormvariate(0.0, 0.05)),
    ]


def test_measures_longer_only_while_a_bound_is_undecided() -> None:
    blocks = {ratio: timed(noisy_pair(), Bounds(ratio=ratio), max_blocks=40).blocks for ratio in (1.0, 4.0, 2.0)}
    assert blocks == {1.0: 6, 4.0: 6, 2.0: 40}
    assert timed(noisy_pair(), max_blocks=40).blocks == 6, "nothing is asked"
    assert timed(noisy_pair(), Bounds(images_per_s=4.0)).blocks == 6
    assert timed(noisy_pair(), Bounds(images_per_s=8.0)).blocks == 48
    assert timed(noisy_pair(), Bounds(latency_ms=(("p50", 2e3),))).blocks == 6
    assert timed(noisy_pair(), Bounds(latency_ms=(("p50", 1e3),))).blocks == 48


def test_one_failed_bound_ends_it_though_others_are_undecided() -> None:
    bounds = Bounds(ratio=2.0, images_per_s=100.0)
    found = timed(noisy_pair(), bounds)
    assert (found.blocks, found.decides(bounds)) == (6, "fail")


def test_all_looks_together_keep_their_coverage() -> None:
    long = timed(noisy_pair(), Bounds(ratio=2.0), blocks=12, max_blocks=96)
    assert long.blocks == 96
    assert long.coverage >= 0.95


def test_a_precision_is_measured_until_it_is_reached() -> None:
    coarse = timed(noisy_pair(), Bounds(precision=0.2), max_blocks=384)
    fine = timed(noisy_pair(), Bounds(precision=0.02), max_blocks=384)
    assert coarse.half_width <= 0.2
    assert fine.half_width <= 0.02
    assert coarse.blocks < fine.blocks < 384
    never = timed(noisy_pair(), Bounds(precision=1e-6), max_blocks=40)
    assert never.blocks == 40
    assert never.decides(Bounds(precision=1e-6)) == "undecided"


def test_latency_quantiles_are_those_of_the_passes() -> None:
    """Exponential passes: the intervals enclose -ln(1 - q), and every pass counts alone."""
    hits = {"p50": 0, "p90": 0, "p99": 0}
    trials = 60
    for seed in range(trials):
        machine, rng = Machine(), random.Random(seed)
        timer = machine.timer("A", lambda rng=rng: rng.expovariate(1.0))  # type: ignore[misc]
        found = timed([timer], min_passes=100, blocks=10, max_blocks=10, min_block_s=1e-9)
        assert found.passes == 100
        for name, q in rounds.QUANTILES.items():
            truth = -math.log(1.0 - q) * 1e3
            hits[name] += found.latency_ms[name].lo <= truth <= found.latency_ms[name].hi
            assert found.latency_ms[name].median == pytest.approx(truth, rel=0.5)
    assert all(count >= 0.88 * trials for count in hits.values()), hits


def test_a_block_clocked_as_one_piece_gives_the_mean_of_its_passes() -> None:
    machine = Machine()
    costs = iter([1.0, 3.0] * 1000)
    found = timed([machine.timer("A", lambda: next(costs), whole=True)], min_passes=4)
    assert found.passes == 4
    assert found.own.median == pytest.approx(8 / 2.0)
    assert found.latency_ms["p50"].median == pytest.approx(2000.0)
    assert found.latency_ms["p99"].hi == pytest.approx(2000.0)


class Scripted:
    """A watch that tells what it was given, attempt by attempt."""

    said: list[Disturbance]

    def __init__(self, device: str = "cpu") -> None:
        pass

    def read(self) -> Disturbance:
        return Scripted.said.pop(0)


@pytest.mark.parametrize(
    ("waits", "retries", "attempts", "kept"),
    [
        ([0.0], 1, 1, 0.0),
        ([0.5, 0.0], 1, 2, 0.0),
        ([0.3, 0.5], 1, 2, 0.3),
        ([0.5, 0.3], 1, 2, 0.3),
        ([0.5], 0, 1, 0.5),
        ([0.5, 0.4, 0.2], 2, 3, 0.2),
    ],
)
def test_what_was_disturbed_is_repeated_and_the_calmest_kept(
    waits: list[float], retries: int, attempts: int, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted.said = [Disturbance(w, f"waited {w:.0%}" if w > 0.1 else "") for w in waits]
    monkeypatch.setattr(rounds, "Watch", Scripted)
    machine = Machine()
    found = timed([machine.timer("A", lambda: 1.0)], retries=retries)
    assert found.attempts == attempts
    assert found.disturbance.waited == kept
    assert bool(found.disturbance.text) == (kept > 0.1)
    assert Scripted.said == []


@pytest.mark.parametrize(
    "said",
    [
        [Disturbance(None, "the clock went from 1 to 2 MHz"), Disturbance(None, "")],
        [Disturbance(0.0, "2 other processes on the GPU"), Disturbance(0.05, "")],
        [Disturbance(0.0, "the clock went from 1 to 2 MHz"), Disturbance(0.0, "")],
    ],
)
def test_an_undisturbed_repetition_is_calmer_whatever_disturbed_before(
    said: list[Disturbance], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock or another process on the GPU disturbs without any waiting."""
    Scripted.said = list(said)
    monkeypatch.setattr(rounds, "Watch", Scripted)
    found = timed([Machine().timer("A", lambda: 1.0)])
    assert found.disturbance.text == ""
    assert found.attempts == 2


def test_settling_warms_up_until_passes_stop_becoming_faster() -> None:
    costs = [10.0 * 0.8**k for k in range(12)]
    taken: list[float] = []

    def timer(passes: int) -> list[float]:
        assert passes == 1
        taken.append(costs[min(len(taken), 11)] / 1e3)
        return [taken[-1]]

    passes = settle(timer, min_block_s=0.06)
    assert len(taken) >= 12, "it was still becoming faster"
    assert len(taken) <= 16
    assert passes == math.ceil(0.06 / min(taken))


def test_settling_takes_the_asked_time_and_no_more_than_a_minute() -> None:
    spent: list[float] = []

    def even(passes: int) -> list[float]:
        spent.append(0.125)
        return [0.125]

    assert settle(even, 0.06, warm_up_s=2.0) == 1
    assert math.fsum(spent) == pytest.approx(2.0, abs=0.2)
    slow: list[float] = []

    def faster(passes: int) -> list[float]:
        slow.append(30.0 * 0.9 ** len(slow))
        return [slow[-1]]

    settle(faster, 0.06)
    assert math.fsum(slow) <= 60.0 + 30.0, "a network of 30 s a pass is measured all the same"


@given(st.floats(1e-6, 1e3), st.floats(1e-4, 10.0))
@LAW
def test_a_block_lasts_at_least_as_long_as_asked(cost: float, least: float) -> None:
    passes = settle(lambda n: [cost] * n, least)
    assert passes >= 1
    assert passes * cost >= least * (1 - 1e-9)
    assert passes == 1 or (passes - 1) * cost < least * (1 + 1e-9)


def test_summary_has_the_fields_of_a_throughput() -> None:
    made = Throughput(**summary(timed(noisy_pair())), when="")
    assert made.ratio == pytest.approx(2.0, rel=0.2)
    assert made.latency_ms_p99 is not None
    assert made.attempts == 1
