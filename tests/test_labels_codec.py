"""Both codecs: what goes in comes out - exactly, or within a stated divergence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nas.labels.codec import CODECS, make_codec, top_labels
from space.errors import InputError

Label = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


def top_of(q: NDArray[np.float64], k: int) -> Label:
    """The K best of dense distributions [n, C], the tail in float64."""
    index = np.argsort(-q, axis=1, kind="stable")[:, :k]
    prob = np.take_along_axis(q, index, 1)
    rest = q.copy()
    np.put_along_axis(rest, index, 0.0, 1)
    return index, prob.astype(np.float32), rest.sum(1).astype(np.float32)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    q = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(q / q.sum(1, keepdims=True))


def families(rng: np.random.Generator, n: int, c: int) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Dense label distributions [n, C] of many shapes."""
    for alpha in (0.01, 0.1, 1.0, 10.0, 100.0):
        draws = rng.gamma(alpha, size=(n, c)) + 1e-300
        yield f"Dirichlet {alpha}", draws / draws.sum(1, keepdims=True)
    for power in (0.5, 1.0, 2.0, 4.0):
        one = np.arange(1, c + 1) ** -power
        yield f"Zipf {power}", rng.permuted(np.tile(one / one.sum(), (n, 1)), axis=1)
    for spread in (0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0):
        yield f"softmax {spread}", softmax(spread * rng.normal(size=(n, c)))
    hot = (rng.integers(c, size=n)[:, None] == np.arange(c)).astype(float)
    yield "one-hot", hot
    yield "uniform", np.full((n, c), 1 / c)
    yield "smoothed one-hot", 0.9 * hot + 0.1 / c
    yield "tied pairs", np.repeat(softmax(4 * rng.normal(size=(n, (c + 1) // 2))), 2, 1)[:, :c]


def divergence(exact: Label, decoded: Label, c: int) -> NDArray[np.float64]:
    """KL(exact || decoded) in nats [n], both with their tail spread over the C - K others."""

    def dense(label: Label) -> NDArray[np.float64]:
        index, prob, tail = label
        q = np.repeat(tail.astype(np.float64)[:, None] / (c - index.shape[1]), c, 1)
        np.put_along_axis(q, index, prob.astype(np.float64), 1)
        return np.asarray(q / q.sum(1, keepdims=True))

    p, q = dense(exact), dense(decoded)
    seen = p > 0
    ratio = np.log(np.where(seen, p, 1.0)) - np.log(np.where(seen, q, 1.0))
    return np.asarray((p * ratio).sum(1))


def check_laws(exact: Label, decoded: Label) -> None:
    """The laws of every decoded label; index is a permutation of the exact one."""
    index, prob, tail = decoded
    assert (index.dtype, prob.dtype, tail.dtype) == (np.int64, np.float32, np.float32)
    assert all(part.flags.c_contiguous and part.flags.writeable for part in decoded)
    np.testing.assert_array_equal(np.sort(index, 1), np.sort(exact[0], 1))
    assert np.isfinite(prob).all()
    assert min(prob.min(initial=0), tail.min(initial=0)) >= 0
    np.testing.assert_array_equal(tail == 0, exact[2] == 0)
    total = prob.astype(np.float64).sum(1) + tail
    np.testing.assert_allclose(total, 1.0, rtol=0, atol=1e-6)


SIZES = [(1, 2), (1, 1000), (2, 300), (5, 100), (10, 1000), (50, 100), (99, 100), (128, 400), (499, 500)]


@pytest.mark.parametrize(("k", "c"), SIZES)
def test_packed_labels_stay_within_their_divergence(k: int, c: int) -> None:
    rng, codec = np.random.default_rng(k), make_codec("packed", k, c)
    for name, q in families(rng, 100, c):
        exact = top_of(q / q.sum(1, keepdims=True), k)
        decoded = codec.decode(codec.encode(*exact))
        check_laws(exact, decoded)
        lost = divergence(exact, decoded, c)
        assert lost.mean() < 1e-3, (name, lost.mean())
        assert np.quantile(lost, 0.99) < 3e-3, (name, lost.max())
        assert (decoded[0][:, 1:] > decoded[0][:, :-1]).all(), "ids ascending"
        # The order of probabilities is kept: a larger one never decodes to less.
        ranked = np.take_along_axis(decoded[1], np.argsort(np.argsort(exact[0], 1), 1), 1)
        assert (ranked[:, :-1] >= ranked[:, 1:]).all(), name


@pytest.mark.parametrize(("k", "c", "size"), [(10, 1000, 21), (100, 1000, 142), (10, 21841, 26), (100, 21841, 199)])
def test_packed_records_take_half_of_the_official_size(k: int, c: int, size: int) -> None:
    assert make_codec("packed", k, c).record_bytes == size <= 0.6 * (4 + 4 * k)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("k", "c"), [(1, 2), (2, 3), (10, 100), (100, 1000), (200, 999)])
def test_the_best_class_stays_the_best_alone(name: str, k: int, c: int) -> None:
    """The decoded argmax is the teacher's, whatever lies how near it."""
    rng, codec, n = np.random.default_rng(k), make_codec(name, k, c), 100
    for spread in (0.0, 1.0, 5.0):
        base = spread * rng.normal(size=(n, c))
        for near in (0.0, 1e-9, 1e-7, 1e-5, 1e-3, 1e-1):
            logits = base.copy()
            rivals = rng.random((n, c)) < rng.choice([0.01, 0.3, 1.0], size=(n, 1))
            top = logits.max(1, keepdims=True)
            logits = np.where(rivals, top - near * rng.random((n, c)), logits)
            if spread == 5.0:
                logits = np.round(logits)  # exact ties
            given = torch.from_numpy(logits)
            exact = top_labels(given, k)
            want = given.argmax(1).numpy()
            assert (exact.index[:, 0] == want).all()
            index, prob, _ = codec.decode(codec.encode(*exact))
            found = np.take_along_axis(index, prob.argmax(1)[:, None], 1)[:, 0]
            assert (found == want).all(), (name, spread, near, (found != want).mean())
            if name == "packed" and k > 1:
                ranked = np.sort(prob, 1)
                assert (ranked[:, -1] > ranked[:, -2]).all(), "no other class ties with it"


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(CODECS))
def test_laws_for_any_number_of_classes(data: st.DataObject, name: str) -> None:
    c = data.draw(st.one_of(st.integers(2, 40), st.integers(2, 100_000)), label="C")
    k = data.draw(st.one_of(st.integers(1, min(c - 1, 200)), st.just(min(c - 1, 3000))), label="K")
    n = data.draw(st.integers(0, 4), label="n")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = np.sort(rng.permutation(c)[:k])
    if data.draw(st.booleans(), label="at the end"):
        ids = np.arange(c - k, c)
    index = np.stack([rng.permutation(ids) for _ in range(n)] or [ids])[:n]
    mass = softmax(rng.choice([0.0, 1.0, 10.0, 100.0]) * rng.normal(size=(n, k + 1)))
    if data.draw(st.booleans(), label="no tail"):
        mass[:, -1] = 0
    mass = (mass / mass.sum(1, keepdims=True)).astype(np.float32)
    exact = index, -np.sort(-mass[:, :k], 1), mass[:, k]
    codec = make_codec(name, k, c)
    records = codec.encode(index.astype(np.min_scalar_type(c)), *exact[1:])
    assert records.shape == (n, codec.record_bytes)
    assert records.dtype == np.uint8
    decoded = codec.decode(records)
    check_laws(exact, decoded)
    if name == "plain":
        for part, want in zip(decoded, exact, strict=True):
            np.testing.assert_array_equal(part, want)
    assert np.array_equal(codec.decode(codec.encode(*decoded))[0], decoded[0])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("k", "c"), [(1, 7), (3, 10), (9, 10), (10, 1000), (97, 21841)])
def test_records_are_independent(name: str, k: int, c: int) -> None:
    rng, codec = np.random.default_rng(k), make_codec(name, k, c)
    n = 2 * (1 << 15) // k + 7 if k > 5 else 5000  # more than a decoder takes at once
    logits = -np.sort(-3 * rng.normal(size=(n, k + 1)), 1)
    mass = softmax(logits).astype(np.float32)
    one = np.argsort(rng.random((50, c)), 1)[:, :k]
    exact = one[rng.integers(50, size=n)], mass[:, :k], mass[:, k]
    records = codec.encode(*exact)
    whole = codec.decode(records)
    wide = np.zeros((n, codec.record_bytes + 3), np.uint8)
    wide[:, 1:-2] = records
    choices: list[Any] = [rng.integers(n, size=m) for m in (1, 2, 3, 1000)]
    for rows in [*choices, slice(n - 1, None), slice(5, 6), slice(None, None, -3), slice(0, 0)]:
        np.testing.assert_array_equal(codec.encode(*(p[rows] for p in exact)), records[rows])
        for source in (records[rows], wide[rows, 1:-2]):  # not contiguous, not aligned
            for part, want in zip(codec.decode(source), whole, strict=True):
                np.testing.assert_array_equal(part, want[rows])


@pytest.mark.parametrize(("k", "c"), [(1, 2), (1, 100_000), (2, 3), (4, 9), (10, 1000), (60, 61), (200, 999)])
def test_packed_bits_are_as_described(k: int, c: int) -> None:
    """A decoder of one record by plain integers, from the words of the module alone."""
    rng, codec = np.random.default_rng(c), make_codec("packed", k, c)
    n = 40
    mass = -np.sort(-softmax(4 * rng.normal(size=(n, k + 1))), 1)
    index = np.stack([rng.choice(c, k, replace=False) for _ in range(n)])
    records = codec.encode(index, mass[:, :k].astype(np.float32), mass[:, k].astype(np.float32))
    ids, prob, tail = codec.decode(records)
    low = min(range(20), key=lambda b: k * b + ((c - k) >> b))
    value, scale_bits = (6 if k <= 128 else 7, 8) if k > 1 else (0, 0)
    ranges, powers = np.geomspace(0.02, 32, 64), (1.0, 1.5, 2.0, 3.0)
    for row in range(n):
        bits = int.from_bytes(records[row].tobytes(), "little")

        def take(width: int) -> int:
            nonlocal bits
            found = bits & ((1 << width) - 1)
            bits >>= width
            return found

        upper = take(k + ((c - k) >> low))
        odds, scale = take(10), take(scale_bits)
        fields = [(take(value), take(low)) for _ in range(k)]
        assert bits == 0
        ones = [i for i in range(upper.bit_length()) if upper >> i & 1]
        pairs = enumerate(zip(ones, fields, strict=True))
        want = [((one - i) << low | f[1]) + i for i, (one, f) in pairs]
        assert want == ids[row].tolist()
        t = 0 if odds == 0 else 1 / (1 + np.exp(24 - 36 * (odds - 1) / 1022))
        assert tail[row] == pytest.approx(t, rel=1e-6)
        depth = ranges[scale >> 2]
        raw = np.array([np.exp(-depth * (f[0] / max(1, 2**value - 1)) ** powers[scale & 3]) for f in fields])
        np.testing.assert_allclose(prob[row], raw / raw.sum() * (1 - t), rtol=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_no_label_is_refused(name: str) -> None:
    codec = make_codec(name, 2, 300)

    def encode(index: list[int], prob: list[float], tail: float) -> None:
        codec.encode(np.array([index]), np.array([prob], np.float32), np.array([tail], np.float32))

    encode([299, 0], [0.5, 0.25], 0.25)
    bad: list[tuple[list[int], list[float], float, str]] = [
        *(([300, 0], [0.5, 0.25], 0.25, "label classes"), ([1, -1], [0.5, 0.25], 0.25, "label classes")),
        *(([1, 2], [0.5, -0.1], 0.6, "probabilities"), ([1, 2], [float("nan"), 0.2], 0.2, "probabilities")),
        *(([1, 2], [0.5, 0.3], -0.1, "label tail"), ([1, 2], [0.5, 0.2], 0.2, "off 1")),
    ]
    for index, prob, tail, words in bad + ([([7, 7], [0.5, 0.25], 0.25, "twice")] if name == "packed" else []):
        with pytest.raises(InputError, match=words):
            encode(index, prob, tail)
    if name == "packed":
        with pytest.raises(InputError, match="damaged"):
            codec.decode(np.zeros((3, codec.record_bytes), np.uint8))


def test_unknown_codecs_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="label codec: got zip, want plain or packed"):
        make_codec("zip", 2, 10)
    for topk in (0, -1, 10, 11):
        with pytest.raises(InputError, match="top-K: got"):
            make_codec("packed", topk, 10)


@pytest.mark.parametrize(
    ("name", "records"), [("plain", "0000003f0000803e0000003e0000003e070205"), ("packed", "da9c95a51d10")]
)
def test_written_records_stay_readable(name: str, records: str) -> None:
    """The bytes of today's format, so that no later change makes an old store say other things."""
    codec = make_codec(name, 3, 10)
    exact = np.array([[7, 2, 5]]), np.float32([[0.5, 0.25, 0.125]]), np.float32([0.125])
    assert codec.encode(*exact).tobytes().hex() == records
    raw = np.frombuffer(bytes.fromhex(records), np.uint8)[None]
    index, prob, tail = codec.decode(raw)
    for place, (where, value) in enumerate(zip(exact[0][0], exact[1][0], strict=True)):
        at = index[0].tolist().index(where)
        assert prob[0, at] == pytest.approx(value, rel=0.02), place
    assert tail[0] == pytest.approx(0.125, rel=0.02)
