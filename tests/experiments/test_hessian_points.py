"""Weights from files of every kind, for the Hessian script."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_bdl as lb
from experiments import train, train_report
from experiments.common import SettingsError
from experiments.hessian_points import points_of, samples_of
from experiments.models import build_model
from experiments.train_weights import read_weights

TINY = (
    "--dataset digits --model SmallConvNet --train_limit 64 --batch_size 16 --epochs 4 --lr_init 0.05 --swa "
    "--swa_start 1 --swa_lr 0.02 --cov_mat --max_num_models 3 --num_samples 2 --save_freq 2 --eval_freq 4"
).split()


def network(seed: int = 7, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("SmallConvNet", classes, channels=1, image_size=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("points") / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        assert train.main(["--dir", str(path), *TINY]) == 0
    return path


def state_after(point: object, model: nn.Module) -> dict[str, torch.Tensor]:
    point.load_(model)  # type: ignore[attr-defined]
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_finished_run_gives_its_last_iterate_or_the_weights_that_are_named(run: Path) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    [last], [swa] = points_of([str(run)], "last", model), points_of([str(run)], "SWA", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (last.name, last.label, last.needs_batch_norm) == ("run-SGD", "run SGD", False)
    assert (swa.name, swa.label, swa.needs_batch_norm) == ("run-SWA", "run SWA", True)
    weights = read_weights(run / "weights.safetensors")
    for point, theta in ((last, weights.last), (swa, weights.thetas["SWA"])):
        point.load_(model)
        assert torch.equal(weights.layout.flatten(model), theta)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.buffers.items())


def test_a_checkpoint_of_a_run_gives_weights_statistics_and_epoch(run: Path) -> None:
    files = [str(run / f"checkpoint-{epoch}.safetensors") for epoch in (2, 4)]
    early, late = points_of(files, "last", network())
    assert (early.epoch, late.epoch) == (2, 4) and early.name != late.name and not late.needs_batch_norm
    [last] = points_of([str(run)], "last", network())
    ours, theirs = state_after(late, network(1)), state_after(last, network(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(state_after(early, network())["0.weight"], ours["0.weight"])


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_state_dict_of_torch_save_is_read(wrapped: bool, tmp_path: Path) -> None:
    state = network(3).state_dict()
    torch.save({"epoch": 9, "state_dict": state} if wrapped else state, tmp_path / "checkpoint-9.pt")
    [point] = points_of([str(tmp_path / "checkpoint-9.pt")], "last", network())
    assert point.epoch == (9 if wrapped else None)
    found = state_after(point, network())
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_samples_are_the_posteriors_on_top_of_the_base(run: Path) -> None:
    model = network()
    [base] = points_of([str(run)], "last", model)
    first, second = samples_of(str(run / "posterior.safetensors"), 2, 5, base, model)
    assert first.needs_batch_norm and (first.name, second.label) == ("sample-1", "sample 2")
    posterior = lb.load_posterior(run / "posterior.safetensors")
    draws = posterior.sample(2, generator=torch.Generator().manual_seed(5))
    for point, draw in zip((first, second), draws, strict=True):
        point.load_(model)
        assert torch.equal(lb.ParameterLayout.from_module(model).flatten(model), draw)


def test_a_partial_posterior_needs_a_file_for_the_rest(run: Path, tmp_path: Path) -> None:
    model = network()
    head = lb.ParameterLayout.from_module(model, include=["15.*"])
    file = str(tmp_path / "head.safetensors")
    lb.GaussianPosterior.diagonal(torch.zeros(head.numel), torch.ones(head.numel), head).save(file)
    with pytest.raises(SettingsError, match="holds 2 of 14 parameters; add --file"):
        samples_of(file, 1, 0, None, model)
    [base] = points_of([str(run)], "last", model)
    [point] = samples_of(file, 1, 0, base, model)
    found, of_run = state_after(point, network(8)), state_after(base, network(9))
    assert [name for name in found if not torch.equal(found[name], of_run[name])] == ["15.weight", "15.bias"]


def test_bad_files_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    model = network()

    def refused(message: str, *files: Path, source: str = "last", against: nn.Module = model) -> None:
        with pytest.raises(SettingsError, match=re.escape(message)):
            points_of([str(file) for file in files], source, against)

    refused("there is no such file", tmp_path / "none.pt")
    refused("there is no such file", tmp_path)
    refused("--source EMA: ", run, source="EMA")
    refused("has SGD, SWA", run, source="EMA")
    refused("leave --source out", run / "checkpoint-2.safetensors", source="SWA")
    refused("must name each file once", run, run)
    refused("of another network", run, against=network(classes=5))
    refused("of another network", run / "checkpoint-2.safetensors", against=network(classes=5))
    (tmp_path / "junk.pt").write_bytes(b"junk")
    refused("expected weights by torch.save", tmp_path / "junk.pt")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    refused("junk.safetensors", tmp_path / "junk.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    refused("expected a dict of tensors", tmp_path / "list.pt")
    state = {name: value.clone() for name, value in network().state_dict().items()}
    state["0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    refused("'0.weight' must hold finite numbers", tmp_path / "nan.pt")
    state = dict(network().state_dict(), other=torch.zeros(1))
    torch.save(state, tmp_path / "more.pt")
    refused("which has 'other'", tmp_path / "more.pt")
    with pytest.raises(SettingsError, match="--posterior .*: there is no such file"):
        samples_of(str(tmp_path / "none"), 1, 0, None, model)
    with pytest.raises(SettingsError, match="is of another network"):
        samples_of(str(run / "posterior.safetensors"), 1, 0, None, network(classes=5))
