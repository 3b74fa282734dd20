"""Compiled networks: torch compiles no second derivative, and calls no hook that came after the compilation."""

import copy
import os
import socket

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from tests.curvature.cases import batches
from tests.oracles import assert_close


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
        return net, torch.randn(7, 3, dtype=torch.float64), torch.randint(3, (7,))


def compiled(net):
    return torch.compile(net, backend="aot_eager")


def compiled_in_place(net):
    net.compile(backend="aot_eager")
    return net


def partly_compiled(net):
    net[0] = torch.compile(net[0], backend="aot_eager")
    return net


@pytest.fixture
def one_process():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", str(port)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


@pytest.fixture(autouse=True)
def forget_compilations():
    yield
    torch.compiler.reset()


def check(net, wrapped, x, y):
    """Everything of the wrapped network is what the plain one has; the former has run, so that it is compiled."""
    wrapped(x)
    data = batches(x, y)
    assert lb.ParameterLayout.from_module(wrapped).names == lb.ParameterLayout.from_module(net).names
    vector = torch.randn(31, dtype=torch.float64)
    for kind in (lb.HessianLinearOperator, lb.GGNLinearOperator):
        expected, found = (kind(each, cross_entropy, data) for each in (net, wrapped))
        assert_close(found.to_dense(), expected.to_dense(), cond=100)
        assert_close(found @ vector, expected @ vector, cond=100)
    expected, found = (lb.FisherLinearOperator(each, "categorical", data) for each in (net, wrapped))
    assert_close(found.to_dense(), expected.to_dense(), cond=100)
    for kind in (lb.DiagonalLaplace, lb.KFACLaplace):
        expected, found = (kind(each, labels="expected").fit(data, progress=False) for each in (net, wrapped))
        if kind is lb.KFACLaplace:
            assert found.kinds == expected.kinds
            assert len(found.kinds.kronecker) == 4 and not found.kinds.diagonal
        pairs = zip(found.eigenvalues(), expected.eigenvalues(), strict=True)
        for one, other in pairs:
            assert_close(one, other, cond=100)
    for per_example in (False, True):
        collectors = [lb.GradientCovariance(each, cross_entropy, per_example=per_example) for each in (net, wrapped)]
        for batch in data:
            for collector in collectors:
                collector.update(batch)
        assert_close(collectors[1].covariance.to_dense(), collectors[0].covariance.to_dense(), cond=100)


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, partly_compiled])
def test_compiled(wrap):
    net, x, y = build()
    check(net, wrap(copy.deepcopy(net)), x, y)


@pytest.mark.parametrize("order", ["compiled outside", "compiled inside", "not compiled"])
def test_data_parallel(order, one_process):
    net, x, y = build()
    wrapped = copy.deepcopy(net)
    if order == "compiled inside":
        wrapped = compiled(wrapped)
    wrapped = nn.parallel.DistributedDataParallel(wrapped)
    if order == "compiled outside":
        wrapped = compiled(wrapped)
    check(net, wrapped, x, y)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at it
def test_a_function_that_is_compiled_inside_the_forward():
    def doubled_tanh(v):
        return 2 * v.tanh()

    class Net(nn.Module):
        def __init__(self, compiles):
            super().__init__()
            self.inner = build()[0]
            self.last = torch.compile(doubled_tanh, backend="aot_eager") if compiles else doubled_tanh

        def forward(self, x):
            return self.last(self.inner(x))

    plain, compiles = Net(False), Net(True)
    _, x, y = build()
    compiles(x)
    data = batches(x, y)
    for kind in (lb.HessianLinearOperator, lb.GGNLinearOperator):
        expected = kind(plain, cross_entropy, data).to_dense()
        assert_close(kind(compiles, cross_entropy, data).to_dense(), expected)
    kronecker = lb.KFACLaplace(compiles, labels="expected").fit(data, progress=False)
    assert kronecker.kinds.kronecker == tuple(lb.ParameterLayout.from_module(plain).names)
    laplaces = [lb.DiagonalLaplace(net, labels="expected") for net in (plain, compiles)]
    diagonals = [laplace.fit(data, progress=False).fisher_diagonal for laplace in laplaces]
    assert_close(*diagonals)
