"""Contract a seed model to a budget: start or resume a run, take its steps, write its result."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.contract.checks import (
    DEVICE_ROWS,
    add_final_measurements,
    check_augmentation,
    check_files,
    check_possible,
    check_requirements,
    check_same_data,
    check_same_device,
    check_token,
    make_config,
    read_data,
    read_device_table,
    read_fingerprints,
    read_lent_measurements,
    resumed_config,
    run_json,
    with_absolute_paths,
    with_classes,
    with_seed,
    with_steps,
)
from nas.contract.final import RunProgress, finish, read_result, write_result
from nas.contract.flags import Session
from nas.contract.gate import meet_requirements
from nas.contract.models import write_milestone
from nas.contract.plan import Plan, make_plan, plan_text
from nas.contract.proxy_check import check_band, check_proxy_in_time, named_archs
from nas.contract.race import race
from nas.contract.replay import (
    describe_reuse,
    earlier_config,
    load_earlier,
    replayed_config,
    reuse_scores,
    starting_incumbent,
    steps_to_target,
)
from nas.contract.run_folder import RunFolder, default_folder
from nas.contract.seed import best_so_far, expected_cost, prepare_seed, print_config, remove_intermediate_weights
from nas.contract.state import Incumbent, Run
from nas.contract.step import begin_step, end_step, propose, rank, select, stuck_message
from nas.core.cli import path_argument, resume_flags, shell_command
from nas.core.config import parse_count
from nas.core.executor_config import ExecutorConfig
from nas.core.io import write_json
from nas.core.progress import Console
from nas.jobs.executor import make_executor
from nas.jobs.queue import OutOfTime
from nas.measure.device_table import write_rows
from nas.measure.measurement_table import read_measurements
from nas.report import write_report
from nas.search.storage import StudyUnavailable, check_reachable, new_shared, resumed_shared
from nas.search.study import StepRow
from space.errors import InputError, refuse


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    `status` is `reached`, `stuck`, `undecided` (the winner's requirements still are, after `--max-visits`),
    `unverified` (the finalists are only predicted to meet the requirements) or `stopped` (out of time); `exit_code` 0
    or 3; `message` one sentence; `folder` the run's; `result` the content of `result.json`.
    """

    status: str
    exit_code: int
    message: str
    folder: Path
    result: Mapping[str, Any]


def contract(
    seed: str | None = None,
    target_params: str | int | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> RunResult:
    """Contract `seed` to `target_params` and leave everything in the run folder `out`.

    `options` are the fields of `Session`, of `ExecutorConfig` (`workers=2`) and of `nas.core.config.RunConfig`
    (`min_speedup=1.5`, `effort="smoke"`, ...); settings that are not given follow the effort. Workers are programs of
    their own, so a script needs no `__main__` guard. With `resume`, `out` is an earlier run's folder and only settings
    that equal its own may be given. Raises `InputError` (a `ValueError` of one line) on bad input. A run that ends
    stuck or out of time is a result, not an error.
    """
    session, given = _asked(seed, target_params, options)
    hours, finalists = session.max_hours, session.final_measurements
    # Results and records must be on disk before the deadline: a few seconds are theirs.
    deadline = None if hours is None else time.monotonic() + max(hours * 3600 - 5, 0.0)
    if resume:
        if out is None:
            raise refuse("--resume", "no folder", "the folder of a run", "name it: --resume DIR")
        done = finished_result(given, Path(out), session)
        if done is not None:
            return done
    elif finalists is not None:
        raise refuse("--final-measurements", finalists, "an earlier run's --resume", "name the run: --resume DIR")
    elif out is None:
        config = replayed_config(given) if "replay" in given else make_config(given)
        out = default_folder(config.seed, config.target_params)
    with open_run(given, Path(out), session, resume=resume, deadline=deadline) as run:
        return execute(run, session.check_proxy, fresh=not resume)


def plan(seed: str | None = None, target_params: str | int | None = None, **options: Any) -> tuple[Plan, str]:
    """Plan `contract` without training: return the plan, and the same as text.

    Measures for about a minute; keeps only measurements in the cache.
    """
    session, given = _asked(seed, target_params, options)
    if "replay" in given:
        raise refuse("--plan", "--replay too", "a new run", "a replay tells what it reuses itself")
    with (
        tempfile.TemporaryDirectory(prefix="plan-") as place,
        open_run(given, Path(place) / "plan", session, keep=False) as run,
    ):
        made = make_plan(run, check_proxy=session.check_proxy)
        run.study.close()
        return made, plan_text(run, made)


def _asked(seed: str | None, target: str | int | None, options: Mapping[str, Any]) -> tuple[Session, dict[str, Any]]:
    """Return the options of the process, and the settings that the user named, with absolute paths."""
    of_executor, of_session = ({f.name for f in dataclasses.fields(kind)} for kind in (ExecutorConfig, Session))
    # Both have an `executor`: the name of a kind, or one that is made already.
    (of_session if isinstance(options.get("executor"), str) else of_executor).discard("executor")
    named = {name: options[name] for name in of_session & options.keys()}
    if chosen := {name: options[name] for name in of_executor & options.keys()}:
        if "executor_config" in named or "executor" in named:
            raise refuse("executor_config", f"{', '.join(sorted(chosen))} beside it", "one of the two")
        named["executor_config"] = ExecutorConfig(**chosen)
    session = Session(**named)
    given = {name: value for name, value in options.items() if name not in of_session | of_executor}
    if seed is not None:
        given["seed"] = seed
    if target is not None:
        given["target_params"] = parse_count("--target-params", target)
    return session, with_absolute_paths(given)


# Starting a run


def finished_result(given: Mapping[str, Any], out: Path, session: Session) -> RunResult | None:
    """Return the result of a finished run that has nothing left to do, else None."""
    folder = RunFolder(out)
    saved = folder.open()
    try:
        resumed_config(saved, given)
        resumed_shared(saved.get("storage"), session.storage, folder.run_json)
        if session.check_proxy is not None:
            named_archs(out, session.check_proxy)
        if not folder.result_json.exists():
            return None
        result = read_result(folder.result_json)
        waits = result["status"] == "unverified" and session.final_measurements is not None
        wanted = session.check_proxy is not None and not result.get("proxy_check")
        if result["status"] == "stopped" or waits or wanted:
            return None
        if not (out / "report.md").exists():  # killed after the result
            write_report(out)
        return RunResult(result["status"], result["exit_code"], result["message"], out, result)
    finally:
        folder.release()


@contextlib.contextmanager
def open_run(
    given: Mapping[str, Any],
    out: Path,
    session: Session,
    *,
    resume: bool = False,
    keep: bool = True,
    deadline: float | None = None,
) -> Iterator[Run]:
    """Open a run, new or resumed, for a `with` block; the only place where a run starts.

    A new run that is refused before it decided anything leaves no folder; with `keep` off (a plan) it has no `run.json`
    and cannot be resumed. Raises InputError on bad input.
    """
    folder, cache, worker = RunFolder(out), session.cache, session.executor
    console = session.console or Console(quiet=session.quiet)
    run: Run | None = None
    saved = folder.open() if resume else None
    try:
        if saved is not None:
            config = resumed_config(saved, given)
        elif "replay" in given:
            config = replayed_config(given)
        else:
            config = make_config(given, session.executor_config)
        config, family, seed_arch = with_seed(config)
        rows = read_lent_measurements(config, needed=not resume)
        if saved is not None:
            shared = resumed_shared(saved.get("storage"), session.storage, folder.run_json)
        else:
            folder.check_new()
            shared = None if session.storage is None else new_shared(session.storage, out)
            if shared is not None:
                check_reachable(shared)
        if saved is None:
            check_files(config, family, seed_arch, None)
        tables = [Path(path) for path in config.device_table]
        before: Mapping[str, Any] | None = saved
        if before is None and config.replay is not None:
            before = earlier_config(Path(config.replay))[1]
        if tables and before is not None:
            tables = [(out if resume else Path(str(config.replay))) / DEVICE_ROWS]
        config, table = read_device_table(config, tables, family, seed_arch)
        if resume:
            add_final_measurements(out, table, session.final_measurements)
        card = {} if before is None else before.get("dataset", {})
        dataset = with_classes(config, read_data(config, cache, console, card, table), cache, console)
        if table is not None:
            table.check_context(dataset.context)
        if saved is not None:
            check_same_data(config, saved["dataset"], dataset)
        elif "replay" not in given:
            config = with_steps(config, given, family, seed_arch, dataset)
        check_possible(config, family, seed_arch, dataset)
        if session.check_proxy is not None and not (resume and named_archs(out, session.check_proxy)):
            check_band(session.check_proxy, config, family, seed_arch, dataset)
        earlier = load_earlier(config, family, dataset)
        if earlier is not None:
            measured = earlier.folder / "measurements.csv"
            if not tables and measured.is_file():
                # The end of a run is always timed afresh.
                rows += [row for row in read_measurements(measured) if row.role != "final"]
            if not resume and "steps" not in given:
                config = replace(config, steps=steps_to_target(earlier, config, family, dataset))
        if not resume:
            check_requirements(config, family, seed_arch, dataset, table)
            folder.create()
        worker = worker or make_executor(
            session.executor_config, threads=config.threads, device=config.device, folder=out
        )
        fingerprints = read_fingerprints(config, worker, table)
        if saved is not None:
            check_same_device(saved["fingerprints"], fingerprints)
        else:
            check_token(config, worker, family, seed_arch, dataset)
            check_files(config, family, seed_arch, dataset.context, worker, dataset.classes)
            augmentation = check_augmentation(config, worker, dataset, console)
            if table is not None:
                write_rows(out / DEVICE_ROWS, table.rows)
            if keep:
                folder.write_run(run_json(config, dataset, fingerprints, shared, augmentation))
        run = Run(
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
            table=table,
            earlier=earlier,
            storage=shared,
        )
        run.timings.import_rows(rows, named=not resume and "measurements" in given)
        # The run continues, so the record of an earlier stop is no longer true.
        folder.result_json.unlink(missing_ok=True)
        yield run
    except InputError as error:
        if worker is not None:
            worker.close()
        if not resume and (run is None or not (run.study.rows or isinstance(error, StudyUnavailable))):
            if run is not None:
                run.study.remove()
            folder.discard()  # refused before any decision
        raise
    except (KeyboardInterrupt, SystemExit):
        console.stop()
        if folder.run_json.exists():
            command = shell_command("nas.contract", "--resume", path_argument(out))
            console.line(f"interrupted; continue with: {command}")
        else:
            folder.discard()
            console.line("interrupted before the run began; nothing was kept")
        raise
    finally:
        if worker is not None and session.executor is None:
            worker.close()
        folder.release()


# From the seed to the report


def execute(run: Run, check_proxy: int | None = None, *, fresh: bool) -> RunResult:
    """Search and finish as far as time allows, then write the result and the report."""
    console, folder = run.console, run.folder
    progress = RunProgress()
    started = time.monotonic()
    print_config(run, fresh=fresh)
    console.start(expected_cost(run))
    try:
        search(run, progress)
    except OutOfTime:
        taken = progress.steps[-1].step if progress.steps else 0  # a step may have no survivor
        where = f"at step {taken + 1} of {run.config.steps}"
        if taken == run.config.steps:
            where = "in the final comparison"
        progress.message = f"out of time (--max-hours): stopped {where}; {resume_flags(folder.path)} continues"
        progress.best = best_so_far(run, taken)
    finally:
        console.stop()
        with contextlib.suppress(Exception):
            run.executor.close()
    status = progress.status
    result = write_result(run, progress, time.monotonic() - started)
    if check_proxy is not None and progress.final is not None and progress.seed is not None:
        result["proxy_check"] = check_proxy_in_time(run, progress.seed, check_proxy)
        result["work"] = dataclasses.asdict(run.work())
        write_json(folder.result_json, result)
        write_report(folder.path)
    elif check_proxy is not None:
        note = f"proxy check: no report is made of a run that is {status}"
        if status == "stopped":
            note += f"; {resume_flags(folder.path)} --check-proxy {check_proxy} continues"
        console.line(note)
    if status not in ("stopped", "unverified"):
        remove_intermediate_weights(run)
    return RunResult(status, result["exit_code"], progress.message, folder.path, result)


def search(run: Run, progress: RunProgress) -> None:
    """Take all steps from the seed to the final comparison; `progress` records each."""
    seed = progress.seed = prepare_seed(run)
    start, known = seed, []
    if run.earlier is not None:
        known = reuse_scores(run, run.earlier, seed)
        start = seed if known else starting_incumbent(run, run.earlier, seed)
        progress.reused = describe_reuse(run, run.earlier, seed, start, known)
        run.console.line(f"replay: {progress.reused['message']}")
    path, stuck = ([[seed], known], None) if known else contract_steps(run, start, progress.steps)
    progress.path, progress.incumbents = path, path[-1]
    progress.best = path[-1][0]
    if stuck is not None:
        progress.status, progress.message = "stuck", stuck
    else:
        finish(run, seed, progress)


def contract_steps(run: Run, start: Incumbent, rows: list[StepRow]) -> tuple[list[list[Incumbent]], str | None]:
    """Take every step; return all steps' incumbents, and why the run is stuck if it is.

    `rows` collects one row a finished step, for `steps.csv`.
    """
    path = [[start]]
    for number in range(1, run.config.steps + 1):
        step = begin_step(run, number, start, path[-1])
        kept: list[Incumbent] = []
        for draw in range(run.config.max_draws):
            fast_enough = meet_requirements(run, step, propose(run, step, draw))
            kept = rank(run, step, race(run, step, select(run, step, fast_enough)))
            if kept:
                break
        if kept:
            end_step(run, step, kept, rows)
            write_milestone(run, number, kept[0])
            path.append(kept)
        elif run.strategy.stepwise or (number == run.config.steps and len(path) == 1):
            return path, stuck_message(run, step)
        # else the next candidates of a strategy that searches one band may pass
    return path, None
