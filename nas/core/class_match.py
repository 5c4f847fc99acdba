"""How the classes that weights or labels have stand to those of the data: matched by name, never by number alone."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from space.errors import refuse


@dataclass(frozen=True)
class ClassMatch:
    """Where each wanted class is found among those that are had.

    `rows`: for each wanted class the number of the one with its name, -1 for none; `had`: how many there are. `named`
    is False where a side has no names: equal numbers of classes are then taken for equal classes, in the `order` shown.
    `fresh` holds the wanted names without a row, `near` pairs (had, wanted) that differ in case, blanks or dashes only:
    these are not taken for the same.
    """

    rows: tuple[int, ...]
    had: int
    named: bool
    fresh: tuple[str, ...] = ()
    near: tuple[tuple[str, str], ...] = ()
    order: str = ""

    @property
    def kept(self) -> int:
        """How many wanted classes are had."""
        return sum(row >= 0 for row in self.rows)

    @property
    def whole(self) -> bool:
        """Whether both sides have the same classes, in whatever order."""
        return self.had == len(self.rows) == self.kept

    @property
    def in_order(self) -> bool:
        """Whether both sides have the same classes in the same order, or are taken to."""
        return self.whole and all(row == at for at, row in enumerate(self.rows))

    def describe(self) -> str:
        """Return what is done with the rows of a head, for a note; "" where nothing is."""
        wanted = len(self.rows)
        if self.in_order:
            return "" if self.named else f"its {wanted} classes carry no names: taken in the order {self.order}"
        if self.whole:
            return f"its {wanted} classes are the data's in another order: rows permuted by name"
        if not self.kept:
            why = f", as none of its {self.had} class names is one of the data's" if self.named else ""
            return f"a new head ({self.had} -> {wanted} classes){why}{self.near_names()}"
        fresh = f", {len(self.fresh)} start fresh ({_some([*map(repr, self.fresh)])})" if self.fresh else ""
        return (
            f"the head's rows of {self.kept} of the data's {wanted} classes are kept by name (of its {self.had})"
            f"{fresh}{self.near_names()}"
        )

    def near_names(self) -> str:
        """Return which names are not taken for the same, as the end of a sentence; "" for none."""
        pairs = [f"{a!r} and {b!r}" for a, b in self.near]
        return f"; not taken for the same: {_some(pairs)} (case, blanks or dashes differ)" if pairs else ""


def match_classes(have: Sequence[str] | None, want: Sequence[str] | None, count: int | None = None) -> ClassMatch:
    """Match the classes that are had to those that are wanted, by their names in Unicode's composed form.

    None is a side without names; `count` is then the number of classes that are had. A name that a side has twice
    matches only where both sides are equal as they stand.
    """
    if have is None or want is None:
        had = len(have) if have is not None else count or 0
        wanted = len(want) if want is not None else had
        rows = tuple(range(wanted)) if had == wanted else (-1,) * wanted
        return ClassMatch(rows, had, named=False, order=_some(want or have or ()))
    had_names, names = ([unicodedata.normalize("NFC", name) for name in side] for side in (have, want))
    if had_names == names:
        return ClassMatch(tuple(range(len(names))), len(names), named=True)
    repeated = {name for side in (had_names, names) for name, times in Counter(side).items() if times > 1}
    at = {name: number for number, name in enumerate(had_names) if name not in repeated}
    rows = tuple(at.get(name, -1) for name in names)
    fresh = tuple(name for name, row in zip(names, rows, strict=True) if row < 0)
    unused = {_plain(name): name for name in had_names if name not in set(names)}
    near = tuple((unused[_plain(name)], name) for name in fresh if _plain(name) in unused)
    return ClassMatch(rows, len(had_names), True, fresh, near)


class Headed(Protocol):
    """A network that a user gave as `name` to `flag`, and the names of its head's classes, if it carries any."""

    @property
    def name(self) -> str:
        """As the user wrote it."""

    @property
    def flag(self) -> str:
        """That messages are about."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """In the order of the head's rows."""


def match_head(network: Headed, count: int, classes: Sequence[str]) -> ClassMatch:
    """Match a network's head of `count` rows to the data's classes, by the names that it carries.

    A head without names is taken in the data's order, unless the data's names stand in the order of their letters and
    timm would count them in another one (1, 2, 10; a, B): either may be meant, which is refused. Raises InputError.
    """
    names = network.classes
    if names is not None and len(names) != count:
        got = f"{network.name}: {len(names)} class names for a head of {count}"
        raise refuse(network.flag, got, "a name for each class", "correct the file of names beside the weights")
    match = match_classes(names, classes, count)
    natural = sorted(classes, key=_natural)
    if names is None and match.whole and list(classes) == sorted(classes) != natural:
        got = f"{network.name}, whose {count} classes have no names, for data that count {_some(classes)}"
        remedy = f"write class_map.txt beside the weights, a name a line in the order of the {count} outputs"
        raise refuse(network.flag, got, f"names: timm counts {_some(natural)}", remedy)
    return match


def _natural(name: str) -> list[Any]:
    """Return the key by which timm sorts class folders."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def check_same_classes(
    have: Sequence[str], want: Sequence[str], name: str, remedy: str, whose: str = "the data"
) -> ClassMatch:
    """Match two sides that must have the same classes, in whatever order; returns the match.

    Raises InputError about `name` that names the first class of each side that the other has not; `whose` are those
    that are wanted.
    """
    match = match_classes(have, want)
    if match.whole:
        return match
    had, wanted = ([unicodedata.normalize("NFC", each) for each in side] for side in (have, want))
    got = f"{len(had)} classes{_first(had, wanted)}"
    near = f" ({match.near[0][0]!r} differs in case, blanks or dashes only)" if match.near else ""
    raise refuse(name, got, f"the {len(wanted)} classes of {whose}{_first(wanted, had)}{near}", remedy)


def check_unchanged_classes(have: Sequence[str], want: Sequence[str], name: str, whose: str, remedy: str) -> None:
    """Refuse classes that are not, or not in the order, that they were; the first that differs is named."""
    match = check_same_classes(have, want, name, remedy, whose)
    if not match.in_order:
        at = next(at for at, row in enumerate(match.rows) if row != at)
        got = f"class {at} {have[at]!r}, of the same classes in another order"
        raise refuse(name, got, f"class {at} {want[at]!r}, as {whose} has", remedy)


def _first(side: Sequence[str], other: Sequence[str]) -> str:
    """Name the first class that the other side has not, with its number."""
    known = set(other)
    lone = next(((at, name) for at, name in enumerate(side) if name not in known), None)
    return "" if lone is None else f", class {lone[0]} {lone[1]!r}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _plain(name: str) -> str:
    """Return a name without case, blanks and dashes."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if not c.isspace() and c not in "_-")
