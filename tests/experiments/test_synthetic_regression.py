"""Regression on one number, end to end at a tiny size: what it writes, what it refuses, resume; and exact answers."""

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
from torch import Tensor
from torch.func import functional_call

import lowrank_bdl as lb
from experiments import synthetic_regression, synthetic_regression_settings
from experiments.common import SettingsError
from experiments.synthetic_regression_cells import correlation, function_rhat, metrics
from experiments.synthetic_regression_data import CLUSTERS, NOISE_STD, draw, features, load
from experiments.synthetic_regression_methods import FITS, Bench, Outcome, joint_of, subspace_of
from experiments.synthetic_regression_networks import (
    Networks,
    curve_losses,
    evaluate,
    make_net,
    prior_stddevs,
    train,
)
from experiments.synthetic_regression_settings import METHODS, NEED_PYRO, Settings, check, units_of
from experiments.synthetic_regression_target import AllWeights

NAMES = [method for method in METHODS if method not in NEED_PYRO]  # which have a test of their own
TINY = (
    "--epochs 8 --swag_start 3 --max_num_models 3 --hidden 8,6 --curve_epochs 4 --random_rank 3 --num_samples 16 "
    "--chains 2 --burn_in 2 --vi_steps 5 --nuts_samples 4 --nuts_warmup 3 --small_hidden 3 --hmc_chains 2 "
    "--hmc_samples 4 --hmc_warmup 3 --hmc_depth 2 --members 3 --member_steps 5 --mfvi_steps 5 --grid 21 --rows 60"
).split()


def run(path: Path, *flags: str) -> int:
    with redirect_stdout(StringIO()) as printed:
        status = synthetic_regression.main(["--dir", str(path), "--methods", ",".join(NAMES), *TINY, *flags])
    if status == 0:
        (path.parent / "stdout").write_text(printed.getvalue())
    return status


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("synthetic") / "run"
    assert run(path) == 0
    return path


def results(path: Path) -> dict[str, Any]:
    """What must not depend on how long a run took, or on whether it was interrupted."""
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    for cell in found["cells"].values():
        del cell["seconds"]
    del found["settings"]["dir"], found["settings"]["resume"]
    return found


# ---- what a run writes --------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    cells = {f"cells/{method}.{suffix}" for method in NAMES for suffix in ("json", "npz")}
    assert names == cells | {
        "networks.safetensors", "swag.safetensors", "bands.png", "all_weights.png", "correlations.png", "table.txt",
        "log.jsonl", "results.json", "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    for name in ("bands.png", "all_weights.png", "correlations.png"):
        picture = imread(finished / name)
        assert min(picture.shape[:2]) >= 200 and picture[..., :3].std() > 0.02
    newest = max(finished.rglob("*"), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "results.json"
    assert (finished.parent / "stdout").read_text().startswith((finished / "table.txt").read_text())


def test_cells_hold_bands_and_metrics(finished: Path) -> None:
    found = results(finished)
    assert set(found["cells"]) == set(NAMES) and found["data"]["drawn"] and found["settings"]["seed"] == 1
    assert found["data"]["held_out"] == {"inside": 6, "outside": 6, "gaps": 200} and found["data"]["train"] == 48
    for method, cell in found["cells"].items():
        assert len(cell["mean"]) == len(cell["std"]) == len(found["x"]) == 21
        with np.load(finished / "cells" / f"{method}.npz") as arrays:
            functions = arrays["functions"].astype(float)
        assert functions.shape == (min(cell["draws"], 200), 21)
        if cell["draws"] <= 200:
            np.testing.assert_allclose(functions.mean(0), cell["mean"], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(functions.std(0), cell["std"], rtol=1e-4, atol=1e-5)
        assert set(cell["metrics"]) == {"inside", "outside", "gaps"}
        assert all(0 <= own["coverage"] <= 1 and own["rows"] > 0 for own in cell["metrics"].values())
        if cell["draws"] > 2:  # the grid is the integers from -10 to 10
            rows = {place: np.corrcoef(functions[:, 10], functions[:, 10 + place])[0, 1] for place in (-8, -3, 1, 3, 8)}
            neighbours = found["correlation_at_neighbours"][method]
            assert neighbours == pytest.approx({str(place): rho for place, rho in rows.items()}, abs=1e-6)
        else:
            assert method not in found["correlation_at_neighbours"]
    draws = {method: cell["draws"] for method, cell in found["cells"].items()}
    assert draws["SGD"] == 1 and draws["Ensemble"] == 3 and draws["PCA+ESS"] == 16 and draws["Prior"] == 1000
    assert found["cells"]["SGD"]["std"] == [0.0] * 21


def test_published_levels_are_the_defaults(finished: Path) -> None:
    details = {method: cell["details"] for method, cell in results(finished)["cells"].items()}
    levels = {name: (own["temperature"], own["prior_std"]) for name, own in details.items() if "temperature" in own}
    assert levels == {"Random+ESS": (0.15, 1), "PCA+ESS": (1.5, 5), "Curve+ESS": (0.75, 1), "VI": (0.75, 1)}
    assert details["Curve+ESS"]["rank"] == details["VI"]["rank"] == 2 and details["Random+ESS"]["rank"] == 3
    assert details["Random+ESS"]["lengths"] == pytest.approx([1.0] * 3, rel=1e-5)
    settings = Settings()
    assert lb.ParameterLayout.from_module(make_net(units_of("hidden", settings.hidden))).numel == 15_801
    assert lb.ParameterLayout.from_module(make_net(units_of("small_hidden", settings.small_hidden))).numel == 261


def test_resume_keeps_what_is_there_and_changes_no_number(finished: Path, tmp_path: Path) -> None:
    """A run that was interrupted in its second cell; then another method is added."""
    path = tmp_path / "run"
    assert run(path, "--methods", "SWAG,Curve+ESS") == 0
    (path / "results.json").unlink()
    (path / "cells" / "Curve+ESS.json").unlink()
    kept = {path / name: (path / name).stat().st_mtime_ns for name in ("networks.safetensors", "cells/SWAG.json")}
    assert run(path, "--methods", "SWAG,Curve+ESS,Ensemble", "--resume") == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    one, other = results(path)["cells"], results(finished)["cells"]
    assert one == {method: other[method] for method in ("SWAG", "Curve+ESS", "Ensemble")}


def test_the_samplers_of_pyro_have_their_cells(tmp_path: Path) -> None:
    pytest.importorskip("pyro")
    assert run(tmp_path / "run", "--methods", "NUTS,HMC", "--nuts_subspace", "pca") == 0
    cells = results(tmp_path / "run")["cells"]
    assert cells["NUTS"]["details"]["temperature"] == 0.5 and cells["NUTS"]["details"]["subspace"] == "pca"
    assert cells["NUTS"]["draws"] == 4 and cells["HMC"]["draws"] == 8
    assert 0 <= cells["HMC"]["details"]["acceptance"] <= 1 and "largest_rhat" in cells["HMC"]["details"]
    assert (tmp_path / "run" / "bands.png").exists() and (tmp_path / "run" / "all_weights.png").exists()


# ---- refusals -----------------------------------------------------------------------------------------------------

REFUSED = {
    "--methods ESS": "unknown method 'ESS'",
    "--hidden 8,x": "--hidden must be numbers of units",
    "--swag_start 6": "--swag_start must leave 3 of the 8 epochs",
    "--thin 0": "--thin must be at least 1",
    "--scale 0": "--scale must be positive",
    "--momentum 1": "--momentum must be at least 0 and less than 1",
    "--wd -1": "--wd must be at least 0",
    "--num_samples 8 --chains 4": "--num_samples must be at least 4 a chain",
    "--test_fraction 0.5": "--test_fraction must be between 0 and 0.4",
    "--curve_temperature -1": "--curve_temperature must be positive",
    "--data_path nowhere": "neither data.npy nor a folder with it",
    "--resume": "--resume: there is no run in",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_run_is_one_line_and_writes_nothing(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = run(tmp_path / "run", *flags.split())
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and REFUSED[flags] in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_data_and_other_settings_are_not_resumed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.json").read_bytes()
    assert run(finished, "--resume", "--scale", "1") == 2
    assert "--resume: settings differ" in capsys.readouterr().err
    np.save(tmp_path / "data.npy", draw(60, 2)[0])
    assert run(finished, "--resume", "--data_path", str(tmp_path)) == 2
    assert "is of another recipe" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


def test_without_pyro_its_samplers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_regression_settings, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"NUTS and HMC need pyro: pip install lowrank-bdl\[experiments\]"):
        check(Settings())
    assert check(Settings(methods="SGD")).methods == "SGD"


def test_divergence_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--methods", "SGD", "--lr_init", "1e20") == 2
    assert "expected" in (last := capsys.readouterr().err.splitlines()[-1]) and "finite" in last
    assert not (tmp_path / "run" / "results.json").exists()


# ---- data ---------------------------------------------------------------------------------------------------------


def test_a_drawn_set_is_like_the_published_one_and_a_function_of_its_seed() -> None:
    table, more = draw(400, 3)
    assert table.shape == (400, 2) and np.array_equal(table, draw(400, 3)[0]) and not np.array_equal(
        table, draw(400, 4)[0]
    )  # fmt: skip
    inside = [(low <= table[:, 0]) & (table[:, 0] <= high) for low, high in CLUSTERS]
    assert np.all(sum(inside) == 1) and [int(part.sum()) for part in inside] == [116, 136, 148]
    assert np.all((np.abs(more[:, 0]) > CLUSTERS[1][1]) & (np.abs(more[:, 0]) < CLUSTERS[2][0]))
    ordered = table[table[:, 0].argsort()]
    noise = np.diff(ordered[:, 1]) / math.sqrt(2)  # neighbours differ by noise alone, nearly
    assert np.median(np.abs(noise)) / 0.6745 == pytest.approx(NOISE_STD, rel=0.2)


def test_held_out_rows_are_held_out(tmp_path: Path) -> None:
    table = draw(200, 1)[0]
    np.save(tmp_path / "data.npy", table)
    data = load(Settings(data_path=str(tmp_path)))
    assert not data.drawn and set(data.held_out) == {"inside", "outside"}
    parts = [data.train, *data.held_out.values()]
    rows = torch.cat([torch.stack(part, 1) for part in parts])
    assert [len(part[0]) for part in parts] == [160, 20, 20]
    assert torch.equal(rows[rows[:, 0].argsort()], torch.from_numpy(table[table[:, 0].argsort()]))
    rest = torch.cat([data.train[0], data.held_out["inside"][0]])
    assert data.held_out["outside"][0].abs().min() > rest.abs().max()
    assert load(Settings(data_path=str(tmp_path), test_fraction=0, outside_fraction=0)).held_out == {}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((40, 3)), r"must hold an array \(N, 2\)"),
        (np.zeros((5, 2)), "N >= 30"),
        (np.full((40, 2), np.nan), "finite floating-point"),
        (np.zeros((40, 2), dtype=int), "finite floating-point"),
        (np.array([[None, 1]] * 40, dtype=object), "cannot read"),
    ],
)
def test_unusable_files_are_refused(table: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", table)
    with pytest.raises(SettingsError, match=message):
        load(Settings(data_path=str(tmp_path)))


def test_a_run_without_held_out_rows_still_has_its_table(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", draw(60, 1)[0])
    flags = ["--data_path", str(tmp_path), "--test_fraction", "0", "--outside_fraction", "0", "--methods", "SGD"]
    assert run(tmp_path / "run", *flags) == 0
    assert "held out: none" in (tmp_path / "run" / "table.txt").read_text()


# ---- networks and laws against their definitions ------------------------------------------------------------------


def test_networks_side_by_side_are_the_networks() -> None:
    net, generator = make_net((5, 4)).double(), torch.Generator().manual_seed(0)
    layout = lb.ParameterLayout.from_module(net)
    thetas = torch.randn(3, layout.numel, generator=generator, dtype=torch.float64)
    inputs = torch.randn(3, 7, 2, generator=generator, dtype=torch.float64)
    expected = torch.stack(
        [functional_call(net, layout.unflatten(t), (x,))[:, 0] for t, x in zip(thetas, inputs, strict=True)]
    )
    torch.testing.assert_close(evaluate(layout, thetas, inputs), expected, rtol=1e-12, atol=1e-12)
    shared = torch.stack([functional_call(net, layout.unflatten(t), (inputs[0],))[:, 0] for t in thetas])
    torch.testing.assert_close(evaluate(layout, thetas, inputs[0]), shared, rtol=1e-12, atol=1e-12)


def target_of(hidden: tuple[int, ...], rows: int = 20) -> tuple[AllWeights, torch.nn.Module, Tensor, Tensor, Tensor]:
    net, generator = make_net(hidden).double(), torch.Generator().manual_seed(1)
    x = 4 * torch.rand(rows, generator=generator, dtype=torch.float64) - 2
    inputs, targets = features(x).double(), torch.sin(x)
    stddevs = prior_stddevs(net, 1.5)
    return (
        AllWeights(lb.ParameterLayout.from_module(net), stddevs, inputs, targets, 0.3), net, stddevs, inputs, targets,
    )  # fmt: skip


def test_the_law_of_all_weights_is_that_of_the_library() -> None:
    target, net, stddevs, inputs, targets = target_of((4, 3))
    space = lb.Subspace(target.layout, torch.zeros_like(stddevs), stddevs.diag())
    joint = lb.LogJoint(space, net, "gaussian", (inputs, targets.unsqueeze(1)), noise_variance=0.3)
    z = torch.randn(4, target.rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    for own, other in ((target.log_likelihood, joint.log_likelihood), (target.log_prior, joint.log_prior)):
        torch.testing.assert_close(own(z), other(z), rtol=1e-10, atol=1e-10)
        slopes = [torch.autograd.grad(law(z).sum(), z)[0] for law in (own, other)]
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("wrong", "agrees"), [(1.0, True), (1.5, False)])  # 1.5: the test must have power
def test_prior_correlations_are_those_of_the_arc_cosine_kernel(wrong: float, agrees: bool) -> None:
    """For one hidden layer the covariance of f is known at any width; Cho and Saul (2009), eq. 3.

    Functions of finite width have heavier tails than Gaussians, by a factor in the variance of a correlation that is
    below 4 here; an error of 5 standard errors at one of 36 pairs has a probability below 1e-4.
    """
    net, std, count = make_net((30,)).double(), 1.2, 20_000
    stddevs = prior_stddevs(net, std)
    layout = lb.ParameterLayout.from_module(net)
    first = next(iter(layout.slices.values()))
    stddevs[first] *= wrong
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-8.0, -4.0, -1.0, 0.0, 0.5, 2.0, 5.0, 9.0, 10.0], dtype=torch.float64)
    phi = features(x).double()
    z = torch.randn(count, layout.numel, generator=generator, dtype=torch.float64)
    found = correlation(evaluate(layout, stddevs * z, phi).numpy())
    inner = std**2 * (1 + phi @ phi.mT / 2)
    lengths = inner.diagonal().sqrt()
    angle = (inner / lengths.outer(lengths)).clamp(-1, 1).acos()
    kernel = std**2 * (1 + lengths.outer(lengths) * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi))
    expected = (kernel / kernel.diagonal().sqrt().outer(kernel.diagonal().sqrt())).numpy()
    errors = np.abs(found - expected) / np.maximum(1 - expected**2, 1e-6) * math.sqrt(count / 4)
    np.fill_diagonal(errors, 0)
    assert (errors.max() < 5) == agrees, errors.max()


def test_correlations_are_those_of_numpy_and_nan_where_nothing_varies() -> None:
    functions = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(correlation(functions), np.corrcoef(functions.T), rtol=1e-12)
    functions[:, 1] = 3.0
    found = correlation(functions)
    assert np.isnan(found[1]).all() and np.isnan(found[:, 1]).all() and np.isfinite(found[0, [0, 2, 3]]).all()


def test_r_hat_sees_chains_that_disagree() -> None:
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    assert function_rhat(values, 2)["largest_function_rhat"] < 1.05
    values[200:, 1] += 3
    assert function_rhat(values, 2)["largest_function_rhat"] > 1.5 > 1.05 > function_rhat(values[:, ::2], 2)[
        "median_function_rhat"
    ]  # fmt: skip
    assert math.isnan(function_rhat(torch.ones(8, 2), 2)["median_function_rhat"])


def bench_of(**levels: Any) -> Bench:
    flags = dict(zip([flag[2:] for flag in TINY[::2]], TINY[1::2], strict=True))
    tiny = {name: type(getattr(Settings(), name))(value) for name, value in flags.items()}
    settings = Settings(**{**tiny, **levels})
    return Bench(settings, load(settings))


def linear_posterior(bench: Bench) -> tuple[Tensor, Tensor]:
    """Mean (3,) and precision (3, 3) of z for a network without hidden layers."""
    stddevs = prior_stddevs(bench.small_net, bench.settings.prior_std)
    design = torch.cat([bench.inputs.double(), torch.ones(len(bench.inputs), 1, dtype=torch.float64)], 1) * stddevs
    precision = torch.eye(3, dtype=torch.float64) + design.mT @ design / bench.settings.noise_variance
    mean = torch.linalg.solve(precision, design.mT @ bench.data.train[1] / bench.settings.noise_variance)
    return mean, precision


def z_of(bench: Bench, outcome: Outcome) -> Tensor:
    return outcome.thetas / prior_stddevs(bench.small_net, bench.settings.prior_std)


def test_on_a_linear_model_every_method_knows_the_answer() -> None:
    """One prior and likelihood: modes are the mean, and mean-field variances are 1 / the precision's diagonal."""
    bench = bench_of(small_hidden="", noise_variance=2.0, member_steps=300, members=2, mfvi_steps=1200)
    mean, precision = linear_posterior(bench)
    modes = z_of(bench, FITS["Ensemble"](bench))
    torch.testing.assert_close(modes, mean.expand_as(modes), rtol=0, atol=1e-3)
    z = z_of(bench, FITS["MFVI"](bench))
    std = precision.diagonal().rsqrt()
    assert len(z) == 1000
    assert ((z.mean(0) - mean).abs() / std).max() < 5 / math.sqrt(1000) + 0.1
    assert (z.std(0) / std - 1).abs().max() < 5 / math.sqrt(2000) + 0.05


def test_hmc_knows_it_too() -> None:
    """Its mean and covariance, whitened by the exact ones, with 5 standard errors of the effective draws."""
    pytest.importorskip("pyro")
    bench = bench_of(small_hidden="", hmc_chains=2, hmc_samples=130, hmc_warmup=60, hmc_depth=4)
    mean, precision = linear_posterior(bench)
    outcome = FITS["HMC"](bench)
    size = outcome.details["smallest_ess"]
    assert outcome.chains == 2 and size > 50 and outcome.details["largest_rhat"] < 1.1
    white = (z_of(bench, outcome) - mean) @ torch.linalg.cholesky(precision)
    assert white.mean(0).abs().max() < 5 / math.sqrt(size)
    assert (torch.cov(white.mT) - torch.eye(3, dtype=torch.float64)).abs().max() < 5 * math.sqrt(2 / size)


def test_metrics_are_of_the_mixture() -> None:
    bench = bench_of()
    thetas = bench.all_weights.sample_prior(5, torch.Generator().manual_seed(0))
    found = metrics(bench, Outcome(bench.small_net, thetas))
    x, y = bench.data.held_out["inside"]
    outputs = evaluate(bench.all_weights.layout, thetas, features(x).double())
    density = torch.distributions.Normal(outputs, bench.settings.noise_variance**0.5).log_prob(y)
    expected = (density.logsumexp(0) - math.log(5)).mean().item()
    assert found["inside"]["log_likelihood"] == pytest.approx(expected, rel=1e-9)
    assert found["inside"]["rmse"] == pytest.approx((outputs.mean(0) - y).square().mean().sqrt().item(), rel=1e-9)
    assert found["inside"]["function_std"] == pytest.approx(outputs.var(0, correction=0).mean().sqrt().item(), rel=1e-9)


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[Bench, Networks]:
    bench = bench_of(epochs=150, swag_start=100, curve_epochs=150, curve_lr=3e-3, batch_size=16)
    return bench, bench.networks


def test_the_curve_is_lower_than_the_line_and_ends_in_the_solutions(trained: tuple[Bench, Networks]) -> None:
    bench, networks = trained
    losses = curve_losses(networks, bench.inputs, bench.targets)
    ends = [losses["curve"][0], losses["curve"][-1]]
    alone = (evaluate(bench.layout, networks.solutions, bench.inputs) - bench.targets).square().mean(1)
    assert ends == [losses["line"][0], losses["line"][-1]] == pytest.approx(alone.tolist(), rel=1e-4)
    assert not torch.equal(*networks.solutions)
    assert np.mean(losses["curve"]) < 0.8 * np.mean(losses["line"])
    start = evaluate(bench.layout, torch.zeros(1, bench.layout.numel), bench.inputs)
    assert max(ends) < 0.5 * (start - bench.targets).square().mean().item()


def test_subspaces_hold_what_they_are_made_of(trained: tuple[Bench, Networks]) -> None:
    bench, networks = trained
    curve = subspace_of(bench, "curve")
    for theta in (*networks.solutions, networks.bend):
        torch.testing.assert_close(curve.to_theta(curve.project(theta)), theta, rtol=1e-4, atol=1e-5)
    pca = subspace_of(bench, "pca")
    assert torch.equal(pca.origin, networks.swag.mean) and pca.rank == 3
    low_rank = pca.basis.double() @ pca.basis.double().mT
    root = networks.swag.covariance.to_dense().double() / bench.settings.scale
    assert torch.linalg.eigvalsh(root - low_rank).min() > -1e-6 * root.diagonal().max()
    assert joint_of(bench, "pca").temperature == 1.5 and joint_of(bench, "pca", 0.5).temperature == 0.5


def test_training_is_a_function_of_the_seed_and_first_network_does_not_feel_the_second() -> None:
    bench = bench_of(epochs=5, swag_start=1, curve_epochs=2)
    one, two = (train(bench.settings, bench.net, bench.inputs, bench.targets) for _ in range(2))
    assert torch.equal(one.solutions, two.solutions) and torch.equal(one.bend, two.bend)
    assert torch.equal(one.swag.mean, two.swag.mean)
    net, start = make_net((8, 6)), bench_of(seed=2, epochs=5, swag_start=1, curve_epochs=2)
    assert not torch.equal(train(start.settings, net, bench.inputs, bench.targets).solutions, one.solutions)


def test_networks_of_another_recipe_are_not_taken(trained: tuple[Bench, Networks], tmp_path: Path) -> None:
    bench, networks = trained
    networks.save(tmp_path, "a")
    assert Networks.load(tmp_path, bench.layout, "b") is None
    kept = Networks.load(tmp_path, bench.layout, "a")
    assert (
        kept is not None and torch.equal(kept.solutions, networks.solutions) and torch.equal(kept.bend, networks.bend)
    )
    torch.testing.assert_close(kept.swag.stddev, networks.swag.stddev)
    (tmp_path / "networks.safetensors").write_bytes(b"broken")
    with pytest.raises(lb.CheckpointError, match="networks.safetensors"):
        Networks.load(tmp_path, bench.layout, "a")
