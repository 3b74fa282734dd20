"""Stochastic estimates of curvature against dense matrices, and without one eigenvalue problem of size D."""

import torch
from linear_operator.operators import ConstantDiagLinearOperator
from torch.nn.functional import cross_entropy

from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.curvature.hessian import HessianLinearOperator
from lowrank_bdl.linalg.log_determinant import logdet
from lowrank_bdl.linalg.spectral_density import spectral_density
from lowrank_bdl.linalg.stochastic_trace import diagonal, trace
from tests.curvature.dense import build_large, dense_hessian

SIGMAS = 7
"""Standard errors allowed. By Student's t with 19 degrees of freedom a false alarm has a chance of 1e-6."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_near(estimate, truth):
    assert 0 < estimate.standard_error < 0.5 * truth.abs(), "the error bar must say something"
    assert (estimate.value - truth).abs() < SIGMAS * estimate.standard_error


def test_hessian_of_a_network():
    net, data = build_large("mlp")
    dense = dense_hessian(net, data)
    values = torch.linalg.eigvalsh(dense)
    hessian = HessianLinearOperator(net, cross_entropy, data)
    density = spectral_density(hessian, 20, 25, generator=seeded(0))
    assert_near(density.integrate(torch.square), values.square().sum())
    assert_near(density.integrate(torch.abs), values.abs().sum())
    scale = values.abs().max()
    assert (density.nodes.max() - values[-1]).abs() < 1e-6 * scale
    assert (density.nodes.min() - values[0]).abs() < 1e-6 * scale
    assert_near(trace(hessian, 60, generator=seeded(1)), dense.trace())
    entries = diagonal(hessian, 20, generator=seeded(2))
    worst = ((entries.value - dense.diagonal()).abs() / entries.standard_error.clamp(min=1e-12)).max()
    assert worst < 12  # 3e-7 by Student's t with 19 degrees of freedom, for 700 entries


def test_log_evidence_term_of_the_ggn():
    net, data = build_large("mlp")
    ggn = GGNLinearOperator(net, cross_entropy, data)
    posterior = ggn + ConstantDiagLinearOperator(torch.tensor([0.05]).double(), ggn.shape[0])
    found = logdet(posterior, 20, 40, generator=seeded(0))
    assert found.num_matvecs <= 20 * 40 and found.truncation < 1e-6
    assert_near(found, torch.logdet(ggn.to_dense() + 0.05 * torch.eye(ggn.shape[0]).double()))
