"""Data sets: where images come from, what identifies them, how they are cut and kept."""

from nas.data.layout import open_dataset
from nas.data.pixels import relabelled
from nas.data.sources import prepare
from nas.data.values import Dataset, DataSpec, Split

__all__ = ["DataSpec", "Dataset", "Split", "open_dataset", "prepare", "relabelled"]
