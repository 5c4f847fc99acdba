"""A child process: what it says is heard once, in order; nothing that it started outlives it."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.jobs.local import SILENT_S, Child, Message
from space.errors import InputError

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
HOLDS = (
    "import os, sys, time\n"
    "child = os.fork()\n"
    "if child == 0: time.sleep(60); os._exit(0)\n"
    "print('{\"child\": %d}' % child, flush=True)\n"
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


class Heard:
    """A child that runs a piece of Python, and what was heard of it."""

    def __init__(self, code: str, log: Path | None = None) -> None:
        self.queue: Queue[Message | None] = Queue()
        command = [sys.executable, "-c", code]
        self.child = Child(command, lambda _, said: self.queue.put(said), log=log)

    def next(self) -> Message | None:
        return self.queue.get(timeout=30.0)


@pytest.fixture
def echo() -> Iterator[Heard]:
    heard = Heard(ECHO)
    yield heard
    heard.child.end()


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_what_is_said_comes_back_in_order(echo: Heard) -> None:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.dictionaries(st.text(), VALUES), max_size=5))
    def holds(messages: list[Message]) -> None:
        for message in messages:
            echo.child.send(message)
        assert [echo.next() for _ in messages] == json.loads(json.dumps(messages))

    holds()


def test_what_is_no_message_is_left_out() -> None:
    heard = Heard("print('noise'); print('[1]'); print('{'); print('{\"a\": 1}'); print('3')")
    assert [heard.next(), heard.next()] == [{"a": 1}, None]
    assert heard.child.wait(5.0)
    assert heard.child.end() == 0


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("pass", 0)])
def test_its_end_is_heard_with_its_status(code: str, status: int, tmp_path: Path) -> None:
    heard = Heard(f"import sys; print('told', file=sys.stderr); {code}", tmp_path / "log")
    assert heard.next() is None
    assert heard.child.wait(5.0)
    heard.child.send({"too": "late"})
    assert heard.child.end() == status
    assert (tmp_path / "log").read_text() == "told\n"


def test_one_that_is_ended_says_nothing_more(echo: Heard) -> None:
    echo.child.send({"n": 1})
    assert echo.next() == {"n": 1}
    assert echo.child.alive
    assert echo.child.end() == -signal.SIGKILL
    assert not echo.child.alive
    time.sleep(0.2)
    assert echo.queue.empty()
    assert echo.child.end() == -signal.SIGKILL, "again, to no harm"


def test_one_with_patience_ends_by_itself(echo: Heard) -> None:
    assert echo.child.end(grace_s=30.0) == 0


def test_what_it_started_ends_with_it() -> None:
    """A forked child holds the pipe: the output has no end, but the process is gone."""
    heard = Heard(HOLDS)
    said = heard.next()
    assert said is not None
    assert heard.child.wait(5.0)
    assert not heard.child.gone(), "something may yet be heard of it"
    time.sleep(SILENT_S + 0.1)
    assert heard.child.gone()
    assert heard.queue.empty()
    assert lives(said["child"])
    heard.child.end()
    until = time.monotonic() + 10
    while lives(said["child"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives(said["child"])


def test_one_that_has_much_to_say_can_leave_in_peace() -> None:
    """Nobody listens any more, but its output is drained until it has cleaned up."""
    code = (
        "import json, sys\n"
        "for line in sys.stdin: pass\n"
        "for at in range(5000): print(json.dumps({'at': at, 'more': 'x' * 40}), flush=True)\n"
        "raise SystemExit(3)\n"
    )
    heard = Heard(code)
    assert heard.child.end(grace_s=60.0) == 3
    assert heard.queue.empty()


def test_one_that_does_not_listen_holds_up_nobody() -> None:
    heard = Heard("import time; time.sleep(60)")
    begun = time.monotonic()
    for at in range(100):
        heard.child.send({"at": at, "more": "x" * 10_000})
    assert heard.child.alive
    assert heard.child.end() == -signal.SIGKILL
    assert time.monotonic() - begun < 30


def test_bytes_that_are_no_text_deafen_nobody() -> None:
    code = 'import os; os.write(1, b\'\\xff\\xfe\\n{"a": "\\xff"}\\n{"b": 1}\\n\')'
    heard = Heard(code)
    assert [heard.next(), heard.next(), heard.next()] == [{"a": "\ufffd"}, {"b": 1}, None]
    heard.child.end()


def test_one_whose_child_left_the_group_is_ended_in_bounded_time() -> None:
    code = (
        "import os, time\n"
        "if os.fork() == 0: os.setsid(); time.sleep(30); os._exit(0)\n"
        "print('{\"a\": 1}', flush=True); time.sleep(60)\n"
    )
    heard = Heard(code)
    assert heard.next() == {"a": 1}
    begun = time.monotonic()
    assert heard.child.end() == -signal.SIGKILL
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("how", ["process", "thread"])
def test_where_the_system_has_no_room_it_is_one_line(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        if how == "process":
            raise OSError(errno.EMFILE, "Too many open files")
        raise RuntimeError("can't start new thread")

    begun: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def popen(*given: Any, **more: Any) -> subprocess.Popen[str]:
        begun.append(real(*given, **more))
        return begun[-1]

    if how == "process":
        monkeypatch.setattr("nas.jobs.local.subprocess.Popen", none)
    else:
        monkeypatch.setattr("nas.jobs.local.subprocess.Popen", popen)
        monkeypatch.setattr("nas.jobs.local.threading.Thread.start", none)
    with pytest.raises(InputError, match="fewer --workers") as refused:
        Heard(ECHO)
    assert "\n" not in str(refused.value)
    assert all(process.poll() is not None for process in begun)


def test_one_that_cannot_start_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Child([str(tmp_path / "nothing")], lambda *_: None)
