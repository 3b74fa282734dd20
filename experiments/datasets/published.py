"""CIFAR-10, CIFAR-100, SVHN and STL10, read by torchvision's own classes from the files that their authors publish.

torchvision compares each file's md5 sum with the published one before it opens it, which matters for CIFAR: its files
are pickles. Nothing here turns that check off, and nothing is downloaded or written.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.common import SettingsError
from experiments.datasets.sources import InMemory, Source, how_to_fetch, import_torchvision


def _open(name: str, root: Path, files: Iterable[tuple[str, str]], make: Callable[[], Any]) -> Any:
    """Make a data set of torchvision's, or say which of its files (path, md5) is missing or damaged."""
    try:
        return make()
    except ImportError as error:  # SVHN's files are MATLAB's
        package = (error.name or "scipy").partition(".")[0]
        raise SettingsError(f"--dataset {name} needs {package}: pip install {package}") from None
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        from torchvision.datasets.utils import check_integrity

        for file, md5 in files:
            path = root / file
            if not path.is_file():
                raise SettingsError(f"--data_path {root}: there is no {file} in it; {how_to_fetch(name)}") from None
            if not check_integrity(str(path), md5):
                raise SettingsError(f"{path} is damaged: its md5 sum is not the published one") from None
        raise SettingsError(f"--data_path {root}: cannot read {name}: {error}") from None


def _pool(images: np.ndarray, targets: Any, names: Iterable[str]) -> InMemory:
    labels = torch.as_tensor(np.asarray(targets)).long()
    return InMemory(torch.from_numpy(np.ascontiguousarray(images)), labels, tuple(names))


def _root(root: Path, folder: str) -> Path:
    """Let --data_path be the folder of the files itself, too."""
    return root.parent if root.name == folder else root


def read_cifar(root: Path, train: bool, *, name: str) -> InMemory:
    """32x32 RGB images in pickled batches: 50,000 for training, 10,000 for testing."""
    import_torchvision(name)
    from torchvision import datasets

    published = getattr(datasets, name)
    root = _root(root, published.base_folder)
    listed = [*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])]
    files = [(f"{published.base_folder}/{file}", md5) for file, md5 in listed]
    data = _open(name, root, files, lambda: published(root=str(root), train=train, download=False))
    return _pool(data.data.transpose(0, 3, 1, 2), data.targets, data.classes)


def read_svhn(root: Path, train: bool) -> InMemory:
    """32x32 RGB house numbers in MATLAB files: 73,257 for training, 26,032 for testing; class 10 there is digit 0."""
    import_torchvision("SVHN")
    from torchvision.datasets import SVHN

    split = "train" if train else "test"
    _, file, md5 = SVHN.split_list[split]
    data = _open("SVHN", root, [(file, md5)], lambda: SVHN(root=str(root), split=split, download=False))
    return _pool(data.data, data.labels, map(str, range(10)))


def read_stl10(root: Path, train: bool) -> InMemory:
    """96x96 RGB images in binary files: 5,000 labelled ones for training, 8,000 for testing."""
    import_torchvision("STL10")
    from torchvision.datasets import STL10

    class Labelled(STL10):
        """Without the 100,000 unlabelled images [2.6 GB], which torchvision insists on and which are not used here."""

        train_list = STL10.train_list[:2]

    root = _root(root, STL10.base_folder)
    files = [(f"{STL10.base_folder}/{file}", md5) for file, md5 in (*Labelled.train_list, *Labelled.test_list)]
    split = "train" if train else "test"
    data = _open("STL10", root, files, lambda: Labelled(root=str(root), split=split, download=False))
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    return _pool(data.data, data.labels, names)


# Mean and standard deviation over all pixels of the official training images.
CIFAR10 = Source(
    partial(read_cifar, name="CIFAR10"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    fetch=how_to_fetch("CIFAR10"),
    class_splits=((0, 1, 2, 8, 9), (3, 4, 5, 6, 7)),
)
CIFAR100 = Source(
    partial(read_cifar, name="CIFAR100"),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    fetch=how_to_fetch("CIFAR100"),
)
SVHN = Source(read_svhn, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970), fetch=how_to_fetch("SVHN"))
STL10 = Source(
    read_stl10,
    mean=(0.4467, 0.4398, 0.4066),
    std=(0.2603, 0.2566, 0.2713),
    fetch=how_to_fetch("STL10"),
    image_size=32,
)
