"""Any text can be printed on any terminal, and the user's umask decides who reads a file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from synthetic_run import CONFIG, make_run

from nas.contract.__main__ import main
from nas.core.io import get_or_make, write_atomic, write_json
from nas.core.progress import Console
from nas.search.study import Study

COMMANDS = ("contract", "train", "labels", "export", "inherit", "transfer")
ODD = "Grüße, Ω, 图, \udcff"


class Terminal(io.TextIOWrapper):
    """A terminal of some encoding that refuses what it cannot show."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


ENCODINGS = pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])


@contextlib.contextmanager
def terminal_of(encoding: str) -> Iterator[Terminal]:
    made = Terminal(encoding)
    with contextlib.redirect_stdout(made), contextlib.redirect_stderr(made):
        yield made


@ENCODINGS
def test_lines_and_bars_of_any_text(encoding: str) -> None:
    terminal = Terminal(encoding)
    console = Console(stream=terminal)
    console.line(ODD)
    console.count(ODD)
    console.line(ODD)
    console.stop()
    with console.bar(3, "images"):
        console.describe(ODD)
        console.advance(1)
        console.line(ODD)
    assert terminal.shown().count("\\udcff") >= 3


@ENCODINGS
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command(encoding: str, command: str) -> None:
    with terminal_of(encoding) as terminal, pytest.raises(SystemExit) as end:
        import_module(f"nas.{command}.__main__").main(["--help"])
    assert end.value.code == 0
    assert f"python -m nas.{command}" in terminal.shown()


@ENCODINGS
def test_reports_and_refusals_with_names_of_any_alphabet(encoding: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "Läufe 图")
    config = {**CONFIG, "data": f"/bilder/{ODD}"}
    (run / "run.json").write_text(json.dumps({**json.loads((run / "run.json").read_text()), "config": config}))
    with terminal_of(encoding) as terminal:
        assert main(["--status", str(run)]) == 0
        assert main(["--status", str(tmp_path / ODD)]) == 2
    assert "error: " in terminal.shown()
    from nas.report import write_report

    write_report(run)
    assert "Grüße" in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_and_folders_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """A group shares a cache (002, a folder that hands its group on); 077 keeps everything to its owner."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o2775)
    before = os.umask(umask)
    try:
        get_or_make(cache / "teachers" / "one", lambda draft: write_json(draft / "a.json", [1]))
        write_atomic(cache / "b", b"1")
        write_atomic(cache / "b", b"2")
        Study(cache / "study.db", create=True).close()
    finally:
        os.umask(before)
    for path in cache.rglob("*"):
        about = path.stat()
        wanted = mode if path.is_file() else 0o777 & ~umask
        assert stat.S_IMODE(about.st_mode) & 0o777 == wanted, path
        assert about.st_gid == cache.stat().st_gid
    assert not list(cache.rglob("*.tmp"))
