"""Checks before a run starts: settings, data, budget and device. Each raises InputError."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.cli import usable_cpus
from nas.core.config import ROUNDS, RunConfig, config_from_dict, flag, steps_of, with_effort
from nas.core.executor_config import ExecutorConfig
from nas.core.progress import Console
from nas.core.provenance import git_commit, versions
from nas.core.requirement import COUNTED, LATENCIES
from nas.data import Dataset, DataSpec, open_dataset
from nas.data.dataset import EMBEDDED, dataset_card
from nas.data.prepare import prepared
from nas.distill.label_store import teach
from nas.jobs.job import Job, Result
from nas.jobs.local import LocalExecutor
from nas.jobs.queue import Executor
from nas.labels import api as labels
from nas.measure import jobs as measure_jobs
from nas.measure.device_table import DeviceTable, read_rows, write_rows
from nas.measure.jobs import FingerprintJob
from nas.measure.measurement_table import MeasurementRow, read_measurements
from nas.measure.runtimes import check_setting
from nas.search.constraints import band_at, requirements_of, settings_of
from nas.search.storage import SharedStudy
from nas.search.strategies import get_strategy
from nas.train.jobs import HeadsJob, heads
from space import Context, get_family
from space.errors import InputError, refuse, without_passwords
from space.family import Arch, Family
from space.freeze import freeze

DEVICE_ROWS, FINALIST_ROWS = "device_table.csv", "finalists_measured.csv"
"""Files of a run with `--device-table`: a copy of it, and the finalists' measurements."""


def make_config(given: Mapping[str, Any], executor_config: ExecutorConfig | None = None) -> RunConfig:
    """Return the configuration of a new run from what the user gave, checked.

    Several workers on this machine share the usable cores, unless the user sets the threads.
    """
    for name, want in (("seed", "where to start, such as 21M"), ("target_params", "such as 5M")):
        if given.get(name) is None:
            raise refuse(flag(name), "nothing", want)
    settings = with_effort(given.get("effort", "normal"), given)
    workers = 1
    if executor_config is not None and executor_config.ray_address is None:
        workers = executor_config.workers or 1
    settings.setdefault("threads", max(1, usable_cpus() // workers))
    return RunConfig(**settings)


def with_seed(config: RunConfig) -> tuple[RunConfig, Family, Arch]:
    """Return the configuration with its seed arch in it, the family as frozen, and that arch."""
    family = get_family(config.family)
    known = config.seed_arch
    seed_arch = family.arch(known) if known else family.seed(config.seed)
    frozen = freeze(family, seed_arch, config.freeze)
    return dataclasses.replace(config, seed_arch=frozen.to_dict(seed_arch)), frozen, seed_arch


def saved_config(config: Any) -> RunConfig:
    """Read the settings in a `run.json`; ill-typed ones are refused in one line."""
    try:
        return config_from_dict(config)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise refuse("run.json: config", got, "the settings of a run", "restore it") from None


def resumed_config(run: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of an earlier run, refusing flags that would change its result.

    `given` holds only the settings of this command line.
    """
    config = saved_config(run["config"])
    for name, value in given.items():
        before = getattr(config, name)
        if isinstance(before, tuple):
            before, value = list(before), list(value)
        if value != before:
            raise refuse(
                flag(name),
                f"{value} on a run made with {before}",
                "the run's own setting",
                f"drop {flag(name)}, or start a new run in another folder",
            )
    return config


def with_absolute_paths(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with absolute paths, so that a resume may start elsewhere."""
    found = dict(given)
    for name in ("data", "labels", "measurements", "replay", "seed_weights"):
        value = found.get(name)
        # An embedded data set keeps its name even where a folder is called like it.
        if isinstance(value, str) and not (name == "data" and value in EMBEDDED):
            path = Path(value).expanduser()
            if path.exists():
                found[name] = str(path.resolve())
    for name in ("require", "freeze"):
        if name in found:
            found[name] = _texts(flag(name), found[name])
    if "device_table" in found:
        files = _texts("--device-table", found["device_table"])
        found["device_table"] = tuple(str(Path(p).expanduser().resolve()) for p in files)
    names = {f.name for f in dataclasses.fields(RunConfig)}
    unknown = sorted(set(found) - names)
    if unknown:
        raise refuse("setting", ", ".join(unknown), f"one of {', '.join(sorted(names))}")
    return found


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Return a setting of several texts as a tuple; one text alone is one."""
    if isinstance(value, (str, Path)):
        return (str(value),)
    if not isinstance(value, (list, tuple)):
        raise refuse(name, value, "a text, or several")
    return tuple(str(each) for each in value)


def read_lent_measurements(config: RunConfig, *, needed: bool) -> list[MeasurementRow]:
    """Read the file of `--measurements`; unless it is `needed`, one that is gone holds none."""
    if config.measurements is None or not (needed or Path(config.measurements).is_file()):
        return []
    return list(read_measurements(Path(config.measurements)))


def read_data(config: RunConfig, cache: Path, console: Console) -> Dataset:
    """Read and cache the data, and print what it is."""
    return prepared(DataSpec.of(config, config.random_seed), cache, console)


def with_classes(config: RunConfig, dataset: Dataset, cache: Path, console: Console) -> Dataset:
    """Return the data set, with the teacher's classes where images have no ground truth.

    With `--labels` the teacher is that of the store. Trainings that need ground truth are refused.
    """
    if dataset.labelled:
        return dataset
    if config.distill != "sparse":
        raise refuse(
            flag("distill"),
            f"{config.distill} on images without ground truth",
            "sparse, which learns from the teacher alone",
            "or sort the images by class",
        )
    asked: dict[str, Any] = {
        "teacher": config.teacher,
        "teacher_epochs": config.teacher_epochs,
        "random_seed": config.random_seed,
        "device": config.device,
        "threads": config.threads,
    }
    if config.labels is not None:
        made_by = labels.made_by(Path(config.labels))
        asked.update({name: made_by[name] for name in ("teacher", "teacher_epochs", "random_seed")})
    console.count("asking the teacher for classes")
    try:
        with LocalExecutor(threads=config.threads) as worker:

            def do(job: Job) -> Result:
                return worker.run(job, tick=console.advance, heartbeat=console.refresh)

            info = teach(do, dataset, cache, **asked)["info"]
            folder = labels.classes_from_teacher(do, dataset, cache, info, config.device)
    finally:
        console.stop()
    console.line(
        f"data: no ground truth; classes are those of {info['id']}, and every top-1 below executor agreement with it"
    )
    return open_dataset(folder)


def usual_steps(config: RunConfig, params: int) -> int:
    """Return the steps from a number of parameters to the target, where the user gave none.

    More for a larger distance; the effort's number of rounds for a strategy that is not stepwise.
    """
    if not get_strategy(config.strategy).stepwise:
        return ROUNDS[config.effort]
    return steps_of(config.effort, params, config.target_params)


def with_steps(config: RunConfig, given: Mapping[str, Any], family: Family, seed: Arch, dataset: Dataset) -> RunConfig:
    """Set the usual steps from seed to target, unless the user gave a number."""
    if "steps" in given:
        return config
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    steps = usual_steps(config, family.count_params(seed, context))
    return dataclasses.replace(config, steps=steps)


def check_possible(config: RunConfig, family: Family, seed: Arch, dataset: Dataset) -> None:
    """Refuse a budget that no contraction of the seed can meet, with the reachable range.

    Also a seed that cannot be built for images of this size, and a `--topk` above the classes.
    """
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    family.check(seed, context)
    seed_params = family.count_params(seed, context)
    floor = family.count_params(family.floor(seed, context), context)
    band = band_at(seed_params, config, config.steps)
    reach = f"{floor:,} to {seed_params - 1:,} parameters at {context.num_classes} classes"
    if band.lo >= seed_params:
        raise refuse(
            flag("target_params"),
            f"{config.target_params:,}, not below the seed's {seed_params:,}",
            reach,
            "ask for fewer, or start from a larger --seed",
        )
    if band.hi < floor:
        raise refuse(
            flag("target_params"),
            f"{config.target_params:,}",
            reach,
            f"the smallest contraction of {config.seed} has {floor:,}",
        )
    most = len(dataset.classes) - 1
    if config.labels is None and config.topk is not None and config.topk > most:
        raise refuse(flag("topk"), config.topk, f"1 to {most} (classes - 1)")


def check_requirements(
    config: RunConfig, family: Family, seed: Arch, dataset: Dataset, table: DeviceTable | None
) -> None:
    """Refuse requirements that contradict, cannot be measured here or cannot be counted down to."""
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    required = requirements_of(config)
    asked = [(r.metric, r.setting) for r in required]
    for one in required:
        if asked.count((one.metric, one.setting)) > 1:
            raise refuse("--require", one.text, "each metric once a setting", "drop one of the two")
    floor = family.floor(seed, context)
    for one in required:
        if one.metric in COUNTED:
            count = family.count_params if one.metric == "params" else family.count_macs
            least = count(floor, context)
            if one.bound < least:
                remedy = f"the smallest contraction of {config.seed} has {least:,}"
                raise refuse("--require", one.text, f"{one.metric}<={least} or more", remedy)
    for setting in settings_of(config):
        if table is None or setting != table.setting:
            check_setting(setting, "--require" if config.require else "--bench-runtime")
            continue
        for one in required:
            latency = one.metric in LATENCIES
            known = one.metric in ("speedup", "images_per_s") or (one.metric == "latency_ms" and setting.batch == 1)
            if one.setting == setting and not known:
                want = "speedup or images_per_s" + (", or latency_ms at batch 1" if latency else "")
                raise refuse("--require", one.text, want, "the device table has no more")


def read_fingerprints(config: RunConfig, worker: Executor, table: DeviceTable | None) -> dict[str, Mapping[str, Any]]:
    """Return a fingerprint by device, that of `--device` first; a missing device is refused.

    The device of a device table is left out.
    """
    elsewhere = None if table is None else table.setting
    timed = [setting.device for setting in settings_of(config) if setting != elsewhere]
    found: dict[str, Mapping[str, Any]] = {}
    for device in dict.fromkeys((config.device, *timed)):
        job = FingerprintJob(device=device)
        result = worker.run(Job(measure_jobs.fingerprint, job, "hello", timed=True))
        if not result.ok:
            if result.values.get("input_error"):
                raise InputError(result.reason)
            named = flag("device") if device == config.device else "--require"
            raise refuse(named, device, "a device that works", result.reason or "")
        found[device] = result.values["fingerprint"]
    return found


def check_token(config: RunConfig, worker: Executor, family: Family, seed: Arch, dataset: Dataset) -> None:
    """Refuse `--distill token` for a seed without a distillation token; a worker builds it.

    Candidates may lose theirs: they learn on their one head (`nas.train.losses`).
    """
    if config.distill != "token":
        return
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    job = HeadsJob(family=family.name, arch=family.to_dict(seed), context=context)
    result = worker.run(Job(heads, job, "heads"))
    if not result.ok or not result.values["token"]:
        raise refuse(
            flag("distill"),
            f"token for {config.seed}",
            "a seed with a distillation token",
            result.reason or "hard learns from the teacher's class without one",
        )


def read_device_table(
    config: RunConfig, paths: Sequence[Path], family: Family, seed: Arch, dataset: Dataset
) -> tuple[RunConfig, DeviceTable | None]:
    """Read `--device-table`; return the configuration with its setting, and the table.

    The table's setting replaces that of the `--bench` flags.
    """
    if not paths:
        return config, None
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    table = DeviceTable(paths, family, context, seed)
    setting = table.setting
    updated = dataclasses.replace(
        config,
        bench_device=setting.device,
        bench_runtime=setting.runtime,
        bench_dtype=setting.dtype,
        bench_batch=setting.batch,
    )
    return updated, table


def check_same_data(config: RunConfig, known: str, dataset: Dataset) -> None:
    """Refuse to resume a run on other data than its own."""
    if dataset.fingerprint != known:
        raise refuse(
            "--data",
            f"{config.data} with fingerprint {dataset.fingerprint}",
            f"the run's own data, {known}",
            "restore the data or start a new run",
        )


def check_same_device(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to resume a run on another device or software than that of its measurements."""
    for device, fingerprint in now.items():
        known = before.get(device, {})
        if known.get("id") == fingerprint["id"]:
            continue
        changed = [
            f"{name} {known.get(name)} -> {value}"
            for name, value in fingerprint.items()
            if name != "id" and known.get(name) != value
        ]
        raise refuse(
            "--resume",
            f"another device or software ({'; '.join(changed)})",
            "that of the run's measurements",
            "resume there, or start a new run here",
        )


def add_final_measurements(out: Path, table: DeviceTable | None, finalists: Path | None) -> None:
    """Keep the finalists' measurements in the run's folder and add them to its device table."""
    kept = out / FINALIST_ROWS
    if finalists is not None:
        if table is None:
            want = "a run with a --device-table"
            raise refuse("--final-measurements", finalists, want, "drop --final-measurements")
        rows = read_rows(finalists, "--final-measurements")
        table.add_finalists(rows, "--final-measurements")
        write_rows(kept, rows)
    elif table is not None and kept.exists():
        table.add_finalists(read_rows(kept, "--final-measurements"), str(kept))


def run_json(
    config: RunConfig, dataset: Dataset, fingerprints: Mapping[str, Mapping[str, Any]], shared: SharedStudy | None
) -> dict[str, Any]:
    """Return what `run.json` records of a new run."""
    return {
        "config": config.to_dict(),
        "command": " ".join(map(without_passwords, sys.argv)),
        **({} if shared is None else {"storage": shared.to_json()}),
        "git": git_commit(),
        "versions": versions(),
        "fingerprint": dict(fingerprints[config.device]),
        "fingerprints": {name: dict(of) for name, of in fingerprints.items()},
        "dataset": dataset_card(dataset),
    }
