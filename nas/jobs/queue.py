"""Which job starts next, which is tried again and which is given up: decisions without a clock.

Pure bookkeeping that the executors drive with real workers, and `benchmarks.schedule` with a
simulated clock and thousands of them.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

SLOW = 3.0
"""A job this many times slower than its kind's median is started once more elsewhere."""

HUNG, LEAST_HUNG_S = 20.0, 900.0
"""One that takes this many times as long as usual, and so many seconds at least, hangs."""

LEAST_KNOWN, KEPT = 5, 101
"""Finished jobs of a kind that a median needs, and of how many of the last it is at least."""


@dataclass(frozen=True)
class Start:
    """A job to start now: its name and which attempt this is, from 1."""

    key: str
    attempt: int


class _Paces:
    """Seconds a unit of the jobs of one kind that ended last, and their median.

    Of many that run at once the first to end are the fast ones and the last the slow ones, so
    the median is of no fewer than twice as many as ran at once.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, pace: float, at_once: int) -> None:
        """Take one in; so many run at once where enough wait."""
        self._last.append(pace)
        bisect.insort(self._sorted, pace)
        while len(self._last) > max(KEPT, 2 * at_once):
            del self._sorted[bisect.bisect_left(self._sorted, self._last.popleft())]

    @property
    def known(self) -> int:
        """How many are in it."""
        return len(self._sorted)

    def usual(self) -> float | None:
        """Return their upper median, once enough of them are known."""
        return self._sorted[self.known // 2] if self.known >= LEAST_KNOWN else None


@dataclass
class _Entry:
    order: int
    kind: str
    units: float
    alone: bool
    ahead: bool
    attempts: int = 0
    losses: int = 0
    running: dict[int, float] = field(default_factory=dict)


class Dispatcher:
    """The queue of an executor: jobs in, starts out, and what became of each attempt.

    Jobs start in the order in which they were added; those that run `ahead` of a decision only
    when no other waits. One that must be `alone` starts when nothing runs, and nothing starts
    beside it. An attempt that is lost (its worker or node died, or it hung) is made again up to
    `retries` times. With `copies`, a job that is far slower than others of its kind is started a
    second time where places are idle; whichever ends first counts, and only that one. Lost copies
    count as tries too, so that a job has at most `retries + 2` attempts in all. Where places have
    queues of their own (`queues`), an attempt's time begins when it is told to have `begun`.
    Times are seconds on any clock that does not run backwards.
    """

    def __init__(self, *, retries: int = 0, copies: bool = False, queues: bool = False) -> None:
        self._retries = retries
        self._queues = queues
        self._copies = copies
        self._entries: dict[str, _Entry] = {}
        self._heap: list[tuple[bool, int, str]] = []
        self._numbers = itertools.count()
        self._running = self._most = 0
        self._alone: str | None = None
        self._active: dict[str, _Entry] = {}  # those that run: few beside those that wait
        self._paces: dict[str, _Paces] = {}
        self._usual: dict[str, float] = {}

    @property
    def running(self) -> int:
        """How many attempts run now."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._entries) - len(self._active)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._entries

    def knows(self, key: str) -> bool:
        """Tell whether a job waits or runs."""
        return key in self._entries

    def waits_ahead(self, key: str) -> bool:
        """Tell whether a job waits to run ahead of a decision."""
        entry = self._entries.get(key)
        return entry is not None and entry.ahead and not entry.running

    def attempts_of(self, key: str) -> list[int]:
        """Return the attempts of a job that run now."""
        return list(self._entries[key].running)

    def add(
        self, key: str, *, kind: str, units: float, alone: bool = False, ahead: bool = False
    ) -> None:
        """Queue a job; one that ran ahead is now wanted for sure."""
        known = self._entries.get(key)
        if known is not None:
            if known.ahead and not ahead:
                known.ahead = False
                if not known.running:
                    self._push(key, known)
            return
        entry = _Entry(next(self._numbers), kind, units, alone, ahead)
        self._entries[key] = entry
        self._push(key, entry)

    def _push(self, key: str, entry: _Entry) -> None:
        heapq.heappush(self._heap, (entry.ahead, entry.order, key))

    def drop(self, key: str) -> list[int]:
        """Forget a job; returns its attempts that run, which are to be ended."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return []
        self._active.pop(key, None)
        self._running -= len(entry.running)
        if self._alone == key:
            self._alone = None
        return list(entry.running)

    def next(self, now: float, places: int) -> list[Start]:
        """Say what to start on `places` idle places, and count it as started."""
        found: list[Start] = []
        while len(found) < places and self._alone is None:
            key = self._first()
            if key is None:
                break
            entry = self._entries[key]
            if entry.alone and self._running:
                return found  # the others finish first, and none begins
            heapq.heappop(self._heap)
            found.append(self._start(key, entry, now))
            if entry.alone:
                self._alone = key
        if self._copies and self._alone is None and len(found) < places:
            for key, entry in itertools.islice(self._slow(now), places - len(found)):
                found.append(self._start(key, entry, now))
        return found

    def _first(self) -> str | None:
        """Return the job that is next in the queue; stale places are cleared on the way."""
        while self._heap:
            ahead, order, key = self._heap[0]
            entry = self._entries.get(key)
            if entry is None or (entry.ahead, entry.order) != (ahead, order) or entry.running:
                heapq.heappop(self._heap)
                continue
            return key
        return None

    def _start(self, key: str, entry: _Entry, now: float) -> Start:
        entry.attempts += 1
        entry.running[entry.attempts] = math.inf if self._queues else now
        self._active[key] = entry
        self._running += 1
        self._most = max(self._most, self._running)
        return Start(key, entry.attempts)

    def _slow(self, now: float) -> Iterable[tuple[str, _Entry]]:
        """Find the jobs that run once, and far longer than others of their kind and size took.

        One that was lost too often for another try gets no copy either, and none does while only
        the very fastest have ended.
        """
        enough = min(KEPT, self._most // 2)
        for key, entry in list(self._active.items()):
            usual = self._usual.get(entry.kind)
            if usual is None or not entry.units or entry.alone or len(entry.running) != 1:
                continue
            if self._paces[entry.kind].known < enough:
                continue
            (since,) = entry.running.values()
            if entry.losses <= self._retries and now - since > SLOW * usual * entry.units:
                yield key, entry

    def hung(self, now: float) -> list[Start]:
        """Name the attempts that take so much longer than others did that they will never end."""
        found = []
        for key, entry in self._active.items():
            usual = self._usual.get(entry.kind)
            if usual is None or not entry.units:
                continue
            limit = max(LEAST_HUNG_S, HUNG * usual * entry.units)
            found += [Start(key, n) for n, since in entry.running.items() if now - since > limit]
        return found

    def begun(self, key: str, attempt: int, now: float) -> None:
        """Take note that an attempt waited at its place until now."""
        entry = self._entries.get(key)
        if entry is not None and attempt in entry.running:
            entry.running[attempt] = now

    def finished(self, key: str, attempt: int, now: float, *, ok: bool = True) -> bool:
        """Take note that an attempt ended; False where it does not count (any more).

        What ended well (`ok`) tells how long its kind takes.
        """
        entry = self._entries.get(key)
        if entry is None or attempt not in entry.running:
            return False
        seconds = now - entry.running[attempt]
        if entry.units and ok and math.isfinite(seconds):
            paces = self._paces.setdefault(entry.kind, _Paces())
            paces.add(seconds / entry.units, self._most)
            if (usual := paces.usual()) is not None:
                self._usual[entry.kind] = usual
        self.drop(key)
        return True

    def lost(self, key: str, attempt: int, *, counts: bool = True) -> bool:
        """Take note that an attempt was lost; True where the job goes on (again or elsewhere).

        False: it was the last try, or nobody waits for it; the job is forgotten. Unless it
        `counts`, as where a connection broke, it may be made again however often.
        """
        entry = self._entries.get(key)
        if entry is None or attempt not in entry.running:
            return False
        del entry.running[attempt]
        self._running -= 1
        if self._alone == key:
            self._alone = None
        entry.losses += counts
        if entry.running:
            return True
        if entry.losses > self._retries:
            self.drop(key)
            return False
        del self._active[key]
        self._push(key, entry)
        return True
