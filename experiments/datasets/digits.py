"""The handwritten digits that ship inside scikit-learn: 1,797 grey images of 8x8 pixels."""

from pathlib import Path

import torch

from experiments.common import SettingsError
from experiments.datasets.sources import InMemory, Source

TEST = 1000
_SPLIT_SEED = 0  # which image is in which split is part of the data set, not of a run


def read_digits(_: Path, train: bool) -> InMemory:
    """Return 797 images for training or 1,000 for testing; scikit-learn itself has no such split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SettingsError('--dataset digits needs scikit-learn: pip install -e ".[experiments]"') from None
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    chosen = order[:-TEST] if train else order[-TEST:]
    images = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    names = tuple(str(name) for name in raw.target_names)
    return InMemory(images[chosen], torch.from_numpy(raw.target).long()[chosen], names)


# Mean and standard deviation of the 200 images that are for training where 597 of the 797 are held out.
DIGITS = Source(read_digits, mean=(0.3057,), std=(0.3765,), validation=597)
