"""Checks before a run starts: settings, data, budget and device. Each raises InputError."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.augment_config import AugmentConfig
from nas.core.cli import recorded_command, usable_cpus
from nas.core.config import ROUNDS, RunConfig, config_from_dict, flag, steps_of, with_effort
from nas.core.executor_config import ExecutorConfig
from nas.core.progress import Console
from nas.core.provenance import git_commit, versions
from nas.core.requirement import COUNTED
from nas.data import Dataset, DataSpec, open_dataset
from nas.data.dataset import EMBEDDED, check_card_classes, dataset_card
from nas.data.prepare import prepared
from nas.data.sources import DataSource
from nas.distill.label_store import teach
from nas.inherit import jobs as inherit_jobs
from nas.inherit.jobs import CheckFilesJob
from nas.jobs.job import Job, Result
from nas.jobs.local import LocalExecutor
from nas.jobs.queue import Executor
from nas.labels import api as labels
from nas.labels.request import LabelRequest
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
from space.errors import InputError, refuse
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
        raise refuse("run.json: config", repr(error), "the settings of a run", "restore it") from None


def resumed_config(run: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of an earlier run, refusing flags that would change its result.

    `given` holds only the settings of this command line.
    """
    config = saved_config(run["config"])
    for name, value in given.items():
        before = getattr(config, name)
        if value != before:
            remedy = f"drop {flag(name)}, or start a new run in another folder"
            raise refuse(flag(name), f"{value} on a run made with {before}", "the run's own setting", remedy)
    return config


def with_absolute_paths(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with absolute paths, so that a resume may start elsewhere."""
    names = {f.name for f in dataclasses.fields(RunConfig)}
    unknown = sorted(set(given) - names)
    if unknown:
        raise refuse("setting", ", ".join(unknown), f"one of {', '.join(sorted(names))}")
    found = dict(given)
    for name in ("data", "annotations", "labels", "measurements", "replay", "seed_weights"):
        value = found.get(name)
        # An embedded data set keeps its name even where a folder is called like it.
        if isinstance(value, str) and not (name == "data" and value in EMBEDDED):
            path = Path(value).expanduser()
            if path.exists():
                found[name] = str(path.resolve())
    for name in {"require", "freeze", "device_table"} & set(found):
        found[name] = _texts(flag(name), found[name])
    if "device_table" in found:
        found["device_table"] = tuple(str(Path(p).expanduser().resolve()) for p in found["device_table"])
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


def read_data(
    config: RunConfig,
    cache: Path,
    console: Console,
    card: Mapping[str, Any] | None = None,
    table: DeviceTable | None = None,
) -> Dataset:
    """Read and cache the data, and print what it is.

    Before an image is decoded its classes are matched to those of the run that it resumes or replays (`card`, its
    record of the data), of the device table and of the label store.
    """

    def check(source: DataSource) -> None:
        if not source.classes:
            return
        check_card_classes(card or {}, source.classes, "the run")
        if table is not None:
            table.check_context(Context(source.img_size, len(source.classes)))
        if config.labels is not None:
            labels.check_source(config.labels, source)

    spec = DataSpec.of(config, config.random_seed, images_may_grow=config.images_may_grow)
    return prepared(spec, cache, console, check)


def teacher_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide a run's teacher."""
    names = ("teacher", "teacher_epochs", "random_seed", "device", "threads")
    return {**{name: getattr(config, name) for name in names}, "augment": AugmentConfig.of(config).given}


def label_request(config: RunConfig, epochs: int) -> LabelRequest:
    """Return the request for a run's own labels, of so many epochs."""
    augment = {f.name: getattr(config, f.name) for f in dataclasses.fields(AugmentConfig)}
    return LabelRequest(
        **augment,
        epochs=epochs,
        topk=config.topk,
        codec=config.codec,
        augment=config.augment,
        salt=config.random_seed,
        device=config.device,
        threads=config.threads,
    )


def check_augmentation(config: RunConfig, worker: Executor, dataset: Dataset, console: Console) -> dict[str, Any]:
    """Refuse an augmentation that does not exist or that contradicts `--labels`; print and return what it is."""
    request = label_request(config, config.label_epochs or 1)
    checked = dict(labels.check(worker.run, dataset, request, config.labels))
    for line in (f"augmentation: {checked['augmentation']}", *checked["notes"]):
        console.line(line)
    return checked


def with_classes(config: RunConfig, dataset: Dataset, cache: Path, console: Console) -> Dataset:
    """Return the data set, with the teacher's classes where images have no ground truth.

    With `--labels` the teacher is that of the store. Trainings that need ground truth are refused.
    """
    if dataset.labelled:
        return dataset
    if config.distill != "sparse":
        got = f"{config.distill} on images without ground truth"
        want = "sparse, which learns from the teacher alone"
        raise refuse(flag("distill"), got, want, "or sort the images by class")
    asked = teacher_settings(config)
    if config.labels is not None:
        made_by = labels.made_by(Path(config.labels))
        asked.update({name: made_by[name] for name in ("teacher", "teacher_epochs", "random_seed")})
        asked["augment"] = made_by.get("augment", {})
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
        f"data: no ground truth; classes are those of {info['id']}, and every top-1 below is agreement with it"
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
    return dataclasses.replace(config, steps=usual_steps(config, family.count_params(seed, dataset.context)))


def check_possible(config: RunConfig, family: Family, seed: Arch, dataset: Dataset) -> None:
    """Refuse a budget that no contraction of the seed can meet, with the reachable range.

    Also a seed that cannot be built for images of this size, and a `--topk` above the classes.
    """
    context = dataset.context
    family.check(seed, context)
    seed_params = family.count_params(seed, context)
    floor = family.count_params(family.floor(seed, context), context)
    band = band_at(seed_params, config, config.steps)
    got, remedy = f"{config.target_params:,}", ""
    if band.lo >= seed_params:
        got += f", not below the seed's {seed_params:,}"
        remedy = "ask for fewer, or start from a larger --seed"
    elif band.hi < floor:
        remedy = f"the smallest contraction of {config.seed} has {floor:,}"
    if remedy:
        reach = f"{floor:,} to {seed_params - 1:,} parameters at {context.num_classes} classes"
        raise refuse(flag("target_params"), got, reach, remedy)
    most = context.num_classes - 1
    if config.labels is None and config.topk is not None and config.topk > most:
        raise refuse(flag("topk"), config.topk, f"1 to {most} (classes - 1)")


def check_requirements(
    config: RunConfig, family: Family, seed: Arch, dataset: Dataset, table: DeviceTable | None
) -> None:
    """Refuse requirements that contradict, cannot be measured here or cannot be counted down to."""
    required = requirements_of(config)
    asked = [(r.metric, r.setting) for r in required]
    floor = family.floor(seed, dataset.context)
    for one in required:
        if asked.count((one.metric, one.setting)) > 1:
            raise refuse("--require", one.text, "each metric once a setting", "drop one of the two")
        if one.metric in COUNTED:
            count = family.count_params if one.metric == "params" else family.count_macs
            least = count(floor, dataset.context)
            if one.bound < least:
                remedy = f"the smallest contraction of {config.seed} has {least:,}"
                raise refuse("--require", one.text, f"{one.metric}<={least} or more", remedy)
    for setting in settings_of(config):
        if table is None or setting != table.setting:
            check_setting(setting, "--require" if config.require else "--bench-runtime")
            continue
        there = ("speedup", "images_per_s", *(("latency_ms",) if setting.batch == 1 else ()))
        for one in required:
            if one.setting == setting and one.metric not in there:
                want = "speedup, images_per_s, or latency_ms at batch 1"
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


def check_files(
    config: RunConfig,
    family: Family,
    seed: Arch,
    context: Context | None,
    worker: Executor | None = None,
    classes: tuple[str, ...] = (),
) -> None:
    """Open the weights, the teacher and the label store that the run will need, and match them.

    Before the data are known (`context` None, no `classes`) a worker of this machine does, if there is anything to
    open.
    """
    teacher = config.teacher if config.labels is None and config.teacher != "auto" else None
    if config.seed_weights is None and (context is not None or (teacher is None and config.labels is None)):
        return
    job = CheckFilesJob(
        family=family.name,
        arch=family.to_dict(seed),
        context=context,
        classes=classes,
        weights=config.seed_weights,
        teacher=teacher if context is None else None,
        store=config.labels if context is None else None,
    )
    with contextlib.ExitStack() as stack:
        executor = worker or stack.enter_context(LocalExecutor(threads=1))
        result = executor.run(Job(inherit_jobs.check_files, job, "check-files"))
    if not result.ok:
        raise InputError(result.reason if result.values.get("input_error") else f"its files: {result.reason}")


def check_token(config: RunConfig, worker: Executor, family: Family, seed: Arch, dataset: Dataset) -> None:
    """Refuse `--distill token` for a seed without a distillation token; a worker builds it.

    Candidates may lose theirs: they learn on their one head (`nas.train.losses`).
    """
    if config.distill != "token":
        return
    job = HeadsJob(family=family.name, arch=family.to_dict(seed), context=dataset.context)
    result = worker.run(Job(heads, job, "heads"))
    if not result.ok or not result.values["token"]:
        remedy = result.reason or "hard learns from the teacher's class without one"
        raise refuse(flag("distill"), f"token for {config.seed}", "a seed with a distillation token", remedy)


def read_device_table(
    config: RunConfig, paths: Sequence[Path], family: Family, seed: Arch
) -> tuple[RunConfig, DeviceTable | None]:
    """Read `--device-table`; return the configuration with its setting, and the table.

    The table's setting replaces that of the `--bench` flags.
    """
    if not paths:
        return config, None
    table = DeviceTable(paths, family, None, seed)
    setting = {f"bench_{name}": value for name, value in dataclasses.asdict(table.setting).items()}
    return dataclasses.replace(config, **setting), table


def check_same_data(config: RunConfig, card: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse to resume a run on other data than its own, of which `card` is the record."""
    if dataset.labelled_by is None:
        check_card_classes(card, dataset.classes, "the run")
    known = card["fingerprint"]
    if dataset.fingerprint != known:
        got = f"{config.data} with fingerprint {dataset.fingerprint}"
        raise refuse("--data", got, f"the run's own data, {known}", "restore the data or start a new run")


def check_same_device(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to resume a run on another device or software than that of its measurements."""
    for device, fingerprint in now.items():
        known = before.get(device, {})
        if known.get("id") == fingerprint["id"]:
            continue
        names = [name for name in fingerprint if name != "id" and known.get(name) != fingerprint[name]]
        changed = "; ".join(f"{name} {known.get(name)} -> {fingerprint[name]}" for name in names)
        want = "that of the run's measurements"
        remedy = "resume there, or start a new run here"
        raise refuse("--resume", f"another device or software ({changed})", want, remedy)


def add_final_measurements(out: Path, table: DeviceTable | None, finalists: str | Path | None) -> None:
    """Keep the finalists' measurements in the run's folder and add them to its device table."""
    kept, named = out / FINALIST_ROWS, "--final-measurements"
    if finalists is not None:
        if table is None:
            raise refuse(named, finalists, "a run with a --device-table", f"drop {named}")
        rows = read_rows(Path(finalists), named)
        table.add_finalists(rows, named)
        write_rows(kept, rows)
    elif table is not None and kept.exists():
        table.add_finalists(read_rows(kept, named), str(kept))


def run_json(
    config: RunConfig,
    dataset: Dataset,
    fingerprints: Mapping[str, Mapping[str, Any]],
    shared: SharedStudy | None,
    augmentation: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what `run.json` records of a new run."""
    return {
        "config": config.to_dict(),
        "command": recorded_command(sys.argv),
        **({} if shared is None else {"storage": shared.to_json()}),
        "git": git_commit(),
        "versions": versions(),
        "fingerprint": dict(fingerprints[config.device]),
        "fingerprints": {name: dict(of) for name, of in fingerprints.items()},
        "dataset": dataset_card(dataset),
        **augmentation,
    }
