"""The queue of an executor under arbitrary histories: nothing lost, nothing twice, in order."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.jobs.queue import HUNG, KEPT, LEAST_HUNG_S, LEAST_KNOWN, SLOW, Dispatcher, _Paces

NAMES = [f"j{at}" for at in range(8)]


@dataclass
class Model:
    """What a naive book-keeper knows of a dispatcher, and what he holds it to."""

    retries: int
    copies: bool
    queue: Dispatcher = field(init=False)
    now: float = 0.0
    order: int = 0
    known: dict[str, tuple[int, bool, bool]] = field(default_factory=dict)  # order, alone, ahead
    running: dict[str, set[int]] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)  # of a job's latest attempt
    attempts: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.queue = Dispatcher(retries=self.retries, copies=self.copies)

    def add(self, key: str, alone: bool, ahead: bool) -> None:
        """A job that is known already is at most wanted more than before."""
        self.queue.add(key, kind="k", units=1.0, alone=alone, ahead=ahead)
        if key in self.known:
            order, was_alone, was_ahead = self.known[key]
            self.known[key] = (order, was_alone, was_ahead and ahead)
            return
        self.asked[key] += 1
        self.order += 1
        self.known[key] = (self.order, alone, ahead)
        self.running[key] = set()
        self.attempts[key] = self.losses[key] = 0

    def forget(self, key: str) -> None:
        """Whatever became of a job, it ended once."""
        del self.known[key], self.running[key]
        self.begun.pop(key, None)
        self.ended[key] += 1
        assert self.ended[key] <= self.asked[key]

    def next(self, places: int) -> None:
        """Starts keep the order, the places, alone-ness, and make copies only of the slow."""
        waiting = [k for k in self.known if not self.running[k]]
        waiting.sort(key=lambda k: (self.known[k][2], self.known[k][0]))
        for start in self.queue.next(self.now, places):
            key = start.key
            places -= 1
            assert places >= 0
            busy = any(self.running.values())
            assert not any(self.running[k] for k in self.known if self.known[k][1]), "not alone"
            if self.running[key]:  # a copy
                assert self.copies
                assert len(self.running[key]) == 1
                assert self.losses[key] <= self.retries
                assert not [k for k in waiting if not self.known[k][1]], "others wait"
            else:
                assert key == waiting.pop(0), "out of order"
            assert not (self.known[key][1] and busy), "not alone"
            self.attempts[key] += 1
            assert start.attempt == self.attempts[key]
            assert self.attempts[key] <= self.retries + (2 if self.copies else 1)
            self.running[key].add(start.attempt)
            self.begun[key] = self.now
        # With room left, nothing waits but for one that must be alone.
        alone = any(self.known[k][1] for k in self.known if self.running[k])
        if places and waiting and not alone:
            assert self.known[waiting[0]][1]
            assert any(self.running.values())

    def finish(self, key: str, attempt: int) -> None:
        """Only an attempt that runs counts."""
        counts = key in self.known and attempt in self.running[key]
        assert self.queue.finished(key, attempt, self.now) == counts
        if counts:
            self.forget(key)

    def lose(self, key: str, attempt: int) -> None:
        """A job goes on while another attempt runs, or another try is left."""
        counts = key in self.known and attempt in self.running[key]
        goes_on = self.queue.lost(key, attempt)
        if not counts:
            assert not goes_on
            return
        self.running[key].discard(attempt)
        self.losses[key] += 1
        assert goes_on == (bool(self.running[key]) or self.losses[key] <= self.retries)
        if not goes_on:
            self.forget(key)

    def drop(self, key: str) -> None:
        """Those that run are named, once."""
        assert sorted(self.queue.drop(key)) == sorted(self.running.get(key, ()))
        if key in self.known:
            self.forget(key)

    def check(self) -> None:
        """Both know the same."""
        assert self.queue.running == sum(map(len, self.running.values()))
        assert self.queue.idle == (not self.known)
        for key in NAMES:
            assert self.queue.knows(key) == (key in self.known)
            if key in self.known:
                assert sorted(self.queue.attempts_of(key)) == sorted(self.running[key])
                assert len(self.running[key]) <= (1 if self.known[key][1] else 2)
                ahead = self.known[key][2] and not self.running[key]
                assert self.queue.waits_ahead(key) == ahead
            else:
                assert not self.queue.waits_ahead(key)


NAME = st.sampled_from(NAMES)
MOVE = st.one_of(
    st.tuples(st.just("add"), NAME, st.booleans(), st.booleans()),
    st.tuples(st.just("add"), NAME, st.just(False), st.booleans()),
    st.tuples(st.just("next"), st.integers(1, 4)),
    st.tuples(st.just("pass"), st.floats(0.0, 20.0)),
    st.tuples(st.just("finish"), NAME, st.integers(1, 4)),
    st.tuples(st.just("finish"), NAME, st.just(0)),
    st.tuples(st.just("lose"), NAME, st.just(0)),
    st.tuples(st.just("lose"), NAME, st.integers(1, 4)),
    st.tuples(st.just("drop"), NAME),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(MOVE, min_size=30, max_size=60), st.integers(0, 2), st.booleans())
def test_any_history_ends_every_job_once_in_order_and_within_its_tries(
    moves: list[tuple[object, ...]], retries: int, copies: bool
) -> None:
    model = Model(retries, copies)
    for at in range(LEAST_KNOWN if copies else 0):  # so that there is a usual pace to be behind
        name = f"usual{at}"
        model.add(name, alone=False, ahead=False)
        model.next(1)
        model.now += 1.0
        model.finish(name, 1)
    for what, *rest in moves:
        if what == "pass":
            model.now += rest[0]  # type: ignore[operator]
        elif what in ("finish", "lose") and rest[1] == 0:  # one that runs, if any does
            for attempt in sorted(model.running.get(str(rest[0]), ()))[:1]:
                getattr(model, str(what))(rest[0], attempt)
        else:
            getattr(model, str(what))(*rest)
        model.check()
    for _ in range(200):  # and in the end all is done
        model.next(3)
        for key, attempts in list(model.running.items()):
            for attempt in sorted(attempts):
                model.finish(key, attempt)
        model.check()
        if model.queue.idle:
            break
    assert model.queue.idle
    assert model.ended == model.asked


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 3))
def test_the_same_history_has_the_same_answers(data: st.DataObject, retries: int) -> None:
    """Equal questions, equal starts: nothing is decided by a hash or a clock of its own."""
    ones = [Dispatcher(retries=retries, copies=True) for _ in range(2)]
    for at in range(20):
        for queue in ones:
            queue.add(f"n{at}", kind="k", units=1.0, ahead=at % 3 == 0)
    now = 0.0
    for _ in range(60):
        now += data.draw(st.floats(0.0, 5.0))
        places = data.draw(st.integers(0, 4))
        first, second = (queue.next(now, places) for queue in ones)
        assert first == second
        for start in first:
            if data.draw(st.booleans()):
                end = data.draw(st.sampled_from(["finished", "lost"]))
                args = (start.key, start.attempt, *([now] if end == "finished" else []))
                answers = {getattr(queue, end)(*args) for queue in ones}
                assert len(answers) == 1


@pytest.mark.parametrize("retries", [0, 1, 2, 5])
@pytest.mark.parametrize("copies", [False, True])
def test_a_job_that_always_dies_late_is_given_up(retries: int, copies: bool) -> None:
    """Also where a copy runs each time that an attempt dies: there would be no end to it."""
    queue = Dispatcher(retries=retries, copies=copies)
    now = 0.0
    for at in range(LEAST_KNOWN):
        queue.add(f"usual{at}", kind="k", units=1.0)
        (start,) = queue.next(now, 1)
        now += 1.0
        assert queue.finished(start.key, start.attempt, now)
    queue.add("poison", kind="k", units=1.0)
    begun: list[tuple[float, int]] = []
    starts = 0
    for _ in range(2000):
        for start in queue.next(now, 4):
            begun.append((now, start.attempt))
            starts += 1
        if begun and now - begun[0][0] > 1.5 * SLOW:
            queue.lost("poison", begun.pop(0)[1])
        now += 0.25
    assert queue.idle
    assert starts == retries + 1 + copies


def used_to(seconds: float) -> Dispatcher:
    """A queue whose jobs took so long a unit until now."""
    queue = Dispatcher(copies=True)
    for at in range(LEAST_KNOWN):
        queue.add(f"usual{at}", kind="k", units=1.0)
        (start,) = queue.next(0.0, 1)
        assert queue.finished(start.key, start.attempt, seconds)
    return queue


def test_a_job_without_units_is_never_slow() -> None:
    queue = used_to(1.0)
    queue.add("unknown", kind="k", units=0.0)
    assert [s.key for s in queue.next(2.0, 3)] == ["unknown"]
    assert queue.next(2.1, 3) == []
    assert queue.next(1e6, 3) == []


def test_what_waits_for_long_at_its_place_is_not_slow_for_that() -> None:
    queue = used_to(1.0)
    queue.add("late", kind="k", units=1.0)
    assert len(queue.next(2.0, 1)) == 1
    queue.begun("late", 1, 100.0)
    assert queue.next(100.0 + SLOW, 3) == []
    assert [(s.key, s.attempt) for s in queue.next(100.1 + SLOW, 3)] == [("late", 2)]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0]), st.integers(0, 90)), max_size=300
    )
)
def test_the_usual_pace_is_the_upper_median_of_the_last(ended: list[tuple[float, int]]) -> None:
    paces = _Paces()
    kept: list[float] = []
    for pace, at_once in ended:
        paces.add(pace, at_once)
        kept = [*kept, pace][-max(KEPT, 2 * at_once) :]
        want = statistics.median_high(kept) if len(kept) >= LEAST_KNOWN else None
        assert paces.usual() == want


@pytest.mark.parametrize("places", [10, 100, 400])
def test_slow_ones_are_found_though_they_are_all_that_end_last(places: int) -> None:
    """Three in ten run on nodes that take five times as long, and end when the others have."""
    queue = Dispatcher(copies=True)
    for at in range(2 * places):
        queue.add(f"j{at}", kind="k", units=1.0)
    slow: list[str] = []
    for now in (0.0, 1.0, 2.0):
        for at, start in enumerate(queue.next(now, places - len(slow))):
            if at % 10 < 3:
                slow.append(start.key)
            else:
                assert queue.finished(start.key, start.attempt, now + 1.0)
    for key in slow[:-2]:
        assert queue.finished(key, 1, 5.0)
    waiting = [s for s in queue.next(5.0 + SLOW, 2 * places) if s.attempt == 2]
    assert [s.key for s in waiting] == slow[-2:]


PACES = st.floats(0.5, 40.0) | st.floats(0.5, 400.0)
UNITS = st.sampled_from([0.0, 0.5, 1.0, 4.0])
EVENT = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(["k", "other"]), UNITS),
    st.tuples(st.just("next"), st.integers(1, 4)),
    st.tuples(st.just("pass"), st.one_of(st.floats(0.0, 100.0), st.floats(500.0, 6000.0))),
    st.tuples(st.just("finish"), st.integers(0, 99)),
    st.tuples(st.just("lose"), st.integers(0, 99)),
    st.tuples(st.just("begun"), st.integers(0, 99)),
    st.tuples(st.just("edge"), st.integers(0, 99), st.sampled_from([1 - 1e-6, 1 + 1e-6])),
    st.tuples(st.just("slow"), st.integers(0, 99)),
    st.tuples(st.just("end the hung")),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(EVENT, min_size=20, max_size=60),
    st.lists(PACES, min_size=LEAST_KNOWN, max_size=9) | st.lists(PACES, max_size=LEAST_KNOWN),
    st.integers(0, 2),
    st.booleans(),
)
def test_those_above_their_bound_are_named_and_no_others(
    events: list[tuple[object, ...]], finished: list[float], retries: int, copies: bool
) -> None:
    """A book-keeper who keeps every duration names the same, whatever happened before."""
    queue = Dispatcher(retries=retries, copies=copies)
    paces: dict[str, list[float]] = {"k": [], "other": []}
    jobs: dict[str, tuple[str, float]] = {}  # kind and units
    since: dict[tuple[str, int], float] = {}
    now = 0.0

    def forget(key: str) -> None:
        for which in [w for w in since if w[0] == key]:
            del since[which]

    def finish(key: str, attempt: int) -> None:
        kind, units = jobs[key]
        if units:
            paces[kind].append((now - since[key, attempt]) / units)
        assert queue.finished(key, attempt, now)
        forget(key)

    def lose(key: str, attempt: int) -> None:
        del since[key, attempt]
        if not queue.lost(key, attempt):
            forget(key)

    def bound_of(key: str) -> float | None:
        kind, units = jobs[key]
        known = sorted(paces[kind])
        if len(known) < LEAST_KNOWN or not units:
            return None
        return max(LEAST_HUNG_S, HUNG * known[len(known) // 2] * units)

    def check() -> None:
        named = queue.hung(now)
        assert len(set(named)) == len(named)
        found = {(start.key, start.attempt) for start in named}
        for (key, attempt), began in since.items():
            bound = bound_of(key)
            # Where nobody knows how long it takes, nothing is said.
            assert ((key, attempt) in found) == (bound is not None and now - began > bound)
        assert found <= set(since), "one that does not run"

    for at, seconds in enumerate(finished):
        jobs[f"usual{at}"] = ("k", 1.0)
        queue.add(f"usual{at}", kind="k", units=1.0)
        (start,) = queue.next(now, 1)
        since[start.key, start.attempt] = now
        now += seconds
        finish(start.key, start.attempt)
    for what, *rest in events:
        running = sorted(since)
        if what == "add":
            key = f"j{len(jobs)}"
            jobs[key] = (str(rest[0]), rest[1])  # type: ignore[assignment]
            queue.add(key, kind=str(rest[0]), units=rest[1])  # type: ignore[arg-type]
        elif what == "next":
            for start in queue.next(now, rest[0]):  # type: ignore[arg-type]
                since[start.key, start.attempt] = now
        elif what == "pass":
            now += rest[0]  # type: ignore[operator]
        elif what == "end the hung":
            for start in queue.hung(now):
                lose(start.key, start.attempt)
            assert queue.hung(now) == []
        elif running:
            key, attempt = running[rest[0] % len(running)]  # type: ignore[operator]
            bound = bound_of(key)
            if what == "edge":  # just before its bound, or just after it
                if bound is not None:
                    edge = since[key, attempt] + bound * rest[1]  # type: ignore[operator]
                    now = max(now, edge)
            elif what == "slow":  # a copy is made where there may be one
                if bound is not None:
                    now = max(now, since[key, attempt] + bound / 2)
                    for start in queue.next(now, 20):
                        since[start.key, start.attempt] = now
            elif what == "finish":
                finish(key, attempt)
            elif what == "lose":
                lose(key, attempt)
            else:
                queue.begun(key, attempt, now)
                since[key, attempt] = now
        check()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 4),
    st.booleans(),
    st.floats(0.5, 200.0),
    st.sampled_from([0.5, 1.0, 8.0]),
    st.integers(1, 5),
)
def test_what_always_hangs_is_given_up_after_its_tries_and_in_bounded_time(
    retries: int, copies: bool, pace_s: float, units: float, hanging: int
) -> None:
    """Each try is ended at its bound, give or take a look; others come through meanwhile."""
    queue = Dispatcher(retries=retries, copies=copies)
    now, every = 0.0, 5.0
    for at in range(LEAST_KNOWN):
        queue.add(f"usual{at}", kind="k", units=1.0)
        (start,) = queue.next(now, 1)
        now += pace_s
        assert queue.finished(start.key, start.attempt, now)
    bound = max(LEAST_HUNG_S, HUNG * pace_s * units)
    names = [f"hangs{at}" for at in range(hanging)]
    for name in names:
        queue.add(name, kind="k", units=units)
    queue.add("good", kind="k", units=units)
    starts: Counter[str] = Counter()
    ends: dict[str, float] = {}
    began = now
    while not queue.idle:
        for start in queue.next(now, hanging + 1 - queue.running):
            starts[start.key] += 1
            if start.key == "good":
                ends["good"] = now + units * pace_s
        for start in queue.hung(now):
            assert start.key != "good"
            queue.lost(start.key, start.attempt)
        now += every
        if ends.get("good", now + 1) <= now and queue.knows("good"):
            (attempt,) = queue.attempts_of("good")
            assert queue.finished("good", attempt, ends["good"])
        # A copy is made while its first attempt runs, so it ends within a bound of that one.
        assert now - began <= (retries + 2) * (bound + 3 * every) + every
    for name in names:
        assert retries + 1 <= starts[name] <= retries + 1 + copies
    assert starts["good"] == 1


def test_a_copy_that_hangs_too_is_named_beside_the_first() -> None:
    queue = used_to(100.0)
    queue.add("hangs", kind="k", units=1.0)
    assert len(queue.next(0.0, 1)) == 1
    assert len(queue.next(1000.0, 1)) == 1
    assert [s.attempt for s in queue.hung(HUNG * 100.0 + 1.0)] == [1]
    assert [s.attempt for s in queue.hung(HUNG * 100.0 + 1001.0)] == [1, 2]


@pytest.mark.parametrize("places", [20, 200, 1000])
def test_the_fastest_few_make_nobody_slow(places: int) -> None:
    """Of many that run at once the first to end tell nothing of the others."""
    queue = Dispatcher(copies=True)
    for at in range(places):
        queue.add(f"j{at}", kind="k", units=1.0)
    assert len(queue.next(0.0, places)) == places
    few = max(LEAST_KNOWN, min(KEPT, places // 2)) - 1
    for at in range(few):
        assert queue.finished(f"j{at}", 1, 1.0)
    assert queue.next(1.1 + SLOW, places) == []
    assert queue.finished(f"j{few}", 1, 1.1 + SLOW)
    assert len(queue.next(1.1 + SLOW, places)) == places - few - 1
