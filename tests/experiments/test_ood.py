"""Shifted images: severity, transfer with mapped labels, and what cannot run."""

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from experiments import ood, train_report
from experiments.common import SettingsError
from experiments.datasets import Datasets, Split, label_map
from experiments.ood import Settings, check

PROG = "python -m experiments.ood"
RECIPE = (
    "--dataset digits --model SmallConvNet --train_limit 48 --batch_size 16 --epochs 2 --methods SGD --swa_start 0 "
    "--seeds 1 --num_samples 2 --tune_samples 1 --ood none --eval_limit 40 --noise_std 0.01 --noise_fraction 0.1"
).split()


@pytest.fixture(scope="module", autouse=True)
def _no_figures_of_single_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        yield


@pytest.fixture
def digits() -> Datasets:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        inputs = torch.randn(count, 1, 8, 8, generator=generator)
        return Split(inputs, torch.randint(10, (count,), generator=generator))

    return Datasets("CIFAR10", split(6), split(5), split(7), tuple("abcdefghij"))


@pytest.fixture(scope="module")
def severities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corruptions of the digits at five severities, 40 images each: noise that grows, and nothing at all."""
    from experiments.datasets.loading import read_test_images

    folder = tmp_path_factory.mktemp("corrupted")
    pool = read_test_images("digits")
    images = pool.images[:40].permute(0, 2, 3, 1).double()
    images = (images / images.max() * 255).numpy()
    random = np.random.default_rng(0)
    for severity in range(1, 6):
        noise = random.normal(0, 40 * severity, images.shape)
        for name, changed in (("gaussian_noise", images + noise), ("brightness", images)):
            data = np.clip(changed, 0, 255).astype(np.uint8)
            np.savez(folder / f"{name}_{severity}.npz", data=data, labels=pool.targets[:40].numpy())
    return folder


def test_metrics_against_severity(severities: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with redirect_stdout(StringIO()) as printed:
        assert ood.main(["--dir", str(path), *RECIPE, "--corrupted", str(severities)]) == 0
    found = json.loads((path / "results.json").read_text())
    own = found["cells"]["SGD"][0]["metrics"]
    assert set(own) == {"validation", "test"} | {
        f"{name}-{severity}" for name in ("gaussian_noise", "brightness") for severity in range(1, 6)
    }
    shown = found["by_severity"]["NLL"]["SGD"]
    mean = [(own[f"brightness-{s}"]["nll"] + own[f"gaussian_noise-{s}"]["nll"]) / 2 for s in range(1, 6)]
    assert shown == pytest.approx([own["test"]["nll"], *mean])
    assert own["brightness-1"] == own["brightness-5"] != own["gaussian_noise-5"]
    assert found["corruptions"] == ["brightness", "gaussian_noise"]
    text = (path / "uncertainty.md").read_text()
    assert "## NLL by severity, mean over 2 corruptions" in text in printed.getvalue()
    assert "; 10 corrupted sets of 40 images." in text
    assert imread(path / "severity.png").shape[1] >= 600


def test_images_are_read_when_they_are_needed(
    severities: Path, monkeypatch: pytest.MonkeyPatch, digits: Datasets
) -> None:
    read: list[tuple[str, int]] = []

    def load(folder: Path, name: str, severity: int, data: Datasets) -> Split:
        read.append((name, severity))
        return digits.test

    monkeypatch.setattr(ood, "load_corrupted", load)
    images = ood.Corrupted(severities, "fog", 3, digits, 5)
    assert len(images) == 5 and read == []
    batches = images.batches(2)
    assert read == []
    assert [len(targets) for _, targets in batches] == [2, 2, 1] and read == [("fog", 3)]


def settings(**changes: Any) -> Settings:
    return check(Settings(**{**dict(dataset="CIFAR10", model="SmallConvNet", transfer="STL10"), **changes}))


def test_labels_of_stl10_are_those_of_the_network(digits: Datasets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Monkeys of the one are the frogs of the other; cars, birds and horses are numbered differently."""
    stl10 = Split(torch.zeros(10, 1, 8, 8), torch.arange(10))
    asked: dict[str, Any] = {}

    def load(name: str, path: str | None, **options: Any) -> Datasets:
        asked.update(options, name=name)
        return Datasets(name, stl10, None, stl10, tuple("abcdefghij"))

    monkeypatch.setattr(ood, "load_dataset", load)
    found = ood.transfer_sets(settings(), digits)
    assert list(found) == ["STL10"]
    assert [int(targets) for _, targets in found["STL10"].batches(1)] == [0, 2, 1, 3, 4, 5, 7, 6, 8, 9]
    assert asked["name"] == "STL10" and asked["mean"] == digits.mean and asked["image_size"] == 8


def test_the_stand_in_is_labelled_in_the_order_of_stl10_and_mapped_back(
    digits: Datasets, severities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ood, "load_corrupted", lambda *_: digits.test)
    found = ood.transfer_sets(settings(transfer="corrupted", corrupted=str(severities)), digits)
    ((name, images),) = found.items()
    assert name == "stand-in for STL10 (brightness 3)"
    assert torch.equal(images.targets, digits.test.targets)
    mapping = label_map("STL10", "CIFAR10")
    assert torch.equal(mapping[mapping.argsort()], torch.arange(10))


def test_transfer_is_from_cifar10(digits: Datasets) -> None:
    import dataclasses

    other = dataclasses.replace(digits, name="SVHN")
    with pytest.raises(SettingsError, match="--transfer is from CIFAR10; got SVHN"):
        ood.transfer_sets(settings(), other)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give at least one of --split_classes, --transfer and --corrupted"),
        (["--corrupted", "nowhere"], "--corrupted nowhere: there is no such folder"),
        (["--corrupted", "."], "--corrupted .: there are no files NAME_SEVERITY.npz (or NAME.npy) in it"),
        (["--transfer", "corrupted"], "--transfer corrupted needs --corrupted, the folder of the images"),
        (["--transfer", "STL11"], "argument --transfer: invalid choice: 'STL11'"),
        (["--transfer", "STL10"], "--transfer is from CIFAR10; got digits"),
        (["--transfer", "STL10", "--split_classes", "0"], "--transfer and --split_classes exclude each other"),
        (["--split_classes", "0"], "--split_classes is 0 or 1, and for CIFAR10 alone; got 0 for digits"),
    ],
)
def test_what_cannot_run_is_one_line_and_writes_nothing(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = ood.main(["--dir", "run", *RECIPE, *argv])
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    assert error.startswith(f"{PROG}: error: ") and message in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_corruption_that_is_not_there_is_refused(
    severities: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--dir", str(tmp_path / "run"), *RECIPE, "--corrupted", str(severities), "--corruptions", "fog"]
    assert ood.main(argv) == 2
    assert "--corruptions: unknown corruption 'fog'; known are brightness, gaussian_noise" in capsys.readouterr().err
