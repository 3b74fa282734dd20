"""Image data sets: their files, their splits, and batches of them on a device."""

from experiments.datasets.loading import DATASETS, Datasets, load_dataset
from experiments.datasets.splits import Batches, LabelledImages, Split

__all__ = ["DATASETS", "Batches", "Datasets", "LabelledImages", "Split", "load_dataset"]
