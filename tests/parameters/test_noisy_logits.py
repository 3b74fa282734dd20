"""Noisy logits: the integral over the noise by quadrature, gradients, the noiseless limit."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.noisy_logits import NoisyLogitsLikelihood, noisy_log_probs
from lowrank_bdl.prediction.predict import predict

ALPHA_Z = 5.0  # a correct sampler is further off than this many standard errors once in 1.7 million


def inverse_softplus(std: float) -> float:
    return math.log(math.expm1(std))


@pytest.mark.parametrize(("difference", "stds"), [(2.0, (1.0, 0.5)), (-1.0, (3.0, 2.0)), (4.0, (0.3, 0.1))])
def test_two_classes_agree_with_quadrature(difference: float, stds: tuple[float, float]) -> None:
    """For two classes the average is that of a sigmoid over one normal number, and softplus(r) is its deviation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    sigmoid = 1 / (1 + np.exp(-(difference + math.hypot(*stds) * nodes)))
    weights = weights / weights.sum()
    expected = float((weights * sigmoid).sum())
    deviation = math.sqrt(float((weights * sigmoid**2).sum()) - expected**2)
    raw = [inverse_softplus(std) for std in stds]
    outputs = torch.tensor([[[difference, 0.0], raw]], dtype=torch.float64)
    draws = 20_000
    found = noisy_log_probs(outputs, draws, torch.Generator().manual_seed(0)).exp()[0, 0].item()
    error = deviation / math.sqrt(draws)
    assert abs(found - expected) < ALPHA_Z * error
    quiet = torch.tensor([[[difference, 0.0], [-300.0, -300.0]]], dtype=torch.float64)
    noiseless = noisy_log_probs(quiet, 2, torch.Generator().manual_seed(0)).exp()[0, 0].item()
    assert noiseless == pytest.approx(1 / (1 + math.exp(-difference)), rel=1e-12)
    assert abs(noiseless - expected) > 2 * ALPHA_Z * error  # the noise makes a difference that the test can see


def test_rows_are_probabilities_and_positions_have_noise_of_their_own() -> None:
    outputs = torch.zeros(2, 2, 5, 3, 4)
    found = noisy_log_probs(outputs, 3, torch.Generator().manual_seed(0))
    assert found.shape == (2, 5, 3, 4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 3, 4))
    assert found.flatten().unique().numel() == found.numel()
    assert torch.equal(found, noisy_log_probs(outputs, 3, torch.Generator().manual_seed(0)))
    assert noisy_log_probs(outputs.bfloat16(), 3).dtype == torch.float32


def test_gradients_agree_with_finite_differences() -> None:
    outputs = torch.randn(2, 2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def averaged(values: torch.Tensor) -> torch.Tensor:
        return noisy_log_probs(values, 4, torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(averaged, outputs.requires_grad_())


def test_is_a_likelihood_of_predict() -> None:
    outputs = torch.randn(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(3, 5, 6, dtype=torch.int64)
    net = nn.Linear(1, 1, bias=False)  # adds its weight, zero
    found = predict(
        net,
        torch.zeros(1),
        [(outputs, targets)],
        likelihood=NoisyLogitsLikelihood(7, torch.Generator().manual_seed(3)),
        call_fn=lambda model, batch: batch[0] + model(torch.ones(1)),
        progress=False,
    )
    expected = noisy_log_probs(outputs, 7, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.mean, expected.exp().movedim(1, -1))
    torch.testing.assert_close(found.log_likelihood, expected[:, 0])


def test_refuses() -> None:
    with pytest.raises(ValueError, match="num_draws must be at least 1; got 0"):
        noisy_log_probs(torch.zeros(1, 2, 3), 0)
    for outputs in (torch.zeros(1, 3), torch.zeros(1, 3, 2), torch.zeros(1, 2, 3, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"shape \(N, 2, C, \*positions\); got torch"):
            noisy_log_probs(outputs, 1)
