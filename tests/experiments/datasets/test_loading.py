"""Which image is in which split, with which label, normalised how; and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.common import SettingsError
from experiments.datasets import load_dataset
from tests.experiments.datasets.writers import Written, write_cifar, write_mnist, write_svhn

RAW = dict(mean=[0, 0, 0], std=[1, 1, 1])


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """CIFAR-100 and CIFAR-10 in `tmp_path`; returns CIFAR-100: 200 and 100 images."""
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    return write_cifar(tmp_path, monkeypatch, "CIFAR100")


def pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).float() / 255


def test_the_last_training_images_are_for_validation_unless_the_test_images_are_used(
    tmp_path: Path, cifar: Written
) -> None:
    (images, labels), (test_images, test_labels) = cifar["train"], cifar["test"]
    data = load_dataset("CIFAR100", str(tmp_path), **RAW)
    assert torch.equal(data.train.inputs, pixels(images[:-20])) and data.train.targets.tolist() == labels[:-20].tolist()
    assert torch.equal(data.validation.inputs, pixels(images[-20:]))
    assert data.validation.targets.tolist() == labels[-20:].tolist() and data.test is None
    data = load_dataset("CIFAR100", str(tmp_path), use_test=True, **RAW)
    assert torch.equal(data.train.inputs, pixels(images)) and data.validation is None
    assert torch.equal(data.test.inputs, pixels(test_images)) and data.test.targets.tolist() == test_labels.tolist()
    data = load_dataset("CIFAR100", str(tmp_path), use_test=True, validation=True)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [180, 20, 100]


def test_5000_images_are_held_out_of_50000(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from experiments.datasets import loading
    from experiments.datasets.sources import InMemory, Source

    def read(_: Path, train: bool) -> InMemory:
        return InMemory(torch.arange(50_001).view(-1, 1, 1, 1) / 50_001, torch.zeros(50_001).long(), ("a",))

    monkeypatch.setattr(loading, "DATASETS", {"many": Source(read, (0.0,), (1.0,))})
    data = load_dataset("many")
    assert (len(data.train), len(data.validation)) == (45_001, 5_000)
    assert (data.validation.inputs.flatten() * 50_001).round().tolist() == list(range(45_001, 50_001))
    assert data.facts["validation"] == "the last 5000 of the 50001 official training images"


def test_the_test_images_are_not_read_unless_asked_for(
    tmp_path: Path, cifar: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_svhn(tmp_path, monkeypatch)
    (tmp_path / "test_32x32.mat").unlink()
    assert len(load_dataset("SVHN", str(tmp_path)).train) == 45
    with pytest.raises(SettingsError, match="there is no test_32x32.mat in it"):
        load_dataset("SVHN", str(tmp_path), use_test=True)


@pytest.mark.parametrize("half,classes", [(0, [0, 1, 2, 8, 9]), (1, [3, 4, 5, 6, 7])])
def test_half_of_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: int, classes: list[int]) -> None:
    written = write_cifar(tmp_path, monkeypatch, "CIFAR10")
    data = load_dataset("CIFAR10", str(tmp_path), split_classes=half, use_test=True, **RAW)
    for split, (images, labels) in ((data.train, written["train"]), (data.test, written["test"])):
        kept = np.isin(labels, classes)
        assert torch.equal(split.inputs, pixels(images[kept]))
        assert split.targets.tolist() == [classes.index(label) for label in labels[kept]]
    assert data.num_classes == 5 and data.class_names == tuple(f"class {c}" for c in classes)
    assert data.facts["split_classes"] == half


def test_the_class_split_comes_after_the_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_cifar(tmp_path, monkeypatch, "CIFAR10")["train"]
    halves = [load_dataset("CIFAR10", str(tmp_path), split_classes=half, validation=False) for half in (0, 1)]
    assert [len(half.train) for half in halves] == [10, 10]
    of_last_two = 0 if labels[-1] in (0, 1, 2, 8, 9) else 1
    data = load_dataset("CIFAR10", str(tmp_path), split_classes=of_last_two, **RAW)
    kept = np.isin(labels[-2:], [[0, 1, 2, 8, 9], [3, 4, 5, 6, 7]][of_last_two])
    assert torch.equal(data.validation.inputs, pixels(images[-2:][kept]))


def test_new_labels_are_for_the_images_trained_on_alone(tmp_path: Path, cifar: Written) -> None:
    labels = cifar["train"][1]
    corrupted = (labels + 1) % 100
    corrupted[:30] = labels[:30]
    np.save(tmp_path / "labels.npy", corrupted)
    path = str(tmp_path / "labels.npy")
    data = load_dataset("CIFAR100", str(tmp_path), label_arr=path)
    assert data.train.targets.tolist() == corrupted[:-20].tolist()
    assert data.validation.targets.tolist() == labels[-20:].tolist()
    assert data.facts["label_arr"]["changed"] == 150
    data = load_dataset("CIFAR100", str(tmp_path), label_arr=path, use_test=True)
    assert data.train.targets.tolist() == corrupted.tolist()
    assert data.test.targets.tolist() == cifar["test"][1].tolist()


def test_fewer_training_images_are_nested_and_leave_the_other_splits_alone() -> None:
    whole = load_dataset("digits", use_test=True, validation=True)
    small, smaller = (load_dataset("digits", use_test=True, validation=True, train_limit=n) for n in (100, 30))
    assert torch.equal(smaller.train.inputs, small.train.inputs[:30])
    assert torch.equal(smaller.train.targets, small.train.targets[:30])
    assert torch.equal(small.test.inputs, whole.test.inputs) and small.facts["images"]["train"] == 100
    assert torch.equal(small.validation.inputs, whole.validation.inputs)
    among = (small.train.inputs[:, None] == whole.train.inputs).flatten(2).all(-1)
    assert (among.sum(1) == 1).all() and (among.sum(0) <= 1).all()
    assert len(load_dataset("digits", train_limit=200).train) == 200
    for limit in (0, 201):
        message = f"the number of training images must be 1 to 200 for digits; got {limit}"
        with pytest.raises(SettingsError, match=message):
            load_dataset("digits", train_limit=limit)


def test_normalisation_is_the_data_sets_own_or_the_given_one(tmp_path: Path, cifar: Written) -> None:
    data = load_dataset("CIFAR100", str(tmp_path))
    assert (data.mean, data.std) == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    raw = load_dataset("CIFAR100", str(tmp_path), **RAW).train.inputs
    for channel in range(3):
        expected = (raw[:, channel].double() - data.mean[channel]) / data.std[channel]
        torch.testing.assert_close(data.train.inputs[:, channel].double(), expected, rtol=1e-6, atol=1e-6)
    assert data.black == pytest.approx([-0.5071 / 0.2673, -0.4865 / 0.2564, -0.4409 / 0.2762], rel=1e-12)
    with pytest.raises(SettingsError, match="mean of CIFAR100: expected 3 numbers, one a channel; got 1"):
        load_dataset("CIFAR100", str(tmp_path), mean=[0.5])
    with pytest.raises(SettingsError, match="std of digits: expected 1 number, one a channel; got 3"):
        load_dataset("digits", std=[1, 1, 1])
    with pytest.raises(SettingsError, match=r"std of digits: expected positive numbers; got \(0,\)"):
        load_dataset("digits", std=[0])


def test_images_can_be_resized() -> None:
    data = load_dataset("digits", image_size=32)
    assert data.image_size == 32 and data.validation.shape == (1, 32, 32)
    small = load_dataset("digits")
    means = [split.inputs.mean((1, 2, 3)) for split in (data.train, small.train)]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0.1)  # bilinear: brightness stays
    with pytest.raises(SettingsError, match="the image size must be at least 1; got 0"):
        load_dataset("digits", image_size=0)


def test_everything_is_on_the_device(device: torch.device) -> None:
    data, here = load_dataset("digits", use_test=True, device=device), load_dataset("digits", use_test=True)
    for split, other in ((data.train, here.train), (data.test, here.test)):
        assert split.inputs.device.type == split.targets.device.type == device.type
        torch.testing.assert_close(split.inputs.cpu(), other.inputs, rtol=1e-6, atol=1e-6)


def test_facts_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, monkeypatch)
    facts = json.loads(json.dumps(load_dataset("MNIST", str(tmp_path), use_test=True, validation=True).facts))
    assert facts == {
        "name": "MNIST",
        "images": {"train": 54, "validation": 6, "test": 20},
        "shape": [1, 28, 28],
        "class_names": [str(i) for i in range(10)],
        "mean": [0.1307],
        "std": [0.3081],
        "validation": "the last 6 of the 60 official training images",
    }


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    load_dataset("digits", train_limit=10, use_test=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("mnist", {}, "unknown data set 'mnist'; known are MNIST, FashionMNIST, "),
        ("CIFAR100", {}, "--dataset CIFAR100 needs --data_path, the folder that holds its files; to get it: python -c"),
        ("CIFAR10", {"data_path": "nowhere"}, "--data_path nowhere: there is no such folder; to get it: python -c "),
        ("digits", {"split_classes": 0}, "--split_classes is 0 or 1, and for CIFAR10 alone; got 0 for digits"),
        ("digits", {"validation": True, "label_arr": "none.npy"}, "--label_arr none.npy: cannot read it as a .npy"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}") as caught:
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)


def test_what_excludes_each_other_is_refused(tmp_path: Path, cifar: Written) -> None:
    with pytest.raises(SettingsError, match="--label_arr and --split_classes exclude each other"):
        load_dataset("CIFAR10", str(tmp_path), split_classes=0, label_arr="labels.npy")
    with pytest.raises(SettingsError, match="--split_classes is 0 or 1, and for CIFAR10 alone; got 2 for CIFAR10"):
        load_dataset("CIFAR10", str(tmp_path), split_classes=2)
    with pytest.raises(SettingsError, match="got 0 for CIFAR100"):
        load_dataset("CIFAR100", str(tmp_path), split_classes=0)


def test_too_few_images_to_hold_any_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, monkeypatch, suffix="")
    from tests.experiments.datasets.writers import write_idx

    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((9, 28, 28), np.uint8))
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(9, dtype=np.uint8))
    with pytest.raises(SettingsError, match="MNIST has 9 training images: too few to hold a tenth out for validation"):
        load_dataset("MNIST", str(tmp_path))
    assert len(load_dataset("MNIST", str(tmp_path), validation=False).train) == 9
