"""Data sets: where images come from, what identifies them, how they are cut and kept."""

from nas.data.dataset import Dataset, DataSpec, Split
from nas.data.layout import open_dataset
from nas.data.pixels import relabelled
from nas.data.sources import prepare

__all__ = ["DataSpec", "Dataset", "Split", "open_dataset", "prepare", "relabelled"]
