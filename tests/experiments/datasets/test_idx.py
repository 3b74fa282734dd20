"""MNIST and Fashion-MNIST: idx files, gzipped or extracted, and their damage."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.common import SettingsError
from experiments.datasets import load_dataset
from experiments.datasets.idx import read_idx
from tests.experiments.datasets.writers import md5, write_idx, write_mnist

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_the_official_files_are_read_back_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    written = write_mnist(tmp_path, monkeypatch, name, suffix)
    for path in (tmp_path, tmp_path / name, tmp_path / name / "raw"):
        data = load_dataset(name, str(path), use_test=True, mean=[0], std=[1])
        assert data.test is not None and data.validation is None
        for split, (images, labels) in ((data.train, written["train"]), (data.test, written["test"])):
            assert torch.equal(split.inputs, torch.from_numpy(images).float() / 255)
            assert split.targets.tolist() == labels.tolist()
    first = {"MNIST": "0", "FashionMNIST": "T-shirt/top"}[name]
    assert data.class_names[0] == first and data.num_classes == 10 and (data.channels, data.image_size) == (1, 28)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_any_number_of_axes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"images{suffix}"
    write_idx(path, ARRAY)
    assert torch.equal(read_idx(tmp_path, "images", (3, 4), {path.name: md5(path)}), torch.from_numpy(ARRAY))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no images.gz and no images in"):
        read_idx(tmp_path, "images", (3, 4), {})
    write_idx(tmp_path / "images", ARRAY)
    with pytest.raises(SettingsError, match=r"is not an idx file of shape \(N, 3, 5\): wrong header or length"):
        read_idx(tmp_path, "images", (3, 5), {})
    (tmp_path / "images").write_bytes((tmp_path / "images").read_bytes()[:-1])
    with pytest.raises(SettingsError, match=r"is not an idx file of shape \(N, 3, 4\): wrong header or length"):
        read_idx(tmp_path, "images", (3, 4), {})
    write_idx(tmp_path / "images", ARRAY, magic=9)
    with pytest.raises(SettingsError, match="wrong header or length"):
        read_idx(tmp_path, "images", (3, 4), {})


def test_a_gzipped_file_must_have_the_published_sum(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    write_idx(path, ARRAY)
    whole = md5(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SettingsError, match="images.gz is damaged or another data set's: its md5 sum is not the publ"):
        read_idx(tmp_path, "images", (3, 4), {path.name: whole})
    with pytest.raises(SettingsError, match="cannot read .*images.gz: Compressed file ended before"):
        read_idx(tmp_path, "images", (3, 4), {path.name: md5(path)})
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(SettingsError, match="wrong header or length"):
        read_idx(tmp_path, "images", (3, 4), {path.name: md5(path)})


def test_labels_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, monkeypatch, suffix="")
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, np.full(60, 10, np.uint8))
    with pytest.raises(SettingsError, match="a train label is 10; expected 0 to 9"):
        load_dataset("MNIST", str(tmp_path))
    write_idx(labels, np.zeros(59, np.uint8))
    with pytest.raises(SettingsError, match="60 train images, but 59 labels"):
        load_dataset("MNIST", str(tmp_path))


def test_a_folder_without_the_files_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"no train-images-idx3-ubyte\(.gz\) in it.*FashionMNIST\('DIR', download=T"
    ):
        load_dataset("FashionMNIST", str(tmp_path))
