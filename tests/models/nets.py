"""What is tested of every network."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def seeded(make: Callable[[], M], seed: int = 0) -> M:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def output(network: nn.Module, images: Tensor) -> Tensor:
    """The network's output, dropout drawn from a fixed seed."""
    return seeded(lambda: Output(network, images)).value


class Output(nn.Module):
    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.value: Tensor = network(images)


def assert_dropout_is_all(plain: Callable[[], nn.Module], dropping: Callable[[], nn.Module], images: Tensor) -> None:
    """Two networks are the same but for dropout: parameters, buffers, output without dropout; with it they differ."""
    one, other = seeded(plain), seeded(dropping)
    for name in ("parameters", "buffers"):
        pairs = zip(getattr(one, name)(), getattr(other, name)(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    # Evaluation first: in training mode batch norm records statistics, and those of the two differ from there on.
    assert torch.equal(output(one.eval(), images), output(other.eval(), images))
    rates = [layer.p for network in (one, other) for layer in dropout_layers(network.train())]
    for network in (one, other):
        for layer in dropout_layers(network):
            layer.p = 0.0
    assert torch.equal(output(one, images), output(other, images))
    for layer, rate in zip([*dropout_layers(one), *dropout_layers(other)], rates, strict=True):
        layer.p = rate
    assert not torch.equal(output(one, images), output(other, images))


def dropout_layers(network: nn.Module) -> list[nn.Dropout | nn.Dropout2d]:
    return [layer for layer in network.modules() if isinstance(layer, (nn.Dropout, nn.Dropout2d))]


def assert_gradients_reach_all(network: nn.Module, inputs: Tensor) -> None:
    """In training mode a random mix of the outputs gives all parameters finite gradients, and weights non-zero ones.

    A bias before batch norm has no influence, so the gradient of a bias need only be there.
    """
    out = network(inputs)
    parts = out if isinstance(out, tuple) else (out,)
    weights = torch.Generator().manual_seed(1)
    total = sum((part * torch.randn(part.shape, generator=weights)).sum() for part in parts)
    assert isinstance(total, Tensor)
    total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert name.endswith("bias") or bool(parameter.grad.any()), name


def assert_channels_last_agrees(network: nn.Module, images: Tensor) -> None:
    """Outputs and gradients in float64 do not depend on the memory format."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = network.double().to(memory_format=memory_format)
        network.zero_grad()
        value = network(images.double().contiguous(memory_format=memory_format))
        value.square().sum().backward()
        results.append([value.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    scale = max(tensor.abs().max().item() for tensor in results[0])  # biases before batch norm have rounding alone
    for contiguous, channels_last in zip(*results, strict=True):
        torch.testing.assert_close(channels_last, contiguous, rtol=1e-9, atol=1e-11 * scale)
