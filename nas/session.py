"""One process's part in a run: opens or resumes the folder, sets the stage, lets the steps run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nas import finish, stage
from nas.campaign import band_text, contract_steps
from nas.door import (
    ask_fingerprint,
    check_possible,
    make_config,
    read_data,
    resolved,
    with_classes,
)
from nas.executor import InlineExecutor, LocalExecutor, OutOfTime
from nas.files import write_json
from nas.measure.table import MeasurementTable, read_measurements
from nas.progress import Console
from nas.provenance import dataset_card, git_commit, versions
from nas.report import write_report
from nas.run import Run
from nas.rundir import RunDir, resumed_config
from nas.search.constraints import band_at
from nas.tables import StepRow
from space import get_family
from space.errors import InputError, refuse

Executor = LocalExecutor | InlineExecutor


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    `status` is `reached`, `stuck` or `stopped` (out of time); `exit_code` 0 or 3; `message` one
    sentence; `folder` the run's; `result` the content of `result.json`.
    """

    status: str
    exit_code: int
    message: str
    folder: Path
    result: Mapping[str, Any]


def run(
    given: Mapping[str, Any],
    *,
    out: Path | None,
    resume: bool,
    max_hours: float | None,
    cache: Path,
    quiet: bool,
    console: Console | None,
    executor: Executor | None,
) -> Outcome:
    """Start or continue a run; see `nas.contract.contract`."""
    # Results and records must be on disk before the deadline: a few seconds are theirs.
    deadline = None if max_hours is None else time.monotonic() + max(max_hours * 3600 - 5, 0.0)
    console = console if console is not None else Console(quiet=quiet)
    given = resolved(given)
    if resume:
        if out is None:
            raise refuse("--resume", "no folder", "the folder of a run", "name it: --resume DIR")
        return _resume(given, RunDir(out), deadline, cache, console, executor)
    return _start(given, out, deadline, cache, console, executor)


def _start(
    given: dict[str, Any],
    out: Path | None,
    deadline: float | None,
    cache: Path,
    console: Console,
    executor: Executor | None,
) -> Outcome:
    config = make_config(given)
    family = get_family(config.family)
    seed_arch = family.seed(config.seed)
    config = dataclasses.replace(config, seed_arch=family.to_dict(seed_arch))
    rows = () if config.measurements is None else read_measurements(Path(config.measurements))
    if out is None:
        moment = datetime.now().strftime("%Y%m%d-%H%M%S")
        target = f"{config.target_params / 1e6:g}M"
        seed_name = Path(config.seed).stem
        out = Path("results/runs") / f"{moment}-{seed_name}-{target}"
    folder = RunDir(out)
    if folder.run_json.exists():
        folder.create()  # refuses, before the data is read
    dataset = with_classes(config, read_data(config, cache, console), cache, console)
    check_possible(config, family, seed_arch, dataset)
    folder.create()
    own = executor is None
    worker = executor or LocalExecutor(threads=config.threads, log=folder.path / "worker.log")
    bench: Run | None = None
    try:
        fingerprint = ask_fingerprint(config, worker)
        table = MeasurementTable(folder.path / "measurements.csv")
        for row in rows:
            if row.measurement.fingerprint == fingerprint["id"]:
                table.append_row(row)
        if rows and not table.rows:
            raise refuse(
                "--measurements",
                f"{config.measurements} without this fingerprint",
                f"measurements of {fingerprint['id']}",
                "measure on this device and software",
            )
        folder.write_run(
            {
                "config": config.to_dict(),
                "command": " ".join(sys.argv),
                "git": git_commit(),
                "versions": versions(),
                "fingerprint": dict(fingerprint),
                "dataset": dataset_card(dataset),
            }
        )
        bench = Run(
            config=config,
            family=family,
            seed_arch=seed_arch,
            dataset=dataset,
            folder=folder,
            executor=worker,
            console=console,
            cache=cache,
            deadline=deadline,
            fingerprint=fingerprint,
        )
        return _work(bench, fresh=True)
    except InputError:
        worker.close()
        if bench is None or not bench.ledger.rows:
            folder.discard()  # refused before there was anything to keep
        raise
    except (KeyboardInterrupt, SystemExit):
        _say_interrupted(folder, console)
        raise
    finally:
        if own:
            worker.close()
        folder.release()


def _resume(
    given: dict[str, Any],
    folder: RunDir,
    deadline: float | None,
    cache: Path,
    console: Console,
    executor: Executor | None,
) -> Outcome:

    data = folder.open()
    own = executor is None
    worker = executor
    try:
        config = resumed_config(data, given)
        family = get_family(config.family)
        seed_arch = family.arch(config.seed_arch)
        if folder.result_json.exists():
            result = finish.read_result(folder.result_json)
            if result["status"] != "stopped":
                if not (folder.path / "report.md").exists():  # killed after the result
                    write_report(folder.path)
                return Outcome(
                    result["status"], result["exit_code"], result["message"], folder.path, result
                )
        dataset = with_classes(config, read_data(config, cache, console), cache, console)
        known = data["dataset"]["fingerprint"]
        if dataset.fingerprint != known:
            raise refuse(
                "--data",
                f"{config.data} with fingerprint {dataset.fingerprint}",
                f"the run's own data, {known}",
                "restore the data or start a new run",
            )
        worker = worker or LocalExecutor(threads=config.threads, log=folder.path / "worker.log")
        fingerprint = ask_fingerprint(config, worker)
        if fingerprint["id"] != data["fingerprint"]["id"]:
            changed = [
                f"{name} {data['fingerprint'].get(name)} -> {value}"
                for name, value in fingerprint.items()
                if name != "id" and data["fingerprint"].get(name) != value
            ]
            raise refuse(
                "--resume",
                f"another device or software ({'; '.join(changed)})",
                "that of the run's measurements",
                "resume there, or start a new run here",
            )
        bench = Run(
            config=config,
            family=family,
            seed_arch=seed_arch,
            dataset=dataset,
            folder=folder,
            executor=worker,
            console=console,
            cache=cache,
            deadline=deadline,
            fingerprint=fingerprint,
        )
        # It goes on, so the record of an earlier stop is no longer true.
        folder.result_json.unlink(missing_ok=True)
        return _work(bench, fresh=False)
    except (KeyboardInterrupt, SystemExit):
        _say_interrupted(folder, console)
        raise
    finally:
        if own and worker is not None:
            worker.close()
        folder.release()


def _say_interrupted(folder: RunDir, console: Console) -> None:
    """Say how to go on; a run that had not begun leaves nothing."""
    console.stop()
    if folder.run_json.exists():
        console.line(f"interrupted; continue with: python -m nas.contract --resume {folder.path}")
    else:
        folder.discard()
        console.line("interrupted before the run began; nothing was kept")


def _work(bench: Run, *, fresh: bool) -> Outcome:
    """Do the run's work from the seed to the report, as far as time allows."""
    console, config = bench.console, bench.config
    steps: list[StepRow] = []
    best = None
    message, status, final, path = "", "stopped", None, None
    started = time.monotonic()
    stage.announce(bench, fresh=fresh)
    console.start(stage.expected_cost(bench))
    try:
        seed = stage.prepare_seed(bench)
        incumbents, stuck, path = contract_steps(bench, seed, steps)
        best = incumbents[0]
        if stuck is not None:
            status, message = "stuck", stuck.message
        else:
            picked = finish.pick_winner(bench, incumbents)
            if isinstance(picked, str):
                status, message = "stuck", picked
            else:
                winner, measured = picked
                compared = finish.compare(bench, seed, winner, measured)
                if isinstance(compared, str):
                    status, message = "stuck", compared
                else:
                    status, final, best = "reached", compared, winner
    except OutOfTime:
        message = (
            f"out of time (--max-hours): stopped at step {len(steps) + 1} of {config.steps}; "
            f"--resume {bench.folder.path} goes on"
        )
        reached = [r for r in bench.ledger.rows if r.stage == "kept" and r.step == len(steps)]
        best = stage.incumbent_of(bench, reached[0]) if reached and steps else None
    finally:
        console.stop()
        with contextlib.suppress(Exception):
            bench.executor.close()
    if final is not None:
        message = _reached(bench, final)
    exit_code = 0 if status == "reached" else 3
    result = {
        "status": status,
        "exit_code": exit_code,
        "message": message,
        "winner": None if final is None or best is None else best.key,
        "path": [] if path is None else [i[0].key for i in path],
        "final": final,
        "seconds": round(time.monotonic() - started, 1),
        "seed_images_per_s": _seed_pace(bench),
    }
    if best is not None and best.key != bench.key(bench.seed_arch):
        if final is not None:
            weights = bench.folder.job_folder(f"final-{best.key}") / "weights.safetensors"
            score = _score(final)
            finish.write_best(bench, best, weights, score, "final")
        else:
            images = len(bench.dataset.holdout.labels)
            score = {"kind": "proxy", "soft_loss": best.soft_loss, "holdout_n": images}
            finish.write_best(bench, best, best.weights, score, "gate")
    bench.ledger.write_csv(bench.folder.path / "ledger.csv")
    write_json(bench.folder.result_json, result)
    write_report(bench.folder.path)
    if status != "stopped":
        stage.tidy(bench)
    return Outcome(status, exit_code, message, bench.folder.path, result)


def _seed_pace(bench: Run) -> float | None:
    """Return the seed's measured images/s: what kind of moment the machine had."""
    found = (r.images_per_s for r in bench.ledger.rows if r.step == 0)
    return next(found, None)


def _reached(bench: Run, final: Mapping[str, Any]) -> str:
    winner = final["winner"]
    band = band_at(
        bench.family.count_params(bench.seed_arch, bench.context), bench.config, bench.config.steps
    )
    said = (
        f"reached: {winner['params']:,} parameters in {band_text(band.lo, band.hi)}, "
        f"{winner['ratio']:.2f}x the seed's throughput "
        f"[{winner['ratio_lo']:.2f}, {winner['ratio_hi']:.2f}], "
        f"test top-1 {winner['top1']:.1%} +- {winner['top1_se']:.1%}"
    )
    bound = bench.config.min_speedup
    if bound is not None and winner["ratio_lo"] < bound:
        said += f"; the fresh interval straddles the bound {bound}"
    return said


def _score(final: Mapping[str, Any]) -> dict[str, Any]:
    winner = final["winner"]
    return {
        "kind": "final",
        "soft_loss": winner["soft_loss"],
        "soft_loss_se": winner["soft_loss_se"],
        "holdout_top1": winner["holdout_top1"],
        "test_top1": winner["top1"],
        "test_top1_se": winner["top1_se"],
        "test_n": winner["test_n"],
    }
