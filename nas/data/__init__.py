"""Data sets: where images come from, what identifies them, how they are cut and kept."""

from nas.data.cache import open_dataset, relabelled
from nas.data.dataset import Dataset, DataSpec, Split
from nas.data.prepare import prepare

__all__ = ["DataSpec", "Dataset", "Split", "open_dataset", "prepare", "relabelled"]
