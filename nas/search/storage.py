"""Where a study is kept: in a run's own SQLite file, or in a PostgreSQL database of many runs."""

from __future__ import annotations

import importlib
import logging
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from space.errors import InputError, refuse

T = TypeVar("T")

WAIT_S = 30.0
"""How long a row waits for a database that is locked or away, before the run ends (resumably)."""
OPENING_S = 5.0
"""How long opening a shared database waits for a server that is just starting."""
PAUSE_S = 0.5
OPTUNA_TRIES = 5
"""How often Optuna itself tries to add a trial; SQLite's own waiting is divided by it."""

_ADDRESS = "postgresql://USER@HOST:PORT/DATABASE"
_DRIVERS = {
    "postgresql": ("psycopg", "psycopg2"),
    "postgres": ("psycopg", "psycopg2"),
    "postgresql+psycopg": ("psycopg",),
    "postgresql+psycopg2": ("psycopg2",),
}
_PASSWORD = "set PGPASSWORD, write ~/.pgpass, or give --storage with the password (on --resume too)"


class StudyAway(InputError):
    """The study cannot be written for now. The run is whole, and `--resume` goes on with it."""


@dataclass(frozen=True)
class Shared:
    """A run's study in a database that many runs share.

    `url` is the address without a password, as `run.json` keeps it; `study` is its name there, one
    of its own for every run. `password` is what the user gave this process; without one the driver
    asks PGPASSWORD and ~/.pgpass. `begin` says that the study may be begun where it is missing.
    """

    url: str
    study: str
    password: str | None = field(default=None, repr=False)
    begin: bool = True

    @property
    def label(self) -> str:
        """What to call it in a refusal."""
        return f"--storage {self.url}"

    def to_json(self) -> dict[str, str]:
        """Return what `run.json` keeps of it: no password."""
        return {"url": self.url, "study": self.study}


Where = Path | Shared


def new_shared(storage: str, folder: Path) -> Shared:
    """Read `--storage` of a new run and name its study after its folder and at random."""
    url, password = _address(storage)
    plain = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in _name(folder)
    )
    return Shared(url, f"{plain}-{uuid.uuid4().hex[:12]}", password)


def resumed_shared(kept: Any, storage: str | None, run_json: Path) -> Shared | None:
    """Return where an earlier run keeps its study, None for its own file.

    `kept` is what its `run.json` says, `storage` the user's `--storage` this time: the same with
    its password, or the address that the database has moved to.
    """
    if kept is None:
        if storage is not None:
            url, _ = _address(storage)
            raise refuse(
                "--storage",
                f"{url} on a run with a study.db of its own",
                "the run's own setting",
                "drop --storage, or start a new run in another folder",
            )
        return None
    if not isinstance(kept, Mapping) or not all(isinstance(kept.get(k), str) for k in _KEPT):
        raise refuse(f"{run_json}: storage", kept, "the url and the study of a run")
    url, password = _address(kept["url"])
    if storage is None:
        return Shared(url, kept["study"], password)
    given, password = _address(storage)
    return Shared(given, kept["study"], password, begin=given == url)


_KEPT = ("url", "study")


def _name(folder: Path) -> str:
    return folder.resolve().name[:200]


def _address(text: str) -> tuple[str, str | None]:
    """Split a PostgreSQL address into what may be told and the password.

    No refusal here repeats the text, as there may be a password anywhere in it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    escape = "in a user's name or password write @ as %40, / as %2F, : as %3A"
    try:
        if not text.isprintable():
            raise ValueError
        url = make_url(text)
    except (ArgumentError, ValueError, TypeError):
        raise refuse("--storage", "an address that cannot be read", _ADDRESS, escape) from None
    if url.drivername not in _DRIVERS:
        file = url.drivername.startswith("sqlite")
        remedy = "leave --storage out: a run has a study.db of its own" if file else ""
        raise refuse("--storage", f"{url.drivername[:40]}://...", _ADDRESS, remedy)
    if "@" in (url.host or "") or "@" in (url.database or ""):
        raise refuse("--storage", "an address with more than one @", _ADDRESS, escape)
    if not url.database and "service" not in url.query:
        raise refuse("--storage", "an address without a database", _ADDRESS)
    secret = url.query.get("password")
    password = url.password if url.password is not None else secret
    query = {name: value for name, value in url.query.items() if name != "password"}
    hidden = [name for name in query if "password" in name.lower()]
    if hidden:
        raise refuse("--storage", f"a secret in {hidden[0]}", _ADDRESS, "use a service file")
    name = url.drivername if "+" in url.drivername else "postgresql"
    told = type(url).create(name, url.username, None, url.host, url.port, url.database, query)
    return told.render_as_string(), None if password is None else str(password)


def _engine_url(where: Where) -> tuple[str, dict[str, Any]]:
    """Return what Optuna is to open, and how."""
    from sqlalchemy.engine import URL, make_url

    if isinstance(where, Path):
        url, connect = URL.create("sqlite", database=str(where)), {}
    else:
        url = make_url(where.url)
        url = url.set(drivername=f"postgresql+{_driver(url.drivername)}", password=where.password)
        # A server that has gone without a word must not hold a run for the hours of TCP's defaults.
        connect = {
            "connect_timeout": 5,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "fallback_application_name": "vision-contraction",
        }
        connect = {name: value for name, value in connect.items() if name not in url.query}
    text = url.render_as_string(hide_password=False)
    return text.replace("{", "{{").replace("}", "}}"), connect  # Optuna formats the address


def _driver(name: str) -> str:
    """Return the module that speaks to PostgreSQL here."""
    for module in _DRIVERS[name]:
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return module
    raise refuse(
        "--storage",
        f"a {name}:// address, without a driver here",
        " or ".join(_DRIVERS[name]),
        "pip install -e '.[postgres]'",
    )


def open_storage(where: Where, *, fresh: bool, wait_s: float) -> Any:
    """Open Optuna's storage; `fresh` lets it make its tables. Raises whatever goes wrong."""
    import optuna
    from sqlalchemy import event
    from sqlalchemy.pool import NullPool

    # What becomes of a connection is told in our own line; libraries stay quiet.
    for library in ("alembic", "sqlalchemy"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url, connect = _engine_url(where)
    if isinstance(where, Path):
        connect = {"timeout": wait_s / OPTUNA_TRIES}
    # Rows are minutes apart: a connection each holds none open meanwhile, and finds a server that
    # was restarted as it finds any other.
    storage = optuna.storages.RDBStorage(
        url,
        engine_kwargs={"connect_args": connect, "poolclass": NullPool},
        skip_table_creation=not fresh,
    )
    if not isinstance(where, Path):

        @event.listens_for(storage.engine, "connect")
        def _bounded(connection: Any, _: Any) -> None:
            connection.cursor().execute(f"SET lock_timeout = {round(wait_s * 1000)}")
            connection.commit()

    return storage


def check_reachable(shared: Shared) -> None:
    """Refuse a database that does not let us in, before any work is done."""
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    url, connect = _engine_url(shared)
    try:
        engine = create_engine(make_url(url), connect_args=connect, poolclass=NullPool)
        patiently(lambda: engine.connect().close(), shared, OPENING_S)
    except InputError:
        raise
    except Exception as error:  # what the driver makes of a parameter in the address
        raise refuse(shared.label, f"{type(error).__name__}: {error}", _ADDRESS) from None


def patiently(work: Callable[[], T], where: Where, seconds: float) -> T:
    """Do a work on a database, again and again while it is locked or away, for so long at least.

    Raises `InputError` when it stays so, or when waiting would not help; what is not the
    database's doing is raised as it is.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return work()
        except Exception as error:
            cause = _database_error(error)
            if cause is None:
                raise
            if _lasting(cause) or time.monotonic() >= until:
                raise _refusal(cause, where) from None
        time.sleep(PAUSE_S)


def _database_error(error: BaseException) -> BaseException | None:
    """Return the driver's own error behind one of Optuna's or SQLAlchemy's, None if none is."""
    from sqlalchemy.exc import SQLAlchemyError

    link: BaseException | None = error
    found = None
    while link is not None:
        if isinstance(link, (SQLAlchemyError, sqlite3.Error)):
            found = getattr(link, "orig", None) or link
        link = link.__cause__
    return found


def _code(cause: BaseException) -> str:
    """Return PostgreSQL's five letters for an error, empty where it gave none."""
    return str(getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or "")


_RACES = ("42P07", "42710", "23505")
"""Two runs that make the tables of a new database at once: the second finds them made."""


def _lasting(cause: BaseException) -> bool:
    """Tell whether an error would be the same in a minute."""
    if isinstance(cause, sqlite3.Error):
        return not _locked(cause)
    code = _code(cause)
    if code in _RACES:
        return False
    return code[:2] in ("28", "3D", "42") or any(words in str(cause) for words in _REMEDIES)


def _locked(cause: BaseException) -> bool:
    return "locked" in str(cause) or "busy" in str(cause)


_REMEDIES = {
    "authentication failed": _PASSWORD,
    "no password supplied": _PASSWORD,
    "permission denied": "let the user create tables there (GRANT CREATE ON SCHEMA ...)",
    "pg_hba.conf": "let this machine in (pg_hba.conf)",
    "does not exist": "create it (createdb, createuser), or mend the address",
    "resolve host": "mend the address",
    "translate host": "mend the address",
}
"""What PostgreSQL says of a lasting trouble, and what to do about it."""


def _refusal(cause: BaseException, where: Where) -> InputError:
    """Make the one line for a database's error."""
    if isinstance(where, Path):
        remedy = "free the disk or mend the file's permissions, then --resume"
        if _locked(cause):
            remedy = "end the process that holds it, then --resume"
        line = refuse(str(where), cause, "a database to write in", remedy)
    else:
        found = [remedy for words, remedy in _REMEDIES.items() if words in str(cause)]
        if _code(cause) == "42P01":  # no such table
            found = ["restore the database, or mend the address"]
        remedy = (found or ["see to the server; a run that had begun goes on with --resume"])[0]
        line = refuse(where.label, cause, "a PostgreSQL server that lets us in", remedy)
    return StudyAway(str(line))


def check_database(path: Path, wait_s: float = WAIT_S) -> None:
    """Refuse what is not a whole SQLite database, before Optuna could try to repair it."""
    remedy = "restore the file or start a new run in another folder"
    if not path.is_file():
        raise refuse(str(path), "no such file", "the study of a run", remedy)
    # A kill in the middle of a row leaves a journal: SQLite takes that row back, if it may write.
    mode = "rw" if path.with_name(f"{path.name}-journal").exists() else "ro"
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=wait_s
        )
        try:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()
            orphan = connection.execute("PRAGMA foreign_key_check").fetchone()
            tables = {r[0] for r in connection.execute("SELECT name FROM sqlite_master")}
        finally:
            connection.close()
    except sqlite3.Error as error:
        if _locked(error):
            raise _refusal(error, path) from None
        raise refuse(str(path), str(error), "a whole SQLite database", remedy) from None
    if verdict is None or verdict[0] != "ok":
        raise refuse(str(path), "a damaged database", "a whole SQLite database", remedy)
    if not tables >= _TABLES:
        raise refuse(str(path), "a database of something else", "an Optuna study", remedy)
    if orphan is not None:
        raise refuse(str(path), "a damaged database", "a whole SQLite database", remedy)


_TABLES = {
    "studies",
    "study_directions",
    "trials",
    "trial_params",
    "trial_values",
    "trial_user_attributes",
    "trial_system_attributes",
    "trial_intermediate_values",
    "version_info",
    "alembic_version",
}
