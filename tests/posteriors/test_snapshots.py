"""WeightSnapshots: what it keeps, and its state inside a training run's checkpoints."""

import copy

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import CheckpointError, MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg import memory
from lowrank_bdl.posteriors.snapshots import WeightSnapshots
from lowrank_bdl.posteriors.swag import SWAG
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Trainer
from tests.posteriors.cases import feed, iterates, network


def collected(count=6, max_snapshots=None, **options):
    model = network()
    return feed(WeightSnapshots(model, max_snapshots, **options), model, iterates(count)), iterates(count)


@pytest.mark.parametrize("count", [1, 3, 4, 9])
@pytest.mark.parametrize("most", [None, 1, 4])
def test_newest_snapshots_are_kept_oldest_first(count, most):
    snapshots, thetas = collected(count, most)
    expected = thetas if most is None else thetas[-most:]
    posterior = snapshots.posterior()
    assert torch.equal(posterior.thetas, expected) and len(snapshots) == len(expected)
    assert snapshots.n_averaged == count and posterior.layout == snapshots.layout
    assert posterior.provenance == {"source": "snapshots", "n_averaged": count}


def test_posterior_and_snapshots_own_their_numbers():
    model = network()
    snapshots = feed(WeightSnapshots(model), model, iterates(3))
    posterior = snapshots.posterior()
    with torch.no_grad():
        model[0].weight.zero_()
    snapshots.update_parameters(model)
    assert torch.equal(posterior.thetas, iterates(3)) and snapshots.posterior().num_members == 4
    assert torch.equal(snapshots.posterior().thetas[:3], iterates(3))


def test_include_exclude_and_dtypes():
    model = network(torch.bfloat16)
    snapshots = WeightSnapshots(model, include="2", exclude="*.bias")
    snapshots.update_parameters(model)
    assert snapshots.posterior().thetas.dtype == torch.float32
    assert torch.equal(snapshots.posterior().thetas[0], model[2].weight.detach().flatten().float())


def test_collecting_in_inference_mode():
    model = network()
    with torch.inference_mode():
        snapshots = feed(WeightSnapshots(model), model, iterates(2))
    assert not snapshots.posterior().thetas.is_inference()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_iterate_is_named_and_not_counted(bad):
    snapshots, thetas = collected(3)
    model = network()
    with torch.no_grad():
        model[2].weight[0, 1] = bad
    with pytest.raises(NonFiniteError, match="expected finite weights; parameter '2.weight' has .* at flat index 1"):
        snapshots.update_parameters(model)
    with pytest.raises(ShapeError, match=r"first at parameter '0.weight'"):
        snapshots.update_parameters(nn.Linear(1, 1))
    assert snapshots.n_averaged == 3 and torch.equal(snapshots.posterior().thetas, thetas)


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="max_snapshots must be at least 1, or None for all; got 0"):
        WeightSnapshots(network(), 0)
    with pytest.raises(ValueError, match="a posterior needs at least 1 snapshot; got 0"):
        WeightSnapshots(network()).posterior()
    snapshots, _ = collected(3)
    monkeypatch.setattr(memory, "available_memory", lambda device: 51)
    with pytest.raises(MemoryLimitError, match="snapshot 4 of 13 weights needs 0.00 GiB on cpu"):
        snapshots.update_parameters(network())
    with pytest.raises(MemoryLimitError, match="a copy of 3 snapshots needs"):
        snapshots.posterior()
    assert snapshots.n_averaged == len(snapshots) == 3
    assert repr(snapshots) == "WeightSnapshots(numel=13, n_averaged=3, max_snapshots=None)"


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["memory", "torch.save", "deepcopy"])
@pytest.mark.parametrize("stop", [0, 1, 5])
@pytest.mark.parametrize("most", [None, 3])
def test_resuming_is_exact(through, stop, most, tmp_path):
    whole, thetas = collected(8, most)
    part = feed(WeightSnapshots(network(), most), network(), thetas[:stop])
    state = part.state_dict()
    if through == "torch.save":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = WeightSnapshots(network(), most)
    if through == "deepcopy":
        resumed = copy.deepcopy(part)
    else:
        resumed.load_state_dict(state)
    assert resumed.n_averaged == stop
    feed(resumed, network(), thetas[stop:])
    feed(part, network(), iterates(2, seed=5))  # what was saved from goes its own way
    assert torch.equal(resumed.posterior().thetas, whole.posterior().thetas)
    assert resumed.n_averaged == whole.n_averaged == 8


def test_a_state_of_more_snapshots_than_are_kept():
    whole, thetas = collected(6)
    few = WeightSnapshots(network(), 2)
    few.load_state_dict(whole.state_dict())
    assert torch.equal(few.posterior().thetas, thetas[-2:]) and few.n_averaged == 6


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.pop("thetas"), "lacks thetas"),
        (lambda s: s.update(thetas=[torch.zeros(12)]), r"snapshot 0 must be \(13,\) torch.float32; got \(12,\)"),
        (lambda s: s.update(thetas=[torch.zeros(13).double()]), r"got \(13,\) torch.float64"),
        (lambda s: s.update(n_averaged=1), "holds 2 snapshots; expected at most the 1 it counted"),
        (lambda s: s.update(layout={"names": []}), "needs names, shapes, dtypes"),
        (
            lambda s: s.update(layout=WeightSnapshots(nn.Linear(12, 1)).layout.to_metadata()),
            "of other parameters: parameter number 0: expected '0.weight', got 'weight'",
        ),
    ],
)
def test_foreign_and_damaged_states_change_nothing(change, message):
    snapshots, thetas = collected(4)
    state, _ = collected(2)
    state = state.state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        snapshots.load_state_dict(state)
    assert snapshots.n_averaged == 4 and torch.equal(snapshots.posterior().thetas, thetas)


def trainer(most=None, **options):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    collections = {
        "swag": Collection(SWAG(model, 3), start=1),
        "snapshots": Collection(WeightSnapshots(model, most, **options), start=1, per_epoch=2),
    }
    return Trainer(model, optimizer, squared_error, collections=collections, seed=3)


def squared_error(model, inputs, targets):
    output = model(inputs)
    return (output - targets).square().mean(), output


def data(generator):
    inputs = torch.randn(8, 2, generator=generator)
    return [(inputs[:4], inputs[:4, :1]), (inputs[4:], inputs[4:, 1:])]


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("most", [None, 3])
def test_snapshots_go_on_inside_a_trainers_checkpoint(stop, most, tmp_path):
    """The number of rows differs from checkpoint to checkpoint, and from the fresh collector's none."""
    whole = trainer(most)
    whole.fit(data, epochs=5, progress=False)
    first = trainer(most)
    first.fit(data, epochs=stop, checkpoint=tmp_path / "run.safetensors", progress=False)
    resumed = trainer(most)
    resumed.load(tmp_path / "run.safetensors")
    kept = resumed.collections["snapshots"].collector
    assert kept.n_averaged == 2 * (stop - 1)
    resumed.fit(data, epochs=5, checkpoint=tmp_path / "run.safetensors", progress=False)
    expected = whole.collections["snapshots"].collector.posterior()
    assert kept.n_averaged == 8 and expected.num_members == (8 if most is None else 3)
    assert torch.equal(kept.posterior().thetas, expected.thetas)


def test_a_trainer_names_the_snapshots_of_other_parameters(tmp_path):
    run = trainer(include="0")
    run.fit(data, epochs=2, checkpoint=tmp_path / "run.safetensors", progress=False)
    with pytest.raises(
        CheckpointError, match="another training run: the snapshots are of other parameters: .*'2.weight'"
    ):
        trainer().load(tmp_path / "run.safetensors")
