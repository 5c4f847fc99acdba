"""Dealings with Ray, without Ray: what is answered late, lost, or not wanted any more."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from nas.jobs import ray as far
from nas.jobs.bridge import Bridge, _Running
from nas.jobs.job import Job, Needs, Result
from nas.jobs.local import LocalPlaces
from nas.jobs.make import make_executor
from nas.jobs.means import Means
from nas.jobs.node import session_place
from nas.jobs.parcels import Parcels
from nas.jobs.pool import Begun, Ended, Event, Lost, Pool, Ticked
from nas.jobs.ray import RayPlaces
from nas.jobs.remote import Bench, Board
from space.errors import InputError
from tests.test_nas_executor import WORKER

Order = Mapping[str, Any]


class FakeBridge:
    """A bridge that notes its orders and says what a test wants."""

    def __init__(self, hello: Order, log: Path | None) -> None:
        self.orders: list[Order] = []
        self.cancelled: list[tuple[str, int]] = []
        self.said: Queue[dict[str, Any] | None] = Queue()
        self.ended = 0
        made.append(self)

    def first(self, timeout_s: float) -> dict[str, Any] | None:
        if refusals:
            raise refusals.pop()
        return {"ready": 1}

    def send(self, message: Order) -> None:
        self.orders.append(message)

    def cancel(self, key: str, attempt: int) -> None:
        self.cancelled.append((key, attempt))

    def take(self, timeout_s: float) -> list[dict[str, Any] | None]:
        time.sleep(min(timeout_s, 0.01))
        return [self.said.get() for _ in range(self.said.qsize())]

    def end(self, patience_s: float = 15.0) -> str:
        self.ended += 1
        return "it ended"


made: list[FakeBridge] = []
refusals: list[BaseException] = []


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> RayPlaces:
    made.clear()
    refusals.clear()
    monkeypatch.setattr(far, "_Bridge", FakeBridge)
    return cluster_of(Means(executor="ray", job_minutes=1.0))


def cluster_of(means: Means) -> RayPlaces:
    here = LocalPlaces(
        threads=1,
        workers=1,
        gpus=(),
        limit_s=None,
        log=None,
        logs=None,
        command=WORKER,
        memory_bytes=None,
    )
    return RayPlaces(means, threads=1, device="cpu", log=None, logs=None, here=here)


def job(name: str) -> Job:
    return Job("train", name, {"out": f"/nowhere/{name}"}, 10.0, Needs((), "out"))


def test_what_waits_for_the_worker_here_begins_when_it_starts(places: RayPlaces) -> None:
    """Its time does not run while it waits: each attempt is told to have begun before it ended."""
    events: list[Event] = []
    try:
        for name in "abc":
            places.start(Job("echo", name, {}), 1)
        places.cancel("b", 1)
        until = time.monotonic() + 120
        while sum(isinstance(e, Ended) for e in events) < 2 and time.monotonic() < until:
            events += places.poll(0.2)
    finally:
        places.close()
    assert [(type(e), e.key) for e in events] == [
        (Begun, "a"),
        (Ended, "a"),
        (Begun, "c"),
        (Ended, "c"),
    ]


@pytest.mark.parametrize("address", [None, "head:6379"])
def test_a_cluster_that_lost_all_its_room_is_one_line(
    address: str | None, places: RayPlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a run that waits for ever: the attempt is lost, another is tried, none has room."""
    monkeypatch.setattr(far, "NO_ROOM_S", 0.2)
    places = cluster_of(Means(executor="ray", ray_address=address))
    with Pool(places, retries=2, queues=True) as pool:
        jobs = pool.stream([job("a")], deadline=time.monotonic() + 30)
        threading.Timer(
            0.3,
            lambda: [
                made[0].said.put(m)
                for m in (
                    {"slots": 0},
                    {"key": "a", "attempt": 1, "lost": "node died", "seconds": 0.1},
                )
            ],
        ).start()
        with pytest.raises(InputError, match="no node has room"):
            next(jobs)


def test_after_a_break_a_connection_is_tried_again(places: RayPlaces) -> None:
    places.start(job("a"), 1)
    made[0].said.put({"slots": 0})
    made[0].said.put(None)
    (lost,) = places.poll(0.1)
    assert isinstance(lost, Lost)
    assert not lost.counts
    assert places.idle() > 0, "what the old connection said of room is forgotten"
    places.start(job("a"), 2)
    assert len(made) == 2
    assert made[0].ended == 1


def test_a_tick_tells_that_an_attempt_began(places: RayPlaces) -> None:
    """The word of its beginning may be lost with the board; its time runs all the same."""
    places.start(job("a"), 1)
    for message in ({"tick": 3.0}, {"begun": True}, {"tick": 4.0}):
        made[0].said.put({"key": "a", "attempt": 1, **message})
    assert places.poll(0.1) == [Begun("a", 1), Ticked("a", 1, 3.0), Ticked("a", 1, 4.0)]
    (_, since) = places._far["a", 1]
    assert since < time.monotonic()


@pytest.mark.parametrize(
    ("given", "places"), [({}, 3), ({"gpu_share": 0.5}, 6), ({"workers": 2}, 2)]
)
def test_a_cluster_of_ones_own_has_a_place_for_every_worker(
    given: dict[str, Any], places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.clear()
    monkeypatch.setattr(far, "_Bridge", FakeBridge)
    monkeypatch.setattr("nas.jobs.make.visible_gpus", lambda: [0, 1, 2])
    hello: list[Order] = []
    monkeypatch.setattr(FakeBridge, "__init__", lambda self, told, log: hello.append(told))
    means = Means(executor="ray", **given)
    pytest.importorskip("ray")
    executor = make_executor(means, threads=2, device="cuda")
    assert isinstance(executor._places, RayPlaces)
    executor._places._connect()
    assert hello[0]["cpus"] == 2 * places


def test_an_interrupt_while_connecting_leaves_no_bridge(places: RayPlaces) -> None:
    refusals.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        places.start(job("a"), 1)
    assert [bridge.ended for bridge in made] == [1]


class Late:
    """As much of Ray as a bridge asks a board by; answers come when they are let."""

    class exceptions:
        class RayError(Exception): ...

    def __init__(self) -> None:
        self.there = True
        self.results: dict[object, Any] = {}

    def wait(
        self, refs: list[object], *, num_returns: int = 1, timeout: float = 0.0
    ) -> tuple[list[object], list[object]]:
        return (refs, []) if self.there else ([], refs)

    def get(self, ref: object) -> Any:
        return self.results.pop(ref)


class Handle:
    """A board as an actor: a call is done whether its answer is read or not."""

    def __init__(self, ray: Late) -> None:
        self.board = Board()
        self.ray = ray
        self.take = self

    def remote(self) -> object:
        ref = object()
        self.ray.results[ref] = self.board.take()
        return ref


def bridge_of(ray: Any, tasks: Mapping[object, Order] | None = None) -> tuple[Bridge, io.StringIO]:
    """Return a bridge that has not connected."""
    out = io.StringIO()
    bridge = object.__new__(Bridge)
    bridge._ray, bridge._out, bridge._asked = ray, out, None
    bridge._parcels = Parcels(ray, None)
    bridge._saying, bridge._homing = threading.Lock(), threading.Lock()
    bridge._renounced, bridge.over = set(), threading.Event()
    bridge._tasks = {ref: _Running(told, 0.0) for ref, told in (tasks or {"x": {}}).items()}
    return bridge, out


def said_by(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_what_a_board_answers_late_is_not_lost() -> None:
    ray = Late()
    bridge, out = bridge_of(ray)
    handle = Handle(ray)
    bridge._board = handle
    handle.board.begin("a", 1)
    ray.there = False
    for _ in range(3):
        bridge.ask_board()
    assert said_by(out) == []
    handle.board.add("a", 1, 2.0)
    ray.there = True
    bridge.ask_board()
    bridge.ask_board()
    assert said_by(out) == [
        {"key": "a", "attempt": 1, "begun": True},
        {"key": "a", "attempt": 1, "tick": 2.0},
    ]


@pytest.mark.parametrize("renounced", [False, True])
def test_what_is_renounced_is_not_put_in_place(renounced: bool, tmp_path: Path) -> None:
    """However far it is: the driver has removed its folder, or will when it hears the answer."""
    out = tmp_path / "a"
    told = {
        "key": "a",
        "attempt": 1,
        "leaves": "out",
        "spec": {"out": str(out)},
        "log": None,
        "reads": [],
    }
    ray = Late()
    result = {"key": "a", "ok": True, "values": {}, "reason": None, "seconds": 1.0}
    ray.results["ref"] = {"result": result, "files": {"w": b"1"}, "log": b"", "where": "node"}
    bridge, said = bridge_of(ray, {"ref": told})
    if renounced:
        bridge.renounce("a", 1)
        assert said_by(said) == [{"renounced": ["a", 1]}]
    bridge.harvest()
    assert out.exists() is not renounced
    assert any("result" in message for message in said_by(said)) is not renounced


@pytest.mark.parametrize("answers", [True, False])
def test_a_cancelled_attempt_is_waited_for_but_not_for_ever(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far, "RENOUNCE_S", 0.3)
    hears: list[Callable[[Any, Any], None]] = []

    class Silent:
        def __init__(self, command: object, hear: Any, *, log: object) -> None:
            hears.append(hear)

        def say(self, message: Order) -> None:
            if answers and "cancel" in message:
                threading.Timer(0.1, hears[0], (self, {"renounced": message["cancel"]})).start()

    monkeypatch.setattr(far, "Child", Silent)
    bridge = far._Bridge({}, None)
    begun = time.monotonic()
    for attempt in range(1, 4):
        bridge.cancel("a", attempt)
    took = time.monotonic() - begun
    assert bridge.take(0.0) == [], "an answer to a cancel is nobody else's"
    assert 0.3 <= took < (5.0 if answers else 0.6), "a bridge that is mute is waited for once"


class Told:
    """A board's handle, as an actor that hears nothing."""

    class begin:
        @staticmethod
        def remote(*_: object) -> None: ...


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_staged_by_a_lost_actor_is_staged_anew(
    lost: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is weighed finds its file, in a fresh process, and leaves no folder behind."""
    done: list[str] = []

    def run(job: Job) -> Result:
        done.append(job.kind)
        if job.kind == "peak-memory":
            assert Path(job.spec["staged"]).read_text() == "a network"
            return Result(job.key, True, {"peak_mem_bytes": 1})
        if fails:
            return Result(job.key, False, {}, "no room")
        file = Path(job.spec["out"]) / "net.onnx"
        file.write_text("a network")
        return Result(job.key, True, {"file": str(file)})

    def bench(node: str) -> Bench:
        hello = {"threads": 1, "retries": 0, "memory_bytes": None, "session": "a-test"}
        bench = Bench(hello, Told, node)
        monkeypatch.setattr(bench._executor, "run", run)
        monkeypatch.setattr(bench._executor, "rest", lambda: done.append("rest"))
        return bench

    told = {"key": "a", "attempt": 1, "units": 0.0}
    try:
        one = bench("one")
        staged = "/nowhere/net.onnx"
        if not lost:
            answer = one.do({**told, "kind": "stage", "spec": {"out": "/nowhere"}})["result"]
            staged = staged if fails else answer["values"]["file"]
            assert answer["ok"] is not fails
        answer = one.do({**told, "kind": "peak-memory", "spec": {"staged": staged}})["result"]
        assert (answer["ok"], answer["reason"]) == (not fails, "no room" if fails else None)
        if not fails:
            assert done == ["stage", *(["rest"] if lost else []), "peak-memory"]
        assert not one._place.exists()
    finally:
        session = session_place("a-test")
        for folder in (session / "one", session):
            if folder.exists():
                folder.rmdir()


def test_what_is_read_is_packed_once_until_it_changes(tmp_path: Path) -> None:
    """And a checkpoint that an attempt has read leaves the store, the data that all read stay."""
    packed: list[bytes] = []

    class Store:
        def put(self, data: bytes) -> int:
            packed.append(data)
            return len(packed)

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("1")
    (tmp_path / "w.safetensors").write_text("2")
    told = {
        "spec": {
            "dataset": str(tmp_path / "data"),
            "continue_from": {"checkpoint": str(tmp_path / "w.safetensors")},
        },
        "reads": ["dataset", "continue_from.checkpoint"],
        "flat": [],
    }
    parcels = Parcels(Store(), None)
    first = parcels.boxes(told, ["n"])
    assert [(box[0], box[3], box[4], box[5]) for box in first] == [
        ("dataset", None, False, [1]),
        ("continue_from.checkpoint", "w.safetensors", True, [2]),
    ]
    assert parcels.boxes(told, ["n"]) == first
    parcels.let_go(told)
    assert [box[5] for box in parcels.boxes(told, ["n"])] == [[1], [3]]
    (tmp_path / "data" / "a").write_text("another")
    again = parcels.boxes(told, ["n"])
    assert [box[5] for box in again] == [[4], [3]]
    assert again[0][2] != first[0][2]
    assert again[1][2] == first[1][2]
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(OSError):
        parcels.boxes(told, ["n"])
