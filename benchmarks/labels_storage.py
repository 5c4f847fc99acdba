"""What stored soft labels take and how fast they are read: both codecs, and three containers.

    python -m benchmarks.labels_storage [--records N] [--repeats R] [--batch B] [--rounds P]
                                       [--store DIR] [--out CSV]

1. Bytes a record - keys (16 bytes an image, once a store) and seals (72 bytes a piece of
   65,536 records) counted - against the 4 + 4K of the official layout, and the divergence of the
   decoded from the exact label, on Zipf-like labels: top-1 ~ Beta(2, 1), the rest by Zipf's law,
   classes uniform. Storage of ImageNet-1k x 300 epochs and ImageNet-22k x 90 beside it. With
   `--store`, the same of a real teacher's labels, at K = 10 and 50 of those that it kept.
2. Random-order batches, ready for the loss, from a raw memory map, against a per-record read of
   the official layout: blocks that alternate in one process, by processor time.
3. The same packed records in a raw memory map, in Arrow and in Zarr with checksums, each read in
   P processes of its own, in turn (median and range).

Prints tables and, as its last line, JSON. Ends with 0 when the targets are met: at most 0.60 of
4 + 4K, mean divergence under 1e-3 nats and p99 under 3e-3, 13 times (K = 10) and 2 times
(K = 100) the official reads with the whole interval; else 1; 2 is bad input.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import labels_containers as containers
from nas.core.io import write_atomic
from nas.core.table import Writer
from nas.labels.codec import CODECS, Codec, make_codec
from nas.labels.shards import MAX_RECORDS, SEAL_BYTES
from nas.labels.store import open_store
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interference import conditions
from nas.measure.intervals import MIN_BLOCKS, median_interval
from space import InputError
from space.errors import refuse

Row = dict[str, Any]
Label = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]
Read = Callable[[NDArray[np.int64]], object]

COLUMNS = ("part", "labels", "name", "topk", "classes", "quantity", "value", "lo", "hi")
DATASETS = {1000: ("ImageNet-1k", 1_281_167, 300), 21841: ("ImageNet-22k", 14_197_122, 90)}
"""Classes -> data set, images, epochs of the official recipe."""
KEY_BYTES, PIECE_BYTES, PIECE_RECORDS = 16, SEAL_BYTES, MAX_RECORDS
LARGEST_SHARE, LARGEST_KL, LARGEST_P99 = 0.60, 1e-3, 3e-3
READ_TARGETS = {(10, 1000): 13.0, (100, 21841): 2.0}
STORE_TOPK = (10, 50)
READ_SECONDS = 0.3
"""Processor seconds for which a process reads a container."""
DISTINCT = 4000
"""Labels drawn; a longer table repeats them, since records are of fixed size."""


def zipf_labels(rng: np.random.Generator, n: int, topk: int, num_classes: int) -> Label:
    """Draw labels: top-1 ~ Beta(2, 1), the rest by Zipf's law (power 1), classes uniform."""
    top, ranks = rng.beta(2, 1, size=n), 1 / np.arange(1, num_classes)
    ranks /= ranks.sum()
    prob = np.concatenate([top[:, None], (1 - top)[:, None] * ranks[: topk - 1]], axis=1)
    tail = (1 - top) * ranks[topk - 1 :].sum()
    classes = np.arange(num_classes)
    index = np.stack([rng.permutation(classes)[:topk] for _ in range(n)])
    return index, -np.sort(-prob, axis=1).astype(np.float32), tail.astype(np.float32)


def divergences(exact: Label, decoded: Label) -> NDArray[np.float64]:
    """Measure KL(exact || decoded) in nats [n], the tail of both spread over the same classes."""
    ours, theirs = (np.argsort(label[0], axis=1) for label in (exact, decoded))
    parts = [
        np.column_stack([np.take_along_axis(label[1], order, 1), label[2]]).astype(np.float64)
        for label, order in ((exact, ours), (decoded, theirs))
    ]
    p, q = (part / part.sum(axis=1, keepdims=True) for part in parts)
    ratio = np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, q, 1))
    return np.asarray((p * ratio).sum(axis=1))


def official_bytes(topk: int) -> int:
    """Count the bytes of an official record: int32 seed, K int16 classes, K float16 values."""
    return 4 + 4 * topk


def measure_bytes(
    index: NDArray[Any],
    prob: NDArray[np.float32],
    tail: NDArray[np.float32],
    num_classes: int,
    *,
    labels: str = "zipf",
    epochs: int = 1,
) -> list[Row]:
    """Measure what labels take in a store of `epochs`, and what decoding loses; see COLUMNS.

    int [n, K], float32 [n, K] and [n] as `nas.labels.store` keeps them; `labels` says what they
    are. Rows of both codecs: bytes_a_record (with keys and checksums), share (of 4 + 4K), kl_mean
    and kl_p99 in nats.
    """
    topk, rows = index.shape[1], []
    for name in CODECS:
        codec = make_codec(name, topk, num_classes)
        lost = divergences((index, prob, tail), codec.decode(codec.encode(index, prob, tail)))
        size = codec.record_bytes + PIECE_BYTES / PIECE_RECORDS + KEY_BYTES / epochs
        found = {
            "bytes_a_record": size,
            "share": size / official_bytes(topk),
            "kl_mean": max(0.0, float(lost.mean())),
            "kl_p99": max(0.0, float(np.quantile(lost, 0.99))),
        }
        rows += [
            _row("bytes", name, topk, num_classes, q, v, labels=labels) for q, v in found.items()
        ]
    return rows


def _row(
    part: str,
    name: str,
    topk: int,
    classes: int,
    quantity: str,
    value: float,
    ends: tuple[float, float] | tuple[None, None] = (None, None),
    labels: str = "zipf",
) -> Row:
    found = (part, labels, name, topk, classes, quantity, value, *ends)
    return dict(zip(COLUMNS, found, strict=True))


def measure_storage(topk: int, num_classes: int, exact: Label) -> list[Row]:
    """Measure labels at the size of a published data set: bytes a record, and GiB of them all."""
    _, images, epochs = DATASETS[num_classes]
    rows = measure_bytes(*exact, num_classes, epochs=epochs)
    sizes = {r["name"]: r["value"] for r in rows if r["quantity"] == "bytes_a_record"}
    for name, size in {**sizes, "official": official_bytes(topk)}.items():
        total = size * images * epochs / 2**30
        rows.append(_row("bytes", name, topk, num_classes, "gib", total))
    return rows


def measure_store(folder: Path) -> list[Row]:
    """Measure a real teacher's labels, all epochs of a store, at smaller K. Raises InputError."""
    store = open_store(folder)
    parts = [store.epoch(epoch)[np.arange(len(store.keys))] for epoch in range(store.epochs)]
    rows = []
    for topk in STORE_TOPK:
        if topk <= store.spec.topk:
            kept = [part.best(topk) for part in parts]
            index, prob, tail = (
                np.concatenate([getattr(one, name) for one in kept])
                for name in ("index", "prob", "tail")
            )
            rows += measure_bytes(
                index,
                prob,
                tail,
                store.spec.num_classes,
                labels=store.spec.teacher_id.split("@")[0],
                epochs=store.epochs,
            )
    return rows


def codec_reader(folder: Path, codec: Codec, exact: Label, records: int) -> Read:
    """Write a table of records and map it: rows int64 [n] -> arrays ready for the loss."""
    table = codec.encode(*exact)[np.arange(records) % len(exact[0])]
    path = folder / f"{codec.name}.bin"
    write_atomic(path, table.tobytes())
    mapped = np.memmap(path, dtype=np.uint8, mode="r", shape=table.shape)
    return lambda rows: codec.decode(np.take(mapped, rows, axis=0))


def measure_reads(
    topk: int, num_classes: int, exact: Label, records: int, batch: int, repeats: int
) -> list[Row]:
    """Time random-order reads, block by block in turn; records/s and ratios to the official."""
    rng = np.random.default_rng(1)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        readers: dict[str, Read] = {
            "official": containers.official_reader(Path(folder), *exact[:2], records)
        }
        for name in CODECS:
            codec = make_codec(name, topk, num_classes)
            readers[name] = codec_reader(Path(folder), codec, exact, records)
        batches = {name: _batches(read, rng, records, batch) for name, read in readers.items()}
        for turn in range(repeats):
            names = list(readers) if turn % 2 == 0 else list(readers)[::-1]
            for name in names:
                orders = rng.integers(records, size=(batches[name], batch))
                started = time.process_time()
                for order in orders:
                    readers[name](order)
                took = max(time.process_time() - started, 1e-9)
                rates.setdefault(name, []).append(orders.size / took)
    rows = []
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["official"], strict=True)]
        for quantity, values in (("records_per_s", found), ("ratio", ratios)):
            at = median_interval(values)
            ends = (at.lo, at.hi)
            rows.append(_row("reads", name, topk, num_classes, quantity, at.median, ends))
    return [row for row in rows if (row["name"], row["quantity"]) != ("official", "ratio")]


def _batches(read: Read, rng: np.random.Generator, records: int, batch: int) -> int:
    """Warm a reader up and find how many batches take 0.03 processor seconds."""
    took = []
    for _ in range(3):
        started = time.process_time()
        read(rng.integers(records, size=batch))
        took.append(time.process_time() - started)
    return max(1, min(1000, round(0.03 / max(min(took), 1e-6))))


def measure_containers(
    topk: int, num_classes: int, exact: Label, records: int, batch: int, rounds: int
) -> list[Row]:
    """Write one table of packed records in every container and read each in its own processes."""
    codec = make_codec("packed", topk, num_classes)
    table = codec.encode(*exact)[np.arange(records) % len(exact[0])]
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kinds = [kind for kind in containers.NEEDS if containers.is_installed(kind)]
        for kind in kinds:
            found[kind, "bytes"] = [containers.write(kind, Path(folder) / kind, table)]
        for turn in range(rounds):
            for kind in kinds if turn % 2 == 0 else kinds[::-1]:
                given = (kind, Path(folder) / kind, topk, num_classes, batch, READ_SECONDS)
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.labels_containers", *map(str, given)],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                for quantity, value in json.loads(done.stdout.splitlines()[-1]).items():
                    found.setdefault((kind, quantity), []).append(value)
    rows = []
    for (kind, quantity), values in found.items():
        middle, ends = statistics.median(values), (min(values), max(values))
        rows.append(_row("containers", kind, topk, num_classes, quantity, middle, ends))
    return rows


def targets_met(rows: Sequence[Row]) -> bool:
    """Judge the rows of the packed codec, and of both codecs' reads, by the targets above."""
    limits = {"share": LARGEST_SHARE, "kl_mean": LARGEST_KL, "kl_p99": LARGEST_P99}
    packed = [row for row in rows if row["part"] == "bytes" and row["name"] == "packed"]
    ratios = [row for row in rows if row["quantity"] == "ratio"]
    return all(row["value"] <= limits.get(row["quantity"], float("inf")) for row in packed) and all(
        row["lo"] >= READ_TARGETS[row["topk"], row["classes"]] for row in ratios
    )


def table_of(rows: Sequence[Row]) -> list[str]:
    """Lay the rows out for people: a line for each thing measured, with all its quantities."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        value = f"{row['quantity']} {_shown(row['value'])}"
        if row["lo"] is not None and row["lo"] != row["hi"]:
            value += f" [{_shown(row['lo'])}, {_shown(row['hi'])}]"
        head = (row["part"], row["labels"], f"{row['topk']}/{row['classes']}", row["name"])
        lines.setdefault(head, []).append(value)
    return [f"{a:10} {b:6} {c:10} {d:10} " + ", ".join(v) for (a, b, c, d), v in lines.items()]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_csv(path: Path, rows: Sequence[Row], fingerprint: str) -> None:
    """Write the rows atomically. Raises InputError."""
    text = io.StringIO()
    writer = Writer(text, (*COLUMNS, "fingerprint"))
    writer.writeheader()
    writer.writerows({**row, "fingerprint": fingerprint} for row in rows)
    try:
        write_atomic(path, text.getvalue().encode())
    except OSError as e:
        raise refuse("--out", path, "a file that can be written", e.strerror or "") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; the exit status is told above."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.labels_storage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", type=int, default=262_144, help="records of a table to read")
    parser.add_argument("--repeats", type=int, default=24, help="blocks for each reader")
    parser.add_argument("--batch", type=int, default=4096, help="records of a batch")
    parser.add_argument("--rounds", type=int, default=6, help="processes for each container")
    parser.add_argument("--store", type=Path, help="also measure the labels of this store")
    parser.add_argument("--out", type=Path, help="also write the rows to this CSV file")
    args = parser.parse_args(argv)
    try:
        for name, least in (("records", 1), ("repeats", MIN_BLOCKS), ("batch", 1), ("rounds", 1)):
            if getattr(args, name) < least:
                raise refuse(f"--{name}", getattr(args, name), f"an integer >= {least}")
        where, now, rows = take_fingerprint("cpu", threads=1), conditions(), list[Row]()
        for num_classes in DATASETS:
            for topk in (10, 100):
                count = min(DISTINCT, args.records)
                exact = zipf_labels(np.random.default_rng(0), count, topk, num_classes)
                rows += measure_storage(topk, num_classes, exact)
                if (topk, num_classes) in READ_TARGETS:
                    size = (topk, num_classes, exact, args.records, args.batch)
                    rows += measure_reads(*size, args.repeats)
                    rows += measure_containers(*size, args.rounds)
        if args.store:
            rows += measure_store(args.store)
        if args.out:
            write_csv(args.out, rows, where.id)
    except InputError as e:
        print(e, file=sys.stderr)
        return 2
    print(where.describe())
    print("\n".join(table_of(rows)))
    for kind, needed in containers.NEEDS.items():
        if not containers.is_installed(kind):
            print(f"containers {kind}: not installed: pip install {needed}")
    said = {"fingerprint": where.to_dict(), "conditions": asdict(now), "rows": rows}
    print(json.dumps(said))
    return 0 if targets_met(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
