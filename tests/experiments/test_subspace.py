"""Inference in subspaces, end to end at a tiny size: what each number is, what is written, going on, refusals."""

import json
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments import subspace, subspace_cells, train, train_report
from experiments.common import SettingsError, resolve_device
from experiments.subspace_cells import Cell, paired
from experiments.subspace_constructions import construct, hessian
from experiments.subspace_methods import log_joint
from experiments.subspace_settings import METHODS, Settings, check, rank_of
from experiments.subspace_sources import Bench, open_bench
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.elliptical_slice import EllipticalSlice
from lowrank_bdl.subspaces.subspace import Subspace

PROG = "python -m experiments.subspace"
TRAIN = (
    "--dataset digits --model SmallConvNet --train_limit 64 --batch_size 16 --epochs 7 --lr_init 0.05 --swa "
    "--swa_start 2 --swa_lr 0.05 --cov_mat --max_num_models 4 --num_samples 2 --snapshots --eval_freq 7 --threads 1"
).split()
TINY = (
    "--subspace random,pca --method ess,low_rank_gaussian --rank 3 --num_samples 4 --num_chains 2 --burn_in 2 "
    "--temperature 4 --prior_std 2 --train_limit 40 --batch_size 25 --eval_limit 60 --grid 3 --threads 1 "
    "--checkpoint_every 1"
).split()
ROWS = ["SGD", "SWA", "SWAG", "random-ess-t4", "random-low_rank_gaussian", "pca-ess-t4", "pca-low_rank_gaussian"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the training script: five iterates, of which four deviations are kept."""
    path = tmp_path_factory.mktemp("subspace") / "trained"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        assert train.main(["--dir", str(path), *TRAIN]) == 0
    return path


def run(trained: Path, path: Path, *more: str) -> int:
    return subspace.main(["--run", str(trained), "--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(trained: Path) -> Path:
    """A finished comparison; what it printed lies beside the folder."""
    path = trained.parent / "finished"
    with redirect_stdout(StringIO()) as printed:
        assert run(trained, path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a tiny run."""
    monkeypatch.setattr(subspace.Work, "draw_figures", lambda self: None)


def open_run(trained: Path, **more: Any) -> tuple[Settings, Bench]:
    settings = check(Settings(run=str(trained), dir="", **more))
    return settings, open_bench(settings, resolve_device("cpu"))


@pytest.fixture(scope="module")
def bench(trained: Path) -> Bench:
    return open_run(trained, train_limit=40, batch_size=25, eval_limit=60, prior_std=2.0)[1]


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        skipped = ("seconds", "dir", "resume", "run", "evaluations")  # going on costs one evaluation a chain
        return {key: without_times(value) for key, value in found.items() if key not in skipped}
    return [without_times(value) for value in found] if isinstance(found, list) else found


# ---- what is written ----------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    own = {"results.json", "table.txt", "log.jsonl", "settings.json", "environment.json", "command.sh", "samples.png"}
    own |= {f"subspace-{name}.safetensors" for name in ("random", "pca")}
    own |= {f"plane-{name}-t4.{kind}" for name in ("random", "pca") for kind in ("npz", "png")}
    for row in ROWS:
        own |= {f"{row}/cell.json", f"{row}/ens.npz"}
        if "-" in row:
            own |= {f"{row}/draws.safetensors", f"{row}/trace.png"}
        if "ess" in row:
            own.add(f"{row}/chain.safetensors")
    assert names == own
    for picture in finished.rglob("*.png"):
        assert imread(picture)[..., :3].std() > 0.02
    printed = (finished.parent / "stdout").read_text()
    assert printed == (finished / "table.txt").read_text() + f"\nwritten to {finished}\n"


def test_the_table_has_every_row_with_its_intervals(finished: Path) -> None:
    text, found = (finished / "table.txt").read_text(), results(finished)
    assert found["rows"] == ROWS and set(found["cells"]) == set(ROWS)
    for row, label in (("SWAG", "SWAG"), ("pca-ess-t4", "pca ess, T = 4")):
        cell = found["cells"][row]
        line = next(line for line in text.splitlines() if line.startswith(f"{label}  "))
        assert f"{cell['metrics']['nll']:.4f}" in line
        for name in ("SGD", "SWA"):
            assert "{nll:+.4f} [{low:+.4f}, {high:+.4f}]".format(**cell["difference"][name]) in line
    assert set(found["cells"]["SWA"]["difference"]) == {"SGD"}
    [record] = [record for record in found["comparisons"] if record["first"] == "random-ess-t4"]
    assert record["second"] == "pca-ess-t4" and "as_published" in record
    assert "NLL of random-ess-t4 less that of pca-ess-t4: " in text


# ---- what the numbers are -----------------------------------------------------------------------------------------


def logits_of(bench: Bench, theta: Tensor, inputs: Tensor, layout: lb.ParameterLayout) -> Tensor:
    """The network at given weights, batch norm recalibrated on all training images as they were augmented."""
    statistics = lb.recalibrate_batch_norm(bench.model, theta[None], bench.bn_loader, layout=layout)
    bench.model.eval()
    with torch.no_grad():
        return lb.FunctionalModel(bench.model, layout)(
            theta, inputs, {name: value[0] for name, value in statistics.items()}
        ).double()


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_the_average_over_its_weights(row: str, finished: Path, bench: Bench) -> None:
    layout = bench.layout
    with np.load(finished / row / "ens.npz") as arrays:
        found = dict(arrays)
    if row == "SGD":
        assert bench.trained.last is not None
        thetas = bench.trained.last[None]
    elif row == "SWA":
        thetas = bench.trained.posterior.mean[None]
    elif row == "SWAG":
        generator = torch.Generator().manual_seed(1)
        thetas = torch.stack([bench.trained.posterior.sample(1, generator)[0] for _ in range(4)])
    else:
        space = Subspace.load(finished / f"subspace-{row.split('-')[0]}.safetensors", layout)
        thetas = space.to_theta(torch.from_numpy(found["samples"]))
        assert len(thetas) == 8
    inputs, targets = next(iter(bench.split.batches(60)))
    each = torch.stack([logits_of(bench, theta, inputs, layout).log_softmax(-1) for theta in thetas])
    mixture = each.logsumexp(0) - np.log(len(each))
    own = mixture.gather(-1, targets[:, None])[:, 0]
    tolerance = dict(rtol=1e-4, atol=1e-5)
    if row != "SWAG":  # its draws are those of the library, in whatever order it takes its numbers
        np.testing.assert_allclose(found["ens_predictions"], mixture.exp(), **tolerance)
        np.testing.assert_allclose(found["log_likelihood"], own, **tolerance)
    np.testing.assert_array_equal(found["targets"], targets)
    assert found["seed"] == 1
    assert found["ens_nll"] == pytest.approx(-found["log_likelihood"].mean(), rel=1e-6)
    assert found["ens_acc"] == (found["ens_predictions"].argmax(-1) == found["targets"]).mean()
    cell = results(finished)["cells"][row]
    assert cell["metrics"]["nll"] == pytest.approx(found["ens_nll"], rel=1e-6)
    assert cell["metrics"]["accuracy"] == pytest.approx(found["ens_acc"], rel=1e-6)
    if len(thetas) > 1:
        assert cell["by_number"]["mean"][-1] == pytest.approx(found["ens_nll"], rel=1e-5)


@pytest.mark.parametrize("name", ["random", "pca"])
def test_draws_come_with_their_tempered_log_joint(name: str, finished: Path, bench: Bench) -> None:
    """The likelihood of 40 images over the temperature, the prior as it is; batches of 25 and 15."""
    draws = Draws.load(finished / f"{name}-ess-t4" / "draws.safetensors")
    space = Subspace.load(finished / f"subspace-{name}.safetensors", bench.layout)
    assert draws.draws.shape == (2, 4, 3)
    inputs, targets = next(iter(bench.data.train.first(40).batches(40)))
    for z, value in zip(draws.flat, draws.log_joints.flatten(), strict=True):
        nll = cross_entropy(logits_of(bench, space.to_theta(z), inputs, bench.layout), targets, reduction="sum")
        prior = torch.distributions.Normal(0.0, 2.0).log_prob(z).sum()
        assert value.item() == pytest.approx((-nll / 4 + prior).item(), rel=1e-4, abs=1e-4)


def test_differences_are_paired(finished: Path) -> None:
    nll = {}
    for row in ("SWA", "pca-ess-t4"):
        with np.load(finished / row / "ens.npz") as arrays:
            nll[row] = -arrays["log_likelihood"].astype(np.float64)
    difference = nll["pca-ess-t4"] - nll["SWA"]
    found = results(finished)["cells"]["pca-ess-t4"]["difference"]["SWA"]
    error = difference.std(ddof=1) / 60**0.5
    assert found["nll"] == pytest.approx(difference.mean(), rel=1e-9) and found["se"] == pytest.approx(error, rel=1e-9)
    assert (found["low"], found["high"]) == pytest.approx(
        (difference.mean() - 1.959964 * error, difference.mean() + 1.959964 * error), rel=1e-6
    )


def test_paired_interval_holds_the_truth_as_often_as_it_says() -> None:
    """1000 data sets: 95 % of intervals; the binomial standard deviation is 0.7 %, the bounds are at 4 of them."""
    generator = torch.Generator().manual_seed(0)
    own, noise = torch.randn(2, 1000, 200, generator=generator, dtype=torch.float64)
    hits = 0
    for a, e in zip(own, noise, strict=True):
        found = paired(a, a + 0.3 + 0.5 * e)  # the other is 0.3 more likely: this one's NLL is 0.3 higher
        hits += found["low"] <= 0.3 <= found["high"]
    assert 0.922 < hits / 1000 < 0.978


def test_the_plane_is_the_log_joint_and_is_kept(finished: Path, bench: Bench) -> None:
    with np.load(finished / "plane-pca-t4.npz") as arrays:
        found = dict(arrays)
    space = Subspace.load(finished / "subspace-pca.safetensors", bench.layout)
    draws = Draws.load(finished / "pca-ess-t4" / "draws.safetensors")
    np.testing.assert_allclose(found["others"], draws.flat[:, 2:].mean(0), rtol=1e-12)
    z = torch.tensor([found["x"][2], found["y"][0], *found["others"]])
    value = log_joint(bench, space, 4.0)(z).item()
    assert found["log_joint"][0, 2] == pytest.approx(value, rel=1e-6)
    assert found["x"][0] < draws.flat[:, 0].min() and draws.flat[:, 0].max() < found["x"][-1]


# ---- subspaces ----------------------------------------------------------------------------------------------------


def test_subspaces_are_what_training_left(trained: Path) -> None:
    settings, bench = open_run(
        trained, subspace="random,pca,covariance,freq_dir,principal,curve", rank="2",
        curve=str(trained / "snapshots.safetensors"),
    )  # fmt: skip
    found = construct(settings, bench)
    mean, iterates, swag = bench.trained.posterior.mean, bench.trained.iterates, bench.trained.collector
    assert iterates is not None and swag is not None and iterates.shape[0] == 5
    ranks = {name: space.rank for name, space in found.items()}
    assert ranks == {"random": 2, "pca": 2, "covariance": 4, "freq_dir": 2, "principal": 2, "curve": 4}
    for name in ("random", "pca", "covariance", "principal"):
        assert torch.equal(found[name].origin, mean)
    torch.testing.assert_close(found["curve"].origin, iterates.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["freq_dir"].origin, iterates.mean(0), rtol=1e-5, atol=1e-6)
    rows = swag.deviations.double()
    values = torch.linalg.svdvals(rows / (len(rows) - 1) ** 0.5)
    torch.testing.assert_close(found["pca"].lengths, values[:2], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found["random"].lengths, values[:2].mean().expand(2), rtol=1e-4, atol=1e-8)
    basis, lengths = found["principal"].basis, found["principal"].lengths
    assert isinstance(basis, Tensor)
    products = basis.mT @ (swag.posterior(scale=1.0).covariance @ basis)  # columns are sqrt(lambda) v
    torch.testing.assert_close(products.double(), lengths.pow(4).diag(), rtol=1e-3, atol=1e-6)
    for theta in iterates:  # the curve goes through every point
        reached = found["curve"].to_theta(found["curve"].project(theta))
        torch.testing.assert_close(reached, theta, rtol=1e-3, atol=1e-4)


def test_curve_of_several_files(trained: Path, tmp_path: Path) -> None:
    """The SWA mean of a run, the last iterate from its checkpoint, and a state dict by torch.save, in this order."""
    other = tmp_path / "other.pt"
    state = {name: value.clone() for name, value in open_run(trained)[1].model.state_dict().items()}
    state["15.bias"] += 1
    torch.save({"state_dict": state, "epoch": 3}, other)
    files = [str(trained), str(trained / "checkpoint.safetensors"), str(other)]
    settings, bench = open_run(trained, subspace="curve", curve=",".join(files))
    [space] = construct(settings, bench).values()
    last, swa = bench.trained.last, bench.trained.posterior.mean
    assert last is not None and space.rank == 2
    shifted = last.clone()
    shifted[bench.layout.slices["15.bias"]] += 1
    for theta in (swa, last, shifted):
        torch.testing.assert_close(space.to_theta(space.project(theta)), theta, rtol=1e-4, atol=1e-5)
    way = space.project(shifted) - space.project(swa)  # the first column points from the first to the last
    assert way.tolist() == pytest.approx([3**0.5, 0.0], rel=1e-3, abs=1e-4)
    settings, bench = open_run(trained, subspace="curve", curve=",".join([files[0], *files[:2]]))
    with pytest.raises(SettingsError, match="--subspace curve: 3 points must span 2 dimensions"):
        construct(settings, bench)


def test_hessian_subspace_is_laplace(trained: Path, tmp_path: Path) -> None:
    """Columns v / sqrt(N lambda + tau): P^T (N H + tau I) P = I, by products with the matrix."""
    settings, bench = open_run(trained, subspace="hessian", rank="2", train_limit=40)
    space = hessian(settings, bench, tmp_path / "lanczos.safetensors")
    matrix = lb.GGNLinearOperator(
        bench.network_at(bench.trained.posterior.mean), cross_entropy, bench.batches, layout=bench.layout
    )
    decay = bench.trained.settings.wd * 64
    basis = space.basis
    assert isinstance(basis, Tensor)
    precision = basis.mT @ (40 * (matrix @ basis) + decay * basis)
    torch.testing.assert_close(precision, torch.eye(2), rtol=0, atol=5e-3)
    assert not (tmp_path / "lanczos.safetensors").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_posterior_file_gives_the_draws_of_its_run(trained: Path, finished: Path, tmp_path: Path) -> None:
    file = ["--file", str(trained / "posterior.safetensors"), "--dataset", "digits", "--model", "SmallConvNet"]
    more = ["--subspace", "pca", "--method", "low_rank_gaussian", "--images", "validation", "--grid", "0"]
    with redirect_stdout(StringIO()):
        assert subspace.main([*file, "--dir", str(tmp_path / "run"), *TINY, *more]) == 0
    found = results(tmp_path / "run")
    assert found["rows"] == ["SWA", "SWAG", "pca-low_rank_gaussian"]
    own, theirs = (Subspace.load(path / "subspace-pca.safetensors") for path in (tmp_path / "run", finished))
    torch.testing.assert_close(own.gram, theirs.gram, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(own.origin, theirs.origin)


# ---- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method: str, trained: Path, tmp_path: Path) -> None:
    needed = {"nuts": "pyro", "flow": "zuko"}.get(method)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    path = tmp_path / "run"
    more = (
        f"--subspace pca --method {method} --rank 2 --num_samples 4 --num_chains 1 --burn_in 2 --steps 3 --grid 0 "
        "--step_size 1e-3 --bn_mode eval --eval_limit 20"
    ).split()
    with redirect_stdout(StringIO()):
        assert run(trained, path, *more) == 0
    [row] = [row for row in results(path)["cells"] if row.startswith("pca")]
    cell = results(path)["cells"][row]
    assert cell["chains"]["evaluations"] >= 1 and np.isfinite(cell["metrics"]["nll"])
    assert cell["num_samples"] == (1 if method == "map" else 4)
    if method in ("vi", "vi_full", "flow"):
        assert "last_objective" in cell["chains"]


# ---- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_a_killed_chain_goes_on_and_ends_in_the_same_numbers(
    trained: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, step = tmp_path / "run", EllipticalSlice.step
    calls = []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 10:  # of 6 steps each: in the middle of the second chain
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(EllipticalSlice, "step", killed)
        assert run(trained, path) == 130
    assert not (path / "results.json").exists() and (path / "pca-ess-t4" / "chain.safetensors").exists()
    before = (path / "random-ess-t4" / "cell.json").stat().st_mtime_ns
    calls.clear()
    with monkeypatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(EllipticalSlice, "step", lambda *args: calls.append(args) or step(*args))
        assert run(trained, path, "--resume") == 0
    assert len(calls) == 3  # what was left of six
    assert (path / "random-ess-t4" / "cell.json").stat().st_mtime_ns == before
    assert without_times(results(path)) == without_times(results(finished))


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_takes_more_draws_and_ends_as_one_that_had_them_at_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grown, at_once = tmp_path / "grown", tmp_path / "at_once"
    rows = ["--subspace", "pca", "--predict_samples", "6"]
    assert run(trained, grown, *rows) == 0 and run(trained, at_once, *rows, "--num_samples", "7") == 0
    before = {name: (grown / name / "cell.json").stat().st_mtime_ns for name in ("SWA", "SWAG")}
    steps: list[Any] = []
    step = EllipticalSlice.step
    monkeypatch.setattr(EllipticalSlice, "step", lambda *args: steps.append(args) or step(*args))
    assert run(trained, grown, *rows, "--num_samples", "7", "--resume") == 0
    assert len(steps) == 3 and results(grown)["cells"]["pca-ess-t4"]["chains"]["draws"] == 7
    assert {name: (grown / name / "cell.json").stat().st_mtime_ns for name in before} == before
    for found in (ours := results(grown), theirs := results(at_once)):
        for cell in found["cells"].values():
            del cell["num_draws"]  # rows that no chain enters keep the number of the run that made them
    assert without_times(ours) == without_times(theirs)
    capsys.readouterr()
    assert run(trained, grown, *rows, "--num_samples", "5", "--resume") == 2
    assert "--num_samples must be at least the 7 of pca ess, T = 4 in" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_rows_may_be_added_and_settings_may_not_change(
    trained: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert run(trained, path, "--method", "low_rank_gaussian", "--subspace", "pca") == 0
    assert run(trained, path, "--resume", "--method", "low_rank_gaussian") == 0
    assert results(path)["rows"] == ["SGD", "SWA", "SWAG", "random-low_rank_gaussian", "pca-low_rank_gaussian"]
    capsys.readouterr()
    assert run(trained, path, "--resume", "--prior_std", "3") == 2
    assert "settings differ from those of" in capsys.readouterr().err
    cell = path / "SWA" / "cell.json"
    cell.write_text("{")
    assert run(trained, path, "--resume", "--method", "low_rank_gaussian") == 2
    assert f"cannot read {cell}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "exactly one of --run and --file is needed"),
        (["--file", "RUN/posterior.safetensors"], "--file needs --dataset and --model"),
        (["--run", "RUN", "--model", "LeNet5"], "--model and --run exclude each other"),
        (["--run", "RUN", "--method", "gibbs"], "--method: unknown method 'gibbs'"),
        (["--run", "RUN", "--subspace", "pcs"], "--subspace: unknown subspace 'pcs'; known are pca"),
        (["--run", "RUN", "--temperature", "0"], "--temperature must list positive numbers, each once; got '0'"),
        (["--run", "RUN", "--prior_std", "-1"], "--prior_std must be positive; got -1.0"),
        (["--run", "RUN", "--num_chains", "0"], "--num_chains must be at least 1; got 0"),
        (["--run", "RUN", "--rank", "0.5"], "--rank must be a whole number for --subspace random; got 0.5"),
        (["--run", "RUN", "--rank", "2.5"], "--rank must be a whole number from 1, a share below 1, or mle; got '2.5'"),
        (["--run", "RUN", "--subspace", "pca", "--rank", "9"], "--subspace pca: the deviations have numerical rank 4"),
        (["--run", "RUN", "--subspace", "curve"], "--subspace curve and --curve FILE go together"),
        (["--run", "RUN", "--subspace", "curve", "--curve", "a,b"], "--curve must give three or more points"),
        (["--run", "RUN", "--subspace", "curve", "--curve", "none"], "error: --curve none: there is no such file"),
        (["--run", "RUN", "--method", "sgld"], "--step_size is needed for sgld and sghmc"),
        (["--run", "RUN", "--bn_subset", "1.5"], "--bn_subset must be at most 1; got 1.5"),
        (["--run", "RUN", "--grid", "1"], "--grid must be 0, or at least 2; got 1"),
        (["--run", "nowhere"], "there is no run of experiments.train in nowhere"),
        (["--file", "nowhere", "--dataset", "digits", "--model", "SmallConvNet"], "--file nowhere: there is no such"),
        (
            ["--file", "RUN/snapshots.safetensors", "--dataset", "digits", "--model", "SmallConvNet"],
            "must hold a GaussianPosterior; got EmpiricalPosterior",
        ),
        (["--file", "RUN/posterior.safetensors", "--dataset", "digits", "--model", "MobileNetV2"], "--file: "),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    argv: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [value.replace("RUN", str(trained)) for value in argv]
    try:
        status = subspace.main(["--dir", str(tmp_path / "run"), *TINY, *argv])
    except SystemExit as stop:  # from the parser
        status = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"{PROG}: error: ") and message in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "expected"), [("5", 5), ("0.9", 0.9), ("mle", "mle"), ("1.0", 1)])
def test_ranks(text: str, expected: Any) -> None:
    found = rank_of(Settings(dir="", rank=text))
    assert found == expected and type(found) is type(expected)


def test_names_of_rows() -> None:
    assert Cell("ess", "pca", 5000.0).name == "pca-ess-t5000" and Cell("SWA").name == "SWA"
    assert Cell("ess", "pca", 0.1).label == "pca ess, T = 0.1"
    settings = Settings(dir="", run="r", subspace="pca", method="ess,low_rank_gaussian", temperature="1,10")
    names = [cell.name for cell in subspace_cells.plan(settings, type("B", (), {"has_last": True})())]
    assert names == ["SGD", "SWA", "SWAG", "pca-ess-t1", "pca-low_rank_gaussian", "pca-ess-t10"]
