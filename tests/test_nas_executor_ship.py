"""Files travel whole: what arrives is what was sent, once a node, and what comes back replaces."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.jobs.node import SENT, do_here, forget_old
from nas.jobs.ship import (
    arrive,
    at,
    content_name,
    left,
    pack,
    place_files,
    put,
    quick_name,
    state_of,
)

NAMES = st.text("abcdefgh", min_size=1, max_size=4)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map(tuple), st.binary(max_size=200), max_size=6
)


def write(folder: Path, tree: dict[tuple[str, ...], bytes]) -> dict[str, bytes]:
    """Write files, leaving out those whose place is taken by another's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for parts, data in sorted(tree.items()):
        path = folder.joinpath(*parts)
        if any(p.is_file() for p in path.parents) or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        written["/".join(parts)] = data
    return written


def read(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@settings(max_examples=40, deadline=None)
@given(tree=TREES)
def test_a_folder_arrives_as_it_was_sent(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[tuple[str, ...], bytes]
) -> None:
    base = tmp_path_factory.mktemp("ship")
    sent = write(base / "from", tree)
    (base / "from" / ".lock").write_text("stays here")
    name = content_name(base / "from")
    got = arrive(base / "node", name, lambda: pack(base / "from"), single=None)
    assert read(got) == sent
    # The name is of the content: the same elsewhere, another for any other content.
    assert content_name(got) == name
    if sent:
        victim = got / sorted(sent)[0]
        victim.write_bytes(victim.read_bytes() + b"x")
        assert content_name(got) != name


def test_a_file_arrives_under_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"abc")
    got = arrive(tmp_path / "node", content_name(file), lambda: pack(file), single=file.name)
    assert got.name == file.name
    assert got.read_bytes() == b"abc"


def test_it_is_fetched_once_whoever_asks_at_the_same_time(tmp_path: Path) -> None:
    write(tmp_path / "from", {("a",): b"1" * 1000})
    fetched: list[int] = []

    def load() -> bytes:
        fetched.append(1)
        return pack(tmp_path / "from")

    got: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: got.append(arrive(tmp_path / "node", "n", load, single=None))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert len(set(got)) == 1
    assert len(got) == 8


def test_a_broken_journey_leaves_nothing_half(tmp_path: Path) -> None:
    write(tmp_path / "from", {("a",): b"1", ("b",): b"2"})
    whole = pack(tmp_path / "from")
    with pytest.raises(Exception, match=r".+"):
        arrive(tmp_path / "node", "n", lambda: whole[:700], single=None)
    assert not (tmp_path / "node" / "n").exists()
    assert not [p for p in (tmp_path / "node").iterdir() if p.is_dir()]
    assert read(arrive(tmp_path / "node", "n", lambda: whole, single=None)) == {
        "a": b"1",
        "b": b"2",
    }


@settings(max_examples=40, deadline=None)
@given(before=TREES, after=TREES, random_seed=st.integers(0, 99))
def test_what_a_job_left_is_what_is_new_or_changed(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[tuple[str, ...], bytes],
    after: dict[tuple[str, ...], bytes],
    random_seed: int,
) -> None:
    base = tmp_path_factory.mktemp("left")
    old = write(base / "work", before)
    state = state_of(base / "work")
    new = write(base / "work", after)
    rng = random.Random(random_seed)
    changed = {name: data + b"+" for name, data in old.items() if rng.random() < 0.5}
    for name, data in changed.items():
        (base / "work" / name).write_bytes(data)
    files = left(base / "work", state)
    assert files == {**new, **changed}
    # At home it is the same, whether the folder was there or not.
    write(base / "home", before)
    place_files(base / "home", files)
    assert read(base / "home") == read(base / "work")
    place_files(base / "fresh", files)
    assert read(base / "fresh") == files
    assert not list(base.glob(".*"))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_nothing_is_placed_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises((AssertionError, OSError)):
        place_files(tmp_path / "out", {name: b"x"})
    assert not (tmp_path / "x").exists()


def test_dotted_paths() -> None:
    spec = {"a": {"b": 1}, "c": 2}
    assert at(spec, "a.b") == 1
    assert put(spec, {"a.b": 5, "c": 6}) == {"a": {"b": 5}, "c": 6}
    assert spec == {"a": {"b": 1}, "c": 2}


def test_the_state_of_a_folder_changes_with_it(tmp_path: Path) -> None:
    write(tmp_path / "a", {("x",): b"1"})
    first = quick_name(tmp_path / "a")
    assert quick_name(tmp_path / "a") == first
    write(tmp_path / "a", {("y",): b"2"})
    assert quick_name(tmp_path / "a") != first


def test_a_job_that_fails_on_a_node_leaves_nothing_there(tmp_path: Path) -> None:
    told = {
        "kind": "no such kind",
        "key": "k",
        "spec": {"out": "/nowhere/out"},
        "units": 0.0,
        "leaves": "out",
        "flat": [],
        "pieces": 0,
    }
    answer = do_here(told, [], tmp_path / "node", threads=1, token=None, said=lambda _: None)
    assert not answer["result"]["ok"]
    assert answer["files"] == {}
    assert not list((tmp_path / "node").iterdir())


def test_what_lost_sessions_sent_goes_after_a_while(tmp_path: Path) -> None:
    own, recent, old, others = (
        tmp_path / name for name in (f"{SENT}own", f"{SENT}recent", f"{SENT}old", "somebody-elses")
    )
    for folder in (own, recent, old, others):
        (folder / "node").mkdir(parents=True)
    for folder in (own, old, others):
        os.utime(folder, (1.0, 1.0))
    forget_old(own)
    assert own.exists()
    assert recent.exists()
    assert others.exists()
    assert not old.exists()


def test_a_node_that_sees_no_files_is_no_candidates_fault(tmp_path: Path) -> None:
    """Then the task is lost, and done elsewhere or with its files sent."""
    told = {
        "kind": "open-labels",
        "key": "k",
        "units": 0.0,
        "spec": {"out": "/nowhere/out", "dataset": "/nowhere/data"},
        "leaves": "out",
        "flat": [],
        "pieces": 1,
    }
    token = (str(tmp_path / "run.json"), "0" * 32)
    with pytest.raises(FileNotFoundError, match="does not see the driver's files"):
        do_here(told, [], tmp_path / "node", threads=1, token=token, said=lambda _: None)
    (tmp_path / "run.json").write_text("{}")  # another run's, under the same path
    with pytest.raises(FileNotFoundError, match="does not see the driver's files"):
        do_here(told, [], tmp_path / "node", threads=1, token=token, said=lambda _: None)
    token = (token[0], content_name(tmp_path / "run.json"))
    answer = do_here(told, [], tmp_path / "node", threads=1, token=token, said=lambda _: None)
    assert "/nowhere/data" in answer["result"]["reason"]
