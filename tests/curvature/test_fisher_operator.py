"""The three Fisher matrices against sums over single examples with dense Jacobians.

That sampled labels give an unbiased estimate is tested on all entries at once, against their exact variance under
independent draws: a false alarm has probability below 1e-6 by Bonferroni over the entries (normal tails; each entry is
a mean of 7,000 terms), and the empirical Fisher fails.
"""

import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from lowrank_bdl.curvature.fisher_operator import FisherLinearOperator
from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.errors import ShapeError
from tests.curvature.cases import batches, build, categorical_hessians, jacobians, outputs_of
from tests.curvature.dense import build_large
from tests.oracles import assert_close


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "positions", "tied", "recurrent"])
def test_expected_and_empirical(name):
    net, x, y = build(name)
    jacobian, outputs = jacobians(net, x), outputs_of(net, x)
    expected = (jacobian.mT @ categorical_hessians(outputs) @ jacobian).mean(0)
    fisher = FisherLinearOperator(net, "categorical", batches(x, y))
    assert_close(fisher.to_dense(), expected, cond=10)
    assert_close(GGNLinearOperator(net, cross_entropy, batches(x, y)).to_dense(), expected, cond=10)
    scores = outputs.softmax(1) - one_hot(y, 3)
    gradients = (scores[:, None] @ jacobian)[:, 0]
    empirical = FisherLinearOperator(net, "categorical", batches(x, y), kind="empirical")
    assert_close(empirical.to_dense(), gradients.mT @ gradients / 7, cond=10)


def test_gaussian():
    net, x, _ = build("conv")
    y = torch.randn(7, 3, dtype=torch.float64)
    jacobian, residuals = jacobians(net, x), (outputs_of(net, x) - y) / 0.3
    options = {"noise_variance": 0.3}
    fisher = FisherLinearOperator(net, "gaussian", batches(x, y), **options).to_dense()
    assert_close(fisher, (jacobian.mT @ jacobian).mean(0) / 0.3, cond=10)
    assert_close(fisher, GGNLinearOperator(net, mse_loss, batches(x, y)).to_dense() * (3 / 2 / 0.3), cond=10)
    gradients = (residuals[:, None] @ jacobian)[:, 0]
    empirical = FisherLinearOperator(net, "gaussian", batches(x, y), kind="empirical", **options)
    assert_close(empirical.to_dense(), gradients.mT @ gradients / 7, cond=10)


class PerPosition(nn.Module):
    """Logits (N, C, positions) by one linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x).mT


def test_positions_of_an_example_are_independent_given_the_outputs():
    torch.manual_seed(0)
    net = PerPosition().double()
    x, y = torch.randn(4, 5, 2, dtype=torch.float64), torch.randint(3, (4, 5))
    jacobian = jacobians(net, x).view(4, 3, 5, 9)
    outputs = net(x).detach()
    expected, gradients = torch.zeros(9, 9).double(), torch.zeros(4, 9).double()
    for n in range(4):
        for position in range(5):
            own = jacobian[n, :, position]
            expected += own.mT @ categorical_hessians(outputs[n : n + 1, :, position])[0] @ own / 4
            gradients[n] += (outputs[n, :, position].softmax(0) - one_hot(y[n, position], 3)) @ own
    assert_close(FisherLinearOperator(net, "categorical", (x, y)).to_dense(), expected, cond=10)
    empirical = FisherLinearOperator(net, "categorical", (x, y), kind="empirical")
    assert_close(empirical.to_dense(), gradients.mT @ gradients / 4, cond=10)


@pytest.mark.parametrize("kind, right", [("sampled", True), ("empirical", False)])
def test_sampled_labels_are_unbiased(kind, right, alpha=1e-6, number=1000):
    net, x, y = build("mlp")
    jacobian, outputs = jacobians(net, x), outputs_of(net, x)
    probs = outputs.softmax(1)
    gradients = (probs[:, None] - torch.eye(3).double()) @ jacobian  # (N, label, D)
    products = gradients[..., :, None] * gradients[..., None, :]
    mean = torch.einsum("nc,ncij->nij", probs, products)
    variance = (torch.einsum("nc,ncij->nij", probs, products**2) - mean**2).sum(0) / 7**2
    options = {"num_samples": number, "generator": torch.Generator().manual_seed(1)} if right else {}
    found = FisherLinearOperator(net, "categorical", batches(x, y), kind=kind, **options).to_dense()
    deviations = (found - mean.mean(0)).abs() / (variance / number).sqrt().clamp_min(1e-12)
    limit = norm.isf(alpha / 2 / found.numel())
    assert bool((deviations < limit).all()) == right


def test_labels_are_drawn_once_and_by_the_generator():
    net, x, y = build("mlp")

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return FisherLinearOperator(net, "categorical", batches(x, y), kind="sampled", generator=generator)

    first = make(3)
    dense = first.to_dense()
    assert torch.equal(dense, first.to_dense()) and torch.equal(dense, make(3).to_dense())
    assert not torch.allclose(dense, make(4).to_dense())
    assert torch.linalg.matrix_rank(dense) <= 7
    state = torch.get_rng_state()
    make(3) @ torch.ones(len(dense), dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_by_the_batch():
    net, data = build_large("conv")
    fisher = FisherLinearOperator(net, "categorical", data, bn_mode="train")
    ggn = GGNLinearOperator(net, cross_entropy, data, bn_mode="train")
    vectors = torch.randn(fisher.shape[0], 3, dtype=torch.float64)
    assert_close(fisher @ vectors, ggn @ vectors, cond=100)


def test_refuses_unknown_options():
    net, x, y = build("mlp")
    for arguments, options, message in (
        (("poisson",), {}, "likelihood must be 'categorical', 'bernoulli' or 'gaussian'; got 'poisson'"),
        (("categorical",), {"kind": "exact"}, "kind must be one of expected, sampled, empirical; got 'exact'"),
        (("categorical",), {"num_samples": 2}, "1 unless kind='sampled'; got 2"),
        (("categorical",), {"num_samples": 0, "kind": "sampled"}, "num_samples must be at least 1.*got 0"),
        (("categorical",), {"noise_variance": 2.0}, "noise_variance goes with likelihood='gaussian'; got 2.0"),
        (("gaussian",), {"noise_variance": 0.0}, "noise_variance must be a positive number; got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            FisherLinearOperator(net, *arguments, (x, y), **options)
    with pytest.raises(ShapeError, match=r"integer class indices of shape \(7,\); got torch.float64 of shape \(7, 3\)"):
        FisherLinearOperator(net, "categorical", (x, x))
    with pytest.raises(ShapeError, match=r"Targets must have the shape of the output, \(7, 3\)"):
        FisherLinearOperator(net, "gaussian", (x, y))
