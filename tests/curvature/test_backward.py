"""Backward passes with blocks of vectors, and how many go at once."""

import pytest
import torch
from torch import nn

from lowrank_bdl.curvature.backward import Backward, differentiable_kernels, is_missing_derivative, vectors_at_once
from tests.oracles import assert_close


class NoBatchingRule(torch.autograd.Function):
    """The square, with a backward pass that vmap cannot see through."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 2 * x if bool((gradient == gradient).all()) else gradient


@pytest.mark.parametrize("square, vectorize", [(torch.square, True), (NoBatchingRule.apply, False)])
def test_blocks_of_vectors(square, vectorize):
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    backward, vectors = Backward(), torch.randn(4, 3, dtype=torch.float64)
    found, missing = backward([square(x), None, unused.detach()], [x, unused], [vectors, None, torch.ones(4, 2)])
    assert_close(found, vectors * torch.tensor([2.0, 4.0, 6.0]).double())
    assert missing is None and backward.vectorize == vectorize
    assert_close(backward([square(x)], [x], [vectors[:1]])[0], vectors[:1] * torch.tensor([2.0, 4.0, 6.0]).double())


def test_nothing_to_differentiate_is_zero():
    x = torch.ones(2, requires_grad=True)
    assert Backward()([torch.ones(2), None], [x], [torch.ones(3, 2), torch.ones(3, 2)]) == [None]
    assert Backward()([x * 2], [x], [None]) == [None]


def test_how_many_vectors_go_at_once_falls_with_what_the_network_saves():
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def at_once(examples, vector_bytes=0):
        return vectors_at_once(lambda: net(torch.randn(examples, 8)), vector_bytes, torch.device("cpu"))

    small, large = at_once(10), at_once(100)
    assert small > 3 * large > 3 and at_once(100_000) == 1
    assert at_once(10, 1 << 20) == 1


@pytest.mark.parametrize(
    "message, missing",
    [
        ("derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented", True),
        ("The derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported", True),
        ("cudnn RNN backward can only be called in training mode", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
        ("CUDA out of memory", False),
    ],
)
def test_what_torch_says_of_missing_derivatives(message, missing):
    assert is_missing_derivative(RuntimeError(message)) == missing


def test_settings_of_kernels_are_set_back():
    before = torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(KeyError, match="inside"), differentiable_kernels():
        assert not torch.backends.cudnn.enabled and not torch.backends.cuda.flash_sdp_enabled()
        raise KeyError("inside")
    assert (torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()) == before
