"""What is checked before a run may begin: settings, data, budget, device (house rule 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.config import RunConfig, flag, with_effort
from nas.core.cpus import usable_cpus
from nas.core.progress import Console
from nas.core.requirement import COUNTED, LATENCIES
from nas.data import Dataset, DataSpec, open_dataset
from nas.data.dataset import EMBEDDED
from nas.data.prepared import prepared
from nas.jobs.executor import Executor, LocalExecutor
from nas.jobs.job import Job, Needs, Result
from nas.jobs.means import Means
from nas.labels import make_store as labelling
from nas.measure.device_table import DeviceTable
from nas.measure.runtimes import check_setting
from nas.search.constraints import band_at, requirements_of, settings_of, usual_steps
from space import Context
from space.errors import InputError, refuse
from space.family import Arch, Family


def make_config(given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a new run from what the user gave, checked."""
    for name, want in (("seed", "where to start, such as 21M"), ("target_params", "such as 5M")):
        if given.get(name) is None:
            raise refuse(flag(name), "nothing", want)
    effort = given.get("effort", "normal")
    settings = with_effort(effort, given)
    settings.setdefault("threads", usable_cpus())
    return RunConfig(**settings)


def with_threads(given: Mapping[str, Any], means: Means) -> dict[str, Any]:
    """Share the usable cores among several workers, unless the threads of each were named."""
    if means.workers is None or "threads" in given or means.ray_address is not None:
        return dict(given)
    return {**given, "threads": max(1, usable_cpus() // means.workers)}


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Make the paths among the settings absolute, so that a resume may start elsewhere."""
    resolved = dict(given)
    for name in ("data", "labels", "measurements", "replay", "seed_weights"):
        value = resolved.get(name)
        # An embedded data set keeps its name even where a folder is called like it.
        if isinstance(value, str) and not (name == "data" and value in EMBEDDED):
            path = Path(value).expanduser()
            if path.exists():
                resolved[name] = str(path.resolve())
    for name in ("require", "freeze"):
        if name in resolved:
            resolved[name] = _texts(flag(name), resolved[name])
    if "device_table" in resolved:
        files = _texts("--device-table", resolved["device_table"])
        resolved["device_table"] = tuple(str(Path(p).expanduser().resolve()) for p in files)
    names = {f.name for f in dataclasses.fields(RunConfig)}
    unknown = sorted(set(resolved) - names)
    if unknown:
        raise refuse("setting", ", ".join(unknown), f"one of {', '.join(sorted(names))}")
    return resolved


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Return a setting of several texts as a tuple; one text alone is one."""
    if isinstance(value, (str, Path)):
        return (str(value),)
    if not isinstance(value, (list, tuple)):
        raise refuse(name, value, "a text, or several")
    return tuple(str(each) for each in value)


def read_data(config: RunConfig, cache: Path, console: Console) -> Dataset:
    """Read and cache the data, and say what it is."""
    spec = DataSpec(
        name=config.data,
        img_size=config.img_size,
        proxy_images=config.proxy_images,
        max_broken=config.max_broken,
        random_seed=config.random_seed,
        pixel_cache=config.pixel_cache,
    )
    return prepared(spec, cache, console)


def with_classes(config: RunConfig, dataset: Dataset, cache: Path, console: Console) -> Dataset:
    """Give images without ground truth the classes that the teacher sees; others stay as they are.

    With `--labels` the teacher is the one that the store was made by. Raises InputError, also where
    trainings should learn from ground truth that is not there.
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
        made_by = labelling.made_by(Path(config.labels))
        asked.update({name: made_by[name] for name in ("teacher", "teacher_epochs", "random_seed")})
    console.count("asking the teacher for classes")
    try:
        with LocalExecutor(threads=config.threads) as worker:

            def do(job: Job) -> Result:
                return worker.run(job, tick=console.advance, heartbeat=console.refresh)

            info = labelling.teach(do, dataset, cache, **asked)["info"]
            folder = labelling.classes_from_teacher(do, dataset, cache, info, config.device)
    finally:
        console.stop()
    console.line(
        f"data: no ground truth; classes are those of {info['id']}, and every top-1 below means "
        "agreement with it"
    )
    return open_dataset(folder)


def with_steps(
    config: RunConfig, given: Mapping[str, Any], family: Family, seed: Arch, dataset: Dataset
) -> RunConfig:
    """Set the usual steps from seed to target, unless the user gave a number."""
    if "steps" in given:
        return config
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    steps = usual_steps(config, family.count_params(seed, context))
    return dataclasses.replace(config, steps=steps)


def check_possible(config: RunConfig, family: Family, seed: Arch, dataset: Dataset) -> None:
    """Refuse a budget that no contraction of the seed can meet, with the reachable range.

    And a seed that images of this size do not fit, and labels of more classes than there are to
    choose from.
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
            known = one.metric in ("speedup", "images_per_s") or (
                one.metric == "latency_ms" and setting.batch == 1
            )
            if one.setting == setting and not known:
                want = "speedup or images_per_s" + (", or latency_ms at batch 1" if latency else "")
                raise refuse("--require", one.text, want, "the device table knows no more")


def ask_fingerprints(
    config: RunConfig, worker: Executor, table: DeviceTable | None
) -> dict[str, Mapping[str, Any]]:
    """Have the worker look at every device; one that is not there, or not working, is refused.

    Returns a fingerprint by device, that of `--device` first. A table's device is not here.
    """
    elsewhere = None if table is None else table.setting
    timed = [setting.device for setting in settings_of(config) if setting != elsewhere]
    found: dict[str, Mapping[str, Any]] = {}
    for device in dict.fromkeys((config.device, *timed)):
        result = worker.run(Job("hello", "hello", {"device": device}, needs=Needs(timed=True)))
        if not result.ok:
            if result.values.get("input_error"):
                raise InputError(result.reason)
            named = flag("device") if device == config.device else "--require"
            raise refuse(named, device, "a device that works", result.reason or "")
        found[device] = result.values["fingerprint"]
    return found


def check_token(
    config: RunConfig, worker: Executor, family: Family, seed: Arch, dataset: Dataset
) -> None:
    """Refuse to teach a distillation token that the seed has not; the worker builds it and looks.

    Candidates may lose theirs: they learn on their one head (`nas.train.teaching`).
    """
    if config.distill != "token":
        return
    context = {"img_size": dataset.img_size, "num_classes": len(dataset.classes)}
    spec = {"family": family.name, "arch": family.to_dict(seed), "context": context}
    result = worker.run(Job("heads", "heads", spec))
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
    """Read `--device-table`; the run is then about that device and setting.

    Returns the configuration with the table's setting as the one of the `--bench` flags.
    """
    if not paths:
        return config, None
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    table = DeviceTable(paths, family, context, seed)
    setting = table.setting
    told = dataclasses.replace(
        config,
        bench_device=setting.device,
        bench_runtime=setting.runtime,
        bench_dtype=setting.dtype,
        bench_batch=setting.batch,
    )
    return told, table
