"""Ablations of a finished run, end to end at a tiny size: what each number is, resume, refusals."""

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import ensembling, ensembling_cells, train
from experiments.common import resolve_device
from experiments.datasets import load_dataset
from experiments.ensembling_cells import OF_SWA, PARTS, Bench, Cell, accuracy_curve, accuracy_in_order
from experiments.evaluation import classification_metrics
from experiments.uncertainty_members import TrainedRun
from tests.experiments.datasets.writers import write_mnist

TRAIN = (
    "--dataset digits --model SmallConvNet --train_limit 96 --batch_size 16 --epochs 8 --lr_init 0.05 --swa "
    "--swa_start 2 --swa_lr 0.05 --cov_mat --max_num_models 3 --num_samples 2 --snapshots --eval_freq 8"
).split()
TINY = (
    "--num_samples 3 --scales 0.5,1 --ranks 0,2 --noise_levels 0.1,0.2 --bn_points 3 --snapshot_points 3 "
    "--bn_batch_size 16 --eval_limit 60 --threads 1"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the training script: six iterates, of which three deviations are kept."""
    path = tmp_path_factory.mktemp("ensembling") / "trained"
    with redirect_stdout(StringIO()):
        assert train.main(["--dir", str(path), *TRAIN]) == 0
    return path


def run(trained: Path, path: Path, *more: str) -> int:
    return ensembling.main(["--run", str(trained), "--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(trained: Path) -> Path:
    """Finished ablations; what they printed lies beside the folder."""
    path = trained.parent / "ablations"
    with redirect_stdout(StringIO()) as printed:
        assert run(trained, path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


@pytest.fixture(scope="module")
def bench(trained: Path) -> Bench:
    data = load_dataset("digits", train_limit=96)
    options = ensembling.Settings(run=str(trained), dir="", num_samples=3, eval_limit=60, bn_batch_size=16)
    return Bench(TrainedRun(trained, data, resolve_device("cpu")), data, "validation", options)


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_times(v) for key, v in found.items() if key not in ("seconds", "dir", "resume", "run")}
    return [without_times(value) for value in found] if isinstance(found, list) else found


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = set(contents(finished))
    assert {f"{part}.png" for part in PARTS} < names
    for part in PARTS:
        assert imread(finished / f"{part}.png").shape[1] > 600
    others = {"results.json", "table.txt", "log.jsonl", "settings.json", "environment.json", "command.sh"}
    assert names == others | {f"{part}.png" for part in PARTS} | {
        f"cells/{name}.json" for name in results(finished)["cells"]
    }
    printed = (finished.parent / "stdout").read_text()
    assert printed == (finished / "table.txt").read_text() + f"\nwritten to {finished}\n"


def test_every_part_is_there_with_the_points_that_were_asked_for(finished: Path) -> None:
    found = results(finished)
    assert set(found["parts"]) == {"lines", *PARTS}
    assert found["parts"] == {
        "lines": ["SGD", "SWA"],
        "samples": [
            "SWAG-level0.5-rank3", "SWAG-Diag-level1-rank0", "NaiveNoise-level0.1",
            "SWAG-level0.5-rank3-bn0", "SWAG-Diag-level1-rank0-bn0", "NaiveNoise-level0.1-bn0",
        ],
        "scale": [
            "SWAG-level0.5-rank3", "SWAG-level1-rank3", "SWAG-Diag-level0.5-rank0", "SWAG-Diag-level1-rank0",
        ],
        "rank": ["SWAG-Diag-level0.5-rank0", "SWAG-level0.5-rank2", "SWAG-level0.5-rank3"],
        "bn": [
            "SWAG-level0.5-rank3-bn0", "SWAG-level0.5-rank3-bn1", "SWAG-level0.5-rank3-bn2", "SWAG-level0.5-rank3",
        ],
        "noise": ["NaiveNoise-level0.1", "NaiveNoise-level0.2"],
        "snapshots": [
            "Snapshots", "SWA-path", "SWAG-level0.5-rank2-first2", "SWAG-level0.5-rank3-first3", "SWAG-level0.5-rank3",
        ],
    }  # fmt: skip
    assert found["iterates"] == 6 and found["predicted"] == {"name": "validation", "images": 60}
    for cell in found["cells"].values():
        if cell["cell"]["method"] != "SWA-path":
            assert 0 < cell["metrics"]["nll"] < 5 and 0 <= cell["metrics"]["accuracy"] <= 1


def test_table_has_a_row_for_every_posterior(finished: Path) -> None:
    text = (finished / "table.txt").read_text()
    found = results(finished)
    nll = found["cells"]["SWAG-level0.5-rank3-bn0"]["metrics"]["nll"]
    row = next(line for line in text.splitlines() if line.startswith("SWAG (scale 0.5, rank 3, statistics of SWA)"))
    assert f"{nll:.4f} ± " in row
    ratio = nll / found["cells"]["SWAG-level0.5-rank3"]["metrics"]["nll"]
    assert f"the NLL of SWAG is {ratio:.2f} times as large" in text and found["bn_ratio"] == pytest.approx(ratio)


# ---- what the numbers are -----------------------------------------------------------------------------------------


def oracle(bench: Bench, thetas: Any, layout: lb.ParameterLayout, bn_batches: int | None = None) -> lb.Predictive:
    """Average over given weights, each written into a copy of the network, with the batch-norm statistics asked for."""
    batches = list(bench.bn_images.batches(16))[:bn_batches]
    model = bench.run.model
    statistics = lb.recalibrate_batch_norm(model, thetas, batches, layout=layout)
    means, log_likelihoods = [], []
    inputs, targets = next(iter(bench.split.batches(60)))
    network = lb.FunctionalModel(model, layout)
    model.eval()
    for s, theta in enumerate(thetas):
        logits = network(theta, inputs, {name: value[s] for name, value in statistics.items()}).double()
        means.append(logits.softmax(-1))
        log_likelihoods.append(-torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.stack(means), torch.stack(log_likelihoods), targets  # type: ignore[return-value]


def draws(bench: Bench, posterior: Any, count: int = 3) -> torch.Tensor:
    from lowrank_bdl.prediction.draws import WeightDraws

    return torch.stack(list(WeightDraws(posterior, count, torch.Generator().manual_seed(0))))


CASES: dict[str, tuple[Cell, Callable[[Bench], torch.Tensor]]] = {
    "SGD": (Cell("SGD"), lambda b: b.run.last[None]),
    "SWA": (Cell("SWA"), lambda b: b.swag.mean[None]),
    "SWAG": (Cell("SWAG", 0.5, 3), lambda b: draws(b, b.swag.posterior(0.5))),
    "SWAG, another scale and rank": (Cell("SWAG", 2.0, 2), lambda b: draws(b, b.swag.posterior(2.0, rank=2))),
    "SWAG-Diag": (Cell("SWAG-Diag", 1.0, 0), lambda b: draws(b, b.swag.posterior(1.0, rank=0))),
    "NaiveNoise": (Cell("NaiveNoise", 0.1), lambda b: draws(b, lb.relative_noise(b.swag.mean, 0.1, b.swag.layout))),
    "two batches": (Cell("SWAG", 0.5, 3, bn_batches=2), lambda b: draws(b, b.swag.posterior(0.5))),
    "Snapshots": (Cell("Snapshots"), lambda b: b.iterates),
}


@pytest.mark.parametrize("cell,thetas", CASES.values(), ids=CASES)
def test_a_cell_is_the_average_over_its_weights(
    cell: Cell, thetas: Callable[[Bench], torch.Tensor], bench: Bench
) -> None:
    layout = bench.run.layout
    means, log_likelihoods, targets = oracle(bench, thetas(bench), layout, cell.bn_batches)
    found = ensembling_cells.evaluate(bench, cell)
    mixture = log_likelihoods.logsumexp(0) - np.log(len(means))
    expected = classification_metrics(means.mean(0), targets, mixture)
    for metric in ("nll", "brier", "nll_se"):
        assert found["metrics"][metric] == pytest.approx(expected[metric], rel=1e-5)
    assert found["metrics"]["accuracy"] == expected["accuracy"] and found["num_samples"] == len(means)
    _, swa_log_likelihoods, _ = oracle(bench, bench.swag.mean[None], layout)
    difference = swa_log_likelihoods[0] - mixture
    assert found["difference"]["nll"] == pytest.approx(difference.mean().item(), rel=1e-4, abs=1e-6)
    assert found["difference"]["se"] == pytest.approx(difference.std().item() / 60**0.5, rel=1e-4, abs=1e-6)
    if len(means) > 1:
        last = {name: values["mean"][-1] for name, values in found["by_number"].items()}
        assert last["nll"] == pytest.approx(expected["nll"], rel=1e-5)
        assert last["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-12)
        first = -log_likelihoods[0 if cell.method == "Snapshots" else slice(None)].mean()
        if cell.method == "Snapshots":
            assert found["by_number"]["nll"]["mean"][0] == pytest.approx(float(first), rel=1e-5)


def test_statistics_of_swa_are_those_of_its_mean_for_every_sample(bench: Bench) -> None:
    statistics = lb.recalibrate_batch_norm(
        bench.run.model, bench.swag.mean[None], bench.bn_images.batches(16), layout=bench.swag.layout
    )
    for name, buffer in bench.at_swa.named_buffers():
        assert torch.equal(buffer, statistics[name][0])
    before = {name: value.clone() for name, value in bench.run.model.state_dict().items()}
    alone = ensembling_cells.evaluate(bench, Cell("SWA", bn_batches=OF_SWA))
    both = ensembling_cells.evaluate(bench, Cell("SWA"))
    assert alone["metrics"]["nll"] == pytest.approx(both["metrics"]["nll"], rel=1e-6)
    samples, recalibrated = (
        ensembling_cells.evaluate(bench, Cell("SWAG", 0.5, 3, bn_batches=b)) for b in (OF_SWA, None)
    )
    assert samples["metrics"]["nll"] != recalibrated["metrics"]["nll"]
    assert all(torch.equal(value, before[name]) for name, value in bench.run.model.state_dict().items())


def test_swa_path_is_the_running_mean_of_the_iterates(bench: Bench) -> None:
    assert bench.iterates is not None and bench.iterates.shape[0] == 6
    running = torch.stack([bench.iterates[: m + 1].double().mean(0).float() for m in range(6)])
    torch.testing.assert_close(running[-1], bench.swag.mean, rtol=1e-5, atol=1e-7)
    _, log_likelihoods, _ = oracle(bench, running, bench.swag.layout)
    found = ensembling_cells.evaluate(bench, Cell("SWA-path"))["by_number"]["nll"]["mean"]
    np.testing.assert_allclose(found, -log_likelihoods.mean(1), rtol=1e-4)


def test_swag_of_the_first_iterates_is_what_it_would_have_been(bench: Bench) -> None:
    """From all iterates, the rebuilt posterior is that of the run."""
    whole, _ = bench.weights(Cell("SWAG", 0.5, 3, first=6))
    own = bench.swag.posterior(0.5)
    torch.testing.assert_close(whole.mean, own.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole.stddev, own.stddev, rtol=1e-5, atol=1e-8)
    two, _ = bench.weights(Cell("SWAG", 1.0, 2, first=2))
    assert bench.iterates is not None
    a, b = bench.iterates[:2].double()
    torch.testing.assert_close(two.mean.double(), (a + b) / 2, rtol=1e-6, atol=1e-7)
    # unbiased variance of two values, and the second deviation (b - a) / 2 over rows - 1 = 1
    expected = (a - b).square() / 2 + (a - b).square() / 4
    torch.testing.assert_close(two.stddev.double().square(), expected, rtol=1e-4, atol=1e-12)


def test_accuracy_against_the_number_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(5, 40, 3, generator=generator)
    targets = torch.randint(3, (40,), generator=generator)
    order = torch.tensor([3, 0, 4, 1, 2])
    expected = [(probabilities[order[: s + 1]].mean(0).argmax(-1) == targets).double().mean() for s in range(5)]
    torch.testing.assert_close(accuracy_in_order(probabilities, targets, order), torch.stack(expected))
    mean, low, high = accuracy_curve(probabilities, targets, 0, 50)
    assert (low <= mean + 1e-12).all() and (mean <= high + 1e-12).all()
    assert low[-1] == high[-1] == pytest.approx(mean[-1], rel=1e-12)
    single = (probabilities.argmax(-1) == targets).double().mean(1)
    assert single.min() <= low[0] and high[0] <= single.max()


# ---- the command line ---------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_cells_that_are_there(trained: Path, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert run(trained, path, "--parts", "scale,noise", "--scales", "1") == 0
    first = {name: (path / name).stat().st_mtime_ns for name in contents(path) if name.startswith("cells/")}
    assert len(first) == 6  # two lines, two scales, two noises
    (path / "results.json").unlink()  # as after a kill
    (path / "cells" / "SWA.json").unlink()
    assert run(trained, path, "--resume") == 0
    for name in set(first) - {"cells/SWA.json"}:
        assert (path / name).stat().st_mtime_ns == first[name]
    assert without_times(results(path)) == without_times(results(finished))


def test_without_snapshots_or_batch_norm_those_parts_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path, monkeypatch)
    argv = (
        f"--dataset MNIST --data_path {tmp_path} --model LeNet5 --use_test --batch_size 20 --epochs 4 --lr_init 0.02 "
        "--swa --swa_start 1 --swa_lr 0.02 --num_samples 2"
    )
    assert train.main(["--dir", str(tmp_path / "lenet"), *argv.split()]) == 0
    assert run(tmp_path / "lenet", tmp_path / "run") == 0
    found = results(tmp_path / "run")
    assert set(found["parts"]) == {"lines", "samples", "scale", "rank", "noise"} and found["bn_ratio"] is None
    assert found["parts"]["rank"] == ["SWAG-Diag-level0.5-rank0"] and found["predicted"]["name"] == "test"
    assert found["bn_images"] == 0 and not (tmp_path / "run" / "bn.png").exists()


@pytest.mark.parametrize(
    "argv,message",
    [
        (
            ["--parts", "size"],
            "--parts must be some of samples, scale, rank, bn, noise, snapshots, each once; got 'size'",
        ),
        (["--scales", "0,1"], "--scales must be positive numbers, separated by commas; got '0,1'"),
        (["--scales", "1,nan"], "--scales must be positive numbers, separated by commas; got '1,nan'"),
        (["--ranks", "-1"], "--ranks must be whole numbers from 0, separated by commas; got '-1'"),
        (["--ranks", "1.5"], "--ranks must be whole numbers from 0, separated by commas; got '1.5'"),
        (["--num_samples", "0"], "--num_samples must be at least 1; got 0"),
        (["--scale", "0"], "--scale must be positive; got 0.0"),
        (["--noise", "-1"], "--noise must be positive; got -1.0"),
        (["--run", "nowhere"], "there is no run of experiments.train in nowhere (settings.json is missing)"),
        (["--resume"], "--resume: there is no run in"),
        (["--device", "nonsense"], "--device nonsense: "),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    argv: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(trained, tmp_path / "run", *argv)
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def altered(trained: Path, path: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(trained, path)
    change(path)
    return path


def edit_settings(**values: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        record = json.loads((path / "settings.json").read_text())
        (path / "settings.json").write_text(json.dumps(record | values))

    return edit


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda p: (p / "results.json").unlink(), "is not finished: there is no results.json"),
        (lambda p: (p / "checkpoint.safetensors").unlink(), "there is no checkpoint.safetensors"),
        (lambda p: (p / "snapshots.safetensors").unlink(), "there is no snapshots.safetensors"),
        (lambda p: (p / "snapshots.safetensors").write_bytes(b"x" * 50), "snapshots.safetensors is truncated or no"),
        (edit_settings(model="LeNet5"), "LeNet5"),
        (edit_settings(model="PreResNet8"), "does not fit"),
        (edit_settings(use_test=True, images="x"), "is not of a run of experiments.train"),
    ],
)
def test_a_run_that_is_damaged_or_of_another_network_is_refused(
    change: Callable[[Path], None], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = altered(trained, tmp_path / "broken", change)
    assert run(broken, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_without_collected_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain"
    argv = "--dataset digits --model SmallConvNet --train_limit 32 --epochs 1 --batch_size 16 --use_test".split()
    assert train.main(["--dir", str(path), *argv]) == 0
    capsys.readouterr()
    assert run(path, tmp_path / "run") == 2
    assert "SWAG needs a run with --swa and at least 2 snapshots" in capsys.readouterr().err
    assert run(path, tmp_path / "run", "--images", "validation") == 2
    assert "--images validation: the run was trained on them (--use_test)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resume_that_does_not_fit_changes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    argv = ["--parts", "noise"]
    assert run(trained, path, *argv) == 0

    def refused(source: Path, message: str, *more: str) -> None:
        before = contents(path)
        capsys.readouterr()
        assert run(source, path, *argv, "--resume", *more) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and contents(path) == before

    refused(trained, "num_samples was 3, now 4", "--num_samples", "4")
    other = tmp_path / "other"
    assert train.main(["--dir", str(other), *TRAIN, "--seed", "2"]) == 0
    refused(other, "is of another recipe; delete it to make it again")
    (path / "cells" / "SWA.json").write_text("{")
    refused(trained, "cannot read")


def test_the_iterates_that_are_read_are_those_of_the_run(bench: Bench, trained: Path) -> None:
    ensemble = lb.EmpiricalPosterior.load(trained / "snapshots.safetensors")
    assert bench.iterates is not None and torch.equal(bench.iterates, ensemble.thetas)
    assert torch.equal(bench.iterates[-1], bench.run.last)
