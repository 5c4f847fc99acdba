"""The study: every decided candidate as an Optuna trial; `trials.csv` is drawn from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from nas.core.table import write_table
from nas.search.constraints import StepBounds
from nas.search.storage import RESTORE, SharedStudy, check_sqlite, one_line, open_storage, resumed_shared
from space.errors import refuse

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

T = TypeVar("T")

STAGES = ("counts", "throughput", "selection", "race", "proxy", "kept")
STATES = ("complete", "pruned", "failed")

STUDY = "contraction"
"""The name of the study in a run's own `study.db`."""


@dataclass(frozen=True)
class Trial:
    """A decided candidate: one row of `trials.csv` and one trial of the study.

    `parent` is the key of the arch it was contracted from; `moves` is its difference in words; `params_1000` counts it
    at 1000 classes and 224 px. Throughput is images/s with an interval, `ratio` is relative to `reference`; both under
    the run's primary setting. `requirements` lists each bound of the step with its verdict and the measurement; `basis`
    whether that was `measured` here, a `table` of another device's, or `predicted` from one. `soft_loss` is in nats on
    the holdout (lower is better), `top1` a share, `metric` the run's where that is another, after `epochs` epochs;
    `violation` is by what share it missed what it missed worst (0: nothing). `stage` is where it stopped, `reason` says
    why in one line. `seconds` is the time spent on it; `log` where its job's output is kept. `None` means not measured.
    """

    step: int
    key: str
    label: str
    parent: str
    moves: str
    grid_steps: int
    baseline: str
    params: int
    params_1000: int
    macs: int
    images_per_s: float | None = None
    images_per_s_lo: float | None = None
    images_per_s_hi: float | None = None
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    reference: str = ""
    requirements: str = ""
    basis: str = ""
    soft_loss: float | None = None
    soft_loss_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    metric: float | None = None
    metric_se: float | None = None
    epochs: int = 0
    violation: float = 0.0
    seconds: float = 0.0
    stage: str = "counts"
    state: str = "pruned"
    reason: str = ""
    log: str = ""

    @property
    def name(self) -> str:
        """Return its label, else its key."""
        return self.label or self.key


@dataclass(frozen=True)
class StepRow:
    """One step in numbers.

    `band_lo`, `band_hi` in parameters; `required` is what was to be met, in the words of `--require` (without a
    required pace, the least ratio to the seed); `contractions` counts the band exactly, summed over the incumbents it
    starts from; `candidates` = `too_slow` + `not_selected` + `failed` + `scored`. The rest describes the incumbent
    chosen.
    """

    step: int
    band_lo: int
    band_hi: int
    required: str
    contractions: int
    candidates: int
    too_slow: int
    not_selected: int
    failed: int
    scored: int
    kept: int
    incumbent: str
    params: int
    ratio: float | None
    soft_loss: float | None
    top1: float | None
    seconds: float

    @classmethod
    def of(cls, step: int, bounds: StepBounds, counted: int, rows: Sequence[Trial], best: Trial) -> StepRow:
        """Count the rows of one step."""
        required = bounds.describe()
        if bounds.least_ratio is not None:
            required = " and ".join(filter(None, (f"{bounds.least_ratio:.4f}x", required)))
        return cls(
            step=step,
            band_lo=bounds.band.lo,
            band_hi=bounds.band.hi,
            required=required,
            contractions=counted,
            candidates=len(rows),
            too_slow=sum(r.stage == "throughput" and r.state == "pruned" for r in rows),
            not_selected=sum(r.stage == "selection" for r in rows),
            failed=sum(r.state == "failed" for r in rows),
            scored=sum(r.state == "complete" for r in rows),
            kept=sum(r.stage == "kept" for r in rows),
            incumbent=best.key,
            params=best.params,
            ratio=best.ratio,
            soft_loss=best.soft_loss,
            top1=best.top1,
            seconds=round(sum(r.seconds for r in rows), 3),
        )


class Study:
    """The trials and finished steps of one run, as an Optuna study (opens in optuna-dashboard).

    `where` is the run's own `study.db`, or a database that many runs share. The driver is the only writer; `create`
    begins a study. A database that cannot be read is refused in one line; one that is locked or away raises
    `StudyUnavailable`.
    """

    def __init__(self, where: Path | SharedStudy, *, create: bool) -> None:
        self.where = where
        self._trials: dict[tuple[int, str], Trial] = {}
        self._archs: dict[tuple[int, str], Mapping[str, Any]] = {}
        self._steps: dict[int, StepRow] = {}
        with one_line(where):
            if isinstance(where, Path):
                if create:
                    _write_new(where)
                check_sqlite(where)
                create = False
            self._storage, self._study = _open(where, create=create)
            for number, stored in enumerate(self._study.get_trials(deepcopy=False)):
                attrs = stored.user_attrs
                trial = _from_json(Trial, attrs.get("row"), f"{where}: trial {number}")
                # Optuna repeats a write whose answer was lost: the first one counts.
                self._trials.setdefault((trial.step, trial.key), trial)
                self._archs.setdefault((trial.step, trial.key), attrs.get("arch", {}))
            for name, value in self._study.user_attrs.items():
                if name.startswith("step "):
                    step = _from_json(StepRow, value, f"{where}: {name}")
                    self._steps[step.step] = step

    @property
    def rows(self) -> list[Trial]:
        """Every decided candidate, in the order of decision."""
        return list(self._trials.values())

    @property
    def steps(self) -> list[StepRow]:
        """Every finished step, the first first."""
        return [self._steps[step] for step in sorted(self._steps)]

    def failed(self, step: int, key: str, stage: str) -> bool:
        """Return whether a candidate failed at this stage, where it is not tried again.

        A candidate that failed at a later stage passes this one again on resuming; otherwise another candidate would
        take its place.
        """
        trial = self._trials.get((step, key))
        return trial is not None and (trial.state, trial.stage) == ("failed", stage)

    def add(self, trial: Trial, arch: Mapping[str, Any], constraints: Mapping[str, float]) -> None:
        """Write one decided candidate as a finished trial.

        Adding one that is there already (same step and key) does nothing, so that a resumed run repeats itself
        harmlessly. `constraints` are violations by name, at most 0 where met.
        """
        assert trial.stage in STAGES
        assert trial.state in STATES
        if (trial.step, trial.key) in self._trials:
            return
        with one_line(self.where):
            self._study.add_trial(_to_optuna(trial, arch, constraints))
        self._trials[trial.step, trial.key] = trial
        self._archs[trial.step, trial.key] = dict(arch)

    def add_step(self, row: StepRow) -> None:
        """Write one finished step."""
        if self._steps.get(row.step) != row:
            with one_line(self.where):
                self._study.set_user_attr(f"step {row.step}", dataclasses.asdict(row))
            self._steps[row.step] = row

    def arch(self, step: int, key: str) -> Mapping[str, Any]:
        """Return the arch of a decided candidate, as plain JSON."""
        return self._archs[step, key]

    def write_csv(self, path: Path) -> None:
        """Write `trials.csv`: one line a candidate, empty cells not measured."""
        write_table(path, self.rows, Trial)

    def write_steps(self, path: Path) -> None:
        """Write `steps.csv`: one line a finished step."""
        write_table(path, self.steps, StepRow)

    def export(self, path: Path) -> None:
        """Keep a copy of a shared study in a file, for readers without the database."""
        if not isinstance(self.where, Path):
            _write_new(path, self._study.get_trials(deepcopy=False), self._study.user_attrs)

    def close(self) -> None:
        """Close the database."""
        self._storage.remove_session()

    def remove(self) -> None:
        """Delete a study from a shared database if it answers; a file belongs to the folder."""
        import optuna

        if not isinstance(self.where, Path):
            with contextlib.suppress(Exception):
                optuna.delete_study(study_name=self.where.study, storage=self._storage)
        self.close()


def open_study(folder: Path, shared: SharedStudy | None) -> Study:
    """Open the study of a run, or create it.

    A run that was killed early may have its `run.json` and no study yet; once a `trials.csv` was drawn, a study that is
    missing is lost.
    """
    drawn, path = (folder / "trials.csv").exists(), folder / "study.db"
    if shared is None:
        return Study(path, create=not path.exists() and not drawn)
    study = Study(shared, create=shared.begin and not drawn)
    path.unlink(missing_ok=True)  # the copy of a run that goes on would be out of date
    return study


def read_study(folder: Path, run: Mapping[str, Any]) -> Study:
    """Open the study of an earlier run, whose `run.json` is `run`, to read it."""
    path = folder / "study.db"
    stored = None if path.exists() else run.get("storage")
    shared = resumed_shared(stored, None, folder / "run.json")
    return Study(path if shared is None else shared, create=False)


def _open(where: Path | SharedStudy, *, create: bool) -> tuple[RDBStorage, OptunaStudy]:
    import optuna
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for tries_left in (3, 2, 1, 0):
        try:
            storage = open_storage(where, create=create)
            break
        except (IntegrityError, ProgrammingError):  # another run makes the tables at this moment
            if not tries_left:
                raise
    name = STUDY if isinstance(where, Path) else where.study
    if not create:
        return storage, optuna.load_study(study_name=name, storage=storage)
    return storage, optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)


def _write_new(path: Path, trials: Iterable[FrozenTrial] = (), attrs: Mapping[str, Any] | None = None) -> None:
    """Make a study aside and put it in place: a kill leaves none, or a whole one."""

    aside = path.with_name(f".{path.name}.tmp")
    for leftover in (aside, aside.with_name(f"{aside.name}-journal")):
        leftover.unlink(missing_ok=True)
    storage, study = _open(aside, create=True)
    study.add_trials(trials)
    for name, value in (attrs or {}).items():
        study.set_user_attr(name, value)
    storage.remove_session()
    aside.replace(path)


def _to_optuna(trial: Trial, arch: Mapping[str, Any], constraints: Mapping[str, float]) -> FrozenTrial:
    """Return a trial as Optuna stores it, with a number for each slot of a factor."""
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

    flat: dict[str, float] = {}
    for name, value in arch.items():
        many = isinstance(value, (list, tuple))
        flat |= {f"{name}[{i}]": v for i, v in enumerate(value)} if many else {name: value}
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(0.0, 1e6) if isinstance(value, float) else IntDistribution(0, 1_000_000)
        for name, value in flat.items()
    }
    state = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}[trial.state]
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=trial.soft_loss if trial.state == "complete" else None,
        params=flat,
        distributions=distributions,
        user_attrs={"row": dataclasses.asdict(trial), "arch": dict(arch)},
        constraints=dict(constraints),
    )


def _from_json(cls: type[T], data: Any, where: str) -> T:
    """Return the dataclass whose fields a JSON object holds; anything else is refused."""
    hints = get_type_hints(cls)
    if isinstance(data, Mapping) and data.keys() == hints.keys():
        whole = {n for n, value in data.items() if type(value) is int and hints[n] is not str}
        if all(n in whole or isinstance(data[n], hint) for n, hint in hints.items()):
            return cls(**data)
    raise refuse(where, json.dumps(data)[:80], f"the fields of a {cls.__name__} as this toolkit writes them", RESTORE)
