"""The label benchmarks count what they claim, alternate, and run at a tiny size."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.labels import epoch, storage
from benchmarks.labels.__main__ import main
from nas.labels.codec import CODECS, make_codec
from nas.labels.reader import LabelReader


def labels(n: int, topk: int, num_classes: int) -> storage.Label:
    return storage.zipf_labels(np.random.default_rng(0), n, topk, num_classes)


@pytest.mark.parametrize(("topk", "num_classes"), [(1, 2), (10, 100), (99, 100)])
def test_zipf_labels_are_labels(topk: int, num_classes: int) -> None:
    index, prob, tail = labels(300, topk, num_classes)
    assert index.shape == prob.shape == (300, topk)
    assert all(len(set(row)) == topk for row in index.tolist())
    np.testing.assert_allclose(prob.sum(1) + tail, 1, atol=1e-6)
    assert (prob[:, :-1] >= prob[:, 1:]).all()
    assert abs(labels(4000, 1, 1000)[1].mean() - 2 / 3) < 0.02, "the mean of Beta(2, 1)"


def test_divergence_is_that_of_the_dense_labels() -> None:
    rng, c = np.random.default_rng(0), 12

    def dense(label: storage.Label) -> np.ndarray:
        q = np.repeat(label[2][:, None] / (c - 4), c, 1).astype(np.float64)
        np.put_along_axis(q, label[0], label[1].astype(np.float64), 1)
        return q / q.sum(1, keepdims=True)

    pair = []
    for _ in range(2):
        mass = rng.dirichlet(np.ones(5), size=50).astype(np.float32)
        order = rng.permuted(np.tile(np.arange(4), (50, 1)), axis=1)
        pair.append((order, mass[:, :4], mass[:, 4]))
    p, q = map(dense, pair)
    np.testing.assert_allclose(storage.divergences(*pair), (p * np.log(p / q)).sum(1), rtol=1e-9, atol=1e-12)


def test_bytes_are_those_of_a_written_store() -> None:
    """Images x epochs records, a key an image and a shard's checksum, counted one by one."""
    images, epochs = storage.MAX_RECORDS, 5
    rows = storage.measure_bytes(labels(200, 10, 100), 100, labels="teacher", epochs=epochs)
    for name in CODECS:
        found = {row["quantity"]: row["value"] for row in rows if row["name"] == name}
        records = make_codec(name, 10, 100).record_bytes * images * epochs
        total = records + 16 * images + storage.CHECKSUM_BYTES * epochs
        assert found["bytes_a_record"] == pytest.approx(total / (images * epochs), rel=1e-12)
        assert found["share"] == pytest.approx(total / (44 * images * epochs), rel=1e-12)
        assert found["kl_mean"] <= found["kl_p99"] < 1e-3
    assert {row["labels"] for row in rows} == {"teacher"}


@pytest.mark.parametrize(("topk", "num_classes", "gib"), [(10, 1000, 15.7), (100, 21841, 480.8)])
def test_official_storage_is_the_published(topk: int, num_classes: int, gib: float) -> None:
    rows = storage.measure_dataset(labels(20, topk, num_classes), num_classes)
    sizes = {row["name"]: row["value"] for row in rows if row["quantity"] == "gib"}
    assert sizes["official"] == pytest.approx(gib, abs=0.06)
    assert sizes["packed"] <= 0.5 * sizes["official"]
    assert storage.targets_met(rows)
    assert not storage.targets_met([{**r, "value": 0.61} if r["quantity"] == "share" else r for r in rows])


def test_readers_give_the_labels_of_their_rows(tmp_path: Path) -> None:
    exact, rows = labels(30, 7, 1000), np.array([0, 49, 31, 31, 5])
    index, prob, tail = storage.official_reader(tmp_path, exact, records=50, ranks=3)(rows)
    np.testing.assert_array_equal(index, exact[0][rows % 30])
    np.testing.assert_array_equal(prob, exact[1][rows % 30].astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(prob.sum(1) + tail, 1, atol=1e-6)
    for name in CODECS:
        codec = make_codec(name, 7, 1000)
        found = storage.codec_reader(tmp_path, codec, exact, records=50)(rows)
        for part, expected in zip(found, codec.decode(codec.encode(*exact)[rows % 30]), strict=True):
            np.testing.assert_array_equal(part, expected)


def test_ways_alternate_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}  # type: ignore[misc]
    found = epoch.alternate(ways, 5, "cpu")
    assert [(name, len(times)) for name, times in found.items()] == [("a", 5), ("b", 5), ("c", 5)]
    assert calls[: 6 * epoch.STEPS : epoch.STEPS] == [*"cba", *"abc"]
    assert all(calls.count(name) == 6 * epoch.STEPS for name in "abc")


def test_both_engines_replay_the_stores(tmp_path: Path) -> None:
    dataset = epoch.fractals(tmp_path, 16, 320)
    for engine, store in epoch.label_stores(tmp_path, dataset, epochs=1).items():
        assert store.spec.augment.engine == engine
        reader = LabelReader(dataset.train, store, 32, 0)
        more = len(reader.batch_rows(0)) + 1
        assert [b.inputs.shape[1:] for b in islice(epoch.endless(reader), more)] == [(3, 16, 16)] * more


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    status = main(["storage", "--records", "100", "--batch", "16", "--repeats", "6", "--out", str(out)])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert status == (0 if storage.targets_met(rows) else 1)
    assert len(pd.read_csv(out)) == len(rows)
    rates = [row for row in rows if row["quantity"] in ("records_per_s", "ratio")]
    assert {row["name"] for row in rates} == {"official", *CODECS}
    assert all(0 < row["lo"] <= row["value"] <= row["hi"] for row in rates)
