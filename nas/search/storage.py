"""The database of a study: a run's own SQLite file, or a PostgreSQL database of many runs."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from space.errors import InputError, refuse, without_passwords

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import URL

TRY_S = 6
"""Seconds to wait for a lock or a server; Optuna tries five times to add a trial."""

_ADDRESS = "postgresql://USER@HOST:PORT/DATABASE"
_OPTIONS = (
    *("password", "user", "host", "hostaddr", "port", "dbname", "service", "passfile", "connect_timeout", "options"),
    *("application_name", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    *("tcp_user_timeout", "sslmode", "sslnegotiation", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslsni"),
    *("channel_binding", "require_auth", "gssencmode", "krbsrvname", "target_session_attrs", "load_balance_hosts"),
)
"""Options of an address that hold no secret but the password, which is taken out."""
_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2")
RESTORE = "restore the database or start a new run in another folder"


class StudyUnavailable(InputError):
    """The database of a study is locked or away; `--resume` continues the run."""


@dataclass(frozen=True)
class SharedStudy:
    """A run's study in a database that many runs share.

    `url` is the address without a password, as `run.json` keeps it; `study` is unique to the run. Without a `password`
    the database driver asks PGPASSWORD and ~/.pgpass. `begin` allows to create a missing study.
    """

    url: str
    study: str
    password: str | None = field(default=None, repr=False)
    begin: bool = True

    def __str__(self) -> str:
        return f"--storage {self.url}"

    def to_json(self) -> dict[str, str]:
        """Return what `run.json` keeps: no password."""
        return {"url": self.url, "study": self.study}


def new_shared(storage: str, folder: Path) -> SharedStudy:
    """Read `--storage` of a new run and name its study after its folder and at random."""
    url, password = _split_password(storage)
    name = folder.resolve().name[:200]
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    return SharedStudy(url, f"{plain}-{uuid.uuid4().hex[:12]}", password)


def resumed_shared(kept: Any, storage: str | None, run_json: Path) -> SharedStudy | None:
    """Return the shared database of an earlier run's study, None for its own file.

    `kept` is the entry of its `run.json`; `storage` is `--storage` as given now: the same address with its password, or
    the one that the database has moved to.
    """
    given, password = (None, None) if storage is None else _split_password(storage)
    if kept is None:
        if given is not None:
            got = f"{given} on a run with a study.db of its own"
            raise refuse("--storage", got, "the run's own setting", "drop --storage")
        return None
    if not isinstance(kept, Mapping) or not all(isinstance(kept.get(k), str) for k in ("url", "study")):
        raise refuse(f"{run_json}: storage", kept, "the url and the study of a run")
    url, _ = _split_password(kept["url"])
    return SharedStudy(given or url, kept["study"], password, begin=given in (None, url))


def _split_password(text: str) -> tuple[str, str | None]:
    """Split a PostgreSQL address into one without a password, and the password.

    No message repeats the text, as there may be a password anywhere in it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    remedy = "in a user's name or password write @ as %40, / as %2F, : as %3A"
    try:
        url = make_url(text if text.isprintable() else "")
    except (ArgumentError, ValueError):
        raise refuse("--storage", "an address that cannot be read", _ADDRESS, remedy) from None
    bad = None
    if url.drivername not in _SCHEMES:
        bad, remedy = f"{url.drivername[:40]}://...", "a run without --storage has its own study.db"
    elif "@" in f"{url.host}{url.database}":
        bad = "an address with more than one @"
    elif "=" in f"{url.host}{url.database}":
        bad, remedy = "an address with = before its ?", "write options as ?NAME=VALUE&NAME=VALUE"
    elif not url.database and "service" not in url.query:
        bad, remedy = "an address without a database", ""
    elif odd := [k for k in url.query if k not in _OPTIONS]:
        bad = "an option that no address may have" + (f" ({odd[0]})" if odd[0].isalpha() else "")
        remedy = f"the options are {', '.join(_OPTIONS)}; use a service file for others"
    elif without_passwords(shown := str(url.query.get("options", ""))) != shown:
        bad, remedy = "a secret in options", "use a service file"
    if bad is not None:
        raise refuse("--storage", bad, _ADDRESS, remedy)
    secret = url.query.get("password") if url.password is None else url.password
    query = url.difference_update_query(["password"]).query
    scheme = "postgresql" if url.drivername == "postgres" else url.drivername
    plain = url.create(scheme, url.username, None, url.host, url.port, url.database, query)
    return plain.render_as_string(), None if secret is None else str(secret)


def _engine(where: Path | SharedStudy) -> tuple[URL, dict[str, Any]]:
    """Return the address with its driver and password, and the options of SQLAlchemy's engine."""
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.pool import NullPool

    url, connect = URL.create("sqlite", database=str(where)), {"timeout": TRY_S}
    if isinstance(where, SharedStudy):
        url = make_url(where.url).set(password=where.password)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        # A server that vanishes must not hold a run for the hours of TCP's defaults.
        connect = {"connect_timeout": TRY_S, "keepalives_idle": 30, "tcp_user_timeout": 30_000}
        connect = {name: value for name, value in connect.items() if name not in url.query}
    # Trials are minutes apart: no connection is held between them, so a restart is not noticed.
    return url, {"connect_args": connect, "poolclass": NullPool}


def open_storage(where: Path | SharedStudy, *, create: bool) -> RDBStorage:
    """Open Optuna's storage; `create` makes missing tables. Raises whatever goes wrong."""
    import optuna

    for library in ("alembic", "sqlalchemy"):  # errors are reported in our own line
        logging.getLogger(library).setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if create and isinstance(where, Path):  # SQLite itself would not let a group write, whatever the umask
        os.close(os.open(where, os.O_RDWR | os.O_CREAT, 0o666))
    url, options = _engine(where)
    # Optuna formats the address, so braces are doubled.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    return optuna.storages.RDBStorage(text, engine_kwargs=options, skip_table_creation=not create)


def check_reachable(shared: SharedStudy) -> None:
    """Refuse a database that cannot be connected to, before any work is done."""
    from sqlalchemy import create_engine

    with one_line(shared):
        url, options = _engine(shared)
        create_engine(url, **options).connect().close()


@contextlib.contextmanager
def one_line(where: Path | SharedStudy) -> Iterator[None]:
    """Turn any failure of a database into one line: `StudyUnavailable` or another `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Optuna and SQLAlchemy wrap the driver's own error
            cause = cause.__cause__
        got = f"{type(cause).__name__}: {cause}"
        lost = isinstance(cause, KeyError)
        if lost or (isinstance(where, Path) and not isinstance(cause, sqlite3.OperationalError)):
            got = "a database without the study" if lost else got
            raise refuse(str(where), got, "a readable study of this run", RESTORE) from None
        remedy = "end the process that holds it or free the disk, then --resume"
        if isinstance(where, SharedStudy):
            remedy = (
                "see to the server, the address and the password (PGPASSWORD, ~/.pgpass or in "
                "--storage; the driver: pip install -e '.[postgres]'), then --resume a begun run"
            )
        raise StudyUnavailable(str(refuse(str(where), got, "a database that answers", remedy))) from None


def check_sqlite(path: Path) -> None:
    """Refuse a file that is not a whole SQLite database."""
    if not path.is_file():
        raise refuse(str(path), "no such file", "the study of a run", RESTORE)
    address = f"{path.absolute().as_uri()}?mode=rw"  # SQLite rolls a half-written trial back
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=TRY_S)) as connection:
            connection.execute("SELECT count(*) FROM trials")
            (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            with one_line(path):
                raise
        raise refuse(str(path), error, "a whole SQLite database", RESTORE) from None
    if verdict != "ok":
        raise refuse(str(path), "a damaged database", "a whole SQLite database", RESTORE)
