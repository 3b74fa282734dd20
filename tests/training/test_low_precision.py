"""SGD in block floating point: its definition, formats, drift below the resolution, checkpoints, refusals."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.training.low_precision import LowPrecisionSGD, QuantizedModel, low_precision_activations
from lowrank_bdl.training.quantization import block_floating_point, round_uniform, uniform_step


def problem(generator: torch.Generator) -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return net, torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()


def test_without_rounding_is_torch_sgd(generator: torch.Generator) -> None:
    net, x, y = problem(generator)
    other = copy.deepcopy(net)
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    train(
        net,
        LowPrecisionSGD(net.parameters(), **settings, weight_bits=None, gradient_bits=None, momentum_bits=None),
        x,
        y,
        7,
    )
    train(other, torch.optim.SGD(other.parameters(), **settings), x, y, 7)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("blocks", ["tensor", "channel"])
def test_takes_the_steps_of_the_paper(blocks: str, generator: torch.Generator) -> None:
    theta = torch.randn(3, 4, generator=generator).requires_grad_()
    bias = torch.randn(4, generator=generator).requires_grad_()
    expected = [theta.detach().clone(), bias.detach().clone()]
    velocity: list[Tensor | None] = [None, None]
    optimizer = LowPrecisionSGD(
        [theta, bias], lr=0.3, momentum=0.5, weight_decay=0.1, weight_bits=6, gradient_bits=5, momentum_bits=4,
        blocks=blocks, rounding="nearest",  # type: ignore[arg-type]
    )  # fmt: skip
    for step in range(4):
        optimizer.zero_grad()
        (theta.square().sum() * (step + 1) + bias.sin().sum()).backward()
        gradients = [2 * expected[0] * (step + 1), expected[1].cos()]
        optimizer.step()
        for i, gradient in enumerate(gradients):
            dim = 0 if blocks == "channel" and i == 0 else None

            def q(values: Tensor, bits: int, dim: int | None = dim) -> Tensor:
                return block_floating_point(values, bits, block_dim=dim, rounding="nearest")

            rounded = q(gradient + 0.1 * expected[i], 5)
            before = velocity[i]
            now = velocity[i] = q(rounded if before is None else 0.5 * before + rounded, 4)
            assert now is not None
            expected[i] = q(expected[i] - 0.3 * now, 6)
        torch.testing.assert_close(theta.detach(), expected[0], rtol=0, atol=0)
        torch.testing.assert_close(bias.detach(), expected[1], rtol=0, atol=0)


def test_everything_it_keeps_has_the_format(generator: torch.Generator) -> None:
    net, x, y = problem(generator)
    optimizer = LowPrecisionSGD(net.parameters(), lr=0.1, momentum=0.9, generator=generator)
    train(net, optimizer, x, y, 5)
    for parameter in net.parameters():
        for kept in (parameter.detach(), optimizer.state[parameter]["momentum_buffer"]):
            assert torch.equal(block_floating_point(kept, 8, rounding="nearest"), kept)
        assert parameter.unique().numel() <= 256


def test_steps_below_the_resolution_are_taken_on_average(generator: torch.Generator) -> None:
    """Rounding to the nearest never moves.

    Weights of 1 in steps of 1/64 (a weight of 1.5 keeps the exponent), moved by .001 sixteen times: a mean of 20,000
    within 5 standard errors of .984 (false alarms below 6e-7).
    """
    ends = {}
    for rounding in ("stochastic", "nearest"):
        theta = torch.cat([torch.ones(20_000), torch.tensor([1.5])]).requires_grad_()
        optimizer = LowPrecisionSGD(
            [theta], lr=0.001, weight_bits=8, gradient_bits=None, rounding=rounding,  # type: ignore[arg-type]
            generator=generator,
        )  # fmt: skip
        for _ in range(16):
            theta.grad = torch.cat([torch.ones(20_000), torch.zeros(1)])
            optimizer.step()
        ends[rounding] = theta.detach()[:-1]
    assert torch.equal(ends["nearest"], torch.ones(20_000))
    mean, error = ends["stochastic"].mean().item(), ends["stochastic"].std().item() / 20_000**0.5
    assert abs(mean - 0.984) < 5 * error < 0.001


def test_goes_on_from_a_state_with_the_same_bits(generator: torch.Generator) -> None:
    net, x, y = problem(generator)
    other = copy.deepcopy(net)

    def make(model: nn.Module) -> LowPrecisionSGD:
        return LowPrecisionSGD(model.parameters(), lr=0.1, momentum=0.9, generator=torch.Generator().manual_seed(1))

    whole, first = make(net), make(other)
    train(net, whole, x, y, 8)
    train(other, first, x, y, 3)
    second = make(other)
    second.load_state_dict(first.state_dict())
    train(other, second, x, y, 5)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_activations_and_errors_are_rounded_in_training_alone(generator: torch.Generator) -> None:
    net, x, _ = problem(generator)
    plain = net(x)
    with low_precision_activations(net, 5, rounding="nearest"):
        found = net.train()(x)
        hidden = block_floating_point(net[0](x), 5, rounding="nearest")  # its own hook rounds it as well: idempotent
        last = nn.functional.linear(
            block_floating_point(hidden.relu(), 5, rounding="nearest"), net[2].weight, net[2].bias
        )
        assert torch.equal(found, block_floating_point(last, 5, rounding="nearest"))
        (gradient,) = torch.autograd.grad(found, net[2].bias, torch.linspace(-1, 1, 36).view(12, 3))
        rounded = block_floating_point(torch.linspace(-1, 1, 36).view(12, 3), 5, rounding="nearest")
        torch.testing.assert_close(gradient, rounded.sum(0))
        assert torch.equal(net.eval()(x), plain)
    assert torch.equal(net.train()(x), plain)
    assert not any(module._forward_hooks for module in net.modules())


def test_refuses_bad_input() -> None:
    theta = torch.ones(2, requires_grad=True)
    cases: list[tuple[dict[str, object], str]] = [
        (dict(lr=-1.0), "lr must be at least 0 and finite; got -1.0"),
        (dict(lr=0.1, weight_bits=1), "weight_bits must be from 2 to 24, or None; got 1"),
        (dict(lr=0.1, gradient_bits=25), "gradient_bits must be from 2 to 24, or None; got 25"),
        (dict(lr=0.1, blocks="row"), "blocks must be 'tensor' or 'channel'; got row"),
        (dict(lr=0.1, rounding="up"), "rounding must be 'stochastic' or 'nearest'; got up"),
        (dict(lr=0.1, momentum=1.0), r"momentum must be in \[0, 1\); got 1.0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            LowPrecisionSGD([theta], **options)  # type: ignore[arg-type]
    theta.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(NonFiniteError, match="values must be finite"):
        LowPrecisionSGD([theta], lr=0.1).step()
    assert torch.equal(theta.detach(), torch.ones(2))
    with (
        pytest.raises(ValueError, match="bits must be an integer from 2 to 24; got 0"),
        low_precision_activations(nn.Linear(1, 1), 0),
    ):
        pass


@pytest.mark.parametrize("bits", [2, 4])
def test_a_quantized_network_computes_with_levels_and_trains_straight_through(
    bits: int, generator: torch.Generator
) -> None:
    net, x, y = problem(generator)
    plain = copy.deepcopy(net)
    quantized = QuantizedModel(net, bits)
    steps = {name: uniform_step(p, bits) for name, p in plain.named_parameters() if p.ndim > 1}
    rounded = copy.deepcopy(plain)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name in steps:
                parameter.copy_(round_uniform(parameter, steps[name], bits))
    torch.testing.assert_close(quantized(x), rounded(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(quantized.weights(), quantized.layout.flatten(rounded))
    cross_entropy(quantized(x), y).backward()
    cross_entropy(rounded(x), y).backward()
    for one, two in zip(net.parameters(), rounded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6)  # as if it had not been rounded
    with torch.no_grad():
        net[0].weight.mul_(3)
    again = quantized.weights()[: net[0].weight.numel()].view_as(net[0].weight)
    assert torch.equal(again, round_uniform(net[0].weight, steps["0.weight"], bits))  # the step stays
    assert again.unique().numel() <= 2**bits - 1


def test_training_on_levels_beats_rounding_afterwards(generator: torch.Generator) -> None:
    x = torch.randn(400, 8, generator=generator)
    y = (x[:, 0] * x[:, 1] + x[:, 2] > 0).long()
    net = nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    train(net, torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9), x, y, 300)
    quantized = QuantizedModel(net, 3)
    before = cross_entropy(quantized(x), y).item()
    train(quantized, torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9), x, y, 200)
    assert cross_entropy(quantized(x), y).item() < 0.6 * before


def test_a_quantized_network_needs_weight_matrices() -> None:
    with pytest.raises(ShapeError, match="must have a weight of two or more axes; got none"):
        QuantizedModel(nn.BatchNorm1d(3), 2)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 24; got 1"):
        QuantizedModel(nn.Linear(1, 1), 1)


@pytest.mark.parametrize("hidden", [3, 40])
def test_second_derivatives_pass_through_the_rounding(hidden):
    """With 24 bits rounding is that of float32: what is missing would be a whole term, not a millionth."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()
    x, weights, found = torch.randn(5, 2).double(), list(net.parameters()), []
    for rounded in (True, False):
        with low_precision_activations(net, 24, rounding="nearest") if rounded else nullcontext():
            loss = net(x).square().sum()
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        found.append(torch.autograd.grad(sum((slope * slope).sum() for slope in slopes), weights))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
