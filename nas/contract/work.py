"""A run's work from the seed to the report, as far as time allows, and how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.contract import final as finish
from nas.contract import seed as stage
from nas.contract.campaign import band_text, contract_steps
from nas.contract.milestones import write_family
from nas.contract.proxy_check import trust_in_time
from nas.contract.reuse import answered, begun_at, reused_words
from nas.contract.scoring import confirm
from nas.contract.state import Incumbent, Run
from nas.core.io import write_json
from nas.jobs.executor import OutOfTime
from nas.report import write_report
from nas.report.read import table_digests
from nas.search.steps_table import StepRow


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    `status` is `reached`, `stuck`, `unverified` (only predictions of another device speak for the
    finalists) or `stopped` (out of time); `exit_code` 0 or 3; `message` one
    sentence; `folder` the run's; `result` the content of `result.json`.
    """

    status: str
    exit_code: int
    message: str
    folder: Path
    result: Mapping[str, Any]


@dataclass
class _Course:
    """How far a run has come: what there is to tell when time runs out in the middle."""

    status: str = "stopped"
    message: str = ""
    seed: Incumbent | None = None
    steps: list[StepRow] = field(default_factory=list)
    incumbents: list[Incumbent] = field(default_factory=list)
    path: Sequence[Sequence[Incumbent]] = ()
    best: Incumbent | None = None
    final: dict[str, Any] | None = None
    reused: dict[str, Any] | None = None


def work(bench: Run, trust: int | None = None, *, fresh: bool) -> Outcome:
    """Do the run's work from the seed to the report, as far as time allows."""
    console = bench.console
    course = _Course()
    started = time.monotonic()
    stage.announce(bench, fresh=fresh)
    console.start(stage.expected_cost(bench))
    try:
        _follow(bench, course)
    except OutOfTime:
        taken = course.steps[-1].step if course.steps else 0  # none for a step without a survivor
        where = f"at step {taken + 1} of {bench.config.steps}"
        if taken == bench.config.steps:
            where = "in the final comparison"
        course.message = (
            f"out of time (--max-hours): stopped {where}; --resume {bench.folder.path} goes on"
        )
        course.best = stage.best_so_far(bench, taken)
    finally:
        console.stop()
        with contextlib.suppress(Exception):
            bench.executor.close()
    result = _result(bench, course, time.monotonic() - started)
    _keep_best(bench, course)
    bench.ledger.write_csv(bench.folder.path / "ledger.csv")
    write_family(bench.folder.path)
    result["tables"] = table_digests(bench.folder.path)
    write_json(bench.folder.result_json, result)
    write_report(bench.folder.path)
    if trust is not None and course.final is not None and course.seed is not None:
        result["trust"] = trust_in_time(bench, course.seed, trust)
        result["work"] = dataclasses.asdict(bench.work())
        write_json(bench.folder.result_json, result)
        write_report(bench.folder.path)
    elif trust is not None:
        said = f"trust: no report is made of a run that is {course.status}"
        if course.status == "stopped":
            said += f"; --resume {bench.folder.path} --trust {trust} goes on"
        console.line(said)
    if course.status not in ("stopped", "unverified"):
        stage.tidy(bench)
    return Outcome(course.status, result["exit_code"], course.message, bench.folder.path, result)


def _follow(bench: Run, course: _Course) -> None:
    """Go from the seed through the steps to the final comparison, noting in `course` each thing."""
    seed = course.seed = stage.prepare_seed(bench)
    start, known = seed, []
    if bench.earlier is not None:
        known = answered(bench, bench.earlier, seed)
        start = seed if known else begun_at(bench, bench.earlier, seed)
        course.reused = reused_words(bench, bench.earlier, seed, start, known)
        bench.console.line(f"replay: {course.reused['says']}")
    stuck = None
    if known:
        course.incumbents, course.path = known, [[seed], known]
    else:
        course.incumbents, stuck, course.path = contract_steps(bench, start, course.steps)
    course.best = course.incumbents[0]
    if stuck is not None:
        course.status, course.message = "stuck", stuck.message
        return
    course.incumbents = confirm(bench, course.incumbents)
    picked = finish.pick_winner(bench, course.incumbents)
    if isinstance(picked, str):
        course.status, course.message = "stuck", picked
        return
    if isinstance(picked, finish.Unverified):
        course.best = picked.finalists[0]
        course.status, course.message = "unverified", _unverified(bench, picked)
        return
    winner, measured, verdicts = picked
    compared = finish.compare(bench, seed, winner, measured, verdicts)
    if isinstance(compared, str):
        course.status, course.message = "stuck", compared
        return
    course.best, course.final = winner, compared
    course.status, course.message = "reached", _reached(bench, compared)


def _result(bench: Run, course: _Course, seconds: float) -> dict[str, Any]:
    """Return the content of `result.json`, but for the trust report."""
    won = None if course.final is None else course.best
    return {
        "status": course.status,
        "exit_code": 0 if course.status == "reached" else 3,
        "message": course.message,
        "winner": None if won is None else won.key,
        "path": [incumbents[0].key for incumbents in course.path],
        "final": course.final,
        "reused": course.reused,
        "trust": None,
        "work": dataclasses.asdict(bench.work()),
        "finalists": [_finalist(i) for i in course.incumbents if i.parent is not None],
        "seconds": round(seconds, 1),
        "seed_images_per_s": _seed_pace(bench),
    }


def _keep_best(bench: Run, course: _Course) -> None:
    """Leave the best arch as a model, with the final weights where they were trained."""
    best = course.best
    if best is None or best.key == bench.key(bench.seed_arch):
        return
    if course.final is not None:
        weights = bench.folder.job_folder(f"final-{best.key}") / "weights.safetensors"
        if weights.exists():  # gone when a finished run is opened again
            finish.write_best(bench, best, weights, _score(course.final), "final")
    elif best.weights.exists():  # a replay's answers may have scores only
        images = len(bench.dataset.holdout.labels)
        score = {"kind": "proxy", "soft_loss": best.soft_loss, "holdout_n": images}
        finish.write_best(bench, best, best.weights, score, "gate")


def _finalist(of: Incumbent) -> dict[str, Any]:
    """Return what is known of a finalist: its losses from the first and the second random seed."""
    return {
        "key": of.key,
        "ratio": of.ratio,
        "soft_loss": of.soft_loss,
        "soft_loss_again": of.second_loss,
    }


def _seed_pace(bench: Run) -> float | None:
    """Return the seed's measured images/s: what kind of moment the machine had."""
    found = (r.images_per_s for r in bench.ledger.rows if r.step == 0)
    return next(found, None)


def _reached(bench: Run, final: Mapping[str, Any]) -> str:
    winner = final["winner"]
    band = bench.band(bench.config.steps)
    said = (
        f"reached: {winner['params']:,} parameters in {band_text(band.lo, band.hi)}, "
        f"{winner['ratio']:.2f}x the seed's throughput "
        f"[{winner['ratio_lo']:.2f}, {winner['ratio_hi']:.2f}], "
        f"test top-1 {winner['top1']:.1%} +- {winner['top1_se']:.1%}"
    )
    if final["metric"] != "top1" and winner["metric"] is not None:
        name = final["metric"].replace("_", " ")
        said += f", {name} {winner['metric']:.1%} +- {winner['metric_se']:.1%}"
    for verdict in final["requirements"]:
        if ": undecided at " in verdict:
            said += f"; the fresh interval straddles {verdict.replace(': undecided', '')}"
    if bench.timings.reused:
        said += f"; {bench.timings.reused} measurements were taken from the cache of earlier runs"
    return said


def _unverified(bench: Run, found: finish.Unverified) -> str:
    """Say what is left to do before anything is promised."""
    command = finish.write_finalists(bench, found.finalists)
    return (
        f"unverified: {len(found.finalists)} finalists meet the requirements by prediction only; "
        f"measure them on their device: {command}; then go on here with: python -m nas.contract "
        f"--resume {bench.folder.path} --finalists finalists.csv"
    )


def _score(final: Mapping[str, Any]) -> dict[str, Any]:
    winner = final["winner"]
    return {
        "kind": "final",
        "soft_loss": winner["soft_loss"],
        "soft_loss_se": winner["soft_loss_se"],
        "metric": winner["metric"],
        "metric_se": winner["metric_se"],
        "holdout_top1": winner["holdout_top1"],
        "test_top1": winner["top1"],
        "test_top1_se": winner["top1_se"],
        "test_n": winner["test_n"],
    }
