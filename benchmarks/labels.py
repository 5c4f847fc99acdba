"""Soft labels, measured: what they take, what they cost, what they teach.

    python -m benchmarks.labels storage|epoch|students [options of that part; --help]
    python -m benchmarks.labels all        all three into results/ (hours on two cores)

`storage` is `benchmarks.labels_storage`, and so on. Ends with the part's exit status.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import labels_epoch, labels_storage, labels_students

PARTS: dict[str, Callable[[Sequence[str] | None], int]] = {
    "storage": labels_storage.main,
    "epoch": labels_epoch.main,
    "students": labels_students.main,
}


def everything(results: Path) -> int:
    """Run all parts into `results`; the storage part also looks at the students' teacher."""
    with tempfile.TemporaryDirectory() as cache:
        status = labels_students.main(
            [
                "--cache-dir",
                cache,
                "--out",
                str(results / "labels_students.csv"),
                "--figure",
                str(results / "labels_topk.png"),
            ]
        )
        stores = [path.parent for path in Path(cache).glob("labels/*/manifest.json")]
        # The 99 classes of the images' teacher, not the digits' nine.
        large = max(stores, key=lambda store: (store / "keys.bin").stat().st_size)
        status = status or labels_storage.main(
            ["--store", str(large), "--out", str(results / "labels_storage.csv")]
        )
    return status or labels_epoch.main(["--out", str(results / "labels_epoch.csv")])


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to a part; 2 for a part that does not exist."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["all"] and len(arguments) == 1:
        return everything(Path("results"))
    if not arguments or arguments[0] not in PARTS:
        got = arguments[0] if arguments else "nothing"
        wanted = ", ".join((*PARTS, "all"))
        print(f"error: part: got {got}, want one of {wanted}", file=sys.stderr)
        return 2
    return PARTS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    raise SystemExit(main())
