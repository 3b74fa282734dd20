"""One function that loads any of the data sets, splits it and puts it where the network is."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.common import SettingsError
from experiments.datasets.digits import DIGITS
from experiments.datasets.idx import FASHION_MNIST, MNIST
from experiments.datasets.image_folder import IMAGE_FOLDER
from experiments.datasets.labels import keep_classes, read_labels
from experiments.datasets.published import CIFAR10, CIFAR100, STL10, SVHN
from experiments.datasets.sources import Pool, Preparation, Source
from experiments.datasets.splits import LabelledImages
from lowrank_bdl.models.registry import closest_first

DATASETS: Mapping[str, Source] = {
    "CIFAR10": CIFAR10,
    "CIFAR100": CIFAR100,
    "SVHN": SVHN,
    "STL10": STL10,
    "MNIST": MNIST,
    "FashionMNIST": FASHION_MNIST,
    "digits": DIGITS,
    "ImageFolder": IMAGE_FOLDER,
}
_SHUFFLE_SEED = 0  # which image is in which split is part of the data set, not of a run


@dataclass(frozen=True)
class Datasets:
    """A data set with its splits.

    Attributes:
        name: One of `DATASETS`.
        train: What the network is trained on.
        validation: Images held out of the official training images; None where the run uses the test images instead.
        test: The official test images; None where the run must not see them.
        class_names: One name a class.
        mean: What was subtracted from each channel, pixels in [0, 1].
        std: What each channel was then divided by.
        details: More that a number in results.json depends on.
    """

    name: str
    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train.shape[0]

    @property
    def image_size(self) -> int:
        return self.train.shape[-1]

    @property
    def black(self) -> tuple[float, ...]:
        """The value of a black pixel after normalisation, one number a channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

    @property
    def facts(self) -> dict[str, Any]:
        """What results.json says about the data."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "name": self.name,
            "images": {name: len(split) for name, split in splits.items() if split is not None},
            "shape": list(self.train.shape),
            "class_names": list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
            **self.details,
        }


def load_dataset(
    name: str,
    data_path: str | None = None,
    *,
    use_test: bool = False,
    validation: bool | None = None,
    split_classes: int | None = None,
    label_arr: str | None = None,
    train_limit: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Datasets:
    """Load a data set as swa_gaussian does: split its training images, or keep them all and load the test images too.

    The validation images are the last 5,000 of the official training images, or the last tenth where there are fewer
    than 50,000 (597 of digits' 797). A folder tree is sorted by class: there it is as many at random, always the same,
    unless the tree has both val/ and test/.

    Args:
        name: One of `DATASETS`.
        data_path: Folder with the files; digits needs none.
        use_test: Load the test images. Without it they are not read.
        validation: Whether to hold out validation images; by default unless `use_test`.
        split_classes: 0 or 1 keeps one half of CIFAR-10's classes, numbered 0 to 4: airplane, automobile, bird, ship
            and truck; or cat, deer, dog, frog and horse.
        label_arr: A ``.npy`` file of other labels for the official training images, such as corrupted ones. They
            replace those of the images trained on; validation and test images keep their own.
        train_limit: Keep only the first images of a fixed random order of the training images.
        image_size: Resize images to this height and width [pixels]; by default STL10 to 32, as swa_gaussian does.
        mean: Subtracted from each channel, pixels in [0, 1]; by default the data set's own.
        std: Divides each channel; by default the data set's own.
        num_workers: Processes that read the images of a folder tree; 0 reads them in this one.
        device: Where inputs and targets go.

    Returns:
        The splits, each with ``batches(batch_size)`` and ``shuffled(batch_size, generator)``.

    Raises:
        SettingsError: If the data set is unknown, files are missing or damaged, or settings do not fit it.
    """
    source = find_source(name)
    root = _folder(name, source, data_path)
    if split_classes is not None and not 0 <= split_classes < len(source.class_splits):
        raise SettingsError(f"--split_classes is 0 or 1, and for CIFAR10 alone; got {split_classes} for {name}")
    if split_classes is not None and label_arr is not None:
        raise SettingsError("--label_arr and --split_classes exclude each other: a new label may be of the other half")
    if image_size is not None and image_size < 1:
        raise SettingsError(f"the image size must be at least 1; got {image_size}")
    how = Preparation(
        mean=source.mean if mean is None else tuple(mean),
        std=source.std if std is None else tuple(std),
        image_size=source.image_size if image_size is None else image_size,
        device=torch.device(device),
        num_workers=num_workers,
    )
    official = source.read(root, True)
    _check_normalization(name, how, official)
    wanted = (not use_test) if validation is None else validation
    own = source.read_validation(root) if wanted and source.read_validation is not None else None
    kept, held_out = _hold_out(name, source, official, wanted and own is None)
    pools = {"train": official.select(kept)}
    details: dict[str, Any] = {}
    if own is not None:
        pools["validation"], details["validation"] = own, "the data set's own validation images"
    elif held_out is not None:
        pools["validation"] = official.select(held_out)
        which = "the last" if official.in_random_order else "a fixed random choice of"
        details["validation"] = f"{which} {len(held_out)} of the {len(official.targets)} official training images"
    if use_test:
        pools["test"] = source.read(root, False)
    if label_arr is not None:
        labels, details["label_arr"] = read_labels(label_arr, len(official.targets), len(official.class_names))
        details["label_arr"]["changed"] = int((labels != official.targets)[kept].sum())
        pools["train"] = pools["train"].relabelled(labels[kept], official.class_names)
    if split_classes is not None:
        details["split_classes"] = split_classes
        pools = {key: keep_classes(pool, source.class_splits[split_classes]) for key, pool in pools.items()}
    if train_limit is not None:
        pools["train"] = _limit(name, pools["train"], train_limit)
    splits = {key: pool.prepare(how) for key, pool in pools.items()}
    return Datasets(
        name,
        splits["train"],
        splits.get("validation"),
        splits.get("test"),
        pools["train"].class_names,
        how.mean,
        how.std,
        details,
    )


def find_source(name: str) -> Source:
    """Return the data set of this name.

    Raises:
        SettingsError: If there is none; names the closest.
    """
    if name not in DATASETS:
        known = ", ".join(closest_first(name, DATASETS))
        raise SettingsError(f"unknown data set {name!r}; known are {known}")
    return DATASETS[name]


def read_test_images(name: str, data_path: str | None = None, limit: int | None = None) -> Pool:
    """Read test images as they are, neither resized nor normalised.

    Args:
        name: One of `DATASETS`.
        data_path: Folder with the files; digits needs none.
        limit: Keep only the first images of a fixed random order; None keeps all, as they are ordered.

    Raises:
        SettingsError: If the data set is unknown, its files are missing or damaged, or `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"the number of images must be at least 1; got {limit}")
    source = find_source(name)
    pool = source.read(_folder(name, source, data_path), False)
    n = len(pool.targets)
    return pool if limit is None or limit >= n else pool.select(_fixed_order(n)[:limit])


def read_training_labels(name: str, data_path: str | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Read the labels (N,) of all official training images, in their order, and the names of the classes.

    Raises:
        SettingsError: If the data set is unknown, or its files are missing or damaged.
    """
    source = find_source(name)
    pool = source.read(_folder(name, source, data_path), True)
    return pool.targets, pool.class_names


def _folder(name: str, source: Source, data_path: str | None) -> Path:
    if not source.fetch:
        return Path()
    if data_path is None:
        raise SettingsError(f"--dataset {name} needs --data_path, the folder that holds its files; {source.fetch}")
    if not Path(data_path).is_dir():
        raise SettingsError(f"--data_path {data_path}: there is no such folder; {source.fetch}")
    return Path(data_path)


def _check_normalization(name: str, how: Preparation, official: Pool) -> None:
    for flag, values in (("mean", how.mean), ("std", how.std)):
        if len(values) != official.channels:
            expected = f"{official.channels} number{'s' * (official.channels > 1)}"
            raise SettingsError(f"{flag} of {name}: expected {expected}, one a channel; got {len(values)}")
    if not all(value > 0 for value in how.std):
        raise SettingsError(f"std of {name}: expected positive numbers; got {how.std}")


def _fixed_order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(_SHUFFLE_SEED))


def _hold_out(name: str, source: Source, official: Pool, validation: bool) -> tuple[Tensor, Tensor | None]:
    """Return the indices of the images to train on, and of the validation images, if there are any."""
    n = len(official.targets)
    if not validation:
        return torch.arange(n), None
    held = min(5000, n // 10) if source.validation is None else source.validation
    if not 0 < held < n:
        raise SettingsError(f"{name} has {n} training images: too few to hold a tenth out for validation")
    if official.in_random_order:
        return torch.arange(n - held), torch.arange(n - held, n)
    order = _fixed_order(n)
    return order[:-held].sort().values, order[-held:].sort().values


def _limit(name: str, pool: Pool, limit: int) -> Pool:
    n = len(pool.targets)
    if not 1 <= limit <= n:
        raise SettingsError(f"the number of training images must be 1 to {n} for {name}; got {limit}")
    return pool.select(_fixed_order(n)[:limit])
