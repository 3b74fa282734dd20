"""The gradient-noise script end to end at a tiny size: what it measures, writes and refuses, and going on."""

import csv
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from experiments import grad_cov, train_report
from experiments.datasets import load_dataset
from experiments.grad_cov import Settings, check, measure, measured
from experiments.train_setup import make_trainer, training_batches

PROG = "python -m experiments.grad_cov"
TINY = (
    "--dataset digits --model SmallConvNet --train_limit 90 --batch_size 16 --epochs 5 --lr_init 0.05 --swa "
    "--swa_start 1 --swa_lr 0.02 --cov_mat --max_num_models 3 --num_samples 2 --grad_cov_start 1 --grad_cov_freq 2"
).split()


def run(path: Path, *more: str) -> int:
    with redirect_stdout(StringIO()):
        return grad_cov.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grad_cov") / "run"
    assert run(path) == 0
    return path


def found(path: Path) -> list[dict[str, Any]]:
    record: dict[str, Any] = json.loads((path / "grad_cov.json").read_text())
    assert record["schema"] == 1 and record["batch_size"] == 16 and record["parameters"] == 15_554
    return list(record["epochs"])


def settings_of(**changes: Any) -> Settings:
    values: dict[str, Any] = dict(
        dir="d", dataset="digits", model="SmallConvNet", train_limit=90, batch_size=16, epochs=2, grad_cov_start=0
    )
    return check(Settings(**(values | changes)))


def test_it_writes_what_it_says(finished: Path) -> None:
    rows = found(finished)
    assert [row["epoch"] for row in rows] == [2, 4]
    for row in rows:
        assert row["gradients"] == 6 and len(row["eigenvalues"]) == 5
        assert row["eigenvalues"] == sorted(row["eigenvalues"], reverse=True)
        assert sum(row["eigenvalues"]) <= row["trace"] * (1 + 1e-5)  # six gradients, all kept: V has rank 5
        assert sum(row["eigenvalues"]) == pytest.approx(row["trace"], rel=1e-4)
        assert row["optimal_learning_rate"] == pytest.approx(2 * (1 - 0.9) * 15_554 / (90 * row["trace"]))
    assert "swag_share" not in rows[0] and 0 < rows[1]["swag_share"] < 1 and rows[1]["swag_directions"] == 2
    with open(finished / "grad_cov.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["trace"]) for line in lines] == [row["trace"] for row in rows]
    assert float(lines[1]["eigenvalue_5"]) == rows[1]["eigenvalues"][4] and lines[0]["swag_share"] == ""
    picture = imread(finished / "grad_cov.png")
    assert picture.shape[0] >= 600 and picture[..., :3].std() > 0.02
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log if "grad_cov" in record] == [2, 4]
    assert (finished / "results.json").exists()


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_the_noise_is_that_of_the_training_batches(bn_mode: str) -> None:
    """Against the gradients one by one, with the network in the mode that is asked for."""
    settings = settings_of(bn_mode=bn_mode)
    device = torch.device("cpu")
    data = load_dataset("digits", None, train_limit=90, device=device)
    trainer = make_trainer(settings, data, device)
    trainer.epoch = 1
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    own = measure(settings, trainer, data)["grad_cov"]
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    parameters = {name: value.detach().requires_grad_() for name, value in trainer.model.named_parameters()}
    gradients, sizes = [], []
    trainer.model.train(bn_mode == "train")
    for inputs, targets in training_batches(settings, data, torch.Generator().manual_seed(100_003 * settings.seed + 1)):
        buffers = {name: value.clone() for name, value in trainer.model.named_buffers()}
        loss = cross_entropy(functional_call(trainer.model, (parameters, buffers), (inputs,)), targets)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
        gradients.append(flat.double())
        sizes.append(len(targets))
    g, s = torch.stack(gradients), torch.tensor(sizes, dtype=torch.float64)
    assert sizes == [16] * 5 + [10]
    mean = s @ g / s.sum()
    trace = (s[:, None] * (g - mean).square()).sum() / (len(s) - 1) / 16
    assert own["trace"] == pytest.approx(float(trace), rel=1e-4)
    assert own["squared_gradient_norm"] == pytest.approx(float(mean.square().sum() - trace * 16 / s.sum()), rel=1e-3)
    assert own["noise_scale"] == pytest.approx(16 * own["trace"] / own["squared_gradient_norm"])


def test_a_measurement_of_few_batches_that_keeps_no_gradient() -> None:
    device = torch.device("cpu")
    data = load_dataset("digits", None, train_limit=90, device=device)
    settings = settings_of(grad_cov_batches=3, grad_cov_rank=0)
    trainer = make_trainer(settings, data, device)
    trainer.epoch = 2
    own = measure(settings, trainer, data)["grad_cov"]
    assert own["gradients"] == 3 and "eigenvalues" not in own
    assert own["noise_scale"] == pytest.approx(16 * own["trace"] / own["squared_gradient_norm"])


def test_an_interrupted_run_measures_the_same(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_report, "draw_figures", lambda *_: None)
    whole = grad_cov.measure

    def stop(settings: Settings, trainer: Any, data: Any) -> dict[str, Any]:
        if trainer.epoch == 4:
            raise KeyboardInterrupt
        return whole(settings, trainer, data)

    with monkeypatch.context() as patch:
        patch.setattr(grad_cov, "measure", stop)
        try:
            status = run(tmp_path / "run")
        except KeyboardInterrupt:
            status = 130
    assert status != 0 and not (tmp_path / "run" / "grad_cov.json").exists()
    assert run(tmp_path / "run", "--resume", "auto") == 0
    assert found(tmp_path / "run") == found(finished)


def test_which_epochs_are_measured() -> None:
    settings = settings_of(epochs=9, grad_cov_start=3, grad_cov_freq=2)
    assert measured(settings, 9) == [4, 6, 8]
    assert measured(settings, 3) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--grad_cov_start", "5"], "--grad_cov_start must be less than --epochs; got 5 and 5"),
        (["--grad_cov_start", "-1"], "--grad_cov_start must be at least 0; got -1"),
        (["--grad_cov_freq", "0"], "--grad_cov_freq must be at least 1; got 0"),
        (["--grad_cov_batches", "1"], "--grad_cov_batches must be at least 2; got 1"),
        (["--grad_cov_rank", "-2"], "--grad_cov_rank must be at least 0; got -2"),
        (
            ["--batch_size", "90"],
            "--batch_size 90: a covariance needs at least 2 batches; there are 90 training images",
        ),
        (["--momentum", "1"], "--momentum must be less than 1; got 1.0"),
        (["--loss", "adv_CE"], "--loss adv_CE: the noise is that of the plain cross-entropy"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = grad_cov.main(["--dir", str(tmp_path / "run"), *TINY, *argv])
    except SystemExit as stop:  # from the parser
        status = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"{PROG}: error: ") and message in captured.err
    assert not (tmp_path / "run").exists()
