"""Training in few bits, end to end at a tiny size; sizes; refusals."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import low_precision
from experiments.low_precision_methods import weight_bits
from lowrank_bdl.models import create_model

TINY = (
    "--dataset digits --model SmallConvNet --train_limit 120 --eval_limit 100 --epochs 4 --batch_size 30 --seeds 2 "
    "--level_epochs 3 --tune_epochs 1 --lr_init 0.1 --swa_lr 0.05 --level_lr 0.01 --threads 1"
).split()


def run(path: Path, *more: str) -> int:
    return low_precision.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("low_precision") / "run"
    assert run(path) == 0
    return path


def test_every_method_is_measured_and_learns(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    summary = found["summary"]
    assert found["order"] == [
        "majority class", "SGD, float32", "SWA, float32", "SGD, 8 bits", "SWALP, 8 bits averaged", "rounded, 2 bits",
        "trained rounded, 2 bits", "SQWA, 2 bits",
    ]  # fmt: skip
    chance = summary["majority class"]["error"]["mean"]
    for method in ("SGD, float32", "SWA, float32", "SGD, 8 bits", "SWALP, 8 bits averaged"):
        assert summary[method]["error"]["mean"] < chance - 20
    sizes = {method: entry["kibibytes"]["mean"] for method, entry in summary.items() if "kibibytes" in entry}
    assert sizes["SGD, 8 bits"] == sizes["SGD, float32"] / 4 == sizes["SWA, float32"] / 4
    assert sizes["SGD, float32"] / 16 < sizes["SQWA, 2 bits"] < sizes["SGD, float32"] / 12
    assert sizes["SGD, float32"] * 1024 / 4 == found["parameters"]
    assert "majority class (baseline)" in (finished / "table.txt").read_text()
    assert imread(finished / "methods.png")[..., :3].std() > 0.01


def test_seeds_are_kept_and_activations_may_be_narrow(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {path.name: path.read_bytes() for path in (finished / "cells").iterdir()}
    assert set(cells) == {"seed-1.json", "seed-2.json"}
    assert run(finished, "--resume", "--seeds", "1") == 0
    assert {path.name: path.read_bytes() for path in (finished / "cells").iterdir()} == cells
    assert run(finished, "--resume", "--activation_bits", "8") == 2
    assert "activation_bits was None, now 8" in capsys.readouterr().err


def test_narrow_activations_change_the_narrow_runs_alone(finished: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", "--activation_bits", "3", "--blocks", "channel", "--seeds", "1") == 0
    before, after = (
        json.loads((path / "cells" / "seed-1.json").read_text())["methods"] for path in (finished, tmp_path / "run")
    )
    assert before["SGD, float32"] == after["SGD, float32"] and before["SQWA, 2 bits"] == after["SQWA, 2 bits"]
    assert before["SGD, 8 bits"]["nll"] != after["SGD, 8 bits"]["nll"]


def test_bits_of_weights() -> None:
    layout = lb.ParameterLayout.from_module(create_model("LeNet5", num_classes=10))
    biases = sum(size for size, shape in zip(layout.sizes, layout.shapes, strict=True) if len(shape) == 1)
    assert weight_bits(layout, 8, levels=False) == 8 * layout.numel
    assert weight_bits(layout, 2, levels=True) == 2 * (layout.numel - biases) + 32 * biases


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bits 1", "--bits must be from 2 to 24; got 1"),
        ("--cycle 3", "--cycle must be even"),
        ("--level_epochs 4", "--level_epochs must be --tune_epochs 1 and whole cycles of 2; got 4"),
        ("--momentum 1", "--momentum must be at least 0 and less than 1; got 1.0"),
        ("--swa_lr 0", "--swa_lr must be positive; got 0.0"),
        ("--epochs 1", "--epochs must be at least 2; got 1"),
        ("--seeds 0", "--seeds must be at least 1; got 0"),
        ("--model Nothing", "Nothing"),
        ("--dataset MNIST --data_path nowhere", "nowhere"),
    ],
)
def test_refuses_what_cannot_run(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    try:
        status = run(path, *flags.split())
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2 and message in capsys.readouterr().err and not path.exists()
