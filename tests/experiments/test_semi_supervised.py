"""Training with few labels, end to end at a tiny size; its schedule as published; a killed run; refusals."""

import json
import math
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from experiments import consistency_training, semi_supervised
from experiments.consistency_training import make_trainer
from experiments.datasets import load_dataset
from experiments.semi_supervised import KINDS, Settings, make_problem

TINY = (
    "--dataset digits --model SmallConvNet --n_labels 20 --train_limit 120 --epochs 2 --cycle_interval 2 "
    "--num_cycles 1 --batch_size 20 --labeled_batch_size 10 --num_samples 2 --bn_size 50 --eval_limit 100 "
    "--eval_freq 1 --seeds 1 --use_test --threads 1"
).split()
METHODS = [
    "majority class",
    *(f"{kind}: {weights}" for kind in KINDS for weights in ("SGD", "EMA", "SWA", "fast-SWA", "SWAG")),
]


def run(path: Path, *more: str) -> int:
    return semi_supervised.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("semi") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert names == {
        "cells/seed-0.json", "log.jsonl", "methods.png", "curves.png", "table.txt", "results.json", "settings.json",
        "environment.json", "command.sh",
    }  # fmt: skip
    printed = (finished.parent / "stdout").read_text()
    assert printed == (finished / "table.txt").read_text() + f"written to {finished}\n"
    assert "20 of 120 training images with labels" in printed and "Measured on 100 test images." in printed
    for name in ("methods.png", "curves.png"):
        picture = imread(finished / name)
        assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.01


def test_every_kind_and_average_is_measured(finished: Path) -> None:
    found = results(finished)
    assert found["baseline"] == "majority class" and list(found["cells"][0]["methods"]) == sorted(METHODS)
    majority = found["summary"]["majority class"]
    assert majority["nll"]["mean"] == pytest.approx(math.log(10), rel=1e-6)  # as many labels of each class
    assert majority["accuracy"]["mean"] < 20
    for method in METHODS[1:]:
        assert found["summary"][method]["accuracy"]["mean"] > 1.5 * majority["accuracy"]["mean"], method
    averages = {found["summary"][f"Pi: {weights}"]["nll"]["mean"] for weights in ("SGD", "EMA", "SWA", "fast-SWA")}
    assert len(averages) == 4
    for curves in found["cells"][0]["curves"].values():
        assert [epoch for epoch, _ in curves["SGD"]] == [1, 2, 3, 4]
        assert [epoch for epoch, _ in curves["SWA"]] == [2, 3, 4] and curves["fast-SWA"][0] == curves["SGD"][0]


def test_a_killed_run_goes_on_inside_its_seed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, epochs = tmp_path / "run", 0
    original = consistency_training.accuracy

    def killed(*arguments: Any) -> float:
        nonlocal epochs
        epochs += 1
        if epochs == 20:  # in the second epoch of the second network
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(consistency_training, "accuracy", killed)
    assert run(path) == 130 and "--resume" in capsys.readouterr().err
    kept = sorted(file.name for file in (path / "checkpoints").iterdir())
    assert kept == ["0-Pi.safetensors", "0-labels-alone.safetensors"]
    monkeypatch.undo()
    assert run(path, "--resume") == 0
    assert not list((path / "checkpoints").iterdir())
    was, now = (results(each)["cells"][0] for each in (finished, path))
    assert was["methods"] == now["methods"] and was["curves"] == now["curves"]
    assert run(path, "--resume", "--lr", "0.2") == 2 and "lr was 0.05, now 0.2" in capsys.readouterr().err


def test_rates_collections_and_ramp_are_those_published() -> None:
    """180 epochs, cycles of 30, fast-SWA every 3: README of the released code; the ramp takes 5 epochs."""
    settings = semi_supervised.check(
        Settings(dir="-", dataset="digits", model="SmallConvNet", n_labels=20, train_limit=120, use_test=True, lr=0.1,
                 epochs=180, num_cycles=34, cycle_interval=30, fastswa_frequencies=3, batch_size=20,
                 labeled_batch_size=10)
    )  # fmt: skip
    data = load_dataset("digits", use_test=True, train_limit=120)
    problem = make_problem(settings, data, 0)
    assert problem.steps == 10 and problem.labels.bincount().tolist() == [2] * 10
    trainer = make_trainer(settings, problem, KINDS["Mean Teacher"], 0)
    assert settings.all_epochs == 1200

    def collected(name: str) -> list[int]:
        return [epoch for epoch in range(1, 241) if trainer.collections[name].in_epoch(epoch)]

    assert collected("SWA") == [180, 210, 240] and collected("fast-SWA") == list(range(153, 241, 3))
    schedule: Any = trainer.schedule
    rates = [schedule.rate(10 * epoch, 0.1) for epoch in (0, 105, 150, 180, 209.9, 210)]
    assert rates[:2] == [0.1, pytest.approx(0.05)]
    assert rates[3] == rates[2] == rates[5] == pytest.approx(0.0188, abs=1e-4) and rates[4] == pytest.approx(
        0.005, abs=1e-4
    )
    loss: Any = trainer.loss
    assert loss.teacher is trainer.collections["EMA"].collector and loss.teacher.training
    levels = []
    for steps in (0, 20, 50, 900):
        schedule.last_epoch = steps
        levels.append(loss.weight())
    assert levels == [pytest.approx(100 * math.exp(-5 * (1 - t) ** 2)) for t in (0, 0.4, 1, 1)]
    alone: Any = make_trainer(settings, problem, KINDS["labels alone"], 0).loss
    assert alone.weight() == 0 and alone.teacher is None


def test_labels_that_are_not_chosen_are_never_read() -> None:
    settings = Settings(dir="-", n_labels=20, batch_size=20, labeled_batch_size=10, dataset="digits")
    data = load_dataset("digits", use_test=True, train_limit=120)
    problem = make_problem(settings, data, 0)
    for _, targets in problem.streams(torch.Generator().manual_seed(0), False):
        assert (targets[:10] >= 0).all() and (targets[10:] == -1).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--n_labels 25", "--n_labels must be a multiple of 10, the number of classes; got 25"),
        ("--n_labels 120", "--n_labels 120 takes 12 images of each class; one has"),
        ("--batch_size 130", "--n_labels 20 leaves 100 images without labels; need 120"),
        ("--labeled_batch_size 20", "--labeled_batch_size must be less than --batch_size 20; got 20"),
        ("--cycle_interval 3", "--cycle_interval must be at most --epochs 2; got 3"),
        (
            "--num_cycles 0 --fastswa_frequencies 2",
            "2 collects 1 times in the last 2 epochs; SWAG needs at least 2",
        ),
        ("--ema_decay 1", "--ema_decay must be less than 1; got 1"),
        ("--consistency inf", "--consistency must be at least 0; got inf"),
        ("--seeds 0", "--seeds must be at least 1; got 0"),
        ("--model LeNet5", "--model"),
        ("--dataset MNIST", "--dataset MNIST needs --data_path"),
        ("--resume", "there is no run"),
    ],
)
def test_refusals_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str) -> None:
    try:
        status = run(tmp_path / "run", *more.split())
    except SystemExit as error:  # of the command line itself
        status = int(error.code or 0)
    assert status == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_divergence_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--lr", "1e30") == 2
    assert "seed 0: training diverged" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
