"""Image data sets held in memory: digits (ships inside scikit-learn), MNIST and CIFAR-10 from local files."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.common import SettingsError

DATASETS = ("digits", "MNIST", "CIFAR10")
_SPLIT_SEED = 0  # which image is in which split is part of the data set, not of a run


@dataclass(frozen=True)
class Split:
    """Normalised images (N, C, H, W) and class indices (N,) on one device."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, batch_size: int) -> "Batches":
        """Iterate in order; the last batch may be smaller."""
        return Batches(self, batch_size, None)

    def shuffled(self, batch_size: int, generator: torch.Generator) -> "Batches":
        """Iterate in an order drawn once from `generator`."""
        return Batches(self, batch_size, torch.randperm(len(self), generator=generator))

    @classmethod
    def concatenate(cls, splits: "Iterable[Split]") -> "Split":
        parts = list(splits)
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))

    def first(self, n: int) -> "Split":
        return Split(self.inputs[:n], self.targets[:n])

    def rotated(self, quarter_turns: int = 1) -> "Split":
        """Turn every image by 90 degrees: no pixel is interpolated, so only the content is out of distribution."""
        return Split(torch.rot90(self.inputs, quarter_turns, (-2, -1)).contiguous(), self.targets)

    def to(self, device: torch.device) -> "Split":
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Batches:
    """A re-iterable loader over a `Split`."""

    split: Split
    batch_size: int
    order: Tensor | None

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.split), self.batch_size):
            stop = start + self.batch_size
            if self.order is None:
                yield self.split.inputs[start:stop], self.split.targets[start:stop]
            else:
                index = self.order[start:stop].to(self.split.inputs.device)
                yield self.split.inputs[index], self.split.targets[index]


@dataclass(frozen=True)
class ImageData:
    """A data set with its splits; the validation images are held out of the official training images."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int

    def to(self, device: torch.device) -> "ImageData":
        splits = (split.to(device) for split in (self.train, self.validation, self.test))
        return ImageData(self.name, *splits, num_classes=self.num_classes)


def load(name: str, data_path: str | None = None, train_size: int | None = None) -> ImageData:
    """Load a data set and normalise it with the mean and standard deviation of the training images kept.

    Args:
        name: One of `DATASETS`.
        data_path: Folder with the files of MNIST or CIFAR-10; digits needs none.
        train_size: Keep only the first images of a fixed random order of the training images.

    Raises:
        SettingsError: If files are missing or damaged, or there are fewer than `train_size` images.
    """
    if name == "digits":
        parts = _digits()
    elif name in DATASETS:
        if data_path is None:
            raise SettingsError(f"--dataset {name} needs --data_path, the folder that holds its files")
        if not Path(data_path).is_dir():
            raise SettingsError(f"--data_path {data_path}: there is no such folder")
        parts = _mnist(Path(data_path)) if name == "MNIST" else _cifar10(Path(data_path))
    else:
        raise SettingsError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
    (train, train_targets), validation, test = parts
    if train_size is not None:
        if not 1 <= train_size <= len(train):
            raise SettingsError(f"--train_size must be 1 to {len(train)} for {name}; got {train_size}")
        train, train_targets = train[:train_size], train_targets[:train_size]
    train = train.float()
    mean = train.mean((0, 2, 3), keepdim=True)
    std = train.std((0, 2, 3), keepdim=True)
    splits = [
        Split((images.float() - mean) / std, targets.long())
        for images, targets in ((train, train_targets), validation, test)
    ]
    return ImageData(name, *splits, num_classes=10)


_Arrays = tuple[Tensor, Tensor]


def _shuffle(images: Tensor, targets: Tensor) -> _Arrays:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return images[order], targets[order]


def _digits() -> tuple[_Arrays, _Arrays, _Arrays]:
    """1,797 images of 8x8 pixels: 200 for training, 597 for validation, 1,000 for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SettingsError('--dataset digits needs scikit-learn: pip install -e ".[experiments]"') from None
    raw = load_digits()
    images, targets = _shuffle(torch.from_numpy(raw.images).unsqueeze(1), torch.from_numpy(raw.target))
    return (images[:200], targets[:200]), (images[200:797], targets[200:797]), (images[797:], targets[797:])


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read one idx file, gzipped or not: bytes 0-3 magic (the fourth is the number of axes), then 32-bit sizes."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            break
    else:
        raise SettingsError(f"there is no {name}.gz and no {name} in {folder}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    start = 4 + 4 * len(shape)
    found = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(len(shape)))
    if raw[:4] != bytes([0, 0, 8, len(shape)]) or found != shape or len(raw) != start + int(np.prod(shape)):
        raise SettingsError(f"{path} is not the MNIST file of shape {shape}: wrong header or length")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def _mnist(root: Path) -> tuple[_Arrays, _Arrays, _Arrays]:
    """70,000 images of 28x28 pixels; the last 5,000 training images are held out for validation."""
    folders = [root / "MNIST" / "raw", root / "raw", root]
    folder = next((f for f in folders if any(f.glob("train-images-idx3-ubyte*"))), None)
    if folder is None:
        raise SettingsError(f"--data_path {root}: no train-images-idx3-ubyte(.gz) in it, in raw/ or in MNIST/raw/")
    images = _read_idx(folder, "train-images-idx3-ubyte", (60_000, 28, 28)).unsqueeze(1)
    targets = _read_idx(folder, "train-labels-idx1-ubyte", (60_000,))
    test = _read_idx(folder, "t10k-images-idx3-ubyte", (10_000, 28, 28)).unsqueeze(1)
    test_targets = _read_idx(folder, "t10k-labels-idx1-ubyte", (10_000,))
    return _shuffle(images[:-5000], targets[:-5000]), (images[-5000:], targets[-5000:]), (test, test_targets)


def _cifar10(root: Path) -> tuple[_Arrays, _Arrays, _Arrays]:
    """60,000 images of 32x32 RGB pixels; the last 5,000 training images are held out for validation.

    The files are Python pickles: torchvision compares their md5 sums with the published ones before it opens any.
    """
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        raise SettingsError('--dataset CIFAR10 needs torchvision: pip install -e ".[experiments]"') from None
    if root.name == "cifar-10-batches-py":
        root = root.parent
    try:
        sets = [CIFAR10(root=str(root), train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError):
        raise SettingsError(f"--data_path {root}: cifar-10-batches-py is not in it, or its files are damaged") from None
    (images, targets), (test, test_targets) = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in sets
    )
    return _shuffle(images[:-5000], targets[:-5000]), (images[-5000:], targets[-5000:]), (test, test_targets)
