"""Adaptation at a tiny size, from enlarged, dimmed digits to digits; labels that it must not read; refusals."""

import dataclasses
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
from sklearn.datasets import load_digits
from torchvision import datasets as published

from experiments import domain_adaptation
from experiments.common import SettingsError
from experiments.consistency_training import make_trainer
from experiments.datasets import Split
from experiments.domain_adaptation import KINDS, Settings, load_pair, make_problem
from tests.experiments.datasets.writers import md5, write_cifar, write_idx, write_mnist, write_stl10

TINY = (
    "--source MNIST --target digits --image_size 8 --epochs 2 --cycle_interval 2 --num_cycles 1 --batch_size 60 "
    "--labeled_batch_size 20 --fastswa_frequencies 1 --num_samples 2 --bn_size 100 --eval_limit 200 --eval_freq 2 "
    "--confidence 0.5 --seeds 1 --use_test --threads 1"
).split()


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MNIST's files, with 300 and 100 of scikit-learn's digits in them: enlarged to 24 x 24 and dimmed."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    raw = load_digits()
    resources = []
    for prefix, chosen in (("train", slice(0, 300)), ("t10k", slice(300, 400))):
        images = np.pad(np.kron(raw.images[chosen], np.ones((3, 3))) * 10, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", raw.target[chosen].astype(np.uint8))):
            path = folder / f"{prefix}-{kind}-ubyte.gz"
            write_idx(path, array)
            resources.append((path.name, md5(path)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published.MNIST, "resources", resources)
        yield root


def run(path: Path, data_path: Path, *more: str) -> int:
    return domain_adaptation.main(["--dir", str(path), "--data_path", str(data_path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """A finished experiment; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("adaptation") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path, data_path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert names == {
        "cells/seed-0.json", "log.jsonl", "methods.png", "curves.png", "table.txt", "results.json", "settings.json",
        "environment.json", "command.sh",
    }  # fmt: skip
    printed = (finished.parent / "stdout").read_text()
    assert printed == (finished / "table.txt").read_text() + f"written to {finished}\n"
    assert "300 labelled images of MNIST, 797 without labels of digits. Measured on 200 test images" in printed
    assert imread(finished / "curves.png").shape[1] > 1000


def test_every_kind_and_average_is_measured(finished: Path) -> None:
    found: dict[str, Any] = json.loads((finished / "results.json").read_text())
    weights = ("SGD", "EMA", "SWA", "fast-SWA", "SWAG")
    methods = [f"{kind}: {name}" for kind in KINDS for name in weights]
    assert set(found["summary"]) == {"majority class", "source alone: SGD, its batch norm", *methods}
    trivial = found["summary"]["majority class"]["accuracy"]["mean"]
    assert all(found["summary"][method]["accuracy"]["mean"] > 2 * trivial for method in methods)
    own, recalibrated = (found["summary"][f"source alone: SGD{s}"]["nll"]["mean"] for s in (", its batch norm", ""))
    assert own != recalibrated
    assert found["data"]["target"]["name"] == "digits" and found["data"]["source"]["shape"] == [1, 8, 8]


def settings_of(finished: Path) -> Settings:
    return Settings(**json.loads((finished / "settings.json").read_text()))


def test_labels_of_the_target_are_for_measuring_alone(finished: Path) -> None:
    settings = settings_of(finished)
    pair = load_pair(settings, torch.device("cpu"))
    train = pair.target.train
    assert isinstance(train, Split)
    wrong = dataclasses.replace(pair.target, train=Split(train.inputs, torch.full_like(train.targets, 7)))
    losses = []
    for each in (pair, dataclasses.replace(pair, target=wrong)):
        problem = make_problem(settings, each)
        trainer = make_trainer(settings, problem, KINDS["Mean Teacher"], 0)
        streams = problem.streams
        losses.append(trainer.train_epoch(lambda generator, s=streams: s(generator, False))["loss"])
    assert losses[0] == losses[1]


def test_the_two_sets_never_share_batch_statistics(finished: Path) -> None:
    settings = settings_of(finished)
    problem = make_problem(settings, load_pair(settings, torch.device("cpu")))
    trainer = make_trainer(settings, problem, KINDS["Pi"], 0)
    sizes: list[int] = []
    trainer.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    trainer.train_epoch(lambda generator: problem.streams(generator, False))
    assert problem.steps == 797 // 40 and sizes == [20, 40, 40] * problem.steps


def test_sets_must_fit_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    write_mnist(tmp_path, monkeypatch, "FashionMNIST")

    def load(source: str, target: str) -> domain_adaptation.Pair:
        settings = Settings(dir="-", data_path=str(tmp_path), source=source, target=target, use_test=True, image_size=8)
        return load_pair(settings, torch.device("cpu"))

    with pytest.raises(SettingsError, match="--source CIFAR10 has 3 channels and --target digits has 1"):
        load("CIFAR10", "digits")
    with pytest.raises(SettingsError, match="no map from the classes of digits to those of FashionMNIST"):
        load("FashionMNIST", "digits")


def test_classes_of_the_target_are_counted_as_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    written = write_stl10(tmp_path, monkeypatch)
    settings = Settings(dir="-", data_path=str(tmp_path), source="CIFAR10", target="STL10", use_test=True, image_size=8)
    found = load_pair(settings, torch.device("cpu")).held_out.targets.tolist()
    names = [0, 2, 1, 3, 4, 5, 7, 6, 8, 9]  # of STL10's classes, in CIFAR-10's order; monkeys are counted as frogs
    assert found == [names[label] for label in written["test"][1].tolist()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--target MNIST", "--source and --target must be two data sets; got MNIST for both"),
        ("--target STL9", "unknown data set 'STL9'"),
        ("--confidence 1", "--confidence must be in [0, 1); got 1.0"),
        ("--image_size 0", "--image_size must be at least 1; got 0"),
        ("--batch_size 2000", "--target digits has 797 training images; a batch needs 1980"),
        ("--model PreResNet20 --image_size 5", "--model"),
    ],
)
def test_refusals_write_nothing(
    tmp_path: Path, data_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    try:
        status = run(tmp_path / "run", data_path, *more.split())
    except SystemExit as error:  # of the command line itself
        status = int(error.code or 0)
    assert status == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
