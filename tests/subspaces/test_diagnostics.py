"""Effective sample size and R-hat: against their definitions, and against chains whose autocorrelation is known."""

import math

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.subspaces.diagnostics import effective_sample_size, split_rhat


def autoregression(phi: float, chains: int, length: int, generator: torch.Generator) -> Tensor:
    """x_t = phi x_{t-1} + noise, started from its stationary law; ESS is C n (1 - phi) / (1 + phi)."""
    noise = torch.randn(chains, length, 2, dtype=torch.float64, generator=generator) * (1 - phi**2) ** 0.5
    noise[:, 0] /= (1 - phi**2) ** 0.5
    rows = [noise[:, 0]]
    for t in range(1, length):
        rows.append(phi * rows[-1] + noise[:, t])
    return torch.stack(rows, 1)


def ess_by_definition(chains: Tensor) -> float:
    """(C, n) of one coordinate, in plain loops: autocorrelations, Geyer's pairs, the bound log10(C n) a draw."""
    count, length = chains.shape
    rows = [[float(x) for x in chain] for chain in chains]
    means = [sum(row) / length for row in rows]
    within = sum(sum((x - m) ** 2 for x in row) / (length - 1) for row, m in zip(rows, means, strict=True)) / count
    grand = sum(means) / count
    total = within * (length - 1) / length + sum((m - grand) ** 2 for m in means) / (count - 1)
    rho = []
    for lag in range(length):
        products = [
            sum((row[t] - m) * (row[t + lag] - m) for t in range(length - lag)) / length
            for row, m in zip(rows, means, strict=True)
        ]
        rho.append(1 - (within - sum(products) / count) / total if lag else 1.0)
    time, smallest = -1.0, float("inf")
    for pair in zip(rho[0::2], rho[1::2], strict=False):
        if sum(pair) <= 0:
            break
        smallest = min(smallest, sum(pair))
        time += 2 * smallest
    return count * length / max(time, 1 / math.log10(count * length))


@pytest.mark.parametrize("length", [10, 41])
@pytest.mark.parametrize("phi", [-0.9, -0.3, 0.8])
def test_ess_by_its_definition(phi: float, length: int, generator: torch.Generator) -> None:
    draws = autoregression(phi, 2, length, generator)
    half = length // 2
    halves = torch.cat([draws[:, :half], draws[:, -half:]])
    expected = [ess_by_definition(halves[..., coordinate]) for coordinate in range(2)]
    torch.testing.assert_close(effective_sample_size(draws).tolist(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("phi,low,high", [(0.9, 0.85, 1.15), (0.5, 0.9, 1.1), (-0.5, 0.85, 1.15)])
def test_ess_of_an_autoregression_is_known(phi: float, low: float, high: float, generator: torch.Generator) -> None:
    """Relative error of the estimate at this length: 3 to 4 % one standard deviation, measured."""
    draws = autoregression(phi, 8, 4000, generator)
    ratio = effective_sample_size(draws) / (8 * 4000 * (1 - phi) / (1 + phi))
    assert bool(((ratio > low) & (ratio < high)).all()), ratio


def test_rhat_by_its_definition(generator: torch.Generator) -> None:
    """The larger of pyro's plain split R-hat of the normal scores of draws, and of their distances from the median."""
    stats = pytest.importorskip("pyro.ops.stats")
    rankdata = pytest.importorskip("scipy.stats").rankdata  # ties share their mean rank
    draws = (torch.randn(4, 50, 1, generator=generator).double() * 5).round()  # with ties
    found = []
    for values in (draws, (draws - draws.flatten().quantile(0.5)).abs()):
        ranks = torch.from_numpy(rankdata(values.flatten().numpy())).view_as(values)
        scores = torch.special.ndtri((ranks - 3 / 8) / (values.numel() + 1 / 4))
        found.append(stats.split_gelman_rubin(scores, chain_dim=0, sample_dim=1))
    torch.testing.assert_close(split_rhat(draws), torch.maximum(*found), rtol=1e-9, atol=0)


def test_rhat_sees_location_scale_and_drift_and_no_outlier(generator: torch.Generator) -> None:
    draws = torch.randn(4, 500, 1, generator=generator)
    assert split_rhat(draws).item() < 1.01
    wide = draws * torch.tensor([1.0, 1.0, 1.0, 4.0]).view(4, 1, 1)
    drift = draws + torch.linspace(0, 3, 500).view(1, 500, 1)
    assert split_rhat(wide).item() > 1.05 and split_rhat(drift).item() > 1.2
    heavy = torch.randn(4, 500, 1, generator=generator) / torch.randn(4, 500, 1, generator=generator)  # no variance
    assert split_rhat(heavy).item() < 1.02


def test_monotone_maps_leave_rhat_of_location_alone(generator: torch.Generator) -> None:
    draws = torch.randn(2, 100, 1, generator=generator) + torch.tensor([0.0, 5.0]).view(2, 1, 1)
    torch.testing.assert_close(split_rhat(draws), split_rhat(draws.exp()), rtol=1e-12, atol=0)


def test_what_has_no_answer_is_nan() -> None:
    draws = torch.zeros(2, 8, 2)
    draws[..., 1] = torch.arange(16.0).view(2, 8)
    draws[0, 3, 1] = torch.inf
    assert bool(effective_sample_size(draws).isnan().all()) and bool(split_rhat(draws).isnan().all())


@pytest.mark.parametrize("shape", [(2, 3, 1), (8, 1), (0, 8, 1)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    for function in (effective_sample_size, split_rhat):
        with pytest.raises(ShapeError, match=r"\(C, n, k\) with at least 1 chain of 4 draws; got"):
            function(torch.zeros(shape))
