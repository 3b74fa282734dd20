"""The training script end to end at a tiny size: what it writes, what it refuses, and resume after kill -9."""

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

import lowrank_bdl as lb
from experiments import train
from experiments.datasets import load_dataset
from experiments.train_settings import Settings, check
from experiments.train_setup import make_trainer
from experiments.train_weights import read_weights
from lowrank_bdl.training import checkpoints

PROG = "python -m experiments.train"
TINY = (
    "--dataset digits --model SmallConvNet --train_limit 96 --batch_size 16 --epochs 6 --lr_init 0.05 --swa "
    "--swa_start 2 --swa_lr 0.02 --cov_mat --max_num_models 3 --num_samples 3 --ema --ema_decay 0.9 --polyak "
    "--eval_freq 2 --save_freq 4 --collects_per_epoch 2 --snapshots"
).split()
METHODS = ["SGD", "SWA", "SWAG-Diag", "SWAG", "Snapshots", "EMA", "Polyak"]


def run(path: Path, *more: str) -> int:
    return train.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("train") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in ("seconds", "dir", "resume")}
    return [without_times(value) for value in found] if isinstance(found, list) else found


def outcome(path: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on how long it took, or on whether it was killed."""
    state, _, settings = checkpoints.read(path / "checkpoint.safetensors")
    posterior = lb.GaussianPosterior.load(path / "posterior.safetensors")
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return {
        "results": without_times(json.loads((path / "results.json").read_text())),
        "log": without_times(log),
        "history": without_times(state["history"]),
        "settings": settings,
        "model": state["model"],
        "optimizer": state["optimizer"],
        "collections": state["collections"],
        "posterior": [posterior.mean, posterior.covariance.diag, posterior.covariance.root],
        "weights": dict(read_weights(path / "weights.safetensors").thetas),
    }


def assert_identical(found: Any, expected: Any, where: str = "run") -> None:
    """Compare trees to the last bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_identical(found[index], value, f"{where}.{index}")
    else:
        assert found == expected or (found != found and expected != expected), where


def test_a_run_writes_what_it_says(finished: Path) -> None:
    kept = {"checkpoint.safetensors", "checkpoint-4.safetensors"}
    plain = {name for name in train.OUTPUTS if "*" not in name}
    assert {file.name for file in finished.iterdir()} == plain | kept | {
        "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    for name in ("training.png", "reliability.png"):
        picture = imread(finished / name)
        assert picture.shape[0] >= 400 and picture.shape[1] >= 600 and picture[..., :3].std() > 0.02
    newest = max(finished.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "results.json"


def test_results_are_complete_and_possible(finished: Path) -> None:
    found = outcome(finished)["results"]
    assert sorted(found["methods"]) == sorted(METHODS) and found["snapshots"] == 8
    assert found["reported_on"] == "validation" and found["images"]["train"] == 96
    for splits in found["methods"].values():
        assert set(splits) == {"validation"}
        metrics = splits["validation"]
        assert 0 <= metrics["ece"] <= 1 and 0 <= metrics["brier"] <= 2 and metrics["nll"] > 0
        a, n = metrics["accuracy"], found["images"]["validation"]
        assert metrics["accuracy_se"] == pytest.approx((a * (1 - a) / (n - 1)) ** 0.5, rel=1e-9)
        assert all(metrics[f"{name}_se"] > 0 for name in ("nll", "brier", "ece"))


def test_the_table_shows_every_method(finished: Path) -> None:
    lines = (finished.parent / "stdout").read_text().splitlines()
    assert lines[0].startswith("SmallConvNet (15,554 parameters) on digits: 96 training images, 6 epochs")
    assert lines[3].split() == ["method", "accuracy", "%", "NLL", "ECE", "%", "Brier"]
    assert [line.split()[0] for line in lines[5:12]] == METHODS
    swag = outcome(finished)["results"]["methods"]["SWAG"]["validation"]
    shown = [f"{100 * swag['accuracy']:.2f}", "±", f"{100 * swag['accuracy_se']:.2f}", f"{swag['nll']:.4f}"]
    assert lines[8].split()[1:5] == shown


def test_the_log_has_a_line_an_epoch_and_evaluations_as_asked(finished: Path) -> None:
    log = outcome(finished)["log"]
    assert [record["epoch"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in log if "held_out" in record] == [2, 4, 6]
    assert [record["epoch"] for record in log if "held_out_swa" in record] == [4, 6]
    assert [round(record["lr"], 4) for record in log] == [0.05, 0.05, 0.02, 0.02, 0.02, 0.02]
    swa = outcome(finished)["results"]["methods"]["SWA"]["validation"]
    assert log[-1]["held_out_swa"]["nll"] == pytest.approx(swa["nll"], rel=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the global generator must not matter, nor be changed
    before = torch.get_rng_state()
    assert run(tmp_path / "same") == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert_identical(outcome(tmp_path / "same"), outcome(finished))
    assert run(tmp_path / "other", "--seed", "2") == 0
    assert outcome(tmp_path / "other")["results"]["methods"] != outcome(finished)["results"]["methods"]


def test_a_resume_from_a_kept_checkpoint_into_another_folder_is_the_same_run(finished: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", "--resume", str(finished / "checkpoint-4.safetensors")) == 0
    assert_identical(outcome(tmp_path / "run"), outcome(finished))


def test_a_longer_run_needs_no_new_start_where_the_schedule_does_not_change(finished: Path, tmp_path: Path) -> None:
    source = str(finished / "checkpoint.safetensors")
    assert run(tmp_path / "longer", "--resume", source, "--epochs", "8") == 0
    assert run(tmp_path / "whole", "--epochs", "8") == 0
    found, expected = outcome(tmp_path / "longer"), outcome(tmp_path / "whole")
    assert_identical(found["model"], expected["model"])
    assert_identical(found["collections"], expected["collections"])


def test_epochs_that_the_schedule_or_the_checkpoint_needs_cannot_change(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finished, "--resume", "auto", "--epochs", "5") == 2
    assert "--epochs 5: " in capsys.readouterr().err
    plain = "--dataset digits --model SmallConvNet --train_limit 96 --num_samples 2 --epochs".split()
    assert train.main(["--dir", str(tmp_path / "run"), *plain, "2"]) == 0
    assert train.main(["--dir", str(tmp_path / "run"), *plain, "3", "--resume", "auto"]) == 2
    assert "settings differ: epochs was 2, now 3" in capsys.readouterr().err


def test_collected_weights_can_be_carried_over(finished: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", "--swa_resume", str(finished / "checkpoint.safetensors")) == 0
    assert outcome(tmp_path / "run")["results"]["snapshots"] == 16


@pytest.mark.parametrize(
    "flags,methods",
    [
        ("--optimizer Adam --lr_init 0.01 --swa_lr 0.005 --schedule cosine", METHODS[1:]),
        ("--optimizer AdamW --lr_init 0.01 --swa_lr 0.005 --schedule step", METHODS[1:]),
        ("--schedule cyclical --swa_c_epochs 2 --collects_per_epoch 1", METHODS),
        ("--loss adv_CE --prior_var 1.0 --no_schedule --grad_clip 1", METHODS),
        ("--include 15.* --augment none", METHODS),
        ("--amp bfloat16 --channels_last --bn_size 50", METHODS),
        ("--use_test", METHODS),
    ],
)
def test_other_ways_of_training_run(flags: str, methods: list[str], tmp_path: Path) -> None:
    assert run(tmp_path / "run", *flags.split(), "--epochs", "5") == 0
    found = outcome(tmp_path / "run")["results"]
    assert set(methods) <= set(found["methods"])
    assert found["reported_on"] == ("test" if "use_test" in flags else "validation")


def test_plain_sgd_and_swag_diag_alone(tmp_path: Path) -> None:
    plain = "--dataset digits --model SmallConvNet --train_limit 96 --epochs 2 --num_samples 2".split()
    assert train.main(["--dir", str(tmp_path / "sgd"), *plain]) == 0
    assert list(json.loads((tmp_path / "sgd" / "results.json").read_text())["methods"]) == ["SGD"]
    assert not (tmp_path / "sgd" / "posterior.safetensors").exists()
    argv = ["--dir", str(tmp_path / "diag"), *plain, "--swa", "--swa_start", "0"]
    assert train.main(argv) == 0
    assert set(json.loads((tmp_path / "diag" / "results.json").read_text())["methods"]) == {"SGD", "SWA", "SWAG-Diag"}
    assert lb.GaussianPosterior.load(tmp_path / "diag" / "posterior.safetensors").covariance.rank == 0


def test_corrupted_labels_are_trained_on(tmp_path: Path) -> None:
    data = load_dataset("digits")
    labels = np.zeros(len(data.train) + len(data.validation), dtype=np.int64)
    np.save(tmp_path / "labels.npy", labels)
    assert run(tmp_path / "run", "--label_arr", str(tmp_path / "labels.npy"), "--epochs", "4") == 0
    found = outcome(tmp_path / "run")
    assert found["log"][-1]["accuracy"] == 1.0  # every image is a zero now
    assert found["results"]["methods"]["SGD"]["validation"]["accuracy"] < 0.2
    assert found["results"]["data"]["label_arr"]["changed"] > 0


def test_the_adversarial_range_is_that_of_normalised_pixels() -> None:
    data = load_dataset("digits", train_limit=32)
    settings = check(Settings(dir="d", model="SmallConvNet", dataset="digits", loss="adv_CE"))
    with torch.random.fork_rng():
        loss = make_trainer(settings, data, torch.device("cpu")).loss
    assert loss.low.item() == pytest.approx(data.train.inputs.min().item(), rel=1e-5)
    assert loss.high.item() == pytest.approx(data.train.inputs.max().item(), rel=1e-5)


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--model", "VGG61"], "--model VGG61 is unknown; the closest known are"),
        (["--model", "VGG16"], "--model VGG16: "),
        (["--dataset", "CIFAR11"], "unknown data set 'CIFAR11'; known are CIFAR10"),
        (["--dataset", "MNIST"], "--dataset MNIST needs --data_path"),
        (["--dataset", "CIFAR10", "--data_path", "nowhere"], "--data_path nowhere: there is no such folder"),
        (["--epochs", "2"], "--swa_start must be less than --epochs; got 2 and 2"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (
            ["--swa_c_epochs", "4", "--collects_per_epoch", "1"],
            "SWAG needs at least 2 snapshots; these settings take 1",
        ),
        (["--schedule", "cyclical"], "--swa_c_epochs must be even for --schedule cyclical"),
        (["--schedule", "linear"], "argument --schedule: invalid choice: 'linear'"),
        (["--lr_init", "nan"], "--lr_init must be positive; got nan"),
        (["--scale", "0"], "--scale must be positive; got 0.0"),
        (["--ema_decay", "1"], "--ema_decay must be less than 1; got 1.0"),
        (["--optimizer", "LBFGS"], "argument --optimizer: invalid choice: 'LBFGS'"),
        (["--train_limit", "99999"], "the number of training images must be 1 to 200 for digits; got 99999"),
        (["--include", "body.*"], "--include body.*: include pattern 'body.*' matches none of"),
        (["--label_arr", "nowhere.npy"], "--label_arr nowhere.npy"),
        (["--split_classes", "1"], "--split_classes is 0 or 1, and for CIFAR10 alone"),
        (["--device", "tpu9"], "--device tpu9: "),
        (["--resume", "nowhere.safetensors"], "--resume nowhere.safetensors: there is no such file"),
        (["--swa_resume", "nowhere.safetensors"], "--swa_resume nowhere.safetensors: no such file"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_what_cannot_run_is_one_line_and_writes_nothing(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = run(Path("runs"), *argv)
    except SystemExit as stop:  # from the parser
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith(f"{PROG}: error: {message}"), captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flag", ["--cov_mat", "--snapshots", "--polyak", "--include=fc", "--swa_resume=x", "--schedule=cyclical"]
)
def test_collection_flags_need_swa(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        train.main(["--dir", str(tmp_path / "run"), "--model", "LeNet5", flag])
    assert "needs --swa, which collects weights" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def folder_state(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    "change,message",
    [
        ("--max_num_models 2", "max_num_models was 3, now 2"),
        ("--lr_init 0.1", "lr_init was 0.05, now 0.1"),
        ("--swa_start 1", "swa_start was 2, now 1"),
        ("--model PreResNet8", "model was 'SmallConvNet', now 'PreResNet8'"),
    ],
)
def test_a_resume_with_other_settings_is_refused_and_touches_nothing(
    change: str, message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folder_state(finished)
    assert run(finished, *change.split(), "--resume", "auto") == 2
    assert message in capsys.readouterr().err
    assert folder_state(finished) == before
    source = str(finished / "checkpoint.safetensors")
    assert run(tmp_path / "new", *change.split(), "--resume", source) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_corrupt_checkpoint_is_one_line_and_touches_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for name, content in folder_state(finished).items():
        (path / name).write_bytes(content)
    broken = path / "checkpoint.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    before = folder_state(path)
    assert run(path, "--resume", "auto") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{PROG}: error: --resume: {broken} is truncated or no safetensors file")
    assert error.count("\n") == 1 and folder_state(path) == before


def test_divergence_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--lr_init", "1e30", "--no_schedule") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{PROG}: error: training diverged: ") and "lower the learning rate" in error
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_network_that_does_not_give_the_classes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def three_logits(*_: object, **__: object) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    monkeypatch.setattr("experiments.train_setup.build_model", three_logits)
    assert run(tmp_path / "run") == 2
    assert "--model gives (2, 3) for 2 images of 10 classes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

# A fork server imports torch once, so that a process to kill costs its training alone.
PROCESSES = multiprocessing.get_context("forkserver")
EPOCHS, START = 24, 8


def start(path: Path) -> Any:
    flags = ["--epochs", str(EPOCHS), "--swa_start", str(START), "--threads", "1", "--resume", "auto"]
    PROCESSES.set_forkserver_preload(["experiments.train"])
    process = PROCESSES.Process(target=train.main, args=(["--dir", str(path), *TINY, *flags],))
    process.start()
    return process


def wait_until(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 300
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.0005)


def finish(path: Path) -> float:
    """Train to the end; return how long it trained, from its first write to its last epoch [s]."""
    process = start(path)
    wait_until((path / "settings.json").exists, process)
    began = time.monotonic()
    wait_until(lambda: epochs_logged(path) >= EPOCHS, process)
    trained = time.monotonic() - began
    process.join(300)
    assert process.exitcode == 0 and (path / "results.json").exists()
    return trained


def epochs_logged(path: Path) -> int:
    log = path / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def kill(process: Any) -> bool:
    """Send SIGKILL; return whether that is what the process died of."""
    process.kill()
    process.join(60)
    return bool(process.exitcode == -signal.SIGKILL)


def epochs_done(path: Path) -> int:
    checkpoint = path / "checkpoint.safetensors"
    return int(checkpoints.read(checkpoint)[0]["epoch"]) if checkpoint.exists() else 0


@pytest.mark.slow
def test_a_process_killed_before_and_during_collection_resumes_to_identical_results(tmp_path: Path) -> None:
    finish(tmp_path / "whole")
    path = tmp_path / "run"
    for epoch in (START - 4, START + 6):  # the second process goes on from the first, and dies among the snapshots
        process = start(path)
        wait_until(lambda epoch=epoch: epochs_logged(path) >= epoch, process)
        assert kill(process), "it ended before it was killed"
        assert not (path / "results.json").exists()
    state, _, _ = checkpoints.read(path / "checkpoint.safetensors")
    assert START + 5 <= state["epoch"] < EPOCHS
    assert int(state["collections"]["swag"]["count"]) == 2 * (state["epoch"] - START)
    finish(path)
    assert_identical(outcome(path), outcome(tmp_path / "whole"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, float]:
    """What a run that nobody kills ends with, and the seconds that it trains."""
    path = tmp_path_factory.mktemp("whole") / "run"
    seconds = finish(path)
    return outcome(path), seconds


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_twenty_kills_at_random_moments(
    part: int, whole: tuple[Any, float], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Four times five runs, each killed at a random moment of a random epoch, or of the evaluation after the last."""
    expected, trained = whole
    moments, done = random.Random(part), []
    for number in range(50):
        path = tmp_path / f"run{number}"
        process = start(path)
        epoch = moments.randint(START, EPOCHS) if number % 2 else moments.randint(0, START)  # of snapshots, and before
        wait_until(
            lambda path=path, epoch=epoch: (path / "settings.json").exists() and epochs_logged(path) >= epoch, process
        )
        time.sleep(moments.uniform(0, trained / EPOCHS))
        if not kill(process):
            continue  # it had ended
        done.append(epochs_done(path))
        finish(path)
        assert_identical(outcome(path), expected, f"run {number}, killed after epoch {done[-1]}")
        if len(done) == 5:
            break
    record_property("killed_after_epochs", done)
    print(f"{len(done)} of 5 resumes bit-identical; killed after epochs {sorted(done)}")
    assert len(done) == 5
    assert any(epoch <= START for epoch in done) and any(START < epoch for epoch in done)
