"""Error against width, end to end at a tiny size; what the methods are; resume; refusals."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import double_descent
from experiments.datasets.loading import read_training_labels
from experiments.label_evidence import corrupted_labels
from experiments.train_weights import read_weights

TINY = (
    "--dataset digits --model SmallConvNet --train_limit 60 --batch_size 20 --epochs 4 --swa_start 1 --members 2 "
    "--widths 2,1 --num_samples 3 --eval_limit 50 --label_noise 0.25 --threads 1"
).split()


def run(path: Path, *more: str) -> int:
    return double_descent.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("widths") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {name for name in contents(finished) if not name.startswith("runs/")}
    cells = {f"cells/{width}-{member}.{kind}" for width in (1, 2) for member in (0, 1) for kind in ("json", "npz")}
    assert names == cells | {
        "labels.npy", "log.jsonl", "double_descent.png", "table.txt", "results.json", "settings.json",
        "environment.json", "command.sh",
    }  # fmt: skip
    assert imread(finished / "double_descent.png").std() > 0.05
    printed = (finished.parent / "stdout").read_text()
    assert printed.endswith((finished / "table.txt").read_text() + f"\nwritten to {finished}\n")
    lines = (finished / "table.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["1", "2"]


def test_networks_have_their_widths_and_the_same_wrong_labels(finished: Path) -> None:
    right, classes = read_training_labels("digits")
    labels = np.load(finished / "labels.npy")
    assert labels.tolist() == corrupted_labels(right, len(classes), 0.25, 0).tolist()
    for width in (1, 2):
        for member in (0, 1):
            path = finished / "runs" / f"{width}-{member}"
            record = json.loads((path / "results.json").read_text())["settings"]
            assert record["model"] == f"SmallConvNet-width{width}" and record["seed"] == member
            assert record["label_arr"] == str(finished / "labels.npy")
            assert read_weights(path / "weights.safetensors").layout.shapes[0] == (width, 1, 3, 3)
    rows = results(finished)["widths"]
    assert [row["width"] for row in rows] == [1, 2] and rows[0]["parameters"] < rows[1]["parameters"]


def test_ensembles_average_the_members(finished: Path) -> None:
    for row in results(finished)["widths"]:
        arrays = [np.load(finished / "cells" / f"{row['width']}-{member}.npz") for member in (0, 1)]
        targets = arrays[0]["targets"]
        assert len(targets) == 50
        for together, single in (("deep ensemble", "SGD"), ("MultiSWAG", "SWAG")):
            each = [found[f"{single}/probabilities"].astype(float) for found in arrays]
            average = np.mean(each, axis=0)
            entry = row["methods"][together]
            assert entry["accuracy"] == pytest.approx((average.argmax(1) == targets).mean())
            assert entry["nll"] == pytest.approx(-np.log(average[np.arange(50), targets]).mean(), rel=1e-5)
            own = [(found.argmax(1) == targets).mean() for found in each]
            assert row["methods"][single]["accuracy"] == pytest.approx(np.mean(own))
            assert row["methods"][single]["accuracy_sd"] == pytest.approx(np.std(own, ddof=1))


def test_multiswag_is_the_library_s(finished: Path) -> None:
    """The average over members of a run's draws is that of a mixture's stratified draws, which are such draws too."""
    paths = [finished / "runs" / f"2-{member}" / "posterior.safetensors" for member in (0, 1)]
    mixture = lb.MixturePosterior([lb.load_posterior(path) for path in paths])
    assert mixture.weights.tolist() == [0.5, 0.5] and [mixture.component_of(s) for s in range(4)] == [0, 1, 0, 1]


def test_resume_keeps_what_is_there_and_adds_the_rest(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert run(path, "--widths", "1") == 0
    cell = (path / "cells" / "1-0.npz").read_bytes()
    (path / "results.json").unlink()  # as after a kill
    assert run(path, "--resume") == 0
    assert (path / "cells" / "1-0.npz").read_bytes() == cell
    assert results(path)["widths"] == results(finished)["widths"]
    before = contents(path)
    assert run(path, "--resume", "--wd", "0.001") == 2
    assert contents(path) == before
    (path / "cells" / "1-0.npz").write_bytes(b"")
    before = contents(path)
    assert run(path, "--resume") == 2
    assert contents(path) == before


def test_one_network_without_label_noise(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "--members", "1", "--widths", "1", "--label_noise", "0") == 0
    (row,) = results(tmp_path / "run")["widths"]
    assert np.isnan(row["methods"]["SGD"]["accuracy_sd"]) and not (tmp_path / "run" / "labels.npy").exists()
    assert row["methods"]["deep ensemble"]["nll"] == pytest.approx(row["methods"]["SGD"]["nll"], rel=1e-6)
    assert torch.tensor(row["methods"]["SWAG"]["nll"]).isfinite()


@pytest.mark.parametrize(
    "argv,message",
    [
        ("--widths 1,x", "--widths must be whole numbers from 1, separated by commas; got '1,x'"),
        ("--widths 0,1", "--widths must be whole numbers from 1"),
        ("--members 0", "--members must be at least 1; got 0"),
        ("--label_noise 1.5", "--label_noise must be from 0 to 1; got 1.5"),
        ("--scale 0", "--scale must be positive; got 0.0"),
        ("--swa_start 9", "--swa_start must be less than --epochs; got 9 and 4"),
        ("--model LeNet5", "--model LeNet5-width1: only PreResNets, VGGs and SmallConvNets come in other widths"),
        ("--dataset MNIST", "--dataset MNIST needs --data_path, the folder that holds its files"),
        ("--resume", "--resume: there is no run in"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tmp_path / "run", *argv.split())
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()
