"""Gradients of single examples where the examples are not on the inputs' first axis, or on none."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lowrank_bdl.curvature.examples import ExampleGradients
from lowrank_bdl.curvature.fisher_operator import FisherLinearOperator
from lowrank_bdl.curvature.gradient_covariance import GradientCovariance
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.laplace import DiagonalLaplace
from lowrank_bdl.posteriors.laplace_kfac import KFACLaplace
from tests.oracles import assert_close


class TimeFirst(nn.Module):
    """torch's recurrent layers have the time first unless told otherwise."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.inner = kind(2, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.inner(x)[0].mean(0))


class ExamplesLast(nn.Module):
    """Has the examples on the last axis, and a parameter that no layer's rule covers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 5))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return (self.weight @ torch.tanh(x.sum(0) * self.scale)).mT


class Interacting(nn.Module):
    """An example's output depends on the whole batch: it cannot be evaluated alone."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        x = x * self.shift
        return self.layer(torch.tanh(x - x.mean(0)))


class InnerDerivative(nn.Module):
    """A force: the network differentiates by its inputs, which torch.func does not allow inside its own transforms."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            potential = self.layers(x)
            (force,) = torch.autograd.grad(potential.square().sum(), x, create_graph=True)
        return potential + force[:, :2]


class StraightThrough(torch.autograd.Function):
    """Written as of old, with ctx in forward: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(StraightThrough.apply(self.first(x) * self.gain) + x.sum(1, keepdim=True))


class Pairs(nn.Module):
    """Two inputs, with their examples on different axes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))

    def forward(self, inputs):
        return (inputs["left"] + inputs["right"].mT) @ self.weight


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


CASES = {
    "time first, as many as examples": (TimeFirst, lambda n: random(n, n, 2)),
    "time first, fewer": (TimeFirst, lambda n: random(3, n, 2)),
    "time first, more": (lambda: TimeFirst(nn.GRU), lambda n: random(n + 4, n, 2)),
    "examples last": (ExamplesLast, lambda n: random(n, 5, n)),
    "examples that interact": (Interacting, lambda n: random(n, 3)),
    "derivatives inside": (InnerDerivative, lambda n: random(n, 3)),
    "old functions": (Binary, lambda n: random(n, 3)),
    "two axes": (Pairs, lambda n: {"left": random(n, 4), "right": random(4, n)}),
    "two axes of one length": (Pairs, lambda n: {"left": random(4, 4), "right": random(4, 4)}),
}


def build(name, sizes):
    make, inputs = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
        return net, [(inputs(size), torch.randint(2, (size,))) for size in sizes]


def each_jacobian(net, x, layout):
    """Rows of the batch's outputs by every weight, ``(N, C, D)``, by plain reverse mode."""
    weights = {name: part.requires_grad_() for name, part in layout.unflatten(layout.flatten(net)).items()}
    outputs = functional_call(net, weights, (x,))
    rows = [torch.autograd.grad(v, list(weights.values()), retain_graph=True) for v in outputs.flatten()]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return outputs.detach(), jacobian.view(*outputs.shape, -1)


def dense(net, data):
    """The sum of every example's GGN, and the gradients of the examples' losses."""
    layout = ParameterLayout.from_module(net)
    total, gradients = 0, []
    for x, y in data:
        outputs, jacobian = each_jacobian(net, x, layout)
        probs = outputs.softmax(1)
        middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
        total = total + (jacobian.mT @ middle @ jacobian).sum(0)
        slopes = probs - nn.functional.one_hot(y, 2)
        gradients.append((slopes[:, None] @ jacobian)[:, 0])
    return total, torch.cat(gradients)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 4, 3)])
@pytest.mark.parametrize("name", CASES)
def test_diagonals_and_gradients_are_those_of_the_examples(name, sizes):
    if name == "two axes of one length":
        sizes = tuple(4 for _ in sizes)
    net, data = build(name, sizes)
    total, gradients = dense(net, data)
    found = DiagonalLaplace(net, labels="expected").fit(data, progress=False).fisher_diagonal
    assert_close(found, total.diagonal(), cond=100)
    empirical = DiagonalLaplace(net, labels="true").fit(data, progress=False).fisher_diagonal
    assert_close(empirical, gradients.square().sum(0), cond=100)
    kronecker = KFACLaplace(net, labels="expected").fit(data, progress=False)
    for parameter, values in kronecker.fisher.diagonal.items():
        assert_close(values.flatten(), total.diagonal()[kronecker.layout.slices[parameter]], cond=100)
    operator = FisherLinearOperator(net, "categorical", data)
    assert_close(operator.to_dense() * operator.num_data, total, cond=1e3)
    covariance = GradientCovariance(net, cross_entropy, rank=len(gradients), per_example=True)
    for batch in data:
        covariance.update(batch)
    assert_close(covariance.covariance.to_dense(), gradients.mT.cov(), cond=1e3)


def test_a_network_whose_outputs_are_all_equal_at_first():
    """A head of zeros gives every example the same output, along whichever axis it is taken."""
    net, data = build("time first, as many as examples", (4, 4))
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    total, gradients = dense(net, data)
    found = DiagonalLaplace(net, labels="true").fit(data, progress=False).fisher_diagonal
    assert_close(found, gradients.square().sum(0), cond=100)


def test_the_axis_is_looked_for_once(monkeypatch):
    calls = []

    def forward(weights, x, y):
        calls.append(tuple(x.shape))
        return (x * weights["w"][:, None]).sum(0)

    each = ExampleGradients(forward, lambda f, y: (f * y).sum())
    weights = {"w": random(5)}
    for count in (1, 3, 5, 4):
        x, y = random(5, count), random(count)
        calls.clear()
        found = torch.cat([chunk["w"] for chunk in each(weights, x, y)])
        assert_close(found, (x * y).mT, cond=10)
        looked = {1: 2, 3: 3}.get(count, 0)  # the batch, and its first and last example
        assert len(calls) == looked + 1


def test_outputs_that_cannot_be_told_apart_are_refused():
    net = nn.Linear(3, 2).double()
    with pytest.raises(ShapeError, match=r"4 examples on one axis.* got outputs of tuple"):
        covariance = GradientCovariance(
            net, lambda f, y: f[0].square().mean(), per_example=True, call_fn=lambda m, b: (m(b[0][0]).mean(),)
        )
        covariance.update(((random(3, 3), "text"), torch.zeros(4)))
