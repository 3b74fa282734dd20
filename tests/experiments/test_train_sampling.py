"""Training runs that sample or learn a posterior, or start from another run: what they write, resume, refusals."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus

import lowrank_bdl as lb
from experiments import train
from experiments.common import differences
from experiments.train_settings import Settings, identity
from experiments.train_setup import make_model
from experiments.train_weights import read_weights
from lowrank_bdl.posteriors.empirical import EmpiricalPosterior
from lowrank_bdl.training import checkpoints
from tests.experiments.test_train import PROG, assert_identical, without_times

DATA = "--dataset digits --train_limit 96 --batch_size 16 --num_samples 3 --epochs 3 --eval_freq 5".split()
NET = ["--model", "SmallConvNet"]
CHAIN = "--lr_init 0.02 --no_schedule --swa --swa_start 1 --snapshots --collects_per_epoch 2".split()
KINDS = {
    "SGLD": ["--optimizer", "SGLD", *CHAIN],
    "SGHMC": ["--optimizer", "SGHMC", *CHAIN, "--temperature", "0.5"],
    "vi": "--vi --vi_init_std 0.02 --lr_init 0.002 --no_schedule".split(),
}


def run(path: Path, *flags: str) -> int:
    return train.main(["--dir", str(path), *DATA, *([] if "--model" in flags else NET), *flags])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs: SGD with SWA, and from its SWA mean one of each kind; --save_freq leaves epoch 2."""
    path = tmp_path_factory.mktemp("sampling")
    with redirect_stdout(StringIO()):
        assert run(path / "SGD", *"--lr_init 0.05 --swa --swa_start 1 --swa_lr 0.02 --ema --ema_decay 0.9".split()) == 0
        for name, flags in KINDS.items():
            assert run(path / name, *flags, "--init_from", str(path / "SGD"), "--save_freq", "2") == 0
    return path


def results(path: Path) -> dict[str, Any]:
    return without_times(json.loads((path / "results.json").read_text()))


def everything(path: Path) -> dict[str, Any]:
    """All that a run ends with, save times and paths."""
    state, _, settings = checkpoints.read(path / "checkpoint.safetensors")
    found = results(path)
    del found["settings"]["init_from"]  # a path
    weights = read_weights(path / "weights.safetensors")
    posterior = lb.GaussianPosterior.load(path / "posterior.safetensors")
    found["vectors"] = {**weights.thetas, **weights.buffers, "mean": posterior.mean, "stddev": posterior.stddev}
    if found["settings"]["snapshots"]:
        found["members"] = EmpiricalPosterior.load(path / "snapshots.safetensors").members()
    return found | {"settings": settings} | {name: state[name] for name in ("model", "optimizer", "collections")}


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(path / "checkpoint.safetensors")[0]["model"]


# ---- what they write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_a_chain_reports_its_last_iterate_and_the_ensemble(name: str, runs: Path) -> None:
    found = results(runs / name)
    assert set(found["methods"]) == {name, "SWA", "SWAG-Diag", "Snapshots"}
    chain = EmpiricalPosterior.load(runs / name / "snapshots.safetensors")
    weights = read_weights(runs / name / "weights.safetensors")
    assert chain.layout == weights.layout and len(chain.members()) == found["snapshots"] == 4
    torch.testing.assert_close(chain.members().mean(0), weights.thetas["SWA"], rtol=1e-5, atol=1e-7)
    assert torch.equal(chain.members()[-1], weights.last) and list(weights.thetas) == [name, "SWA"]


def test_the_noise_has_the_size_that_the_temperature_says(runs: Path, tmp_path: Path) -> None:
    """One epoch of six tiny steps from the same start is noise alone: θ moves by sqrt(2 lr T steps / N)."""
    start = read_weights(runs / "SGD" / "weights.safetensors").start
    flags = "--optimizer SGLD --lr_init 1e-9 --no_schedule --epochs 1 --temperature 2 --wd 0".split()
    assert run(tmp_path / "run", *flags, "--init_from", str(runs / "SGD")) == 0
    moved = read_weights(tmp_path / "run" / "weights.safetensors").last - start
    assert moved.double().std().item() == pytest.approx((2 * 1e-9 * 2 * 6 / 96) ** 0.5, rel=0.03)


def test_a_variational_run_reports_the_mean_and_draws(runs: Path) -> None:
    found = results(runs / "vi")
    assert set(found["methods"]) == {"mean", "MFVI"} and found["parameters"] == 15_554
    assert found["prior_std"] == pytest.approx((96 * 1e-4) ** -0.5)
    posterior = lb.GaussianPosterior.load(runs / "vi" / "posterior.safetensors")
    weights = read_weights(runs / "vi" / "weights.safetensors")
    assert list(weights.thetas) == ["mean"] and torch.equal(weights.last, posterior.mean)
    assert posterior.covariance.rank == 0 and posterior.layout == weights.layout
    state = state_dict(runs / "vi")
    rho = torch.cat([value.flatten() for name, value in state.items() if name.startswith("rho.")])
    torch.testing.assert_close(posterior.stddev, softplus(rho), rtol=1e-5, atol=0)
    std = posterior.stddev
    assert std.median() > 3 * 0.02 and std.max() > 1.2 * std.min()  # they are learnt, each for itself
    log = [json.loads(line) for line in (runs / "vi" / "log.jsonl").read_text().splitlines()]
    assert all(record["nll"] < 5 < record["loss"] for record in log)  # the loss holds the divergence / N


def test_a_variational_run_s_loss_is_its_bound(runs: Path, tmp_path: Path) -> None:
    """With a step of nothing the weights stay, and loss − NLL is T KL / N of the start, in closed form."""
    flags = "--vi --vi_init_std 0.05 --prior_std 0.3 --temperature 0.25 --lr_init 1e-12 --vi_std_lr 1e-12".split()
    assert run(tmp_path / "run", *flags, "--epochs", "1", "--init_from", str(runs / "SGD")) == 0
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    mean = read_weights(runs / "SGD" / "weights.safetensors").start.double()
    prior = lb.GaussianPosterior.diagonal(torch.zeros_like(mean), torch.full_like(mean, 0.09))
    kl = lb.kl_divergence(lb.GaussianPosterior.diagonal(mean, torch.full_like(mean, 0.0025)), prior)
    assert record["loss"] - record["nll"] == pytest.approx(0.25 * kl.item() / 96, rel=1e-5)
    assert results(tmp_path / "run")["prior_std"] == 0.3


def test_the_final_weights_are_those_of_the_state(runs: Path) -> None:
    weights = read_weights(runs / "SGD" / "weights.safetensors")
    state, _, _ = checkpoints.read(runs / "SGD" / "checkpoint.safetensors")
    settings = Settings(dir="d", model="SmallConvNet", dataset="digits")
    with torch.random.fork_rng():
        model = make_model(settings, train.load_data(settings, torch.device("cpu")), torch.device("cpu"))
    weights.load_into_(model)
    assert_identical(dict(model.state_dict()), dict(state["model"]))
    assert list(weights.thetas) == ["SGD", "SWA", "EMA"] and torch.equal(weights.start, weights.thetas["SWA"])
    ema = torch.cat([state["collections"]["ema"][f"module.{name}"].flatten() for name in weights.layout.names])
    assert torch.equal(weights.thetas["EMA"], ema)


def test_with_include_the_other_parameters_are_those_of_the_last_iterate(tmp_path: Path) -> None:
    flags = "--swa --swa_start 1 --swa_lr 0.02 --snapshots --include 15.*".split()
    assert run(tmp_path / "run", *flags) == 0
    weights = read_weights(tmp_path / "run" / "weights.safetensors")
    chain = EmpiricalPosterior.load(tmp_path / "run" / "snapshots.safetensors")
    last, swa = (weights.layout.unflatten(weights.thetas[name]) for name in ("SGD", "SWA"))
    assert chain.layout.names == ("15.weight", "15.bias")
    for name in weights.layout.names:
        assert torch.equal(last[name], swa[name]) != name.startswith("15.")


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_an_epoch_can_move_a_standard_deviation_by_a_factor_of_e(optimizer: str, runs: Path, tmp_path: Path) -> None:
    """Most weights of a network matter little: far below the prior, their σ grow as fast as the rate allows."""
    flags = "--vi --vi_init_std 1e-4 --temperature 0.5 --lr_init 1e-9 --epochs 1 --no_schedule".split()
    assert run(tmp_path / "run", *flags, "--optimizer", optimizer, "--init_from", str(runs / "SGD")) == 0
    moved = lb.GaussianPosterior.load(tmp_path / "run" / "posterior.safetensors").stddev.div(1e-4).log()
    assert moved.median().item() == pytest.approx(1.0, abs=0.05) and moved.max() < 1.5
    assert run(tmp_path / "run", *flags, "--optimizer", optimizer, "--vi_std_lr", "0.01") == 0
    slower = lb.GaussianPosterior.load(tmp_path / "run" / "posterior.safetensors").stddev.div(1e-4).log()
    assert slower.median().item() == pytest.approx(0.06, abs=0.003)


# ---- where they start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source,expected", [("SGD", "SWA"), ("vi", "mean")])
def test_a_run_starts_from_the_swa_mean_or_else_the_last_iterate(
    source: str, expected: str, runs: Path, tmp_path: Path
) -> None:
    assert run(tmp_path / "run", "--init_from", str(runs / source), "--lr_init", "1e-30", "--no_schedule") == 0
    found, start = (read_weights(path / "weights.safetensors") for path in (tmp_path / "run", runs / source))
    assert torch.equal(found.last, start.thetas[expected])


def test_buffers_start_where_they_were(runs: Path) -> None:
    start = read_weights(runs / "SGD" / "weights.safetensors")
    batches = [name for name in start.buffers if name.endswith("num_batches_tracked")]
    assert batches and all(start.buffers[name] == 18 for name in batches)
    found = read_weights(runs / "SGLD" / "weights.safetensors")
    assert all(found.buffers[name] == 36 for name in batches)


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(KINDS))
def test_a_resumed_run_ends_with_the_same_bits(name: str, runs: Path, tmp_path: Path) -> None:
    """From the checkpoint of epoch 2; the folder it started from is written another way, which must not matter."""
    (tmp_path / "link").symlink_to(runs)
    flags = [*KINDS[name], "--save_freq", "2", "--init_from", str(tmp_path / "link" / "SGD")]
    source = runs / name / "checkpoint-2.safetensors"
    assert run(tmp_path / "run", *flags, "--resume", str(source)) == 0
    assert_identical(everything(tmp_path / "run"), everything(runs / name))
    before = checkpoints.read(source)[0]["model"]
    assert any(not torch.equal(value, before[key]) for key, value in state_dict(runs / name).items())


def test_a_resume_from_other_start_weights_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--resume", str(runs / "SGLD" / "checkpoint-2.safetensors"), "--save_freq", "2"]
    for flags, now in ((["--init_from", str(runs / "SGHMC")], r"'"), ([], "None")):
        assert run(tmp_path / "run", *KINDS["SGLD"], *source, *flags) == 2
        error = capsys.readouterr().err
        assert "settings differ: init_from was '" in error and f", now {now}" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["--temperature 2", "--vi --prior_std 3"])
def test_a_resume_with_another_posterior_is_refused(
    change: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "vi" if "--vi" in change else "SGLD"
    flags = [*KINDS[name], "--init_from", str(runs / "SGD"), "--resume", "auto", *change.split()]
    before = {file.name: file.read_bytes() for file in (runs / name).iterdir()}
    assert run(runs / name, *flags) == 2
    assert (
        f"{change.split()[-2][2:]} was {'1.0, now 2.0' if name == 'SGLD' else 'None, now 3.0'}"
        in capsys.readouterr().err
    )
    assert {file.name: file.read_bytes() for file in (runs / name).iterdir()} == before


def test_runs_of_earlier_versions_can_still_be_resumed() -> None:
    """Their records do not know the new flags, which had their defaults then."""
    settings = Settings(dir="d", model="LeNet5")
    new = ("snapshots", "temperature", "vi", "vi_init_std", "vi_std_lr", "prior_std")
    old = {name: value for name, value in vars(settings).items() if name not in new}
    assert differences(settings, old) == "" and not set(new) & set(identity(settings))
    changed = Settings(dir="d", model="LeNet5", vi=True)
    assert differences(changed, old) == "vi was False, now True" and identity(changed)["vi"] is True


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--temperature 0", "--temperature must be positive; got 0.0"),
        ("--optimizer SGLD --temperature -1", "--temperature must be positive; got -1.0"),
        ("--vi --temperature nan", "--temperature must be positive; got nan"),
        ("--temperature 0.5", "--temperature needs --optimizer SGLD or SGHMC, or --vi; got 0.5"),
        ("--optimizer SGHMC --momentum 1", "--momentum must be less than 1 for --optimizer SGHMC; got 1.0"),
        ("--vi --optimizer SGD", "--vi needs --optimizer Adam or AdamW: the loss is per image"),
        ("--vi --vi_std_lr 0", "--vi_std_lr must be positive; got 0.0"),
        ("--vi_std_lr 0.1", "--vi_std_lr needs --vi, which has standard deviations"),
        ("--vi --vi_init_std 0", "--vi_init_std must be positive; got 0.0"),
        ("--vi --prior_std inf", "--prior_std must be positive; got inf"),
        ("--prior_std 1", "--prior_std needs --vi; the prior of other runs is --wd, or --prior_var"),
        ("--vi --wd 0", "--vi needs a prior: --prior_std, or --wd to take it from"),
        ("--vi --optimizer SGLD", "--vi learns a posterior and --optimizer SGLD samples one; choose either"),
        ("--vi --swa --swa_start 1", "--vi learns a posterior of its own, and cannot be used with --swa"),
        ("--vi --ema", "--vi learns a posterior of its own, and cannot be used with --ema"),
        ("--vi --prior_var 1", "--vi has a prior of its own, --prior_std, and cannot be used with --prior_var"),
        ("--snapshots", "--snapshots needs --swa, which collects weights"),
        ("--optimizer SGDL", "argument --optimizer: invalid choice: 'SGDL'"),
        ("--init_from run", "--init_from and --dir must be two folders; got run for both"),
        ("--init_from nowhere", "--init_from nowhere: there is no such folder"),
    ],
)
def test_what_cannot_run_is_one_line_and_writes_nothing(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = run(Path("run"), *flags.split())
    except SystemExit as stop:  # from the parser
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith(f"{PROG}: error: {message}"), captured.err
    assert captured.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_one_line_and_nothing_is_written(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(runs / "SGD", source)
    path = source / "weights.safetensors"
    whole = path.read_bytes()
    cases = [
        (["--model", "PreResNet8"], whole, "the weights are of another network: parameter "),
        ([], whole[:-50], f"{path} is truncated or no safetensors file"),
        ([], (source / "posterior.safetensors").read_bytes(), f"{path} holds a 'gaussian posterior'"),
        ([], None, "there is no weights.safetensors; is the run finished?"),
    ]
    for flags, content, message in cases:
        path.unlink() if content is None else path.write_bytes(content)
        assert run(tmp_path / "run", *flags, "--init_from", str(source)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{PROG}: error: --init_from {source}: {message}"), error
        assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_collected_weights_without_snapshots_cannot_be_carried_over(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = runs / "SGD" / "checkpoint.safetensors"
    assert run(tmp_path / "run", *CHAIN, "--swa_resume", str(source)) == 2
    assert capsys.readouterr().err.endswith(f"--swa_resume {source}: it has not collected snapshots\n")
    assert list(tmp_path.iterdir()) == []
