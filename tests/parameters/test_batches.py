"""Which data are read, and that everything that takes data reads them alike."""

from collections import OrderedDict, UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.batches import batches_of, fixed_batches, to_device

X, Y = torch.arange(10.0).view(5, 2), torch.arange(5)


@pytest.mark.parametrize("data", [(X, Y), [X, Y], ({"x": X}, Y), {"x": X, "labels": Y}])
def test_a_pair_is_one_batch(data):
    assert list(fixed_batches(data)) == [data]


def test_batches_stay_what_they_are():
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    assert fixed_batches(batches) is batches and fixed_batches(tuple(batches)) == tuple(batches)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    assert fixed_batches(loader) is loader


@pytest.mark.parametrize(
    "options, name",
    [
        ({"shuffle": True}, "RandomSampler"),
        ({"sampler": SubsetRandomSampler([0, 1])}, "SubsetRandomSampler"),
        ({"batch_sampler": BatchSampler(RandomSampler(Y), 2, False)}, "RandomSampler"),
    ],
)
def test_refuses_loaders_that_draw_their_order(options, name):
    loader = DataLoader(TensorDataset(X, Y), **options)
    with pytest.raises(ValueError, match=f"must read in a fixed order; got one with a {name}. Make it with shuffle"):
        fixed_batches(loader)


@pytest.mark.parametrize(
    "data, error, message",
    [
        (iter([(X, Y)]), ValueError, r"got an iterator \(list_iterator\), which can be read only once"),
        (((x, y) for x, y in [(X, Y)]), ValueError, r"got an iterator \(generator\)"),
        (X, ShapeError, r"a pair \(x, y\), a list of batches or a DataLoader; got Tensor"),
        (3, ShapeError, "got int"),
        ([], ShapeError, "at least one batch; got none"),
    ],
)
def test_refuses_what_can_be_read_once_or_is_no_batch(data, error, message):
    with pytest.raises(error, match=message):
        fixed_batches(data)


class Keywords(nn.Module):
    """A network that takes its inputs by name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 5)

    def forward(self, x, shift=0.0):
        return self.layer(x) + shift


FORMS = {
    "pair": (X, Y),
    "pairs": [(X[:2], Y[:2]), (X[2:], Y[2:])],
    "lists": [[X[:2], Y[:2]], [X[2:], Y[2:]]],
    "loader": DataLoader(TensorDataset(X, Y), batch_size=2),
    "mapping": {"x": X, "labels": Y},
    "mappings": [{"x": X[:2], "label": Y[:2]}, {"x": X[2:], "target": Y[2:]}],
    "ordered": [OrderedDict(x=X[:2], labels=Y[:2]), UserDict(x=X[2:], targets=Y[2:])],
    "loader of mappings": DataLoader([{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)], batch_size=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_reader_takes_every_form(form):
    """The numbers are those of the pair, whatever form the data come in."""
    torch.manual_seed(0)
    net, data = Keywords(), FORMS[form]
    theta = lb.ParameterLayout.from_module(net).flatten(net)
    subspace = lb.Subspace(None, theta, torch.eye(len(theta))[:, :1])

    def numbers(data):
        noise = lb.GradientCovariance(net, cross_entropy, rank=1)
        for batch in batches_of(data):
            noise.update(batch)
        listed = list(batches_of(data))
        yield lb.predict(net, theta, data, progress=False).log_likelihood
        yield lb.HessianLinearOperator(net, cross_entropy, data).to_dense()
        yield lb.GGNLinearOperator(net, cross_entropy, data).to_dense()
        yield lb.FisherLinearOperator(net, "categorical", data).to_dense()
        yield noise.mean
        yield lb.DiagonalLaplace(net, labels="expected").fit(listed, progress=False).fisher_diagonal
        yield lb.KFACLaplace(net, labels="expected").fit(data, progress=False).fisher.log_likelihood
        yield lb.LogJoint(subspace, net, "categorical", data)(torch.zeros(1))
        yield lb.evaluate_points(net, theta[None], data, cross_entropy, progress=False).loss

    for found, expected in zip(numbers(data), numbers((X, Y)), strict=True):
        torch.testing.assert_close(found, expected)


def test_functions_say_how_to_read_any_batch():
    """An object, read by call_fn and target_fn, wherever batches are read."""
    torch.manual_seed(0)
    net = Keywords()
    theta = lb.ParameterLayout.from_module(net).flatten(net)
    objects = [SimpleNamespace(a=X[:2], b=Y[:2]), SimpleNamespace(a=X[2:], b=Y[2:])]
    read = {"call_fn": lambda model, batch: model(batch.a), "target_fn": lambda batch: batch.b}
    found = lb.predict(net, theta, objects, progress=False, **read)
    assert torch.equal(found.log_likelihood, lb.predict(net, theta, FORMS["pairs"], progress=False).log_likelihood)
    for operator in (lb.HessianLinearOperator, lb.GGNLinearOperator):
        expected = operator(net, cross_entropy, (X, Y)).to_dense()
        torch.testing.assert_close(operator(net, cross_entropy, objects, **read).to_dense(), expected)
    for laplace in (lb.DiagonalLaplace, lb.KFACLaplace):
        fit = laplace(net, labels="expected", **read).fit(objects, progress=False)
        plain = laplace(net, labels="expected").fit((X, Y), progress=False)
        torch.testing.assert_close(list(fit.eigenvalues()), list(plain.eigenvalues()))
    subspace, z = lb.Subspace(None, theta, torch.eye(len(theta))[:, :1]), torch.zeros(1)
    plain = lb.LogJoint(subspace, net, "categorical", FORMS["pairs"])
    log_joints = (lb.LogJoint(subspace, net, "categorical", objects, **read), plain)
    assert torch.equal(log_joints[0](z), log_joints[1](z))
    curvatures = [torch.autograd.functional.hessian(each, z) for each in log_joints]
    torch.testing.assert_close(*curvatures)
    noise = lb.GradientCovariance(net, cross_entropy, **read)
    noise.update(objects[0])
    assert noise.num_examples == 2
    with pytest.raises(ShapeError, match="unless target_fn is given: targets are needed; got SimpleNamespace"):
        lb.HessianLinearOperator(net, cross_entropy, objects, call_fn=read["call_fn"])


def test_moving_a_batch_leaves_it_as_it_is():
    class Encoding(UserDict):
        def to(self, device):
            self.data = {key: value.to(device) for key, value in self.data.items()}
            return self

    batch = Encoding(x=X)
    before = batch.data
    assert to_device(batch, torch.device("meta"))["x"].is_meta
    assert batch.data is before and not batch["x"].is_meta
