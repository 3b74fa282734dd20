"""The main job, end to end at a tiny size: what it writes, what it refuses, and resume after a kill."""

import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import quickstart
from experiments.evaluation import average_curve

ROOT = Path(__file__).parents[2]
TINY = "--epochs 6 --swa_start 2 --train_size 60 --num_samples 4 --rank 3 --width 2".split()
METHODS = ["SGD", "SWA", "SWAG-Diag", "SWAG"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("quickstart") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert quickstart.main(["--dir", str(path), *TINY]) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    """What must not depend on how long a run took, or on whether it was interrupted."""
    found = json.loads((path / "results.json").read_text())
    del found["seconds"]
    for name in ("dir", "resume"):
        del found["settings"][name]
    return found


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {file.name for file in finished.iterdir()}
    assert names == {*quickstart.OUTPUTS, "settings.json", "environment.json", "command.sh"}
    for name in quickstart.FIGURES:
        picture = imread(finished / f"{name}.png")
        assert picture.shape[0] >= 400 and picture.shape[1] >= 600 and picture[..., :3].std() > 0.02
    newest = max(finished.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "results.json"


def test_results_are_complete_and_possible(finished: Path) -> None:
    found = results(finished)
    assert list(found["methods"]) == sorted(METHODS) and found["snapshots"] == 4
    for splits in found["methods"].values():
        assert set(splits) == {"validation", "test", "shifted"}
        for metrics in splits.values():
            assert 0 <= metrics["accuracy"] <= 1 and 0 <= metrics["ece"] <= 1
            assert 0 <= metrics["brier"] <= 2 and metrics["nll"] > 0
        assert 0 <= splits["test"]["shift_auroc"] <= 1
    gaussian = found["posteriors"]
    assert gaussian["SWAG-Diag"]["rank"] == 0 and gaussian["SWAG"]["rank"] == 3
    for posterior in gaussian.values():
        # log p(θ) of a draw is −entropy on average, with a standard deviation of sqrt(D / 2) nats for one draw
        dim = posterior["parameters"]
        gap = posterior["log_density_of_draws_nats"] + posterior["entropy_nats"]
        assert abs(gap) < 5 * (dim / 2 / 4) ** 0.5
        assert posterior["log_density_at_mean_nats"] - posterior["log_density_of_draws_nats"] > 0
        assert posterior["peak_bytes"] > 4 * dim * 4  # four float32 draws


def test_the_table_shows_every_method(finished: Path) -> None:
    lines = (finished.parent / "stdout").read_text().splitlines()
    assert lines[0] == "digits: 60 training, 597 validation, 1,000 test images"
    assert lines[2].split() == ["method", "accuracy", "%", "NLL", "ECE", "%", "Brier", "shift", "AUROC"]
    assert [line.split()[0] for line in lines[4:8]] == METHODS
    test = results(finished)["methods"]["SWAG"]["test"]
    assert lines[7].split()[1:3] == [f"{100 * test['accuracy']:.2f}", f"{test['nll']:.4f}"]


def test_the_saved_posterior_is_the_one_reported(finished: Path) -> None:
    posterior = lb.GaussianPosterior.load(finished / "posterior.safetensors")
    reported = results(finished)["posteriors"]["SWAG"]
    assert posterior.mean.numel() == reported["parameters"]
    assert posterior.entropy().item() == pytest.approx(reported["entropy_nats"], rel=1e-6)
    assert posterior.log_prob(posterior.mean).item() == pytest.approx(reported["log_density_at_mean_nats"], rel=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the global generator must not matter, nor be changed
    before = torch.get_rng_state()
    assert quickstart.main(["--dir", str(tmp_path / "same"), *TINY]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert results(tmp_path / "same") == results(finished)
    assert quickstart.main(["--dir", str(tmp_path / "other"), "--seed", "1", *TINY]) == 0
    assert results(tmp_path / "other")["methods"] != results(finished)["methods"]


def test_rank_0_runs(tmp_path: Path) -> None:
    assert quickstart.main(["--dir", str(tmp_path / "run"), *TINY, "--rank", "0"]) == 0
    assert results(tmp_path / "run")["posteriors"]["SWAG"]["rank"] == 0


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--dataset", "FashionMNIST"], "unknown data set 'FashionMNIST'; known are digits, MNIST, CIFAR10"),
        (["--dataset", "MNIST"], "--dataset MNIST needs --data_path, the folder that holds its files"),
        (["--dataset", "MNIST", "--data_path", "nowhere"], "--data_path nowhere: there is no such folder"),
        (["--rank", "-1"], "--rank must be at least 0; got -1"),
        (["--epochs", "5", "--swa_start", "5"], "--epochs must be more than --swa_start; got 5 and 5"),
        (["--epochs", "4", "--start", "5"], "--epochs must be more than --swa_start; got 4 and 5"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (["--epochs", "6", "--start", "5"], "SWAG needs at least 2 snapshots: more --epochs, or more"),
        (["--scale", "0"], "--scale must be positive; got 0.0"),
        (["--lr_init", "nan"], "--lr_init must be positive; got nan"),
        (["--num_samples", "0"], "--num_samples must be at least 1; got 0"),
        (["--rank", "2.5"], "argument --rank: invalid int value: '2.5'"),
        (["--train_size", "9999"], "the number of training images must be 1 to 200 for digits; got 9999"),
        (["--device", "tpu9"], "--device tpu9: "),
        (["--resume"], "--resume: there is no run in runs"),
    ],
)
def test_what_cannot_run_is_one_line_and_writes_nothing(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = quickstart.main(argv)
    except SystemExit as stop:  # from the parser
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith(f"python -m experiments.quickstart: error: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_resume_with_another_rank_is_refused_and_touches_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    assert quickstart.main(["--dir", str(finished), *TINY, "--rank", "2", "--resume"]) == 2
    assert "rank was 3, now 2" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_average_curve_ends_at_the_nll_of_the_mean_probability() -> None:
    log_likelihood = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).sub(2).double()
    mean, low, high = average_curve(log_likelihood, seed=0)
    one_by_one = -log_likelihood.mean().item()
    together = -log_likelihood.exp().mean(0).log().mean().item()
    assert mean[-1] == pytest.approx(together, rel=1e-12) and low[-1] == pytest.approx(high[-1], rel=1e-12)
    assert mean[0] == pytest.approx(one_by_one, abs=0.1)
    assert (np.diff(mean) < 0).all()  # Jensen: more samples never hurt on average


def command(path: Path, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "experiments.quickstart", "--dir", str(path), *TINY, "--epochs", "40", *more]
    return argv


@pytest.mark.slow
def test_a_killed_process_resumes_to_identical_results(tmp_path: Path) -> None:
    whole = subprocess.run(command(tmp_path / "whole"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr

    killed = subprocess.Popen(command(tmp_path / "run"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"swag", "epoch": 9' in log.read_text()):
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the process ended before it was killed"
    assert not (tmp_path / "run" / "results.json").exists()
    assert '"swag", "epoch": 40' not in log.read_text()

    again = subprocess.run(command(tmp_path / "run", "--resume"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert log.read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    # the tables are the same; the last line names the folder
    assert again.stdout.splitlines()[:-1] == whole.stdout.splitlines()[:-1]


@pytest.mark.slow
def test_help_is_worth_reading() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for word in ("SWAG-Diag", "--swa_start", "--start", "(default: 20)", "runs/quickstart", "posterior.safetensors"):
        assert word in result.stdout
    assert "(default: None)" not in result.stdout
