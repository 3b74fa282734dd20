"""The seed study, end to end at a tiny size: what it writes, what it refuses, pairing, and resume after a kill."""

import dataclasses
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
from scipy import stats

from experiments import study, study_methods, study_report, study_tasks
from experiments.study_methods import fit_noise, mixture_nll
from experiments.study_statistics import holm

ROOT = Path(__file__).parents[2]
TINY = "--quick --tasks friedman1,digits-cnn --num_samples 3 --rank 3".split()
METHODS = ["SGD", "SGD constant", "SWA", "EMA", "SWAG"]
CPU = torch.device("cpu")


def tiny(name: str, **changes: Any) -> study_tasks.Task:
    return dataclasses.replace(study_tasks.quick(study_tasks.TASKS[name]), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("study") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert study.main(["--dir", str(path), *TINY]) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    """What must not depend on how long a study took, or on whether it was interrupted."""
    found = json.loads((path / "results.json").read_text())
    for cells in found["cells"].values():
        for cell in cells:
            del cell["seconds"]
    for name in ("dir", "resume"):
        del found["settings"][name]
    return found


# ---- what a study writes ------------------------------------------------------------------------------------------


def test_a_study_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    cells = {f"cells/{task}-{seed}.json" for task in ("friedman1", "digits-cnn") for seed in (0, 1)}
    written = {"results.json", "log.jsonl", "study.md", "differences.png"}
    assert names == cells | written | {"settings.json", "environment.json", "command.sh"}
    picture = imread(finished / "differences.png")
    assert picture.shape[0] >= 300 and picture.shape[1] >= 900 and picture[..., :3].std() > 0.02
    newest = max(finished.rglob("*"), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "results.json"
    assert (finished.parent / "stdout").read_text().startswith((finished / "study.md").read_text())


def test_differences_are_paired_and_adjusted(finished: Path) -> None:
    found = results(finished)
    for place, family in enumerate(("primary", "nll")):
        p_values, p_holm = [], []
        for task, metrics in (("friedman1", ("rmse", "nll")), ("digits-cnn", ("error", "nll"))):
            metric = metrics[place]
            values = {
                method: [cell["methods"][method]["test"][metric] for cell in found["cells"][task]] for method in METHODS
            }
            entry = found["tasks"][task][metric]
            assert list(entry["differences"]) == sorted(METHODS[1:])
            for method in METHODS[1:]:
                difference = entry["differences"][method]
                oracle = stats.ttest_rel(values[method], values["SGD"])
                low, high = oracle.confidence_interval(0.95)
                got = [difference["low"], difference["high"], difference["p_value"]]
                np.testing.assert_allclose(got, [low, high, oracle.pvalue], rtol=1e-9)
                p_values.append(difference["p_value"])
                p_holm.append(difference["p_holm"])
            assert entry["levels"]["SGD"]["values"] == values["SGD"]
        assert found["families"][family]["comparisons"] == 8 and p_holm == holm(p_values)


def test_the_table_has_a_row_for_each_task_and_metric(finished: Path) -> None:
    lines = (finished / "study.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| task", *["| friedman1"] * 2, *["| digits-cnn"] * 2]
    assert [row[1] for row in rows[1:]] == ["100 / 200, 4, 2"] * 4
    assert [row[2] for row in rows[1:]] == ["RMSE", "NLL", "error %", "NLL"]
    assert all(len(row) == 8 for row in rows)
    level = results(finished)["tasks"]["friedman1"]["rmse"]["levels"]["SGD"]["mean"]
    assert rows[1][3].startswith(f"{level:.4g} ± ")
    text = " ".join(lines)
    assert "Families: 8 comparisons of RMSE or error, and 8 of NLL" in text
    sentences = [line for line in lines if line.startswith("- ")]
    assert len(sentences) == 8 and all(line.endswith("of 2 tasks.") for line in sentences)


def test_recorded_numbers_are_possible(finished: Path) -> None:
    for task, cells in results(finished)["cells"].items():
        for cell in cells:
            assert cell["snapshots"] == 4 and cell["sizes"]["test"] == 200
            assert set(cell["methods"]) == set(METHODS)
            for splits in cell["methods"].values():
                for metrics in splits.values():
                    if task == "friedman1":
                        assert 0 < metrics["rmse"] < 10 and 0 < metrics["noise_std"] < 10
                    else:
                        assert 0 <= metrics["error"] <= 100 and metrics["nll"] > 0 and 0 <= metrics["brier"] <= 2


def test_verdicts_follow_the_adjusted_p_value() -> None:
    better = {"mean": -1.0, "low": -1.1, "high": -0.9, "p_holm": 0.049}
    assert study_report.verdict(better) == "better"
    assert study_report.verdict(better | {"mean": 1.0}) == "worse"
    assert study_report.verdict(better | {"p_holm": 0.05}) == "undecided"


@pytest.mark.parametrize("worse", [True, False])
def test_a_negative_result_is_reported_as_such(worse: bool) -> None:
    """SWA is worse than SGD (or as good) by much more than its spread over seeds."""
    task = tiny("friedman1")
    cells = []
    for seed in range(5):
        of = {"rmse": 1.0 + 0.01 * seed, "nll": 2.0}
        swa = {"rmse": of["rmse"] + (0.5 + 0.001 * seed if worse else 0.0), "nll": 2.0}
        methods = {name: {"test": swa if name == "SWA" else of} for name in METHODS}
        cells.append({"methods": methods, "sizes": {"train": 1, "test": 1}})
    analysis = study_report.analyse([task], {"friedman1": cells}, 0.95)
    text = study_report.markdown([task], {"friedman1": cells}, analysis, 0.95)
    if worse:
        assert (
            "- RMSE or error, SWA: better than SGD on 0, worse than SGD on 1 (friedman1), undecided on 0 of 1" in text
        )
        assert text.count("**") == 4  # the cell, and the word that explains it
    else:
        assert "- RMSE or error, SWA: better than SGD on 0, worse than SGD on 0, undecided on 1 of 1" in text


# ---- what is compared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["friedman1", "digits-cnn"])
def test_both_runs_share_their_first_half_to_the_last_bit(name: str) -> None:
    """The averaged run, begun from the decayed run's middle, is the one that trains alone from the start."""
    task = tiny(name, lr_init=0.05, swa_lr=0.02)
    data = study_tasks.regression_data(task, 0, CPU) if task.is_regression else study_tasks.image_data(task, None, CPU)
    with torch.random.fork_rng():
        decayed, averaged = study_methods.train(task, data, 0, CPU, 3, lambda: None)
        torch.manual_seed(0)
        alone = study_methods.make_trainer(task, data, 0, CPU, rank=3)
        alone.fit(lambda generator: study_tasks.training_batches(task, data, generator), task.epochs, progress=False)
    assert [record["lr"] for record in decayed.history] == pytest.approx([0.05, 0.05, 0.05, 0.05 - 0.0495 * 0.625])
    assert [record["lr"] for record in averaged.history] == [0.05, 0.05, 0.02, 0.02]
    assert decayed.history[:2] == averaged.history[:2] and averaged.history == alone.history
    for own, other in zip(averaged.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(own, other)
    for key in ("swag", "ema"):
        own, other = (trainer.collections[key].collector.state_dict() for trainer in (averaged, alone))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[k], other[k]) for k in own if isinstance(own[k], torch.Tensor))


def test_regression_data_differ_from_seed_to_seed_and_are_standardised() -> None:
    task = tiny("friedman2")
    data, same, other = (study_tasks.regression_data(task, seed, CPU) for seed in (3, 3, 4))
    assert torch.equal(data.train.inputs, same.train.inputs) and not torch.equal(data.train.inputs, other.train.inputs)
    assert data.sizes == {"train": 100, "validation": 100, "test": 200}
    torch.testing.assert_close(data.train.inputs.mean(0), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(data.train.targets.std(correction=0), torch.tensor(1.0))
    assert 200 < data.scale < 600  # Friedman's second function varies by about 375, and 125 of noise


@pytest.mark.parametrize("name,noise", [("toy-2d", 0.1), ("friedman1", 1.0), ("friedman2", 125.0), ("friedman3", 0.1)])
def test_targets_are_the_published_function_plus_noise(name: str, noise: float) -> None:
    count = 20_000
    x, y = study_tasks.FUNCTIONS[name](count, np.random.default_rng(0))
    circuit = x[:, 1] * x[:, 2] - 1 / (x[:, 1] * x[:, 3]) if x.shape[1] == 4 else None
    truth = {
        "toy-2d": lambda: np.sin(3 * x[:, 0]) * np.cos(3 * x[:, 1]) + x[:, 0] * x[:, 1] / 2,
        "friedman1": lambda: (
            10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        ),
        "friedman2": lambda: np.hypot(x[:, 0], circuit),
        "friedman3": lambda: np.arctan(circuit / x[:, 0]),
    }[name]()
    statistic = ((y - truth) ** 2).sum() / noise**2  # χ² with `count` degrees of freedom; false alarms: 1e-6
    assert stats.chi2.ppf(5e-7, count) < statistic < stats.chi2.isf(5e-7, count)


# ---- the noise model ----------------------------------------------------------------------------------------------


def test_mixture_nll_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    means, targets = torch.randn(4, 7, generator=generator).double(), torch.randn(7, generator=generator).double()
    parts = torch.distributions.Normal(means.mT, 0.3**0.5)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(7, 4).double()), parts)
    assert mixture_nll(means, targets, 0.3) == pytest.approx(-mixture.log_prob(targets).mean().item(), rel=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 10])
def test_fitted_noise_has_the_lowest_nll(samples: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    means = torch.randn(samples, 50, generator=generator).double()
    targets = torch.randn(50, generator=generator).double()
    variance = fit_noise(means, targets)
    grid = np.exp(np.linspace(-8, 4, 4001))  # steps of 0.3 %
    best = grid[np.argmin([mixture_nll(means, targets, value) for value in grid])]
    assert variance == pytest.approx(best, rel=4e-3)
    if samples == 1:
        assert variance == (targets - means).square().mean().item()


# ---- the command line ---------------------------------------------------------------------------------------------


def test_the_same_seeds_give_the_same_numbers_and_other_seeds_others(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the global generator must not matter, nor be changed
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    one = [*TINY, "--tasks", "friedman1"]
    assert study.main(["--dir", str(tmp_path / "same"), *one]) == 0
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert results(tmp_path / "same")["cells"]["friedman1"] == results(finished)["cells"]["friedman1"]
    assert study.main(["--dir", str(tmp_path / "other"), "--first_seed", "1", *one]) == 0
    cells = results(tmp_path / "other")["cells"]["friedman1"]
    assert [cell["seed"] for cell in cells] == [1, 2]
    assert cells[0] == results(finished)["cells"]["friedman1"][1] and cells[1] != cells[0]


def test_a_killed_study_goes_on_to_identical_results(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.study", "--dir", str(path), *TINY, "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(path.glob("cells/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {file.name: file.read_bytes() for file in path.glob("cells/*.json")}
    assert 1 <= len(done) < 4 and not (path / "results.json").exists()
    assert study.main([*command[3:], "--resume"]) == 0
    for name, content in done.items():
        assert (path / "cells" / name).read_bytes() == content  # not run again
    expected = results(finished)
    expected["settings"]["threads"] = 1
    for recipe in expected["recipes"].values():
        recipe["threads"] = 1
    assert results(path) == expected


def test_seeds_and_tasks_can_be_added(finished: Path, tmp_path: Path) -> None:
    run = ["--dir", str(tmp_path / "run"), "--quick", "--num_samples", "3", "--rank", "3"]
    assert study.main([*run, "--tasks", "friedman1"]) == 0
    assert study.main([*run, "--tasks", "friedman1,toy-2d", "--seeds", "3", "--resume"]) == 0
    cells = results(tmp_path / "run")["cells"]
    assert [[cell["seed"] for cell in cells[task]] for task in ("friedman1", "toy-2d")] == [[0, 1, 2]] * 2
    assert cells["friedman1"][:2] == results(finished)["cells"]["friedman1"]


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--tasks", "friedman4"], r"--tasks: unknown task 'friedman4'; known are friedman1, friedman2, friedman3, "),
        (["--tasks", "friedman1,friedman1"], "--tasks must name at least one task, and each once; got 'friedman1,fr"),
        (["--tasks", ""], "--tasks must name at least one task, and each once; got ''"),
        (["--seeds", "1"], "--seeds must be at least 2: an interval over seeds needs two; got 1"),
        ([], "--dataset MNIST needs --data_path, the folder that holds its files"),
        (["--data_path", "nowhere"], "--data_path nowhere: there is no such folder"),
        (
            ["--tasks", "friedman1", "--epochs", "1"],
            "--epochs must be at least 2, of which the runs share one half; go",
        ),
        (["--tasks", "friedman1", "--epochs", "2"], "friedman1: SWAG needs at least 2 snapshots, and gets 1: more"),
        (
            ["--tasks", "friedman1", "--batch_size", "300"],
            "must be at least twice --batch_size, which must be at least",
        ),
        (["--tasks", "friedman1", "--lr_init", "nan"], "--lr_init must be positive; got nan"),
        (["--scale", "0"], "--scale must be positive; got 0.0"),
        (["--rank", "-1"], "--rank must be at least 0; got -1"),
        (["--confidence", "95"], "--confidence must be between 0 and 1; got 95.0"),
        (
            ["--tasks", "digits-cnn", "--train_limit", "9999"],
            "the number of training images must be 1 to 200 for digits",
        ),
        (["--tasks", "friedman1", "--resume"], "--resume: there is no run in"),
        (["--device", "nonsense"], "--device nonsense: "),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = study.main(["--dir", str(tmp_path / "run"), *argv])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_settings_or_damaged_cells_changes_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    run = ["--dir", str(path), *TINY, "--tasks", "friedman1"]
    assert study.main(run) == 0
    cell = path / "cells" / "friedman1-1.json"

    def refused(argv: list[str], message: str) -> None:
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        capsys.readouterr()
        assert study.main([*argv, "--resume"]) == 2
        assert message in capsys.readouterr().err
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    refused([*run, "--rank", "4"], "settings differ from those of")
    recorded = json.loads(cell.read_text())
    cell.write_text(json.dumps(recorded | {"recipe": recorded["recipe"] | {"lr_init": 9.0}}))
    refused(run, "friedman1-1.json is of another recipe; delete it to make it again")
    cell.write_text('{"task": ')
    refused(run, "cannot read")
    cell.unlink()
    assert study.main([*run, "--resume"]) == 0
    assert results(path)["cells"]["friedman1"] == results(finished)["cells"]["friedman1"]


def test_divergence_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dir", str(tmp_path / "run"), *TINY, "--tasks", "friedman1", "--lr_init", "1e6"]
    assert study.main(argv) == 2
    assert "error: friedman1, seed 0: training diverged: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
