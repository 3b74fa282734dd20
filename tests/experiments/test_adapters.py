"""SWAG over a transformer's adapter, end to end at a tiny size; which labels are taken; refusals."""

import json
from pathlib import Path

import pytest
import torch

from experiments import adapters
from experiments.adapters import few
from experiments.datasets import Split
from tests.experiments.datasets.writers import write_mnist

pytest.importorskip("peft", reason="peft is in the extra lowrank-bdl[applications]")
pytest.importorskip("transformers", reason="transformers is in the extra lowrank-bdl[applications]")

TINY = (
    "--pretrain_limit 60 --pretrain_epochs 1 --hidden_size 8 --layers 1 --labels 30 --rank 2 --epochs 5 "
    "--num_samples 2 --exported 1 --seeds 1 --threads 1"
).split()


def run(path: Path, data: Path, *more: str) -> int:
    return adapters.main(["--dir", str(path), "--data_path", str(data), *TINY, *more])


def test_adapts_exports_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "data", monkeypatch)
    path = tmp_path / "run"
    assert run(path, tmp_path / "data") == 0
    found = json.loads((path / "results.json").read_text())
    assert found["order"] == ["majority class", "as trained before", "adapter, SGD", "adapter, SWA", "adapter, SWAG"]
    (cell,) = found["cells"]
    assert cell["difference"] < 1e-6 and cell["snapshots"] == 3
    assert cell["weights"] == 2 * (2 * 8 + 8 * 2) + 8 * 10 + 10  # A and B of two matrices, and the classifier
    assert sorted(folder.name for folder in (path / "adapters" / "1").iterdir()) == ["draw-0", "mean"]
    assert (path / "methods.png").stat().st_size > 5000
    before = (path / "cells" / "seed-1.json").read_bytes()
    (path / "cells" / "seed-1.json").unlink()
    assert run(path, tmp_path / "data", "--resume") == 0  # with the transformer of the first start
    again, first = json.loads((path / "cells" / "seed-1.json").read_text()), json.loads(before)
    assert again["methods"] == first["methods"]


def test_as_many_labels_of_each_class_as_there_are() -> None:
    targets = torch.tensor([0] * 20 + [1] * 20 + [2] * 3)
    images = Split(torch.arange(43.0).view(43, 1, 1, 1), targets)
    found = few(images, 15, seed=0)
    assert found.targets.bincount().tolist() == [6, 6, 3]
    assert torch.equal(targets[found.inputs.flatten().long()], found.targets) and len(found.inputs.unique()) == 15
    assert not torch.equal(few(images, 15, seed=1).inputs, found.inputs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--labels 798", "--labels must be at most 797; got 798"),
        ("--hidden_size 6", "--hidden_size must be a multiple of 4, the heads; got 6"),
        ("--scale 0", "--scale must be positive; got 0.0"),
        ("--rank 0", "--rank must be at least 1; got 0"),
        ("--pretrain_dataset CIFAR10", "CIFAR10"),
    ],
)
def test_refuses_what_cannot_run(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path / "data", monkeypatch)
    try:
        status = run(tmp_path / "run", tmp_path / "data", *flags.split())
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2 and message in capsys.readouterr().err and not (tmp_path / "run").exists()
