"""Read a run's folder for reports; an unfinished run has fewer parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.core.io import read_json
from nas.search.study import StepRow, Trial, read_study
from space.errors import refuse


@dataclass(frozen=True)
class RunFiles:
    """A run's files. `result` and `best` are empty until the run has them."""

    folder: Path
    run: Mapping[str, Any]
    trials: tuple[Trial, ...]
    steps: tuple[StepRow, ...]
    result: Mapping[str, Any]
    best: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's settings."""
        return section(self.run, "config")

    @property
    def img_size(self) -> Any:
        """The side of the images in pixels, None where the run does not say."""
        found = self.best.get("img_size") or section(self.run, "dataset").get("img_size")
        return found or self.config.get("img_size")

    @property
    def holdout_images(self) -> int | None:
        """The number of images behind a proxy score, None where the run does not say."""
        found = number(section(self.run, "dataset"), "holdout")
        return None if found is None else int(found)

    @property
    def seed(self) -> Trial | None:
        """The arch that contraction started from."""
        return next((row for row in self.trials if row.step == 0), None)

    @property
    def seed_name(self) -> str:
        """The seed as the user named it; of a file its name only."""
        given = str(self.config.get("seed") or (self.seed.name if self.seed else "seed"))
        return Path(given).name if given.endswith(".json") else given

    def candidate(self, key: str | None) -> Trial | None:
        """Find an arch among the trials, where it was kept if it was, else where it was scored."""
        rows = [row for row in self.trials if row.key == key]
        kept = [row for row in rows if row.stage == "kept" or row.step == 0]
        scored = [row for row in rows if row.soft_loss is not None]
        return next(iter(kept or scored or rows), None)

    @property
    def path(self) -> tuple[Trial, ...]:
        """The incumbents from the seed on: the result's path, or the steps' incumbents so far."""
        keys = self.result.get("path")
        if not keys or not isinstance(keys, list):
            first = [self.seed.key] if self.seed else []
            keys = first + [step.incumbent for step in self.steps]
        named = (key for key in keys if isinstance(key, str))
        found = (self.candidate(key) for key in dict.fromkeys(named))
        return tuple(row for row in found if row is not None)


def read_run(folder: Path) -> RunFiles:
    """Read a run's files. Refuses a folder without a run and files that are damaged."""
    if not folder.is_dir():
        raise refuse("RUN", folder, "the folder of a run", "give the --out folder of an earlier run")
    if not (folder / "run.json").is_file():
        raise refuse("RUN", folder, "a folder with a run.json", "give the --out folder of a run")
    result = _mapping(folder / "result.json", optional=True)
    run = _mapping(folder / "run.json")
    trials, steps = _study(folder, run, ended=bool(result))
    return RunFiles(
        folder=folder,
        run=run,
        trials=tuple(trials),
        steps=tuple(steps),
        result=result,
        best=_mapping(folder / "best.json", optional=True),
    )


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a JSON object that is itself an object, empty where it is anything else."""
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}


def number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a JSON object, None where there is none."""
    value = values.get(name)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain else None


def _study(folder: Path, run: Mapping[str, Any], *, ended: bool) -> tuple[list[Trial], list[StepRow]]:
    """Read the trials and steps of a study; a run that has only begun may have none yet."""
    begun = ended or (folder / "study.db").exists() or "storage" in run
    if not begun:
        return [], []
    study = read_study(folder, run)
    study.close()
    return study.rows, study.steps


def _mapping(path: Path, *, optional: bool = False) -> Mapping[str, Any]:
    if optional and not path.exists():
        return {}
    value = read_json(path, "a file of a run")
    if not isinstance(value, dict):
        raise refuse(str(path), type(value).__name__, "a JSON object")
    return value
