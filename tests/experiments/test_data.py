"""Splits, file readers and their errors."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.common import SettingsError
from experiments.data import Split, _read_idx, load


def write_idx(path: Path, array: np.ndarray, magic: int = 8) -> None:
    header = bytes([0, 0, magic, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_digits_are_split_without_overlap_and_normalised() -> None:
    data = load("digits")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [200, 597, 1000]
    images = torch.cat([split.inputs.flatten(1) for split in (data.train, data.validation, data.test)])
    assert len(images.unique(dim=0)) == 1797  # scikit-learn's images are all different, so no image is in two splits
    assert data.train.inputs.shape == (200, 1, 8, 8) and data.train.inputs.dtype == torch.float32
    assert abs(data.train.inputs.mean().item()) < 1e-5 and abs(data.train.inputs.std().item() - 1) < 1e-5
    assert data.train.targets.unique().tolist() == list(range(10))


def test_a_smaller_training_set_leaves_the_other_splits_alone() -> None:
    small, whole = load("digits", train_size=100), load("digits")
    assert len(small.train) == 100 and torch.equal(small.train.targets, whole.train.targets[:100])
    assert torch.equal(small.test.targets, whole.test.targets)
    with pytest.raises(SettingsError, match="--train_size must be 1 to 200 for digits; got 201"):
        load("digits", train_size=201)


def test_batches_visit_every_image_once() -> None:
    split = Split(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    ordered = [targets.tolist() for _, targets in split.batches(4)]
    assert ordered == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    loader = split.shuffled(4, torch.Generator().manual_seed(0))
    first = [(inputs.flatten().tolist(), targets.tolist()) for inputs, targets in loader]
    assert first == [(inputs.flatten().tolist(), targets.tolist()) for inputs, targets in loader]  # re-iterable
    seen = [target for _, targets in first for target in targets]
    assert len(loader) == len(first) == 3 and sorted(seen) == list(range(10)) and seen != list(range(10))
    assert all(inputs == targets for inputs, targets in first)


def test_rotation_is_a_quarter_turn_anticlockwise() -> None:
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    split = Split(image, torch.tensor([7]))
    assert split.rotated().inputs.flatten().tolist() == [2.0, 4.0, 1.0, 3.0]
    assert torch.equal(split.rotated(4).inputs, image) and split.rotated().targets.tolist() == [7]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_gzipped_or_not(tmp_path: Path, suffix: str) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / f"images{suffix}", array)
    assert torch.equal(_read_idx(tmp_path, "images", (2, 3, 4)), torch.from_numpy(array))


def test_damaged_idx_files_are_refused(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    with pytest.raises(SettingsError, match="there is no images.gz and no images in"):
        _read_idx(tmp_path, "images", (2, 3, 4))
    write_idx(tmp_path / "images", array)
    with pytest.raises(SettingsError, match=r"is not the MNIST file of shape \(2, 3, 5\)"):
        _read_idx(tmp_path, "images", (2, 3, 5))
    write_idx(tmp_path / "images", array, magic=9)
    with pytest.raises(SettingsError, match="wrong header or length"):
        _read_idx(tmp_path, "images", (2, 3, 4))
    write_idx(tmp_path / "images.gz", array)
    (tmp_path / "images.gz").write_bytes((tmp_path / "images.gz").read_bytes()[:-9])
    with pytest.raises(SettingsError, match="cannot read .*images.gz"):
        _read_idx(tmp_path, "images", (2, 3, 4))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown data set 'mnist'; known are digits, MNIST, CIFAR10"):
        load("mnist")
    with pytest.raises(SettingsError, match="--dataset MNIST needs --data_path"):
        load("MNIST")
    with pytest.raises(SettingsError, match="there is no such folder"):
        load("CIFAR10", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="no train-images-idx3-ubyte"):
        load("MNIST", str(tmp_path))
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a batch")
    with pytest.raises(SettingsError, match="cifar-10-batches-py is not in it, or its files are damaged"):
        load("CIFAR10", str(tmp_path))
