"""Jobs and their queue: what travels is what arrives, and every job ends once, in order."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.core.dataclass_json import from_json, to_json
from nas.core.progress import Tick
from nas.jobs.job import READS, WRITES, Job, Values, decode_job, encode_job, file_fields, with_files
from nas.jobs.queue import JobQueue


@dataclass(frozen=True)
class Inner:
    """An argument inside another one."""

    weights: Path = field(metadata=READS)
    order: Path | None = field(default=None, metadata=READS)


@dataclass(frozen=True)
class Outer:
    """An argument with all that the JSON form covers."""

    number: int
    share: float | None
    pair: tuple[str, float]
    paths: tuple[Path, ...]
    free: Mapping[str, Any]
    inner: Inner | None
    out: Path = field(metadata=WRITES)


def do(argument: Outer, tick: Tick) -> Values:
    """A job function."""
    return {"number": argument.number}


PATHS = st.text("ab/.", min_size=1).map(Path)
INNER = st.builds(Inner, PATHS, st.none() | PATHS)
OUTER = st.builds(
    Outer,
    st.integers(),
    st.none() | st.floats(allow_nan=False),
    st.tuples(st.text(), st.floats(allow_nan=False)),
    st.lists(PATHS).map(tuple),
    st.dictionaries(st.text(), st.integers() | st.lists(st.text())),
    st.none() | INNER,
    PATHS,
)


@given(OUTER)
def test_an_argument_arrives_as_it_was_sent(argument: Outer) -> None:
    assert from_json(Outer, to_json(argument)) == argument
    sent = Job(do, argument, "a", 3.0, timed=True)
    with pytest.raises(ValueError, match="is no job function"):
        decode_job(encode_job(sent))
    assert decode_job(encode_job(sent), (__name__,)) == sent


@pytest.mark.parametrize("function", [pickle.loads, Path.unlink, print])
def test_only_job_functions_are_called(function: Any) -> None:
    with pytest.raises(ValueError, match="is no job function"):
        decode_job(encode_job(Job(function, None, "a")))


def test_files_of_an_argument_are_found_and_replaced() -> None:
    argument = Outer(1, None, ("", 0.0), (), {}, Inner(Path("w"), Path("o")), Path("out"))
    found = {name: path for name, (path, _) in file_fields(argument).items()}
    assert found == {"inner.weights": Path("w"), "inner.order": Path("o"), "out": Path("out")}
    moved = with_files(argument, {name: Path("there") / path for name, path in found.items()})
    assert {p.parent for p, _ in file_fields(moved).values()} == {Path("there")}
    assert with_files(moved, found) == argument
    assert file_fields(Outer(1, None, ("", 0.0), (), {}, Inner(Path("w")), Path("out"))).keys() == {
        "inner.weights",
        "out",
    }


@given(st.lists(st.booleans(), max_size=8), st.integers(0, 2), st.integers(1, 3), st.data())
def test_any_history_ends_every_job_once_in_order_and_within_its_tries(
    timed: list[bool], retries: int, slots: int, data: st.DataObject
) -> None:
    jobs = [Job(do, None, f"j{n}", timed=alone) for n, alone in enumerate(timed)]
    queue = JobQueue(jobs, retries)
    begun: list[str] = []
    losses: dict[str, int] = {}
    ended: list[str] = []
    while len(ended) < len(jobs):
        while (start := queue.next(lambda _: len(queue.running) < slots)) is not None:
            job, attempt = start
            assert attempt == losses.get(job.key, 0) + 1
            assert queue.is_running(job.key, attempt)
            assert len(queue.running) <= slots
            begun += [job.key] if attempt == 1 else []
        alone = [job for job in queue.running.values() if job.timed]
        assert queue.running, "something always runs"
        assert not alone or len(queue.running) == 1
        key = data.draw(st.sampled_from(sorted(queue.running)))
        if data.draw(st.booleans()):
            queue.finished(key)
            ended.append(key)
            continue
        losses[key] = losses.get(key, 0) + 1
        final = data.draw(st.booleans())
        again = queue.lost(key, final=final)
        assert again == (not final and losses[key] <= retries)
        ended += [] if again else [key]
    assert begun == [job.key for job in jobs], "in the order given"
    assert sorted(ended) == sorted(begun), "each once"
    assert queue.next(lambda _: True) is None
