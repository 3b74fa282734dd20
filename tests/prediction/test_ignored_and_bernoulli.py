"""Targets that count nowhere, and yes-or-no likelihoods."""

import pytest
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError


class Tokens(nn.Linear):
    """Logits ``(N, 3, 4)`` of four tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 3, 4)


@pytest.mark.parametrize("dense", [False, True])
def test_ignored_targets_count_in_no_metric(dense: bool) -> None:
    torch.manual_seed(0)
    net = (Tokens(2, 12) if dense else nn.Linear(2, 3)).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    y = torch.randint(3, (8, 4) if dense else (8,))
    y[[1, 4]] = -100
    y[0] = torch.where(torch.arange(4) > 1, -100, y[0]) if dense else y[0]
    kept = y != -100
    thetas = torch.randn(5, sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    for sizes in ([8], [5, 3], [1] * 8):
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        found = lb.predict(net, thetas, batches, progress=False)
        probs, classes = found.mean[kept], y[kept]
        assert found.targets is not None and torch.equal(found.targets, y)
        picked = probs.gather(1, classes[:, None])
        assert found.nll == pytest.approx(-picked.log().mean().item())
        assert found.nll_by_num_samples[-1].item() == pytest.approx(found.nll)
        assert found.accuracy == pytest.approx((probs.argmax(1) == classes).double().mean().item())
        brier = (probs - nn.functional.one_hot(classes, 3)).square().sum(1).mean().item()
        assert found.brier == pytest.approx(brier)
        assert int(found.reliability_curve().count.sum()) == int(kept.sum())


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3)])
def test_bernoulli_is_the_mean_of_binary_probabilities(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    width = shape[1] if len(shape) > 1 else 1
    net = nn.Linear(2, width, bias=False).double()
    x, y = torch.randn(8, 2, dtype=torch.float64), torch.randint(2, shape)
    thetas = torch.randn(4, 2 * width, dtype=torch.float64)
    found = lb.predict(net, thetas, [(x, y)], likelihood="bernoulli", progress=False)
    logits = torch.stack([x @ theta.view(width, 2).T for theta in thetas])
    target = y.view(8, width).double().expand(4, 8, width)
    log_likelihood = -nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    torch.testing.assert_close(found.mean, logits.sigmoid().mean(0))
    torch.testing.assert_close(found.sample_log_likelihood, log_likelihood)
    assert found.nll == pytest.approx(-log_likelihood.exp().mean(0).log().mean().item())


def test_bernoulli_refuses_targets_that_are_no_probabilities() -> None:
    with pytest.raises(ShapeError, match=r"must be in \[0, 1\]; got values from -1 to 1"):
        data = [(torch.ones(2, 2), torch.tensor([-1, 1]))]
        lb.predict(nn.Linear(2, 1), torch.zeros(1, 3), data, likelihood="bernoulli", progress=False)
