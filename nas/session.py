"""One process's part in a run: opens or resumes the folder, sets the stage, lets the steps run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nas import finish, stage
from nas.campaign import band_text, contract_steps
from nas.door import (
    ask_fingerprints,
    check_possible,
    check_requirements,
    make_config,
    read_data,
    read_device_table,
    resolved,
    with_classes,
    with_steps,
)
from nas.executor import InlineExecutor, LocalExecutor, OutOfTime
from nas.files import write_json
from nas.measure.device_table import DeviceTable
from nas.measure.rows import read_rows, write_rows
from nas.measure.table import MeasurementRow, read_measurements
from nas.milestones import write_family
from nas.progress import Console
from nas.provenance import dataset_card, git_commit, versions
from nas.report import write_report
from nas.resolve import replayed_config
from nas.reuse import answered, begun_at, earlier_of, reused_words, steps_from
from nas.run import Incumbent, Run
from nas.rundir import RunDir, resumed_config
from nas.scoring import confirm
from nas.tables import StepRow
from nas.trust import check_band, named_archs, trust_in_time
from space import get_family
from space.errors import InputError, refuse
from space.freeze import freeze

Executor = LocalExecutor | InlineExecutor

DEVICE_ROWS, FINALIST_ROWS = "device_table.csv", "finalists_measured.csv"
"""What a run with `--device-table` keeps of it: its own copy, and its finalists' measurements."""


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
    finalists: Path | None = None,
    trust: int | None = None,
) -> Outcome:
    """Start or continue a run; see `nas.contract.contract`."""
    # Results and records must be on disk before the deadline: a few seconds are theirs.
    deadline = None if max_hours is None else time.monotonic() + max(max_hours * 3600 - 5, 0.0)
    console = console if console is not None else Console(quiet=quiet)
    given = resolved(given)
    if resume:
        if out is None:
            raise refuse("--resume", "no folder", "the folder of a run", "name it: --resume DIR")
        return _resume(given, RunDir(out), deadline, cache, console, executor, finalists, trust)
    if finalists is not None:
        raise refuse(
            "--finalists", finalists, "an earlier run's --resume", "name the run: --resume DIR"
        )
    return _start(given, out, deadline, cache, console, executor, trust)


def _start(
    given: dict[str, Any],
    out: Path | None,
    deadline: float | None,
    cache: Path,
    console: Console,
    executor: Executor | None,
    trust: int | None,
) -> Outcome:
    if "replay" in given:
        config = replayed_config(given)
        family = get_family(config.family)
        seed_arch = family.arch(config.seed_arch)
    else:
        config = make_config(given)
        family = get_family(config.family)
        seed_arch = family.seed(config.seed)
    family = freeze(family, seed_arch, config.freeze)
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
    if "replay" not in given:
        config = with_steps(config, given, family, seed_arch, dataset)
    check_possible(config, family, seed_arch, dataset)
    check_band(trust, config, family, seed_arch, dataset)
    tables = [Path(p) for p in config.device_table]
    earlier = earlier_of(config, family, dataset)
    if earlier is not None:
        if tables:
            tables = [earlier.folder / DEVICE_ROWS]
        else:
            rows = (*rows, *read_measurements(earlier.folder / "measurements.csv"))
        if "steps" not in given:
            config = dataclasses.replace(config, steps=steps_from(earlier, config, family, dataset))
    config, device_table = read_device_table(config, tables, family, seed_arch, dataset)
    check_requirements(config, family, seed_arch, dataset, device_table)
    folder.create()
    own = executor is None
    worker = executor or LocalExecutor(threads=config.threads, log=folder.path / "worker.log")
    bench: Run | None = None
    try:
        fingerprints = ask_fingerprints(config, worker, device_table)
        if device_table is not None:
            write_rows(folder.path / DEVICE_ROWS, device_table.rows)
        folder.write_run(
            {
                "config": config.to_dict(),
                "command": " ".join(sys.argv),
                "git": git_commit(),
                "versions": versions(),
                "fingerprint": dict(fingerprints[config.device]),
                "fingerprints": {name: dict(of) for name, of in fingerprints.items()},
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
            fingerprints=fingerprints,
            table=device_table,
            earlier=earlier,
        )
        _adopt(bench, rows, named=given.get("measurements") is not None)
        return _work(bench, trust, fresh=True)
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
    finalists: Path | None = None,
    trust: int | None = None,
) -> Outcome:
    data = folder.open()
    own = executor is None
    worker = executor
    try:
        config = resumed_config(data, given)
        family = get_family(config.family)
        seed_arch = family.arch(config.seed_arch)
        family = freeze(family, seed_arch, config.freeze)
        known_archs = None if trust is None else named_archs(folder.path, trust)
        if folder.result_json.exists():
            result = finish.read_result(folder.result_json)
            waits = result["status"] == "unverified" and finalists is not None
            wanted = trust is not None and not result.get("trust")
            if result["status"] != "stopped" and not waits and not wanted:
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
        if known_archs is None:
            check_band(trust, config, family, seed_arch, dataset)
        worker = worker or LocalExecutor(threads=config.threads, log=folder.path / "worker.log")
        tables = [folder.path / DEVICE_ROWS] if config.device_table else []
        config, device_table = read_device_table(config, tables, family, seed_arch, dataset)
        _take_finalists(folder, device_table, finalists)
        fingerprints = ask_fingerprints(config, worker, device_table)
        for device, fingerprint in fingerprints.items():
            _same_device(data["fingerprints"].get(device, {}), fingerprint)
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
            fingerprints=fingerprints,
            table=device_table,
            earlier=earlier_of(config, family, dataset),
        )
        # It goes on, so the record of an earlier stop is no longer true.
        folder.result_json.unlink(missing_ok=True)
        return _work(bench, trust, fresh=False)
    except (KeyboardInterrupt, SystemExit):
        _say_interrupted(folder, console)
        raise
    finally:
        if own and worker is not None:
            worker.close()
        folder.release()


def _same_device(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run on another device or software than it was measured on."""
    if before.get("id") == now["id"]:
        return
    changed = [
        f"{name} {before.get(name)} -> {value}"
        for name, value in now.items()
        if name != "id" and before.get(name) != value
    ]
    raise refuse(
        "--resume",
        f"another device or software ({'; '.join(changed)})",
        "that of the run's measurements",
        "resume there, or start a new run here",
    )


def _take_finalists(folder: RunDir, table: DeviceTable | None, finalists: Path | None) -> None:
    """Keep what was measured of the finalists with the run, and let the table know it."""
    kept = folder.path / FINALIST_ROWS
    if finalists is not None:
        if table is None:
            raise refuse(
                "--finalists", finalists, "a run with a --device-table", "drop --finalists"
            )
        rows = read_rows(finalists, "--finalists")
        table.add_finalists(rows, "--finalists")
        write_rows(kept, rows)
    elif table is not None and kept.exists():
        table.add_finalists(read_rows(kept, "--finalists"), str(kept))


def _adopt(bench: Run, rows: Sequence[MeasurementRow], *, named: bool) -> None:
    """Take over another run's measurements that were made under a setting of this one.

    Where the file was `named` by the user, one without any that fits is refused.
    """
    own = {
        bench.timings.fingerprint_under(setting)
        for setting in bench.settings
        if bench.table is None or setting != bench.table.setting
    }
    fitting = [row for row in rows if row.measurement.fingerprint in own]
    for row in fitting:
        bench.timings.rows.append_row(row)
    if rows and not fitting and named:
        raise refuse(
            "--measurements",
            f"{bench.config.measurements} without this fingerprint",
            f"measurements of {', '.join(sorted(own))}",
            "measure on this device and software",
        )


def _say_interrupted(folder: RunDir, console: Console) -> None:
    """Say how to go on; a run that had not begun leaves nothing."""
    console.stop()
    if folder.run_json.exists():
        console.line(f"interrupted; continue with: python -m nas.contract --resume {folder.path}")
    else:
        folder.discard()
        console.line("interrupted before the run began; nothing was kept")


def _work(bench: Run, trust: int | None = None, *, fresh: bool) -> Outcome:
    """Do the run's work from the seed to the report, as far as time allows."""
    console, config = bench.console, bench.config
    steps: list[StepRow] = []
    best = None
    incumbents: list[Incumbent] = []
    reused: dict[str, Any] | None = None
    message, status, final, path = "", "stopped", None, None
    started = time.monotonic()
    stage.announce(bench, fresh=fresh)
    console.start(stage.expected_cost(bench))
    try:
        seed = stage.prepare_seed(bench)
        start, known = seed, []
        if bench.earlier is not None:
            known = answered(bench, bench.earlier, seed)
            start = seed if known else begun_at(bench, bench.earlier, seed)
            reused = reused_words(bench, bench.earlier, seed, start, known)
            console.line(f"replay: {reused['says']}")
        if known:
            incumbents, stuck, path = known, None, [[seed], known]
        else:
            incumbents, stuck, path = contract_steps(bench, start, steps)
        best = incumbents[0]
        if stuck is not None:
            status, message = "stuck", stuck.message
        else:
            incumbents = confirm(bench, incumbents)
            picked = finish.pick_winner(bench, incumbents)
            if isinstance(picked, str):
                status, message = "stuck", picked
            elif isinstance(picked, finish.Unverified):
                status, message, best = (
                    "unverified",
                    _unverified(bench, picked),
                    picked.finalists[0],
                )
            else:
                winner, measured, verdicts = picked
                compared = finish.compare(bench, seed, winner, measured, verdicts)
                if isinstance(compared, str):
                    status, message = "stuck", compared
                else:
                    status, final, best = "reached", compared, winner
    except OutOfTime:
        taken = steps[-1].step if steps else 0  # a step without a survivor leaves no row
        where = f"at step {taken + 1} of {config.steps}"
        if taken == config.steps:
            where = "in the final comparison"
        message = (
            f"out of time (--max-hours): stopped {where}; --resume {bench.folder.path} goes on"
        )
        best = stage.best_so_far(bench, taken)
    finally:
        console.stop()
        with contextlib.suppress(Exception):
            bench.executor.close()
    if final is not None:
        message = _reached(bench, final)
    exit_code = 0 if status == "reached" else 3
    result: dict[str, Any] = {
        "status": status,
        "exit_code": exit_code,
        "message": message,
        "winner": None if final is None or best is None else best.key,
        "path": [] if path is None else [i[0].key for i in path],
        "final": final,
        "reused": reused,
        "trust": None,
        "work": dataclasses.asdict(bench.work()),
        "finalists": [_finalist(i) for i in incumbents if i.parent is not None],
        "seconds": round(time.monotonic() - started, 1),
        "seed_images_per_s": _seed_pace(bench),
    }
    if best is not None and best.key != bench.key(bench.seed_arch):
        if final is not None:
            weights = bench.folder.job_folder(f"final-{best.key}") / "weights.safetensors"
            score = _score(final)
            if weights.exists():  # gone when a finished run is opened again
                finish.write_best(bench, best, weights, score, "final")
        elif best.weights.exists():  # a replay's answers may have scores only
            images = len(bench.dataset.holdout.labels)
            score = {"kind": "proxy", "soft_loss": best.soft_loss, "holdout_n": images}
            finish.write_best(bench, best, best.weights, score, "gate")
    bench.ledger.write_csv(bench.folder.path / "ledger.csv")
    write_family(bench.folder.path)
    write_json(bench.folder.result_json, result)
    write_report(bench.folder.path)
    if trust is not None and final is not None:
        result["trust"] = trust_in_time(bench, seed, trust)
        result["work"] = dataclasses.asdict(bench.work())
        write_json(bench.folder.result_json, result)
        write_report(bench.folder.path)
    elif trust is not None:
        said = f"trust: no report is made of a run that is {status}"
        if status == "stopped":
            said += f"; --resume {bench.folder.path} --trust {trust} goes on"
        console.line(said)
    if status not in ("stopped", "unverified"):
        stage.tidy(bench)
    return Outcome(status, exit_code, message, bench.folder.path, result)


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
