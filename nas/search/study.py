"""The study: every decided candidate whole, once; `ledger.csv` is drawn from it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.io import write_atomic
from nas.core.table import Writer
from nas.search.storage import (
    OPENING_S,
    WAIT_S,
    Shared,
    Where,
    check_database,
    open_storage,
    patiently,
    resumed_shared,
)
from space.errors import InputError, refuse

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STAGES = ("counts", "throughput", "selection", "race", "proxy", "kept")
STATES = ("complete", "pruned", "failed")

STUDY = "contraction"
"""The name of the study in a run's own `study.db`."""
CHECKSUM = "sha256"
"""The name under which a row keeps its checksum."""


@dataclass(frozen=True)
class Trial:
    """One shortlisted candidate and what became of it.

    `parent` is the key of the arch it was contracted from; `moves` is its difference in words;
    `params_1000` counts it at 1000 classes and 224 px. Throughput is images/s with an interval,
    `ratio` is relative to `reference`; both under the
    run's primary setting. `requirements` tells each bound of the step with its verdict and what was
    measured; `basis` whether that was `measured` here, a `table` of another device's, or
    `predicted` from one. `soft_loss` is in nats on the holdout (lower is better),
    `top1` a share, `metric` the run's where that is another, after `epochs` epochs; `violation` is
    by what share it missed what it missed worst (0: nothing). `stage` is where it stopped, `reason`
    says why in one line. `seconds` is the time spent on it; `log` where its job's output is kept.
    `None` means not measured.
    """

    step: int
    key: str
    label: str
    parent: str
    moves: str
    notches: int
    anchor: str
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


COLUMNS = ("trial", *(f.name for f in dataclasses.fields(Trial)))


def _flat(arch: Mapping[str, Any]) -> dict[str, float]:
    """Flatten an arch's JSON to one number a factor slot, for Optuna's parameters."""
    flat: dict[str, float] = {}
    for name, value in arch.items():
        if isinstance(value, (list, tuple)):
            flat.update({f"{name}[{i}]": v for i, v in enumerate(value)})
        else:
            flat[name] = value
    return flat


class Ledger:
    """The trials of one run, as an Optuna study (opens in optuna-dashboard).

    `where` is the run's own `study.db`, or a database that it shares with others. The driver is the
    only writer. A row is one finished trial; adding a row that is already there (same step and key)
    does nothing, so that a resumed run repeats itself harmlessly. Each row carries a checksum of
    itself, its place and the row before it: what was changed, lost from the middle or moved is
    refused on opening. `create` begins a study: a file anew, a shared one where there is none. A
    database that is locked or away is waited for, for `wait_s` seconds; then `StudyAway` is raised.
    """

    def __init__(self, where: Where, *, create: bool, wait_s: float = WAIT_S) -> None:
        self.where = where
        self._wait_s = wait_s
        self._label = str(where) if isinstance(where, Path) else where.label
        self._name = STUDY if isinstance(where, Path) else where.study
        self._rows: dict[tuple[int, str], Trial] = {}
        self._archs: dict[tuple[int, str], Mapping[str, Any]] = {}
        self._count = 0
        self._last = ""
        self._adding = False
        try:
            if isinstance(where, Path):
                if create:
                    _create(where)
                else:
                    check_database(where, wait_s)
                trials = patiently(lambda: self._open(begin=False), where, wait_s)
            else:
                trials = patiently(lambda: self._open(begin=create), where, OPENING_S)
            self._take(trials)
        except InputError:
            raise
        except KeyError:
            raise self._without_study() from None
        except Exception as error:  # every way in which a database can be bad ends in one line
            raise refuse(
                self._label,
                f"{type(error).__name__}: {error}",
                "a readable Optuna study",
                "restore the database or start a new run in another folder",
            ) from None

    def _open(self, *, begin: bool) -> list[FrozenTrial]:
        """Open the study, with `begin` also one that is not there yet, and return its trials."""
        import optuna
        from sqlalchemy import event, text

        storage = open_storage(self.where, fresh=begin, wait_s=self._wait_s)
        if begin:
            optuna.create_study(
                study_name=self._name, storage=storage, direction="minimize", load_if_exists=True
            )
        self._storage = storage
        self._study = optuna.load_study(study_name=self._name, storage=storage)
        of = storage.get_study_id_from_name(self._name)
        count = text("SELECT count(*) FROM trials WHERE study_id = :study")

        # Optuna tries an insertion again that failed, though it may be the answer that was lost.
        @event.listens_for(storage.scoped_session, "before_commit")
        def _once(session: Any) -> None:
            if self._adding and session.execute(count, {"study": of}).scalar() > self._count + 1:
                raise _Taken

        if self._study.direction.name != "MINIMIZE":
            raise ValueError(f"a study to {self._study.direction.name.lower()}")
        return self._study.get_trials(deepcopy=False)

    def _take(self, trials: Sequence[FrozenTrial]) -> None:
        """Take over the rows of a study, refusing what was not written so."""
        for number, trial in enumerate(trials):
            where = f"{self._label}: trial {number}"
            attrs = trial.user_attrs
            row = _row_from_attrs(attrs, where)
            arch = attrs.get("arch", {})
            found = attrs.get(CHECKSUM, "")
            # Rows of earlier versions have none; but none of those comes after one that has.
            if found or self._last:
                right = checksum(number, attrs.get("row"), arch, trial.constraints, self._last)
                told = _told(trial), number
                if found != right or told != (_told(_trial(row, arch, {}, found)), trial.number):
                    raise refuse(
                        where,
                        "a row that its checksum does not fit",
                        "the rows as they were written, in their order",
                        "restore the database or start a new run in another folder",
                    )
            self._last = found
            self._rows[row.step, row.key] = row
            self._archs[row.step, row.key] = arch
        self._count = len(trials)

    def _without_study(self) -> InputError:
        return refuse(
            self._label,
            f"a database without the study '{self._name}'",
            "the study of this run",
            "restore it or start a new run in another folder",
        )

    @property
    def rows(self) -> list[Trial]:
        """Every decided candidate, in the order of decision."""
        return list(self._rows.values())

    def has(self, step: int, key: str) -> bool:
        """Tell whether a candidate of a step is decided already."""
        return (step, key) in self._rows

    def failed(self, step: int, key: str, stage: str) -> bool:
        """Tell whether a candidate failed at a stage earlier in this run: not to be retried there.

        What failed later passed this stage all the same, and is asked to pass it again on resuming:
        otherwise another one would take its place.
        """
        row = self._rows.get((step, key))
        return row is not None and (row.state, row.stage) == ("failed", stage)

    def add(self, row: Trial, arch: Mapping[str, Any], constraints: Mapping[str, float]) -> None:
        """Write one decided candidate, whole, as a finished trial.

        `constraints` are violations by name, at most 0 where met, as Optuna has them.
        """
        assert row.stage in STAGES
        assert row.state in STATES
        if self.has(row.step, row.key):
            return
        found = checksum(self._count, dataclasses.asdict(row), dict(arch), constraints, self._last)
        self._write(_trial(row, arch, constraints, found), found)
        self._last = found
        self._count += 1
        self._rows[row.step, row.key] = row
        self._archs[row.step, row.key] = dict(arch)

    def _write(self, trial: FrozenTrial, found: str) -> None:
        """Add a trial exactly once, whatever becomes of the connection meanwhile."""

        def attempt() -> None:
            try:
                self._study.add_trial(trial)
            except _Taken:
                # One more is there than we know of: our own, from an attempt whose answer was lost?
                trials = self._study.get_trials(deepcopy=False)
                ours = [t.user_attrs.get(CHECKSUM) for t in trials[self._count :]] == [found]
                if not ours:
                    raise refuse(
                        self._label,
                        f"rows of another process in the study '{self._name}'",
                        "one process a run",
                        "end the other one (a copy of this run's folder?), then --resume",
                    ) from None

        self._adding = True
        try:
            patiently(attempt, self.where, self._wait_s)
        except KeyError:  # deleted under our hands
            raise self._without_study() from None
        finally:
            self._adding = False

    def arch(self, step: int, key: str) -> Mapping[str, Any]:
        """Return the arch of a decided candidate, as plain JSON."""
        return self._archs[step, key]

    def write_csv(self, path: Path) -> None:
        """Draw `ledger.csv` from the study: one line a candidate, empty cells not measured."""
        out = io.StringIO()
        writer = Writer(out, COLUMNS)
        writer.writeheader()
        for number, row in enumerate(self._rows.values()):
            writer.writerow([number, *dataclasses.astuple(row)])
        write_atomic(path, out.getvalue().encode())

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def remove(self) -> None:
        """Take the study out of a shared database, if it can be reached; a file is the folder's."""
        if not isinstance(self.where, Path):
            with contextlib.suppress(Exception):
                self._storage.delete_study(self._storage.get_study_id_from_name(self._name))
        self.close()


class _Taken(Exception):
    """A study holds more trials than its only writer knows of."""


def ledger_of(folder: Path, shared: Shared | None) -> Ledger:
    """Open the study of a run at work, or begin it.

    A run that was killed early may have its `run.json` and no study yet; where `ledger.csv` was
    drawn already, a study that is missing is lost.
    """
    drawn = (folder / "ledger.csv").exists()
    if shared is not None:
        return Ledger(shared, create=shared.begin and not drawn)
    path = folder / "study.db"
    return Ledger(path, create=not path.exists() and not drawn)


def read_ledger(folder: Path, run: Mapping[str, Any]) -> Ledger:
    """Open the study of an earlier run, whose `run.json` is `run`, to read it."""
    shared = resumed_shared(run.get("storage"), None, folder / "run.json")
    return Ledger(folder / "study.db" if shared is None else shared, create=False)


def checksum(
    number: int, row: Any, arch: Any, constraints: Mapping[str, float], before: str
) -> str:
    """Return the checksum of a row: of all that it says, its place and the row before it."""
    whole = [number, row, arch, dict(constraints), before]
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _trial(
    row: Trial, arch: Mapping[str, Any], constraints: Mapping[str, float], found: str
) -> FrozenTrial:
    """Return a row as Optuna keeps it."""
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

    flat = _flat(arch)
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(0.0, 1024.0)
        if isinstance(value, float)
        else IntDistribution(0, 1_000_000)
        for name, value in flat.items()
    }
    state = {
        "complete": optuna.trial.TrialState.COMPLETE,
        "pruned": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
    }[row.state]
    return optuna.trial.create_trial(
        state=state,
        value=row.soft_loss if row.state == "complete" else None,
        params=flat,
        distributions=distributions,
        user_attrs={"row": dataclasses.asdict(row), "arch": dict(arch), CHECKSUM: found},
        constraints=dict(constraints),
    )


def _told(trial: FrozenTrial) -> str:
    """Return what Optuna's own columns say of a trial, which a dashboard shows."""
    parts = [
        sorted((k, repr(v)) for k, v in d.items()) for d in (trial.params, trial.distributions)
    ]
    return repr((trial.state.name, trial.values, trial.intermediate_values, *parts))


def _create(path: Path) -> None:
    """Make an empty study aside and put it in place: a kill leaves none, or a whole one."""
    import optuna

    aside = path.with_name(f".{path.name}.tmp")
    for leftover in (aside, aside.with_name(f"{aside.name}-journal")):
        leftover.unlink(missing_ok=True)
    storage = open_storage(aside, fresh=True, wait_s=WAIT_S)
    optuna.create_study(study_name=STUDY, storage=storage, direction="minimize")
    storage.remove_session()
    storage.engine.dispose()
    aside.replace(path)


def _row_from_attrs(attrs: Mapping[str, Any], where: str) -> Trial:
    data = attrs.get("row")
    fields = dataclasses.fields(Trial)
    names = {f.name for f in fields}
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    if not isinstance(data, Mapping) or not needed <= set(data) <= names:
        raise refuse(
            where,
            json.dumps(data)[:80],
            "a row written by this toolkit",
            "start a new run in another folder",
        )
    return Trial(**data)
