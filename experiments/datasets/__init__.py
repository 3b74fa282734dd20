"""Image data sets: their files, their splits, and batches of them on a device."""

from experiments.datasets.foreign import NOISE, foreign_images, label_map
from experiments.datasets.loading import DATASETS, Datasets, load_dataset
from experiments.datasets.splits import Batches, LabelledImages, Split

__all__ = [
    "DATASETS",
    "NOISE",
    "Batches",
    "Datasets",
    "LabelledImages",
    "Split",
    "foreign_images",
    "label_map",
    "load_dataset",
]
