"""One process's part in a run: opens or resumes the folder, sets the stage, lets the steps run."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nas.contract import final as finish
from nas.contract.checks import (
    ask_fingerprints,
    check_possible,
    check_requirements,
    check_token,
    make_config,
    read_data,
    read_device_table,
    resolved,
    with_classes,
    with_steps,
    with_threads,
)
from nas.contract.proxy_check import check_band, named_archs
from nas.contract.replay import Earlier, replayed_config
from nas.contract.reuse import earlier_of, steps_from
from nas.contract.run_folder import RunDir, resumed_config
from nas.contract.state import Run
from nas.contract.work import Outcome, work
from nas.core.config import RunConfig
from nas.core.progress import Console
from nas.core.provenance import git_commit, versions
from nas.data.dataset import dataset_card
from nas.jobs.executor import Executor
from nas.jobs.make import make_executor
from nas.jobs.means import Means
from nas.measure.device_rows import read_rows, write_rows
from nas.measure.device_table import DeviceTable
from nas.measure.measurement_table import MeasurementRow, read_measurements
from nas.report import write_report
from nas.search.storage import StudyAway, check_reachable, new_shared, resumed_shared
from space import get_family
from space.errors import InputError, refuse, without_passwords
from space.freeze import freeze

DEVICE_ROWS, FINALIST_ROWS = "device_table.csv", "finalists_measured.csv"
"""What a run with `--device-table` keeps of it: its own copy, and its finalists' measurements."""


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
    storage: str | None = None,
    means: Means | None = None,
) -> Outcome:
    """Start or continue a run; see `nas.contract.contract`."""
    # Results and records must be on disk before the deadline: a few seconds are theirs.
    deadline = None if max_hours is None else time.monotonic() + max(max_hours * 3600 - 5, 0.0)
    console = console if console is not None else Console(quiet=quiet)
    given = resolved(given)
    if resume:
        if out is None:
            raise refuse("--resume", "no folder", "the folder of a run", "name it: --resume DIR")
        return _resume(
            given,
            RunDir(out),
            deadline,
            cache,
            console,
            executor,
            finalists,
            trust,
            storage,
            means or Means(),
        )
    if finalists is not None:
        raise refuse(
            "--finalists", finalists, "an earlier run's --resume", "name the run: --resume DIR"
        )
    return _start(given, out, deadline, cache, console, executor, trust, storage, means or Means())


def _start(
    given: dict[str, Any],
    out: Path | None,
    deadline: float | None,
    cache: Path,
    console: Console,
    executor: Executor | None,
    trust: int | None,
    storage: str | None,
    means: Means,
) -> Outcome:
    if "replay" in given:
        config = replayed_config(given)
        family = get_family(config.family)
        seed_arch = family.arch(config.seed_arch)
    else:
        config = make_config(with_threads(given, means))
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
    shared = None if storage is None else new_shared(storage, out)
    if shared is not None:
        check_reachable(shared)
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
    worker = executor or _executor(means, config, folder)
    bench: Run | None = None
    try:
        fingerprints = ask_fingerprints(config, worker, device_table)
        check_token(config, worker, family, seed_arch, dataset)
        if device_table is not None:
            write_rows(folder.path / DEVICE_ROWS, device_table.rows)
        folder.write_run(
            {
                "config": config.to_dict(),
                "command": without_passwords(" ".join(sys.argv)),
                **({} if shared is None else {"storage": shared.to_json()}),
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
            storage=shared,
        )
        _adopt(bench, rows, named=given.get("measurements") is not None)
        return work(bench, trust, fresh=True)
    except InputError as error:
        worker.close()
        if bench is None:
            folder.discard()  # refused before there was anything to keep
        elif not bench.ledger.rows and not isinstance(error, StudyAway):
            bench.ledger.remove()
            folder.discard()
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
    finalists: Path | None,
    trust: int | None,
    storage: str | None,
    means: Means,
) -> Outcome:
    data = folder.open()
    own = executor is None
    worker = executor
    try:
        config = resumed_config(data, given)
        family = get_family(config.family)
        seed_arch = family.arch(config.seed_arch)
        family = freeze(family, seed_arch, config.freeze)
        shared = resumed_shared(data.get("storage"), storage, folder.run_json)
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
        worker = worker or _executor(means, config, folder)
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
            storage=shared,
        )
        _adopt(bench, _rows_before(config, bench.earlier), named=False)
        # It goes on, so the record of an earlier stop is no longer true.
        folder.result_json.unlink(missing_ok=True)
        return work(bench, trust, fresh=False)
    except (KeyboardInterrupt, SystemExit):
        _say_interrupted(folder, console)
        raise
    finally:
        if own and worker is not None:
            worker.close()
        folder.release()


def _executor(means: Means, config: RunConfig, folder: RunDir) -> Executor:
    """Make the run's executor, whose logs go to its folder."""
    return make_executor(means, threads=config.threads, device=config.device, folder=folder.path)


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


def _rows_before(config: RunConfig, earlier: Earlier | None) -> list[MeasurementRow]:
    """Read what a run began with, as far as it is still there."""
    files = [] if config.measurements is None else [Path(config.measurements)]
    if earlier is not None and not config.device_table:
        files.append(earlier.folder / "measurements.csv")
    return [row for file in files if file.is_file() for row in read_measurements(file)]


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
    # A run that was killed while it took them over has the first of them, and goes on from there.
    own_rows = list(bench.timings.rows.rows)
    if own_rows == fitting[: len(own_rows)]:
        for row in fitting[len(own_rows) :]:
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
