"""Images of another data set in the form that a network takes, and the labels that are mapped."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.common import SettingsError
from experiments.datasets import NOISE, Datasets, foreign_images, label_map, load_dataset
from experiments.datasets.loading import read_test_images
from tests.experiments.datasets.writers import write_cifar, write_mnist, write_stl10, write_svhn, write_tree


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of MNIST, CIFAR10, SVHN and STL10."""
    write_mnist(tmp_path, monkeypatch)
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    write_svhn(tmp_path, monkeypatch)
    write_stl10(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def cifar(folder: Path) -> Datasets:
    return load_dataset("CIFAR10", str(folder))


def pixels(inputs: torch.Tensor, data: Datasets) -> torch.Tensor:
    """Undo the normalisation, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (data.mean, data.std))
    return inputs.double() * std + mean


def test_grey_images_get_three_equal_channels_and_the_networks_statistics(folder: Path, cifar: Datasets) -> None:
    found = foreign_images("MNIST", cifar, str(folder))
    assert found.inputs.shape == (20, 3, 32, 32) and found.inputs.dtype == torch.float32
    raw = read_test_images("MNIST", str(folder))
    assert torch.equal(found.targets, raw.targets)
    values = pixels(found.inputs, cifar)
    torch.testing.assert_close(values[:, :1].expand(-1, 3, -1, -1), values, rtol=0, atol=1e-6)
    resized = torch.nn.functional.interpolate(
        raw.images.double(), size=(32, 32), mode="bilinear", antialias=True, align_corners=False
    )
    assert (values[:, :1] * 255 - resized).abs().max() < 1.01  # uint8 pixels are rounded after each axis


def test_colours_become_luma_at_the_networks_size(folder: Path) -> None:
    data = load_dataset("MNIST", str(folder))
    found = foreign_images("CIFAR10", data, str(folder))
    assert found.inputs.shape == (10, 1, 28, 28)
    raw = read_test_images("CIFAR10", str(folder)).images.double()
    luma = (raw * torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)).sum(1, keepdim=True)
    resized = torch.nn.functional.interpolate(luma, size=(28, 28), mode="bilinear", antialias=True, align_corners=False)
    assert (pixels(found.inputs, data) * 255 - resized).abs().max() < 2  # one rounding each for luma and size


@pytest.mark.parametrize("name,count", [("SVHN", 20), ("STL10", 20), ("digits", 1000)])
def test_other_sets_fit_the_network(name: str, count: int, folder: Path, cifar: Datasets) -> None:
    found = foreign_images(name, cifar, str(folder))
    assert len(found) == count and found.shape == cifar.train.shape and bool(found.inputs.isfinite().all())
    assert 0 <= found.targets.min() and found.targets.max() == 9
    if name == "SVHN":  # same size and channels: pixels as they are
        raw = read_test_images("SVHN", str(folder)).images
        torch.testing.assert_close(pixels(found.inputs, cifar), raw.double() / 255, rtol=0, atol=1e-6)


def test_a_folder_tree_fits_a_network_for_colours_alone(folder: Path, cifar: Datasets, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_tree(tmp_path / "tree" / split, ["cat", "dog"], 2, (40, 48), "png")
    found = foreign_images("ImageFolder", cifar, str(tmp_path / "tree"), limit=3)
    assert len(found) == 3 and found.shape == (3, 32, 32)
    inputs, _ = next(iter(found.batches(3)))
    values = pixels(inputs, cifar)
    assert inputs.shape == (3, 3, 32, 32) and -1e-6 < values.min() and values.max() < 1 + 1e-6
    grey = load_dataset("MNIST", str(folder))
    with pytest.raises(SettingsError, match="ImageFolder has 3 channels; a network for MNIST takes 1"):
        foreign_images("ImageFolder", grey, str(tmp_path / "tree"))


def test_noise_is_uniform_and_always_the_same(cifar: Datasets) -> None:
    found = foreign_images(NOISE, cifar, limit=300)
    assert found.inputs.shape == (300, 3, 32, 32) and found.targets.tolist() == [0] * 300
    assert torch.equal(found.inputs, foreign_images(NOISE, cifar, limit=300).inputs)
    assert torch.equal(found.inputs[:7], foreign_images(NOISE, cifar, limit=7).inputs)
    values = pixels(found.inputs, cifar).flatten()
    counts = torch.histc(values, 64, 0, 1)
    expected = len(values) / 64
    statistic = float(((counts - expected) ** 2 / expected).sum())  # χ², 63 degrees of freedom; false alarms: 1e-6
    assert 19.2 < statistic < 134.9
    assert len(foreign_images(NOISE, load_dataset("digits"))) == 10_000


def test_fewer_images_are_a_fixed_random_choice(cifar: Datasets, folder: Path) -> None:
    whole = foreign_images("digits", cifar)
    few, fewer = (foreign_images("digits", cifar, limit=limit) for limit in (50, 20))
    assert torch.equal(few.inputs[:20], fewer.inputs) and torch.equal(few.targets[:20], fewer.targets)
    assert not torch.equal(few.inputs, whole.inputs[:50])
    among = (few.inputs[:, None] == whole.inputs[None]).flatten(2).all(-1)
    assert (among.sum(1) == 1).all()
    assert torch.equal(foreign_images("digits", cifar, limit=5000).inputs, whole.inputs)


@pytest.mark.parametrize(
    "name,limit,message",
    [
        ("CIFAR10", None, "CIFAR10 is what the network was trained on; foreign images must be of another data set"),
        ("Mnist", None, "unknown data set 'Mnist'; known are MNIST, "),
        ("SVHN", 0, "the number of images must be at least 1; got 0"),
        ("noise", 0, "the number of images must be at least 1; got 0"),
        ("FashionMNIST", None, "there is no such folder; to get it"),
    ],
)
def test_refusals(name: str, limit: int | None, message: str, folder: Path, cifar: Datasets) -> None:
    with pytest.raises(SettingsError, match=message):
        foreign_images(name, cifar, str(folder / "none" if name == "FashionMNIST" else folder), limit)


def test_a_set_with_files_needs_a_folder(cifar: Datasets) -> None:
    with pytest.raises(SettingsError, match="--dataset SVHN needs --data_path"):
        foreign_images("SVHN", cifar)


def test_images_are_on_the_device_of_the_data(device: torch.device) -> None:
    found = foreign_images(NOISE, load_dataset("digits", device=device), limit=2)
    assert found.inputs.device.type == found.targets.device.type == device.type


def test_the_global_generator_is_left_alone(cifar: Datasets) -> None:
    before = torch.get_rng_state()
    foreign_images(NOISE, cifar, limit=3)
    foreign_images("digits", cifar, limit=3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_classes_of_stl10_map_to_the_same_classes_of_cifar10(folder: Path) -> None:
    stl = load_dataset("STL10", str(folder), use_test=True).class_names
    cifar = "airplane automobile bird cat deer dog frog horse ship truck".split()
    mapped = [cifar[c] for c in label_map("STL10", "CIFAR10").tolist()]
    same = {"car": "automobile", "monkey": "frog"}
    assert mapped == [same.get(name, name) for name in stl]
    back = label_map("CIFAR10", "STL10")
    assert torch.equal(back[label_map("STL10", "CIFAR10")], torch.arange(10)) and back.dtype == torch.int64


def test_there_is_no_other_map() -> None:
    message = "there is no map from the classes of MNIST to those of CIFAR10, only between STL10 and CIFAR10"
    with pytest.raises(SettingsError, match=re.escape(message)):
        label_map("MNIST", "CIFAR10")
    with pytest.raises(SettingsError, match="unknown data set 'STL'"):
        label_map("STL", "CIFAR10")


def test_raw_test_images_are_those_of_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    images, labels = write_cifar(other, monkeypatch, "CIFAR100")["test"]
    raw = read_test_images("CIFAR100", str(other))
    assert np.array_equal(raw.images.numpy(), images) and raw.targets.tolist() == labels.tolist()
