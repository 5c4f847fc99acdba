"""What jobs read, on its way to a cluster: in its object store once, unless all nodes see it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.jobs.node import sees
from nas.jobs.ship import at, content_name, pack, quick_name

LOOK_S = 30.0
"""How long a node may take to say whether it sees a file of the driver's."""

Box = tuple[str, str, str, "str | None", bool, list[Any]]
"""Dotted name, path at the driver's, its content's name, a file's name (None: a folder), whether it
is spent then, and a reference to the bytes."""


def on_node(ray: Any, node: str, *, soft: bool) -> Any:
    """Return the strategy that puts something on a node; a `soft` one may go elsewhere."""
    strategies = ray.util.scheduling_strategies
    return strategies.NodeAffinitySchedulingStrategy(node, soft=soft)


class Parcels:
    """What was packed for a cluster so far. `token`: a file and its content's name (`do_here`)."""

    def __init__(self, ray: Any, token: Sequence[str] | None) -> None:
        self._ray = ray
        self._token = token
        self._boxes: dict[str, tuple[str, str, list[Any]]] = {}
        self._near: dict[str, bool] = {}

    def boxes(self, told: Mapping[str, Any], alive: Iterable[str]) -> list[Box]:
        """Return what a job reads, packed; nothing where all living nodes see the driver's files.

        Raises OSError where something is gone.
        """
        if self._all_near(set(alive)):
            return []
        spec, flat = told["argument"], told["flat"]
        return [self._box(spec, dotted, flat=dotted in flat) for dotted in told["reads"]]

    def let_go(self, told: Mapping[str, Any]) -> None:
        """Let go of what no other job reads."""
        for dotted in told["reads"]:
            if _spent(dotted):
                self._boxes.pop(at(told["argument"], dotted), None)

    def _all_near(self, alive: set[str]) -> bool:
        if self._token is None:
            return False
        look: Any = self._ray.remote(sees)
        refs = {
            node: look.options(
                num_cpus=0, scheduling_strategy=on_node(self._ray, node, soft=False)
            ).remote(*self._token)
            for node in alive - self._near.keys()
        }
        if refs:
            answers = list(refs.values())
            done, _ = self._ray.wait(answers, num_returns=len(answers), timeout=LOOK_S)
            for node, ref in refs.items():
                self._near[node] = False
                if ref in done:
                    with contextlib.suppress(self._ray.exceptions.RayError):
                        self._near[node] = bool(self._ray.get(ref))
        return all(self._near[node] for node in alive)

    def _box(self, spec: Mapping[str, Any], dotted: str, *, flat: bool) -> Box:
        path = Path(at(spec, dotted))
        state = quick_name(path, flat=flat)
        known = self._boxes.get(str(path))
        if known is None or known[0] != state:
            data = pack(path, flat=flat)
            known = (state, content_name(path, flat=flat), [self._ray.put(data)])
            self._boxes[str(path)] = known
        single = path.name if path.is_file() else None
        return dotted, str(path), known[1], single, _spent(dotted), known[2]


def _spent(dotted: str) -> bool:
    return dotted.endswith(".checkpoint")
