"""Tables for regression with published splits: reading, splitting, normalising."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.common import SettingsError

STANDARD = ("boston", "concrete", "energy", "yacht")
ALIASES: Mapping[str, str] = {"boston": "bostonHousing"}  # name of the file where it is another
DRAWN_SPLITS = 20  # of a table without published ones
TEXT_FILES = ("data.txt", "index_features.txt", "index_target.txt")


@dataclass(frozen=True)
class Table:
    """Rows of features with one target each, and which of them train and test in each split.

    Attributes:
        name: As it was asked for.
        source: Where it was read.
        features: Shape (N, p), float64, as in the file.
        target: Shape (N,), float64 [unit of the file].
        train: Training rows of each split.
        test: Test rows of each split.
    """

    name: str
    source: str
    features: np.ndarray
    target: np.ndarray
    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]

    @property
    def num_splits(self) -> int:
        return len(self.train)


@dataclass(frozen=True)
class RegressionSplit:
    """One split, normalised: features and targets (n, p) and (n, 1) in float64.

    Attributes:
        mean: What was subtracted from the targets [unit of the file].
        std: What they were divided by; RMSE scale with it, and densities with its inverse.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: float
    std: float


def load_table(name: str, data_path: Path) -> Table:
    """Read a table by name from a folder: NAME.npz, or the plain text files in NAME, NAME/data or the folder itself.

    An .npz holds X (N, p), y (N,) or (N, 1), and the splits as train_idx and test_idx, one row each; without these a
    tenth of the rows is drawn for the test of each of 20 splits, by the split's number. The text form is that of the
    released splits: data.txt, index_features.txt, index_target.txt, index_train_K.txt and index_test_K.txt.

    Raises:
        SettingsError: If there is no such table, or it cannot be used.
    """
    names = dict.fromkeys((name, ALIASES.get(name, name)))
    folders = [data_path / own / inner for own in names for inner in ("", "data")]
    if data_path.name in names or (data_path.name == "data" and data_path.parent.name in names):
        folders += [data_path, data_path / "data"]
    for own in names:
        if (path := data_path / f"{own}.npz").is_file():
            return _checked(name, path, *_read_npz(path))
    for folder in folders:
        if (folder / "data.txt").is_file():
            return _checked(name, folder, *_read_text(folder))
    wanted = " or ".join(f"{own}.npz" for own in names)
    raise SettingsError(f"--data_path {data_path} holds neither {wanted} nor a folder {name} with {TEXT_FILES[0]}")


Parts = tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]


def _read_npz(path: Path) -> Parts:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    if not {"X", "y"} <= set(arrays) or ("train_idx" in arrays) != ("test_idx" in arrays):
        raise SettingsError(f"{path} must hold X, y, train_idx and test_idx (or no splits); got {sorted(arrays)}")
    features, target = arrays["X"], arrays["y"]
    if "train_idx" in arrays:
        return features, target, list(arrays["train_idx"]), list(arrays["test_idx"])
    orders = [np.random.default_rng(split).permutation(len(features)) for split in range(DRAWN_SPLITS)]
    held_out = max(1, len(features) // 10)
    return features, target, [order[held_out:] for order in orders], [order[:held_out] for order in orders]


def _read_text(folder: Path) -> Parts:
    def numbers(file: str) -> np.ndarray:
        try:
            return np.loadtxt(folder / file, ndmin=2 if file == "data.txt" else 1)
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot read {folder / file}: {error}") from None

    def whole(file: str) -> np.ndarray:
        found = numbers(file)
        if not (found == found.round()).all():
            raise SettingsError(f"{folder / file} must hold whole numbers")
        return found.astype(np.int64)

    data, columns, target = (numbers(TEXT_FILES[0]), whole(TEXT_FILES[1]), whole(TEXT_FILES[2]))
    if len(target) != 1 or max(columns.max(initial=0), target.max(initial=0)) >= data.shape[1]:
        raise SettingsError(f"{folder} must name columns of data.txt, and one of them as the target")
    count = 0
    while (folder / f"index_train_{count}.txt").is_file():
        count += 1
    splits = range(count)
    return (
        data[:, columns],
        data[:, target[0]],
        [whole(f"index_train_{split}.txt") for split in splits],
        [whole(f"index_test_{split}.txt") for split in splits],
    )


def _checked(
    name: str, path: Path, features: np.ndarray, target: np.ndarray, train: list[np.ndarray], test: list[np.ndarray]
) -> Table:
    features, target = np.asarray(features, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if features.ndim != 2 or target.size != len(features) or len(features) == 0:
        raise SettingsError(f"{path}: features must be (N, p), the target (N,); got {features.shape}, {target.shape}")
    if not (np.isfinite(features).all() and np.isfinite(target).all()):
        raise SettingsError(f"{path} holds values that are not finite")
    if not train:
        raise SettingsError(f"{path} has no split")
    for split, (own, held_out) in enumerate(zip(train, test, strict=True)):
        rows = np.concatenate([own, held_out])
        if len(own) < 10 or len(held_out) < 1 or rows.min() < 0 or rows.max() >= len(features):
            raise SettingsError(f"{path}: split {split} needs 10 training rows and a test row of {len(features)}")
        if np.intersect1d(own, held_out).size or len(np.unique(rows)) < len(rows):
            raise SettingsError(f"{path}: split {split} has a row twice, or in both training and test")
    whole = (tuple(np.asarray(each, dtype=np.int64) for each in part) for part in (train, test))
    return Table(name, str(path), features, target.reshape(-1), *whole)


def split_of(table: Table, number: int, normalize: str = "train") -> RegressionSplit:
    """Return one split, with zero mean and unit variance over some rows; constant columns are left at zero.

    Args:
        table: The data.
        number: Of the split.
        normalize: ``"train"``: over the training rows; ``"all"``: over the test rows too, as the released code did.
    """
    train, test = table.train[number], table.test[number]
    rows = train if normalize == "train" else np.concatenate([train, test])

    def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        std = values[rows].std(0)
        return values[rows].mean(0), np.where(std > 1e-12 * np.abs(values[rows]).max(0), std, 1.0)

    (shift, width), (mean, std) = moments(table.features), moments(table.target)
    x = torch.from_numpy((table.features - shift) / width)
    y = torch.from_numpy((table.target - mean) / std).unsqueeze(1)
    return RegressionSplit(x[train], y[train], x[test], y[test], float(mean), float(std))


def folds_of(num_rows: int, num_folds: int, generator: torch.Generator) -> list[Tensor]:
    """Part rows 0 to num_rows - 1 at random into folds of equal size, but for one row."""
    return list(torch.randperm(num_rows, generator=generator).tensor_split(num_folds))
