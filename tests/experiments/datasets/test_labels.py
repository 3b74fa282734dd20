"""Replacement labels from a file, and one half of the classes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.common import SettingsError
from experiments.datasets.labels import keep_classes, read_labels
from experiments.datasets.sources import InMemory


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_labels_are_read_as_they_are(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "labels.npy", np.array([3, 0, 1], dtype))
    labels, facts = read_labels(str(tmp_path / "labels.npy"), 3, 4)
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 0, 1]
    assert facts["file"] == "labels.npy" and len(facts["sha256"]) == 64


@pytest.mark.parametrize(
    "array,message",
    [
        (np.zeros((3, 1), int), r"expected shape \(3,\); got \(3, 1\)"),
        (np.zeros(4, int), r"expected shape \(3,\); got \(4,\)"),
        (np.zeros(3), "expected integers; got float64"),
        (np.zeros(3, bool), "expected integers; got bool"),
        (np.array([0, 1, 4]), "expected 0 to 3; got 0 to 4"),
        (np.array([0, -1, 3]), "expected 0 to 3; got -1 to 3"),
        (np.array([0, {}, 3], dtype=object), "cannot read it as a .npy file: Object arrays cannot be loaded"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "labels.npy", array)
    with pytest.raises(SettingsError, match=f"--label_arr .*labels.npy: {message}"):
        read_labels(str(tmp_path / "labels.npy"), 3, 4)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    with pytest.raises(SettingsError, match="cannot read it as a .npy file: .*No such file"):
        read_labels(str(path), 3, 4)
    for content in (b"", b"3\n0\n1\n"):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match="cannot read it as a .npy file: "):
            read_labels(str(path), 3, 4)
    np.save(path, np.zeros(1000, int))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SettingsError, match="cannot read it as a .npy file: "):
        read_labels(str(path), 1000, 4)
    np.savez(tmp_path / "labels.npz", np.zeros(3, int))
    with pytest.raises(SettingsError, match="expected one array in a .npy file; got an archive"):
        read_labels(str(tmp_path / "labels.npz"), 3, 4)


def test_kept_classes_are_renumbered_in_the_given_order() -> None:
    pool = InMemory(torch.arange(6).view(6, 1, 1, 1), torch.tensor([0, 3, 1, 3, 2, 0]), ("a", "b", "c", "d"))
    kept = keep_classes(pool, [3, 0])
    assert kept.images.flatten().tolist() == [0, 1, 3, 5]
    assert kept.targets.tolist() == [1, 0, 0, 1] and kept.class_names == ("d", "a")
    with pytest.raises(SettingsError, match="no image is of the classes 1"):
        keep_classes(kept.relabelled(torch.zeros(4, dtype=torch.int64), ("x", "y")), [1])
