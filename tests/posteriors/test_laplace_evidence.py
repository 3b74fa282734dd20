"""The evidence and its maximum against dense algebra."""

import math

import pytest
import torch

from lowrank_bdl.posteriors.laplace_evidence import log_evidence, most_likely_precision


def values(seed=0, size=20):
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).pow(8) * 1e4


def test_evidence_from_its_definition():
    """Prior density, likelihood and the Gaussian integral, each with its own 2 pi."""
    h, tau, norm, loglik = values(), 3.0, 7.0, -11.0
    prior = 0.5 * len(h) * math.log(tau / (2 * math.pi)) - 0.5 * tau * norm
    integral = 0.5 * len(h) * math.log(2 * math.pi) - 0.5 * (h + tau).log().sum().item()
    assert log_evidence(loglik, norm, h.split(6), tau) == pytest.approx(loglik + prior + integral, rel=1e-12)


def test_evidence_of_a_precise_prior_does_not_cancel():
    """With tau >> h each direction adds -h / (2 tau), 1e-18 here, which log h + tau - log tau would lose."""
    h = torch.full((10,), 1e-8, dtype=torch.float64)
    assert log_evidence(0.0, 0.0, [h], 1e10) == pytest.approx(-5e-18, rel=1e-9)


@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e6])
def test_maximum(norm):
    h = values()
    tau = most_likely_precision(lambda: h.split(6), norm)
    assert (h / (h + tau)).sum().item() == pytest.approx(tau * norm, rel=1e-9)  # stationary
    best = log_evidence(0.0, norm, [h], tau)
    assert all(log_evidence(0.0, norm, [h], tau * factor) < best for factor in (1e-4, 0.9, 0.999, 1.001, 1.1, 1e4))


def test_directions_without_curvature_do_not_count():
    h = values()
    padded = torch.cat([h, torch.zeros(1000, dtype=torch.float64)])
    assert most_likely_precision(lambda: [padded], 2.0) == pytest.approx(most_likely_precision(lambda: [h], 2.0), 1e-9)


def test_no_maximum():
    with pytest.raises(ValueError, match=r"maximum only if neither.*\|mean\|\^2 = 0.0 and 20 positive eigenvalues"):
        most_likely_precision(lambda: [values()], 0.0)
    with pytest.raises(ValueError, match=r"got \|mean\|\^2 = 1.0 and 0 positive eigenvalues"):
        most_likely_precision(lambda: [torch.zeros(3, dtype=torch.float64)], 1.0)
