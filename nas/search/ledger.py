"""The study: every decided candidate whole, once, in SQLite; `ledger.csv` is drawn from it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.files import write_atomic
from space.errors import InputError, refuse

STAGES = ("counts", "throughput", "selection", "race", "proxy", "kept")
STATES = ("complete", "pruned", "failed")


@dataclass(frozen=True)
class Row:
    """One shortlisted candidate and what became of it.

    `parent` is the key of the arch it was contracted from; `moves` is its difference in words;
    `params_1000` counts it at 1000 classes and 224 px. Throughput is images/s with an interval,
    `ratio` is relative to `reference`; both under the
    run's primary setting. `requirements` tells each bound of the step with its verdict and what was
    measured; `basis` whether that was `measured` here, a `table` of another device's, or
    `predicted` from one. `soft_loss` is in nats on the holdout (lower is better),
    `top1` a share, `metric` the run's where that is another, after `epochs` epochs; `violation` is
    by what share it missed what it missed worst (0: nothing). `stage` is where it stopped, `reason`
    says why in one line. `seconds` is the time spent on it. `None` means not measured.
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


COLUMNS = ("trial", *(f.name for f in dataclasses.fields(Row)))


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
    """The trials of one run, in `study.db` (Optuna; opens in optuna-dashboard).

    The driver is the only writer. A row is one finished trial; adding a row that is already
    there (same step and key) does nothing, so that a resumed run repeats itself harmlessly.
    """

    def __init__(self, path: Path, *, name: str = "contraction", create: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Alembic announces itself at INFO on the root's children; a library stays quiet.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.path = path
        if not create:
            check_database(path)
        try:
            if create:
                _create(path, name)
            self._study = optuna.load_study(study_name=name, storage=_storage(path))
            self._trials = [t.user_attrs for t in self._study.get_trials(deepcopy=False)]
        except InputError:
            raise
        except KeyError:
            raise refuse(
                str(path),
                f"a database without the study '{name}'",
                "a contraction run's study.db",
                "restore the file or start a new run in another folder",
            ) from None
        except Exception as error:  # every way in which a database can be bad ends in one line
            raise refuse(
                str(path),
                f"{type(error).__name__}: {error}",
                "a readable Optuna study",
                "restore the file or start a new run in another folder",
            ) from None
        self._rows: dict[tuple[int, str], Row] = {}
        self._archs: dict[tuple[int, str], Mapping[str, Any]] = {}
        for number, attrs in enumerate(self._trials):
            row = _row_from_attrs(attrs, f"{path}: trial {number}")
            self._rows[row.step, row.key] = row
            self._archs[row.step, row.key] = attrs.get("arch", {})

    @property
    def rows(self) -> list[Row]:
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

    def add(self, row: Row, arch: Mapping[str, Any], constraints: Mapping[str, float]) -> None:
        """Write one decided candidate, whole, as a finished trial.

        `constraints` are violations by name, at most 0 where met, as Optuna has them.
        """
        assert row.stage in STAGES
        assert row.state in STATES
        if self.has(row.step, row.key):
            return
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
        trial = optuna.trial.create_trial(
            state=state,
            value=row.soft_loss if row.state == "complete" else None,
            params=flat,
            distributions=distributions,
            user_attrs={"row": dataclasses.asdict(row), "arch": dict(arch)},
            constraints=dict(constraints),
        )
        try:
            self._study.add_trial(trial)
        except Exception as error:
            if isinstance(error.__cause__, sqlite3.Error) or "sqlite" in str(error).lower():
                raise refuse(
                    str(self.path),
                    f"{error.__cause__ or error}",
                    "a writable database",
                    "free the disk or the lock, then --resume",
                ) from None
            raise
        self._rows[row.step, row.key] = row
        self._archs[row.step, row.key] = dict(arch)

    def arch(self, step: int, key: str) -> Mapping[str, Any]:
        """Return the arch of a decided candidate, as plain JSON."""
        return self._archs[step, key]

    def write_csv(self, path: Path) -> None:
        """Draw `ledger.csv` from the study: one line a candidate, empty cells not measured."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, row in enumerate(self._rows.values()):
            values = ["" if v is None else v for v in dataclasses.astuple(row)]
            writer.writerow([number, *values])
        write_atomic(path, out.getvalue().encode())

    def close(self) -> None:
        """Let go of the database."""
        self._study._storage.remove_session()


def _storage(path: Path) -> Any:
    import optuna

    return optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 30}}
    )


def _create(path: Path, name: str) -> None:
    """Make an empty study aside and put it in place: a kill leaves none, or a whole one."""
    import optuna

    aside = path.with_name(f".{path.name}.tmp")
    for leftover in (aside, aside.with_name(f"{aside.name}-journal")):
        leftover.unlink(missing_ok=True)
    storage = _storage(aside)
    optuna.create_study(study_name=name, storage=storage, direction="minimize")
    storage.remove_session()
    storage.engine.dispose()
    aside.replace(path)


def check_database(path: Path) -> None:
    """Refuse what is not a whole SQLite database, before Optuna could try to repair it."""
    remedy = "restore the file or start a new run in another folder"
    if not path.is_file():
        raise refuse(str(path), "no such file", "the study of a run", remedy)
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
        try:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()
            tables = {r[0] for r in connection.execute("SELECT name FROM sqlite_master")}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise refuse(str(path), str(error), "a whole SQLite database", remedy) from None
    if verdict is None or verdict[0] != "ok":
        raise refuse(str(path), "a damaged database", "a whole SQLite database", remedy)
    if not {"studies", "trials"} <= tables:
        raise refuse(str(path), "a database of something else", "an Optuna study", remedy)


def _row_from_attrs(attrs: Mapping[str, Any], where: str) -> Row:
    data = attrs.get("row")
    names = {f.name for f in dataclasses.fields(Row)}
    if not isinstance(data, Mapping) or set(data) != names:
        raise refuse(
            where,
            json.dumps(data)[:80],
            "a row written by this toolkit",
            "start a new run in another folder",
        )
    return Row(**data)
