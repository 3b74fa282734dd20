"""The plane script at a tiny size: what each value is, what is written, going on, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import curve_settings, plane, plane_plots, surface_bench
from experiments.common import SettingsError, resolve_device
from experiments.plane_settings import Settings, check
from experiments.plane_sources import open_scene
from experiments.subspace_sources import open_bench
from experiments.surface_bench import of_run
from experiments.surface_settings import as_subspace
from experiments.train_weights import read_weights
from lowrank_bdl.surfaces.curves import BezierCurve
from lowrank_bdl.surfaces.ellipse import swag_ellipse
from lowrank_bdl.surfaces.evaluation import evaluate_points
from lowrank_bdl.surfaces.plane import Plane
from tests.experiments.surface_runs import LIMITS, by_hand, killed_after, make_run, quietly, refused

PROG = "python -m experiments.plane"
FILES = {
    "results.json", "log.jsonl", "table.txt", "plane.safetensors", "values-plane.npz", "plane.npz", "plane.png",
    "plane-3d.png", "settings.json", "environment.json", "command.sh",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("plane"))


def run(path: Path, *more: str) -> int:
    return quietly(plane.main, "--dir", str(path), *LIMITS, "--grid_points", "3", *more)


@pytest.fixture(scope="module")
def finished(trained: Path) -> Path:
    path = trained.parent / "finished"
    assert run(path, "--run", str(trained)) == 0
    return path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a tiny run."""
    monkeypatch.setattr(plane_plots, "contours", lambda *_: None)
    monkeypatch.setattr(plane_plots, "surface", lambda *_: None)


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def test_values_are_those_of_networks_that_own_the_weights(trained: Path, finished: Path) -> None:
    settings = Settings(dir="unused", run=str(trained), train_limit=40, eval_limit=50, batch_size=16)
    opened = open_bench(as_subspace(settings), resolve_device("cpu"))
    bench = of_run(settings, opened)
    space = lb.Subspace.load(finished / "plane.safetensors", bench.layout)
    with np.load(finished / "plane.npz") as found:
        arrays = dict(found)
    for row, column in ((0, 2), (1, 1)):
        xy = torch.tensor([arrays["xs"][column], arrays["ys"][row]])
        for name, value in by_hand(bench, space.to_theta(xy)).items():
            assert arrays[name][row, column] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    principal = opened.trained.posterior.covariance.principal_components(2)[1]
    cosines = (space.basis.mT @ principal).abs()
    torch.testing.assert_close(cosines, torch.eye(2), rtol=0, atol=1e-4)
    markers = results(finished)["markers"]
    assert set(markers) == {"SWA", "SGD"}
    for name, theta in (("SWA", opened.trained.posterior.mean), ("SGD", opened.trained.last)):
        assert theta is not None
        for key, value in by_hand(bench, theta).items():
            assert markers[name][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        own = torch.tensor([markers[name][key] for key in ("x", "y")])
        torch.testing.assert_close(own, space.project(theta), rtol=1e-4, atol=1e-4)
        gap = (theta - space.to_theta(space.project(theta))).norm().item()
        assert markers[name]["off"] == pytest.approx(gap, rel=1e-3, abs=1e-4)
    seen = Plane(bench.layout, space.origin, *space.basis.mT)
    ellipse = swag_ellipse(seen, opened.trained.posterior)
    np.testing.assert_allclose(arrays["line_SWAG"], ellipse.numpy(), rtol=1e-4, atol=1e-5)
    assert arrays["line_path"].shape == (4, 2)
    for line in ("line_SWAG", "line_path"):
        assert arrays["xs"][0] < arrays[line][:, 0].min() and arrays[line][:, 1].max() < arrays["ys"][-1]


def test_what_is_written(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} == FILES
    found = results(finished)
    assert found["settings"]["span"] == "pca" and found["plane"]["numbers"] == [0, 1] and found["seconds"] > 0
    with np.load(finished / "plane.npz") as arrays:
        lowest = found["lowest"]["train_loss"]
        assert lowest["value"] == arrays["train_loss"].min() and lowest["largest"] == arrays["train_loss"].max()
        assert lowest["x"] in arrays["xs"] and lowest["y"] in arrays["ys"]
        assert arrays["validation_error"].shape == (3, 3)
    table = (finished / "table.txt").read_text()
    assert "off the plane" in table and "validation error %" in table and "SWA" in table
    for name in ("plane.png", "plane-3d.png"):
        assert imread(finished / name).std() > 0.05


@pytest.mark.parametrize("span", ["random", "filter", "hessian", "principal"])
def test_other_directions(span: str, trained: Path, tmp_path: Path, no_figures: None) -> None:
    more = ("--span", span, "--dist", "0.5", "--grid_points", "2", "--operator", "ggn")
    assert run(tmp_path / "run", "--run", str(trained), *more) == 0
    assert results(tmp_path / "run")["plane"]["span"] == span
    space = lb.Subspace.load(tmp_path / "run" / "plane.safetensors")
    if span == "filter":  # zero in biases and batch norm; lengths of the network's own filters
        assert space.layout is not None
        directions = space.layout.unflatten(space.basis.mT)
        assert not directions["15.bias"].any()
        own = space.layout.unflatten(space.origin)["15.weight"].norm(dim=1)
        torch.testing.assert_close(directions["15.weight"].norm(dim=-1), own.expand(2, -1), rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(space.gram, torch.eye(2).double(), rtol=0, atol=1e-5)
    with np.load(tmp_path / "run" / "plane.npz") as arrays:
        assert arrays["xs"].tolist() == [-0.5, 0.5]


@pytest.mark.usefixtures("no_figures")
def test_a_killed_run_goes_on_to_the_same_numbers(
    trained: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    monkeypatch.setattr("lowrank_bdl.surfaces.evaluation._POINTS_A_PASS", 4)
    with monkeypatch.context() as patch:
        patch.setattr(surface_bench.Kept, "write", killed_after(1))
        assert run(path, "--run", str(trained)) == 130
    assert "--resume" in capsys.readouterr().err and not (path / "results.json").exists()
    with np.load(path / "values-plane.npz") as arrays:
        assert np.isnan(arrays["train_loss"]).tolist() == [False] * 4 + [True] * 5
    evaluated = []
    monkeypatch.setattr(
        surface_bench,
        "evaluate_points",
        lambda *a, **k: (evaluated.append(k["known"] is not None if "known" in k else None), evaluate_points(*a, **k))[
            1
        ],
    )
    assert run(path, "--run", str(trained), "--resume") == 0
    assert evaluated == [True, None]
    with np.load(path / "plane.npz") as found, np.load(finished / "plane.npz") as expected:
        assert set(found) == set(expected)
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.usefixtures("no_figures")
def test_a_plane_of_a_curve_and_of_three_networks(trained: Path, tmp_path: Path) -> None:
    weights = read_weights(trained / "weights.safetensors")
    theta = weights.last
    generator = torch.Generator().manual_seed(0)
    bend, end = theta + 0.05 * torch.randn(2, len(theta), generator=generator)
    BezierCurve([theta, bend, end], weights.layout).save(tmp_path / "curve-Bezier.safetensors")
    of_network = ("--model", "SmallConvNet", "--dataset", "digits", "--grid_points", "2")
    curve = str(tmp_path / "curve-Bezier.safetensors")
    assert run(tmp_path / "curve", "--curve", curve, *of_network, "--curve_points", "5") == 0
    with np.load(tmp_path / "curve" / "plane.npz") as arrays:
        line = arrays["line_Bézier curve"]
        assert line.shape == (5, 2) and list(line[0]) == [0, 0]
        np.testing.assert_allclose(line[-1], arrays["marker_end"], atol=1e-4)
        middle = 0.25 * arrays["marker_start"] + 0.5 * arrays["marker_bend"] + 0.25 * arrays["marker_end"]
        np.testing.assert_allclose(line[2], middle, atol=1e-4)
    assert max(found["off"] for found in results(tmp_path / "curve")["markers"].values()) < 1e-3

    torch.save({"state_dict": _state(trained, bend)}, tmp_path / "bend.pt")
    torch.save({"state_dict": _state(trained, end)}, tmp_path / "end.pt")
    files = ",".join([str(trained), str(tmp_path / "bend.pt"), str(tmp_path / "end.pt")])
    assert run(tmp_path / "three", "--ckpt", files, "--grid_points", "2") == 0
    assert list(results(tmp_path / "three")["markers"]) == ["bend.pt", "end.pt", "trained"]
    with np.load(tmp_path / "three" / "plane.npz") as three, np.load(tmp_path / "curve" / "plane.npz") as arrays:
        np.testing.assert_allclose(three["marker_bend.pt"], arrays["marker_bend"], rtol=1e-5)


def _state(trained: Path, theta: torch.Tensor) -> dict[str, torch.Tensor]:
    settings = Settings(dir="unused", run=str(trained))
    model = open_bench(as_subspace(settings), resolve_device("cpu")).model
    lb.ParameterLayout.from_module(model).assign_(model, theta)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.usefixtures("no_figures")
def test_the_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(curve_settings.TOY, "curve_epochs", 2)
    monkeypatch.setitem(curve_settings.TOY, "endpoint_epochs", 2)
    arguments = ("--dir", str(tmp_path / "toy"), "--toy", "two_spirals", "--grid_points", "3", "--threads", "1")
    assert quietly(plane.main, *arguments) == 0
    found = results(tmp_path / "toy")
    assert set(found["markers"]) == {"start", "bend", "end"} and found["reported_on"] == "test"
    assert quietly(plane.main, *arguments, "--resume") == 0
    again = results(tmp_path / "toy")
    assert again["markers"] == found["markers"] and again["lowest"] == found["lowest"]


def test_levels_are_close_together_at_the_bottom_and_bear_infinity() -> None:
    image = np.array([[0.1, 0.2, 0.5], [1.0, 5.0, np.inf]])
    levels = plane_plots.levels_of(image)
    assert levels[0] == 0.1 and levels[-1] < 5 and (np.diff(levels, 2) > 0).all()
    for odd in (np.full((2, 2), np.inf), np.full((2, 2), 0.5)):
        assert (np.diff(plane_plots.levels_of(odd)) > 0).all()


def test_bad_settings_are_one_line_and_nothing_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(path: Path, *arguments: str) -> str:
        return refused(plane.main, PROG, capsys, path, *arguments)

    path, own = tmp_path / "out", ("--run", str(trained))
    assert "exactly one of --run, --curve, --ckpt, --toy is needed; got 0" in refuses(path)
    assert "got 2" in refuses(path, *own, "--toy", "two_spirals")
    assert "three different sets of weights" in refuses(path, "--ckpt", "a,b,a")
    assert "--grid_points must be at least 2; got 1" in refuses(path, *own, "--grid_points", "1")
    assert "--PC1 and --PC2 must differ; both are 1" in refuses(path, *own, "--PC1", "1")
    assert "--sigmas must be positive; got 0.0" in refuses(path, *own, "--sigmas", "0")
    assert "--margin_top must not be negative" in refuses(path, *own, "--margin_top", "-1")
    assert "--bn_subset must be in (0, 1]; got 2.0" in refuses(path, *own, "--bn_subset", "2")
    assert "--span pca: the deviations have numerical rank" in refuses(path, *own, "--PC2", "9")
    assert "there is no run of experiments.train" in refuses(path, "--run", str(tmp_path))
    assert "there is no such file" in refuses(path, "--curve", "x.st", "--model", "SmallConvNet", "--dataset", "digits")
    assert "give --model and --dataset" in refuses(path, "--curve", str(tmp_path / "x.safetensors"))
    gone = f"{trained},{tmp_path / 'a.pt'},{tmp_path / 'b.pt'}"
    assert "there is no such file" in refuses(path, "--ckpt", gone)


def test_another_run_is_not_gone_on_with(trained: Path, finished: Path, tmp_path: Path) -> None:
    settings = check(Settings(dir=str(finished), run=str(trained), resume=True))
    scene = open_scene(settings, resolve_device("cpu"))
    other = dataclasses.replace(settings, dir=str(tmp_path))
    space = lb.Subspace.load(finished / "plane.safetensors")
    lb.Subspace(space.layout, space.origin + 1, space.basis, {"span": "pca", "weights": "0"}).save(
        tmp_path / "plane.safetensors"
    )

    class Folder:
        path, settings = tmp_path, other

    with pytest.raises(SettingsError, match=r"plane\.safetensors is of another run"):
        scene(Folder())  # type: ignore[arg-type]
