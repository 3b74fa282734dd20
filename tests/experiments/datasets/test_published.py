"""CIFAR, SVHN and STL10: small files in the published formats are read back exactly, damaged ones are named."""

import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.functional import resize as resize_picture

from experiments.common import SettingsError
from experiments.datasets import load_dataset
from tests.experiments.datasets.writers import Written, write_cifar, write_stl10, write_svhn

WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Written]] = {
    "CIFAR10": partial(write_cifar, name="CIFAR10"),
    "CIFAR100": partial(write_cifar, name="CIFAR100"),
    "SVHN": write_svhn,
    "STL10": write_stl10,
}
FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python", "STL10": "stl10_binary"}
A_FILE = {"CIFAR10": "data_batch_3", "CIFAR100": "test", "SVHN": "train_32x32.mat", "STL10": "test_X.bin"}


@pytest.mark.parametrize("name", WRITERS)
def test_the_official_files_are_read_back_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = WRITERS[name](tmp_path, monkeypatch)
    size = written["train"][0].shape[-1]
    for root in {tmp_path, tmp_path / FOLDERS.get(name, ".")}:
        data = load_dataset(name, str(root), use_test=True, image_size=size)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        for split, (images, labels) in ((data.train, written["train"]), (data.test, written["test"])):
            assert torch.equal(split.inputs, (torch.from_numpy(images).float() / 255 - mean) / std)
            assert split.targets.dtype == torch.int64 and split.targets.tolist() == labels.tolist()
    assert data.num_classes == len(np.unique(written["train"][1])) and data.train.shape == (3, size, size)


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_and_missing_files_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](tmp_path, monkeypatch)
    path = tmp_path / FOLDERS.get(name, ".") / A_FILE[name]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SettingsError, match=f"{A_FILE[name]} is damaged: its md5 sum is not the published one$"):
        load_dataset(name, str(tmp_path))
    path.unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingsError, match=rf"there is no .*{A_FILE[name]} in it; to get it: .*{name}.*download=True"):
        load_dataset(name, str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was downloaded or extracted


def test_a_pickle_that_is_not_the_published_one_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR10")

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (tmp_path.joinpath("opened").write_text, ("boom",))

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SettingsError, match="data_batch_1 is damaged"):
        load_dataset("CIFAR10", str(tmp_path))
    assert not (tmp_path / "opened").exists()


def test_stl10_is_resized_as_pictures_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = write_stl10(tmp_path, monkeypatch)["test"]
    data = load_dataset("STL10", str(tmp_path), use_test=True, mean=[0] * 3, std=[1] * 3)
    assert (data.image_size, data.channels) == (32, 3)
    for found, image in zip(data.test.inputs, images, strict=True):
        picture = resize_picture(Image.fromarray(image.transpose(1, 2, 0)), [32, 32])
        expected = pil_to_tensor(picture).float() / 255
        assert (found - expected).abs().max() <= 1.001 / 255  # Pillow rounds between its two passes


def test_svhn_without_scipy_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(SettingsError, match="--dataset SVHN needs scipy: pip install scipy"):
        load_dataset("SVHN", str(tmp_path))
