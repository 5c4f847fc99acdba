"""A run's timings: visits that archs share, that decide requirements, and that are made again where disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nas.contract.final import Finalist, pick_winner
from nas.contract.gate import settle
from nas.contract.timing import Timings
from nas.core.config import RunConfig
from nas.core.progress import Console
from nas.core.requirement import Requirement, Setting
from nas.jobs.job import Job, Result
from nas.measure.fingerprint import take_fingerprint
from nas.measure.jobs import GROUP, VisitJob
from nas.measure.measurement import Measurement
from nas.search.constraints import bench_setting
from space import Context, get_family
from space.family import Arch
from tests.test_nas_measure_table import MEASUREMENT

FAMILY, CTX = get_family("tinyvit"), Context(img_size=48, num_classes=10)
SEED = FAMILY.seed("21M")
ARCHS = [replace(SEED, depths=(2, 2, n, 2)) for n in (5, 4, 3)]
SPREAD = (1.0, 1.02, 0.98, 1.01, 0.99, 1.005, 0.995, 1.0)


class Machine:
    """Answers visits: the ratio of each arch, by its depth, times that of the visit; some fail beside others."""

    def __init__(self, ratios: Sequence[float] = (1.5, 2.0, 2.5)) -> None:
        self.ratios = {FAMILY.key(arch, CTX): ratio for arch, ratio in zip(ARCHS, ratios, strict=True)}
        self.visits: list[list[str]] = []
        self.disturbed: Callable[[int], bool] = lambda visit: False
        self.fails: Callable[[str, int], bool] = lambda key, beside: False

    def do(self, job: Job, cost: float = 0.0) -> Result:
        asked = cast(VisitJob, job.argument)
        assert job.forked
        keys = [FAMILY.key(FAMILY.arch(cast(Any, network.arch)), CTX) for network in asked.networks]
        number = len(self.visits)
        self.visits.append(keys)
        return Result(job.key, True, {"visits": [self._answer(key, len(keys), number) for key in keys]}, None, 1.0)

    def _answer(self, key: str, beside: int, number: int) -> dict[str, Any]:
        if self.fails(key, beside):
            return {"reason": "out of memory"}
        ratio = self.ratios[key] * SPREAD[number % len(SPREAD)]
        alone = dict.fromkeys(("images_per_s_lo", "images_per_s_hi", "ratio_lo", "ratio_hi"))
        on = take_fingerprint("cpu", 2).under(SETTING, FINGERPRINT_OF, CTX.img_size)
        measured = replace(
            MEASUREMENT,
            **alone,
            images_per_s=100.0 * ratio,
            ratio=ratio,
            disturbed="waited" if self.disturbed(number) else "",
            fingerprint=on.id,
            batch=SETTING.batch,
            when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        return measured.to_dict()


CONFIG = RunConfig(seed="21M", target_params=5_000_000, threads=2, visits=4, max_visits=8)
SETTING: Setting = bench_setting(CONFIG)


def _version() -> str:
    from nas.measure.runtimes import find_runtime

    return find_runtime(SETTING.runtime).version()


FINGERPRINT_OF = _version()


def timings(machine: Machine, folder: Path, cache: Path | None = None) -> Timings:
    folder.mkdir(exist_ok=True)
    return Timings(
        config=CONFIG,
        family=FAMILY,
        context=CTX,
        folder=folder,
        cache=cache or folder / "cache",
        console=Console(quiet=True),
        fingerprints={"cpu": take_fingerprint("cpu", 2).to_dict()},
        table=None,
        do=machine.do,
    )


def at_least(speedup: float) -> tuple[Requirement, ...]:
    return (Requirement("speedup", speedup, SETTING),)


def measured(of: Measurement | Result) -> Measurement:
    assert isinstance(of, Measurement), of
    return of


def test_archs_that_are_due_share_visits_and_are_asked_once(tmp_path: Path) -> None:
    machine = Machine()
    own = timings(machine, tmp_path / "run")
    found = own.measure_together(ARCHS, "gate", reference=SEED)
    assert [measured(of).ratio for of in found] == pytest.approx([1.5, 2.0, 2.5], rel=0.02)
    assert [len(keys) for keys in machine.visits] == [3] * 4
    assert all(measured(of).ratio_lo is not None for of in found)
    assert own.measure_together(ARCHS, "gate", reference=SEED) == found, "a run asks its own table first"
    again = timings(machine, tmp_path / "run")
    assert again.measure_together(ARCHS[:1], "gate", reference=SEED) == found[:1], "a resumed run too"
    assert len(machine.visits) == 4
    assert len(ARCHS) <= GROUP


def test_more_visits_only_while_a_requirement_is_undecided(tmp_path: Path) -> None:
    for number, (bound, visits) in enumerate(((1.2, 4), (3.0, 4), (1.998, 8))):
        machine = Machine()
        own = timings(machine, tmp_path / str(number))
        found = own.measure(ARCHS[1], "final", reference=SEED, requirements=at_least(bound))
        assert len(machine.visits) == measured(found).visits == visits


def test_an_arch_that_fails_beside_others_is_tried_alone(tmp_path: Path) -> None:
    small, large = (FAMILY.key(arch, CTX) for arch in (ARCHS[1], ARCHS[0]))
    machine = Machine()
    machine.fails = lambda key, beside: key == large or (key == small and beside > 1)
    found = timings(machine, tmp_path / "run").measure_together(ARCHS, "gate", reference=SEED)
    assert isinstance(found[0], Result)
    assert found[0].reason == "out of memory"
    assert [measured(of).visits for of in found[1:]] == [4, 4]


def test_disturbed_visits_are_made_again_but_not_for_ever(tmp_path: Path) -> None:
    machine = Machine()
    machine.disturbed = lambda visit: visit < 2
    found = timings(machine, tmp_path / "calm").measure(ARCHS[0], "gate", reference=SEED)
    assert (len(machine.visits), measured(found).visits, measured(found).disturbed) == (6, 4, "")
    machine = Machine()
    machine.disturbed = lambda visit: True
    found = timings(machine, tmp_path / "loud").measure(ARCHS[0], "gate", reference=SEED)
    assert (len(machine.visits), measured(found).visits, measured(found).disturbed) == (8, 8, "waited")


@pytest.mark.parametrize(("role", "visits"), [("gate", 4), ("final", 8)])
def test_the_cache_answers_gates_and_never_finals(role: str, visits: int, tmp_path: Path) -> None:
    machine, reused = Machine(), []
    for name in ("first", "second"):
        own = timings(machine, tmp_path / name, tmp_path / "cache")
        own.measure(ARCHS[0], role, reference=SEED)
        reused.append(own.reused)
    assert (len(machine.visits), reused) == (visits, [0, int(role == "gate")])


def run_of(machine: Machine, folder: Path, bound: float) -> Any:
    own = timings(machine, folder)
    config = replace(CONFIG, min_speedup=bound)
    return SimpleNamespace(
        timings=own, config=config, settings=[SETTING], primary=SETTING, seed_arch=SEED, family=FAMILY, context=CTX
    )


@pytest.mark.parametrize(("bound", "last", "missed", "visits"), [(1.9, True, False, 4), (1.998, True, True, 8)])
def test_a_provisional_candidate_is_settled(
    bound: float, last: bool, missed: bool, visits: int, tmp_path: Path
) -> None:
    """What is undecided when no more visits are allowed is missed."""
    machine = Machine()
    run = run_of(machine, tmp_path / "run", bound)
    bounds = SimpleNamespace(under=lambda setting: at_least(bound))
    step: Any = SimpleNamespace(bounds={"p": bounds}, parent_of=lambda candidate: SimpleNamespace(key="p"))
    candidate: Any = _candidate(ARCHS[1])
    run.timings.measure_together([ARCHS[1]], "gate", reference=SEED)
    settled, why = settle(run, step, candidate, last=last)
    assert bool(why) == missed
    assert len(machine.visits) == visits
    assert settled.requirements[0].startswith(f"speedup>={bound}")
    assert not why or "does not surely meet" in why[0][0]


def _candidate(arch: Arch) -> Any:
    from space.contractions import describe_candidates

    return describe_candidates(FAMILY, [SEED], [(None, arch)], CTX)[0]


def test_an_undecided_winner_is_an_answer_of_its_own(tmp_path: Path) -> None:
    """The best that passes wins over a better one that is undecided; alone, it comes with what it would take."""
    incumbents: Any = [SimpleNamespace(arch=ARCHS[1]), SimpleNamespace(arch=ARCHS[2])]
    run = run_of(Machine(), tmp_path / "both", 1.999)
    best = pick_winner(run, incumbents)
    assert isinstance(best, Finalist)
    assert (best.of, best.undecided) == (incumbents[1], "")
    alone = pick_winner(run_of(Machine(), tmp_path / "alone", 1.99), incumbents[:1])
    assert isinstance(alone, Finalist)
    assert "after 8 visits; about " in alone.undecided
    assert alone.undecided.endswith("visits would decide it")
    assert "misses" in str(pick_winner(run_of(Machine(), tmp_path / "none", 2.2), incumbents[:1]))
