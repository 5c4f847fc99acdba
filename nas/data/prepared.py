"""Preparing a data set under a progress bar."""

from __future__ import annotations

from pathlib import Path

from nas.core.progress import Console
from nas.data import Dataset, DataSpec, prepare
from space.errors import refuse


def prepared(spec: DataSpec, cache: Path, console: Console) -> Dataset:
    """Prepare a data set under a bar, and say what it is."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse("--cache-dir", cache, "a folder to write in", str(error)) from None
    console.count("reading images")
    try:
        dataset = prepare(spec, cache, console.advance)
    finally:
        console.stop()
    for note in dataset.notes:
        console.line(f"data: {note}")
    console.line(
        f"data: {dataset.name}, {len(dataset.classes) or 'no'} classes at {dataset.img_size} px: "
        f"{len(dataset.train.labels)} to train, {len(dataset.holdout.labels)} holdout, "
        f"{len(dataset.test.labels)} test"
    )
    return dataset
