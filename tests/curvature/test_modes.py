"""Products with one vector, by forward mode, and with blocks, by reverse mode: the same matrix, that of training."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, embedding

from lowrank_bdl.curvature.fisher_operator import FisherLinearOperator
from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.errors import LowRankBDLError
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.oracles import assert_close


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            features = self.body(x).tanh()
        return self.head(features)


class PartlyNoGrad(NoGrad):
    """Some batches alone have a part that is not differentiated."""

    def forward(self, x):
        with torch.set_grad_enabled(len(x) != 3):
            features = self.body(x).tanh()
        return self.head(features)


class Detached(NoGrad):
    def forward(self, x):
        features = self.body(x)
        return self.head(features.tanh() * features.detach().sigmoid())


class ThroughNumpy(NoGrad):
    def forward(self, x):
        features = self.body(x)
        gate = torch.as_tensor(features.data).sigmoid()
        return self.head(features.tanh() * gate)


class NotRequired(NoGrad):
    def forward(self, x):
        with torch.no_grad():
            features = self.body(x).requires_grad_(False)
        return self.head(features + 0.1 * self.body(x).tanh())


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 2)
        nn.init.normal_(self.words.weight)

    def forward(self, x):
        return self.head(self.words((x.abs() * 4).long() % 5).tanh().mean(1))


class FunctionallyPadded(Padded):
    def forward(self, x):
        return self.head(embedding((x.abs() * 4).long() % 5, self.words.weight, padding_idx=0).tanh().mean(1))


class Rounding(torch.autograd.Function):
    """Straight-through, with a derivative of its own for forward mode, which is that of the rounding: zero."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 0


class StraightThrough(NoGrad):
    def forward(self, x):
        return self.head(Rounding.apply(self.body(x)).tanh())


class Reversed(NoGrad):
    """Changes gradients on their way back, in place."""

    def forward(self, x):
        features = self.body(x).tanh()
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient.mul_(-0.5))
        return self.head(features)


NETS = [
    NoGrad,
    PartlyNoGrad,
    Detached,
    ThroughNumpy,
    NotRequired,
    Padded,
    FunctionallyPadded,
    StraightThrough,
    Reversed,
]


def build(make, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(dtype), [
            (torch.randn(size, 3, dtype=torch.float64).to(dtype), torch.randint(2, (size,))) for size in (4, 3, 1)
        ]


def dense(net, data):
    """J' (diag(p) - p p') J with J by one backward pass an output."""
    layout, total = ParameterLayout.from_module(net), 0
    for x, _ in data:
        weights = {name: part.requires_grad_() for name, part in layout.unflatten(layout.flatten(net)).items()}
        outputs = functional_call(net, weights, (x,))
        rows = []
        for value in outputs.flatten():
            found = torch.autograd.grad(value, list(weights.values()), retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), found, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
        jacobian = torch.stack(rows).view(len(x), 2, -1).double()
        probs = outputs.detach().double().softmax(1)
        total = total + (
            jacobian.mT @ (torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]) @ jacobian
        ).sum(0)
    return total / sum(len(y) for _, y in data)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("make", NETS)
def test_one_vector_and_blocks(make, check):
    net, data = build(make)
    expected = dense(net, data)
    for ggn in (
        GGNLinearOperator(net, cross_entropy, data, check=check),
        FisherLinearOperator(net, "categorical", data, check=check),
    ):
        unit = torch.eye(len(expected), dtype=torch.float64)
        assert_close(torch.stack([ggn @ vector for vector in unit], dim=1), expected, cond=100)
        assert_close(ggn @ unit, expected, cond=100)
        assert ggn._forward_mode == (make in (Detached, ThroughNumpy)), "detach() is seen by both modes"


@pytest.mark.parametrize("check", [True, False])
def test_in_single_precision(check):
    net, data = build(NoGrad, torch.float32)
    ggn = GGNLinearOperator(net, cross_entropy, data, check=check)
    vector = torch.randn(len(ggn.theta))
    expected = dense(net, data) @ vector.double()
    assert_close(ggn @ vector, expected, torch.float32, cond=10)
    assert not ggn._forward_mode


@pytest.mark.parametrize("check", [True, False])
def test_the_faster_mode_stays_where_both_agree(check):
    net, data = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.float32)
    ggn = GGNLinearOperator(net, cross_entropy, data, check=check)
    vector = torch.randn(len(ggn.theta))
    for _ in range(2):
        assert_close(ggn @ vector, dense(net, data) @ vector.double(), torch.float32, cond=10)
        assert ggn._forward_mode


def test_a_matrix_that_is_zero_at_first_shows_nothing():
    net, data = build(NoGrad)
    with torch.no_grad():
        net.head.bias[0] = 1e3  # probabilities of one and zero
    ggn = GGNLinearOperator(net, cross_entropy, data, check=False)
    vector = torch.randn(len(ggn.theta), dtype=torch.float64)
    assert not (ggn @ vector).any()
    net, _ = build(NoGrad)
    other = ggn.at(ParameterLayout.from_module(net).flatten(net))
    assert_close(other @ vector, dense(net, data) @ vector, cond=100)


def test_shuffled_data_are_still_what_is_blamed():
    net, data = build(NoGrad)
    generator = torch.Generator().manual_seed(0)

    class Augmented:
        def __iter__(self):
            for x, y in data:
                yield x + torch.randn(x.shape, generator=generator), y

    with pytest.raises(LowRankBDLError, match="augmented anew"):
        GGNLinearOperator(net, cross_entropy, Augmented())
