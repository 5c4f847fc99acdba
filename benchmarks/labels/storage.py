"""Bytes of stored soft labels, what decoding loses, and the speed of random-order reads."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.estimates import Row, check_at_least
from nas.core.io import write_atomic
from nas.labels.codec import CODECS, Codec, make_codec
from nas.labels.store import CHECKSUM_BYTES, MAX_RECORDS, open_store
from nas.measure.intervals import MIN_BLOCKS, median_interval

Label = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]
"""Classes and probabilities [n, K], and the rest's probability [n]."""
Read = Callable[[NDArray[np.int64]], Label]

DATASETS = {1000: (1_281_167, 300), 21841: (14_197_122, 90)}
"""Classes of ImageNet-1k and -22k -> images, epochs of the official recipe."""
KEY_BYTES = 16
LIMITS = {"share": 0.60, "kl_mean": 1e-3, "kl_p99": 3e-3}
READ_TARGETS = {(10, 1000): 13.0, (100, 21841): 2.0}
STORE_TOPK = (10, 50)
DISTINCT = 4000
"""Labels drawn; a longer table repeats them, since records are of fixed size."""


def zipf_labels(rng: np.random.Generator, n: int, topk: int, num_classes: int) -> Label:
    """Draw labels: top-1 ~ Beta(2, 1), the rest by Zipf's law (power 1), classes uniform."""
    top, ranks = rng.beta(2, 1, size=n), 1 / np.arange(1, num_classes)
    ranks /= ranks.sum()
    prob = np.concatenate([top[:, None], (1 - top)[:, None] * ranks[: topk - 1]], axis=1)
    tail = (1 - top) * ranks[topk - 1 :].sum()
    index = np.stack([rng.permutation(num_classes)[:topk] for _ in range(n)])
    return index, -np.sort(-prob, axis=1).astype(np.float32), tail.astype(np.float32)


def divergences(exact: Label, decoded: Label) -> NDArray[np.float64]:
    """Return KL(exact || decoded) in nats [n], the tail of both spread over the same classes."""
    parts = []
    for index, prob, tail in (exact, decoded):
        ordered = np.take_along_axis(prob, np.argsort(index, axis=1), 1)
        parts.append(np.column_stack([ordered, tail]).astype(np.float64))
    p, q = (part / part.sum(axis=1, keepdims=True) for part in parts)
    ratio = np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, q, 1))
    return np.asarray((p * ratio).sum(axis=1))


def official_bytes(topk: int) -> int:
    """Return the bytes of an official record: int32 seed, K int16 classes, K float16 values."""
    return 4 + 4 * topk


def measure_bytes(exact: Label, num_classes: int, *, labels: str = "zipf", epochs: int = 1) -> list[Row]:
    """Measure what labels take in a store of `epochs`, and what decoding loses, by codec.

    Rows: bytes_a_record (with keys and checksums), share (of 4 + 4K), kl_mean and kl_p99 in nats.
    """
    topk, rows = exact[0].shape[1], list[Row]()
    for name in CODECS:
        codec = make_codec(name, topk, num_classes)
        lost = divergences(exact, codec.decode(codec.encode(*exact)))
        size = codec.record_bytes + CHECKSUM_BYTES / MAX_RECORDS + KEY_BYTES / epochs
        found = {
            "bytes_a_record": size,
            "share": size / official_bytes(topk),
            "kl_mean": max(0.0, float(lost.mean())),
            "kl_p99": max(0.0, float(np.quantile(lost, 0.99))),
        }
        row: Row = {"part": "bytes", "labels": labels, "name": name, "topk": topk, "classes": num_classes}
        rows += [row | {"quantity": what, "value": value, "lo": None, "hi": None} for what, value in found.items()]
    return rows


def measure_dataset(exact: Label, num_classes: int) -> list[Row]:
    """Measure labels at the size of a published data set: bytes a record, and GiB of them all."""
    topk, (images, epochs) = exact[0].shape[1], DATASETS[num_classes]
    rows = measure_bytes(exact, num_classes, epochs=epochs)
    sizes = {r["name"]: r["value"] for r in rows if r["quantity"] == "bytes_a_record"}
    sizes["official"] = official_bytes(topk)
    records = images * epochs / 2**30
    return rows + [{**rows[0], "name": n, "quantity": "gib", "value": size * records} for n, size in sizes.items()]


def measure_store(folder: Path) -> list[Row]:
    """Measure a real teacher's labels, all epochs of a store, at smaller K. Raises InputError."""
    store, rows = open_store(folder), []
    parts = [store.epoch(epoch)[np.arange(len(store.keys))] for epoch in range(store.epochs)]
    for topk in (k for k in STORE_TOPK if k <= store.spec.topk):
        kept = [part.best(topk) for part in parts]
        index, prob, tail = (np.concatenate([getattr(one, name) for one in kept]) for name in ("index", "prob", "tail"))
        teacher = store.spec.teacher_id.split("@")[0]
        rows += measure_bytes((index, prob, tail), store.spec.num_classes, labels=teacher, epochs=store.epochs)
    return rows


def codec_reader(folder: Path, codec: Codec, exact: Label, records: int) -> Read:
    """Write a table of records and map it: rows int64 [n] -> arrays ready for the loss."""
    table = codec.encode(*exact)[np.arange(records) % len(exact[0])]
    path = folder / f"{codec.name}.bin"
    write_atomic(path, table.tobytes())
    mapped = np.memmap(path, dtype=np.uint8, mode="r", shape=table.shape)
    return lambda rows: codec.decode(np.take(mapped, rows, axis=0))


def official_reader(folder: Path, exact: Label, records: int, ranks: int = 8) -> Read:
    """Write the official layout and open it: one values file a rank, one record at a time.

    A record is int32 seed, K int16 classes, K float16 values; a dict leads from key to file and offset, as the official
    manager keeps it. The reader turns rows int64 [n] into arrays ready for the loss. Facts: microsoft/Cream,
    TinyViT/data/augmentation (manager.py, dataset_wrapper.py).
    """
    index, prob, topk = exact[0], exact[1], exact[0].shape[1]
    kind = np.dtype([("seed", "<i4"), ("index", "<i2", (topk,)), ("prob", "<f2", (topk,))])
    rows = np.arange(records) % len(index)
    table = np.zeros(records, dtype=kind)
    table["seed"], table["index"], table["prob"] = np.arange(records), index[rows], prob[rows]
    offsets: dict[str, tuple[int, int]] = {}
    files = []
    for rank in range(ranks):
        path = folder / f"rank{rank}-values.bin"
        path.write_bytes(table[rank::ranks].tobytes())
        files.append(path.open("rb"))
        offsets |= {str(row): (rank, at * kind.itemsize) for at, row in enumerate(range(rank, records, ranks))}
    keys = [str(row) for row in range(records)]

    def read(batch: NDArray[np.int64]) -> Label:
        classes, values = [], []
        for row in batch.tolist():
            rank, offset = offsets[keys[row]]
            files[rank].seek(offset)
            data = files[rank].read(kind.itemsize)
            int(np.frombuffer(data, np.int32, count=1)[0])  # the seed of the augmentation
            classes.append(np.frombuffer(data, np.int16, count=topk, offset=4))
            values.append(np.frombuffer(data, np.float16, count=topk, offset=4 + 2 * topk))
        # Faster than np.stack, to the reference's good.
        ready = np.concatenate(values).reshape(-1, topk).astype(np.float32)
        return np.concatenate(classes).reshape(-1, topk).astype(np.int64), ready, 1 - ready.sum(axis=1)

    return read


def measure_reads(exact: Label, num_classes: int, records: int, batch: int, repeats: int) -> list[Row]:
    """Time random-order reads in alternating blocks: records/s, and ratios to the official."""
    rng, topk = np.random.default_rng(1), exact[0].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        readers = {"official": official_reader(Path(folder), exact, records)}
        for name in CODECS:
            readers[name] = codec_reader(Path(folder), make_codec(name, topk, num_classes), exact, records)
        batches, rates = {}, {name: list[float]() for name in readers}
        for name, read in readers.items():  # warm up, and find how many batches take 0.03 processor seconds
            took = min(_seconds(read, rng.integers(records, size=(1, batch))) for _ in range(3))
            batches[name] = max(1, min(1000, round(0.03 / max(took, 1e-6))))
        for turn in range(repeats):
            for name in list(readers)[:: 1 if turn % 2 == 0 else -1]:
                orders = rng.integers(records, size=(batches[name], batch))
                rates[name].append(orders.size / max(_seconds(readers[name], orders), 1e-9))
    rows = []
    for name, found in rates.items():
        series = {"records_per_s": found}
        if name != "official":
            series["ratio"] = [a / b for a, b in zip(found, rates["official"], strict=True)]
        for quantity, values in series.items():
            at = median_interval(values)
            row: Row = {"part": "reads", "labels": "zipf", "name": name, "topk": topk, "classes": num_classes}
            rows.append(row | {"quantity": quantity, "value": at.median, "lo": at.lo, "hi": at.hi})
    return rows


def _seconds(read: Read, orders: NDArray[np.int64]) -> float:
    """Return the processor seconds of reading batches [n, rows]."""
    started = time.process_time()
    for order in orders:
        read(order)
    return time.process_time() - started


def targets_met(rows: Sequence[Row]) -> bool:
    """Return whether the bytes of the packed codec, and the reads of both codecs, meet the targets above."""
    packed = [row for row in rows if row["part"] == "bytes" and row["name"] == "packed"]
    ratios = [row for row in rows if row["quantity"] == "ratio"]
    return all(row["value"] <= LIMITS.get(row["quantity"], float("inf")) for row in packed) and all(
        row["lo"] >= READ_TARGETS[row["topk"], row["classes"]] for row in ratios
    )


def measure_storage(given: argparse.Namespace) -> list[Row]:
    """Measure bytes and reads of both codecs, and the labels of --store."""
    check_at_least(given, records=1, repeats=MIN_BLOCKS, batch=1)
    rows: list[Row] = []
    for num_classes in DATASETS:
        for topk in (10, 100):
            count = min(DISTINCT, given.records)
            exact = zipf_labels(np.random.default_rng(0), count, topk, num_classes)
            rows += measure_dataset(exact, num_classes)
            if (topk, num_classes) in READ_TARGETS:
                rows += measure_reads(exact, num_classes, given.records, given.batch, given.repeats)
    return rows + (measure_store(given.store) if given.store else [])
