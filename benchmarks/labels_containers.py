"""Containers for label records, and the official layout, written and opened.

    python -m benchmarks.labels_containers KIND FOLDER TOPK CLASSES BATCH SECONDS

reads random batches of a container, decoded, and prints one JSON line: seconds to open,
records/s, and what the process grew by, in bytes: `grown_bytes` of its own and `mapped_bytes` of
pages shared with the system's cache. `benchmarks.labels_storage` calls it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.core.io import write_atomic
from nas.labels.packed_codec import PackedCodec

Records = NDArray[np.uint8]
Label = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]
Fetch = Callable[[NDArray[np.int64]], Records]
NEEDS = {"memory map": "", "arrow": "pyarrow", "zarr": "zarr"}
"""Kind -> the package that it needs ("" for numpy alone)."""
CHUNK = 4096
"""Records of a Zarr chunk: the unit of its checksum, and of every read."""


def is_installed(kind: str) -> bool:
    """Tell whether the package of a kind can be imported."""
    try:
        import_module(NEEDS[kind] or "numpy")
    except ImportError:
        return False
    return True


def write(kind: str, folder: Path, records: Records) -> int:
    """Write records uint8 [n, R] into an empty folder; returns the bytes of all its files."""
    folder.mkdir(parents=True)
    if kind == "memory map":
        write_atomic(folder / "records.bin", records.tobytes())
    elif kind == "arrow":
        arrow = import_module("pyarrow")
        column = arrow.FixedSizeBinaryArray.from_buffers(
            arrow.binary(records.shape[1]), len(records), [None, arrow.py_buffer(records)]
        )
        table = arrow.table({"records": column})
        with arrow.ipc.new_file(str(folder / "records.arrow"), table.schema) as file:
            file.write_table(table)  # one batch: its column is one stretch of memory
    else:
        zarr = import_module("zarr")
        array = zarr.create_array(
            store=str(folder / "records.zarr"),
            shape=records.shape,
            chunks=(min(CHUNK, len(records)), records.shape[1]),
            dtype="uint8",
            compressors=[import_module("zarr.codecs").Crc32cCodec()],
            zarr_format=3,
        )
        array[:] = records
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def open_reader(kind: str, folder: Path, record_bytes: int) -> tuple[int, Fetch]:
    """Open what `write` wrote: the number of records, and rows int64 [n] -> uint8 [n, R]."""
    if kind == "zarr":
        array = import_module("zarr").open_array(str(folder / "records.zarr"), mode="r")

        def fetch(rows: NDArray[np.int64]) -> Records:
            return np.asarray(array.oindex[rows], dtype=np.uint8)

        return int(array.shape[0]), fetch
    if kind == "arrow":
        arrow = import_module("pyarrow")
        file = arrow.ipc.open_file(arrow.memory_map(str(folder / "records.arrow")))
        column = file.get_batch(0).column(0)
        flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)
        records = flat[: len(column) * record_bytes].reshape(-1, record_bytes)
    else:
        flat = np.memmap(folder / "records.bin", dtype=np.uint8, mode="r")
        records = np.asarray(flat).reshape(-1, record_bytes)
    return len(records), lambda rows: np.take(records, rows, axis=0)


def official_reader(
    folder: Path, index: NDArray[np.int64], prob: NDArray[np.float32], records: int, ranks: int = 8
) -> Callable[[NDArray[np.int64]], Label]:
    """Write the official layout and open it: one values file a rank, one record at a time.

    A record is int32 seed, K int16 classes, K float16 values; a dict leads from key to file and
    offset, as the official manager keeps it. The reader turns rows int64 [n] into arrays ready for
    the loss. Facts: microsoft/Cream, TinyViT/data/augmentation (manager.py, dataset_wrapper.py).
    """
    topk = index.shape[1]
    kind = np.dtype([("seed", "<i4"), ("index", "<i2", (topk,)), ("prob", "<f2", (topk,))])
    rows = np.arange(records) % len(index)
    table = np.zeros(records, dtype=kind)
    table["seed"], table["index"], table["prob"] = np.arange(records), index[rows], prob[rows]
    where: dict[str, tuple[int, int]] = {}
    files = []
    for rank in range(ranks):
        path = folder / f"rank{rank}-values.bin"
        path.write_bytes(table[rank::ranks].tobytes())
        files.append(path.open("rb"))
        for place, row in enumerate(range(rank, records, ranks)):
            where[str(row)] = rank, place * kind.itemsize
    keys = [str(row) for row in range(records)]
    size = kind.itemsize

    def read(batch: NDArray[np.int64]) -> Label:
        classes, values = [], []
        for row in batch.tolist():
            rank, offset = where[keys[row]]
            file = files[rank]
            file.seek(offset)
            data = file.read(size)
            int(np.frombuffer(data, np.int32, count=1)[0])  # the seed of the augmentation
            classes.append(np.frombuffer(data, np.int16, count=topk, offset=4))
            values.append(np.frombuffer(data, np.float16, count=topk, offset=4 + 2 * topk))
        # Faster than np.stack, to the reference's good.
        ready = np.concatenate(values).reshape(-1, topk).astype(np.float32)
        ids = np.concatenate(classes).reshape(-1, topk).astype(np.int64)
        return ids, ready, 1 - ready.sum(axis=1)

    return read


def _resident() -> tuple[int, int]:
    """Own (anonymous) and mapped bytes of this process that are in memory; zeros where unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    own, mapped = (int(sizes[name][0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def main(argv: Sequence[str] | None = None) -> int:
    """Open, read and print, as the module says."""
    kind, folder, topk, classes, batch, seconds = sys.argv[1:] if argv is None else argv
    codec = PackedCodec(int(topk), int(classes))
    if NEEDS[kind]:
        import_module(NEEDS[kind])
    codec.decode(codec.encode(*_any_label(int(topk))))  # makes the tables of the codec
    # A process that has freed something large, as every trainer has, keeps memory for the next
    # array instead of giving it back: GNU's malloc adapts, and reading is up to twice as fast.
    np.ones(24 << 20, dtype=np.uint8)
    before = _resident()
    started = time.perf_counter()
    records, fetch = open_reader(kind, Path(folder), codec.record_bytes)
    opened = time.perf_counter() - started
    rng = np.random.default_rng(0)
    spent, read = 0.0, 0
    for turn in range(1_000_000):
        rows = rng.integers(records, size=int(batch))
        started = time.process_time()
        codec.decode(fetch(rows))
        if turn:  # the first one warms up
            spent, read = spent + time.process_time() - started, read + len(rows)
        if spent > float(seconds):
            break
    grown = [now - then for now, then in zip(_resident(), before, strict=True)]
    rate = read / max(spent, 1e-9)
    names = ("open_s", "records_per_s", "grown_bytes", "mapped_bytes")
    print(json.dumps(dict(zip(names, (opened, rate, *grown), strict=True))))
    return 0


def _any_label(topk: int) -> Label:
    prob = np.full((1, topk), 1 / (topk + 1), dtype=np.float32)
    return np.arange(topk)[None], prob, prob[:, 0]


if __name__ == "__main__":
    raise SystemExit(main())
