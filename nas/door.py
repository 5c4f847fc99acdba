"""What is checked before a run may begin: settings, data, budget, device (house rule 2)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas import labelling
from nas.config import RunConfig, flag, with_effort
from nas.data import Dataset, DataSpec, open_dataset, prepare
from nas.data.values import EMBEDDED
from nas.executor import InlineExecutor, LocalExecutor
from nas.jobs import Job, Result
from nas.progress import Console
from nas.search.constraints import band_at
from space import Context
from space.errors import InputError, refuse
from space.family import Arch, Family


def make_config(given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a new run from what the user gave, checked."""
    effort = given.get("effort", "normal")
    settings = with_effort(effort, given)
    settings.setdefault("threads", usable_cpus())
    return RunConfig(**settings)


def usable_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Make the paths among the settings absolute, so that a resume may start elsewhere."""
    resolved = dict(given)
    for name in ("data", "labels", "measurements", "seed_weights"):
        value = resolved.get(name)
        # An embedded data set keeps its name even where a folder is called like it.
        if isinstance(value, str) and not (name == "data" and value in EMBEDDED):
            path = Path(value).expanduser()
            if path.exists():
                resolved[name] = str(path.resolve())
    names = {f.name for f in dataclasses.fields(RunConfig)}
    unknown = sorted(set(resolved) - names)
    if unknown:
        raise refuse("setting", ", ".join(unknown), f"one of {', '.join(sorted(names))}")
    return resolved


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


def prepared(spec: DataSpec, cache: Path, console: Console) -> Dataset:
    """Prepare a data set under a bar, and say what it is."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse("--cache-dir", cache, "a folder to write in", str(error)) from None
    console.count("reading images")
    try:
        dataset = prepare(spec, cache, console.advance)
    finally:
        console.stop()
    for note in dataset.notes:
        console.line(f"data: {note}")
    console.line(
        f"data: {dataset.name}, {len(dataset.classes) or 'no'} classes at {dataset.img_size} px: "
        f"{len(dataset.train.labels)} to train, {len(dataset.holdout.labels)} holdout, "
        f"{len(dataset.test.labels)} test"
    )
    return dataset


def with_classes(config: RunConfig, dataset: Dataset, cache: Path, console: Console) -> Dataset:
    """Give images without ground truth the classes that the teacher sees; others stay as they are.

    With `--labels` the teacher is the one that the store was made by. Raises InputError.
    """
    if dataset.labelled:
        return dataset
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


def check_possible(config: RunConfig, family: Family, seed: Arch, dataset: Dataset) -> None:
    """Refuse a budget that no contraction of the seed can meet, with the reachable range."""
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
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


def ask_fingerprint(config: RunConfig, worker: LocalExecutor | InlineExecutor) -> Mapping[str, Any]:
    """Have the worker look at the device; one that is not there, or not working, is refused."""
    result = worker.run(Job("hello", "hello", {"device": config.device}))
    if not result.ok:
        if result.values.get("input_error"):
            raise InputError(result.reason)
        raise refuse(flag("device"), config.device, "a device that works", result.reason or "")
    fingerprint: Mapping[str, Any] = result.values["fingerprint"]
    return fingerprint
