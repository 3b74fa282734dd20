"""The width script at a tiny size: what each value is, what is written, going on, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from experiments import surface_bench, width, width_plots
from experiments.common import resolve_device
from experiments.subspace_sources import open_bench
from experiments.surface_bench import of_run
from experiments.surface_settings import as_subspace
from experiments.width import RAYS, Settings, table
from lowrank_bdl.subspaces.principal import pca_subspace
from lowrank_bdl.surfaces.widths import random_orthogonal_directions
from tests.experiments.surface_runs import LIMITS, by_hand, killed_after, make_run, quietly, refused

PROG = "python -m experiments.width"
TINY = [*LIMITS, *"--dist 2 --N 3 --orth_dist 4 --orth_N 3 --K 2 --line_N 4".split()]
FILES = {
    "results.json", "log.jsonl", "table.txt", "width.npz", "width.png", "line.png", "settings.json",
    "environment.json", "command.sh", *(f"values-{kind}.npz" for kind in RAYS),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("width"))


def run(path: Path, *more: str) -> int:
    return quietly(width.main, "--dir", str(path), *TINY, *more)


@pytest.fixture(scope="module")
def finished(trained: Path) -> Path:
    path = trained.parent / "finished"
    assert run(path, "--run", str(trained), "--rays", "all") == 0
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def test_values_are_those_of_networks_that_own_the_weights(trained: Path, finished: Path) -> None:
    settings = Settings(dir="unused", run=str(trained), train_limit=40, eval_limit=50, batch_size=16)
    opened = open_bench(as_subspace(settings), resolve_device("cpu"))
    bench, mean, last = of_run(settings, opened), opened.trained.posterior.mean, opened.trained.last
    assert last is not None and opened.trained.iterates is not None
    span = pca_subspace(opened.trained.collector)
    random = random_orthogonal_directions(span, 2, torch.Generator().manual_seed(1))
    centred = (opened.trained.iterates - mean).double()
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    top = right[0].float()
    step = (last - mean).norm()
    expected = {  # kind: (row, column, weights)
        "line": [(0, 1, mean), (0, 2, last), (0, 3, mean + 2 * (last - mean))],
        "random": [(1, 2, mean + 4 * random[1])],
        "sgd": [(0, 0, last - 4 * random[0])],
    }
    with np.load(finished / "width.npz") as arrays:
        np.testing.assert_allclose(arrays["line_ts"], [-step, 0, step, 2 * step], rtol=1e-5, atol=1e-6)
        for kind, cells in expected.items():
            for row, column, theta in cells:
                for name, value in by_hand(bench, theta).items():
                    assert arrays[f"{kind}_{name}"][row, column] == pytest.approx(value, rel=1e-4, abs=1e-6), kind
        either = [by_hand(bench, mean + sign * 2 * top)["train_loss"] for sign in (-1, 1)]
        np.testing.assert_allclose(sorted(arrays["pca_train_loss"][0, [0, 2]]), sorted(either), rtol=1e-3)
        assert list(arrays["pca_names"]) == ["component 1", "component 2", "component 3"]  # of four iterates
    np.testing.assert_allclose(results(finished)["rays"]["pca"]["stddevs"], singular[:3] / 3**0.5, rtol=1e-3)


def test_what_is_written(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} == FILES
    found = results(finished)
    assert set(found["rays"]) == set(RAYS) and found["between_swa_and_sgd"] > 0
    assert found["rays"]["random"]["names"] == ["random 1", "random 2"]
    with np.load(finished / "width.npz") as arrays:
        assert found["rays"]["sgd"]["at_center"]["train_loss"] == arrays["sgd_train_loss"][0, 1]
        assert arrays["random_validation_error"].shape == (2, 3)
        assert found["rays"]["line"]["lowest_error"]["value"] == arrays["line_validation_error"].min()
    text = (finished / "table.txt").read_text()
    assert "random (2)" in text and "pca: component 1" in text and "validation error %" in text
    for name in ("width.png", "line.png"):
        assert imread(finished / name).std() > 0.05


def test_a_killed_run_goes_on_to_the_same_numbers(
    trained: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(width_plots, "rays", lambda *_: None)
    monkeypatch.setattr(width_plots, "line", lambda *_: None)
    path, own = tmp_path / "run", ("--run", str(trained), "--rays", "random,line")
    with monkeypatch.context() as patch:
        patch.setattr(surface_bench.Kept, "write", killed_after(2))
        assert run(path, *own) == 130
    assert "--resume" in capsys.readouterr().err and not (path / "results.json").exists()
    before = (path / "values-line.npz").stat().st_mtime_ns
    assert run(path, *own, "--resume") == 0
    assert (path / "values-line.npz").stat().st_mtime_ns == before
    assert run(path, "--run", str(trained), "--rays", "random,line,sgd", "--resume") == 0  # the list may grow
    with np.load(path / "width.npz") as found, np.load(finished / "width.npz") as expected:
        assert {name.split("_")[0] for name in found} == {"line", "random", "sgd"}
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_the_table_says_where_a_width_is_beyond_the_last_point() -> None:
    facts = {
        "names": ["a", "b"], "stddevs": [1.0, 2.0], "reach": 5.0, "half_widths": [[1.0, None], [None, None]],
        "at_center": {"train_loss": 0.25, "test_error": 0.5}, "lowest_error": {"value": 0.25, "at": {"distance": 2.0}},
    }  # fmt: skip
    rows = table({"pca": facts, "random": facts | {"stddevs": None}}, "test").splitlines()
    assert rows[2].split() == "pca: a 1 > 1 5 0.2500 50.00 25.00 2.00".split()
    assert rows[3].split() == "pca: b 2 beyond 5".split()
    assert rows[4].split() == "random (2) > 1 5 0.2500 50.00 25.00 2.00".split()


def test_bad_settings_are_one_line_and_nothing_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(path: Path, *arguments: str) -> str:
        return refused(width.main, PROG, capsys, path, *arguments)

    path, own = tmp_path / "out", ("--run", str(trained))
    assert "--run is needed" in refuses(path)
    assert "--dist must be positive; got 0.0" in refuses(path, *own, "--dist", "0")
    assert "--orth_N must be at least 2; got 1" in refuses(path, *own, "--orth_N", "1")
    assert "unknown kind of ray 'swa'; known are swag" in refuses(path, *own, "--rays", "swa")
    assert "there is no run of experiments.train" in refuses(path, "--run", str(tmp_path))
