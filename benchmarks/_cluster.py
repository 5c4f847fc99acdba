"""A cluster on paper: the executors' own `Dispatcher` under a simulated clock, with thousands of
workers that boot, lag, hang and die.

A race is simulated as `nas.race` runs one: rungs that double, a decision when all are there. Where
`nas.search.racing` stops whom paired tests rule out, here the better half goes on, by a score that
is noisy at every rung.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks._estimates import Floats
from nas.executor.dispatch import LEAST_HUNG_S, Dispatcher
from nas.executor.pool import HUNG_EVERY_S
from nas.race import rungs_of

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A question that a dispatcher was asked: method, positional and keyword arguments."""


@dataclass(frozen=True)
class Durations:
    """How much longer or shorter than usual trainings are: of a candidate, and of its every job.

    Both are ratios around 1, `paces` of candidates to their median, `jitters` of a candidate's
    jobs to its own mean.
    """

    paces: Floats
    jitters: Floats


@dataclass(frozen=True)
class Faults:
    """What goes wrong. Hours are means between two deaths; None: never.

    A worker that died is replaced at once, a node after `repair_s`. A share of attempts hangs, a
    share of candidates kills its worker every time, a share of nodes is `slower` times slower.
    """

    worker_hours: float | None = 50.0
    node_hours: float | None = 200.0
    repair_s: float = 600.0
    hang_share: float = 0.001
    poison_share: float = 0.002
    slow_share: float = 0.05
    slower: float = 5.0


NO_FAULTS = Faults(None, None, hang_share=0.0, poison_share=0.0, slow_share=0.0)


@dataclass(frozen=True)
class Cluster:
    """Workers in nodes of `per_node`; a fresh one needs `boot_s` before its first job begins.

    An attempt is ended after `limit_s`: by a person who looks once a day, or as `--job-minutes`
    says. One that is slow is looked for every `poll_s` while workers are idle.
    """

    workers: int
    faults: Faults
    per_node: int = 8
    boot_s: float = 20.0
    limit_s: float = 86_400.0
    poll_s: float = 5.0


@dataclass(frozen=True)
class Load:
    """What is trained: `candidates` in all, in `steps` races of equal size, `epochs` at most each.
    Without `racing` all are trained to the end, in one job each.

    `epoch_s`: seconds that a usual candidate's epoch takes on a worker that is not slow.
    """

    candidates: int
    steps: int = 1
    epochs: int = 8
    epoch_s: float = 60.0
    racing: bool = True


@dataclass(frozen=True)
class Policy:
    """How it is dispatched; by default as a `LocalExecutor` does.

    `ahead`: `half` (as `nas.race` asks: the leading half, no more than there are workers), `keep`
    (the `keep` best so far) or `none`. With `hung`, what the dispatcher says will never end is
    ended.
    """

    retries: int = 2
    copies: bool = False
    ahead: str = "half"
    keep: int = 4
    hung: bool = True


@dataclass
class Spent:
    """Worker-seconds by what became of them; together `workers` times `makespan_s`."""

    useful_s: float = 0.0
    boot_s: float = 0.0
    lost_s: float = 0.0
    spare_s: float = 0.0
    unchosen_s: float = 0.0
    down_s: float = 0.0
    idle_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of them."""
        return math.fsum(vars(self).values())


@dataclass
class Outcome:
    """What a simulation came to.

    `tail_s`: from when the first worker is idle for good until the barrier, over all barriers;
    `tail_idle_s`: worker-seconds that are idle in it. `work_s`: what the counted jobs would take
    on one usual worker. `hung` attempts were ended by the dispatcher's rule, `late` ones by the
    limit; `wronged` of both would have ended by themselves. `ended` says how often each job that
    was asked for came to its end.
    """

    spent: Spent = field(default_factory=Spent)
    makespan_s: float = 0.0
    tail_s: float = 0.0
    tail_idle_s: float = 0.0
    work_s: float = 0.0
    given_up: int = 0
    attempts: int = 0
    hung: int = 0
    late: int = 0
    wronged: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class _Attempt:
    key: str
    number: int
    worker: int
    since: float
    boot_s: float
    ends: bool
    over: bool = False


class _Simulation:
    """One run. Randomness that belongs to candidates does not depend on the policy."""

    def __init__(
        self,
        load: Load,
        cluster: Cluster,
        policy: Policy,
        durations: Durations,
        random_seed: int,
        record: bool,
    ) -> None:
        self.load, self.cluster, self.policy = load, cluster, policy
        self.out = Outcome()
        self._now = 0.0
        self._record = record
        self._queue = Dispatcher(retries=policy.retries, copies=policy.copies)
        self._number = itertools.count()
        # Jobs: what they are, which ran ahead and are not wanted yet, what came of those that
        # nobody has taken over (whether it was good, seconds of work).
        self._jobs: dict[str, tuple[int, int]] = {}
        self._ahead: dict[str, tuple[float, int]] = {}
        self._results: dict[str, tuple[bool, float]] = {}
        self._draw_candidates(np.random.default_rng(random_seed), durations)
        self._rng = np.random.default_rng(random_seed + 1)  # of what happens on the way
        workers = cluster.workers
        self._idle: deque[int] = deque(range(workers))
        self._since = [0.0] * workers  # since when a worker is idle, or down
        self._fresh = [True] * workers
        self._down: set[int] = set()
        self._running: dict[tuple[str, int], _Attempt] = {}
        self._doing: dict[int, _Attempt] = {}
        self._events: list[tuple[float, int, str, Any]] = []
        self._polls = self._looks = False
        for node in range(len(self._slower)):
            self._next_death(node)

    def _draw_candidates(self, rng: np.random.Generator, durations: Durations) -> None:
        rungs = rungs_of(self.load.epochs) if self.load.racing else [self.load.epochs]
        n = self.load.candidates
        faults = self.cluster.faults
        self._epochs = [b - a for a, b in itertools.pairwise([0, *rungs])]
        pace = rng.choice(durations.paces, n)
        jitter = rng.choice(durations.jitters, (n, len(rungs)))
        self._job_s = pace[:, None] * jitter * np.array(self._epochs) * self.load.epoch_s
        noise = rng.normal(size=(n, len(rungs))) * np.geomspace(1.0, 0.2, len(rungs))
        self._scores = rng.normal(size=(n, 1)) + noise
        self._poison = rng.random(n) < faults.poison_share
        # What becomes of a job's first attempt is its own too, so that ways meet the same luck.
        self._luck = rng.random((n, len(rungs), 3))
        nodes = -(-self.cluster.workers // self.cluster.per_node)
        self._slower = np.ones(nodes)
        self._slower[rng.permutation(nodes)[: round(faults.slow_share * nodes)]] = faults.slower

    def run(self) -> Outcome:
        """Simulate to the end."""
        for racing in np.array_split(np.arange(self.load.candidates), self.load.steps):
            self._race(racing.tolist())
        spent = self.out.spent
        spent.idle_s += sum(self._now - self._since[w] for w in self._idle)
        spent.down_s += sum(self._now - self._since[w] for w in self._down)
        self.out.makespan_s = self._now
        assert not self._running
        return self.out

    # The race

    def _race(self, racing: list[int]) -> None:
        last = len(self._epochs) - 1
        for rung in range(last + 1):
            began = self._now
            done = self._rung(racing, rung, last)
            self._note_tail(began)
            # In the order of their numbers, as the toolkit decides in the order of keys.
            racing = sorted(c for _, c in done[: -(-len(done) // 2)])
            stay = set(racing)
            self._forget([k for k, (_, c) in self._ahead.items() if c not in stay])
            if not racing:
                return

    def _rung(self, racing: Sequence[int], rung: int, last: int) -> list[tuple[float, int]]:
        """Train up to a rung; the scores and numbers of those that got there, best first."""
        wanted = {self._job(candidate, rung) for candidate in racing}
        for key in sorted(wanted):
            self._ahead.pop(key, None)
            if key not in self._results:
                self._add(key, ahead=False)
        done: list[tuple[float, int]] = []
        while True:
            for key in [k for k in self._results if k in wanted]:
                wanted.discard(key)
                ok, seconds = self._results.pop(key)
                candidate = self._jobs[key][0]
                self.out.ended[key] = self.out.ended.get(key, 0) + 1
                self.out.spent.useful_s += seconds
                if ok:
                    self.out.work_s += float(self._job_s[candidate, rung])
                    insort(done, (-float(self._scores[candidate, rung]), candidate))
                else:
                    self.out.given_up += 1
            if not wanted:
                return done
            self._start()
            if self._idle and rung < last and self.policy.ahead != "none":
                self._lead(done, rung + 1, len(racing))
                self._start()
            self._happen()

    def _job(self, candidate: int, rung: int) -> str:
        key = f"c{candidate:06d}-r{rung}"
        self._jobs[key] = (candidate, rung)
        return key

    def _add(self, key: str, *, ahead: bool) -> None:
        units = float(self._epochs[self._jobs[key][1]])
        self._ask("add", key, kind="train", units=units, ahead=ahead)

    def _lead(self, done: Sequence[tuple[float, int]], coming: int, entrants: int) -> None:
        """Offer the coming rung of those that lead so far to workers that are idle."""
        leaders = self.policy.keep
        if self.policy.ahead == "half":
            leaders = min(self.cluster.workers, max(leaders, entrants // 2))
        leaders = min(leaders, len(done))
        last = done[leaders - 1] if leaders else (-math.inf, 0)
        # Those that no longer lead make room, as far as they have not begun.
        self._forget(
            [
                key for key, (score, candidate) in self._ahead.items()
                if (score, candidate) > last and self._queue.waits_ahead(key)
            ]
        )  # fmt: skip
        free = len(self._idle)
        asked = {candidate for _, candidate in self._ahead.values()}
        for place in itertools.islice(done, leaders):
            if not free:
                break
            if place[1] not in asked:
                key = self._job(place[1], coming)
                self._ahead[key] = place
                self._add(key, ahead=True)
                free -= 1

    def _forget(self, keys: Sequence[str]) -> None:
        """End what ran ahead and was not chosen, and what waited for it."""
        for key in keys:
            del self._ahead[key]
            if self._queue.knows(key):
                for number in self._ask("drop", key):
                    self._free(self._running[key, number], "unchosen_s", fresh=True)
            if key in self._results:
                self.out.spent.unchosen_s += self._results.pop(key)[1]

    def _note_tail(self, began: float) -> None:
        """Take note of those that are idle at a barrier: what they waited for it."""
        waited = [self._now - max(began, self._since[w]) for w in self._idle]
        self.out.tail_s += max(waited, default=0.0)
        self.out.tail_idle_s += sum(waited)

    # The cluster

    def _ask(self, method: str, *args: Any, **more: Any) -> Any:
        if self._record:
            self.out.calls.append((method, args, more))
        return getattr(self._queue, method)(*args, **more)

    def _start(self) -> None:
        for start in self._ask("next", self._now, len(self._idle)):
            self._begin(start.key, start.attempt)
        if self.policy.copies and self._idle and self._running and not self._polls:
            self._polls = True
            self._plan(self._now + self.cluster.poll_s, "poll", None)
        if self.policy.hung and self._running and not self._looks:
            # Who runs for less is never named, so there is nothing to ask before.
            self._looks = True
            oldest = min(attempt.since for attempt in self._running.values())
            self._plan(max(self._now, oldest + LEAST_HUNG_S) + HUNG_EVERY_S, "look", None)

    def _begin(self, key: str, number: int) -> None:
        worker, faults = self._idle.popleft(), self.cluster.faults
        self.out.attempts += 1
        self.out.spent.idle_s += self._now - self._since[worker]
        boot = self.cluster.boot_s if self._fresh[worker] else 0.0
        self._fresh[worker] = False
        candidate, rung = self._jobs[key]
        slower = self._slower[worker // self._per_node]
        seconds = boot + float(self._job_s[candidate, rung] * slower)
        hangs, dies_at, death = self._luck[candidate, rung] if number == 1 else self._rng.random(3)
        if self._poison[candidate]:
            death_s = float(dies_at) * seconds
        elif faults.worker_hours is None:
            death_s = math.inf
        else:
            death_s = -math.log(1.0 - float(death)) * faults.worker_hours * 3600.0
        end_s = math.inf if hangs < faults.hang_share else seconds
        ends = math.isfinite(end_s) and end_s <= death_s
        attempt = _Attempt(key, number, worker, self._now, boot, ends)
        self._running[key, number] = self._doing[worker] = attempt
        after, what = min((end_s, "ended"), (death_s, "lost"), (self.cluster.limit_s, "late"))
        self._plan(self._now + after, what, attempt)

    @property
    def _per_node(self) -> int:
        return self.cluster.per_node

    def _plan(self, at: float, what: str, of: Any) -> None:
        heapq.heappush(self._events, (at, next(self._number), what, of))

    def _next_death(self, node: int) -> None:
        hours = self.cluster.faults.node_hours
        if hours is not None:
            self._plan(self._now + float(self._rng.exponential(hours * 3600.0)), "node", node)

    def _happen(self) -> None:
        """Let the next thing happen."""
        self._now, _, what, of = heapq.heappop(self._events)
        if what == "poll":
            self._polls = False
        elif what == "look":
            self._looks = False
            for start in self._ask("hung", self._now):
                self.out.hung += 1
                self._end_late(self._running[start.key, start.attempt])
        elif what == "node":
            self._node_dies(of)
        elif what == "up":
            for worker in of:
                self.out.spent.down_s += self._now - self._since[worker]
                self._down.discard(worker)
                self._since[worker] = self._now
                self._idle.append(worker)
            self._next_death(of[0] // self._per_node)
        elif of.over:
            pass  # it was ended before
        elif what == "lost":
            self._lose(of)
        elif what == "late":
            self.out.late += 1
            self._end_late(of)
        else:
            self._finish(of)

    def _end_late(self, attempt: _Attempt) -> None:
        self.out.wronged += attempt.ends
        self._lose(attempt)

    def _finish(self, attempt: _Attempt) -> None:
        key = attempt.key
        others = [n for n in self._queue.attempts_of(key) if n != attempt.number]
        counts = self._ask("finished", key, attempt.number, self._now)
        assert counts, key
        seconds = self._free(attempt, None, fresh=False)
        self._results[key] = (True, seconds)
        for number in others:
            self._free(self._running[key, number], "spare_s", fresh=True)

    def _lose(self, attempt: _Attempt) -> None:
        goes_on = self._ask("lost", attempt.key, attempt.number)
        self._free(attempt, "lost_s", fresh=True)
        if not goes_on:
            self._results[attempt.key] = (False, 0.0)

    def _free(self, attempt: _Attempt, fate: str | None, *, fresh: bool) -> float:
        """End an attempt, book its seconds and return them, without those of booting."""
        seconds = self._now - attempt.since
        boot = min(seconds, attempt.boot_s)
        self.out.spent.boot_s += boot
        if fate is not None:
            setattr(self.out.spent, fate, getattr(self.out.spent, fate) + seconds - boot)
        attempt.over = True
        del self._running[attempt.key, attempt.number]
        del self._doing[attempt.worker]
        self._fresh[attempt.worker] = fresh
        self._since[attempt.worker] = self._now
        self._idle.append(attempt.worker)
        return seconds - boot

    def _node_dies(self, node: int) -> None:
        first = node * self._per_node
        workers = list(range(first, min(first + self._per_node, self.cluster.workers)))
        for worker in workers:
            if worker in self._doing:
                self._lose(self._doing[worker])
            self.out.spent.idle_s += self._now - self._since[worker]
            self._since[worker] = self._now
            self._fresh[worker] = True
        self._down.update(workers)
        self._idle = deque(w for w in self._idle if w not in self._down)
        self._plan(self._now + self.cluster.faults.repair_s, "up", workers)


def simulate(
    load: Load,
    cluster: Cluster,
    policy: Policy,
    durations: Durations,
    *,
    random_seed: int,
    record: bool = False,
) -> Outcome:
    """Run a load on a cluster; with `record`, keep what the dispatcher was asked."""
    return _Simulation(load, cluster, policy, durations, random_seed, record).run()


def replay(calls: Sequence[Call], policy: Policy) -> float:
    """Ask a fresh dispatcher the same again; the processor seconds that it took."""
    queue = Dispatcher(retries=policy.retries, copies=policy.copies)
    bound = [(getattr(queue, method), args, more) for method, args, more in calls]
    began = time.process_time()
    for ask, args, more in bound:
        ask(*args, **more)
    return time.process_time() - began
