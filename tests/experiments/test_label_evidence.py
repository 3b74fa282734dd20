"""Training on corrupted labels and its evidence, end to end at a tiny size; which labels are corrupted; refusals."""

import json
import math
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy import stats

import lowrank_bdl as lb
from experiments import label_evidence
from experiments.datasets import load_dataset
from experiments.datasets.loading import read_training_labels
from experiments.label_evidence import corrupted_labels
from experiments.label_evidence_report import COLUMNS
from experiments.uncertainty_members import TrainedRun

ALPHA = 1e-6  # chance that a correct sampler fails on a fresh seed, per test
TINY = (
    "--dataset digits --model SmallConvNet --train_limit 60 --epochs 30 --batch_size 15 --lr_init 0.05 --seeds 1 "
    "--fractions 0,1 --threads 1"
).split()
CPU = torch.device("cpu")


def run(path: Path, *more: str) -> int:
    return label_evidence.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("evidence") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_the_fraction_is_exact_and_new_labels_are_uniform() -> None:
    labels = torch.zeros(20_000, dtype=torch.int64)
    found = corrupted_labels(labels, 10, 1.0, 0)
    counts = found.bincount(minlength=10).double()
    statistic = float(((counts - 2000) ** 2 / 2000).sum())
    assert stats.chi2.ppf(ALPHA / 2, 9) < statistic < stats.chi2.isf(ALPHA / 2, 9)
    marked = corrupted_labels(torch.full((1000,), -1), 10, 0.3, 0)  # no new label is -1
    assert int((marked >= 0).sum()) == 300
    assert torch.equal(corrupted_labels(labels, 10, 0.0, 0), labels)


def test_lower_fractions_are_among_higher_ones() -> None:
    labels = torch.full((500,), -1)
    low, high, other = (
        corrupted_labels(labels, 10, fraction, seed) for fraction, seed in ((0.2, 3), (0.6, 3), (0.2, 4))
    )
    relabelled = low >= 0
    assert torch.equal(low[relabelled], high[relabelled]) and int((high >= 0).sum()) == 300
    assert torch.equal(low, corrupted_labels(labels, 10, 0.2, 3)) and not torch.equal(low, other)


@pytest.mark.parametrize("seed", range(4))
def test_which_labels_are_wrong_has_nothing_to_do_with_which_images_are_used(seed: int) -> None:
    """With --train_limit the images are the first of a permutation, which once was that of the labels, too."""
    used = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[:2000]
    count = int((corrupted_labels(torch.full((60_000,), -1), 10, 0.5, seed)[used] >= 0).sum())
    low, high = stats.hypergeom.ppf([ALPHA / 2, 1 - ALPHA / 2], 60_000, 30_000, 2000)
    assert low <= count <= high


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {name for name in contents(finished) if not name.startswith("runs/")}
    assert names == {
        "cells/0-0.json", "cells/1-0.json", "labels/0-0.npy", "labels/1-0.npy", "log.jsonl", "evidence.png",
        "table.txt", "results.json", "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    assert imread(finished / "evidence.png").shape[1] > 1000
    printed = (finished.parent / "stdout").read_text()
    assert printed.endswith((finished / "table.txt").read_text() + f"\nwritten to {finished}\n")
    lines = (finished / "table.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["0", "1"]
    assert set(results(finished)["summary"]) == set(COLUMNS)


def test_the_evidence_falls_where_the_training_loss_hardly_moves(finished: Path) -> None:
    clean, corrupted = results(finished)["cells"]
    assert clean["changed"] == 0 and corrupted["changed"] > 0.7
    assert clean["train"]["accuracy"] == 1 and corrupted["train"]["accuracy"] > 0.9
    assert clean["test"]["accuracy"] > 0.5 > 0.25 > corrupted["test"]["accuracy"]
    loss = corrupted["train"]["nll"] - clean["train"]["nll"]
    for method in ("diagonal", "KFAC"):
        fall = clean["laplace"][method]["best_evidence"] - corrupted["laplace"][method]["best_evidence"]
        assert fall > 2 * loss and fall > 0.5


def test_the_evidence_is_that_of_the_definition(finished: Path) -> None:
    settings = label_evidence.Settings(**json.loads((finished / "settings.json").read_text()))
    own = label_evidence.run_settings(settings, (1.0, 0))
    data = load_dataset("digits", use_test=True, label_arr=own.label_arr, train_limit=60)
    model = TrainedRun(Path(own.dir), data, CPU).model.eval()
    theta = lb.ParameterLayout.from_module(model).flatten(model).double()
    network = lb.FunctionalModel(model)
    inputs, targets = next(iter(data.train.batches(60)))
    cell = results(finished)["cells"][1]
    log_likelihood = -torch.nn.functional.cross_entropy(network(theta.float(), inputs), targets, reduction="sum").item()
    assert cell["train"]["nll"] == pytest.approx(-log_likelihood / 60, rel=1e-5)
    assert cell["images"] == 60 and cell["squared_norm"] == pytest.approx(theta.square().sum().item(), rel=1e-6)
    tau = 60 * settings.wd
    assert cell["prior_precision"] == pytest.approx(tau)
    # diagonal of the generalised Gauss-Newton matrix: sum over images and classes of p_c (d log p_c / d theta)^2
    curvature = torch.zeros_like(theta)
    for image in inputs:
        jacobian = torch.func.jacrev(lambda t, x=image: network(t, x[None])[0].log_softmax(-1))(theta.float()).double()
        curvature += network(theta.float(), image[None])[0].softmax(-1).double() @ jacobian.square()
    expected = log_likelihood - tau / 2 * theta.square().sum() - 0.5 * (1 + curvature / tau).log().sum()
    found = cell["laplace"]["diagonal"]
    assert found["evidence"] == pytest.approx(expected.item() / 60, rel=1e-4)
    assert found["best_evidence"] >= found["evidence"] and found["best_precision"] > 0
    best = found["best_precision"]
    at_best = log_likelihood - best / 2 * theta.square().sum() - 0.5 * (1 + curvature / best).log().sum()
    assert found["best_evidence"] == pytest.approx(at_best.item() / 60, rel=1e-4)


def test_networks_are_trained_on_the_labels_that_were_written(finished: Path) -> None:
    right, names = read_training_labels("digits")
    for fraction in (0, 1):
        labels = np.load(finished / "labels" / f"{fraction}-0.npy")
        assert labels.tolist() == corrupted_labels(right, len(names), float(fraction), 0).tolist()
        record = json.loads((finished / "runs" / f"{fraction}-0" / "results.json").read_text())
        assert record["settings"]["label_arr"] == str(finished / "labels" / f"{fraction}-0.npy")
        assert record["settings"]["augment"] == "none" and record["settings"]["use_test"]


def test_resume_keeps_what_is_there_and_adds_the_rest(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert run(path, "--fractions", "0") == 0
    cell = (path / "cells" / "0-0.json").read_bytes()
    (path / "results.json").unlink()  # as after a kill
    assert run(path, "--resume") == 0
    assert (path / "cells" / "0-0.json").read_bytes() == cell

    def comparable(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in each.items() if k != "seconds"} for each in cells]

    assert comparable(results(path)["cells"]) == comparable(results(finished)["cells"])
    before = contents(path)
    assert run(path, "--resume", "--wd", "0.001") == 2
    assert contents(path) == before
    (path / "cells" / "1-0.json").write_text("{")
    before = contents(path)
    assert run(path, "--resume") == 2
    assert contents(path) == before


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--fractions", "0,1.5"], "--fractions must be from 0 to 1, separated by commas; got '0,1.5'"),
        (["--fractions", "half"], "--fractions must be from 0 to 1, separated by commas; got 'half'"),
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--wd", "0"], "--wd must be positive, for it is the prior's precision; got 0.0"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (["--lr_init", "-1"], "--lr_init must be positive; got -1.0"),
        (["--model", "Nothing"], "--model Nothing is unknown; the closest known are "),
        (["--dataset", "MNIST"], "--dataset MNIST needs --data_path, the folder that holds its files"),
        (["--resume"], "--resume: there is no run in"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tmp_path / "run", *argv)
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_an_approximation_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(lb.KFACLaplace, "fit", fail)
    assert run(tmp_path / "run", "--fractions", "0", "--epochs", "1") == 2
    assert "error: 0-0: the algorithm failed to converge" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "results.json").exists()


def test_chance_is_the_evidence_of_saying_nothing() -> None:
    """A network whose outputs are all equal, with a prior that leaves no doubt about it."""
    model = torch.nn.Linear(3, 10)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    data = [(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10)]
    laplace = lb.DiagonalLaplace(model, labels="expected").fit(data, progress=False)
    assert laplace.log_marginal_likelihood(1e12) / 20 == pytest.approx(-math.log(10), rel=1e-6)
