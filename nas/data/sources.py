"""From the name of a data set to a prepared one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nas.core.progress import Tick, no_tick
from nas.data.dataset import Dataset, DataSpec
from nas.data.digits import digits
from nas.data.folders import folder
from nas.data.fractals import fractals
from nas.data.pixels import Source, cached
from nas.data.readers import PREFIXES, reader

_KEPT_ANYWAY = "pixels are kept all the same: only a folder's images can be decoded as one goes"


def find_source(spec: DataSpec, cache_dir: Path) -> Source:
    """Look at a data set without decoding it. Raises InputError."""
    if spec.name == "digits":
        return digits(spec)
    if spec.name == "fractals":
        return fractals(spec)
    if spec.name.partition("/")[0] in PREFIXES and not Path(spec.name).exists():
        return reader(spec, cache_dir)
    return folder(spec)


def prepare(spec: DataSpec, cache_dir: Path, tick: Tick = no_tick) -> Dataset:
    """Decode a data set into the cache, or open it if that was done before.

    `tick` counts images. Raises InputError for data that cannot be used.
    """
    source = find_source(spec, Path(cache_dir))
    dataset = cached(source, spec.random_seed, spec.max_broken, Path(cache_dir), tick)
    if not spec.pixel_cache and source.root is None:
        # Not among the stored notes: the folder is the same whatever was asked.
        dataset = replace(dataset, notes=(*dataset.notes, _KEPT_ANYWAY))
    return dataset
