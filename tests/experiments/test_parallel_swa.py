"""Weight averaging by several processes: one in this process, two by torchrun, shards and refusals."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import parallel_swa
from experiments.datasets import load_dataset
from experiments.low_precision_methods import new_model
from experiments.parallel_methods import measure
from experiments.parallel_workers import Shard, Workers
from experiments.training_data import TrainingBatches

CPU = torch.device("cpu")
TINY = (
    "--dataset digits --model SmallConvNet --train_limit 300 --eval_limit 200 --large_batch 100 --large_epochs 6 "
    "--large_lr 0.2 --small_batch 30 --small_epochs 2 --small_lr 0.1 --num_samples 2 --device cpu --threads 1"
).split()
ROOT = Path(__file__).resolve().parents[2]


def alone(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> int:
    """Run the script in this process, as torchrun would start one worker."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    return parallel_swa.main(["--dir", str(path), *TINY, *more])


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def torchrun(*script: str) -> str:
    """Start two workers; return what they print."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel") / "run"
    printed = torchrun("-m", "experiments.parallel_swa", "--dir", str(path), *TINY, "--seeds", "2")
    assert printed.count("majority class (baseline)") == 1  # one worker prints
    return path


@pytest.mark.slow
def test_two_workers(two_workers: Path) -> None:
    found = results(two_workers)
    assert found["order"] == [
        "majority class", "large batch", "small batch", "SWAP, one worker", "SWAP, ensemble", "SWAP, SWAG", "SWAP",
    ]  # fmt: skip
    chance = found["summary"]["majority class"]["error"]["mean"]
    for method in found["order"][1:]:
        assert found["summary"][method]["error"]["mean"] < chance - 20
        assert found["summary"][method]["seconds"]["mean"] > 0
    for cell in found["cells"]:
        assert cell["workers"] == 2 and cell["distance"] > 0.01  # they went different ways
        assert cell["methods"]["large batch"]["seconds"] < cell["methods"]["SWAP"]["seconds"]
    assert imread(two_workers / "methods.png")[..., :3].std() > 0.01


@pytest.mark.slow
def test_swap_is_the_mean_of_the_workers(two_workers: Path) -> None:
    """From the weights on disk: the mean's predictions are SWAP's, the members' the single workers'."""
    cell = results(two_workers)["cells"][0]
    saved = lb.load_posterior(two_workers / "workers-1.safetensors")
    assert isinstance(saved, lb.EmpiricalPosterior) and saved.num_members == 2
    settings = parallel_swa.Settings(dataset="digits", eval_limit=200)
    data = load_dataset("digits", None, use_test=True, train_limit=300, device=CPU)
    model = new_model(settings, data, CPU, 1)
    mean = measure(settings, data, model, saved.members().mean(0), 1)
    assert mean["nll"] == pytest.approx(cell["methods"]["SWAP"]["nll"], rel=1e-4)
    nll = [measure(settings, data, model, theta, 1)["nll"] for theta in saved.members()]
    assert sum(nll) / 2 == pytest.approx(cell["methods"]["SWAP, one worker"]["nll"], rel=1e-4)


PHASE_ONE = """
import sys
import torch
from torch import nn
import lowrank_bdl as lb
from experiments.datasets import load_dataset
from experiments.parallel_methods import large_phase
from experiments.parallel_swa import Settings
from experiments.parallel_workers import Workers, started

settings = Settings(dataset="digits", large_batch=60, large_epochs=4, stop_accuracy=2)

def weights_after(workers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    large_phase(settings, load_dataset("digits", None, train_limit=190, device=workers.device), workers, model, 1)
    return lb.ParameterLayout.from_module(model).flatten(model)

with started("cpu") as workers:
    everyone = workers.gather(weights_after(workers))
    if workers.leads:
        whole = weights_after(Workers(0, 1, workers.device))
        torch.save({"everyone": everyone, "whole": whole}, sys.argv[1])
    workers.wait()
"""


@pytest.mark.slow
def test_large_batches_are_the_same_however_many_share_them(tmp_path: Path) -> None:
    """Without batch norm: two workers on half of each batch take the steps of one on all of it."""
    (tmp_path / "phase_one.py").write_text(PHASE_ONE)
    torchrun(str(tmp_path / "phase_one.py"), str(tmp_path / "weights.pt"))
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert found["everyone"].shape == (2, 64 * 16 + 16 + 170)
    assert torch.equal(found["everyone"][0], found["everyone"][1])
    torch.testing.assert_close(found["everyone"][0], found["whole"], rtol=1e-4, atol=1e-6)


def test_one_worker_stops_early_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--seeds", "1", "--stop_accuracy", "0.2", "--no_control"]
    assert alone(monkeypatch, tmp_path / "run", *flags) == 0
    found = results(tmp_path / "run")
    assert found["order"] == ["majority class", "large batch", "SWAP, one worker", "SWAP, ensemble", "SWAP"]
    cell = found["cells"][0]
    assert cell["large_epochs"] < 6 and cell["large_train_accuracy"] >= 0.2
    assert cell["methods"]["SWAP"]["nll"] == pytest.approx(cell["methods"]["SWAP, one worker"]["nll"], rel=1e-6)
    before = (tmp_path / "run" / "cells" / "seed-1.json").read_bytes()
    assert alone(monkeypatch, tmp_path / "run", *flags, "--resume") == 0
    assert (tmp_path / "run" / "cells" / "seed-1.json").read_bytes() == before
    assert alone(monkeypatch, tmp_path / "run", *flags, "--resume", "--small_lr", "0.2") == 2
    assert "small_lr was 0.1, now 0.2" in capsys.readouterr().err


def test_shards_are_a_batch_together() -> None:
    data = load_dataset("digits", None, train_limit=70, device=CPU)

    def shards(count: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        return [
            list(Shard(TrainingBatches(data, 30, torch.Generator().manual_seed(0), 1, False), rank, count))
            for rank in range(count)
        ]

    whole, parts = shards(1)[0], shards(3)
    assert len(whole) == 2 and all(len(part) == 2 for part in parts)  # the last 10 of 70 are left out
    for step, (inputs, targets) in enumerate(whole):
        for part, own in enumerate(parts):
            assert torch.equal(own[step][0], inputs[part::3]) and torch.equal(own[step][1], targets[part::3])


def test_refuses_what_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        ("--large_batch 301", "--large_batch must be at most the 300 training images; got 301"),
        ("--model Unknown", "Unknown"),
    ):
        assert alone(monkeypatch, tmp_path / "run", *flags.split()) == 2
        assert message in capsys.readouterr().err
    for flags, message in (
        ("--large_lr 0", "--large_lr must be positive; got 0.0"),
        ("--small_epochs 0", "--small_epochs must be at least 1; got 0"),
        ("--momentum 1", "--momentum must be at least 0 and less than 1; got 1.0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            alone(monkeypatch, tmp_path / "run", *flags.split())
        assert message in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    assert parallel_swa.main(["--dir", str(tmp_path / "run"), *TINY]) == 2
    assert "workers are started by torchrun" in capsys.readouterr().err
    with pytest.raises(parallel_swa.SettingsError, match="must be a multiple of the 3 workers; got 100"):
        parallel_swa.load(parallel_swa.Settings(dataset="digits", large_batch=100), Workers(0, 3, CPU))
    assert not (tmp_path / "run").exists()
