"""Blocks alternate, decide when they can, and are repeated when they were disturbed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.measure import interleave as rounds
from nas.measure.interference import Disturbance
from nas.measure.interleave import Bounds, TimingPlan, TimingResult, measure_rounds, planned_looks, settle
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


def timed(timers: list[Fake], bounds: Bounds | None = None, reference_batch: int = 8, **changes: int) -> TimingResult:
    plan = TimingPlan(**{"blocks": 6, "min_block_s": 1e-6, **changes}, bounds=bounds or Bounds())
    return measure_rounds(timers, [8, reference_batch], plan)


@given(st.integers(1, 60), st.integers(0, 200))
@LAW
def test_looks_double_up_to_the_maximum(blocks: int, more: int) -> None:
    looks = planned_looks(blocks, blocks + more)
    assert (looks[0], looks[-1]) == (blocks, blocks + more)
    assert all(b == min(2 * a, blocks + more) for a, b in itertools.pairwise(looks))


def test_blocks_alternate_and_drift_cancels() -> None:
    """Order A B B A ...; on a machine that becomes far slower the ratio stays the true 2."""
    machine = Machine(drift=1 / 50)
    found = timed([machine.timer("A", lambda: 1.0), machine.timer("B", lambda: 2.0)], blocks=12)
    assert "".join(machine.log[-24:]) == "ABBA" * 6
    assert found.ratio.median == pytest.approx(2.0, rel=0.03)
    assert found.ratio.lo <= 2.0 <= found.ratio.hi
    assert found.own.hi > 1.5 * found.own.lo, "the drift is in images/s"
    alone = timed([machine.timer("A", lambda: 1.0)])
    assert (alone.ratio, alone.reference) == (None, None)


@given(st.floats(0.05, 20.0), st.floats(1e-4, 1.0), st.integers(1, 64))
@LAW
def test_ratio_and_images_per_s_are_those_of_the_costs(ratio: float, cost: float, reference_batch: int) -> None:
    """Images/s are batch over seconds, each network with its own batch."""
    machine = Machine()
    timers = [machine.timer("A", lambda: cost), machine.timer("B", lambda: cost * ratio)]
    found = timed(timers, reference_batch=reference_batch)
    medians = [found.own.median, found.reference.median, found.ratio.median, found.latency_ms["p50"].median]
    assert medians == pytest.approx(
        [8 / cost, reference_batch / (cost * ratio), ratio * 8 / reference_batch, cost * 1e3]
    )


def noisy_pair() -> list[Fake]:
    machine, rng = Machine(), random.Random(0)
    return [
        machine.timer("A", lambda: rng.lognormvariate(0.0, 0.05)),
        machine.timer("B", lambda: 2.0 * rng.lognormvariate(0.0, 0.05)),
    ]


@pytest.mark.parametrize(
    ("bounds", "blocks", "verdict"),
    [
        (Bounds(), 6, "pass"),
        (Bounds(ratio=1.0), 6, "pass"),
        (Bounds(ratio=4.0), 6, "fail"),
        (Bounds(ratio=2.0), 48, "undecided"),
        (Bounds(images_per_s=4.0), 6, "pass"),
        (Bounds(images_per_s=8.0), 48, "undecided"),
        (Bounds(latency_ms=(("p50", 2e3),)), 6, "pass"),
        (Bounds(latency_ms=(("p50", 1e3),)), 48, "undecided"),
        (Bounds(ratio=2.0, images_per_s=100.0), 6, "fail"),  # whatever the others would be
        (Bounds(precision=1e-6), 48, "undecided"),
    ],
)
def test_measures_longer_only_while_a_bound_is_undecided(bounds: Bounds, blocks: int, verdict: str) -> None:
    found = timed(noisy_pair(), bounds)
    assert (found.blocks, found.decides(bounds)) == (blocks, verdict)


def test_all_looks_together_keep_their_coverage() -> None:
    long = timed(noisy_pair(), Bounds(ratio=2.0), blocks=12, max_blocks=96)
    assert long.blocks == 96
    assert long.coverage >= 0.95


def test_a_precision_is_measured_until_it_is_reached() -> None:
    coarse, fine = (timed(noisy_pair(), Bounds(precision=p), max_blocks=384) for p in (0.2, 0.02))
    assert coarse.half_width <= 0.2
    assert fine.half_width <= 0.02
    assert coarse.blocks < fine.blocks < 384


def test_latency_quantiles_are_those_of_the_passes() -> None:
    """Exponential passes: the intervals enclose -ln(1 - q), and every pass counts alone."""
    hits, trials = dict.fromkeys(rounds.QUANTILES, 0), 60
    for seed in range(trials):
        rng = random.Random(seed)
        timer = Machine().timer("A", lambda rng=rng: rng.expovariate(1.0))
        found = timed([timer], min_passes=100, blocks=10, max_blocks=10)
        assert found.passes == 100
        for name, q in rounds.QUANTILES.items():
            truth = -math.log(1.0 - q) * 1e3
            hits[name] += found.latency_ms[name].lo <= truth <= found.latency_ms[name].hi
            assert found.latency_ms[name].median == pytest.approx(truth, rel=0.5)
    assert all(count >= 0.88 * trials for count in hits.values()), hits


def test_a_block_clocked_as_one_piece_gives_the_mean_of_its_passes() -> None:
    costs = iter([1.0, 3.0] * 1000)
    found = timed([Machine().timer("A", lambda: next(costs), whole=True)], min_passes=4)
    assert found.passes == 4
    assert found.own.median == pytest.approx(8 / 2.0)
    assert found.latency_ms["p50"].median == pytest.approx(2000.0)
    assert found.latency_ms["p99"].hi == pytest.approx(2000.0)


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
    assert (found.attempts, found.disturbance) == (attempts, script[kept])


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


def test_a_result_has_the_fields_of_a_throughput() -> None:
    made = Throughput(**timed(noisy_pair()).values())
    assert made.ratio == pytest.approx(2.0, rel=0.2)
    assert (made.latency_ms_p99_lo, made.attempts) == (None, 1)
    assert made.when.endswith("+00:00")
