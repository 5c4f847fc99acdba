"""Soft labels in memory and as records of one size: the plain and the packed codec.

Plain is exact. Packed takes about half of the 4 + 4K bytes of the official layout: a record of K classes out of C is
one string of bits, lowest bit first, padded to whole bytes:

    upper   K + (C-K >> l)   class ids, Elias-Fano: ascending, id_i - i, all but its l low bits,
                             in unary; the one of class i stands at (id_i - i >> l) + i
    tail    10               log-odds of the tail, -24 to 12; 0 is a tail of exactly 0
    scale   8                how codes are spaced: 64 ranges, 4 powers (none for K = 1)
    K times v + l            probability code of v bits, then the l low bits of id_i - i

v is 6, or 7 for K > 128, or 0 for K = 1. A probability is the largest one times exp(-range * (code / (2**v -
1))**power), so that code 0 is the largest itself; range and power are those of least Kullback-Leibler divergence.
No other class has a code that decodes to the largest, so the best class stays the best. Decoded probabilities are
scaled to sum to 1 - tail. With ids less i, dense labels (l = 0) turn into a plain bitmap.
Source of the id code: Elias 1974, Fano 1971.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from space.errors import refuse

CODECS = ("plain", "packed")
TAIL_BITS, TAIL_LOW, TAIL_HIGH = 10, -24.0, 12.0
SCALE_BITS = 8
RANGES = np.geomspace(0.02, 32.0, 64)
"""Nats between the largest probability and the last code."""
POWERS = np.array([1.0, 1.5, 2.0, 3.0])
"""Above 1 the codes lie closer near the largest probability, where an error weighs more."""
_SHARES = (1.0, 0.8, 0.6, 0.4)  # of the label's own range: cutting off its end refines the rest
_AT_ONCE = 1 << 15  # values decoded at a time: intermediate arrays stay in the processor's cache

_ODDS = np.linspace(TAIL_LOW, TAIL_HIGH, (1 << TAIL_BITS) - 1)
_TAIL = np.concatenate([[0.0], 1 / (1 + np.exp(-_ODDS))]).astype(np.float32)
_HEAD = np.concatenate([[1.0], 1 / (1 + np.exp(_ODDS))]).astype(np.float32)


class SoftLabels(NamedTuple):
    """Labels of n images: index int64 [n, K], prob float32 [n, K] and tail float32 [n] >= 0, the
    mass of the other classes."""

    index: NDArray[np.int64]  # type: ignore[assignment]  # no label is looked up by tuple.index
    prob: NDArray[np.float32]
    tail: NDArray[np.float32]

    def best(self, topk: int) -> SoftLabels:
        """Keep the `topk` best classes; the others' share goes to the tail."""
        kept = self.index.shape[1]
        if topk >= kept:
            return self
        order = np.argsort(-self.prob, axis=1, kind="stable")
        prob = np.take_along_axis(self.prob, order, axis=1)
        rest = self.tail + prob[:, topk:].sum(1, dtype=np.float64).astype(np.float32)
        index = np.take_along_axis(self.index, order[:, :topk], axis=1)
        return SoftLabels(index, np.ascontiguousarray(prob[:, :topk]), rest)


def top_labels(logits: torch.Tensor, topk: int) -> SoftLabels:
    """Turn logits [B, C] of any floating type into labels, best class first, through a softmax in float64.

    Raises InputError for a teacher that gives no finite number.
    """
    exact = logits.detach().double().cpu()
    q = torch.softmax(exact, dim=1)
    if not bool(torch.isfinite(q).all()):
        raise refuse("teacher", "outputs that are not finite", "finite logits")
    prob, index = q.topk(topk, dim=1)
    # Of equal values `topk` takes any first: the teacher's class is the one of its largest logit.
    best = exact.argmax(1, keepdim=True)
    place = (index == best).to(torch.uint8).argmax(1, keepdim=True)
    index.scatter_(1, place, index[:, :1].clone())
    index[:, :1] = best
    tail = q.scatter(1, index, 0.0).sum(1)
    return SoftLabels(index.numpy(), prob.float().numpy(), tail.float().numpy())


class Codec(ABC):
    """Turns labels of K out of C classes into records of `record_bytes` each, and back."""

    name = ""
    record_bytes = 0

    def __init__(self, topk: int, num_classes: int) -> None:
        self.topk, self.num_classes = topk, num_classes

    def encode(self, index: NDArray[Any], prob: NDArray[np.float32], tail: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Turn labels into records uint8 [n, record_bytes].

        `index` int [n, K] holds distinct classes, `prob` is float32 [n, K] and `tail` float32 [n]
        the mass of the other C - K classes. Raises InputError for values that are no label.
        """
        assert index.shape == prob.shape == (len(tail), self.topk), (index.shape, prob.shape)
        _check_labels(index, prob, tail, self.num_classes)
        return self._encode(SoftLabels(index, prob, tail))

    def decode(self, records: NDArray[np.uint8]) -> SoftLabels:
        """Turn any rows of a table of records into new contiguous arrays, ready for the loss.

        Raises InputError for bytes that are no record.
        """
        assert records.ndim == 2, records.shape
        assert records.shape[1] == self.record_bytes, records.shape
        return self._decode(records)

    @abstractmethod
    def _encode(self, labels: SoftLabels) -> NDArray[np.uint8]: ...

    @abstractmethod
    def _decode(self, records: NDArray[np.uint8]) -> SoftLabels: ...


class PlainCodec(Codec):
    """Exact records, in the order given: prob float32 [K], tail float32, index in the narrowest
    type that holds every class [K]; little-endian, without padding."""

    name = "plain"

    def __init__(self, topk: int, num_classes: int) -> None:
        super().__init__(topk, num_classes)
        self._index = np.min_scalar_type(num_classes - 1).newbyteorder("<")
        self._reals = 4 * topk + 4
        self.record_bytes = self._reals + topk * self._index.itemsize

    def _encode(self, labels: SoftLabels) -> NDArray[np.uint8]:
        reals = np.column_stack([labels.prob, labels.tail]).astype("<f4")
        fields = (reals, np.ascontiguousarray(labels.index, dtype=self._index))
        return np.hstack([field.view(np.uint8) for field in fields])

    def _decode(self, records: NDArray[np.uint8]) -> SoftLabels:
        # Rows may start anywhere in memory: `astype` copies before anything is computed.
        reals = records[:, : self._reals].view("<f4")
        index = records[:, self._reals :].view(self._index).astype(np.int64)
        return SoftLabels(index, reals[:, :-1].astype(np.float32), reals[:, -1].astype(np.float32))


@cache
def _levels(bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tabulate [scale << bits | code]: nats below the largest, and exp of minus that."""
    share = np.linspace(0.0, 1.0, 1 << bits) if bits else np.zeros(1)
    depth = (RANGES[:, None, None] * share ** POWERS[:, None]).reshape(-1)
    return depth.astype(np.float32), np.exp(-depth).astype(np.float32)


@cache
def _second(bits: int) -> NDArray[np.int64]:
    """Tabulate [scale]: the least code that decodes below the largest, whatever is rounded."""
    depth = _levels(bits)[0].reshape(len(RANGES) * len(POWERS), -1)
    least: NDArray[np.int64] = (depth < 4 * np.finfo(np.float32).eps).sum(axis=1)
    return least


@dataclass(frozen=True)
class _Layout:
    """Where the bits of a record are: `fetch` fields lie in each of `windows` windows of 8 bytes, every `phases`-th of
    which starts `stride` bytes after the one before."""

    low: int
    value: int
    upper: int
    scale: int
    start: int
    record_bytes: int
    fetch: int
    windows: int
    phases: int
    stride: int

    @property
    def width(self) -> int:
        return self.value + self.low


def _layout(topk: int, classes: int) -> _Layout:
    low = min(range(classes.bit_length()), key=lambda b: topk * b + ((classes - topk) >> b))
    upper = topk + ((classes - topk) >> low)
    value, scale = (6 if topk <= 128 else 7, SCALE_BITS)
    if topk == 1:
        value, scale = 0, 0  # the only class is the largest
    width = value + low
    start = upper + TAIL_BITS + scale
    best: tuple[int, ...] = ()
    for fetch in range(1, min(topk, 64) + 1):
        phases = 8 // gcd(max(fetch * width, 8), 8)
        shifts = max((start + k * fetch * width) % 8 for k in range(phases))
        if fetch * width + shifts > 64:
            break
        windows = -(-topk // fetch)
        found = (windows * (fetch + 1), fetch, windows, phases, fetch * width * phases // 8)
        best = min(best or found, found)
    size = -(-(start + topk * width) // 8)
    return _Layout(low, value, upper, scale, start, size, *best[1:])


class PackedCodec(Codec):
    """Records of about half the official size, as the module's text describes them.

    Class ids come back exactly, ascending; probabilities and the tail within 1e-3 nats (mean divergence of a label).
    """

    name = "packed"

    def __init__(self, topk: int, num_classes: int) -> None:
        super().__init__(topk, num_classes)
        self._at = _layout(topk, num_classes)
        self.record_bytes = self._at.record_bytes
        self._block = max(1, _AT_ONCE // topk)

    def _encode(self, labels: SoftLabels) -> NDArray[np.uint8]:
        records = np.empty((len(labels.tail), self.record_bytes), dtype=np.uint8)
        step = max(1, _AT_ONCE // (8 * self.record_bytes))
        for rows in (slice(at, at + step) for at in range(0, len(records), step)):
            records[rows] = self._encode_block(*(part[rows] for part in labels))
        return records

    def _encode_block(self, index: NDArray[Any], prob: NDArray[Any], tail: NDArray[Any]) -> NDArray[np.uint8]:
        at, n = self._at, len(tail)
        order = np.argsort(index, axis=1)
        best = (order == prob.argmax(axis=1)[:, None]).argmax(axis=1)
        ids = np.take_along_axis(index, order, axis=1).astype(np.int64)
        if bool((ids[:, 1:] == ids[:, :-1]).any()):
            raise refuse("label classes", "a class twice in one label", "distinct classes")
        scale, codes = _quantised(np.take_along_axis(prob, order, axis=1), best, at.value)
        less = ids - np.arange(self.topk)
        bits = np.zeros((n, 8 * self.record_bytes), dtype=np.uint8)
        np.put_along_axis(bits, (less >> at.low) + np.arange(self.topk), 1, axis=1)
        bits[:, at.upper : at.start] = _bits_of(_tail_codes(tail) | scale << TAIL_BITS, TAIL_BITS + at.scale)
        fields = codes | (less & ((1 << at.low) - 1)) << at.value
        stop = at.start + self.topk * at.width
        bits[:, at.start : stop] = _bits_of(fields, at.width).reshape(n, stop - at.start)
        return np.packbits(bits, axis=1, bitorder="little")

    def _decode(self, records: NDArray[np.uint8]) -> SoftLabels:
        n = len(records)
        shape = (n, self.topk)
        labels = SoftLabels(np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(n, np.float32))
        for at in range(0, n, self._block):
            rows = slice(at, at + self._block)
            self._decode_block(records[rows], *(part[rows] for part in labels))
        return labels

    def _decode_block(
        self, records: NDArray[np.uint8], index: NDArray[Any], prob: NDArray[Any], tail: NDArray[Any]
    ) -> None:
        at, n, k = self._at, len(records), self.topk
        shifts, base = self._constants
        upper = np.unpackbits(records[:, : -(-at.upper // 8)], axis=1, count=at.upper, bitorder="little")
        ones = np.flatnonzero(upper.view(np.bool_))
        if len(ones) != n * k:
            raise refuse("label records", "damaged bits", f"{k} classes a record")
        # Windows may reach 8 bytes past their record: into the next one, or into the padding.
        data = np.empty(records.size + 8, dtype=np.uint8)
        data[:-8].reshape(records.shape)[...] = records
        head = (_strided(data, n, 1, self.record_bytes, at.upper // 8, 0) >> at.upper % 8)[:, 0]
        tails = head & ((1 << TAIL_BITS) - 1)
        np.take(_TAIL, tails, out=tail, mode="clip")

        windows = np.empty((n, at.windows), dtype=np.int64)
        for phase in range(min(at.phases, at.windows)):
            first = (at.start + phase * at.fetch * at.width) // 8
            part = windows[:, phase :: at.phases]
            part[...] = _strided(data, n, part.shape[1], self.record_bytes, first, at.stride)
        flat, fields = windows.reshape(-1), np.empty((n * at.windows, at.fetch), dtype=np.int64)
        for place in range(at.fetch):
            np.right_shift(flat, shifts[place, : len(flat)], out=fields[:, place])
        field = fields.reshape(n, -1)[:, :k]

        ids = np.left_shift(ones.reshape(n, k), at.low, out=index)
        ids -= base[:n]
        codes = field & ((1 << at.value) - 1)
        field >>= at.value
        field &= (1 << at.low) - 1
        ids += field

        scale = (head >> TAIL_BITS & ((1 << at.scale) - 1)) << at.value
        codes += scale[:, None]
        np.take(_levels(at.value)[1], codes, out=prob, mode="clip")
        prob *= (_HEAD[tails] / prob.sum(axis=1))[:, None]

    @cached_property
    def _constants(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the fields' shifts in their windows, [fetch, windows of a block], and by how much the
        place of a one exceeds its id, [block, K]."""
        at, i = self._at, np.arange(self.topk)
        bit = (at.start + np.arange(at.windows) * at.fetch * at.width) % 8
        shifts = np.arange(at.fetch)[:, None] * at.width + np.tile(bit, self._block)
        rows = np.arange(self._block)[:, None] * at.upper
        return shifts, ((rows + i) << at.low) - i


def _strided(
    data: NDArray[np.uint8], rows: int, columns: int, row_bytes: int, first: int, stride: int
) -> NDArray[np.int64]:
    """View bytes as little-endian windows of 8, wherever they start: int64 [rows, columns]."""
    shape, strides = (rows, columns), (row_bytes, stride)
    return np.ndarray(shape, "<i8", buffer=data.data, offset=first, strides=strides)


def _bits_of(values: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Split values into bits, lowest first: int64 [...] -> uint8 [..., width]."""
    return (values[..., None] >> np.arange(width) & 1).astype(np.uint8)


def _check_labels(index: NDArray[Any], prob: NDArray[np.float32], tail: NDArray[np.float32], num_classes: int) -> None:
    """Reject class ids outside 0 to C-1, which a narrow type would wrap, and values outside [0, 1]
    or not summing to 1 (within 1e-3). Raises InputError."""
    if index.size and not 0 <= index.min() <= index.max() < num_classes:
        odd = index.min() if index.min() < 0 else index.max()
        raise refuse("label classes", odd, f"0 to {num_classes - 1}")
    for name, values in (("label probabilities", prob), ("label tail", tail)):
        if not bool(np.all((values >= 0) & (values <= 1.001))):  # false for NaN as well
            raise refuse(name, "values outside [0, 1]", "probabilities")
    off = np.abs(prob.sum(axis=1) + tail - 1).max(initial=0)
    if off > 1e-3:
        raise refuse("label", f"a mass {off:.3g} off 1", "probabilities and a tail that sum to 1")


def _tail_codes(tail: NDArray[np.float32]) -> NDArray[np.int64]:
    """Round tails to the nearest log-odds: float32 [n] >= 0 -> int64 [n], 0 for exactly 0."""
    exact = tail.astype(np.float64)
    with np.errstate(divide="ignore"):
        odds = np.log(exact) - np.log(np.maximum(1 - exact, 1e-12))
    step = (TAIL_HIGH - TAIL_LOW) / (len(_ODDS) - 1)
    codes = np.rint((np.clip(odds, TAIL_LOW, TAIL_HIGH) - TAIL_LOW) / step).astype(np.int64) + 1
    return np.where(tail > 0, codes, 0)


def _quantised(
    prob: NDArray[np.float32], best: NDArray[np.int64], bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose scale int64 [n] and codes int64 [n, K] of `bits` for float32 [n, K] >= 0.

    Tries all powers with a few ranges and takes the pair of least cross-entropy, where the class in the column `best`
    [n] alone is the largest.
    """
    depths, ratios = _levels(bits)
    top = prob.max(axis=1, keepdims=True)
    tiny = np.finfo(np.float32).tiny
    depth = np.log(np.maximum(top, tiny)) - np.log(np.maximum(prob, tiny))
    weight = prob / np.maximum(prob.sum(axis=1, keepdims=True), tiny)
    place = np.log(np.maximum(depth, tiny))
    deepest = depth.max(axis=1)
    scale = np.zeros(len(prob), dtype=np.int64)
    codes = np.zeros(prob.shape, dtype=np.int64)
    least = np.full(len(prob), np.inf, dtype=np.float32)
    for share in _SHARES:
        span = np.searchsorted(RANGES, np.minimum(share * deepest, RANGES[-1]))
        over = place - np.log(RANGES).astype(np.float32)[span][:, None]
        np.minimum(over, 0, out=over)
        for number, power in enumerate(POWERS):
            tried = np.rint(np.exp(over / np.float32(power)) * ((1 << bits) - 1)).astype(np.int64)
            which = span * len(POWERS) + number
            np.maximum(tried, _second(bits)[which][:, None], out=tried)
            np.put_along_axis(tried, best[:, None], 0, axis=1)
            spot = tried + (which << bits)[:, None]
            cost = (weight * depths[spot]).sum(axis=1) + np.log(ratios[spot].sum(axis=1))
            better = cost < least
            least[better], scale[better], codes[better] = cost[better], which[better], tried[better]
    return scale, codes


def make_codec(name: str, topk: int, num_classes: int) -> Codec:
    """Make a codec for the K = `topk` best of `num_classes` classes. Raises InputError."""
    if name not in CODECS:
        raise refuse("label codec", name, " or ".join(CODECS))
    if not 1 <= topk < num_classes:
        raise refuse("top-K", topk, f"1 to {num_classes - 1} (classes - 1)")
    return (PlainCodec if name == "plain" else PackedCodec)(topk, num_classes)
