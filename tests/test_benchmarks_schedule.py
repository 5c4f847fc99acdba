"""The simulated cluster keeps its books, and docs/scale.md its arithmetic."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import _label_plan as plan
from benchmarks import schedule
from benchmarks._cluster import NO_FAULTS, Cluster, Durations, Faults, Load, Policy, simulate
from nas.executor.dispatch import LEAST_HUNG_S, LEAST_KNOWN
from nas.executor.pool import HUNG_EVERY_S
from nas.race import rungs_of

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
USUAL = Durations(RNG.lognormal(0, 0.3, 40), RNG.lognormal(0, 0.1, 40))
EVEN = Durations(np.ones(1), np.ones(1))
FAULTS = st.builds(
    Faults,
    worker_hours=st.sampled_from([None, 0.2, 5.0]),
    node_hours=st.sampled_from([None, 0.5, 20.0]),
    hang_share=st.sampled_from([0.0, 0.05]),
    poison_share=st.sampled_from([0.0, 0.1]),
    slow_share=st.sampled_from([0.0, 0.5]),
)
POLICIES = st.builds(
    Policy,
    retries=st.integers(0, 2),
    copies=st.booleans(),
    ahead=st.sampled_from(["none", "keep", "half"]),
    hung=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    FAULTS, POLICIES, st.integers(1, 30), st.integers(1, 40), st.integers(1, 3), st.booleans(),
    st.integers(0, 9), st.sampled_from([3600.0, 86_400.0]),
)  # fmt: skip
def test_every_worker_second_is_booked_once_and_every_job_ends_once(
    faults: Faults,
    policy: Policy,
    workers: int,
    candidates: int,
    steps: int,
    racing: bool,
    random_seed: int,
    limit_s: float,
) -> None:
    load = Load(candidates, min(steps, candidates), epochs=4, racing=racing)
    cluster = Cluster(workers, faults, limit_s=limit_s)
    out = simulate(load, cluster, policy, USUAL, random_seed=random_seed)
    assert out.spent.total_s == pytest.approx(workers * out.makespan_s)
    assert min(vars(out.spent).values()) >= -1e-6
    assert set(out.ended.values()) == {1}
    # All begin, and those given up are no more than there are candidates.
    assert len([key for key in out.ended if key.endswith("-r0")]) == candidates
    assert out.given_up <= candidates
    assert out.attempts <= (policy.retries + 2) * 2 * candidates * len(rungs_of(4))
    assert out.wronged <= out.hung + out.late
    assert policy.hung or out.hung == 0
    assert out.tail_idle_s <= out.spent.idle_s + 1e-6
    assert out.tail_s <= out.makespan_s + 1e-6
    # No slower than the work on one worker at the slowest, no faster than on all of them.
    assert out.makespan_s >= out.work_s / workers - 1e-6
    again = simulate(load, cluster, policy, USUAL, random_seed=random_seed)
    assert (again.makespan_s, again.spent, again.ended) == (out.makespan_s, out.spent, out.ended)


@pytest.mark.parametrize("ahead", ["none", "keep", "half"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_what_can_be_told_by_hand_is_so(workers: int, copies: bool, ahead: str) -> None:
    """Equal jobs, no faults: whole rounds of workers, rung after rung; run-ahead only helps."""
    load = Load(16, epochs=4, epoch_s=10.0)
    cluster = Cluster(workers, NO_FAULTS, boot_s=0.0)
    policy = Policy(copies=copies, ahead=ahead)
    out = simulate(load, cluster, policy, EVEN, random_seed=0)
    work = 16 * 10 + 8 * 10 + 4 * 20
    rounds = -(-16 // workers) * 10 + -(-8 // workers) * 10 + -(-4 // workers) * 20
    assert out.work_s == pytest.approx(work)
    assert out.spent.useful_s == pytest.approx(work)
    assert out.spent.lost_s == out.spent.spare_s == 0
    assert out.given_up == out.hung == out.late == 0
    assert work / workers - 1e-9 <= out.makespan_s <= rounds + 1e-9
    if ahead == "none":
        assert out.makespan_s == pytest.approx(rounds)


def test_a_candidate_that_kills_its_worker_is_given_up_after_its_tries() -> None:
    faults = replace(NO_FAULTS, poison_share=1.0)
    for retries in (0, 1, 2):
        out = simulate(
            Load(5), Cluster(2, faults), Policy(retries=retries), EVEN, random_seed=0
        )  # fmt: skip
        assert out.given_up == 5
        assert out.attempts == 5 * (retries + 1)
        assert out.work_s == out.spent.useful_s == 0


@pytest.mark.parametrize("retries", [0, 2])
def test_where_all_hang_nobody_knows_and_the_limit_ends_them(retries: int) -> None:
    faults = replace(NO_FAULTS, hang_share=1.0)
    cluster = Cluster(2, faults, boot_s=0.0, limit_s=5000.0)
    out = simulate(Load(5), cluster, Policy(retries=retries), EVEN, random_seed=0)
    assert (out.given_up, out.hung, out.late, out.wronged) == (5, 0, 5 * (retries + 1), 0)
    assert out.spent.lost_s == pytest.approx(5000.0 * out.late)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 99), st.sampled_from(["none", "half"]))
def test_once_some_have_ended_what_hangs_costs_its_bound(
    workers: int, random_seed: int, ahead: str
) -> None:
    """Jobs of 10 to 20 s: a quarter of an hour each, and not one that would have ended."""
    faults = replace(NO_FAULTS, hang_share=0.1)
    cluster = Cluster(workers, faults, boot_s=0.0)
    load = Load(40, epochs=4, epoch_s=10.0)
    out = simulate(load, cluster, Policy(ahead=ahead), EVEN, random_seed=random_seed)
    assert out.wronged == 0
    certain = out.hung * LEAST_HUNG_S + out.late * cluster.limit_s
    # Those that hang beside one that nobody knows of yet hang as long as that one.
    beside = (workers - 1) * cluster.limit_s if out.late else 0.0
    assert certain <= out.spent.lost_s <= certain + beside + out.hung * 2 * HUNG_EVERY_S
    # A day is lost only by those that began before five had ended.
    assert out.late <= workers + LEAST_KNOWN - 1


def test_a_record_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": {"proxy_epochs": 4}}')
    lines = ["job,attempt,where,when,seconds,outcome,reason"]
    for at in range(9):
        lines.append(f"s1-d{at}-rung1,1,w,t,{1.0 + at},done,")
        lines.append(f"s1-d{at}-rung2,1,w,t,{1.0 + at},done,")
        lines.append(f"s1-d{at},1,w,t,{2.0 + 2 * at},done,")
        lines.append(f"s1-d{at}-more,1,w,t,50,done,")
        lines.append(f"order-d{at},1,w,t,50,done,")
        lines.append(f"s2-d{at},1,w,t,50,lost,killed")
    (tmp_path / "attempts.csv").write_text("\n".join(lines) + "\n")
    table = tmp_path / "durations.csv"
    assert schedule.main(["--record", str(tmp_path), "--durations", str(table)]) == 0
    found = schedule.read_durations(table)
    assert found.paces.tolist() == pytest.approx([(1 + at) / 5 for at in range(9)])
    assert found.jitters.tolist() == pytest.approx([1.0] * 27)


def test_bad_input_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for argv in (["--record", str(tmp_path)], ["--durations", str(tmp_path / "none.csv")]):
        assert schedule.main([*argv, "--out", str(tmp_path / "out.csv")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "gmacs"),
    [
        ({"width": 1280, "depth": 32}, 167.40),  # timm: vit_huge_patch14_clip_224
        ({"img_size": 336}, 191.11),  # vit_large_patch14_clip_336
        ({"img_size": 224, "patch": 16, "width": 768, "depth": 12}, 17.58),  # ViT-B/16
    ],
)
def test_multiply_adds_are_those_of_published_counts(
    arguments: dict[str, int], gmacs: float
) -> None:
    assert plan.vit_macs(**arguments, classes=1000) / 1e9 == pytest.approx(gmacs, rel=5e-3)


def test_the_document_tells_the_numbers_of_the_plan() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    said = re.sub(r"\s+", " ", text)
    h200, a100 = plan.DEVICES
    for number in (
        f"{plan.vit_macs() / 1e9:.2f} GMACs",
        f"{h200.images_per_s(plan.vit_macs()):,.0f} images/s",
        f"{a100.images_per_s(plan.vit_macs()):,.0f} images/s",
        f"{plan.pieces_an_epoch():,} pieces",
        f"{plan.piece_s(h200):.1f} s",
        f"{plan.cores_a_gpu(h200):.1f} cores",
        f"{plan.read_gb_per_s(h200, 512):.0f} GB/s",
    ):
        assert number in said, number
    for epochs in plan.EPOCHS:
        sizes = [f"{plan.store_bytes(k, epochs) / 1e12:.3g}" for k in (10, 100)]
        hours = [plan.gpu_hours(device, epochs) for device in plan.DEVICES]
        days = [f"{hours[0] / n / 24:.3g}" for n in plan.GPUS]
        row = " | ".join([str(epochs), *sizes, *(f"{h:,.0f}" for h in hours), *days])
        assert f"| {row} |" in said, row
