"""Simplexes against networks, end to end at a tiny size; the picture's geometry; ensembles; refusals."""

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

import lowrank_bdl as lb
from experiments import simplex, simplex_plots, simplex_report
from experiments.evaluation import Predictions
from experiments.train_weights import read_weights
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex
from tests.oracles import assert_close

TINY = (
    "--dataset digits --model SmallConvNet --train_limit 60 --batch_size 20 --endpoint_epochs 4 --epochs 1 "
    "--connect_epochs 2 --n_component 2 --n_verts 3 --connect 1 --num_samples 3 --picture 3 --eval_limit 40 "
    "--use_test --threads 1"
).split()
TOY = (
    "--toy two_spirals --n_component 2 --n_verts 4 --endpoint_epochs 12 --epochs 3 --num_samples 4 --picture 3 "
    "--threads 1"
).split()


def run(path: Path, *more: str) -> int:
    return simplex.main(["--dir", str(path), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simplex") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path, *TINY) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {name for name in contents(finished) if not name.startswith("network-")}
    assert names == {
        "simplex-1.safetensors", "simplex-2.safetensors", "complex.safetensors", "predictions-1-0.npz",
        "predictions-1-1.npz", "predictions-1-2.npz", "predictions-2-0.npz", "predictions-2-1.npz",
        "predictions-2-2.npz", "values-simplex-1.npz", "values-simplex-2.npz", "values-complex.npz",
        "values-straight.npz", "values-picture.npz", "ensembles.png", "simplex.png", "table.txt", "log.jsonl",
        "results.json", "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    for figure in ("ensembles.png", "simplex.png"):
        assert imread(finished / figure).std() > 0.05
    printed = (finished.parent / "stdout").read_text()
    assert printed.endswith((finished / "table.txt").read_text() + f"\nwritten to {finished}\n")


def test_simplexes_are_grown_from_the_networks_and_joined(finished: Path) -> None:
    found = [lb.load_posterior(finished / f"simplex-{number}.safetensors") for number in (1, 2)]
    joined = lb.load_posterior(finished / "complex.safetensors")
    assert joined.simplexes == ((0, 2), (1, 2)) and joined.num_vertices == 3
    for number, surface in enumerate(found, start=1):
        assert isinstance(surface, SimplicialComplex) and surface.simplexes == ((0, 1, 2),)
        network = read_weights(finished / f"network-{number}" / "weights.safetensors")
        assert torch.equal(surface.vertex_0, network.last)
        assert torch.equal(surface.vertex_0, joined.vertices[number - 1])
    assert not torch.equal(found[0].vertex_0, found[1].vertex_0)


def test_ensembles_are_those_of_the_definition(finished: Path) -> None:
    found = results(finished)["ensembles"]
    assert set(found) == {"deep ensemble", "1-simplex", "2-simplex"}
    for dimension, name in enumerate(("deep ensemble", "1-simplex", "2-simplex")):
        entries = found[name]
        assert [(e["components"], e["networks"]) for e in entries] == [
            (1, 3 if dimension else 1),
            (2, 6 if dimension else 2),
        ]
        arrays = [np.load(finished / f"predictions-{component}-{dimension}.npz") for component in (1, 2)]
        targets = arrays[0]["targets"]
        assert len(targets) == 40
        for count, entry in enumerate(entries, start=1):
            probabilities = np.mean([a["probabilities"].astype(float) for a in arrays[:count]], axis=0)
            assert entry["accuracy"] == pytest.approx((probabilities.argmax(1) == targets).mean()), name
            right = probabilities[np.arange(40), targets]
            assert entry["nll"] == pytest.approx(-np.log(right).mean(), rel=1e-5)


def test_points_of_a_simplex_are_evaluated_where_they_are(finished: Path) -> None:
    """The value at a vertex is what lb.predict says of the network there."""
    found = results(finished)["points"]
    assert set(found) == {"simplex 1", "simplex 2", "complex"}
    surface = lb.load_posterior(finished / "simplex-1.safetensors")
    entry = found["simplex 1"]
    assert entry["log_volume"] == pytest.approx(surface.log_volume().item())
    lengths = [(surface.vertices[i] - surface.vertices[j]).norm().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert entry["edge_lengths"] == pytest.approx(lengths, rel=1e-5)
    accuracy = results(finished)["ensembles"]["deep ensemble"][0]["accuracy"]
    assert entry["vertices"]["error"][0] == pytest.approx(1 - accuracy, abs=0.026)  # batch norm: one image may differ
    values = np.load(finished / "values-simplex-1.npz")
    assert values["train_loss"].shape == (6,) and entry["points"]["number"] == 3
    regularized = values["train_loss"] + 0.5 * results(finished)["weight_decay"] * values["train_squared_norm"]
    assert entry["vertices"]["train_loss"] == pytest.approx(regularized[:3].tolist())
    assert entry["points"]["train_loss_max"] == pytest.approx(regularized[3:].max())


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    settings = json.loads((path / "settings.json").read_text())
    (path / "settings.json").write_text(json.dumps({**settings, "dir": str(path)}))
    for name in (
        "results.json",
        "simplex-2.safetensors",
        "complex.safetensors",
        "predictions-2-2.npz",
        "values-complex.npz",
    ):
        (path / name).unlink()
    kept = (path / "simplex-1.safetensors").read_bytes()
    for file in path.glob("network-*/settings.json"):
        file.write_text(file.read_text().replace(str(finished), str(path)))
    assert run(path, *TINY, "--resume") == 0
    again, expected = results(path), results(finished)
    for key in ("ensembles", "points", "midway", "networks"):
        assert again[key] == expected[key]
    assert (path / "simplex-1.safetensors").read_bytes() == kept
    before = contents(path)
    assert run(path, *TINY, "--resume", "--lr", "0.5") == 2
    assert contents(path) == before


def test_finished_runs_are_taken(finished: Path, tmp_path: Path) -> None:
    runs = ",".join(str(finished / f"network-{number}") for number in (1, 2))
    more = "--connect_epochs 1 --n_verts 1 --connect 1 --num_samples 2 --eval_limit 40 --threads 1".split()
    assert run(tmp_path / "run", "--run", runs, *more) == 0
    found = results(tmp_path / "run")
    assert list(found["ensembles"]) == ["deep ensemble"] and list(found["points"]) == ["complex"]
    expected = results(finished)["ensembles"]["deep ensemble"]
    assert [e["nll"] for e in found["ensembles"]["deep ensemble"]] == pytest.approx([e["nll"] for e in expected])


def test_the_toy_draws_a_tetrahedron_and_decisions(tmp_path: Path) -> None:
    assert run(tmp_path / "run", *TOY) == 0
    for figure in ("ensembles.png", "simplex.png", "decisions.png"):
        assert imread(tmp_path / "run" / figure).std() > 0.05
    assert np.load(tmp_path / "run" / "values-picture.npz")["train_loss"].shape == (4 * 6,)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [3, 4, 6])
def test_the_picture_keeps_distances(m: int) -> None:
    vertices = torch.randn(m, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = simplex_plots.embedding(SimplicialComplex(vertices))
    assert places.shape == (min(m, 4), 3)
    assert_close(torch.pdist(places), torch.pdist(vertices[:4]), cond=10)
    assert torch.equal(places[0], torch.zeros(3, dtype=torch.float64)) and places[1, 0] > 0


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_small_triangles_cover_the_face(steps: int) -> None:
    points, triangles = simplex_plots.barycentric_grid(steps)
    assert len(points) == steps * (steps + 1) // 2 and len(triangles) == (steps - 1) ** 2
    assert_close(points.sum(1), torch.ones(len(points), dtype=torch.float64))
    flat = points @ torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    corners = flat[triangles]
    edges = corners[:, 1:] - corners[:, :1]
    areas = torch.linalg.det(edges).abs() / 2
    assert_close(areas, torch.full_like(areas, 0.5 / (steps - 1) ** 2), cond=10)
    coefficients = simplex_plots.picture_points(4, steps)
    assert coefficients.shape == (4 * len(points), 4)
    assert ((coefficients > 0).sum(1) <= 3).all()


def test_the_average_of_predictions() -> None:
    """Of 0.9 and 0.3 for the right class it is 0.6; likelihoods that underflow as probabilities are not lost."""
    parts = [
        Predictions(torch.tensor([[p, 1 - p]] * 2), torch.zeros(2), torch.tensor([0, 0]), torch.tensor([p, p]).log())
        for p in (0.9, 0.3)
    ]
    found = simplex_report.averaged(parts, seed=0)
    assert found["nll"] == pytest.approx(-np.log(0.6), rel=1e-6) and found["accuracy"] == 1
    tiny = Predictions(torch.tensor([[0.0, 1.0]] * 2), torch.zeros(2), torch.tensor([0, 0]), torch.tensor([-300.0] * 2))
    assert simplex_report.averaged([tiny, tiny], seed=0)["nll"] == pytest.approx(300)


@pytest.mark.parametrize(
    "argv,message",
    [
        ("--dataset digits", "nothing to grow from: give --run, --model or --toy"),
        ("--toy two_spirals --model MLP", "--toy has networks of its own; leave --run and --model out"),
        ("--model MLP --n_verts 0", "--n_verts must be at least 1; got 0"),
        ("--model MLP --LMBD -1", "--volume must be at least 0; got -1.0"),
        ("--model MLP --lr 0", "--lr must be positive; got 0.0"),
        ("--model MLP --n_component 1 --connect 1", "--connect needs at least 2 networks; got 1"),
        ("--model MLP --perturbation 0", "--perturbation 0 starts with no volume"),
        ("--model Nothing --dataset digits", "--model Nothing is unknown"),
        ("--run nowhere", "nowhere"),
        ("--toy two_spirals --resume", "--resume: there is no run in"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tmp_path / "run", *argv.split())
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()
