"""The pass over the data: what it counts, what it leaves alone, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from lowrank_bdl.curvature.fisher import fisher_sums
from lowrank_bdl.curvature.scores import CategoricalScores, GaussianScores
from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg import memory
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.curvature.cases import NETS, batches, build, outputs_of
from tests.oracles import assert_close


def run(net, loader, labels="true", likelihood=None, kronecker=True, diagonal=True, layout=None, **options):
    layout = ParameterLayout.from_module(net) if layout is None else layout
    likelihood = CategoricalScores() if likelihood is None else likelihood
    theta = layout.flatten(net)
    return fisher_sums(
        net, theta, layout, loader, likelihood, labels, kronecker=kronecker, diagonal=diagonal, **options
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", NETS)
def test_counts_covers_and_leaves_alone(name):
    net, x, y = build(name)
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    sums = run(net, batches(x, y))
    assert sums.num_data == 7
    log_probs = outputs_of(net, x).log_softmax(-1).gather(1, y[:, None])
    assert_close(torch.tensor(sums.log_likelihood, dtype=torch.float64), log_probs.sum())
    blocks = {key for curvature in sums.kronecker.values() for key in curvature.layer.parameters}
    names = ParameterLayout.from_module(net).names
    assert blocks | set(sums.diagonal) == set(names) and not blocks & set(sums.diagonal)
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_the_weights_are_the_ones_given():
    net, x, y = build("mlp")
    layout = ParameterLayout.from_module(net)
    theta = layout.flatten(net)
    exact = run(net, [(x, y)])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    found = fisher_sums(
        net, theta, layout, [(x, y)], CategoricalScores(), "true", kronecker=True, diagonal=True, progress=True
    )
    assert found.log_likelihood == exact.log_likelihood
    assert_close(found.kronecker["0.weight"].eigenvalues, exact.kronecker["0.weight"].eigenvalues)


def test_dropout_is_off_and_frozen_weights_are_left_out():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    net[0].requires_grad_(False)
    x, y = torch.ones(4, 3).double(), torch.tensor([0, 1, 2, 0])
    first, second = run(net, [(x, y)]), run(net, [(x, y)])
    assert first.log_likelihood == second.log_likelihood
    assert list(first.kronecker) == ["2.weight"] and not first.diagonal


def test_it_works_where_gradients_are_off():
    net, x, y = build("conv")
    exact = run(net, [(x, y)])
    with torch.no_grad():
        assert run(net, [(x, y)]).log_likelihood == exact.log_likelihood
    with torch.inference_mode():
        found = run(net, [(x.clone(), y)])
    assert_close(found.kronecker["0.weight"].eigenvalues, exact.kronecker["0.weight"].eigenvalues)


def test_inputs_in_mappings_reach_the_network_whole():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, inputs):
            return self.layer(inputs["a"] + inputs["b"])

    net, x, y = Sum(), torch.randn(2, 5, 3).double(), torch.tensor([0, 1, 2, 0, 1])
    sums = run(net, [({"a": x[0], "b": x[1]}, y)])
    exact = run(net.layer, [(x[0] + x[1], y)])
    assert_close(sums.kronecker["layer.weight"].eigenvalues, exact.kronecker["weight"].eigenvalues)


def test_a_part_computed_without_gradients_counts_as_constant():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    net, x, y = Backbone(), torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 0, 1])
    sums = run(net, [(x, y)])
    exact = run(net.head, [(net.body(x).detach(), y)])
    assert_close(sums.kronecker["head.weight"].eigenvalues, exact.kronecker["weight"].eigenvalues)
    assert not sums.diagonal["body.weight"].any() and not sums.diagonal["body.bias"].any()


def test_refusals(monkeypatch):
    net, x, y = build("mlp")
    with pytest.raises(ShapeError, match="at least one example; got none"):
        run(net, [])
    with pytest.raises(ShapeError, match=r"A batch must be \(x, y\), or .*: targets are needed; got Tensor"):
        run(net, [x])
    with pytest.raises(ShapeError, match=r"targets are needed; got tuple of 3 entries"):
        run(net, [(x, y, y)])
    with pytest.raises(ShapeError, match=r"Targets must be integer class indices of shape \(7,\)"):
        run(net, [(x, y.double())])
    with pytest.raises(ShapeError, match=r"shape of the output, \(7, 3\); got torch.float64 of shape \(7, 1\)"):
        run(net, [(x, y.double()[:, None])], likelihood=GaussianScores())
    with pytest.raises(NonFiniteError, match="outputs must be finite; got NaN or infinite ones in batch 1"):
        run(net, [(x, y), (x * float("nan"), y)])
    with pytest.raises(NonFiniteError, match=r"log-likelihood must be finite; got -inf in batch 0"):
        run(net, [(x, torch.full((7, 3), float("inf")))], likelihood=GaussianScores())
    with pytest.raises(ShapeError, match="The output must depend on the 1 parameters given; it does not"):
        run(Constant(), [(x, y)])
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    with pytest.raises(MemoryLimitError, match="a diagonal Fisher matrix needs 0.00 GiB"):
        run(net, [(x, y)], kronecker=False)


class Constant(nn.Module):
    """Its output does not depend on its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


def test_an_axis_that_moves_between_batches_is_noticed():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.moved = False

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).mean(0) if self.moved else self.layer(x).mean(1)

    net, x, y = Moving(), torch.randn(4, 2, 3).double(), torch.tensor([0, 1, 2, 0])

    def loader():
        yield x, y
        net.moved = True
        yield x, y

    with pytest.raises(ShapeError, match="Layer 'layer' must be called with all 4 examples on the first axis.*batch 1"):
        run(net, loader())


def test_a_first_batch_of_one_example_does_not_show_where_others_would_be():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x):
            return torch.tanh(self.layer(x.transpose(0, 1))).mean(0)

    net, data = TimeFirst(), [(torch.randn(n, n, 3).double(), torch.zeros(n, dtype=torch.long)) for n in (1, 4)]
    with pytest.raises(ShapeError, match="all 4 examples on the first axis in every batch.*it was not in batch 1"):
        run(net, data)
    assert set(run(net, data[::-1][:1]).diagonal) == {"layer.weight", "layer.bias"}


def test_a_gradient_that_overflows_is_named():
    _, x, y = build("mlp")
    with pytest.raises(NonFiniteError, match="Parameter 'token' must have finite gradients"):
        run(Overflow(), [(x, y)], kronecker=False)


class Overflow(nn.Module):
    """A finite output with an infinite gradient."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3).double())

    def forward(self, x):
        return x + self.token.sqrt()
