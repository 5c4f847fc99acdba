"""From the name of a data set to a prepared one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nas.core.class_names import check_class_names
from nas.core.progress import Console, Tick, no_tick
from nas.data.cache import cached
from nas.data.dataset import Dataset, DataSpec
from nas.data.folders import folder
from nas.data.fractals import fractals
from nas.data.sources import PREFIXES, DataSource, digits, reader
from space.errors import refuse

_KEPT_ANYWAY = "pixels are kept all the same: only a folder's images can be decoded as one goes"

Check = Callable[[DataSource], object]
"""Matches what a data set is found to be with other files. Raises InputError."""


def find_source(spec: DataSpec, cache_dir: Path) -> DataSource:
    """Inspect a data set without decoding it. Raises InputError."""
    if spec.data == "digits":
        return digits(spec)
    if spec.data == "fractals":
        return fractals(spec)
    if spec.data.partition("/")[0] in PREFIXES and not Path(spec.data).exists():
        source = reader(spec, cache_dir)
    else:
        source = folder(spec)
    check_class_names(source.classes, spec.data)
    return source


def prepare(spec: DataSpec, cache_dir: Path, tick: Tick = no_tick, check: Check | None = None) -> Dataset:
    """Decode a data set into the cache, or open it if that was done before.

    `tick` counts images; `check` is called before any is decoded. Raises InputError for data that cannot be used.
    """
    source = find_source(replace(spec, grey_bits=None), Path(cache_dir))
    if check is not None:
        check(source)
    dataset = cached(source, spec.random_seed, spec.max_corrupt, Path(cache_dir), tick)
    if spec.grey_bits is not None and dataset.grey_bits not in (None, spec.grey_bits):
        source = find_source(spec, Path(cache_dir))
        dataset = cached(source, spec.random_seed, spec.max_corrupt, Path(cache_dir), tick)
    if not spec.pixel_cache and source.root is None:
        # Not among the stored notes: the folder does not depend on it.
        dataset = replace(dataset, notes=(*dataset.notes, _KEPT_ANYWAY))
    images = spec.images_for(dataset.num_classes)
    if images != spec.max_images:
        grown = f"up to {images:,} images instead of {spec.max_images:,}: {dataset.num_classes:,} classes, four of each"
        dataset = replace(dataset, notes=(*dataset.notes, grown))
    return dataset


def prepared(spec: DataSpec, cache: Path, console: Console, check: Check | None = None) -> Dataset:
    """Prepare a data set under a progress bar, and print its notes and sizes; `check` as in `prepare`."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse("--cache-dir", cache, "a folder to write in", str(error)) from None
    console.count("reading images")
    try:
        dataset = prepare(spec, cache, console.advance, check)
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
