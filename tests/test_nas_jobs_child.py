"""A child process: its messages arrive once and in order, and `end` leaves nothing running."""

from __future__ import annotations

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

from nas.jobs.local import Child
from nas.jobs.worker import Message
from space.errors import InputError

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


class Talk:
    """A child that runs Python code, and the messages that it sends."""

    def __init__(self, code: str, log: Path | None = None) -> None:
        self.queue: Queue[Message | None] = Queue()
        command = [sys.executable, "-c", code]
        self.child = Child(command, lambda _, message: self.queue.put(message), log=log)

    def next(self) -> Message | None:
        return self.queue.get(timeout=30.0)


@pytest.fixture
def echo() -> Iterator[Talk]:
    talk = Talk(ECHO)
    yield talk
    talk.child.end()


def test_messages_come_back_in_order(echo: Talk) -> None:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.dictionaries(st.text(), VALUES), max_size=5))
    def holds(messages: list[Message]) -> None:
        for message in messages:
            echo.child.send(message)
        assert [echo.next() for _ in messages] == json.loads(json.dumps(messages))

    holds()


def test_other_lines_are_ignored() -> None:
    talk = Talk("print('noise'); print('[1]'); print('{'); print('{\"a\": 1}'); print('3')")
    assert [talk.next(), talk.next()] == [{"a": 1}, None]
    assert talk.child.wait(5.0)
    assert talk.child.end() == 0


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("pass", 0)])
def test_its_end_is_noticed_with_its_status(code: str, status: int, tmp_path: Path) -> None:
    talk = Talk(f"import sys; print('told', file=sys.stderr); {code}", tmp_path / "log")
    assert talk.next() is None
    assert talk.child.wait(5.0)
    talk.child.send({"too": "late"})
    assert talk.child.end() == status
    assert (tmp_path / "log").read_text() == "told\n"


def test_an_ended_child_sends_no_more_messages(echo: Talk) -> None:
    echo.child.send({"n": 1})
    assert echo.next() == {"n": 1}
    assert echo.child.alive
    assert echo.child.end() == -signal.SIGKILL
    assert not echo.child.alive
    time.sleep(0.2)
    assert echo.queue.empty()
    assert echo.child.end() == -signal.SIGKILL, "again, to no harm"


def test_output_is_drained_while_a_child_ends_by_itself() -> None:
    code = (
        "import json, sys\n"
        "for line in sys.stdin: pass\n"
        "for at in range(5000): print(json.dumps({'at': at, 'more': 'x' * 40}), flush=True)\n"
        "raise SystemExit(3)\n"
    )
    talk = Talk(code)
    assert talk.child.end(grace_s=60.0) == 3
    assert talk.queue.empty()


def test_a_child_that_does_not_read_blocks_no_caller() -> None:
    talk = Talk("import time; time.sleep(60)")
    begun = time.monotonic()
    for at in range(100):
        talk.child.send({"at": at, "more": "x" * 10_000})
    assert talk.child.alive
    assert talk.child.end() == -signal.SIGKILL
    assert time.monotonic() - begun < 30


def test_invalid_bytes_stop_no_later_message() -> None:
    code = 'import os; os.write(1, b\'\\xff\\xfe\\n{"a": "\\xff"}\\n{"b": 1}\\n\')'
    talk = Talk(code)
    assert [talk.next(), talk.next(), talk.next()] == [{"a": "\ufffd"}, {"b": 1}, None]
    talk.child.end()


def test_a_grandchild_outside_the_group_does_not_delay_the_end() -> None:
    code = (
        "import os, time\n"
        "if os.fork() == 0: os.setsid(); time.sleep(30); os._exit(0)\n"
        "print('{\"a\": 1}', flush=True); time.sleep(60)\n"
    )
    talk = Talk(code)
    assert talk.next() == {"a": 1}
    begun = time.monotonic()
    assert talk.child.end() == -signal.SIGKILL
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("how", ["process", "thread"])
def test_a_system_without_free_processes_or_threads_is_one_line(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def popen(*given: Any, **more: Any) -> subprocess.Popen[str]:
        if how == "process":
            raise OSError(errno.EMFILE, "Too many open files")
        begun.append(real(*given, **more))
        return begun[-1]

    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("nas.jobs.local.subprocess.Popen", popen)
    monkeypatch.setattr("nas.jobs.local.threading.Thread.start", start)
    with pytest.raises(InputError, match="fewer --workers") as refused:
        Talk(ECHO)
    assert "\n" not in str(refused.value)
    assert all(process.poll() is not None for process in begun)


def test_a_missing_command_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Child([str(tmp_path / "nothing")], lambda *_: None)
