"""Ladders: which values contraction may propose for a factor, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ladder:
    """The values that contraction may propose for one slot of a factor.

    `values` ascending, or every multiple of `step` from `step` on. `up`: how many rungs above the
    present value are proposed (None: all). Staying is always allowed, on the ladder or off it.
    """

    values: tuple[float, ...] = ()
    step: int = 0
    up: int | None = 0

    def _rank(self, value: float, inclusive: bool) -> int:
        """How many rungs lie below `value`, or at it too (`inclusive`)."""
        if self.step:
            rungs = value // self.step if inclusive else -(-value // self.step) - 1
            return max(0, int(rungs))
        return sum(v <= value if inclusive else v < value for v in self.values)

    def _rung(self, index: int) -> float:
        return self.step * (index + 1) if self.step else self.values[index]

    def options(self, present: float) -> list[float]:
        """Values that may follow `present`, ascending, `present` included."""
        below, at = self._rank(present, False), self._rank(present, True)
        length = at + (self.up or 0) if self.step else len(self.values)
        top = length if self.up is None else min(length, at + self.up)
        rungs = [self._rung(i) for i in range(below)], [self._rung(i) for i in range(at, top)]
        return [*rungs[0], present, *rungs[1]]

    def notches(self, present: float, value: float) -> int:
        """Count the rungs from `present` to `value`; from off the ladder, the first counts."""
        if value == present:
            return 0
        if not (self.step or self.values):
            return 1
        if value < present:
            return max(1, self._rank(present, False) - self._rank(value, False))
        return max(1, self._rank(value, True) - self._rank(present, True))


@dataclass(frozen=True)
class Factor:
    """One contraction factor: `symbol` as in the paper (D, N, W, R, M, E), `field` of the arch.

    One ladder per slot; `scalar` fields hold a bare number instead of a tuple.
    """

    symbol: str
    field: str
    ladders: tuple[Ladder, ...]
    scalar: bool = False

    @property
    def slots(self) -> int:
        """How many numbers the factor has."""
        return len(self.ladders)
