"""Fast geometric ensembling end to end at a tiny size: which networks are met, what is compared, going on, refusals."""

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
from experiments import fge, fge_report, train, train_report
from experiments.datasets import load_dataset
from experiments.fge_report import Predicted, at_equal_budget, measure
from experiments.models import build_model
from experiments.train_setup import AUGMENTATION
from experiments.train_weights import read_weights
from experiments.training_data import AsTrained
from lowrank_bdl.training import checkpoints
from lowrank_bdl.training.trainer import Trainer

PROG = "python -m experiments.fge"
TRAIN = (
    "--dataset digits --model SmallConvNet --train_limit 64 --batch_size 16 --lr_init 0.05 --no_schedule "
    "--num_samples 2 --threads 1 --eval_freq 9"
).split()
TINY = "--epochs 6 --cycle 2 --lr_1 0.05 --lr_2 0.001 --eval_limit 50 --threads 1".split()


@pytest.fixture(autouse=True)
def no_figures_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_report, "draw_figures", lambda *_: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds three finished training runs, 1, 2 and 3: the first two to go on from, the last to compare with."""
    folder = tmp_path_factory.mktemp("fge")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        for seed, epochs in ((1, 2), (2, 2), (3, 5)):
            flags = ["--dir", str(folder / str(seed)), "--seed", str(seed), "--epochs", str(epochs)]
            assert train.main([*TRAIN, *flags]) == 0
    return folder


def run(path: Path, *flags: str) -> int:
    with redirect_stdout(StringIO()):
        return fge.main(["--dir", str(path), *flags])


def flags_for(trained: Path) -> list[str]:
    return ["--run", f"{trained}/1,{trained}/2", "--independent", f"{trained}/3,{trained}/2", *TINY]


@pytest.fixture(scope="module")
def finished(trained: Path) -> Path:
    path = trained / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        assert run(path, *flags_for(trained)) == 0
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return {key: found[key] for key in ("results", "equal_budget", "reported_on")}


def snapshots(finished: Path, number: int) -> torch.Tensor:
    posterior = lb.load_posterior(finished / f"fge-{number}" / "snapshots.safetensors")
    assert isinstance(posterior, lb.EmpiricalPosterior)
    return posterior.thetas


def test_networks_are_kept_where_the_learning_rate_is_lowest(finished: Path) -> None:
    """Cycles of 2 epochs with 4 batches each: after epochs 1, 3 and 5 the rate is --lr_2, and the network is kept."""
    assert len(snapshots(finished, 1)) == 3
    state, _, _ = checkpoints.read(finished / "fge-1" / "checkpoint.safetensors")
    rates = [record["lr"] for record in state["history"]]  # at the start of each epoch
    assert rates == pytest.approx([0.05, 0.001] * 3)
    records = results(finished)["results"]["FGE ensemble"]
    assert [(r["run"], r["epochs"], r["networks"]) for r in records[:3]] == [(1, 3, 1), (1, 5, 2), (1, 7, 3)]


def test_numbers_are_those_of_the_average_predictions(trained: Path, finished: Path) -> None:
    """By hand: each network with batch-norm statistics of its own; probabilities are averaged, and weights for SWA."""
    data = load_dataset("digits", None, train_limit=64, device=torch.device("cpu"))
    images = data.validation.first(50)
    bn = list(AsTrained(data.train, *AUGMENTATION["digits"], data.black).batches(500))
    model = build_model("SmallConvNet", 10, channels=1, image_size=8)

    def probabilities(theta: torch.Tensor) -> torch.Tensor:
        lb.ParameterLayout.from_module(model).assign_(model, theta)
        lb.recalibrate_batch_norm_(model, bn)
        with torch.no_grad():
            return model.eval()(images.inputs).double().softmax(-1)

    def nll(average: torch.Tensor) -> float:
        return -average[torch.arange(50), images.targets].log().mean().item()

    found = results(finished)["results"]
    thetas = snapshots(finished, 1)
    first_two = torch.stack([probabilities(theta) for theta in thetas[:2]]).mean(0)
    ensemble = found["FGE ensemble"][1]
    assert ensemble["nll"] == pytest.approx(nll(first_two), rel=1e-5)
    assert ensemble["accuracy"] == (first_two.argmax(1) == images.targets).double().mean().item()
    assert found["FGE network"][2]["nll"] == pytest.approx(nll(probabilities(thetas[2])), rel=1e-5)
    assert found["SWA"][2]["nll"] == pytest.approx(nll(probabilities(thetas.mean(0))), rel=1e-4)
    every = torch.stack([probabilities(theta) for number in (1, 2) for theta in snapshots(finished, number)]).mean(0)
    last = found["FGE, all runs"][-1]
    assert (last["epochs"], last["networks"]) == (16, 6) and last["nll"] == pytest.approx(nll(every), rel=1e-5)
    ends = [read_weights(trained / number / "weights.safetensors").last for number in ("3", "2")]
    pair = found["independent ensemble"][1]
    assert pair["epochs"] == 7 and pair["networks"] == 2
    assert pair["nll"] == pytest.approx(nll((probabilities(ends[0]) + probabilities(ends[1])) / 2), rel=1e-5)
    assert [record["epochs"] for record in found["independent, one network"]] == [5, 2]


def test_what_is_written(finished: Path) -> None:
    table = (finished / "table.txt").read_text()
    assert table.startswith("SmallConvNet on digits: 50 validation images, ± standard error")
    pairs = results(finished)["equal_budget"]
    assert [(p["budget"], p["fge"]["epochs"], p["fge"]["networks"]) for p in pairs] == [(5, 5, 2), (7, 7, 3)]
    (line,) = (line for line in table.splitlines() if line.startswith("7 epochs"))
    assert line.split()[2:5] == [
        "2",
        f"{100 * pairs[1]['independent']['accuracy']:.2f}",
        f"{pairs[1]['independent']['nll']:.4f}",
    ]
    assert line.split()[-1] == "7"
    assert imread(finished / "ensemble.png").ndim == 3
    with np.load(finished / "predictions-fge-1.npz") as arrays:
        assert arrays["probabilities"].shape == (3, 50, 10) and arrays["log_likelihood"].shape == (3, 50)


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(
    trained: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[None] = []
    train_epoch = Trainer.train_epoch

    def dies_in_epoch_8(trainer: Trainer, *args: Any, **options: Any) -> Any:
        done.append(None)
        if len(done) == 8:
            raise KeyboardInterrupt
        return train_epoch(trainer, *args, **options)

    monkeypatch.setattr(fge_report, "draw", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", dies_in_epoch_8)
        assert run(tmp_path, *flags_for(trained)) == 130
    assert (tmp_path / "fge-1" / "results.json").exists() and not (tmp_path / "results.json").exists()
    assert run(tmp_path, *flags_for(trained), "--resume") == 0
    assert results(tmp_path) == results(finished)
    with monkeypatch.context() as patch:  # nothing is predicted twice
        patch.setattr(lb, "predict", None)
        assert run(tmp_path, *flags_for(trained), "--resume") == 0
    assert results(tmp_path) == results(finished)


def test_predictions_of_other_networks_are_not_taken_over(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fge_report, "draw", lambda *_: None)
    flags = ["--run", str(trained / "1"), *TINY]
    assert run(tmp_path, *flags) == 0
    assert "independent ensemble" not in results(tmp_path)["results"] and results(tmp_path)["equal_budget"] == []
    before = results(tmp_path)
    path = tmp_path / "predictions-fge-1.npz"
    with np.load(path) as arrays:
        held = dict(arrays)
    held["identity"] = np.array("of something else")
    held["log_likelihood"] = 0 * held["log_likelihood"]
    np.savez(path, **held)
    assert run(tmp_path, *flags, "--resume") == 0 and results(tmp_path) == before


def test_budgets_are_compared_with_what_fge_has_by_then() -> None:
    targets = torch.tensor([0, 1])
    sure = torch.tensor([[0.9, 0.1], [0.2, 0.8]])

    def predicted(*epochs: int) -> Predicted:
        log_likelihood = sure[torch.arange(2), targets].log().expand(len(epochs), 2)
        return Predicted(list(epochs), sure.expand(len(epochs), 2, 2), log_likelihood, targets)

    runs, means = [predicted(3, 5), predicted(3, 5)], [predicted(3, 5)] * 2
    found = measure(runs, means, predicted(2, 4, 6, 20), total=6)
    pairs = at_equal_budget(found)
    epochs = [None if p["fge"] is None else (p["fge"]["epochs"], p["fge"]["networks"]) for p in pairs]
    assert epochs == [None, (3, 1), (6, 2), (12, 4)]
    assert found["independent ensemble"][0]["nll"] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2)
    assert "2 epochs" in fge_report.budget_table(found)
    assert fge_report.budget_table(measure(runs[:1], means[:1], None, 6)) == ""


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--run nowhere", "there is no run of experiments.train in nowhere"),
        ("--run ,", "--run must name at least one run"),
        ("--run {1} --cycle 3", "--cycle must be even, for its lowest point lies in the middle; got 3"),
        ("--run {1} --epochs 5", "--epochs must hold 1.5 cycles, for two networks; got 5 and 4"),
        ("--run {1} --lr_2 0.1", "--lr_2 not above; got 0.05, 0.1"),
        ("--run {1} --independent nowhere", "nowhere: there is no such file"),
        ("--run {1} --eval_limit 1", "--eval_limit must be at least 2; got 1"),
    ],
)
def test_what_cannot_run_is_one_line_and_nothing_is_written(
    flags: str, message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tmp_path / "new", *flags.replace("{1}", str(trained / "1")).split())
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith(f"{PROG}: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
