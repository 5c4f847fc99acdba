"""A PostgreSQL server of a test's own: on loopback, with a password, for five minutes at most."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

PASSWORD = "s3cret/@:{%41}word"
"""With everything in it that an address has a meaning for."""
USER, DATABASE = "nas", "runs"


def programs() -> Path | None:
    """Return where `initdb` and `postgres` are, None without a server on this machine."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    candidates = [*([Path(found).resolve().parent] if found else []), *homes]
    return next((home for home in candidates if (home / "postgres").exists()), None)


def why_not() -> str | None:
    """Say why there can be no server here, None if there can."""
    if programs() is None:
        return "no PostgreSQL server (initdb, postgres) on this machine"
    if os.geteuid() == 0 and _other_user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


def _other_user() -> str | None:
    names = {user.pw_name for user in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


class Server:
    """One server; `start`, `stop` and `kill` it as a test likes."""

    def __init__(self, folder: Path) -> None:
        home = programs()
        assert home is not None
        self.home, self.data = home, folder / "data"
        self.user = _other_user() if os.geteuid() == 0 else None
        if self.user is not None:
            shutil.chown(folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if self.user is not None:
            shutil.chown(secret, self.user)
        options = ("-U", USER, "-A", "scram-sha-256", "--no-sync", "-E", "UTF8", "--locale=C")
        command = [str(home / "initdb"), "-D", str(self.data), *options, f"--pwfile={secret}"]
        subprocess.run(command, check=True, timeout=60, cwd="/", stdout=subprocess.DEVNULL, user=self.user)
        secret.unlink()
        self.start()
        self.sql(f"CREATE DATABASE {DATABASE}", "postgres")

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = ["timeout", "--signal=INT", "300", str(self.home / "postgres")]
        command += ["-D", str(self.data), "-p", str(self.port)]
        settings = ("listen_addresses=127.0.0.1", "fsync=off", "unix_socket_directories=")
        for setting in (*settings, "shared_buffers=8MB", "max_connections=20"):
            command += ["-c", setting]
        self.process = subprocess.Popen(
            command, cwd="/", user=self.user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 30
        while True:
            try:
                self.sql("SELECT 1", "postgres")
                return
            except Exception:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise
            time.sleep(0.1)

    def _signal(self, number: signal.Signals) -> None:
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, number)
        self.process.wait(30)

    def stop(self) -> None:
        """Stop it as an administrator does who will not wait for clients."""
        if self.process.poll() is None:
            self._signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill its first process; the others notice and end."""
        self._signal(signal.SIGKILL)

    def sql(self, statement: str, database: str = DATABASE) -> list[tuple[object, ...]]:
        """Do one statement as the server's owner and return its rows."""
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "user": USER, "password": PASSWORD, "dbname": database}
        with psycopg.connect(**where, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def url(self, password: str | None = PASSWORD, database: str = DATABASE) -> str:
        """Return its address, with the password unless there is to be none."""
        secret = "" if password is None else ":" + quote(password, safe="")
        return f"postgresql://{USER}{secret}@127.0.0.1:{self.port}/{database}"


@contextmanager
def serving() -> Iterator[Server]:
    """A server for the time of a `with`."""
    folder = Path(tempfile.mkdtemp(prefix="nas-postgres-"))
    server = None
    try:
        server = Server(folder)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
