"""Train, holdout and test splits: stratified choices by hash, so that list order never matters."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nas.core.data_config import grown_images
from space.errors import refuse

ROLES = ("test", "holdout", "fit", "train", "any")
"""The roles that a source gives its images: "fit" is train and not cut further, "train" is cut into
train and holdout, "any" into all three. Of equal contents the earliest role here is kept."""

HOLDOUT_SHARE = 0.2
HOLDOUT_IMAGES = 5_000
TEST_SHARE = 0.2
TEST_IMAGES = 5_000

DEFAULT_PROXY_IMAGES = 10_000
"""Train and holdout images used of a set that is not embedded, unless requested otherwise."""

Rows = NDArray[np.int64]


def content_key(data: bytes) -> str:
    """Name an image by its content: blake2b, 128 bits, 32 hex characters."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _order(ids: Sequence[str], salt: str) -> NDArray[np.uint64]:
    """Draw a number for every id that depends on the id and the salt alone: uint64 [n]."""
    start = hashlib.blake2b(salt.encode(), digest_size=8)
    out = bytearray()
    for name in ids:
        one = start.copy()
        one.update(name.encode("utf-8", "surrogateescape"))
        out += one.digest()
    return np.frombuffer(bytes(out), dtype="<u8").astype(np.uint64)


def choose(ids: Sequence[str], labels: NDArray[np.int64], count: int, salt: str, at_least: int = 1) -> Rows:
    """Choose `count` items by hash, in proportion to the classes, `at_least` of every class first.

    Returns rows, rising: int64 [min(count, n)], which depend on the set of (id, label), not on its order.
    """
    n = len(ids)
    if count >= n:
        return np.arange(n, dtype=np.int64)
    draw = _order(ids, salt)
    by_class = np.lexsort((draw, labels))
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(n, dtype=np.int64)
    rank[by_class] = np.arange(n) - starts[labels[by_class]]
    # Ranks inside a class, as shares of the class, merge the classes in proportion.
    share = (rank + 0.5) / sizes[labels]
    taken = np.lexsort((draw, share, rank >= at_least))[: max(count, 0)]
    return np.sort(taken).astype(np.int64)


def unique_rows(keys: Sequence[str], roles: Sequence[str]) -> Rows:
    """Keep one row of equal contents: the earliest role of `ROLES`, then the first in the list."""
    strength = {role: at for at, role in enumerate(ROLES)}
    best: dict[str, tuple[int, int]] = {}
    for row, (key, role) in enumerate(zip(keys, roles, strict=True)):
        found = (strength[role], row)
        if key not in best or found < best[key]:
            best[key] = found
    return np.array(sorted(row for _, row in best.values()), dtype=np.int64)


def contradicting(pictures: Sequence[str], labels: Sequence[int]) -> dict[int, int]:
    """Find equal pictures of different classes: each such row with the row of another class."""
    groups: dict[str, list[int]] = {}
    for row, picture in enumerate(pictures):
        groups.setdefault(picture, []).append(row)
    odd = (rows for rows in groups.values() if len({labels[row] for row in rows}) > 1)
    return {row: next(r for r in rows if labels[r] != labels[row]) for rows in odd for row in rows}


def cut(
    keys: Sequence[str],
    labels: NDArray[np.int64],
    roles: Sequence[str],
    classes: Sequence[str],
    random_seed: int,
    given: Collection[str] = (),
) -> Mapping[str, Rows]:
    """Cut unique images into {"train", "holdout", "test"}: rows in the order of their keys, stratified by class.

    The test side of "any" is fixed by content; the holdout is drawn with `random_seed`. Sides that were `given` may
    lack classes, and beside a given test set alone the others are empty. Raises InputError if a class, or an unlabelled
    set, is too small to be on every other side.
    """
    assert len(set(keys)) == len(keys), "equal contents must be dropped before a cut"
    role = np.array(roles, dtype=object)
    rows = np.arange(len(keys), dtype=np.int64)

    def part(*names: str) -> Rows:
        return rows[np.isin(role, names)]

    def drawn(pool: Rows, count: int, salt: str) -> Rows:
        return pool[choose([keys[r] for r in pool], labels[pool], count, salt)]

    pool = part("any")
    count = min(round(TEST_SHARE * len(pool)), TEST_IMAGES)
    least = max(1, len(classes))
    test = drawn(pool, max(count, min(least, len(pool))), "test")
    to_cut = np.concatenate([part("train"), np.setdiff1d(pool, test)])
    count = min(round(HOLDOUT_SHARE * len(to_cut)), HOLDOUT_IMAGES)
    holdout = drawn(to_cut, max(count, min(least, len(to_cut))), f"holdout-{random_seed}")
    sides = {
        "train": np.concatenate([part("fit"), np.setdiff1d(to_cut, holdout)]),
        "holdout": np.concatenate([part("holdout"), holdout]),
        "test": np.concatenate([part("test"), test]),
    }
    alone = "test" in given and set(roles) <= {"test"}
    for side in given:
        if not len(sides[side]):
            raise refuse("--data", f"no usable image of the given {side} side", "at least one", "see what was left out")
    if not classes and any(not len(members) for members in sides.values()):
        raise refuse("--data", f"{len(keys)} images without copies", "images for train, holdout and test", "at least 3")
    for side, members in sides.items():
        if alone or side in given:
            continue
        missing = np.flatnonzero(np.bincount(labels[members], minlength=len(classes)) == 0)
        if len(missing):
            counts = np.bincount(labels, minlength=len(classes))
            named = ", ".join(f"{counts[c]} of {classes[c]!r}" for c in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            got = f"usable images too few for the {side} side: {named}{more}"
            want = "at least 3 of each class, or 2 in train/ and 1 in val/ (broken ones and copies do not count)"
            raise refuse("--data", got, want, "add images, or remove the class")
    order = {key: at for at, key in enumerate(sorted(keys))}
    return {
        side: np.array(sorted(members, key=lambda r: order[keys[r]]), dtype=np.int64) for side, members in sides.items()
    }


def proxy_limit(classes: int, asked: int | None, split: bool) -> int:
    """Return how many images train and holdout (and test, if it is cut from the same) may use.

    Raises InputError if `asked` images cannot hold every class.
    """
    if asked is not None and asked < 2 * classes:
        want = f"at least {2 * classes}, two for each of {classes} classes"
        raise refuse("--max-images", asked, want)
    limit = grown_images(DEFAULT_PROXY_IMAGES, classes) if asked is None else asked
    return limit if split else max(round(limit / 0.8), 3 * classes)
