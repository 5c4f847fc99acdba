"""`python -m benchmarks.labels_storage` counts and times what it says, at a tiny size."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import labels_containers as containers
from benchmarks import labels_storage as storage
from nas.labels.codec import CODECS, make_codec


def test_zipf_labels_are_labels() -> None:
    for topk, num_classes in ((1, 2), (10, 100), (99, 100)):
        index, prob, tail = storage.zipf_labels(np.random.default_rng(0), 300, topk, num_classes)
        assert index.shape == prob.shape == (300, topk)
        assert all(len(set(row)) == topk for row in index.tolist())
        np.testing.assert_allclose(prob.sum(1) + tail, 1, atol=1e-6)
        assert (prob[:, :-1] >= prob[:, 1:]).all()
    top = storage.zipf_labels(np.random.default_rng(0), 4000, 1, 1000)[1]
    assert abs(top.mean() - 2 / 3) < 0.02, "the mean of Beta(2, 1)"


def test_divergence_is_that_of_the_dense_labels() -> None:
    rng, c = np.random.default_rng(0), 12

    def dense(label: storage.Label) -> np.ndarray:
        q = np.repeat(label[2][:, None] / (c - 4), c, 1).astype(np.float64)
        np.put_along_axis(q, label[0], label[1].astype(np.float64), 1)
        return q / q.sum(1, keepdims=True)

    labels = []
    for _ in range(2):
        mass = rng.dirichlet(np.ones(5), size=50).astype(np.float32)
        order = rng.permuted(np.tile(np.arange(4), (50, 1)), axis=1)
        labels.append((order, mass[:, :4], mass[:, 4]))
    p, q = map(dense, labels)
    want = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(storage.divergences(*labels), want, rtol=1e-9, atol=1e-12)


def test_bytes_are_those_of_a_written_store() -> None:
    """Images x epochs records, a key an image and 72 bytes a piece, counted one by one."""
    exact = storage.zipf_labels(np.random.default_rng(0), 200, 10, 100)
    images, epochs = 65_536, 5
    rows = storage.measure_bytes(*exact, 100, labels="teacher", epochs=epochs)
    for name in CODECS:
        found = {row["quantity"]: row["value"] for row in rows if row["name"] == name}
        records = make_codec(name, 10, 100).record_bytes * images * epochs
        total = records + 16 * images + 72 * epochs
        assert found["bytes_a_record"] == pytest.approx(total / (images * epochs), rel=1e-12)
        assert found["share"] == pytest.approx(total / (44 * images * epochs), rel=1e-12)
        assert found["kl_mean"] <= found["kl_p99"] < 1e-3
    assert found["share"] <= 0.6 + 16 / 5 / 44
    assert {row["labels"] for row in rows} == {"teacher"}


@pytest.mark.parametrize(("topk", "num_classes", "gib"), [(10, 1000, 15.7), (100, 21841, 480.8)])
def test_official_storage_is_the_published(topk: int, num_classes: int, gib: float) -> None:
    exact = storage.zipf_labels(np.random.default_rng(0), 20, topk, num_classes)
    rows = storage.measure_storage(topk, num_classes, exact)
    sizes = {row["name"]: row["value"] for row in rows if row["quantity"] == "gib"}
    assert sizes["official"] == pytest.approx(gib, abs=0.06)
    assert sizes["packed"] <= 0.5 * sizes["official"]
    assert storage.targets_met(rows)
    worse = [{**r, "value": 0.61} if r["quantity"] == "share" else r for r in rows]
    assert not storage.targets_met(worse)


def test_readers_give_the_labels_of_their_rows(tmp_path: Path) -> None:
    exact = storage.zipf_labels(np.random.default_rng(0), 30, 7, 1000)
    rows = np.array([0, 49, 31, 31, 5])
    read = containers.official_reader(tmp_path, *exact[:2], records=50, ranks=3)
    index, prob, tail = read(rows)
    np.testing.assert_array_equal(index, exact[0][rows % 30])
    np.testing.assert_array_equal(prob, exact[1][rows % 30].astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(prob.sum(1) + tail, 1, atol=1e-6)
    plain = storage.codec_reader(tmp_path, make_codec("plain", 7, 1000), exact, records=50)
    for part, want in zip(plain(rows), exact, strict=True):  # type: ignore[call-overload]
        np.testing.assert_array_equal(part, want[rows % 30])


@pytest.mark.parametrize("kind", list(containers.NEEDS))
def test_containers_give_back_their_records(kind: str, tmp_path: Path) -> None:
    if not containers.is_installed(kind):
        pytest.skip(f"{containers.NEEDS[kind]} is not installed")
    records = np.random.default_rng(0).integers(0, 256, size=(5000, 21), dtype=np.uint8)
    size = containers.write(kind, tmp_path / "at", records)
    assert size >= records.nbytes
    assert size == sum(p.stat().st_size for p in (tmp_path / "at").rglob("*") if p.is_file())
    count, fetch = containers.open_reader(kind, tmp_path / "at", 21)
    assert count == 5000
    rows = np.array([4999, 0, 7, 7, 4096])
    np.testing.assert_array_equal(fetch(rows), records[rows])


def test_a_tiny_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "READ_SECONDS", 0.01)
    monkeypatch.setattr(containers, "NEEDS", {"memory map": "", "zarr": "no_such_package"})
    out = tmp_path / "rows.csv"
    small = ["--records", "100", "--batch", "16", "--repeats", "6", "--rounds", "1"]
    status = storage.main([*small, "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert "containers zarr: not installed: pip install no_such_package" in lines
    said = json.loads(lines[-1])
    assert status == (0 if storage.targets_met(said["rows"]) else 1)
    with out.open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(said["rows"])
    assert {row["fingerprint"] for row in table} == {said["fingerprint"]["id"]}
    rates = [row for row in said["rows"] if row["quantity"] in ("records_per_s", "ratio")]
    assert {row["name"] for row in rates} == {"official", "plain", "packed", "memory map"}
    assert all(0 < row["lo"] <= row["value"] <= row["hi"] for row in rates)


def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (["--records", "0"], ["--repeats", "5"], ["--batch", "-1"], ["--rounds", "0"]):
        assert storage.main(given) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(storage, "DATASETS", {})
    assert storage.main(["--out", str(tmp_path / "none" / "rows.csv")]) == 2
    assert "--out: got" in capsys.readouterr().err
