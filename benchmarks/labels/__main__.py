"""Measure soft labels: bytes of storage, speed of reads, and what an epoch from them costs.

    python -m benchmarks.labels storage [--store DIR] [--records N] [--repeats R] [--batch B]
    python -m benchmarks.labels epoch [--students 5M] [--img-size 48] [--threads N] [--blocks N]

`storage`, on Zipf-like labels (top-1 ~ Beta(2, 1), the rest by Zipf's law, classes uniform) and on those of --store:
bytes a record, with keys (16 bytes an image, once a store) and checksums (72 bytes a shard of 65,536 records), against
the 4 + 4K of the official layout; the divergence of the decoded from the exact label; random-order batches ready for
the loss against per-record reads of the official layout, in alternating blocks by processor time. Exit status 0 when
the targets are met (at most 0.60 of 4 + 4K, mean divergence under 1e-3 nats and p99 under 3e-3, 13 times (K = 10) and 2
times (K = 100) the official reads with the whole interval), else 1.

`epoch`: images/s, seconds an epoch and peak memory of training without distillation, with a teacher in the loop, and
with stored labels, image by image and by the batched engine; and of the same steps on tensors that are there already.
All alternate block by block in one process. Data: the formula-driven images, 100 classes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimates import check_at_least, run_command, write_table
from benchmarks.labels.epoch import measure_epochs
from benchmarks.labels.storage import measure_storage, targets_met
from nas.core.cli import Parser
from nas.measure.fingerprint import take_fingerprint


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser("python -m benchmarks.labels", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    add = parts.add_parser("storage").add_argument
    add("--records", type=int, default=262_144, help="records of a table to read")
    add("--repeats", type=int, default=24, help="blocks for each reader")
    add("--batch", type=int, default=4096, help="records of a batch")
    add("--store", type=Path, help="also measure the labels of this store")
    add("--out", type=Path, help="also write the rows to this CSV file")
    add = parts.add_parser("epoch").add_argument
    add("--students", nargs="+", default=["small", "5M"], metavar="ARCH")
    add("--teacher", default="21M", metavar="ARCH", help="of fresh weights, to be timed alone")
    add("--img-size", type=int, default=48, metavar="PX")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    add("--blocks", type=int, default=12, metavar="N")
    add("--device", default="cpu")
    add("--cache-dir", type=Path, help="default: a folder that is removed again")
    add("--out", type=Path, help="also write the table to this CSV file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a part, print and write; the last line is JSON. Exit status: see above; 2 on bad input."""

    def work(given: argparse.Namespace) -> dict[str, Any]:
        conditions: dict[str, Any] = {}
        if given.part == "storage":
            where, rows = take_fingerprint("cpu", threads=1), measure_storage(given)
            given.status = 0 if targets_met(rows) else 1
        else:
            check_at_least(given, blocks=6)
            with tempfile.TemporaryDirectory() as folder:
                rows = measure_epochs(given, given.cache_dir or Path(folder))
            where = take_fingerprint(given.device, given.threads)
            conditions = {name: getattr(given, name) for name in ("img_size", "threads", "device")}
        conditions["fingerprint"] = where.id
        if given.out:
            write_table(given.out, rows, **conditions)
        for row in rows:
            print("  ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values() if v is not None))
        return {"rows": rows, **conditions}

    return run_command(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
