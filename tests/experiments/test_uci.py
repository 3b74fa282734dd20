"""UCI regression end to end at a tiny size: what it writes, what it refuses, resume, and what may see the test rows."""

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
from experiments import uci, uci_report, uci_settings
from experiments.common import SettingsError
from experiments.uci_bench import Bench
from experiments.uci_cells import cell_name
from experiments.uci_data import load_table, split_of
from experiments.uci_methods import LEAST_GAIN, METHODS
from experiments.uci_published import COVERAGE, LOG_LIKELIHOOD, RMSE, Level
from experiments.uci_settings import METHODS as ALL_METHODS
from experiments.uci_settings import Settings, hidden_of, preset_of, splits_of
from experiments.uci_training import Candidate

ROOT = Path(__file__).parents[2]
NAMES = [name for name in ALL_METHODS if name != "PCA+NUTS"]  # which has a test of its own, as it needs pyro
TINY = (
    "--epochs 6 --batch_size 30 --wd 1e-3,1e-2 --swag_lr 1e-2 --folds 2 --num_samples 4 --tune_samples 4 --chains 2 "
    "--burn_in 2 --thin 1 --vi_steps 5 --gp_steps 3 --max_num_models 3 --nuts_warmup 4 --nuts_depth 2"
).split()


METHOD_FLAGS = ["--methods", ",".join(NAMES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets: boston by its long name, and one of our own, in both forms."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = 10 + 3 * np.sin(x[:, 0]) + x[:, 1] + 0.3 * rng.normal(size=60)
    orders = np.stack([rng.permutation(60) for _ in range(3)])
    np.savez(folder / "bostonHousing.npz", X=x, y=y, train_idx=orders[:, 10:], test_idx=orders[:, :10])
    (folder / "own" / "data").mkdir(parents=True)
    np.savetxt(folder / "own" / "data" / "data.txt", np.column_stack([x, y]))
    np.savetxt(folder / "own" / "data" / "index_features.txt", [0, 1, 2])
    np.savetxt(folder / "own" / "data" / "index_target.txt", [3])
    for split, order in enumerate(orders[:2]):
        np.savetxt(folder / "own" / "data" / f"index_train_{split}.txt", order[10:])
        np.savetxt(folder / "own" / "data" / f"index_test_{split}.txt", order[:10])
    return folder


def run(path: Path, data: Path, *flags: str) -> int:
    arguments = ["--dir", str(path), "--data_path", str(data), "--dataset", "boston,own", "--splits", "0,1"]
    return uci.main([*arguments, *METHOD_FLAGS, *TINY, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished run; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("uci") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path, data) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    """What must not depend on how long a run took, or on whether it was interrupted or parted."""
    found = json.loads((path / "results.json").read_text())
    for methods in found["cells"].values():
        for cells in methods.values():
            for cell in cells:
                del cell["seconds"]
                cell["details"].pop("fit_seconds", None)
    for name in ("dir", "resume", "jobs", "data_path"):
        del found["settings"][name]
    return found


# ---- what a run writes --------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    cells = {cell_name(name, split, method) for name in ("boston", "own") for split in (0, 1) for method in NAMES}
    assert names == cells | {"results.json", "log.jsonl", "uci.md", "uci.png", "settings.json", "environment.json",
                             "command.sh"}  # fmt: skip
    picture = imread(finished / "uci.png")
    assert picture.shape[0] >= 500 and picture.shape[1] >= 600 and picture[..., :3].std() > 0.02
    newest = max(finished.rglob("*"), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "results.json"
    assert (finished.parent / "stdout").read_text().startswith((finished / "uci.md").read_text())


def test_every_method_has_a_row_beside_the_published_one(finished: Path) -> None:
    lines = (finished / "uci.md").read_text().splitlines()
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [[name, method] for name in ("boston", "own") for method in NAMES]
    found = results(finished)["summary"]
    for row in rows:
        entry = found[row[0]][row[1]]
        assert (
            row[2] == f"{entry['gaussian_log_likelihood']['mean']:.3f} ± {entry['gaussian_log_likelihood']['std']:.3f}"
        )
    by_name = {tuple(row[:2]): row for row in rows}
    assert by_name["boston", "PCA+ESS"][3] == "-2.719 ± 0.132" and by_name["boston", "PCA+ESS"][9] == "0.985"
    assert by_name["own", "PCA+ESS"][3:5] == ["–", ""] and by_name["boston", "GP"][3] == "–"


def test_levels_are_means_over_the_splits(finished: Path) -> None:
    found = results(finished)
    for name, methods in found["cells"].items():
        for method, cells in methods.items():
            assert [cell["split"] for cell in cells] == [0, 1]
            for metric, level in found["summary"][name][method].items():
                if metric not in ("published", "verdict"):
                    values = [cell["metrics"][metric] for cell in cells]
                    assert level["values"] == values
                    got = [level["mean"], level["std"], level["standard_error"]]
                    expected = [np.mean(values), np.std(values, ddof=1), np.std(values, ddof=1) / np.sqrt(2)]
                    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_the_search_is_recorded(finished: Path) -> None:
    for methods in results(finished)["cells"].values():
        for method, cells in methods.items():
            for cell in cells:
                if method == "GP":
                    assert "search" not in cell and cell["levels"] == {}
                    continue
                assert [(entry["lr"], entry["wd"]) for entry in cell["search"]] == [(1e-2, 1e-3), (1e-2, 1e-2)]
                kind = "SGD" if method == "SGD" else "SWA"
                best = max(cell["search"], key=lambda entry: entry[kind])
                assert {name: cell["levels"][name] for name in ("lr", "wd", "swag_lr")} == {
                    name: best[name] for name in ("lr", "wd", "swag_lr")
                }
                assert cell["at_edge"] == ["wd"]  # of two values each is at an edge; one learning rate has none
                for name, tried in cell["tried"].items():
                    assert len(tried) >= 3
                    assert dict(map(tuple, tried))[cell["levels"][name]] > max(score for _, score in tried) - LEAST_GAIN
        for one, other in zip(methods["PCA+ESS"], methods["PCA+VI"], strict=True):
            assert one["levels"] == other["levels"] and set(one["tried"]) == {"temperature", "prior_std"}
            assert one["metrics"] != other["metrics"] and 0 < one["details"]["rank"] <= 3
            assert one["details"]["evaluations"] > 0 and one["details"]["largest_rhat"] > 0


def test_units_are_those_of_the_file(finished: Path, data: Path) -> None:
    table = load_table("own", data)
    for split in (0, 1):
        std = table.target[table.train[split]].std()
        for method in NAMES:
            metrics = json.loads((finished / cell_name("own", split, method)).read_text())["metrics"]
            for name in ("log_likelihood", "gaussian_log_likelihood"):
                assert metrics[f"normalized_{name}"] - metrics[name] == pytest.approx(np.log(std), rel=1e-9)
            assert 0.2 < metrics["rmse"] < 4 * std and 0 <= metrics["coverage"] <= 1


def test_the_no_u_turn_sampler_has_its_row(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyro")
    flags = ["--dataset", "own", "--splits", "1", "--methods", "PCA+ESS,PCA+NUTS"]
    with redirect_stdout(StringIO()):
        assert run(tmp_path / "run", data, *flags) == 0
    cells = results(tmp_path / "run")["cells"]["own"]
    (ess,), (nuts,) = cells["PCA+ESS"], cells["PCA+NUTS"]
    assert nuts["levels"] == ess["levels"] and nuts["metrics"] != ess["metrics"]
    assert 0 < nuts["details"]["acceptance"] <= 1 and nuts["details"]["evaluations"] >= 8


def test_without_pyro_the_sampler_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uci_settings, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "run", data, "--methods", "all")
    assert "PCA+NUTS needs pyro: pip install lowrank-bdl[experiments]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- resume, processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_and_resume_change_no_number(finished: Path, data: Path, tmp_path: Path) -> None:
    """Killed when the first cells are there; then another process makes the rest, in parallel."""
    path = tmp_path / "run"
    flags = ["--dir", str(path), "--data_path", str(data), "--dataset", "boston,own", "--splits", "0,1"]
    flags += [*METHOD_FLAGS, *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.uci", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(path.glob("cells/*.json"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (path / "results.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in path.glob("cells/*.json")}
    with redirect_stdout(StringIO()):
        assert run(path, data, "--resume", "--jobs", "2") == 0
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())
    assert results(path) == results(finished)


def test_another_recipe_is_not_resumed(finished: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "results.json").read_bytes()
    assert run(finished, data, "--resume", "--scale", "0.25") == 2
    assert "--resume: settings differ" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


def test_more_methods_and_splits_may_be_added(data: Path, tmp_path: Path) -> None:
    few = ["--dataset", "own", "--methods", "SGD"]
    with redirect_stdout(StringIO()):
        assert run(tmp_path / "run", data, *few, "--splits", "1") == 0
        one = (tmp_path / "run" / cell_name("own", 1, "SGD")).read_bytes()
        assert run(tmp_path / "run", data, *few, "--methods", "SGD,SWAG", "--resume") == 0
    assert (tmp_path / "run" / cell_name("own", 1, "SGD")).read_bytes() == one
    found = results(tmp_path / "run")["cells"]["own"]
    assert set(found) == {"SGD", "SWAG"} and [cell["split"] for cell in found["SWAG"]] == [0, 1]


# ---- what may see the test rows -----------------------------------------------------------------------------------


def test_nothing_is_chosen_on_the_test_rows(data: Path) -> None:
    """With other test targets every choice and prediction is the same."""
    flags = dict(zip([flag[2:] for flag in TINY[::2]], TINY[1::2], strict=True))
    values: dict[str, Any] = {name: int(value) if value.isdecimal() else value for name, value in flags.items()}
    settings = Settings(data_path=str(data), **values)
    table = load_table("own", data)
    split = split_of(table, 0)
    other = split_of(table, 0)
    other.y_test.neg_().add_(100)
    for name in NAMES:
        one, two = (METHODS[name](Bench(settings, each, 0, 60)) for each in (split, other))
        assert one.levels == two.levels and one.tried == two.tried
        assert torch.equal(one.forecast.mean, two.forecast.mean)
        assert torch.equal(one.forecast.variance, two.forecast.variance)
        assert not torch.equal(one.forecast.targets, two.forecast.targets)


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "small", "hidden"),
    [(1030, False, (50,)), (3338, False, (1000, 500, 50)), (16599, False, (1000, 1000, 500, 50)), (16599, True, (50,))],
)
def test_networks_grow_with_the_data(rows: int, small: bool, hidden: tuple[int, ...]) -> None:
    assert hidden_of(Settings(uci_small=small), rows) == hidden


def test_flags_override_the_defaults_of_a_size() -> None:
    assert preset_of(Settings(), 300).batch_size == 30 and preset_of(Settings(), 1000).batch_size == 100
    preset = preset_of(Settings(lr_init="1e-3,1e-2", wd="0.1", epochs=7, no_schedule=True), 300)
    assert (preset.lr, preset.wd, preset.epochs, preset.collected) == ((1e-3, 1e-2), (0.1,), 7, (1.0,))
    assert splits_of(Settings(splits="0-2,7")) == [0, 1, 2, 7]


REFUSED = {
    "--splits 0-4": "boston has splits 0 to 2",
    "--splits x": "--splits must be numbers",
    "--splits 1,1": "each once",
    "--dataset boston,boston": "--dataset must name at least one data set",
    "--dataset nowhere": "neither nowhere.npz nor a folder nowhere",
    "--methods SGD,swag": "unknown method 'swag'; known are SWAG",
    "--wd 1e-3,x": "--wd must list numbers",
    "--lr_init 0": "--lr_init must list numbers, positive",
    "--folds 1": "--folds must be at least 2",
    "--swag_start 5": "--swag_start must leave 3 of the 6 epochs",
    "--scale 0": "--scale must be positive",
    "--momentum 1": "--momentum must be at least 0 and less than 1",
    "--no_schedule": "--no_schedule and --swag_lr exclude each other",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_run_is_one_line_and_writes_nothing(
    flags: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = run(tmp_path / "run", data, *flags.split())
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and REFUSED[flags] in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_data_folder_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        uci.main(["--dir", str(tmp_path / "run")])
    assert "--data_path is needed" in capsys.readouterr().err


def test_released_flags_are_understood(data: Path, tmp_path: Path) -> None:
    """As the released script was called, `--inference` naming the method."""
    flags = (
        f"--dir {tmp_path / 'run'} --database_path {data} --dataset boston --split 0 --model RegNet --epochs 4 "
        "--lr_init 1e-3 --wd 1e-2 --batch_size 30 --momentum 0.9 --swag_start 1 --no_schedule --max_num_models 20 "
        "--num_samples 4 --scale 0.5 --model_variance --noise_var --inference ess --temperature 10 --prior_std 1 "
        "--uci-small --double-bias-lr --folds 2 --seed 1"
    )
    with redirect_stdout(StringIO()):
        assert uci.main(flags.split()) == 0
    cells = results(tmp_path / "run")["cells"]["boston"]
    assert set(cells) == {"SGD", "PCA+ESS"}
    levels = cells["PCA+ESS"][0]["levels"]
    assert levels == {"lr": 1e-3, "wd": 1e-2, "swag_lr": 1e-3, "temperature": 10, "prior_std": 1}
    assert cells["PCA+ESS"][0]["tried"] == {}


def test_divergence_is_said_where_it_happened(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", data, "--methods", "SGD,GP", "--lr_init", "1e30", "--dataset", "boston") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "boston, split 0: every candidate diverged" in last and "boston, split 1: every candidate" in last


def test_what_fails_costs_no_other_cell(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Bench) -> Any:
        raise lb.NonFiniteError("no luck")

    flags = ["--dataset", "own", "--methods", "SGD,SWA,GP"]
    with monkeypatch.context() as patched:
        patched.setitem(METHODS, "SWA", fails)  # type: ignore[arg-type]
        assert run(tmp_path / "run", data, *flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "own, split 0, SWA: no luck; own, split 1, SWA: no luck (all else is kept by --resume)" in last
    assert {file.name for file in (tmp_path / "run" / "cells").iterdir()} == {
        f"own-{split}-{method}.json" for split in (0, 1) for method in ("SGD", "GP")
    }
    assert not (tmp_path / "run" / "results.json").exists()
    with redirect_stdout(StringIO()):
        assert run(tmp_path / "run", data, *flags, "--resume") == 0


# ---- the published table ------------------------------------------------------------------------------------------


def test_published_numbers_are_complete() -> None:
    for table in (LOG_LIKELIHOOD, RMSE, COVERAGE):
        assert list(table) == list(LOG_LIKELIHOOD)
        assert all(list(methods) == ["SGD", "PCA+ESS", "PCA+VI", "SWAG"] for methods in table.values())
    assert all(0.8 < level.mean < 1 for methods in COVERAGE.values() for level in methods.values())
    assert all(level.std for methods in LOG_LIKELIHOOD.values() for level in methods.values())


def test_a_verdict_is_by_one_printed_deviation() -> None:
    published = Level(-3.0, 0.1)
    assert [uci_report.verdict(value, published) for value in (-2.9, -3.0, -3.09, -3.11)] == [
        "better", "better", "within 1 sd", "worse",
    ]  # fmt: skip
    assert uci_report.likelihood_key("pol") == "normalized_gaussian_log_likelihood"
    assert uci_report.likelihood_key("concrete") == uci_report.likelihood_key("own") == "gaussian_log_likelihood"


def test_a_bench_refuses_networks_that_all_diverged(data: Path) -> None:
    settings = Settings(data_path=str(data), epochs=3, lr_init="1e30", wd="0", swag_start=0)
    with pytest.raises(SettingsError, match="every candidate diverged on some fold"):
        Bench(settings, split_of(load_table("own", data), 0), 0, 60).chosen("SWA")


@pytest.mark.parametrize(("best", "expected"), [(0, ["lr", "wd"]), (4, []), (5, ["wd"]), (7, ["lr"])])
def test_winners_at_the_edge_of_what_was_tried_are_reported(best: int, expected: list[str]) -> None:
    bench = Bench.__new__(Bench)
    bench.candidates = [Candidate(lr, wd, lr) for lr in (1e-3, 1e-2, 1e-1) for wd in (1e-4, 1e-3, 1e-2)]
    bench.__dict__["search"] = [{"SGD": float(number == best)} for number in range(9)]
    assert bench.at_edge("SGD") == expected
