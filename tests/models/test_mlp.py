"""MLP and RegNet: arithmetic, the variance head, use as a Gaussian likelihood, errors."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import gaussian_nll_loss, linear, relu, softplus
from torch.utils.data import DataLoader, TensorDataset

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.models import MLP, RegNet, create_model
from lowrank_bdl.models.mlp import VarianceHead
from tests.models.nets import assert_dropout_is_all, assert_gradients_reach_all, seeded


def test_names_and_output_are_those_of_linear_layers(generator: torch.Generator) -> None:
    network = seeded(lambda: MLP(2, in_features=12, hidden=(5, 4))).double()
    layers = [f"linear{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert [name for name, _ in network.named_parameters()] == layers
    images = torch.randn(7, 3, 2, 2, generator=generator, dtype=torch.float64)
    state, x = network.state_dict(), images.flatten(1)
    for i in range(3):
        x = linear(x, state[f"linear{i}.weight"], state[f"linear{i}.bias"])
        x = relu(x) if i < 2 else x
    torch.testing.assert_close(network(images), x, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(network(images.flatten(1)), x, rtol=1e-13, atol=1e-14)


def test_no_hidden_layer_is_a_linear_model() -> None:
    assert [type(layer) for layer in MLP(1, in_features=3, hidden=())] == [nn.Flatten, nn.Linear]


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_variance_is_the_sum_of_two_softplus(num_outputs: int, generator: torch.Generator) -> None:
    network = seeded(lambda: RegNet(num_outputs, in_features=4, hidden=(6,))).double()
    nn.init.constant_(network.var_split.var, -0.7)
    assert network.linear1.out_features == 2 * num_outputs
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    raw = network.linear1(relu(network.linear0(inputs)))
    mean, variance = network(inputs)
    assert torch.equal(mean, raw[:, :num_outputs])
    expected = softplus(raw[:, num_outputs:]) + math.log1p(math.exp(-0.7))
    torch.testing.assert_close(variance, expected, rtol=1e-12, atol=0)


def test_constant_variance_is_one_learned_number() -> None:
    network = seeded(lambda: RegNet(2, in_features=4, hidden=(6,), variance="constant"))
    mean, variance = network(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    assert mean.shape == variance.shape == (5, 2)
    torch.testing.assert_close(variance, torch.full((5, 2), math.log(2.0)))
    assert not isinstance(seeded(lambda: RegNet(2, in_features=4, hidden=(), variance="none"))(torch.ones(1, 4)), tuple)


@pytest.mark.parametrize("variance", ["input", "constant"])
def test_gradients_reach_every_parameter(variance: str, generator: torch.Generator) -> None:
    network = seeded(lambda: RegNet(1, in_features=4, hidden=(6, 5), variance=variance))
    assert_gradients_reach_all(network, torch.randn(30, 4, generator=generator))


def test_dropout_is_the_only_difference(generator: torch.Generator) -> None:
    inputs = torch.randn(30, 4, generator=generator)
    dropping = MLP(1, in_features=4, hidden=(6, 5), dropout_rate=0.3)
    assert [name for name, layer in dropping.named_children() if isinstance(layer, nn.Dropout)] == [
        "dropout1",
        "dropout2",
    ]
    assert_dropout_is_all(
        lambda: MLP(1, in_features=4, hidden=(6, 5)), lambda: MLP(1, in_features=4, hidden=(6, 5), dropout_rate=0.3),
        inputs,
    )  # fmt: skip


def test_predict_and_torch_s_loss_take_the_pair(generator: torch.Generator) -> None:
    """The log-likelihood of one weight vector under ``predict`` is torch's own Gaussian loss of the pair."""
    network = seeded(lambda: create_model("RegNet", 1, in_features=4, hidden=(6,))).eval()
    inputs, targets = torch.randn(20, 4, generator=generator), torch.randn(20, 1, generator=generator)
    theta = lb.ParameterLayout.from_module(network).flatten(network)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    predictive = lb.predict(network, theta, loader, likelihood="gaussian", progress=False)
    expected = gaussian_nll_loss(*_swap(network(inputs), targets), full=True, eps=0.0).item()
    assert predictive.nll == pytest.approx(expected, rel=1e-5)


def _swap(pair: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return pair[0], targets, pair[1]


def test_errors() -> None:
    with pytest.raises(ValueError, match="variance must be one of input, constant, none; got 'homoscedastic'"):
        RegNet(1, in_features=4, variance="homoscedastic")
    with pytest.raises(ShapeError, match="a layer's size must be at least 1; got 0"):
        MLP(1, in_features=4, hidden=(5, 0))
    with pytest.raises(ShapeError, match="num_outputs must be at least 1; got 0"):
        RegNet(0, in_features=4)
    with pytest.raises(ShapeError, match="num_outputs must be at least 1; got 0"):
        VarianceHead(0)
