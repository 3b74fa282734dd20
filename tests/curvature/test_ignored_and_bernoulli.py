"""Fisher matrices where some targets count nowhere, and of yes-or-no labels, against dense matrices."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from lowrank_bdl.curvature.fisher_operator import FisherLinearOperator
from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.posteriors.laplace import DiagonalLaplace
from lowrank_bdl.posteriors.laplace_kfac import KFACLaplace

X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CUTS = [[8], [5, 3], [1, 7], [1] * 8]


def network(outputs: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def jacobian(net: nn.Module) -> Tensor:
    """Derivatives of the outputs ``(8, C, D)``."""
    found = jacrev(lambda weights: functional_call(net, weights, (X,)))(
        {n: p.detach() for n, p in net.named_parameters()}
    )
    return torch.cat([part.flatten(2) for part in found.values()], -1)


def cut(targets: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(sizes), targets.split(sizes), strict=True))


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("kind", ["expected", "empirical"])
def test_ignored_classes_are_as_if_left_out(sizes, kind):
    net, targets = network(3), torch.tensor([0, -100, 2, 1, -100, 0, -100, 2])
    kept = targets != -100
    found = FisherLinearOperator(net, "categorical", cut(targets, sizes), kind=kind).to_dense()
    without = FisherLinearOperator(net, "categorical", (X[kept], targets[kept]), kind=kind).to_dense()
    torch.testing.assert_close(found, without, rtol=1e-10, atol=1e-14)
    if kind == "expected":
        ggn = GGNLinearOperator(net, cross_entropy, cut(targets, sizes)).to_dense()
        torch.testing.assert_close(found, ggn, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("labels", ["true", "expected"])
def test_a_diagonal_laplace_leaves_ignored_targets_out(sizes, labels):
    net, targets = network(3), torch.tensor([0, -100, 2, 1, -100, 0, -100, 2])
    kept = targets != -100
    found = DiagonalLaplace(net, labels=labels).fit(cut(targets, sizes), progress=False)
    without = DiagonalLaplace(net, labels=labels).fit([(X[kept], targets[kept])], progress=False)
    torch.testing.assert_close(found.fisher_diagonal, without.fisher_diagonal, rtol=1e-9, atol=1e-14)
    assert found.num_data == 5
    assert found.log_likelihood == pytest.approx(without.log_likelihood, rel=1e-12)


def test_kronecker_factors_refuse_ignored_targets():
    net, targets = network(3), torch.tensor([0, -100, 2, 1, -100, 0, -100, 2])
    with pytest.raises(ShapeError, match="Every target must count in Kronecker factors; got ignored ones in batch 1"):
        KFACLaplace(net, labels="expected").fit([(X[:1], targets[:1]), (X[1:], targets[1:])], progress=False)


def test_targets_that_are_all_ignored_are_refused():
    with pytest.raises(ShapeError, match="at least one example must count; all of the 8 are ignored"):
        DiagonalLaplace(network(3), labels="true").fit([(X, torch.full((8,), -100))], progress=False)


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_bernoulli_matrices(sizes, count):
    net = network(count)
    targets = torch.randint(2, (8, count), generator=torch.Generator().manual_seed(2)).double()
    probs, rows = net(X).detach().sigmoid(), jacobian(net)
    fisher = torch.einsum("nci,nc,ncj->ij", rows, probs * (1 - probs), rows) / 8
    found = FisherLinearOperator(net, "bernoulli", cut(targets, sizes)).to_dense()
    torch.testing.assert_close(found, fisher, rtol=1e-10, atol=1e-14)
    slopes = torch.einsum("nc,nci->ni", probs - targets, rows)
    found = FisherLinearOperator(net, "bernoulli", cut(targets, sizes), kind="empirical").to_dense()
    torch.testing.assert_close(found, slopes.mT @ slopes / 8, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("count", [1, 3])
def test_a_bernoulli_laplace(count):
    net = network(count)
    targets = torch.randint(2, (8, count), generator=torch.Generator().manual_seed(2)).double()
    probs, rows = net(X).detach().sigmoid(), jacobian(net)
    diagonal = (rows.square() * (probs * (1 - probs)).unsqueeze(-1)).sum((0, 1))
    fitted = DiagonalLaplace(net, likelihood="bernoulli", labels="expected").fit(cut(targets, [5, 3]), progress=False)
    torch.testing.assert_close(fitted.fisher_diagonal.double(), diagonal, rtol=1e-9, atol=1e-14)
    logs = torch.distributions.Bernoulli(probs=probs).log_prob(targets).sum()
    assert fitted.log_likelihood == pytest.approx(logs.item(), rel=1e-12)
    kfac = KFACLaplace(net, likelihood="bernoulli", labels="expected").fit(cut(targets, [5, 3]), progress=False)
    assert kfac.num_data == 8 and len(kfac.fisher.kronecker) == 2


def test_bernoulli_targets_must_be_probabilities():
    with pytest.raises(ShapeError, match=r"must be in \[0, 1\]; got values from 0 to 2"):
        FisherLinearOperator(network(1), "bernoulli", (X, torch.tensor([[0.0], [2.0]] * 4)), kind="empirical")
