"""The commands that make most sense after a run, with every setting that they need on its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nas.core.augment_config import AugmentConfig
from nas.core.cli import path_argument, shell_command
from nas.core.config import RunConfig, effort_defaults
from nas.core.data_config import DataConfig, grown_images
from nas.core.requirement import parse_requirement
from nas.core.settings import as_flags
from nas.report.read import RunFiles, number, section
from nas.report.tables import short_count
from space import Context, get_family
from space.errors import InputError
from space.freeze import freeze

CONTRACT = "nas.contract"
SMALLER = 0.8
"""The next target's share of this run's."""
_OF_THE_WAY = {"seed", "target_params", "min_speedup", "effort", "steps", "threads", "measurements", "replay"}
"""Settings that a next contraction sets anew, or that were for this run alone."""


def next_commands(run: RunFiles) -> tuple[str, ...]:
    """Return the commands that make most sense after this run, the first first."""
    config, status = run.config, run.result.get("status")
    folder = path_argument(run.folder)
    if status == "reached":
        return tuple(_after_success(run, folder))
    if status == "stuck":
        target, bound = number(config, "target_params") or 0, number(config, "min_speedup")
        again = ["--seed", config.get("seed", "21M"), "--target-params", short_count(target), "--effort", "high"]
        if bound is not None:
            again += ["--min-speedup", f"{1 + (bound - 1) / 2:.3g}"]
        if config.get("labels") is not None:  # a longer effort needs more epochs than a store may have
            again += [] if config.get("label_overflow") == "cycle" else ["--label-overflow", "cycle"]
        again += _settings(run, set())
        return shell_command(CONTRACT, *again), shell_command("benchmarks.pareto", folder)
    more = ["--final-measurements", "finalists.csv"] if status == "unverified" else []
    return shell_command(CONTRACT, "--resume", folder, *more), shell_command(CONTRACT, "--status", folder)


def _after_success(run: RunFiles, folder: str) -> Iterator[str]:
    config = run.config
    yield shell_command("nas.export", folder, "--to", "timm", "--out", _free(run, "timm"))
    if section(run.run, "dataset").get("labelled_by") is None:  # a full training needs true classes
        data: dict[str, Any] = {"img_size": run.img_size, "max_images": _images(run)}
        data = {name: config.get(name) for name in (f.name for f in fields(DataConfig)) if name in config} | data
        chosen = ["--arch", folder, *as_flags(RunConfig, data, {"max_images": None}), "--init"]
        seed = config.get("random_seed") or 0
        chosen += [
            f"{folder}/best.safetensors",
            *as_flags(AugmentConfig, config, {}),
            *(["--data-seed", str(seed)] if seed else []),
        ]
        if "--data" not in chosen:
            chosen += ["--data", str(config.get("data", RunConfig.data))]
        yield shell_command("nas.train", *chosen, "--out", _free(run, "trained"))
    target = SMALLER * (number(config, "target_params") or 0)
    if config.get("device_table") or not _reachable(run, target):
        return
    further = ["--seed", f"{folder}/best.json", "--target-params", short_count(target)]
    if config.get("effort", RunConfig.effort) != RunConfig.effort:
        further += ["--effort", str(config["effort"])]
    yield shell_command(CONTRACT, *further, *_settings(run, {"require"}), *_absolute_bounds(config))


def _settings(run: RunFiles, left_out: set[str]) -> list[str]:
    """Return the flags of the settings that the user changed and a next contraction keeps."""
    config = dict(run.config)
    usual = effort_defaults(str(config.get("effort", RunConfig.effort)))
    for name in usual.keys() & config.keys():
        if config[name] == usual[name]:
            del config[name]
    for name in ("img_size", "max_images"):  # the next run looks at the same images
        if run.config.get(name) is not None:
            config[name] = run.img_size if name == "img_size" else _images(run)
    kept = {name: value for name, value in config.items() if name not in _OF_THE_WAY | left_out}
    return as_flags(RunConfig, {"data": RunConfig.data, **kept}, {"data": None, "img_size": None, "max_images": None})


def _absolute_bounds(config: Mapping[str, Any]) -> list[str]:
    """Return the requirements that do not compare with the seed, which will be another."""
    found: list[str] = []
    for text in config.get("require") or ():
        required = parse_requirement(
            text,
            dtype=config.get("bench_dtype", RunConfig.bench_dtype),
            batch=config.get("bench_batch", RunConfig.bench_batch),
        )
        found += [] if required.metric == "speedup" else ["--require", text]
    return found


def _images(run: RunFiles) -> int | None:
    """Return how many images were asked for, with what a default grew to."""
    asked, effort = number(run.config, "max_images"), str(run.config.get("effort", RunConfig.effort))
    if asked is None:
        return None
    if asked != effort_defaults(effort)["max_images"]:
        return int(asked)
    return grown_images(int(asked), int(number(section(run.run, "dataset"), "classes") or 0))


def _reachable(run: RunFiles, target: float) -> bool:
    """Return whether a contraction of the winner can be that small."""
    config, saved = run.config, run.best
    try:
        family = get_family(str(saved.get("family", RunConfig.family)))
        best = family.arch(section(saved, "arch"))
        context = Context(int(number(saved, "img_size") or 0), int(number(saved, "num_classes") or 0))
        family = freeze(family, best, tuple(config.get("freeze") or ()))
    except InputError:  # nothing is left to contract, or no model
        return False
    floor = family.count_params(family.floor(best, context), context)
    return floor <= target * (1 + float(config.get("params_tolerance", RunConfig.params_tolerance)))


def _free(run: RunFiles, end: str) -> str:
    """Return a name for a new folder here."""
    stem = f"{run.folder.resolve().name or 'run'}-{end}"
    found = (Path(stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return path_argument(next((path for path in found if not path.exists()), stem))
