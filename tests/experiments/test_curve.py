"""Curves between networks, end to end at a tiny size: what each number is, going on, chains of files, refusals."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments import curve, curve_bench, curve_plots, train_report
from experiments.curve_settings import Settings, check
from experiments.datasets import load_dataset
from experiments.models import build_model
from experiments.train_setup import AUGMENTATION
from experiments.train_weights import read_weights
from experiments.training_data import AsTrained
from experiments.two_spirals import load_two_spirals, perceptron, two_spirals
from lowrank_bdl.surfaces.curves import BezierCurve, PolygonalChain
from lowrank_bdl.training.trainer import Trainer

PROG = "python -m experiments.curve"
DATA = "--dataset digits --model SmallConvNet --train_limit 64 --batch_size 16 --threads 1".split()
TINY = [*DATA, *"--endpoint_epochs 3 --epochs 3 --num_points 4 --eval_limit 40 --wd 1e-3".split()]


@pytest.fixture(autouse=True)
def no_figures_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_report, "draw_figures", lambda *_: None)


def run(path: Path, *flags: str) -> int:
    with redirect_stdout(StringIO()):
        return curve.main(["--dir", str(path), *flags])


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    del found["seconds"]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has trained its own ends."""
    path = tmp_path_factory.mktemp("curve") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        assert run(path, *TINY) == 0
    return path


def test_what_is_written(finished: Path) -> None:
    found = results(finished)
    assert sorted(found["paths"]) == ["Bezier", "PolyChain", "line"] and found["reported_on"] == "validation"
    assert found["weight_decay"] == 1e-3 and found["paths"]["line"]["num_points"] == 4
    assert not list(finished.glob("checkpoint-*")) and imread(finished / "profile.png").ndim == 3
    table = (finished / "table.txt").read_text()
    assert "SmallConvNet on digits: 4 points of each path, 40 training and 40 validation images." in table
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert rows["Bezier"][1] == f"{found['paths']['Bezier']['train_loss']['min']:.4f}"
    assert rows["start alone"][2] == f"{found['paths']['line']['train_loss']['start']:.4f}"
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [(record["path"], record["epoch"]) for record in log] == [
        (name, epoch) for name in ("PolyChain", "Bezier") for epoch in (1, 2, 3)
    ]


def test_curves_go_from_network_to_network_and_their_bend_was_trained(finished: Path) -> None:
    ends = [read_weights(finished / name / "weights.safetensors").last for name in ("start", "end")]
    for name, cls in (("Bezier", BezierCurve), ("PolyChain", PolygonalChain)):
        found = lb.load_posterior(finished / f"curve-{name}.safetensors")
        assert isinstance(found, cls) and found.num_points == 3
        assert torch.equal(found(0.0), ends[0]) and torch.equal(found(1.0), ends[1])
        assert (found.point_1 - (ends[0] + ends[1]) / 2).norm() > 1e-3 * (ends[0] - ends[1]).norm()
        assert results(finished)["paths"][name]["length"] == pytest.approx(found.length(), rel=1e-9)
    distance = (ends[1] - ends[0]).norm().item()
    assert results(finished)["paths"]["line"]["length"] == pytest.approx(distance, rel=1e-5)


def test_the_numbers_are_those_of_the_network_at_each_point(finished: Path) -> None:
    """By hand: batch norm recomputed from augmented images, loss with the norm of the weights, images as they are."""
    data = load_dataset("digits", None, train_limit=64, device=torch.device("cpu"))
    model = build_model("SmallConvNet", 10, channels=1, image_size=8)
    layout = lb.ParameterLayout.from_module(model)
    found = lb.load_posterior(finished / "curve-Bezier.safetensors")
    with np.load(finished / "values-Bezier.npz") as arrays:
        values = {name: arrays[name] for name in arrays.files}
    assert values["t"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1]) and list(values["sets"]) == [
        "train",
        "validation",
    ]
    theta = found.to_theta(1 / 3).detach()
    layout.assign_(model, theta)
    lb.recalibrate_batch_norm_(model, AsTrained(data.train, *AUGMENTATION["digits"], data.black).batches(500))
    model.eval()
    for name in ("train", "validation"):
        images = getattr(data, name).first(40)
        with torch.no_grad():
            logits = model(images.inputs)
        assert values[f"{name}_loss"][1] == pytest.approx(cross_entropy(logits, images.targets).item(), rel=1e-5)
        assert values[f"{name}_accuracy"][1] == (logits.argmax(1) == images.targets).double().mean().item()
    loss = values["train_loss"] + 0.5e-3 * values["train_squared_norm"]
    assert values["train_squared_norm"][1] == pytest.approx(theta.square().sum().item(), rel=1e-5)
    reported = results(finished)["paths"]["Bezier"]
    assert reported["train_loss"]["max"] == pytest.approx(loss.max()) and reported["train_loss"]["end"] == loss[-1]
    assert reported["train_loss"]["barrier"] == pytest.approx(loss.max() - max(loss[0], loss[-1]))
    assert reported["train_loss"]["mean"] == pytest.approx(((loss[1:] + loss[:-1]) / 2).mean())
    assert reported["test_error"]["min"] == pytest.approx(1 - values["validation_accuracy"].max())


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second curve's training, and again in the evaluation."""
    flags = ["--init_start", str(finished / "start"), "--init_end", str(finished / "end"), "--num_points", "4"]
    flags += "--epochs 3 --eval_limit 40 --wd 1e-3 --threads 1".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, *flags) == 0
    done = []
    train_epoch = Trainer.train_epoch

    def dies_in_epoch_5(trainer: Trainer, *args: Any, **options: Any) -> Any:
        done.append(None)
        if len(done) == 5:
            raise KeyboardInterrupt
        return train_epoch(trainer, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", dies_in_epoch_5)
        assert run(killed, *flags) == 130
    assert (killed / "curve-PolyChain.safetensors").exists() and (killed / "checkpoint-Bezier.safetensors").exists()
    written = []
    write_values = curve_bench.write_values

    def dies_at_the_second_path(*args: Any) -> None:
        write_values(*args)
        written.append(None)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curve_bench, "write_values", dies_at_the_second_path)
        assert run(killed, *flags, "--resume") == 130
    assert not (killed / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", None)
        assert run(killed, *flags, "--resume") == 0
    first, second = results(whole), results(killed)
    assert first["paths"] == second["paths"] and first["ends"] == second["ends"]
    ours = results(finished)["paths"]  # the same ends, but trained by this script
    assert first["paths"]["line"] == ours["line"]


def test_a_chain_of_files_is_straight_from_file_to_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve_plots, "profiles", lambda *_: None)
    files = [finished / "start" / "checkpoint.safetensors", finished / "end", finished / "start"]
    assert run(tmp_path, "--ckpt", ",".join(map(str, files)), "--num_points", "3", "--eval_limit", "40") == 0
    found = results(tmp_path)["paths"]
    line = results(finished)["paths"]["line"]
    assert list(found) == ["chain"] and found["chain"]["num_points"] == 5
    assert found["chain"]["length"] == pytest.approx(2 * line["length"]) and found["chain"]["distance"] == 0.0
    assert found["chain"]["test_error"]["start"] == found["chain"]["test_error"]["end"] == line["test_error"]["start"]
    with np.load(tmp_path / "values-chain.npz") as arrays:
        assert arrays["train_loss"][2] == pytest.approx(line["train_nll"]["end"], rel=1e-6)
        assert arrays["train_loss"][1] == pytest.approx(arrays["train_loss"][3], rel=1e-4)


def test_the_toy_runs_and_is_drawn(tmp_path: Path) -> None:
    assert run(tmp_path, "--toy", "two_spirals", "--endpoint_epochs", "2", "--epochs", "2", "--num_points", "3") == 0
    assert imread(tmp_path / "decisions.png").ndim == 3 and imread(tmp_path / "profile.png").ndim == 3
    assert results(tmp_path)["data"]["images"] == {"train": 600, "test": 600}


def test_bends_start_at_fresh_networks_where_asked(tmp_path: Path) -> None:
    flags = ["--init_linear_off", "--num_bends", "4", "--endpoint_epochs", "1", "--epochs", "1", "--num_points", "3"]
    assert run(tmp_path, "--toy", "two_spirals", "--curve", "PolyChain", "--lr", "1e-12", *flags) == 0
    found = lb.load_posterior(tmp_path / "curve-PolyChain.safetensors")
    assert isinstance(found, PolygonalChain) and found.num_points == 4
    for number, bend in enumerate((found.point_1, found.point_2)):
        fresh = nn.utils.parameters_to_vector(perceptron(24, 4 + number, torch.device("cpu")).parameters())
        assert torch.allclose(bend, fresh, atol=1e-9)


def test_two_spirals_are_two_and_a_small_perceptron_takes_them() -> None:
    points, classes = two_spirals(401, torch.Generator().manual_seed(0))
    assert points.shape == (401, 2) and classes.sum() == 200
    assert ((-points[classes == 0]).unsqueeze(1) - points[classes == 1]).norm(dim=-1).min(1).values.median() < 0.1
    data = load_two_spirals(20, 10, 3, torch.device("cpu"))
    again = load_two_spirals(20, 10, 3, torch.device("cpu"))
    assert torch.equal(data.train.inputs, again.train.inputs) and len(data.test) == 10
    assert not torch.equal(data.train.inputs[:10], data.test.inputs)
    network = perceptron(5, 0, torch.device("cpu"))
    assert torch.equal(network(data.train.inputs), network(data.train.inputs.flatten(1)))


@pytest.mark.parametrize(
    "flags,message",
    [
        ("", "nothing to connect: give --init_start and --init_end, --ckpt, --model or --toy"),
        ("--init_start a", "--init_start and --init_end must be given both, or neither"),
        ("--ckpt a", "--ckpt must name at least 2 files"),
        ("--ckpt a,b --init_start a --init_end b", "--ckpt names all points of the path"),
        ("--toy two_spirals --model LeNet5", "--toy has a network and weights of its own"),
        ("--toy two_spirals --num_bends 2", "--num_bends 2 leaves nothing to train"),
        ("--toy two_spirals --init_linear_off --free_end --num_bends 2", "--init_linear_off needs a curve with points"),
        ("--ckpt a,b --init_linear_off", "--init_linear_off needs a curve with points between its ends"),
        ("--toy two_spirals --num_bends 1", "--num_bends must be at least 2; got 1"),
        ("--toy two_spirals --curve Bezier,Spline", "--curve must be some of PolyChain, Bezier; got 'Bezier,Spline'"),
        ("--toy two_spirals --lr 0", "--lr must be positive; got 0.0"),
        ("--toy two_spirals --wd nan", "--wd must be at least 0; got nan"),
        ("--model SmallConvNet --dataset nothing", "nothing"),
        ("--init_start nowhere --init_end b", "nowhere: there is no such file or folder"),
    ],
)
def test_what_cannot_run_is_one_line_and_nothing_is_written(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tmp_path / "new", *flags.split())
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith(f"{PROG}: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_weights_that_do_not_fit_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, end = str(finished / "start"), str(finished / "end")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((finished / "start" / "weights.safetensors").read_bytes()[:500])
    cases = {
        f"--init_start {start} --init_end {start}": f"{start} has the same weights as the file before it",
        f"--init_start {start} --init_end {tmp_path / 'no'}": "there is no such file",
        f"--init_start {start} --init_end {bad}": "is truncated",
        f"--init_start {start} --init_end {end} --source SWA": "--source SWA",
        f"--init_start {start} --init_end {end} --model LeNet5 --dataset digits": "LeNet5",
    }
    for flags, message in cases.items():
        assert run(tmp_path / "new", *flags.split()) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, flags
        assert not (tmp_path / "new").exists()


def test_a_curve_is_trained_in_the_precision_of_its_network(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    shutil.copytree(finished / "start", start)
    settings = json.loads((start / "settings.json").read_text())
    (start / "settings.json").write_text(json.dumps(settings | {"amp": "bfloat16", "channels_last": True}))
    seen = []
    init = Trainer.__init__

    def noted(self: Trainer, model: nn.Module, *args: Any, **options: Any) -> None:
        init(self, model, *args, **options)
        seen.append((self.autocast, self.memory_format, all(p.is_contiguous() for p in model.parameters())))

    monkeypatch.setattr(Trainer, "__init__", noted)
    flags = "--curve Bezier --num_points 2 --epochs 1 --eval_limit 40 --threads 1".split()
    ends = ["--init_start", str(start), "--init_end", str(finished / "end")]
    assert run(tmp_path / "curve", *ends, *flags) == 0
    assert seen == [(torch.bfloat16, torch.channels_last, False)]


def test_other_settings_or_ends_are_not_gone_on_with(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(finished, *TINY, "--resume", "--num_bends", "4") == 2
    assert "settings differ" in capsys.readouterr().err and (finished / "results.json").exists()


def test_defaults_are_those_of_the_kind() -> None:
    toy, chain = check(Settings(dir="x", toy="two_spirals")), check(Settings(dir="x", ckpt="a,b"))
    assert (toy.optimizer, toy.lr, toy.num_points) == ("Adam", 0.01, 61)
    assert (chain.num_points, chain.curves) == (6, ())
    plain = check(Settings(dir="x", model="LeNet5"))
    assert (plain.optimizer, plain.curve_epochs, plain.endpoint_epochs) == ("SGD", 200, 200)
