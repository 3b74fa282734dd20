"""Sparse embeddings, bags and weight normalisation: what torch cannot differentiate twice, or gets wrong then."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding_bag

from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.curvature.gradient_covariance import GradientCovariance
from lowrank_bdl.curvature.hessian import HessianLinearOperator
from lowrank_bdl.parameters.differentiable_operations import DifferentiableOperations
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.laplace import DiagonalLaplace
from lowrank_bdl.subspaces.log_joint import LogJoint
from lowrank_bdl.subspaces.subspace import Subspace
from lowrank_bdl.surfaces.curves import BezierCurve
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training.variational import MeanFieldModel
from tests.curvature.dense import dense_ggn, dense_hessian
from tests.oracles import assert_close


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("form", ["matrix", "offsets", "last offset"])
def test_bags_are_those_of_torch(mode, form, padding_idx):
    torch.manual_seed(0)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    options = {"mode": mode, "padding_idx": padding_idx}
    if form == "matrix":
        arguments = (torch.randint(6, (5, 4)), weight)
    else:  # an empty bag among them
        offsets = torch.tensor([0, 3, 3, 7] + ([11] if form == "last offset" else []))
        arguments, options["include_last_offset"] = (torch.randint(6, (11,)), weight, offsets), form == "last offset"
    expected = embedding_bag(*arguments, **options)
    with DifferentiableOperations():
        found = embedding_bag(*arguments, **options)
    assert_close(found.detach(), expected.detach())
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(bags, weight, direction)[0] for bags in (found, expected)]
    assert_close(*gradients)


def test_bags_with_weights_of_their_own_and_bounded_norms():
    torch.manual_seed(0)
    indices, offsets = torch.randint(6, (7,)), torch.tensor([0, 2, 5])
    factors, weight = torch.randn(7, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    options = {"mode": "sum", "per_sample_weights": factors, "max_norm": 1.0}
    expected = embedding_bag(indices, weight.clone(), offsets, **options)
    with DifferentiableOperations():
        assert_close(embedding_bag(indices, weight.clone(), offsets, **options), expected)
    matrix = {"mode": "sum", "per_sample_weights": factors[:6].view(2, 3)}
    expected = embedding_bag(indices[:6].view(2, 3), weight, **matrix)
    with DifferentiableOperations():
        assert_close(embedding_bag(indices[:6].view(2, 3), weight, **matrix), expected)


class Plain(nn.Module):
    """Bags as a sum over rows of a matrix, for the oracles."""

    def __init__(self, net, mode, padding_idx):
        super().__init__()
        self.words, self.head = nn.Embedding(6, 3), net[-1]
        self.words.weight = net[0].weight
        self.mode, self.padding_idx = mode, padding_idx

    def forward(self, x):
        x = x.long()
        rows = self.words.weight[x]
        if self.mode == "flat":
            return self.head(torch.tanh(rows.flatten(1)))
        there = (x != self.padding_idx)[..., None]
        if self.mode == "max":
            return self.head(torch.tanh(rows.masked_fill(~there, -torch.inf).amax(1)))
        total = (rows * there).sum(1)
        return self.head(torch.tanh(total / there.sum(1) if self.mode == "mean" else total))


def build(mode, sparse, padding_idx=None):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if mode == "flat":
            words, width = nn.Embedding(6, 3, sparse=sparse), 12
            layers = [words, nn.Flatten(), nn.Tanh(), nn.Linear(width, 3)]
        else:
            words = nn.EmbeddingBag(6, 3, mode=mode, sparse=sparse, padding_idx=padding_idx)
            layers = [words, nn.Tanh(), nn.Linear(3, 3)]
        net = nn.Sequential(*layers).double()
        nn.init.normal_(words.weight)
        data = [(torch.stack([torch.randperm(6)[:4] for _ in range(n)]), torch.randint(3, (n,))) for n in (4, 3)]
    return net, data, Plain(net, mode, -1 if padding_idx is None else padding_idx)


@pytest.mark.parametrize(
    "mode, sparse, padding_idx",
    [
        ("flat", True, None),
        ("sum", True, None),
        ("sum", False, 2),
        ("mean", True, 1),
        ("mean", False, None),
        ("max", False, None),
    ],
)
def test_curvature(mode, sparse, padding_idx):
    net, data, plain = build(mode, sparse, padding_idx)
    layout = ParameterLayout.from_module(net)
    hessian, ggn = (dense(plain, data) for dense in (dense_hessian, dense_ggn))
    assert_close(HessianLinearOperator(net, cross_entropy, data).to_dense(), hessian, cond=100)
    operator = GGNLinearOperator(net, cross_entropy, data)
    assert_close(operator.to_dense(), ggn, cond=100)
    vector = torch.randn(layout.numel, dtype=torch.float64)
    assert_close(operator @ vector, ggn @ vector, cond=100)
    diagonal = DiagonalLaplace(net, labels="expected").fit(data, progress=False).fisher_diagonal
    assert_close(diagonal / 7, ggn.diagonal(), cond=100)
    covariance = GradientCovariance(net, cross_entropy, per_example=True)
    for batch in data:
        covariance.update(batch)
    weights = [p.detach().requires_grad_() for p in plain.parameters()]
    names = [name for name, _ in plain.named_parameters()]
    each = []
    for x, y in data:
        for example, label in zip(x, y, strict=True):
            outputs = torch.func.functional_call(plain, dict(zip(names, weights, strict=True)), (example[None],))
            found = torch.autograd.grad(cross_entropy(outputs, label[None]), weights)
            each.append(torch.cat([gradient.flatten() for gradient in found]))
    assert_close(covariance.covariance.to_dense(), torch.stack(each).mT.cov(), cond=1e3)
    assert_close(covariance.mean, torch.stack(each).mean(0), cond=100)
    assert net[0].sparse == sparse
    theta = layout.flatten(net)
    joint = LogJoint(Subspace(layout, theta, torch.eye(layout.numel).double()), net, "categorical", data)
    found = torch.autograd.functional.hessian(joint.log_likelihood, torch.zeros_like(theta))
    assert_close(found / -7, hessian, cond=100)


@pytest.mark.parametrize("mode", ["flat", "sum"])
def test_training_through_other_weights(mode):
    """Curves and distributions of weights compute those of the network, whose gradients arrive dense."""
    found = []
    for sparse in (True, False):
        net, data, _ = build(mode, sparse)
        layout = ParameterLayout.from_module(net)
        theta = layout.flatten(net)
        curve = BezierCurve([theta, theta + 0.1, theta - 0.1], layout)
        surface = SurfaceModel(net, curve, torch.Generator().manual_seed(0))
        mean_field = MeanFieldModel(net, init_std=0.1, generator=torch.Generator().manual_seed(0))
        for model in (surface, mean_field):
            cross_entropy(model(data[0][0]), data[0][1]).backward()
        parameters = [*surface.parameters(), *mean_field.parameters()]
        found.append([p.grad for p in parameters if p.grad is not None])
    assert len(found[0]) == len(found[1]) >= 3
    for given, expected in zip(*found, strict=True):
        assert not given.is_sparse and given.any()
        assert_close(given, expected)


class WeightedBags(nn.Module):
    """Bags of several lengths as one vector of indices, each entry with a trained weight."""

    def __init__(self, plain):
        super().__init__()
        self.words, self.factors = nn.EmbeddingBag(6, 3, mode="sum"), nn.Parameter(torch.rand(6))
        self.head, self.plain = nn.Linear(3, 3), plain

    def forward(self, batch):
        indices, offsets = batch["indices"], batch["offsets"]
        if not self.plain:
            return self.head(self.words(indices, offsets, per_sample_weights=self.factors[indices]).tanh())
        number = torch.arange(len(indices))
        inside = (number >= offsets[:, None]) & (
            number < torch.cat([offsets[1:], torch.tensor([len(indices)])])[:, None]
        )
        rows = self.words.weight[indices] * self.factors[indices][:, None]
        return self.head((inside.to(rows) @ rows).tanh())


def test_weighted_bags_with_offsets():
    torch.manual_seed(0)
    net, plain = WeightedBags(False).double(), WeightedBags(True).double()
    plain.load_state_dict(net.state_dict())
    x = {"indices": torch.randint(6, (15,)), "offsets": torch.tensor([0, 2, 2, 7, 9, 12])}
    y = torch.randint(3, (6,))
    layout = ParameterLayout.from_module(net)
    theta = layout.flatten(net)

    def outputs(at):
        return torch.func.functional_call(plain, dict(layout.unflatten(at)), (x,))

    jacobian, probs = torch.func.jacrev(outputs)(theta), outputs(theta).detach().softmax(1)
    ggn = (jacobian.mT @ (torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]) @ jacobian).mean(0)
    hessian = torch.func.hessian(lambda at: cross_entropy(outputs(at), y))(theta)
    assert_close(HessianLinearOperator(net, cross_entropy, [(x, y)]).to_dense(), hessian, cond=100)
    assert_close(GGNLinearOperator(net, cross_entropy, [(x, y)]).to_dense(), ggn, cond=100)
    diagonal = DiagonalLaplace(net, labels="expected").fit([(x, y)], progress=False).fisher_diagonal
    assert_close(diagonal / 6, ggn.diagonal(), cond=100)
