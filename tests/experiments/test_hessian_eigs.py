"""The Hessian script end to end at a tiny size: against dense matrices, what it writes and refuses, and going on."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

from experiments import hessian_eigs, train, train_report
from experiments.datasets import load_dataset
from experiments.models import build_model
from experiments.train_weights import read_weights

PROG = "python -m experiments.hessian_eigs"
TRAIN = (
    "--dataset digits --model SmallConvNet --train_limit 60 --batch_size 16 --epochs 4 --lr_init 0.05 --swa "
    "--swa_start 1 --swa_lr 0.02 --cov_mat --max_num_models 3 --num_samples 2 --save_freq 2 --eval_freq 4"
).split()
TINY = (
    "--dataset digits --model SmallConvNet --train_limit 60 --batch_size 25 --num_eigs 4 --num_bottom 2 "
    "--density_steps 12 --include 15.*"
).split()  # the last layer: 330 of 15,554 weights, small enough for dense matrices


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        assert train.main(["--dir", str(path), *TRAIN]) == 0
    return path


def run(path: Path, *more: str) -> int:
    with redirect_stdout(StringIO()):
        return hessian_eigs.main(["--dir", str(path), *TINY, *more])


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    for cell in found["cells"]:
        del cell["seconds"]
        cell.pop("products", None)  # a resumed run spends one to see that the matrix is the same
    return found


def dense_hessian(trained: Path, *, bn_train: bool = False) -> Tensor:
    """The Hessian of the last layer by torch, in float64 and one batch at a time, ragged as the batches are."""
    data = load_dataset("digits", None, train_limit=60, device=torch.device("cpu"))
    model = build_model("SmallConvNet", 10, channels=1, image_size=8)
    read_weights(trained / "weights.safetensors").load_into_(model)
    model = model.double().train(bn_train)
    names = ["15.weight", "15.bias"]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    theta = torch.cat([parameters[name].flatten() for name in names])
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for inputs, targets in data.train.batches(25):
        wide = inputs.double()

        def loss(vector: Tensor, x: Tensor = wide, y: Tensor = targets) -> Tensor:
            own = {"15.weight": vector[:320].view(10, 32), "15.bias": vector[320:]}
            buffers = {name: value.clone() for name, value in model.named_buffers()}
            return cross_entropy(functional_call(model, ({**parameters, **own}, buffers), (x,)), y)

        total += hessian(loss)(theta) * len(targets) / 60
    return total


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_both_ends_are_those_of_the_dense_matrix(bn_mode: str, trained: Path, tmp_path: Path) -> None:
    assert (
        run(tmp_path / "run", "--file", str(trained), "--bn_mode", bn_mode, "--tol", "1e-5", "--max_products", "400")
        == 0
    )
    [cell] = results(tmp_path / "run")["cells"]
    matrix = dense_hessian(trained, bn_train=bn_mode == "train")
    values = torch.linalg.eigvalsh(matrix).flip(0)
    largest = float(values[0])
    expected = torch.cat([values[:4], values[-2:]]).tolist()
    assert cell["parameters"] == 330 and cell["images"] == 60 and all(cell["converged"])
    assert cell["eigenvalues"] == pytest.approx(expected, abs=3e-5 * largest)
    assert max(cell["residuals"]) <= 1e-5 * largest * 1.01
    # one probe of random signs: its standard deviation is at most that of a normal one
    assert abs(cell["density"]["trace"] - float(values.sum())) < 4 * float(matrix.square().sum().mul(2).sqrt())


def test_it_writes_what_it_says(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert run(path, "--file", str(trained), "--save_vectors") == 0
    written = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert written == {
        "results.json", "eigs.npz", "spectrum.png", "log.jsonl", "settings.json", "environment.json", "command.sh",
        "cells/run-SGD.json", "cells/run-SGD-eigenvectors.npy",
    }  # fmt: skip
    [cell] = results(path)["cells"]
    with np.load(path / "eigs.npz") as arrays:
        assert arrays["run-SGD/eigenvalues"].tolist() == cell["eigenvalues"]
        vectors = torch.from_numpy(arrays["run-SGD/eigenvectors"]).double()
        assert (arrays["pos_evals"] > 0).all() and (arrays["neg_evals"] < 0).all()
        assert len(arrays["pos_evals"]) + len(arrays["neg_evals"]) <= 6
    matrix = dense_hessian(trained)
    residual = (matrix @ vectors - vectors * torch.tensor(cell["eigenvalues"])).norm(dim=0)
    assert residual.max() <= 1.1e-3 * cell["eigenvalues"][0]
    picture = imread(path / "spectrum.png")
    assert picture.shape[1] >= 1000 and picture[..., :3].std() > 0.02


@pytest.mark.parametrize("operator", ["ggn", "fisher", "empirical_fisher"])
def test_other_matrices(operator: str, trained: Path, tmp_path: Path) -> None:
    """On a linear last layer the Hessian is the GGN, and the expected Fisher matrix of cross-entropy is both."""
    assert (
        run(tmp_path / "run", "--file", str(trained), "--operator", operator, "--num_bottom", "0", "--tol", "1e-5") == 0
    )
    [cell] = results(tmp_path / "run")["cells"]
    expected = torch.linalg.eigvalsh(dense_hessian(trained)).flip(0)[:4].tolist()
    assert all(value > 0 for value in cell["eigenvalues"])
    if operator == "empirical_fisher":
        assert cell["eigenvalues"] != pytest.approx(expected, rel=1e-2)
    else:
        assert cell["eigenvalues"] == pytest.approx(expected, abs=1e-4 * expected[0])


def test_along_training_and_at_samples_of_the_posterior(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    files = ",".join(str(trained / f"checkpoint-{epoch}.safetensors") for epoch in (2, 4))
    more = ["--file", files, "--posterior", str(trained / "posterior.safetensors"), "--samples", "2"]
    assert run(path, *more) == 0
    cells = results(path)["cells"]
    assert [cell["epoch"] for cell in cells] == [2, 4, None, None]
    assert [cell["label"] for cell in cells] == ["checkpoint-2", "checkpoint-4", "sample 1", "sample 2"]
    tops = [cell["eigenvalues"][0] for cell in cells]
    assert len(set(tops)) == 4
    assert imread(path / "along.png")[..., :3].std() > 0.02


def test_an_interrupted_run_goes_on_and_ends_in_the_same_numbers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ",".join(str(trained / f"checkpoint-{epoch}.safetensors") for epoch in (2, 4))
    assert run(tmp_path / "whole", "--file", files) == 0
    density = hessian_eigs.density_of
    calls = []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return density(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hessian_eigs, "density_of", killed)
        try:
            status = run(tmp_path / "run", "--file", files)
        except KeyboardInterrupt:
            status = 130
    assert status != 0 and not (tmp_path / "run" / "results.json").exists()
    assert run(tmp_path / "run", "--file", files, "--resume") == 0
    whole, own = results(tmp_path / "whole"), results(tmp_path / "run")
    assert own["cells"] == whole["cells"]
    assert not list((tmp_path / "run").glob("lanczos-*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--file or --posterior is needed"),
        (["--file", "RUN", "--num_eigs", "-1"], "--num_eigs must be at least 0; got -1"),
        (["--file", "RUN", "--tol", "0"], "--tol must be between 0 and 1; got 0.0"),
        (["--file", "RUN", "--max_products", "5"], "--max_products must be at least 6, one a pair; got 5"),
        (["--file", "RUN", "--num_eigs", "0", "--num_bottom", "0", "--density_probes", "0"], "nothing to compute"),
        (["--file", "RUN", "--include", "nothing.*"], "--include nothing.*: "),
        (["--file", "RUN", "--num_eigs", "330"], "the matrix has 330 eigenvalues; got 332"),
        (["--file", "RUN", "--source", "EMA"], "--source EMA: "),
        (["--file", "RUN/none.pt"], "there is no such file"),
        (["--file", "RUN", "--model", "MobileNetV2"], "are of another network"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    argv: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [value.replace("RUN", str(trained)) for value in argv]
    try:
        status = hessian_eigs.main(["--dir", str(tmp_path / "run"), *TINY, "--max_products", "400", *argv])
    except SystemExit as stop:  # from the parser
        status = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"{PROG}: error: ") and message in captured.err
    assert not (tmp_path / "run").exists()
