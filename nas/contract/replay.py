"""What an earlier run has to say to another question: `--replay`.

A run's ledger holds scores of archs of all sizes, and its `family/` the models that its steps
started from. A new target or throughput is answered from there: by archs that were scored already
and meet it, or by steps that start from the nearest larger model instead of from the seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.contract.checks import saved_config
from nas.contract.run_folder import SCHEMA
from nas.core.config import RunConfig, flag
from nas.core.io import read_json
from nas.search.constraints import PACE, bench_setting, requirements_of
from nas.search.study import Trial, read_study
from space.contractions import Band
from space.errors import InputError, refuse
from space.family import Arch, Family

NEW_QUESTION = (
    "target_params",
    "params_tolerance",
    "min_throughput",
    "min_speedup",
    "require",
    "steps",
    "shortlist",
    "proxied",
    "beam",
    "choose",
    "draws",
    "final_epochs",
    "replay",
)
"""Settings that a replay may change; all others decide what the earlier scores mean."""


@dataclass(frozen=True)
class Milestone:
    """A trained model that an earlier run left in its `family/`."""

    arch: Arch
    params: int
    step: int
    weights: Path
    score: Mapping[str, Any]


@dataclass(frozen=True)
class Earlier:
    """An earlier run: its folder, configuration, scored rows with their archs, and its models.

    `before` is the run that it replayed itself, where that is still there.
    """

    folder: Path
    config: RunConfig
    data: Mapping[str, Any]
    scored: tuple[tuple[Trial, Arch], ...]
    milestones: tuple[Milestone, ...]
    before: Earlier | None = None


def earlier_config(folder: Path) -> tuple[RunConfig, Mapping[str, Any]]:
    """Read an earlier run's configuration and `run.json`; what is no run is refused."""
    path = folder / "run.json"
    if not path.is_file():
        raise refuse(
            "--replay",
            folder,
            "a folder with a run in it (a run.json)",
            "name the --out folder of an earlier run",
        )
    data = read_json(path, "the run.json of a run")
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "config" not in data:
        raise refuse(str(path), "another format", f"schema {SCHEMA}", "replay a newer run")
    return saved_config(data["config"]), data


def replayed_config(given: Mapping[str, Any]) -> RunConfig:
    """Return the earlier run's configuration with a new question in it.

    Settings that would change what the earlier scores mean are refused. The number of steps
    follows the distance, unless it is given.
    """
    config, _ = earlier_config(Path(given["replay"]))
    for name, value in given.items():
        before = getattr(config, name)
        if name not in NEW_QUESTION and value != before:
            raise refuse(
                flag(name),
                f"{value} with --replay of a run made with {before}",
                "the earlier run's own setting",
                f"drop {flag(name)}, or start a new run",
            )
    # The earlier run's own measurements hold what it took from another run's file.
    lent = config.measurements
    if "measurements" not in given and lent is not None and not Path(lent).exists():
        config = replace(config, measurements=None)
    # A new pace replaces the old one there; all other bounds stand. New bounds replace all.
    if "require" in given:
        config = replace(config, min_throughput=None, min_speedup=None, require=())
    elif "min_throughput" in given or "min_speedup" in given:
        config = replace(config, min_throughput=None, min_speedup=None)
        here = bench_setting(config)
        kept = [r for r in requirements_of(config) if r.metric not in PACE or r.setting != here]
        config = replace(config, require=tuple(r.text for r in kept))
    return replace(config, **dict(given))


def set_aside(earlier: RunConfig, config: RunConfig) -> tuple[str, ...]:
    """Return the earlier run's requirements that a replay does not hold its answers to."""
    now = {required.text for required in requirements_of(config)}
    return tuple(r.text for r in requirements_of(earlier) if r.text not in now)


def read_earlier(
    folder: Path, family: Family, dataset: str, *, after: Collection[Path] = ()
) -> Earlier:
    """Read what an earlier run measured and scored; one on other data is refused.

    `after` are the folders of replays that led here, so that none is read twice.
    """
    config, data = earlier_config(folder)
    known = data.get("dataset", {}).get("fingerprint")
    if known != dataset:
        raise refuse(
            "--replay",
            f"a run on data with fingerprint {known}",
            f"the data at hand, {dataset}",
            "restore the data",
        )
    ledger = read_study(folder, data)
    try:
        scored = tuple(
            (row, family.arch(ledger.arch(row.step, row.key)))
            for row in ledger.rows
            if row.step > 0 and row.state == "complete" and row.soft_loss is not None
        )
    finally:
        ledger.close()
    before, met = None, {*after, folder.resolve()}
    if config.replay is not None and Path(config.replay).resolve() not in met:
        with contextlib.suppress(InputError):  # gone or replaced: its scores cannot be compared
            before = read_earlier(Path(config.replay), family, dataset, after=met)
    return Earlier(folder, config, data, scored, _milestones(folder, family), before)


def _milestones(folder: Path, family: Family) -> tuple[Milestone, ...]:
    found = []
    for path in sorted((folder / "family").glob("*.json")):
        told = read_json(path, "a model of a run")
        weights = path.with_suffix(".safetensors")
        if weights.is_file():
            try:
                arch, score = family.arch(told["arch"]), told["score"]
                found.append(Milestone(arch, int(told["params"]), score["step"], weights, score))
            except (KeyError, TypeError, ValueError) as error:
                got = f"{type(error).__name__}: {error}"
                raise refuse(str(path), got, "a model of a run", "restore it") from None
    return tuple(found)


def answers(earlier: Earlier, band: Band) -> list[tuple[Trial, Arch]]:
    """Return the scored archs inside a band, best first, each net once.

    One that was scored in several steps counts by its last score.
    """
    latest: dict[str, tuple[Trial, Arch]] = {}
    for row, arch in earlier.scored:
        light = band.max_macs is None or row.macs <= band.max_macs
        if band.lo <= row.params <= band.hi and light:
            latest[row.key] = (row, arch)
    return sorted(latest.values(), key=lambda found: (found[0].soft_loss or 0.0, found[0].key))


def start_of(earlier: Earlier, band: Band) -> Milestone | None:
    """Return the smallest model that is still larger than a band, or None: start from the seed."""
    models = [m for run in lineage(earlier) for m in run.milestones]
    larger = [m for m in models if m.params > band.hi]
    return min(larger, key=lambda m: m.params, default=None)


def lineage(earlier: Earlier) -> list[Earlier]:
    """Return an earlier run, the one that it replayed itself, and so on."""
    return [earlier, *(lineage(earlier.before) if earlier.before is not None else ())]
