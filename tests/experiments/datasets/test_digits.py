"""The digits inside scikit-learn: splits without overlap, and their own normalisation."""

import torch

from experiments.datasets import load_dataset


def test_digits_are_split_without_overlap_and_normalised() -> None:
    data = load_dataset("digits", use_test=True, validation=True)
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [200, 597, 1000]
    images = torch.cat([split.inputs.flatten(1) for split in splits])
    assert len(images.unique(dim=0)) == 1797  # scikit-learn's images are all different, so no image is in two splits
    assert data.train.shape == (1, 8, 8) and data.train.inputs.dtype == torch.float32
    assert data.train.targets.unique().tolist() == list(range(10)) == [int(name) for name in data.class_names]
    # mean and deviation are stated with four digits
    assert abs(data.train.inputs.mean().item()) < 1e-4 and abs(data.train.inputs.std().item() - 1) < 2e-4


def test_pixels_are_between_0_and_1() -> None:
    data = load_dataset("digits", mean=[0], std=[1])
    assert data.train.inputs.min() == 0 and data.train.inputs.max() == 1
    assert (data.train.inputs * 16 % 1 == 0).all()
